"""What the optimizers' tests share: pairs of ours and torch's, parameters of all kinds, runs."""

import copy

import pytest
import torch

import fastlm
from fastlm import _native

ISAS = _native.cpu.usable_isas() if _native.cpu is not None else []
BACKENDS = [*(f"native-{isa}" for isa in ISAS), "reference"]
GPU_BACKENDS = ["cuda", "triton"]
PAIRS = {name: (getattr(fastlm.optim, name), getattr(torch.optim, name)) for name in ("Adam", "AdamW", "SGD")}
every_pair = pytest.mark.parametrize("ours, theirs", PAIRS.values(), ids=PAIRS)
every_kind = pytest.mark.parametrize("kind", [ours for ours, _ in PAIRS.values()], ids=PAIRS)


def draw(shape, seed, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide, device="cpu").to(torch.get_default_device(), dtype)


def parameters(*dtypes):
    """Of each dtype: ordinary, 0-d, empty, sliced, transposed and channels_last ones."""
    params = []
    for dtype in dtypes or (torch.float32,):
        some = [draw(shape, i, dtype) for i, shape in enumerate([(33, 7), (), (0, 3), (5,)])]
        some.append(draw((9, 8), 4, dtype)[::2, 1:7])
        some.append(draw((6, 9), 5, dtype).t())
        some.append(draw((4, 3, 5, 6), 6, dtype).to(memory_format=torch.channels_last))
        params += some
    return [p.requires_grad_() for p in params]


def give_gradients(params, seed):
    """The same numbers for the same places of another list, whatever its dtypes."""
    for i, p in enumerate(params):
        p.grad = torch.empty_like(p).copy_(draw(p.shape, 1000 * seed + i, p.dtype))


def run(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        give_gradients(params, t)
        optimizer.step()


def copies(params):
    return [p.detach().clone() for p in params]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0, equal_nan=True)


def assert_close(got, want, tolerance):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = a.detach(), b.detach()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"parameter {i}: {m}")


def snapshot(optimizer):
    """Everything that a step may change, copied."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [copy.deepcopy(dict(optimizer.state[p])) if p in optimizer.state else None for p in params]
    return copies(params), states, optimizer.skipped_steps.clone()


def assert_unchanged(optimizer, before):
    params, states, skipped = snapshot(optimizer)
    assert_equal(params, before[0])
    assert skipped == before[2]
    for found, want in zip(states, before[1], strict=True):
        assert (found is None) == (want is None)
        if want is not None:
            assert list(found) == list(want)
            assert_equal(found.values(), want.values())
