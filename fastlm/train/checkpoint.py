"""Checkpoints: complete or absent.

A run keeps them in `checkpoints/step-00000400/`:

    model.safetensors        the weights, named as in `GPT.named_parameters()`
    optimizer.safetensors    AdamW's moments, `<parameter>/<name in the optimizer's state>`
    checkpoint.json          run, step, validation loss, model's shapes, SHA-256 of the two files above and of itself

All three are written into a hidden directory and flushed to the disk, then the directory gets its name in one rename.
A crash, a kill or a full disk at any moment leaves either the whole checkpoint or none. The newest two and the best by
validation loss stay; others go only after a newer one has its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.data.files import sealed_json, sync_directory, unsealed, write_atomically

_VERSION = 2


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint's weights and state, on the CPU."""

    run: str | None  # which run it is of, as its config.json says
    step: int  # steps done
    val_loss: float | None  # nats per token on the fixed subset of the held-out text; None before the first evaluation
    model_config: dict
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "<parameter>/<state>"
    path: Path


class CheckpointError(RuntimeError):
    """No checkpoint, or none that can be read."""


def save(
    directory: Path,
    *,
    run: str | None,
    step: int,
    val_loss: float | None,
    model_config: dict,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
) -> Path:
    """Writes `directory/step-<step>` and drops what it makes superfluous. Raises OSError, leaving what was there."""
    from safetensors.torch import save as to_bytes

    directory.mkdir(parents=True, exist_ok=True)
    target = directory / _name(step)
    if target.exists():
        with contextlib.suppress(CheckpointError):
            _load_of(run, target)
            return target  # the same run at the same step: the same content
        _remove(target)  # a corrupted one, that the run resumed from before, or another run's
    for litter in directory.glob(".tmp-*"):  # of a run that was killed while writing
        shutil.rmtree(litter, ignore_errors=True)
    temporary = directory / f".tmp-{target.name}"
    try:
        temporary.mkdir()
        hashes = {}
        for name, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
            content = to_bytes({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, {"format": "pt"})
            write_atomically(temporary / name, content)
            hashes[name] = hashlib.sha256(content).hexdigest()
        state = {
            "version": _VERSION,
            "run": run,
            "step": step,
            "val_loss": val_loss,
            "model_config": model_config,
            "files": hashes,
        }
        write_atomically(temporary / "checkpoint.json", sealed_json(state))
        os.replace(temporary, target)
        sync_directory(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _drop_superfluous(directory, run, target)
    return target


def load(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint. Raises CheckpointError if any of it is missing or altered."""
    from safetensors.torch import load as from_bytes

    try:
        state = _state(path)
        tensors = {}
        for name, expected in state["files"].items():
            content = (path / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != expected:
                raise CheckpointError(f"{path / name} is corrupted: its content does not match its checksum")
            tensors[name] = from_bytes(content)
        return Checkpoint(
            run=state.get("run"),
            step=state["step"],
            val_loss=state["val_loss"],
            model_config=state["model_config"],
            model=tensors["model.safetensors"],
            optimizer=tensors["optimizer.safetensors"],
            path=path,
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError) as error:  # JSON or safetensors that cannot be parsed, or lacks a field
        raise CheckpointError(f"{path} is corrupted: {error}") from None


def _load_of(run: str | None, path: Path) -> Checkpoint:
    """`load`, and a CheckpointError for the checkpoint of another run."""
    checkpoint = load(path)
    if checkpoint.run != run:
        raise CheckpointError(f"{path} is of another run")
    return checkpoint


def _state(path: Path) -> dict[str, Any]:
    """checkpoint.json, verified. Raises OSError, ValueError, or CheckpointError for another version's."""
    content = json.loads((path / "checkpoint.json").read_bytes())
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != _VERSION:
        raise CheckpointError(f"{path} has checkpoint format {version}; this fastlm reads {_VERSION}")
    state = unsealed(content)
    if path.name != _name(state["step"]):
        raise ValueError(f"it is of step {state['step']}")
    return state


def _name(step: int) -> str:
    return f"step-{step:08d}"


def load_newest(directory: Path, run: str | None, warn: Callable[[str], None]) -> Checkpoint:
    """The run's newest checkpoint that is whole; `warn(sentence)` for each newer one that is not."""
    failures = []
    for path in reversed(paths(directory)):
        try:
            checkpoint = _load_of(run, path)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        for sentence in failures:
            warn(f"{sentence}; going on from step {checkpoint.step} instead")
        return checkpoint
    if failures:
        raise CheckpointError(f"no checkpoint in {directory} can be read: {'; '.join(failures)}")
    raise CheckpointError(f"no checkpoint in {directory}")


def load_best(directory: Path, run: str | None, warn: Callable[[str], None]) -> Checkpoint:
    """The run's checkpoint with the lowest validation loss.

    The newest whole one where none was evaluated or the best is corrupted.
    """
    best = _best(run, paths(directory))
    if best is not None:
        try:
            return load(best)
        except CheckpointError as error:
            warn(f"{error}; taking the newest one instead")
    return load_newest(directory, run, warn)


def paths(directory: Path) -> list[Path]:
    """All checkpoints, oldest first; whether they can be read is not looked at."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir() and is_ours(path))


def last_step(directory: Path) -> int:
    """Of the newest checkpoint, whether it can be read or not; 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in paths(directory)), default=0)


def is_ours(path: Path) -> bool:
    """Whether `save` gives such a name."""
    return re.fullmatch(r"step-\d{8,}|\.tmp-.*", path.name) is not None


def restore_model(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Copies the weights into a model of the same shape."""
    parameters = dict(model.named_parameters())  # a tied weight is there once, under its first name
    if {name: p.shape for name, p in parameters.items()} != {name: t.shape for name, t in checkpoint.model.items()}:
        raise CheckpointError(f"{checkpoint.path} holds the weights of a model of another shape")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.model[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """An optimizer's state as "<parameter>/<state>" tensors."""
    return {
        f"{name}/{key}": value
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]) -> None:
    """The way back from `optimizer_tensors`, through the optimizer's own `load_state_dict`."""
    per_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, state = key.rsplit("/", 1)
        per_parameter.setdefault(name, {})[state] = value
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state_dict = optimizer.state_dict()
    state_dict["state"] = {i: per_parameter[name] for i, name in enumerate(order) if name in per_parameter}
    optimizer.load_state_dict(state_dict)


def _best(run: str | None, candidates: list[Path]) -> Path | None:
    """The run's one with the lowest validation loss, if any has one."""
    losses = {}
    for path in candidates:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, CheckpointError):
            state = _state(path)
            if state.get("run") == run:
                losses[path] = float(state["val_loss"])
    return min(losses, key=losses.__getitem__, default=None)


def _drop_superfluous(directory: Path, run: str | None, target: Path) -> None:
    """Keeps the two newest and the best up to `target`; a later one could not be read, else the run had begun there."""
    everything = paths(directory)
    good = everything[: everything.index(target) + 1]
    for path in set(everything) - {*good[-2:], _best(run, good)}:
        _remove(path)


def _remove(path: Path) -> None:
    """Renamed first: a half-deleted directory must not pass for a checkpoint."""
    hidden = path.with_name(f".tmp-old-{path.name}")
    with contextlib.suppress(OSError):
        os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
