"""More than 2^31 elements: each row comes out as it does by itself, forward and backward; and strides as long."""

import os
import re
from pathlib import Path

import pytest
import torch
from op_testing import numbers

import fastlm
from fastlm import _native

N = 1024
ROWS = 2**31 // N + 3
PROBES = torch.tensor(
    [0, 1, ROWS // 2, ROWS - 5, ROWS - 4, ROWS - 3, ROWS - 2, ROWS - 1]
)  # 2^31 lies between two of them
GIB = 1 << 30

MEMINFO = Path("/proc/meminfo")  # what is free, and what the system would give up
available = re.search(r"MemAvailable: +(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
available = int(available[1]) * 1024 if available else 0
pytestmark = [
    pytest.mark.skipif(not os.environ.get("FASTLM_TEST_LARGE"), reason="FASTLM_TEST_LARGE is not set"),
    pytest.mark.skipif(_native.cpu is None, reason="needs kernels: plain torch holds several times as much"),
]


def test_there_is_memory_for_the_rest():
    assert available >= 20 * GIB


def big(seed):
    """Zeros but for the probes: pages that nobody writes take no memory."""
    x = torch.zeros(ROWS, N, dtype=torch.bfloat16)
    x[PROBES] = numbers((len(PROBES), N), torch.bfloat16, seed)
    return x


WEIGHT, FEW = numbers((N,), torch.bfloat16, 5), numbers((8, N), torch.bfloat16, 6)
CLASSES = torch.arange(ROWS) % N
# Of rows, and their numbers.
CALLS = {
    "relu": lambda x, i: fastlm.relu(x),
    "relu_squared": lambda x, i: fastlm.relu_squared(x),
    "gelu": lambda x, i: fastlm.gelu(x),
    "tanh": lambda x, i: fastlm.tanh(x),
    "glu": lambda x, i: fastlm.glu(x, x),
    "bias_act": lambda x, i: fastlm.bias_act(x, WEIGHT, "silu"),
    "layer_norm": lambda x, i: fastlm.layer_norm(x, (N,), WEIGHT, WEIGHT),
    "rms_norm": lambda x, i: fastlm.rms_norm(x, (N,), WEIGHT),
    "rope": lambda x, i: fastlm.rope(x.view(-1, 1, 8, 128), WEIGHT[None, :64], WEIGHT[None, 64:128]).view(x.shape),
    "embedding": lambda x, i: fastlm.embedding(CLASSES[i] % 8, FEW) * 1,
    "linear_act": lambda x, i: fastlm.linear_act(x, FEW, act="gelu"),
    "cross_entropy": lambda x, i: fastlm.cross_entropy(x, CLASSES[i], reduction="none"),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward(name):
    x, everything = big(0), torch.arange(ROWS)
    with torch.no_grad():
        found, want = CALLS[name](x, everything)[PROBES], CALLS[name](x[PROBES], PROBES)
    torch.testing.assert_close(found, want, rtol=0, atol=0 if name != "linear_act" else 0.05)


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"embedding", "linear_act", "cross_entropy", "glu"}))
def test_backward(name):
    x, dy, everything = big(0), big(1), torch.arange(ROWS)
    few, few_dy = x[PROBES].requires_grad_(), dy[PROBES]
    y = CALLS[name](x.requires_grad_(), everything)
    (found,) = torch.autograd.grad(y, x, dy)
    (want,) = torch.autograd.grad(CALLS[name](few, PROBES), few, few_dy)
    assert torch.equal(found[PROBES], want)


def test_backward_of_cross_entropy():
    x, dy = big(0), torch.rand(ROWS, generator=torch.Generator().manual_seed(2)).bfloat16()
    few = x[PROBES].requires_grad_()
    (found,) = torch.autograd.grad(fastlm.cross_entropy(x.requires_grad_(), CLASSES, reduction="none"), x, dy)
    (want,) = torch.autograd.grad(fastlm.cross_entropy(few, CLASSES[PROBES], reduction="none"), few, dy[PROBES])
    assert torch.equal(found[PROBES], want)


def test_gradient_of_embedding():
    dy, weight = big(0), FEW.clone().requires_grad_()
    (found,) = torch.autograd.grad(fastlm.embedding(CLASSES % 8, weight), weight, dy)
    want = torch.zeros(8, N).index_add(0, CLASSES[PROBES] % 8, dy[PROBES].float()).bfloat16()
    torch.testing.assert_close(found, want)


def test_mse_loss():
    x = big(0)
    found = fastlm.mse_loss(x, torch.zeros(1, dtype=torch.bfloat16).expand(x.shape).clone(), reduction="sum")
    torch.testing.assert_close(found, x[PROBES].float().square().sum().bfloat16())


def test_dropout_does_not_begin_again():
    x = torch.ones(2**31 + 4096, dtype=torch.bfloat16)
    y = fastlm.dropout(x, 0.5, seed=torch.tensor(3))
    first, last = y[:4096], y[2**31 :]
    assert abs(last.mean().item() - 1) < 0.1 and not torch.equal(first, last)


def test_attention():
    T, D = 8, 64
    q = big(0).view(-1)[: 2**31 + 2 * T * D].view(-1, 1, T, D)
    few = torch.tensor([0, 1, len(q) - 3, len(q) - 2, len(q) - 1])
    with torch.no_grad():
        assert torch.equal(fastlm.attention(q, q, q)[few], fastlm.attention(q[few], q[few], q[few]))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_of_attention(axis):
    """Batch, heads or positions 2^30 elements apart."""
    shape, strides = [2, 2, 3, 64], [8192, 4096, 64, 1]
    strides[axis] = 2**30 if axis == 2 else 2**31
    memory = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16)
    q = memory.as_strided(shape, strides)
    q.copy_(numbers(shape, torch.bfloat16))
    found, want = (t.detach().requires_grad_() for t in (q, q.contiguous()))
    outputs = [fastlm.attention(t, t, t, causal=True) for t in (found, want)]
    assert torch.equal(*outputs)
    for o in outputs:
        o.square().sum().backward()
    assert torch.equal(found.grad, want.grad)
    caches = [t.detach() for t in (found, want)]
    lens = torch.tensor([3, 2])
    decoded = [fastlm.attention_decode(t[:, :, -1:], t, t, cache_seqlens=lens) for t in caches]
    assert torch.equal(*decoded)
