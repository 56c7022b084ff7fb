"""fastlm.nn: the fused path is taken only where nothing else has a say in what a layer does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm.nn
from fastlm.models import GPT, GPTConfig
from fastlm.nn import apply_embedding, apply_linear


class Adapted(nn.Module):
    """As adapter libraries do it: in the layer's place, adding to what the layer gives."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.weight = layer.weight

    def forward(self, x):
        return self.layer(x) + 1


class Shifted(torch.Tensor):
    """A weight that is not what it seems, as quantised ones are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {})) + 1


def with_hook(register):
    def change(layer):
        getattr(layer, register)(lambda *args: args[-1] + 1)
        return layer

    return change


def with_weight(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Shifted), requires_grad=False)
    return layer


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    return layer


CHANGES = {
    "adapter": Adapted,
    "forward hook": with_hook("register_forward_hook"),
    "tensor subclass": with_weight,
    "parametrization": parametrized,
    "subclass": lambda layer: type("Own", (nn.Linear,), {"forward": lambda self, x: x.sum(-1, keepdim=True)})(8, 5),
}


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_a_plain_layer_is_one_op(act, monkeypatch):
    calls = []
    real = fastlm.nn.linear_act
    monkeypatch.setattr(fastlm.nn, "linear_act", lambda *args: calls.append(args) or real(*args))
    layer, x = nn.Linear(8, 5), torch.randn(3, 2, 8)
    want = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}[act](layer(x))
    torch.testing.assert_close(apply_linear(layer, x, act), want)
    assert len(calls) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_called(change, monkeypatch):
    monkeypatch.setattr(fastlm.nn, "linear_act", None)
    layer, x = CHANGES[change](nn.Linear(8, 5)), torch.randn(3, 8)
    with torch.no_grad():
        assert not torch.equal(layer(x), nn.Linear.forward(nn.Linear(8, 5), x))
        torch.testing.assert_close(apply_linear(layer, x, "relu"), F.relu(layer(x)))


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_are_called(register):
    layer, x, seen = nn.Linear(8, 5), torch.randn(3, 8, requires_grad=True), []
    getattr(layer, register)(lambda *args: seen.append(args) and None)
    apply_linear(layer, x, "relu").sum().backward()
    assert len(seen) == 1


def test_global_hooks_are_called():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)) and None)
    try:
        apply_linear(nn.Linear(8, 5), torch.randn(3, 8))
    finally:
        handle.remove()
    assert seen == [nn.Linear]


def test_a_models_layers_can_be_replaced():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=16, block_size=8, n_layer=1, n_head=2, n_embd=16))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    idx = torch.randint(16, (2, 8))
    before = model(idx)[0]
    for parent, name in ((model.blocks[0].attn, "qkv"), (model.blocks[0].attn, "proj"), (model.blocks[0].mlp, "up"),
                         (model.blocks[0].mlp, "down"), (model, "head")):  # fmt: skip
        layer = getattr(parent, name)
        setattr(parent, name, Adapted(layer))
        assert not torch.allclose(model(idx)[0], before), name
        setattr(parent, name, layer)
    torch.testing.assert_close(model(idx)[0], before)


def test_apply_embedding_takes_plain_layers_alone(monkeypatch):
    calls = []
    real = fastlm.nn.embedding
    monkeypatch.setattr(fastlm.nn, "embedding", lambda *args: calls.append(args) or real(*args))
    idx = torch.randint(9, (4, 10))
    for options, ours in (({}, 1), ({"padding_idx": 2}, 1), ({"scale_grad_by_freq": True}, 0), ({"max_norm": 0.5}, 0)):
        calls.clear()
        layer = nn.Embedding(9, 5, **options)
        y = apply_embedding(layer, idx)
        assert torch.equal(y, layer(idx)) and len(calls) == ours
        (got,), (want,) = (torch.autograd.grad(t.square().sum(), layer.weight) for t in (y, layer(idx)))
        torch.testing.assert_close(got, want)
