"""Builds what the CUDA tests run on, and caches it under build/ by the contents of the sources."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastlm import _library, _native
from fastlm.kernels.native import _common

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FAMILIES = (
    "relu", "activation", "bias_act", "glu", "dropout", "norm", "rope", "embedding", "cross_entropy", "linear_act",
    "mse_loss", "adam", "sgd", "attention", "attention_decode",
)  # fmt: skip


def digest(*parts: object) -> str:
    """Of the C++ sources and of whatever else decides what is built."""
    found = hashlib.sha256(repr(parts).encode())
    for path in sorted([*ROOT.glob("csrc/**/*"), *HERE.glob("*.h"), *HERE.glob("*.cpp"), *ROOT.glob("cmake/*")]):
        if path.is_file():
            found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def run(*command: object, **options) -> str:
    """The command's output; where it fails, an error that shows it."""
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stdout[-8000:]}")
    return done.stdout


@contextlib.contextmanager
def made_once(folder: Path) -> Iterator[None]:
    """One process at a time makes what is in the folder; the others wait, and find it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("needs a C++ compiler")
    return found.split()[0]


# --- the kernels, compiled for the CPU --------------------------------------------------------------------------------
def build_emulated() -> Path:
    """csrc/cuda_module.cpp and every kernel over emulation.h instead of CUDA."""
    pytest.importorskip("pybind11")
    cxx = compiler()
    folder = ROOT / "build" / f"emulated-{digest(cxx, sys.version)}"
    target = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    with made_once(folder):
        if not target.exists():
            _compile_emulated(cxx, folder, target)
    return target


def _compile_emulated(cxx: str, folder: Path, target: Path) -> None:
    import pybind11

    flags = [
        "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Werror",
        f"-I{ROOT / 'csrc'}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}",
        f'-DFASTLM_DEVICE_EMULATION="{HERE / "emulation.h"}"',
        f'-DFASTLM_HOPPER_EMULATION="{HERE / "hopper_emulation.h"}"', "-DFASTLM_MODULE=_cuda_emulated",
    ]  # fmt: skip
    sources = [ROOT / "csrc/cuda_module.cpp", HERE / "emulated_runtime.cpp", *sorted(ROOT.glob("csrc/cuda/*.cu"))]
    objects = [folder / f"{source.name}.o" for source in sources]
    waiting = list(zip(sources, objects, strict=True))
    running: list[tuple[Path, subprocess.Popen]] = []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            source, obj = waiting.pop()
            command = [cxx, *flags, "-x", "c++", "-c", source, "-o", obj]
            running.append((source, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        source, process = running.pop(0)
        _, errors = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{source} does not compile:\n{errors[-8000:]}")
    partial = folder / "partial.so"
    run(cxx, "-shared", *objects, "-o", partial)
    partial.rename(target)


@functools.cache
def emulate_cublas() -> torch.library.Library | None:
    """What the wrappers ask of torch that it does on GPUs alone: a sum in float32 of products of 16 bits."""
    name = "baddbmm.dtype_out"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU"):
        return None

    def product(c, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert c is out and c.dtype == out_dtype == torch.float32 and a.dtype == b.dtype and a.element_size() == 2
        return torch.baddbmm(c, a.float(), b.float(), beta=beta, alpha=alpha, out=out)

    library = torch.library.Library("aten", "IMPL")
    library.impl(name, product, "CPU")
    return library


def load_emulated() -> tuple[ModuleType, dict[str, _library.Kernel]]:
    """The emulated module, and fastlm's CUDA wrappers over it. Leaves the installed kernels as they are."""
    spec = importlib.util.spec_from_file_location("_cuda_emulated", build_emulated())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for op in _library._ops.values():  # a module that a wrapper imports registers its kernels once and for all
        op.choices("auto", "cpu")
    before = dict(_library._kernels)
    emulate_cublas()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "cuda", module)
        patch.setattr(_common, "current_stream", lambda x: 0)
        patch.setattr(_common, "capability", lambda x: (8, 0))
        patch.setattr(_common, "on_gpu", lambda x: not hasattr(x, "on_host"))  # but what a test marks
        for family in FAMILIES:
            path = Path(_common.__file__).with_name(f"{family}.py")
            wrapper = importlib.util.spec_from_file_location(f"emulated_{family}", path)
            wrapper.loader.exec_module(importlib.util.module_from_spec(wrapper))
    kernels = {op: found for (op, _, device), found in _library._kernels.items() if device == "cuda"}
    _library._kernels.clear()
    _library._kernels.update(before)
    return module, kernels


class Kernels:
    """CUDA kernels by the name of their op, as they are (no self-check, no fallback), and where their tensors live."""

    def __init__(self, name: str):
        self.emulated = name == "emulated"
        if self.emulated:
            self.module, self.kernels = load_emulated()
            self.device = torch.device("cpu")
        else:
            if not torch.cuda.is_available():
                pytest.skip("needs a CUDA GPU")
            if _native.cuda is None:
                pytest.fail(f"a GPU is here, but fastlm._cuda is not: {_native.reasons['cuda']}")
            for family in FAMILIES:
                _library.load_kernels("native", family, "cuda")
            self.module = _native.cuda
            self.kernels = {
                op: found
                for (op, kind, device), found in _library._kernels.items()
                if (kind, device) == ("native", "cuda")
            }
            self.device = torch.device("cuda", torch.cuda.current_device())

    def __getitem__(self, op: str):
        return self.kernels[op].run

    def refusal(self, op: str, *args) -> str | None:
        return self.kernels[op].refusal(args)

    def stream(self) -> int:
        return 0 if self.emulated else torch.cuda.current_stream(self.device).cuda_stream


class TritonKernels:
    """Triton's kernels by the name of their op: on a GPU, else in Triton's interpreter."""

    def __init__(self):
        pytest.importorskip("triton", reason="Triton is not installed")
        self.device = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")

    def __getitem__(self, op: str):
        _library.load_kernels("triton", _library._ops[op].family, self.device.type)
        return _library._kernels[op, "triton", self.device.type].run


# --- the kernels, compiled for GPUs -----------------------------------------------------------------------------------
def find_nvcc() -> str:
    for candidate in (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and shutil.which(candidate):
            return candidate
    pytest.skip("needs nvcc")


def find_tool(name: str) -> str:
    """cuobjdump or nvdisasm: not always beside nvcc, but Triton's wheel carries both."""
    candidates = [shutil.which(name), str(Path(find_nvcc()).resolve().with_name(name)), f"/usr/local/cuda/bin/{name}"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name))
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    pytest.skip(f"needs {name}, from the CUDA toolkit or from Triton's wheel")
