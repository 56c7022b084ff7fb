"""Attention in C++: csrc/cpu/attention.cpp, csrc/cuda/attention.cu."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm import _native
from fastlm._attention import empty_in_order_of, lse_of_no_key, sinks_gradient
from fastlm._library import kernel
from fastlm.kernels._common import FLOATS, as_laid_out, with_rows
from fastlm.kernels.native._common import capability, current_stream

MAX_HEAD_DIM = 256


def unsupported(q: Tensor, k: Tensor, v: Tensor, *_options: Any) -> str | None:
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v of one floating-point dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    if not (1 <= q.shape[-1] <= MAX_HEAD_DIM and 1 <= v.shape[-1] <= MAX_HEAD_DIM):
        return f"takes head dimensions from 1 to {MAX_HEAD_DIM}, not {q.shape[-1]} and {v.shape[-1]}"
    return None


def _unsupported_backward(do, dlse, q, k, v, *_options: Any) -> str | None:
    return unsupported(q, k, v)


def band_of(causal: int, window_left: int, window_right: int, q_len: int, k_len: int) -> tuple[int, int]:
    """Query i sees key j iff i + lower <= j <= i + upper."""
    last = k_len - q_len  # windows count from key i + last, which ends together with the queries
    lower = last - window_left if window_left >= 0 else -q_len
    upper = last + window_right if window_right >= 0 else k_len
    if causal:
        upper = min(upper, last if causal == 1 else 0)
    return lower, upper


def per_head(x: Tensor | None, q: Tensor, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """Slopes or sinks as the kernels read them: (B, Hq), on the CPU in double."""
    return None if x is None else x.to(dtype).expand(q.shape[:2]).contiguous()


def _per_score(x: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask or a bias as (B, Hq, Tq, Tk), without a copy."""
    return None if x is None else x.expand(*q.shape[:3], k.shape[2])


def writing(run: Callable[..., Any], *outputs: Tensor) -> None:
    """run(*outputs), through a copy of those that the kernels cannot write in place."""
    written = [x if with_rows(x) is x else torch.empty_like(x, memory_format=torch.contiguous_format) for x in outputs]
    run(*written)
    for x, y in zip(outputs, written, strict=True):
        if x is not y:
            x.copy_(y)


