"""Optimizer states in 8 bits: one number of 8 bits an element, and for each block of 256 elements its largest size.

A code counts steps of 1/8 of an octave on the way down from the block's largest element, code 127 with a sign in the
highest bit, or code 255 without one; 0 is 0. So the smallest size is 2^-15.75 or 2^-31.75 of the largest, and codes are
cut out of the bits of a float32. Blocks count elements in the order of memory. As in csrc/optimizer_item.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
_CUT = 20  # bits of the mantissa that a code leaves out
_RANDOM_OF_MEAN = 0xFFFF0  # see csrc/optimizer_item.h


def blocks_of(numel: int) -> int:
    return -(-numel // BLOCK)


def _first(signed: bool) -> int:
    """What is added to a code to give the highest bits of a float32: code 127 or 255 is then 1."""
    return (127 << 3) - (127 if signed else 255)


def quantized(x: Tensor, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (numel) uint8 and scales (blocks) float32 of x (numel) float32.

    What `dequantized` gives becomes the same codes and scales again, without `random`.

    Args:
        signed: else x is nowhere below 0, and what is above 2^-126 of the block's largest stays above 0.
        random: (numel) int64 of 20 bits, by which codes go up or down so that they are right in the mean; to the
            nearest one without.

    A block in which something is not finite becomes NaN. One whose largest element is below 1e-30 becomes 0.
    """
    numel = x.numel()
    blocks = torch.nn.functional.pad(x.float(), (0, -numel % BLOCK)).view(-1, BLOCK)
    sizes = blocks.abs()
    scales = sizes.amax(1)
    inverse = torch.where(scales < 1e-30, 0.0, 1 / scales)
    parts = (sizes * inverse[:, None]).view(-1)[:numel]
    bits = (parts.view(torch.int32) + (1 << (_CUT - 1) if random is None else random.int())) >> _CUT
    codes = (bits - _first(signed)).clamp(0 if signed else 1, 127 if signed else 255)
    codes = torch.where((bits > 0) & ~parts.isnan(), codes, 0).to(torch.uint8)
    if signed:
        codes |= torch.signbit(x).to(torch.uint8) << 7
    return codes, torch.where(scales < 1e-30, 0.0, torch.where(scales.isfinite(), scales, torch.nan))


def random_of(words: Tensor, signed: bool) -> Tensor:
    """What `quantized` takes, of random numbers of 32 bits: both averages of an element are rounded by the same one."""
    return words & _RANDOM_OF_MEAN if signed else words >> (32 - _CUT)


def dequantized(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The numbers (numel) float32 of codes (numel) uint8 with the scales of their blocks."""
    steps = (codes & 127 if signed else codes).int()
    parts = torch.where(steps > 0, ((steps + _first(signed)) << _CUT).view(torch.float32), 0.0)
    if signed:
        parts = torch.where(codes > 127, -parts, parts)
    return parts * scales.repeat_interleave(BLOCK)[: codes.numel()]
