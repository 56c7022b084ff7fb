"""Stock modules that run on fastlm's ops: the same parameters, names and state_dict."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from fastlm.ops.activation import gelu, sigmoid, silu, tanh
from fastlm.ops.embedding import embedding
from fastlm.ops.linear_act import linear_act
from fastlm.ops.norm import layer_norm
from fastlm.ops.relu import relu, relu_squared

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": relu,
    "relu_squared": relu_squared,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, "tanh"),
    "silu": silu,
    "sigmoid": sigmoid,
    "tanh": tanh,
}


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` through `fastlm.layer_norm`, which can add a residual in the same pass."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., *normalized_shape) -> y; with a residual, (y, x + residual)."""
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, residual)


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether `layer` is of a kind as torch made it, so that its weight and bias are all there is to it.

    Not where something was put in its place or onto it: an adapter, a quantised, sharded or parametrised layer, a hook.
    """
    return (
        type(layer) is kind
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not (
            layer._forward_pre_hooks
            or layer._forward_hooks
            or layer._backward_pre_hooks
            or layer._backward_hooks
            or hooks._has_any_global_hook()
        )
    )


def apply_linear(layer: nn.Module, x: Tensor, act: str = "none") -> Tensor:
    """act(layer(x)): by `fastlm.linear_act` where the layer is plain; any other is called as ever."""
    if is_plain(layer):
        return linear_act(x, layer.weight, layer.bias, act)
    return ACTIVATIONS[act](layer(x))


def apply_embedding(layer: nn.Module, idx: Tensor) -> Tensor:
    """layer(idx): by `fastlm.embedding` where the layer is plain and has no options; any other is called as ever."""
    if is_plain(layer, nn.Embedding) and layer.max_norm is None and not (layer.scale_grad_by_freq or layer.sparse):
        return embedding(idx, layer.weight, layer.padding_idx)
    return layer(idx)
