"""relu and relu_squared, forward and backward over 4096 rows of 3072: a memory-bound pass each way. On a GPU also what
they are to reach there.
"""

from __future__ import annotations

from functools import partial

import torch

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, LARGE, LARGE_TARGET, eager_compiled_ours, leaf
from fastlm.benchmarks.harness import Built, Case

STOCK = {"relu": torch.relu, "relu_squared": lambda x: torch.relu(x).square()}
OURS = {"relu": fastlm.relu, "relu_squared": fastlm.relu_squared}


def build(op: str, dtype: torch.dtype, shape: tuple[int, int], device: str, quick: bool) -> Built:
    x = leaf(shape, dtype, device, seed=0)
    dy = leaf(shape, dtype, device, seed=1).detach()
    return eager_compiled_ours(STOCK[op], OURS[op], [x], dy, quick)


def case_of(op: str, name: str, shape: tuple[int, int], device: str, quick: bool, target: str = "") -> Case:
    # Forward reads x and writes y; backward reads dy and what was saved and writes dx.
    size = 5 * shape[0] * shape[1] * DTYPES[name].itemsize
    work = partial(build, op, DTYPES[name], shape, device, quick)
    return Case("relu", f"{op} {shape[0]}x{shape[1]} {name}", work, bytes=size, device=device, target=target)


def goals(device: str, quick: bool, shape: tuple[int, int] = LARGE) -> list[Case]:
    return [case_of(op, name, shape, device, quick, LARGE_TARGET) for op in STOCK for name in DTYPES]


def cases(device: str, quick: bool) -> list[Case]:
    shape = (512, 3072) if quick else (4096, 3072)
    made = goals(device, quick) if device == "cuda" else []
    return made + [case_of(op, name, shape, device, quick) for op in STOCK for name in DTYPES]
