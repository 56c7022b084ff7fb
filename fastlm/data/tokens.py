"""Token files and the batches read from them.

A token file is a 64-byte header and then the ids, little-endian, memory-mapped when read:

    0   8s  magic "FASTLMTK"       16  u64  count of ids         32  u32  CRC-32 of the ids
    8   u32 format version         24  u64  vocabulary size      36  u32  CRC-32 of bytes 0 .. 35
    12  u32 bytes per id, 2 or 4                                 40       zeros

A stream starts with the separator eot and has one after each document, so that predicting every id after the first
predicts every byte of the text and every end of a document. The cost of the ends is counted in the total, their bytes
are not (they are no part of the text): `bits_per_byte` is what it takes to store the documents and to know where each
ends, per byte of the documents. The n-gram baseline (`fastlm.data.ngram`) counts in the same way.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from fastlm.data.files import write_atomically

_MAGIC = b"FASTLMTK"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQI")
_HEADER_BYTES = 64
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True)
class TokenFile:
    """An open token file. tokens: (count,) uint16 or uint32, memory-mapped, read-only."""

    path: Path
    tokens: np.ndarray
    vocab_size: int

    @staticmethod
    def write(path: str | os.PathLike[str], tokens: np.ndarray, vocab_size: int) -> None:
        """Writes ids (count,) in 0 .. vocab_size - 1, two bytes each where that suffices; all of it or nothing."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise ValueError(
                f"fastlm.data.TokenFile: tokens must be a 1-d array of integers, got {tokens.dtype} {tokens.shape}"
            )
        if not 1 <= vocab_size <= 2**32:
            raise ValueError(f"fastlm.data.TokenFile: vocab_size must be in 1 .. 2**32, got {vocab_size}")
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
            raise ValueError(
                f"fastlm.data.TokenFile: tokens must be in 0 .. {vocab_size - 1},"
                f" got {int(tokens.min())} .. {int(tokens.max())}"
            )
        itemsize = 2 if vocab_size <= 2**16 else 4
        ids = np.ascontiguousarray(tokens, dtype=_DTYPES[itemsize]).view(np.uint8).data
        fields = _HEADER.pack(_MAGIC, _VERSION, itemsize, tokens.size, vocab_size, zlib.crc32(ids))
        header = (fields + struct.pack("<I", zlib.crc32(fields))).ljust(_HEADER_BYTES, b"\0")
        write_atomically(path, [header, ids])

    @staticmethod
    def open(path: str | os.PathLike[str], *, verify: bool = False) -> TokenFile:
        """Maps a token file. verify: also reads it all and compares the checksum of the ids.

        Raises ValueError for a file of another kind, truncated or altered.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"fastlm.data: no token file at {path}")
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
        if header[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"fastlm.data: {path} is not a token file: it starts with {header[: len(_MAGIC)]!r}")
        if len(header) < _HEADER_BYTES:
            raise ValueError(f"fastlm.data: {path} is truncated: {size} bytes, the header alone has {_HEADER_BYTES}")
        _, version, itemsize, count, vocab_size, checksum = _HEADER.unpack_from(header)
        if version != _VERSION:
            raise ValueError(f"fastlm.data: {path} has token file format {version}; this fastlm reads {_VERSION}")
        rest = struct.pack("<I", zlib.crc32(header[: _HEADER.size])).ljust(_HEADER_BYTES - _HEADER.size, b"\0")
        if header[_HEADER.size :] != rest or itemsize not in _DTYPES:
            raise ValueError(f"fastlm.data: {path} is corrupted: its header does not match its checksum")
        expected = _HEADER_BYTES + count * itemsize
        if size != expected:
            state = "truncated" if size < expected else "corrupted"
            raise ValueError(f"fastlm.data: {path} is {state}: {count} tokens take {expected} bytes, it has {size}")
        tokens: np.ndarray = np.empty(0, dtype=_DTYPES[itemsize])  # what cannot be mapped: an empty range
        tokens.setflags(write=False)
        if count:
            tokens = np.memmap(path, dtype=_DTYPES[itemsize], mode="r", offset=_HEADER_BYTES, shape=(count,))
        if verify and zlib.crc32(tokens.view(np.uint8).data) != checksum:
            raise ValueError(f"fastlm.data: {path} is corrupted: its tokens do not match their checksum")
        return TokenFile(path, tokens, vocab_size)


def get_batch(
    tokens: np.ndarray,
    *,
    seed: int,
    step: int,
    batch_size: int,
    block_size: int,
    micro_step: int = 0,
    micro_steps: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training batch of one step: x, y (batch_size, block_size) int64 on the CPU; y is x one token later.

    A pure function of its arguments: the same in every process, in any order, on any platform and version of numpy and
    torch, so that a resumed run sees what the uninterrupted one would have seen.

    The stream is cut into windows of block_size, and a step takes the next windows in an order shuffled anew in each
    epoch, without replacement; each epoch also shifts the cuts by a random offset, for which up to two windows at the
    ends of the stream sit that epoch out.

    tokens: (n,) ids, n > block_size. step: from 0. micro_step of micro_steps: the part of the step's
    micro_steps * batch_size windows, for gradient accumulation or data-parallel ranks.
    """
    limits = (("seed", seed, None), ("step", step, 0), ("batch_size", batch_size, 1), ("block_size", block_size, 1))
    for name, value, low in limits:
        if not isinstance(value, Integral):
            raise TypeError(f"fastlm.data.get_batch: {name} must be an integer, got {value!r}")
        if low is not None and value < low:
            raise ValueError(f"fastlm.data.get_batch: {name} must be at least {low}, got {value}")
    if not 0 <= micro_step < micro_steps:
        raise ValueError(
            f"fastlm.data.get_batch: micro_step must be in 0 .. micro_steps - 1 = {micro_steps - 1}, got {micro_step}"
        )
    _check_stream("get_batch", tokens)
    targets = len(tokens) - 1
    if targets < block_size:
        raise ValueError(
            f"fastlm.data.get_batch: block_size must be less than the number of tokens, {len(tokens)},"
            f" got {block_size}; give more text or a smaller block"
        )
    # One window less than would fit leaves room to shift the cuts by at least a whole window.
    windows = max(1, targets // block_size - 1)
    first = (step * micro_steps + micro_step) * batch_size
    starts = np.empty(batch_size, dtype=np.int64)
    for row in range(batch_size):
        epoch, index = divmod(first + row, windows)
        order, offset = _epoch(seed, epoch, windows, targets - windows * block_size)
        starts[row] = offset + order[index] * block_size
    rows = np.asarray(tokens)[starts[:, None] + np.arange(block_size + 1)]
    rows = torch.from_numpy(rows.astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def iterate_all(tokens: np.ndarray, block_size: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The whole stream once, in order: batches x, y (b, t) int64 in which each token after the first is a target once.

    b is batch_size and t is block_size but for the end of the stream: the last full batch may have fewer rows, and what
    is left then comes as a batch (1, t) with a shorter t. So the sum of y.numel() is len(tokens) - 1, and the sum of
    the losses over all targets, in nats, is what `bits_per_byte` takes. Windows do not overlap: the first target of a
    window is predicted from one token.
    """
    if block_size < 1 or batch_size < 1:
        raise ValueError(
            f"fastlm.data.iterate_all: block_size and batch_size must be at least 1, got {block_size} and {batch_size}"
        )
    _check_stream("iterate_all", tokens)
    return _iterate_all(tokens, block_size, batch_size)


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Cross-entropy summed over all targets of a stream, in nats, as bits per byte of the stream's text."""
    if total_bytes < 1:
        raise ValueError(f"fastlm.data.bits_per_byte: total_bytes must be at least 1, got {total_bytes}")
    return total_nats / math.log(2) / total_bytes


def _iterate_all(tokens: np.ndarray, block_size: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    targets = max(len(tokens) - 1, 0)
    full = targets // block_size * block_size
    sizes = [batch_size * block_size] * (full // (batch_size * block_size))
    sizes += [rest for rest in (full - sum(sizes),) if rest]
    shapes = [(size // block_size, block_size) for size in sizes]
    shapes += [(1, rest) for rest in (targets - full,) if rest]
    start = 0
    for shape in shapes:
        size = shape[0] * shape[1]
        piece = torch.from_numpy(np.asarray(tokens[start : start + size + 1]).astype(np.int64))
        yield piece[:-1].view(shape), piece[1:].view(shape)
        start += size


def _check_stream(name: str, tokens: np.ndarray) -> None:
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        got = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise TypeError(f"fastlm.data.{name}: tokens must be a 1-d numpy array of integers, got {got}")


@lru_cache(maxsize=4)  # saves time only: the value follows from the arguments
def _epoch(seed: int, epoch: int, windows: int, slack: int) -> tuple[np.ndarray, int]:
    """The order (windows,) in which an epoch takes the windows, and the offset of its first cut, in 0 .. slack."""
    key = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(epoch))
    order = np.argsort(_mix(key ^ np.arange(windows, dtype=np.uint64)), kind="stable")
    offset = int(_mix(~key)[0]) % (slack + 1)
    order.setflags(write=False)
    return order, offset


def _mix(x: np.ndarray) -> np.ndarray:
    """A uint64 to uint64 bijection that scatters: one step of SplitMix64 (Steele, Lea and Flood 2014) from state x.

    Written out because numpy and torch do not promise the same random stream in their next versions.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
