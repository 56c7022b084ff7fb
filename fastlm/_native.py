"""Loads the compiled modules. Each may be missing, and then says why: a broken CUDA costs CUDA alone."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  first, so that its OpenMP runtime is the one that _cpu finds

reasons: dict[str, str] = {}


def _build_report() -> dict[str, str]:
    """What the build left out, from its own report: lines of `module: reason`."""
    path = Path(__file__).with_name("build_report.txt")
    if not path.exists():
        return {}
    return dict(line.split(": ", 1) for line in path.read_text().splitlines() if ": " in line)


def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"fastlm._{name}")
    except ModuleNotFoundError:
        reasons[name] = _build_report().get(name, f"fastlm._{name} was not built")
    except ImportError as error:
        reasons[name] = f"fastlm._{name} does not load: {error}"
    return None


cpu = _load("cpu")
cuda = _load("cuda")
if cuda is not None and (problem := cuda.driver_problem()) is not None:
    cuda, reasons["cuda"] = None, problem
if cpu is None:
    warnings.warn(f"fastlm runs without its CPU kernels: {reasons['cpu']}", RuntimeWarning, stacklevel=2)
