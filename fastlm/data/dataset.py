"""From a source to a data set on disk: corpus, tokenizer, token files; made once and then found again.

A data set is a folder of `train.bin`, `val.bin` (token files), `tokenizer.json` and `dataset.json`, named after what it
follows from: the text, the kind of tokenizer and its vocabulary. It is made under a temporary name and renamed when
complete, so a folder with its final name is whole, whoever was interrupted and however many work at the same time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastlm.data.corpus import CleaningReport, Corpus, load_corpus
from fastlm.data.files import sealed_json, sync_directory, unsealed, write_atomically
from fastlm.data.ngram import ngram_bits_per_byte
from fastlm.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from fastlm.data.tokens import TokenFile, bits_per_byte

# Goes up when the same text would give other tokens or another baseline; older folders are then not found any more.
_VERSION = 1
_LITTER_AGE = 24 * 3600  # seconds after which a temporary folder is taken for what a killed run left


@dataclass(frozen=True)
class Dataset:
    """A tokenized corpus.

    train, val: token streams (n,), memory-mapped, with eot before, between and after documents. train_bytes, val_bytes:
    of their text as UTF-8. corpus_sha256: of the cleaned text and its split.
    """

    path: Path
    train: np.ndarray
    val: np.ndarray
    train_bytes: int
    val_bytes: int
    tokenizer: ByteTokenizer | BPETokenizer
    corpus_sha256: str
    report: CleaningReport

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Dataset:
        """Opens a folder that `prepare` made, without its source. Raises ValueError if any file of it was altered."""
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"fastlm.data: no data set at {path}")
        try:
            content = unsealed(json.loads((path / "dataset.json").read_bytes()))
            report = CleaningReport(**content["report"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"fastlm.data: {path / 'dataset.json'} is missing or corrupted: {error}") from None
        tokenizer = load_tokenizer(path / "tokenizer.json")
        train = TokenFile.open(path / "train.bin", verify=True)
        val = TokenFile.open(path / "val.bin", verify=True)
        if not train.vocab_size == val.vocab_size == tokenizer.vocab_size:
            raise ValueError(
                f"fastlm.data: {path} is corrupted: vocabularies of {train.vocab_size} (train.bin),"
                f" {val.vocab_size} (val.bin) and {tokenizer.vocab_size} (tokenizer.json)"
            )
        return Dataset(
            path=path,
            train=train.tokens,
            val=val.tokens,
            train_bytes=report.train_bytes,
            val_bytes=report.val_bytes,
            tokenizer=tokenizer,
            corpus_sha256=content["corpus_sha256"],
            report=report,
        )

    def documents(self, part: Literal["train", "val"]) -> list[str]:
        """The documents of a part, as they were before tokenization."""
        if part not in ("train", "val"):
            raise ValueError(f"fastlm.data.Dataset.documents: part must be 'train' or 'val', got {part!r}")
        stream = np.asarray(self.train if part == "train" else self.val)
        ends = np.flatnonzero(stream == self.tokenizer.eot)
        return [self.tokenizer.decode(stream[start + 1 : end]) for start, end in itertools.pairwise(ends)]

    def bits_per_byte(self, total_nats: float) -> float:
        """Cross-entropy summed over all targets of the held-out stream, in nats, as bits per byte of held-out text."""
        return bits_per_byte(total_nats, self.val_bytes)

    def ngram_bits_per_byte(self, order: int = 5) -> float:
        """What a byte n-gram model reaches on this split. Computed once (seconds for 9 MB), then kept in the folder."""
        file = self.path / f"ngram{order}.json"
        what = {"version": _VERSION, "corpus_sha256": self.corpus_sha256, "order": order}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(file.read_bytes())
            value = float(content.pop("bits_per_byte"))
            if content == what:
                return value
        value = ngram_bits_per_byte(self.documents("train"), self.documents("val"), order)
        with contextlib.suppress(OSError):  # a full disk or a read-only folder costs the time again, nothing else
            write_atomically(file, json.dumps({**what, "bits_per_byte": value}, indent=1).encode())
        return value


def prepare(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: Literal["bpe", "byte"] = "bpe",
    vocab_size: int | None = None,
) -> Dataset:
    """Loads `source` (see `load_corpus`), tokenizes it, and keeps the result in a folder of `out_dir`.

    tokenizer: "bpe", trained on the training part to at most vocab_size tokens (4096 by default), or "byte", which has
    257. The second call with the same text and settings opens what the first one made; a damaged folder is made anew.
    Raises OSError when a file cannot be written; nothing that stood in `out_dir` is lost then.
    """
    if tokenizer == "bpe":
        vocab_size = 4096 if vocab_size is None else vocab_size
    elif tokenizer == "byte":
        if vocab_size not in (None, 257):
            raise ValueError(f"fastlm.data.prepare: the byte tokenizer has vocab_size 257, got {vocab_size}")
        vocab_size = 257
    else:
        raise ValueError(f"fastlm.data.prepare: tokenizer must be 'bpe' or 'byte', got {tokenizer!r}")
    corpus = load_corpus(source)
    key = hashlib.sha256(f"{_VERSION} {corpus.sha256}".encode()).hexdigest()[:12]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).stem) or "text"
    final = Path(out_dir) / f"{stem}-{tokenizer}{vocab_size}-{key}"
    with contextlib.suppress(ValueError, FileNotFoundError):
        return Dataset.open(final)
    try:
        os.makedirs(out_dir, exist_ok=True)
        _remove_litter(final)
        temporary = final.with_name(f".tmp-{final.name}-{os.getpid()}-{secrets.token_hex(4)}")
        os.mkdir(temporary)
    except OSError as error:
        raise OSError(error.errno, f"fastlm.data: no folder can be made in {out_dir}: {error.strerror}") from error
    try:
        _build(temporary, corpus, tokenizer, vocab_size)
        return _publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build(folder: Path, corpus: Corpus, kind: str, vocab_size: int) -> None:
    tokenizer = ByteTokenizer() if kind == "byte" else BPETokenizer.train(corpus.train, vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    TokenFile.write(folder / "train.bin", tokenizer.encode_documents(corpus.train), tokenizer.vocab_size)
    TokenFile.write(folder / "val.bin", tokenizer.encode_documents(corpus.val), tokenizer.vocab_size)
    content = {"version": _VERSION, "corpus_sha256": corpus.sha256, "report": dataclasses.asdict(corpus.report)}
    write_atomically(folder / "dataset.json", sealed_json(content))


def _remove_litter(final: Path) -> None:
    for folder in final.parent.glob(f".tmp-{final.name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _LITTER_AGE:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(temporary: Path, final: Path) -> Dataset:
    """Gives a complete folder its final name, unless another process was first with a good one."""
    damaged = temporary.with_name(f"{temporary.name}-damaged")
    try:
        for _ in range(10):
            try:
                os.rename(temporary, final)
            except OSError:
                if not final.exists():
                    raise
            else:
                with contextlib.suppress(OSError):  # a name lost with the power costs making the folder again
                    sync_directory(final.parent)
                break
            with contextlib.suppress(ValueError, FileNotFoundError):
                return Dataset.open(final)
            with contextlib.suppress(FileNotFoundError):  # another process may have moved it away already
                os.rename(final, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        return Dataset.open(final)
    except OSError as error:
        raise OSError(error.errno, f"fastlm.data: {final} could not be written: {error.strerror or error}") from error
