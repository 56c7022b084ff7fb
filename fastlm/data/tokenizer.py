"""Tokenizers: text to token ids and back, without loss.

Two kinds, one protocol: `ByteTokenizer` (256 bytes) and `BPETokenizer` (byte pairs merged as often as the vocabulary
allows; Sennrich et al. 2016, over bytes as in Radford et al. 2019). Both have one token more, `eot`, that separates
documents. It has an id but no spelling: no text encodes to it, so a document can hold any characters at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fastlm.data.files import sealed_json, unsealed, write_atomically

_FORMAT = "fastlm tokenizer"
_VERSION = 1

# Where text is cut before merging: tokens never cross these borders. Written for prose and for source code: a word may
# take one character before it (" word", "_word", ".word"), digits stand in threes at most, punctuation takes the line
# end and the indentation after it, spaces stay together but leave the last one to the word that follows. On the Python
# library this gives 3.68 bytes per token at 4096 tokens, where the cut of GPT-2 gives 3.44; on plays 3.24 and 2.90.
_PIECES = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:[\r\n]+(?: *(?!\S))?)?"
    r"|\s+(?!\S)"
    r"|\s+"
)
# Long texts are encoded in chunks cut after a line, in parallel; a chunk's last token never joins the next one's first.
_CHUNK_CHARACTERS = 1 << 16


@runtime_checkable
class Tokenizer(Protocol):
    """What the model and the trainer need of a tokenizer.

    vocab_size: ids are 0 .. vocab_size - 1. eot: the id between documents. dtype: of the ids, uint16 where that fits.
    """

    vocab_size: int
    eot: int
    dtype: np.dtype

    def encode(self, text: str) -> np.ndarray:
        """Ids (n,) of `text`, without eot; `decode(encode(text)) == text` for every text that has a UTF-8 form."""

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """One stream (n,): eot, first text, eot, second text, eot, ..., last text, eot."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. eot has none; bytes that form no character (a sample may end inside one) become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, exactly, whether they form characters or not."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `load_tokenizer` reads; an existing one is replaced wholly or not at all."""


class _ByteLevel:
    """What both kinds share, given each id's bytes."""

    kind: str

    def __init__(self, id_to_bytes: list[bytes]):
        self._id_to_bytes = [*id_to_bytes, b""]  # the last one is eot
        self.vocab_size = len(self._id_to_bytes)
        self.eot = self.vocab_size - 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(self, text: str) -> np.ndarray:
        return self._concatenate(self._encode_chunks(_chunks(text)))

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):
            raise TypeError("fastlm.data.encode_documents: texts must be a sequence of str, got one str")
        chunks, document = [], []
        for number, text in enumerate(texts):
            pieces = _chunks(text)
            chunks += pieces
            document += [number] * len(pieces)
        separator = np.array([self.eot], dtype=self.dtype)
        stream, last = [separator], 0
        for number, ids in zip(document, self._encode_chunks(chunks), strict=True):
            stream += [separator] * (number - last)
            stream.append(ids)
            last = number
        stream += [separator] * (len(texts) - last)
        return self._concatenate(stream)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, exactly, whether they form characters or not."""
        numbers = [int(i) for i in ids] if not hasattr(ids, "tolist") else ids.tolist()
        for i in (min(numbers, default=0), max(numbers, default=0)):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"fastlm.data.decode: ids must be in 0 .. {self.vocab_size - 1}, got {i}")
        return b"".join(map(self._id_to_bytes.__getitem__, numbers))

    def save(self, path: str | os.PathLike[str]) -> None:
        content = {"format": _FORMAT, "version": _VERSION, "kind": self.kind, "vocab_size": self.vocab_size}
        content |= self._state()
        write_atomically(path, sealed_json(content))

    def _concatenate(self, parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def _encode_chunks(self, chunks: list[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        return {}


class ByteTokenizer(_ByteLevel):
    """One token per byte of UTF-8; 257 ids, eot is 256."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)])

    def _encode_chunks(self, chunks: list[str]) -> list[np.ndarray]:
        _check_encodable(chunks)
        return [np.frombuffer(chunk.encode(), dtype=np.uint8).astype(self.dtype) for chunk in chunks]


