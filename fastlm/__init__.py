"""fastlm: fused kernels for training language models in PyTorch, on the CPU and on CUDA GPUs."""

import importlib

from fastlm import _flops, _imports, _library, _sharding, compat, models, optim
from fastlm._library import FallbackWarning, backends, use_backend
from fastlm._version import __version__
from fastlm.ops.activation import gelu, sigmoid, silu, tanh
from fastlm.ops.attention import attention, scaled_dot_product_attention
from fastlm.ops.attention_decode import attention_decode
from fastlm.ops.bias_act import bias_act
from fastlm.ops.cross_entropy import cross_entropy, linear_cross_entropy
from fastlm.ops.dropout import dropout
from fastlm.ops.embedding import embedding
from fastlm.ops.glu import glu
from fastlm.ops.linear_act import linear_act
from fastlm.ops.mse_loss import mse_loss
from fastlm.ops.norm import layer_norm, rms_norm
from fastlm.ops.relu import relu, relu_squared
from fastlm.ops.rope import rope, rope_tables


def _load_kernels(backend: str, family: str, device: str) -> None:
    importlib.import_module(f"fastlm.kernels.{backend}.{family}")
    if backend == "native":
        from fastlm import _native

        if device in _native.reasons:
            raise ImportError(_native.reasons[device])


_library.load_kernels = _load_kernels
_imports.when_imported("torch.utils.flop_counter", _flops.register)
_imports.when_imported("torch.distributed.tensor", _sharding.register)

__all__ = [
    "FallbackWarning",
    "__version__",
    "attention",
    "attention_decode",
    "backends",
    "bias_act",
    "compat",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "glu",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
    "models",
    "mse_loss",
    "optim",
    "relu",
    "relu_squared",
    "rms_norm",
    "rope",
    "rope_tables",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "tanh",
    "use_backend",
]
