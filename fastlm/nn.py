"""Stock modules that run on fastlm's ops: the same parameters, names and state_dict."""

from __future__ import annotations

from torch import Tensor, nn

from fastlm.ops.norm import layer_norm


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` through `fastlm.layer_norm`, which can add a residual in the same pass."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., *normalized_shape) -> y; with a residual, (y, x + residual)."""
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, residual)
