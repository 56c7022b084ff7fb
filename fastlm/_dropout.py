"""The random numbers of dropout: a pure function of a seed and an element's index, the same on every backend.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): element n takes word n % 4 of the
block with counter n // 4 and the seed's two halves as key, and is kept where that word is at least p * 2^32. Since
the seed is a tensor drawn by torch's own generator, activation checkpointing redraws it, and so the same mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def draw_seed(op: str, x: Tensor) -> Tensor:
    """A 0-d int64 tensor from torch's generator of x's device."""
    if type(x) is not Tensor and hasattr(x, "placements"):
        raise ValueError(f"{op}: with a DTensor seed must be given, the same on every rank: each would draw its own")
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=x.device)


def check_seed(op: str, seed: object, device: torch.device) -> None:
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        what = f"{seed.dtype} {tuple(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise TypeError(f"{op}: seed must be one int64 in a tensor, got {what}")
    if seed.device != device:
        raise ValueError(f"{op}: seed must be on the device of the input, {device}, got {seed.device}")


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and low words of a 32 x 32 bit product, in int64 arithmetic that must not overflow."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words (as int64) for each 64-bit counter."""
    words = (counter & _WORD, (counter >> 32) & _WORD, torch.zeros_like(counter), torch.zeros_like(counter))
    key = (seed & _WORD, (seed >> 32) & _WORD)
    for _ in range(10):
        high0, low0 = _multiply(words[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(words[2], _MULTIPLIERS[1])
        words = (high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0)
        key = ((key[0] + _KEY_STEPS[0]) & _WORD, (key[1] + _KEY_STEPS[1]) & _WORD)
    return words


def keep_mask(shape: tuple[int, ...], p: float, seed: Tensor) -> Tensor:
    """Which elements dropout with probability p keeps, as bool of `shape`, numbered in row-major order."""
    numel = 1
    for size in shape:
        numel *= size
    counter = torch.arange((numel + 3) // 4, device=seed.device)
    words = torch.stack(philox(counter, seed), dim=-1).flatten()[:numel]
    return (words >= int(p * 2**32)).view(shape)
