"""The directory of a run: what it was started with, and the text it learns."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from fastlm import _library, _native
from fastlm._version import __version__
from fastlm.data import Dataset, prepare
from fastlm.data.files import sealed_json, unsealed, write_atomically
from fastlm.models import GPT, GPTConfig
from fastlm.train import checkpoint as checkpoints
from fastlm.train.config import TrainConfig, decide
from fastlm.train.progress import Progress

# Bytes of text that are read again to compare with: the 5-gram takes about a second and 100 MB of memory for each MB.
NGRAM_TEXT_LIMIT = 32 << 20
NGRAM_TEXT_HERE = 1 << 20  # bytes that are counted in this process
# What a run writes into its directory beside the prepared text, whose folders are named after their content.
_NAMES = ("config.json", "metrics.jsonl", "result.json", "sample.txt", "loss.png", "checkpoints")
_ASIDE = ".replaced-run"  # where a run waits until the one that replaces it has a checkpoint
_LOCK = ".fastlm-lock"  # never moved aside with a run, so that it locks the directory for old and new


@contextlib.contextmanager
def claimed(config: TrainConfig, overwrite: bool) -> Iterator[TrainConfig]:
    """The configuration with a directory for a new run, which no other process can train in meanwhile.

    It is the configuration's own, or the first free `runs/<preset>-<number>`. One that was made here goes again, with
    what was prepared in it, if anything fails before there is a run in it. Raises ValueError as `check_free` does.
    """
    if config.out is None:
        made, config = True, config.replace(out=str(next(filter(_made, _numbered(config)))))
    else:
        made = _made(Path(config.out))
    out = Path(config.out)
    with locked(out):
        try:
            settle(out)
            check_free(out, overwrite)
            yield config
        except BaseException:
            if made and not (out / "config.json").exists():
                shutil.rmtree(out, ignore_errors=True)
            raise


def free_directory(config: TrainConfig, overwrite: bool) -> TrainConfig:
    """What `claimed` would give or refuse at this moment; makes and locks nothing."""
    if config.out is None:
        return config.replace(out=str(next(out for out in _numbered(config) if not out.exists())))
    check_free(Path(config.out), overwrite)
    return config


def check_free(out: Path, overwrite: bool) -> None:
    """Raises ValueError for a directory that holds a run, unless that may be overwritten.

    Also for one with other files under the names that a run writes.
    """
    there = [name for name in _NAMES if os.path.lexists(out / name)]
    if not there:
        return
    try:
        _read(out)
    except (OSError, ValueError):
        raise ValueError(
            f"{out} holds {there[0]}, and no run that can be read; move it away or give another --out"
        ) from None
    foreign = [path for path in (out / "checkpoints").glob("*") if not checkpoints.is_ours(path)]
    if foreign:
        raise ValueError(f"{foreign[0]} is no checkpoint of a run; move it away or give another --out")
    if not overwrite:
        raise ValueError(
            f"{out} holds a run already; go on with it by `fastlm resume {out}`,"
            " replace it with --overwrite, or give another --out"
        )


def _numbered(config: TrainConfig) -> Iterator[Path]:
    return (Path("runs") / f"{config.preset}-{number}" for number in itertools.count(1))


def _made(out: Path) -> bool:
    """Whether this call made the directory: of two runs that start at once, one does."""
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Around all that writes a run: raises ValueError where another process does.

    The system unlocks for a process that ends in whatever way. Without such locks (Windows, a file system that has
    none) nothing is locked.
    """
    if fcntl is None:
        yield
        return
    path = out / _LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"another process trains in {out}; stop it or give another directory") from None
        except OSError:  # the file system cannot
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # who held it has just removed the file: a lock on it keeps nobody out
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[None]:
    """Around a new run: the one that `out` holds comes back if the new one fails before its first checkpoint."""
    settle(out, failed=True)
    try:
        if (out / "config.json").exists():
            (out / _ASIDE).mkdir(exist_ok=True)
            for name in _NAMES:  # config.json first: what is left is then no run
                with contextlib.suppress(FileNotFoundError):
                    os.replace(out / name, out / _ASIDE / name)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the next `train` or `resume` tries again
            settle(out, failed=True)
        raise


