"""Large outputs, which the CPU kernels write past the caches where their memory was in use before: the same bits as
from pieces that stay in the caches."""

import pytest
import torch
from op_testing import BACKENDS, running

import fastlm
from fastlm import _native

pytestmark = pytest.mark.skipif(_native.cpu is None, reason="fastlm._cpu was not built")
COLS = 1001  # rows that start anywhere in a cache line
LEAST_BYTES = 16 << 20


def rows_of(dtype):
    return LEAST_BYTES // (COLS * dtype.itemsize) + 2


OPS = {
    "relu": lambda x, u, w, t: fastlm.relu(x),
    "gelu": lambda x, u, w, t: fastlm.gelu(x),
    "bias_act": lambda x, u, w, t: fastlm.bias_act(x, w, "silu"),
    "glu": lambda x, u, w, t: fastlm.glu(x, u, "silu"),
    "layer_norm": lambda x, u, w, t: fastlm.layer_norm(x, (COLS,), w),
    "rms_norm with residual": lambda x, u, w, t: fastlm.rms_norm(x, (COLS,), w, residual=u)[0],
    "rope": lambda x, u, w, t: fastlm.rope(
        x[None, :, None, :], *(torch.linspace(0, 1, 90).expand(len(x), 90) + i for i in range(2))
    )[0, :, 0],
    "cross_entropy": lambda x, u, w, t: fastlm.cross_entropy(x, t, reduction="none"),
}


@pytest.fixture
def outputs_in_use():
    """torch fills memory that it hands out uninitialised, with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("outputs_in_use")
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("native-")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_large_outputs_are_those_of_their_parts(op, dtype, backend):
    rows = rows_of(dtype)
    generator = torch.Generator().manual_seed(0)
    x, up, dy = (torch.randn(rows, COLS, generator=generator).to(dtype) for _ in range(3))
    weight = torch.randn(COLS, generator=generator).to(dtype)
    target = torch.randint(COLS, (rows,), generator=generator)

    def run(part):
        inputs = [t[part].detach().requires_grad_() for t in (x, up)]
        y = OPS[op](*inputs, weight, target[part])
        used = inputs[: 2 if op in ("glu", "rms_norm with residual") else 1]
        return (y, *torch.autograd.grad(y, used, dy[part] if y.dim() == 2 else dy[part, 0].to(y.dtype)))

    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    half = rows // 2
    with running(backend):
        whole, first_half, second_half = run(slice(None)), run(slice(0, half)), run(slice(half, None))
    assert max(t.numel() * t.element_size() for t in whole) >= LEAST_BYTES
    for got, first, second in zip(whole, first_half, second_half, strict=True):
        assert torch.equal(got[:half], first) and torch.equal(got[half:], second)