if _native.cpu is not None:
    _forward, _backward = _native.cpu.attention_forward, _native.cpu.attention_backward

    def _pieces(q: Tensor, k: Tensor, options: Sequence[Any]) -> Iterator[tuple[slice | None, slice | None, tuple]]:
        """The calls of a kernel that make up one of the op: one, or one for each packed sequence.

        Each is told which queries and which keys it is on, None for all, and the kernel's last arguments.
        """
        (
            mask, bias, slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, _, _, causal, window_left, window_right, scale,
            softcap, dropout_p, _,
        ) = options  # fmt: skip
        _, Hq, Tq, _ = q.shape
        Tk = k.shape[2]
        if bias is not None:
            bias = bias.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
            if bias.dim() == 0 or bias.shape[-1] != Tk:  # the same for all keys
                bias = bias.expand(*bias.shape[:-1], Tk)
            bias = with_rows(bias)
        mask, bias = _per_score(mask, q, k), _per_score(bias, q, k)
        heads = per_head(slopes, q), per_head(sinks, q)
        numbers = scale, softcap, dropout_p, seed.item() % 2**64 if dropout_p > 0 else 0

        def last(rows: slice | None, cols: slice | None, first: int, q_len: int, k_len: int) -> tuple:
            diagonals = band_of(causal, window_left, window_right, q_len, k_len)
            elements = first, Hq * Tq * Tk, Tq * Tk, Tk  # how dropout counts those of the scores
            scores = _cut_scores(mask, rows, cols), _cut_scores(bias, rows, cols)
            return (*scores, *heads, *diagonals, *numbers, elements, torch.get_num_threads())

        if cu_seqlens_q is None:
            yield None, None, last(None, None, 0, Tq, Tk)
            return
        ends = _ends("q", cu_seqlens_q, Tq), _ends("k", cu_seqlens_k, Tk)
        for (i, i_end), (j, j_end) in zip(*map(itertools.pairwise, ends), strict=True):
            rows, cols = slice(i, i_end), slice(j, j_end)
            yield rows, cols, last(rows, cols, i * Tk + j, i_end - i, j_end - j)

    def _cut(x: Tensor | None, piece: slice | None) -> Tensor | None:
        """x (B, H, T, ...) for one piece."""
        return x if x is None or piece is None else x[:, :, piece]

    def _cut_scores(x: Tensor | None, rows: slice | None, cols: slice | None) -> Tensor | None:
        """x (B, H, Tq, Tk) for one piece."""
        return x if x is None or rows is None else x[:, :, rows, cols]

    def _ends(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
        """Checked, since under torch.compile the public function has not seen the numbers."""
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != total or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"fastlm.attention: cu_seqlens_{name} must rise from 0 to the total of {total}, got {ends}"
            )
        return ends

    @kernel("attention", backend="native", device="cpu", supports=unsupported)
    def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        o = empty_in_order_of(q, v.shape[-1])
        lse = torch.empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        q, k, v = with_rows(q), with_rows(k), with_rows(v)

        def run(o: Tensor) -> None:
            for rows, cols, last in _pieces(q, k, options):
                _forward(_cut(q, rows), _cut(k, cols), _cut(v, cols), _cut(o, rows), _cut(lse, rows), *last)

        writing(run, o)
        return o, lse

    @kernel("attention_backward", backend="native", device="cpu", supports=_unsupported_backward)
    def attention_backward(
        do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        *options, wanted = options
        _, bias, slopes, sinks, *_ = options
        outputs = [empty_in_order_of(x, x.shape[-1]) for x in (q, k, v)]
        do = torch.zeros_like(o) if do is None else do
        lse = lse.contiguous()
        dlse = None if dlse is None else as_laid_out(dlse, lse)
        do, q, k, v, o = (with_rows(x) for x in (do, q, k, v, o))
        dbias = dslopes = None
        if bias is not None and wanted[3]:  # summed over the batch where it is the same for all
            of_all = bias.dim() < 4 or bias.shape[0] == 1
            dbias = lse.new_zeros(1 if of_all else q.shape[0], *q.shape[1:3], k.shape[2])
        if slopes is not None and wanted[4]:
            dslopes = torch.zeros(q.shape[:2], dtype=torch.float64)

        def run(dq: Tensor, dk: Tensor, dv: Tensor) -> None:
            for rows, cols, last in _pieces(q, k, options):
                do_, dlse_, q_, o_, lse_, dq_ = (_cut(x, rows) for x in (do, dlse, q, o, lse, dq))
                k_, v_, dk_, dv_ = (_cut(x, cols) for x in (k, v, dk, dv))
                dbias_ = _cut_scores(dbias, rows, cols)
                _backward(do_, dlse_, q_, k_, v_, o_, lse_, dq_, dk_, dv_, dbias_, dslopes, *last)

        writing(run, *outputs)
        # The three come from one pass.
        gradients = [x if want else q.new_empty(0) for x, want in zip(outputs, wanted, strict=False)]
        dbias = q.new_empty(0) if dbias is None else dbias.sum_to_size(bias.shape).to(bias.dtype)
        dslopes = q.new_empty(0) if dslopes is None else dslopes.sum_to_size(slopes.shape).to(slopes.dtype)
        dsinks = sinks_gradient(do, dlse, o, lse, sinks) if wanted[5] else q.new_empty(0)
        return (*gradients, dbias, dslopes, dsinks)


# --- CUDA -------------------------------------------------------------------------------------------------------------
def unsupported_cuda(q: Tensor, k: Tensor, v: Tensor, *_options: Any) -> str | None:
    return "does not take float64" if q.dtype == torch.float64 else unsupported(q, k, v)


def _unsupported_backward_cuda(do, dlse, q, k, v, o, lse, *rest) -> str | None:
    *options, _wanted = rest
    if max(q.shape[-1], v.shape[-1]) > 128 and capability(q) < (8, 0):
        return "takes head dimensions above 128 from compute capability 8.0 on"  # for want of shared memory
    return unsupported_cuda(q, k, v, *options)


def diagonals_of(causal: int, window_left: int, window_right: int) -> tuple[int, int, int]:
    """What band_of gives before lengths are known: from the last key for the last query, lower and upper, and from the
    first key for the first query, upper; from 2^30 on none."""
    far = 2**30
    upper = 0 if causal == 1 else window_right if window_right >= 0 else far
    return (-window_left if window_left >= 0 else -far), upper, (0 if causal == 2 else far)


if _native.cuda is not None:
    _cuda = _native.cuda

    def _last(q: Tensor, k: Tensor, options: Sequence[Any]) -> tuple:
        """The kernels' last arguments."""
        (
            mask, bias, slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, _, _, causal, window_left, window_right, scale,
            softcap, dropout_p, _,
        ) = options  # fmt: skip
        scores = _per_score(mask, q, k), _per_score(None if bias is None else bias.float(), q, k)
        heads = (per_head(x, q, torch.float32) for x in (slopes, sinks))
        ends = (None if x is None else x.long().contiguous() for x in (cu_seqlens_q, cu_seqlens_k))
        diagonals = diagonals_of(causal, window_left, window_right)
        return (*scores, *heads, seed, *ends, diagonals, scale, softcap, dropout_p, current_stream(q))

    @kernel("attention", backend="native", device="cuda", supports=unsupported_cuda)
    def attention_cuda(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        o = empty_in_order_of(q, v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        if options[5] is not None:  # rows that unchecked ends leave out
            o.zero_()
            lse.copy_(lse_of_no_key(options[3], lse))
        q, k, v = with_rows(q), with_rows(k), with_rows(v)
        writing(lambda o: _cuda.attention_forward(q, k, v, o, lse, *_last(q, k, options)), o)
        return o, lse

    @kernel("attention_backward", backend="native", device="cuda", supports=_unsupported_backward_cuda)
    def attention_backward_cuda(
        do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        *options, wanted = options
        _, bias, slopes, sinks, _, cu_seqlens_q, *_ = options
        new = torch.empty_like if cu_seqlens_q is None else torch.zeros_like  # rows that unchecked ends leave out
        dq = new(q) if wanted[0] or wanted[3] or wanted[4] else None
        # These two come from one pass.
        dk, dv = (new(k), new(v)) if wanted[1] or wanted[2] else (None, None)
        dbias = lse.new_zeros(*lse.shape, k.shape[2]) if wanted[3] else None
        dslopes = lse.new_zeros(lse.shape) if wanted[4] else None
        do = torch.zeros_like(o) if do is None else do
        read = [with_rows(do), None if dlse is None else dlse.contiguous(), *map(with_rows, (q, k, v, o))]
        read.append(lse.contiguous())
        stats, last = lse.new_empty(*lse.shape, 2), _last(q, k, options)

        def run(*outputs: Tensor) -> None:
            given = iter(outputs)
            written = (*(None if x is None else next(given) for x in (dq, dk, dv)), dbias, dslopes)
            dq_sums = None
            if not options[-1]:  # bits may differ from run to run
                numel = _cuda.attention_backward(*read, *written, None, None, *last)
                dq_sums = lse.new_zeros(numel) if numel else None
            _cuda.attention_backward(*read, *written, dq_sums, stats, *last)

        writing(run, *(x for x in (dq, dk, dv) if x is not None))
        gradients = [x if want else q.new_empty(0) for x, want in zip((dq, dk, dv), wanted, strict=False)]
        dbias = q.new_empty(0) if dbias is None else dbias.sum_to_size(bias.shape).to(bias.dtype)
        if dslopes is None:
            dslopes = q.new_empty(0)
        else:
            dslopes = dslopes.sum(2, dtype=torch.float64).sum_to_size(slopes.shape).to(slopes.dtype)
        dsinks = sinks_gradient(do, dlse, o, lse, sinks) if wanted[5] else q.new_empty(0)
        return (*gradients, dbias, dslopes, dsinks)
