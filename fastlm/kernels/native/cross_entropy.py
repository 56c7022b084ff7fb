"""cross_entropy in C++: csrc/cpu/cross_entropy.cpp, csrc/cuda/cross_entropy.cu; linear_cross_entropy from it and the
products of products.py and products_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastlm import _native
from fastlm._library import kernel
from fastlm.kernels._common import unsupported_dtype
from fastlm.kernels.native._common import current_stream


def _unsupported(x: Tensor, target: Tensor, weight: Tensor | None, *_: object) -> str | None:
    if target.is_floating_point():
        return "does not do probabilities as targets"
    if weight is not None:
        return "does not do class weights with label smoothing"
    return unsupported_dtype(x)


def _unsupported_backward(g, dlse, x, target, weight, *_: object) -> str | None:
    return _unsupported(x, target, weight)


def _register(device: str, forward: Callable[..., None], backward: Callable[..., None]) -> None:
    """Both run on contiguous tensors."""

    @kernel("cross_entropy", backend="native", device=device, supports=_unsupported)
    def cross_entropy(
        x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        loss, lse = (torch.empty(len(x), dtype=wide, device=x.device) for _ in range(2))
        forward(x.contiguous(), target.contiguous(), loss, lse, ignore_index, label_smoothing, softcap)
        return loss, lse

    @kernel("cross_entropy_backward", backend="native", device=device, supports=_unsupported_backward)
    def cross_entropy_backward(
        g: Tensor, dlse: Tensor | None, x: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor,
        ignore_index: int, label_smoothing: float, softcap: float,
    ) -> Tensor:  # fmt: skip
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        backward(
            g.contiguous(), dlse if dlse is None else dlse.contiguous(), x.contiguous(), target.contiguous(),
            lse.contiguous(), dx, ignore_index, label_smoothing, softcap,
        )  # fmt: skip
        return dx


def _register_linear(
    device: str,
    products: ModuleType,
    rows_at_a_time: Callable[[Tensor, Tensor], int],
    forward: Callable[..., None],
    backward: Callable[..., None],
    supports: Callable[..., str | None],
) -> None:
    """Over the logits of some rows at a time, whose gradient takes their place. Nothing waits for a GPU."""

    @kernel("linear_cross_entropy", backend="native", device=device, supports=supports)
    def linear_cross_entropy(
        x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float,
        z_loss: float, softcap: float, mean: bool, wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        converts = products.by_conversion(x)
        if converts:  # once, and not once for each part
            weight, bias = weight.float(), None if bias is None else bias.float()
        target = target.contiguous()
        losses, lse = (torch.empty(len(x), dtype=wide, device=x.device) for _ in range(2))
        counted = (target != ignore_index).sum(dtype=torch.float64) if mean else x.new_ones((), dtype=torch.float64)
        share = 1 / counted  # infinite where nothing counts, and 0 times that NaN: the mean of nothing, as in torch
        # In float16 the share would take digits of the logits' gradients: it waits for the end, which is in float32.
        kept, late = (torch.float32, share.nan_to_num(posinf=0.0)) if dtype == torch.float16 else (dtype, None)
        g = (share if late is None else torch.ones_like(share)).to(wide).expand(len(x)).contiguous()
        dx = torch.empty_like(x, dtype=kept, memory_format=torch.contiguous_format) if wanted[0] else None
        make = torch.empty_like if len(x) > 0 else torch.zeros_like  # the first product overwrites what is there
        dweight = make(weight, dtype=wide, memory_format=torch.contiguous_format) if wanted[1] else None
        dbias = x.new_zeros(weight.shape[0], dtype=wide) if wanted[2] else None
        step = rows_at_a_time(x, weight)
        for begin in range(0, len(x), step):
            at = slice(begin, begin + step)
            part = x[at].float() if converts else x[at]
            logits = products.linear(part, weight, bias)
            forward(logits, target[at], losses[at], lse[at], ignore_index, label_smoothing, softcap)
            if any(wanted):
                dlse = 2 * z_loss * g[at] * lse[at] if z_loss else None
                backward(g[at], dlse, logits, target[at], lse[at], logits, ignore_index, label_smoothing, softcap)
            if wanted[0]:
                dx[at] = products.input_gradient(logits, weight)
            if wanted[1]:
                products.add_product(logits.t(), part, dweight, add=begin > 0)
            if wanted[2]:
                dbias += logits.sum(0, dtype=wide)
            del logits  # before the next ones are made
        total = losses.sum(dtype=torch.float64)
        if z_loss:
            total += z_loss * lse.double().square().sum()
        if late is not None:
            for t in (dx, dweight, dbias):
                if t is not None:
                    t *= late
        made = (x.new_empty(0, dtype=kept) if t is None else t.to(kept) for t in (dx, dweight, dbias))
        return (total * share).to(wide), *made


def _unsupported_linear(x: Tensor, *_: object) -> str | None:
    return unsupported_dtype(x)


if _native.cpu is not None:
    from fastlm.kernels.native import products

    # Rows whose logits are held at a time: a tenth of all, since each time the gradient of the weight is read and
    # written, but no more than products need to be fast; and as many as make 4 Mi logits, however few those are.
    _LEAST_ROWS, _SHARE_OF_ROWS, _MOST_ROWS, _LEAST_LOGITS = 128, 10, 1024, 4 << 20

    def _rows(x: Tensor, weight: Tensor) -> int:
        few = min(_MOST_ROWS, len(x) // _SHARE_OF_ROWS)
        return max(_LEAST_ROWS, few, _LEAST_LOGITS // max(1, weight.shape[0]))

    _on_cpu = (
        lambda *args: _native.cpu.cross_entropy_forward(*args, torch.get_num_threads()),
        lambda *args: _native.cpu.cross_entropy_backward(*args, torch.get_num_threads()),
    )
    _register("cpu", *_on_cpu)
    _register_linear("cpu", products, _rows, *_on_cpu, _unsupported_linear)

if _native.cuda is not None:
    from fastlm.kernels.native import products_cuda

    _cuda = _native.cuda
    # Of the logits that are held at a time. Each time the gradient of the weight is read and written, in float32: on an
    # H200 (700 TFLOP/s in bf16, 4.3 TB/s) that is 220 / rows of what the three products take if nothing hides it, for
    # 2048 rows of 128k classes 11 %. (Twice the logits would cost 5 % and another 0.5 GiB.) The logits themselves are
    # read twice and written once besides the products, 160 / columns of x: for 4096 another 4 %.
    _MOST_BYTES = 512 << 20
    _TILE = 128  # rows: a part of a tile takes as long as all of it

    def _rows_cuda(x: Tensor, weight: Tensor) -> int:
        most = max(_TILE, _MOST_BYTES // max(1, weight.shape[0] * x.element_size()) // _TILE * _TILE)
        parts = max(1, -(-len(x) // most))
        return max(1, -(-len(x) // (parts * _TILE))) * _TILE  # of one size, as far as tiles allow

    def _unsupported_linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *others) -> str | None:
        *_, wanted = others
        return unsupported_dtype(x) or (products_cuda.unsupported_sum(x) if wanted[1] else None)

    _on_gpu = (
        lambda x, *args: _cuda.cross_entropy_forward(x, *args, current_stream(x)),
        lambda g, *args: _cuda.cross_entropy_backward(g, *args, current_stream(g)),
    )
    _register("cuda", *_on_gpu)
    _register_linear("cuda", products_cuda, _rows_cuda, *_on_gpu, _unsupported_linear_cuda)
