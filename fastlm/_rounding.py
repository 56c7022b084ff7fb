"""Rounding to bfloat16 up or down at random, so that on average it is not rounded at all: how adam_ stores what would
otherwise not move. The numbers are those of csrc/optimizer_item.h."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _times(x: Tensor | int, factor: int) -> Tensor | int:
    """The low word of a product of two words, in int64 arithmetic that must not overflow."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & _WORD


def _mixed(x: Tensor | int) -> Tensor | int:
    """A hash of 32 bits (Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31/)."""
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def noise_of(step: Tensor, place: Tensor | int, seed: int) -> Tensor:
    """What the random numbers of a step follow from, for the averages of the list's parameter at `place`."""
    return _mixed(_mixed((step.long() + _mixed(seed & _WORD)) & _WORD) ^ (place * _GOLDEN & _WORD))


def noise_of_param(noise: Tensor) -> Tensor:
    """The same for the parameter itself."""
    return _mixed(noise ^ 0x5BD1E995)


def random_words(x: Tensor, noise: Tensor) -> Tensor:
    """32 bits for each element of x, in int64; the highest are the most random."""
    at = torch.arange(x.numel(), device=x.device).view(x.shape)
    random = (_times(at & _WORD, _GOLDEN) + noise + (at >> 32)) & _WORD
    return _times(random ^ (random >> 15), 0x846CA68B)


def rounded_at_random(x: Tensor, noise: Tensor) -> Tensor:
    """To bfloat16, up with the probability of what is cut off of the float32; inf and NaN as they are."""
    x = x.float()
    random = random_words(x, noise) >> 16
    bits = x.contiguous().view(torch.int32).to(torch.int64) & _WORD
    cut = (bits + random) & 0xFFFF0000
    rounded = torch.where(cut >= 1 << 31, cut - (1 << 32), cut).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()
