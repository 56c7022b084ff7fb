"""The ops' floating-point operations, told to torch.utils.flop_counter once somebody imports it.

Importing it here would take half a second, and its modes copy its registry when they are made: so it is watched for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

from fastlm._library import NAMESPACES, all_ops

_MODULE = "torch.utils.flop_counter"


def _register(module: ModuleType) -> None:
    for op in all_ops():
        if op.flops is None:
            continue

        def count(*args: Any, op: Any = op, out_val: Any = None, **_: Any) -> int:
            return op.flops(*op.filled(args))

        packets = [getattr(getattr(torch.ops, namespace), op.name) for namespace in NAMESPACES.values()]
        module.register_flop_formula(packets, get_raw=True)(count)


class _Watch(importlib.abc.MetaPathFinder):
    """Finds the module as all other finders do, and has the formulas registered when it has run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_when_needed() -> None:
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _Watch())
