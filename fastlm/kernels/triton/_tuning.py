"""Which of a few configurations a Triton kernel runs with: the fastest, found once by running each, then remembered.

A list begins with the default, chosen from what the compiler reports, which another has to beat clearly. Configurations
add up in different orders: the last bits of a result may differ between two GPUs, or two caches, but not within a
process, where a choice once taken stays. The default is taken in the interpreter, with FASTLM_TRITON_TUNE=0, under
torch.use_deterministic_algorithms, since bits must not depend on a file, and, unless the choice is remembered, while a
CUDA graph is captured.

Triton's own autotuner needs a GPU even in the interpreter, measures anew in each process, and knows no default.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from fastlm._version import __version__
from fastlm.kernels.triton._common import INTERPRETED

Configuration = dict[str, int]
Run = Callable[[Configuration], Any]
_NOISE = 1.03


def bucket(size: int, most: int) -> int:
    """A size as part of a key: the next power of two, `most` at most."""
    return min(triton.next_power_of_2(size), most)


def pick(key: tuple, candidates: Sequence[Configuration], run: Run, device: torch.device) -> Configuration:
    """The configuration to run a kernel with; one of `candidates`, the first of which is the default.

    Arguments:
        key: what the choice depends on, by its `repr`: kernel, dtype, head dims, flags, sizes by `bucket`.
        run: launches the kernel with a configuration. It may run often, so it must not read what it has written.

    Raises what the default raises where every configuration fails.
    """
    if len(candidates) == 1 or device.type != "cuda" or INTERPRETED or os.environ.get("FASTLM_TRITON_TUNE") == "0":
        return candidates[0]
    if torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    choices = _choices_of(device.index)
    found = choices.taken.get(key)
    if found is None:
        with torch.cuda.device(device):
            found = choices.take(key, candidates, run)
    return found


class Choices:
    """What was chosen on one device: in `taken` for this process, in the file at `path`, if any, for the next ones.

    `time` says how long a call takes, in any unit. One that raises counts as a configuration that does not work here.
    """

    def __init__(self, path: Path | None, time: Callable[[Callable[[], Any]], float]):
        self.taken: dict[tuple, Configuration] = {}
        self._path, self._time = path, time
        self._lock = threading.Lock()
        self._warned = False

    def take(self, key: tuple, candidates: Sequence[Configuration], run: Run) -> Configuration:
        with self._lock:
            if key not in self.taken:
                self.taken[key] = self._choose(repr(key), candidates, run)
            return self.taken[key]

    def _choose(self, name: str, candidates: Sequence[Configuration], run: Run) -> Configuration:
        remembered = self._read().get(name)
        if remembered in candidates:  # the file may be of other hands
            return candidates[candidates.index(remembered)]
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        times, errors = {}, []
        for i, candidate in enumerate(candidates):
            try:
                times[i] = self._time(functools.partial(run, candidate))
            except torch.OutOfMemoryError:  # of the memory that the measurement takes: nothing is known
                return candidates[0]
            except Exception as error:  # too much shared memory, or something that a compiler cannot do
                errors.append(error)
        if not times:
            raise errors[0]
        best = min(times, key=times.__getitem__)
        if 0 in times and times[0] <= _NOISE * times[best]:
            best = 0
        self._write(name, candidates[best])
        return candidates[best]

    def _read(self) -> dict[str, Any]:
        try:
            found = {} if self._path is None else json.loads(self._path.read_text())
            if not isinstance(found, dict):
                raise ValueError("not a JSON object")
            return found
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            return self._warn("read", error)

    def _write(self, name: str, choice: Configuration) -> None:
        """With what other processes wrote meanwhile; a reader sees the old file or the new one, never a part."""
        if self._path is None:
            return
        temporary = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, suffix=".tmp", delete=False) as file:
                temporary = file.name
                json.dump({**self._read(), name: choice}, file, indent=1)
            os.replace(temporary, self._path)
        except OSError as error:
            self._warn("kept", error)
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _warn(self, done: str, error: Exception) -> dict[str, Any]:
        if not self._warned:
            self._warned = True
            said = f"fastlm's choice of Triton configurations cannot be {done} in {self._path}: {error}"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
        return {}


def _cache_directory() -> Path | None:
    """None where the user has no home."""
    if own := os.environ.get("FASTLM_CACHE_DIR"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"
    except RuntimeError:
        return None


def _file_name(device: str, capability: tuple[int, int]) -> str:
    """Of what the speed of a configuration depends on; the sources stand for kernels and lists."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    parts = (device, "sm", *capability, "triton", triton.__version__, "fastlm", __version__, digest)
    return re.sub(r"[^\w.+-]+", "_", "-".join(map(str, parts))) + ".json"


@functools.cache
def _choices_of(index: int) -> Choices:
    directory = _cache_directory()
    name = _file_name(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
    return Choices(None if directory is None else directory / "triton" / name, _milliseconds)


def _milliseconds(call: Callable[[], Any]) -> float:
    """The median of some calls on the current device, five at least, with nothing of theirs in its caches."""
    once = triton.testing.do_bench(call, warmup=0, rep=0)
    return triton.testing.do_bench(call, warmup=5, rep=max(20, 6 * once), return_mode="median")
