"""Every feature under everything that torch does to a function."""

import pytest
import torch
from features import features
from op_testing import once_is_enough
from torch.func import grad, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastlm

FEATURES = list(features())
every_feature = pytest.mark.parametrize("name", FEATURES)


def in_float64(name):
    _, call, inputs = features()[name]
    return call, [t.double() for t in inputs]


def leaves_of(inputs):
    return [t.detach().clone().requires_grad_() for t in inputs]


def gradients(call, inputs):
    """Of a scalar that weighs the results differently."""
    leaves = leaves_of(inputs)
    y = call(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, torch.linspace(0.2, 1, y.numel(), dtype=y.dtype).view(y.shape))


@every_feature
def test_vmap(name):
    """`torch.func.vmap` gives what a loop gives."""
    call, inputs = in_float64(name)
    many = [torch.stack([t, 0.5 * t]) for t in inputs]
    torch.testing.assert_close(vmap(call)(*many), torch.stack([call(*(t[i] for t in many)) for i in range(2)]))


@every_feature
def test_per_sample_gradients(name):
    """`vmap` of `grad` gives what a loop over the samples gives."""
    call, inputs = in_float64(name)
    many = [torch.stack([t, 0.5 * t]) for t in inputs]

    def first_gradient(*args):
        return grad(lambda *a: call(*a).square().sum())(*args)

    want = []
    for i in range(2):
        leaves = leaves_of([t[i] for t in many])
        want.append(torch.autograd.grad(call(*leaves).square().sum(), leaves[0])[0])
    torch.testing.assert_close(vmap(first_gradient)(*many), torch.stack(want))


@every_feature
def test_forward_mode(name):
    """`torch.func.jvp` against our backward: <dy, J t> = <J' dy, t>; and `vjp`."""
    call, inputs = in_float64(name)
    tangents = [t.cos() for t in inputs]
    y, dot = jvp(call, tuple(inputs), tuple(tangents))
    dy = torch.linspace(0.2, 1, y.numel(), dtype=y.dtype).view(y.shape)
    leaves = leaves_of(inputs)
    found = torch.autograd.grad(call(*leaves), leaves, dy)
    torch.testing.assert_close((dot * dy).sum(), sum((g * t).sum() for g, t in zip(found, tangents, strict=True)))
    torch.testing.assert_close(found, vjp(call, *inputs)[1](dy))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@every_feature
def test_derivatives_to_the_third(name, backend):
    """`gradcheck` in float64 with forward mode and batched gradients, `gradgradcheck`, and a third derivative,
    on the kernels and on the reference."""
    call, inputs = in_float64(name)
    leaves = leaves_of(inputs)
    with fastlm.use_backend(backend):
        fast = {"fast_mode": True}
        assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True, **fast)
        assert torch.autograd.gradgradcheck(call, leaves, check_batched_grad=True, **fast)

        def second(*args):
            y = call(*args)
            dy = torch.linspace(0.2, 1, y.numel(), dtype=y.dtype).view(y.shape)
            first = torch.autograd.grad((y * y * dy).sum(), args, create_graph=True)
            return torch.autograd.grad(sum(g.sin().sum() for g in first), args, create_graph=True)

        assert torch.autograd.gradcheck(second, leaves, **fast)


@pytest.mark.parametrize("dynamic", [False, True])
@every_feature
def test_compiled_in_one_graph(name, dynamic):
    """`torch.compile(fullgraph=True)`, static and dynamic, forward and backward."""
    _, call, inputs = features()[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, inputs), gradients(call, inputs))


@once_is_enough
def test_all_features_in_one_graph_through_inductor():
    calls = [(call, len(inputs)) for _, call, inputs in features().values()]

    def everything(*inputs):
        rest = iter(inputs)
        return torch.stack([call(*(next(rest) for _ in range(n))).square().sum() for call, n in calls])

    inputs = [t for _, _, inputs in features().values() for t in inputs]
    compiled = torch.compile(everything, fullgraph=True, dynamic=True)
    torch.testing.assert_close(gradients(compiled, inputs), gradients(everything, inputs))


@every_feature
def test_exported(name):
    """`torch.export.export`."""
    _, call, inputs = features()[name]

    class Module(torch.nn.Module):
        def forward(self, *args):
            return call(*args)

    program = torch.export.export(Module(), tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), call(*inputs))


@pytest.mark.parametrize("reentrant", [False, True])
@every_feature
def test_checkpointed(name, reentrant):
    """Activation checkpointing, reentrant and not, gives the same bits."""
    _, call, inputs = features()[name]
    found, want = leaves_of(inputs), leaves_of(inputs)
    checkpoint(call, *found, use_reentrant=reentrant).square().sum().backward()
    call(*want).square().sum().backward()
    assert all(torch.equal(f.grad, w.grad) for f, w in zip(found, want, strict=True))


@every_feature
def test_a_graph_used_twice_gives_the_same_bits(name):
    """`retain_graph=True`, and backward again."""
    _, call, inputs = features()[name]
    leaves = leaves_of(inputs)
    y = call(*leaves)
    dy = torch.linspace(0.2, 1, y.numel()).view(y.shape)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_feature
def test_what_the_caller_gave_stays(name):
    """Inputs, output and its gradient keep their bits and their version counters."""
    _, call, inputs = features()[name]
    leaves = leaves_of(inputs)
    y = call(*leaves)
    dy = torch.linspace(0.2, 1, y.numel()).view(y.shape)
    kept = [(t, t.detach().clone(), t._version) for t in (*leaves, y, dy)]
    torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(t.detach(), was) and t._version == version for t, was, version in kept)
    assert all(torch.equal(a.detach(), b) for a, b in zip(leaves, inputs, strict=True))


@every_feature
def test_meta_tensors(name):
    """Sizes, strides and dtype without memory."""
    _, call, inputs = features()[name]
    want = call(*inputs)
    found = call(*(t.to("meta") for t in inputs))
    assert found.device.type == "meta" and found.dtype == want.dtype
    assert (found.shape, found.stride()) == (want.shape, want.stride())


@every_feature
def test_deterministic_algorithms(name):
    """`torch.use_deterministic_algorithms(True)` refuses nothing and changes no bit."""
    _, call, inputs = features()[name]
    want = gradients(call, inputs)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(gradients(call, inputs), want, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(before)


@every_feature
def test_dispatch_modes_and_subclasses_see_the_op(name):
    """A dispatch mode and a tensor subclass see the op; the subclass comes back."""
    op, call, inputs = features()[name]
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    with Mode():
        call(*inputs)
    assert any(s.startswith("fastlm") and op in s for s in seen)
    seen.clear()
    y = call(*(t.as_subclass(Subclass) for t in inputs))
    assert isinstance(y, Subclass) and any("fastlm" in s and op in s for s in seen)


@pytest.mark.parametrize("inner", [torch.float32, torch.float64], ids=str)
@every_feature
def test_autocast(name, inner):
    """Under autocast, float32 and float64: gradients come in the dtypes of what was given."""
    _, call, inputs = features()[name]
    leaves = leaves_of([t.to(inner) for t in inputs])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(*leaves)
    dy = torch.linspace(0.2, 1, y.numel()).view(y.shape)
    found = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    assert [g.dtype for g in found] == [inner] * len(found)
    z = call(*leaves)
    want = torch.autograd.grad(z, leaves, dy.to(z.dtype))
    for f, w in zip(found, want, strict=True):
        torch.testing.assert_close(f, w, rtol=0.1, atol=0.1)
