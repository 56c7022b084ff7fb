"""The directory of a run: what it was started with, and the text it learns."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastlm._version import __version__
from fastlm.data import Dataset, prepare
from fastlm.data.files import write_atomically
from fastlm.models import GPT, GPTConfig
from fastlm.train import checkpoint as checkpoints
from fastlm.train.config import TrainConfig, prepare_machine
from fastlm.train.progress import Progress

# Bytes of text that are read again to compare with: the 5-gram takes about a second and 100 MB of memory for each MB.
NGRAM_TEXT_LIMIT = 32 << 20
NGRAM_TEXT_HERE = 1 << 20  # bytes that are counted in this process


def claim(config: TrainConfig, overwrite: bool) -> TrainConfig:
    """The configuration with a directory that holds no run yet: its own, or the first free `runs/<preset>-<number>`.

    Raises ValueError for a directory that holds a run, unless that may be overwritten.
    """
    if config.out is None:
        number = 1
        while (out := Path("runs") / f"{config.preset}-{number}").exists():
            number += 1
        return config.replace(out=str(out))
    if not overwrite and checkpoints.paths(Path(config.out) / "checkpoints"):
        raise ValueError(
            f"{config.out} holds a run already; go on with it by `fastlm resume {config.out}`,"
            " replace it with --overwrite, or give another --out"
        )
    return config


def clear(out: Path) -> None:
    """Removes what a run wrote into its directory; the prepared text stays."""
    for name in ("config.json", "metrics.jsonl", "result.json", "sample.txt", "loss.png"):
        with contextlib.suppress(FileNotFoundError):
            (out / name).unlink()
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def prepare_data(config: TrainConfig, progress: Progress) -> Dataset:
    """The tokenized text, kept in the run's directory. Raises ValueError for text that is too short for the model."""
    vocab_size = config.vocab_size if config.tokenizer == "bpe" else None
    dataset = prepare(config.data, Path(config.out) / "data", tokenizer=config.tokenizer, vocab_size=vocab_size)
    for line in str(dataset.report).splitlines():
        progress.say(line)
    progress.say(
        f"tokens    {len(dataset.train):,} to train on, {len(dataset.val):,} held out,"
        f" {dataset.tokenizer.vocab_size:,} in the vocabulary, {dataset.val_bytes / len(dataset.val):.2f} bytes each"
    )
    for part, tokens in (("training", dataset.train), ("held-out", dataset.val)):
        if len(tokens) <= config.block_size:
            raise ValueError(
                f"--block-size {config.block_size}: the {part} text has only {len(tokens)} tokens;"
                " give more text or a smaller block"
            )
    return dataset


def ngram_baseline(dataset: Dataset, progress: Progress) -> float | None:
    """Bits per byte of a byte 5-gram on the held-out text, None for a text too long to count in memory.

    Of a longer text it is counted in another process, since it takes more memory than a small model's training.
    """
    if dataset.train_bytes > NGRAM_TEXT_LIMIT:
        progress.say(f"5-gram     not counted: the text is longer than {NGRAM_TEXT_LIMIT >> 20} MiB")
        return None
    if dataset.train_bytes > NGRAM_TEXT_HERE and not (dataset.path / "ngram5.json").exists():
        code = (
            "import sys; sys.path[:] = sys.argv[2:]; from fastlm.data import Dataset;"
            " Dataset.open(sys.argv[1]).ngram_bits_per_byte()"
        )
        subprocess.run(
            [sys.executable, "-c", code, str(dataset.path), *sys.path], check=False, stderr=subprocess.DEVNULL
        )
    bits = dataset.ngram_bits_per_byte()
    progress.say(f"5-gram    {bits:.3f} bits per byte on the held-out text")
    return bits


def write_run(out: Path, config: TrainConfig, dataset: Dataset) -> None:
    """Records what the run is; written before its first step."""
    content = {
        "config": config.to_dict(),
        "dataset": dataset.path.relative_to(out).as_posix(),
        "corpus_sha256": dataset.corpus_sha256,
        "fastlm": __version__,
        "torch": torch.__version__,
        "backend": os.environ.get("FASTLM_BACKEND", "auto"),
    }
    write_atomically(out / "config.json", (json.dumps(content, indent=2) + "\n").encode())


def open_run(out: str | os.PathLike[str]) -> tuple[TrainConfig, Dataset]:
    """What `write_run` recorded. Raises ValueError where there is no run or its files were altered."""
    out = Path(out)
    file = out / "config.json"
    try:
        content = json.loads(file.read_bytes())
        config = TrainConfig.from_dict(content["config"]).replace(out=str(out))
        dataset, corpus_sha256 = Dataset.open(out / content["dataset"]), content["corpus_sha256"]
    except FileNotFoundError as error:
        if not file.exists():
            raise ValueError(f"{out} holds no run: there is no config.json in it") from None
        raise ValueError(f"{out}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be used: {error}") from None
    if dataset.corpus_sha256 != corpus_sha256:
        raise ValueError(f"{dataset.path} holds another text than the one that the run in {out} was started with")
    return config, dataset


@dataclass(frozen=True)
class LoadedModel:
    """A trained model and what it was trained with."""

    model: GPT  # in evaluation mode, on the configuration's device
    config: TrainConfig
    dataset: Dataset
    step: int


def load_model(
    out: str | os.PathLike[str], which: Literal["best", "last"] = "best", warn: Callable[[str], None] = lambda _: None
) -> LoadedModel:
    """The model of a run: its checkpoint with the lowest validation loss, or its newest one.

    Raises ValueError where there is no run, CheckpointError where no checkpoint can be read; `warn(sentence)` for a
    checkpoint that was passed over.
    """
    config, dataset = open_run(out)
    config = prepare_machine(config.replace(device="auto", threads=0))  # perhaps elsewhere than it was trained
    load = checkpoints.load_best if which == "best" else checkpoints.load_newest
    checkpoint = load(Path(out) / "checkpoints", warn)
    model = GPT(GPTConfig.from_dict(checkpoint.model_config)).to(config.device).eval()
    checkpoints.restore_model(model, checkpoint)
    return LoadedModel(model, config, dataset, checkpoint.step)
