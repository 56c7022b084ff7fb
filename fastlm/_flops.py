"""The ops' floating-point operations, told to torch.utils.flop_counter, whose modes copy its registry when made."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from fastlm._library import NAMESPACES, all_ops


def register(flop_counter: ModuleType) -> None:
    for op in all_ops():
        if op.flops is None:
            continue

        def count(*args: Any, op: Any = op, out_val: Any = None, **_: Any) -> int:
            return op.flops(*op.filled(args))

        packets = [getattr(getattr(torch.ops, namespace), op.name) for namespace in NAMESPACES.values()]
        flop_counter.register_flop_formula(packets, get_raw=True)(count)