class BPETokenizer(_ByteLevel):
    """Byte-level BPE. Make one with `BPETokenizer.train` or `load_tokenizer`.

    Needs the package tokenizers, which does the merging.
    """

    kind = "bpe"

    def __init__(self, model: Any):
        """model: a `tokenizers.Tokenizer` over the byte alphabet of `tokenizers.pre_tokenizers.ByteLevel`."""
        # Byte-level BPE spells each byte as one printable character; this is the way back.
        to_byte = {character: byte for byte, character in enumerate(_byte_alphabet())}
        vocabulary = model.get_vocab()
        spelling = {i: token for token, i in vocabulary.items()}
        if sorted(spelling) != list(range(len(vocabulary))) or not to_byte.keys() <= vocabulary.keys():
            raise ValueError("fastlm.data: a BPE vocabulary must hold all 256 bytes and number its tokens without gaps")
        super().__init__([bytes(to_byte[c] for c in spelling[i]) for i in range(len(spelling))])
        self._model = model

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learns the merges from `texts`, the training part alone; the same texts give the same tokenizer.

        vocab_size: with the 256 bytes and eot, so at least 257. A text that repeats too little to fill it gives a
        smaller vocabulary; read `vocab_size` back.
        """
        if not isinstance(vocab_size, int) or not 257 <= vocab_size <= 2**24:
            raise ValueError(f"fastlm.data.BPETokenizer: vocab_size must be an int in 257 .. 2**24, got {vocab_size!r}")
        if isinstance(texts, str):
            raise TypeError("fastlm.data.BPETokenizer: texts must be an iterable of str, got one str")
        tokenizers = _import_tokenizers()
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # eot is ours alone
            min_frequency=2,
            initial_alphabet=_byte_alphabet(),
            show_progress=False,
        )
        chunks = [chunk for text in texts for chunk in _chunks(text)]
        _check_encodable(chunks)
        model.train_from_iterator(chunks, trainer=trainer)
        return cls(model)

    def _encode_chunks(self, chunks: list[str]) -> list[np.ndarray]:
        _check_encodable(chunks)
        # The fast one, of tokenizers 0.20 and later, leaves out character offsets, which nobody reads here.
        encode = getattr(self._model, "encode_batch_fast", self._model.encode_batch)
        encoded: list[np.ndarray] = []
        for start in range(0, len(chunks), 256):  # bounds the memory that the encodings take before they are arrays
            batch = encode(chunks[start : start + 256], add_special_tokens=False)
            encoded += [np.array(encoding.ids, dtype=self.dtype) for encoding in batch]
        return encoded

    def _state(self) -> dict[str, Any]:
        return {"tokenizers": json.loads(self._model.to_str())}


def load_tokenizer(path: str | os.PathLike[str]) -> ByteTokenizer | BPETokenizer:
    """Reads what `save` wrote. A file that is anything else, or was altered, raises ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"fastlm.data: no tokenizer file at {path}")
    try:
        content = json.loads(path.read_bytes())
        known = isinstance(content, dict) and content.get("format") == _FORMAT
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"fastlm.data: {path} is not a tokenizer file or is corrupted: {error}") from None
    if not known:
        raise ValueError(f"fastlm.data: {path} is not a tokenizer file of fastlm")
    if content.get("version") != _VERSION:
        raise ValueError(
            f"fastlm.data: {path} has tokenizer format {content.get('version')!r}; this fastlm reads {_VERSION}"
        )
    try:
        content = unsealed(content)
    except ValueError as error:
        raise ValueError(f"fastlm.data: {path} is corrupted: {error}") from None
    if content["kind"] == "byte":
        return ByteTokenizer()
    if content["kind"] != "bpe":
        raise ValueError(
            f"fastlm.data: {path} holds a tokenizer of kind {content['kind']!r}; 'byte' and 'bpe' are known"
        )
    return BPETokenizer(_import_tokenizers().Tokenizer.from_str(json.dumps(content["tokenizers"])))


def _chunks(text: str) -> list[str]:
    """`text` in pieces of about `_CHUNK_CHARACTERS`, each but the last ending with a line feed where there is one."""
    if not isinstance(text, str):
        raise TypeError(f"fastlm.data.encode: text must be a str, got {type(text).__name__}")
    pieces, start = [], 0
    while len(text) - start > _CHUNK_CHARACTERS:
        end = text.rfind("\n", start, start + _CHUNK_CHARACTERS) + 1 or start + _CHUNK_CHARACTERS
        pieces.append(text[start:end])
        start = end
    if start < len(text):
        pieces.append(text[start:])
    return pieces


def _check_encodable(texts: list[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"fastlm.data.encode: text holds the lone surrogate U+{ord(text[error.start]):04X},"
                " which has no UTF-8 form; expected text that can be written as UTF-8"
            ) from None


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte 0 .. 255 in byte-level BPE (Radford et al. 2019, GPT-2).

    A byte that is a printable Latin-1 character stands for itself, the others get the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: 0x100 + i for i, byte in enumerate(others)}
    return [chr(stand_in.get(byte, byte)) for byte in range(256)]


def _import_tokenizers():
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "fastlm.data: BPE needs the package tokenizers: pip install 'fastlm[train]', or use the byte tokenizer"
        ) from error
    return tokenizers