def settle(out: Path, *, failed: bool = False) -> None:
    """What becomes of a run set aside: nothing is left of it once the new one has a checkpoint.

    It comes back where the new one never began, or failed without a checkpoint.
    """
    aside = out / _ASIDE
    began = (out / "config.json").exists()
    if began and checkpoints.paths(out / "checkpoints"):
        shutil.rmtree(aside, ignore_errors=True)
    elif (aside / "config.json").exists() and (failed or not began):
        (out / "config.json").unlink(missing_ok=True)
        for name in reversed(_NAMES):  # config.json last: until then this is done again
            if (aside / name).exists():
                shutil.rmtree(out / name, ignore_errors=True)  # checkpoints, of which the new run has none
                os.replace(aside / name, out / name)
        aside.rmdir()


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
    check_lengths(config, len(dataset.train), len(dataset.val))
    return dataset


def check_lengths(config: TrainConfig, train: int, val: int) -> None:
    """Raises ValueError for text that is too short for the model. train, val: tokens of each part, or a bound."""
    for part, tokens in (("training", train), ("held-out", val)):
        if tokens <= config.block_size:
            raise ValueError(
                f"--block-size {config.block_size}: the {part} text has only {tokens} tokens;"
                " give more text or a smaller block"
            )


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
        "run": secrets.token_hex(8),
        "config": config.to_dict(),
        "dataset": dataset.path.relative_to(out).as_posix(),
        "corpus_sha256": dataset.corpus_sha256,
        **_environment(),
    }
    write_atomically(out / "config.json", sealed_json(content))


def _environment() -> dict[str, str | None]:
    """What the last bits of a run depend on beside its configuration."""
    return {
        "fastlm": __version__,
        "torch": torch.__version__,
        "backend": _library._state.backend,
        "cpu_isa": _native.cpu.active_isa() if _native.cpu is not None else None,
    }


def changed_environment(out: Path) -> str | None:
    """A sentence on what differs from when the run was started and ends the equality of bits; None for nothing."""
    then, now = _read(out), _environment()
    changes = [f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
    if not changes:
        return None
    return f"since the run was started, {', '.join(changes)}: it goes on, but no longer with the same bits"


def _read(out: Path) -> dict[str, Any]:
    """config.json, verified. Raises OSError or ValueError."""
    return unsealed(json.loads((out / "config.json").read_bytes()))


def identity(out: Path) -> str | None:
    """What tells the checkpoints of the run in `out` from those of any other. Raises OSError or ValueError."""
    return _read(out).get("run")  # runs of earlier versions have none, nor do their checkpoints


def open_run(out: str | os.PathLike[str]) -> tuple[TrainConfig, Dataset]:
    """What `write_run` recorded. Raises ValueError where there is no run or its files were altered."""
    out = Path(out)
    file = out / "config.json"
    try:
        content = _read(out)
        config = TrainConfig.from_dict(content["config"]).replace(out=str(out))
        dataset, corpus_sha256 = Dataset.open(out / content["dataset"]), content["corpus_sha256"]
    except FileNotFoundError as error:
        if not file.exists():
            aside = f"; `fastlm resume {out}` brings back the one set aside" if (out / _ASIDE).exists() else ""
            raise ValueError(f"{out} holds no run: there is no config.json in it{aside}") from None
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
    config = decide(config.replace(device="auto", threads=0))  # perhaps elsewhere than it was trained
    load = checkpoints.load_best if which == "best" else checkpoints.load_newest
    checkpoint = load(Path(out) / "checkpoints", identity(Path(out)), warn)
    model = GPT(GPTConfig.from_dict(checkpoint.model_config)).to(config.device).eval()
    checkpoints.restore_model(model, checkpoint)
    return LoadedModel(model, config, dataset, checkpoint.step)
