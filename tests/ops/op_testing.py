"""What the tests of every op share: the backends that this machine runs, the tolerance, awkward layouts."""

import contextlib
import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm import _native
from fastlm._library import NAMESPACES

ISAS = _native.cpu.usable_isas() if _native.cpu is not None else []
# tests/kernels runs Triton's kernels in its interpreter; here they would take minutes.
BACKENDS = [*(f"native-{isa}" for isa in ISAS), "reference"]
if torch.cuda.is_available():
    kinds = {"native": _native.cuda is not None, "triton": importlib.util.find_spec("triton"), "reference": True}
    BACKENDS += [f"cuda-{kind}" for kind, there in kinds.items() if there]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Written out again here: the ops' own table is what is tested.
ACTS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# For long tests of what is the same on every backend, which other runs force by these.
once_is_enough = pytest.mark.skipif(
    any(os.environ.get(f"FASTLM_{name}") for name in ("BACKEND", "CPU_ISA", "TEST_EXCHANGE")),
    reason="the same on every backend and instruction set",
)


def on_device(backend):
    """New tensors go where the backend is: a test's parameter `backend` decides it, see conftest.py."""
    return torch.device("cuda") if backend.startswith("cuda-") else contextlib.nullcontext()


def numbers(shape, dtype=torch.float32, seed=0):
    """Normal, and the same on every device."""
    drawn = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return drawn.to(dtype).to(torch.get_default_device())


@contextlib.contextmanager
def running(backend):
    """Runs fastlm's ops on a backend, named as in BACKENDS, and proves that a forced instruction set is active."""
    name, _, isa = backend.removeprefix("cuda-").partition("-")
    before = _native.cpu.active_isa() if isa else None
    if isa:
        _native.cpu.select_isa(isa)
        assert _native.cpu.active_isa() == isa
    try:
        with fastlm.use_backend(name):
            yield name
    finally:
        if isa:
            _native.cpu.select_isa(before)


def overload(name, backend):
    return getattr(getattr(torch.ops, NAMESPACES[backend.removeprefix("cuda-").partition("-")[0]]), name).default


def assert_as_exact_as_torch(got, exact, plain, factor, what):
    """The error of `got` against float64 may be `factor` times that of plain torch in its dtype, and a few ulps."""
    assert got.dtype == plain.dtype and got.shape == exact.shape, what
    exact = exact.double()
    finite = exact.isfinite()
    special = torch.where(finite, 0, exact)
    assert torch.equal(torch.where(finite, 0, got.double()).nan_to_num(nan=7e77), special.nan_to_num(nan=7e77)), what
    if not finite.any():
        return
    ours, theirs = ((t.double() - exact)[finite].abs().max().item() for t in (got, plain))
    ulps = 4 * torch.finfo(got.dtype).eps * exact[finite].abs().max().item()
    assert ours <= factor * theirs + ulps, f"{what}: off by {ours:.3g}, plain torch by {theirs:.3g}, ulps {ulps:.3g}"


# Ways for the same numbers to lie in memory.
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "padded rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is full of NaN, so that an element that a kernel forgot shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))


def _poisoning(make):
    def poisoned(*args, **kwargs):
        x = make(*args, **kwargs)
        if x.is_floating_point() and not isinstance(x, torch._subclasses.FakeTensor):
            x.fill_(float("nan"))
        return x

    return poisoned
