# ruff: noqa: E501 - a message stands in one piece
"""What wrong calls are told, word for word, with kernels and on the reference; and that no sentence is left out."""

import ast
import traceback
from pathlib import Path

import pytest
import torch

import fastlm

x, row, classes = torch.ones(4, 6), torch.ones(6), torch.tensor([0, 1, 2, 3])
ints, soft = torch.ones(4, 6, dtype=torch.int64), torch.full((4, 6), 1 / 6).requires_grad_()
q, k, v = torch.ones(2, 4, 4, 8), torch.ones(2, 2, 4, 8), torch.ones(2, 2, 4, 8)


class Placed(torch.Tensor):
    placements = ()  # as a DTensor has


placed = x.as_subclass(Placed)
cos, lens, starts = torch.ones(4, 4), torch.tensor([4, 2]), torch.tensor([0, 1, 4])

# The call, the error, and what it says.
WRONG = [
    (
        "fastlm.scaled_dot_product_attention(k, k, v, dropout_p=1.5)",
        "ArgumentError",
        "fastlm.scaled_dot_product_attention: dropout_p must be in [0, 1], got 1.5",
    ),
    (
        "fastlm.dropout(placed, 0.5)",
        "ValueError",
        "fastlm.dropout: with a DTensor seed must be given, the same on every rank: each would draw its own",
    ),
    (
        'fastlm.backends("layer_norm", x=x, normalized_shape=6, residual=x)',
        "TypeError",
        "fastlm.backends: add_layer_norm is what runs with a residual, and layer_norm without",
    ),
    ("fastlm.relu(3)", "DTypeError", "fastlm.relu: x must be a tensor, got int"),
    ("fastlm.relu(ints)", "DTypeError", "fastlm.relu: x must be floating point, got torch.int64"),
    ("fastlm.relu_squared(ints)", "DTypeError", "fastlm.relu_squared: x must be floating point, got torch.int64"),
    ("fastlm.sigmoid(ints)", "DTypeError", "fastlm.sigmoid: x must be floating point, got torch.int64"),
    ("fastlm.gelu(ints)", "DTypeError", "fastlm.gelu: x must be floating point, got torch.int64"),
    ("fastlm.gelu(3)", "DTypeError", "fastlm.gelu: x must be a tensor, got int"),
    ('fastlm.gelu(x, "fast")', "ArgumentError", "fastlm.gelu: approximate must be one of none, tanh, got 'fast'"),
    ("fastlm.bias_act(x, ints)", "DTypeError", "fastlm.bias_act: bias must be floating point, got torch.int64"),
    (
        "fastlm.bias_act(x, row[:2])",
        "ArgumentError",
        "fastlm.bias_act: bias must be (N,) for x (..., N) = (4, 6), got (2,)",
    ),
    (
        "fastlm.bias_act(x, row.double())",
        "DTypeError",
        "fastlm.bias_act: bias must have the dtype of x, torch.float32, got torch.float64",
    ),
    (
        'fastlm.bias_act(x, row.to("meta"))',
        "ArgumentError",
        "fastlm.bias_act: bias must be on the device of x, cpu, got meta",
    ),
    (
        'fastlm.bias_act(x, row, "swish")',
        "ValueError",
        "fastlm.bias_act: act must be one of none, relu, relu_squared, gelu, gelu_tanh, silu, sigmoid, tanh, got 'swish'",
    ),
    (
        "fastlm.bias_act(x, row, dropout_p=1.0)",
        "ArgumentError",
        "fastlm.bias_act: dropout_p must be in [0, 1), got 1.0",
    ),
    (
        "fastlm.bias_act(x, row, dropout_p=torch.tensor(0.5))",
        "DTypeError",
        "fastlm.bias_act: dropout_p must be a number, got Tensor",
    ),
    (
        "fastlm.bias_act(x, row, dropout_p=0.5, seed=3)",
        "TypeError",
        "fastlm.bias_act: seed must be one int64 in a tensor, got 3",
    ),
    (
        'fastlm.bias_act(x, row, dropout_p=0.5, seed=torch.tensor(3).to("meta"))',
        "ValueError",
        "fastlm.bias_act: seed must be on the device of the input, cpu, got meta",
    ),
    ("fastlm.dropout(x, 1.5)", "ArgumentError", "fastlm.dropout: p must be in [0, 1), got 1.5"),
    (
        "fastlm.glu(x, row)",
        "ArgumentError",
        "fastlm.glu: gate and up must have one shape (..., N), got (4, 6) and (6,)",
    ),
    (
        "fastlm.glu(x, x.double())",
        "DTypeError",
        "fastlm.glu: up must have the dtype of gate, torch.float32, got torch.float64",
    ),
    (
        'fastlm.glu(x, x, "swish")',
        "ValueError",
        "fastlm.glu: act must be one of none, relu, relu_squared, gelu, gelu_tanh, silu, sigmoid, tanh, got 'swish'",
    ),
    (
        "fastlm.layer_norm(x, (5,))",
        "ArgumentError",
        "fastlm.layer_norm: normalized_shape must be the last sizes of x, (4, 6), got (5,)",
    ),
    (
        "fastlm.layer_norm(x, (6,), row[:2])",
        "ArgumentError",
        "fastlm.layer_norm: weight must be of normalized_shape (6,), got (2,)",
    ),
    (
        "fastlm.layer_norm(x, (6,), row.double())",
        "DTypeError",
        "fastlm.layer_norm: weight must be float32 or of the dtype of x, torch.float32, got torch.float64",
    ),
    (
        'fastlm.layer_norm(x, (6,), row.to("meta"))',
        "ArgumentError",
        "fastlm.layer_norm: weight must be on the device of x, cpu, got meta",
    ),
    ('fastlm.layer_norm(x, (6,), eps="small")', "DTypeError", "fastlm.layer_norm: eps must be a number, got str"),
    (
        "fastlm.rms_norm(x, (6,), residual=row)",
        "ArgumentError",
        "fastlm.rms_norm: residual must be of x's shape, (4, 6), got (6,)",
    ),
    (
        'fastlm.rms_norm(x, (6,), residual=x.to("meta"))',
        "ArgumentError",
        "fastlm.rms_norm: residual must be on the device of x, cpu, got meta",
    ),
    ("fastlm.rope(row, cos, cos)", "ArgumentError", "fastlm.rope: x must be (..., T, H, D), got (6,)"),
    (
        "fastlm.rope(q, cos, cos[:2])",
        "ArgumentError",
        "fastlm.rope: cos and sin must be (positions, R/2) with R from 2 to D = 8, got (4, 4) and (2, 4)",
    ),
    (
        "fastlm.rope(q, cos[:1], cos[:1])",
        "ArgumentError",
        "fastlm.rope: cos and sin must have at least T = 4 rows, got 1",
    ),
    (
        "fastlm.rope(q, cos, cos, positions=x)",
        "DTypeError",
        "fastlm.rope: positions must be int32 or int64, got torch.float32",
    ),
    (
        "fastlm.rope(q, cos, cos, positions=torch.tensor([1, 2]))",
        "ArgumentError",
        "fastlm.rope: positions must be (T,) = (4,) or (..., T) = (2, 4), got (2,)",
    ),
    ("fastlm.rope_tables(-1, 8)", "ArgumentError", "fastlm.rope_tables: length must be at least 0, got -1"),
    ("fastlm.rope_tables(4, 7)", "ArgumentError", "fastlm.rope_tables: dim must be even and at least 2, got 7"),
    ("fastlm.rope_tables(4, 8, 1.0)", "ArgumentError", "fastlm.rope_tables: base must be above 1, got 1.0"),
    ("fastlm.embedding(x, x)", "DTypeError", "fastlm.embedding: input must be int32 or int64, got torch.float32"),
    ("fastlm.embedding(classes, row)", "ArgumentError", "fastlm.embedding: weight must be (V, N), got (6,)"),
    (
        "fastlm.embedding(classes, x, 4)",
        "ArgumentError",
        "fastlm.embedding: padding_idx must be a row of weight, -4 to 3, or None, got 4",
    ),
    (
        'fastlm.embedding(classes, x.to("meta"))',
        "ArgumentError",
        "fastlm.embedding: weight must be on the device of input, cpu, got meta",
    ),
    ("fastlm.linear_act(x, row)", "ArgumentError", "fastlm.linear_act: weight must be (N, K), got (6,)"),
    (
        "fastlm.linear_act(x, x[:, :4])",
        "ArgumentError",
        "fastlm.linear_act: x must be (..., K) for weight (N, K) = (4, 4), got (4, 6)",
    ),
    ("fastlm.linear_act(x, x, row)", "ArgumentError", "fastlm.linear_act: bias must be (N,) = (4,), got (6,)"),
    (
        "fastlm.linear_act(x, x.double())",
        "DTypeError",
        "fastlm.linear_act: weight must have the dtype of x, torch.float32, got torch.float64",
    ),
    (
        'fastlm.linear_act(x, x, act="swish")',
        "ValueError",
        "fastlm.linear_act: act must be one of none, relu, relu_squared, gelu, gelu_tanh, silu, sigmoid, tanh, got 'swish'",
    ),
    (
        'fastlm.mse_loss(x, x, reduction="max")',
        "ArgumentError",
        "fastlm.mse_loss: reduction must be one of mean, sum, none, got 'max'",
    ),
    (
        "fastlm.mse_loss(x, x[:, :4])",
        "ArgumentError",
        "fastlm.mse_loss: shapes must broadcast, got input (4, 6) and target (4, 4)",
    ),
    (
        "fastlm.mse_loss(x, x, weight=row)",
        "ArgumentError",
        "fastlm.mse_loss: weight must be of input's shape, (4, 6), got (6,)",
    ),
    (
        'fastlm.mse_loss(x, x.to("meta"))',
        "ArgumentError",
        "fastlm.mse_loss: target must be on the device of input, cpu, got meta",
    ),
    (
        "fastlm.cross_entropy(torch.tensor(1.0), classes)",
        "ArgumentError",
        "fastlm.cross_entropy: input must be (C,), (N, C) or (N, C, ...), got ()",
    ),
    (
        "fastlm.cross_entropy(x, classes.int())",
        "DTypeError",
        "fastlm.cross_entropy: target must be int64 classes, or probabilities, got torch.int32",
    ),
    (
        "fastlm.cross_entropy(x, classes[:2])",
        "ArgumentError",
        "fastlm.cross_entropy: target must be (4,) for input (4, 6), got (2,)",
    ),
    (
        "fastlm.cross_entropy(x, classes + 9)",
        "IndexError",
        "fastlm.cross_entropy: a target must be a class, 0 to 5, or ignore_index, -100, got 9",
    ),
    (
        "fastlm.cross_entropy(x, classes, row[:2])",
        "ArgumentError",
        "fastlm.cross_entropy: weight must be (C,) = (6,), got (2,)",
    ),
    (
        'fastlm.cross_entropy(x, classes, reduction="max")',
        "ArgumentError",
        "fastlm.cross_entropy: reduction must be one of mean, sum, none, got 'max'",
    ),
    (
        "fastlm.cross_entropy(x, classes, label_smoothing=2.0)",
        "ArgumentError",
        "fastlm.cross_entropy: label_smoothing must be in [0, 1], got 2.0",
    ),
    (
        'fastlm.cross_entropy(x, classes, z_loss="small")',
        "DTypeError",
        "fastlm.cross_entropy: z_loss must be a number, got str",
    ),
    (
        "fastlm.cross_entropy(x, classes, softcap=0.0)",
        "ArgumentError",
        "fastlm.cross_entropy: softcap must be from 1e-30 to 1e30, or None, got 0.0",
    ),
    (
        "torch.ops.fastlm.cross_entropy(x, soft, None, -100, 0.0, 0.0)[0].sum().backward()",
        "NotImplementedError",
        "fastlm.cross_entropy: the op has no gradient for target and weight",
    ),
    (
        "fastlm.linear_cross_entropy(x, row, classes)",
        "ArgumentError",
        "fastlm.linear_cross_entropy: weight must be (C, D), got (6,)",
    ),
    (
        "fastlm.linear_cross_entropy(x, x[:, :4], classes)",
        "ArgumentError",
        "fastlm.linear_cross_entropy: x must be (..., D) for weight (C, D) = (4, 4), got (4, 6)",
    ),
    (
        "fastlm.linear_cross_entropy(x, x, classes, row)",
        "ArgumentError",
        "fastlm.linear_cross_entropy: bias must be (C,) = (4,), got (6,)",
    ),
    (
        "fastlm.linear_cross_entropy(x, x, classes.int())",
        "DTypeError",
        "fastlm.linear_cross_entropy: target must be int64 classes, or probabilities, got torch.int32",
    ),
    (
        "fastlm.linear_cross_entropy(x, x, classes[:2])",
        "ArgumentError",
        "fastlm.linear_cross_entropy: target must be (4,) for x (4, 6), got (2,)",
    ),
    (
        "fastlm.linear_cross_entropy(x, x, classes, class_weight=row)",
        "ArgumentError",
        "fastlm.linear_cross_entropy: class_weight must be (C,) = (4,), got (6,)",
    ),
    ("fastlm.attention(3, k, v)", "DTypeError", "fastlm.attention: q must be a tensor, got int"),
    (
        "fastlm.attention(x, k, v)",
        "ArgumentError",
        "fastlm.attention: q must have 4 dimensions (B, H, T, D), got (4, 6)",
    ),
    ("fastlm.attention(q.long(), k, v)", "DTypeError", "fastlm.attention: q must be floating point, got torch.int64"),
    (
        "fastlm.attention(q, k.double(), v)",
        "DTypeError",
        "fastlm.attention: k must have the dtype of q, torch.float32, got torch.float64",
    ),
    (
        'fastlm.attention(q, k.to("meta"), v)',
        "ArgumentError",
        "fastlm.attention: k must be on the device of q, cpu, got meta",
    ),
    (
        "fastlm.attention(q[..., :0], k, v)",
        "ArgumentError",
        "fastlm.attention: q must have a head dim D of at least 1, got (2, 4, 4, 0)",
    ),
    (
        "fastlm.attention(q[:, :3], k, v)",
        "ArgumentError",
        "fastlm.attention: the heads of q must be a multiple of those of k, got 3 and 2",
    ),
    (
        "fastlm.attention(q, k[:1], v)",
        "ArgumentError",
        "fastlm.attention: k must be (B, Hk, Tk, D) = (2, 2, 4, 8) to match q, got (1, 2, 4, 8)",
    ),
    (
        "fastlm.attention(q, k, v[:, :, :2])",
        "ArgumentError",
        "fastlm.attention: v must be (B, Hk, Tk, Dv) = (2, 2, 4, Dv) to match k, got (2, 2, 2, 8)",
    ),
    (
        'fastlm.attention(q, k, v, causal="left")',
        "ArgumentError",
        "fastlm.attention: causal must be False, True, 'bottom_right' or 'top_left', got 'left'",
    ),
    (
        "fastlm.attention(q, k, v, window=(1, 2, 3))",
        "ArgumentError",
        "fastlm.attention: window must be an int or (left, right), -1 or more each, got (1, 2, 3)",
    ),
    (
        "fastlm.attention(q, k, v, mask=x)",
        "DTypeError",
        "fastlm.attention: mask must be bool (True: visible), got torch.float32; an additive mask is called bias",
    ),
    (
        "fastlm.attention(q, k, v, mask=x > 0)",
        "ArgumentError",
        "fastlm.attention: mask must broadcast to (B, Hq, Tq, Tk) = (2, 4, 4, 4), got (4, 6)",
    ),
    (
        "fastlm.attention(q, k, v, bias=classes)",
        "DTypeError",
        "fastlm.attention: bias must be floating point, got torch.int64",
    ),
    (
        "fastlm.attention(q, k, v, alibi_slopes=row)",
        "ArgumentError",
        "fastlm.attention: alibi_slopes must be (Hq,) = (4,) or (B, Hq) = (2, 4), got (6,)",
    ),
    ("fastlm.attention(q, k, v, sinks=row)", "ArgumentError", "fastlm.attention: sinks must be (Hq,) = (4,), got (6,)"),
    (
        "fastlm.attention(q, k, v, softcap=-1.0)",
        "ArgumentError",
        "fastlm.attention: softcap must be from 1e-30 to 1e30, or None, got -1.0",
    ),
    ('fastlm.attention(q, k, v, scale="big")', "DTypeError", "fastlm.attention: scale must be a number, got str"),
    (
        "fastlm.attention(q, k, v, dropout_p=1.0)",
        "ArgumentError",
        "fastlm.attention: dropout_p must be in [0, 1), got 1.0",
    ),
    (
        "fastlm.attention(q, k, v, cu_seqlens_q=starts)",
        "ArgumentError",
        "fastlm.attention: cu_seqlens_q and cu_seqlens_k must be given together",
    ),
    (
        "fastlm.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts)",
        "ArgumentError",
        "fastlm.attention: packed sequences must come as one batch, q (1, H, total, D), got B = 2",
    ),
    (
        "fastlm.attention(q[:1], k[:1], v[:1], cu_seqlens_q=x, cu_seqlens_k=starts)",
        "ArgumentError",
        "fastlm.attention: cu_seqlens_q must be (sequences + 1,) int32 or int64, got torch.float32 (4, 6)",
    ),
    (
        "fastlm.attention(q[:1], k[:1], v[:1], cu_seqlens_q=starts, cu_seqlens_k=starts + 1)",
        "ArgumentError",
        "fastlm.attention: cu_seqlens_k must rise from 0 to the total of 4, got [1, 2, 5]",
    ),
    (
        "fastlm.attention(q[:1], k[:1], v[:1], cu_seqlens_q=starts, cu_seqlens_k=starts[[0, 2]])",
        "ArgumentError",
        "fastlm.attention: cu_seqlens_k must have as many sequences as cu_seqlens_q, 2, got 1",
    ),
    (
        "fastlm.attention(q[:1], k[:1], v[:1], cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=1)",
        "ArgumentError",
        "fastlm.attention: max_seqlen_q must be at least the longest sequence, 3, got 1",
    ),
    (
        "fastlm.attention(q[:1], k[:1], v[:1], cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=-1)",
        "ArgumentError",
        "fastlm.attention: max_seqlen_q must be an int of at least 0, got -1",
    ),
    (
        "fastlm.attention(q, k, v, max_seqlen_q=4)",
        "ArgumentError",
        "fastlm.attention: max_seqlen_q and max_seqlen_k belong to packed sequences, given by cu_seqlens_q",
    ),
    (
        "fastlm.scaled_dot_product_attention(q, k, v, is_causal=1)",
        "DTypeError",
        "fastlm.scaled_dot_product_attention: is_causal must be a bool, got 1",
    ),
    (
        "fastlm.scaled_dot_product_attention(k, k, v, attn_mask=x.double())",
        "DTypeError",
        "fastlm.scaled_dot_product_attention: attn_mask must be bool, float32 or of the dtype of query, torch.float32, got torch.float64",
    ),
    (
        "fastlm.scaled_dot_product_attention(k, k, v, attn_mask=x)",
        "ArgumentError",
        "fastlm.scaled_dot_product_attention: attn_mask must broadcast to (2, 2, 4, 4), got (4, 6)",
    ),
    (
        "fastlm.scaled_dot_product_attention(row, row, row)",
        "ArgumentError",
        "fastlm.scaled_dot_product_attention: query must have at least 2 dimensions, got (6,)",
    ),
    (
        "fastlm.scaled_dot_product_attention(q.long(), k, v)",
        "DTypeError",
        "fastlm.scaled_dot_product_attention: query must be floating point, got torch.int64",
    ),
    (
        "fastlm.scaled_dot_product_attention(q, k[..., :3], v)",
        "ArgumentError",
        "fastlm.scaled_dot_product_attention: sizes must be query (..., Tq, D), key (..., Tk, D), value (..., Tk, Dv), got query (2, 4, 4, 8), key (2, 2, 4, 3), value (2, 2, 4, 8)",
    ),
    (
        "fastlm.scaled_dot_product_attention(q, k[:, :3], v)",
        "ArgumentError",
        "fastlm.scaled_dot_product_attention: leading dimensions must broadcast, got query (2, 4, 4, 8), key (2, 2, 4, 8), value (2, 2, 4, 8)",
    ),
    (
        "fastlm.scaled_dot_product_attention(q[:, :3], k[:, :2], v[:, :2], enable_gqa=True)",
        "ArgumentError",
        "fastlm.scaled_dot_product_attention: with enable_gqa query must have a multiple of the heads of key and value, got query (2, 3, 4, 8), key (2, 2, 4, 8), value (2, 2, 4, 8)",
    ),
    (
        "fastlm.attention_decode(x, k, v, cache_seqlens=lens)",
        "ArgumentError",
        "fastlm.attention_decode: q must have 4 dimensions, got (4, 6)",
    ),
    (
        "fastlm.attention_decode(q.long(), k, v, cache_seqlens=lens)",
        "DTypeError",
        "fastlm.attention_decode: q must be floating point, got torch.int64",
    ),
    (
        "fastlm.attention_decode(q, k[:1], v, cache_seqlens=lens)",
        "ArgumentError",
        "fastlm.attention_decode: k_cache must be (B, Hk, S, D) with B = 2 of q, got (1, 2, 4, 8)",
    ),
    (
        "fastlm.attention_decode(q, k, v, cache_seqlens=lens, page_table=lens)",
        "ArgumentError",
        "fastlm.attention_decode: page_table must be (B, n) of int32 or int64 with B = 2, got torch.int64 (2,)",
    ),
    (
        "fastlm.attention_decode(q, k[..., :3], v, cache_seqlens=lens)",
        "ArgumentError",
        "fastlm.attention_decode: k_cache must have the head dim of q, 8, at least 1, got (2, 2, 4, 3)",
    ),
    (
        "fastlm.attention_decode(q[:, :3], k, v, cache_seqlens=lens)",
        "ArgumentError",
        "fastlm.attention_decode: the heads of q must be a multiple of those of k_cache, got 3 and 2",
    ),
    (
        "fastlm.attention_decode(q, k, v[:1], cache_seqlens=lens)",
        "ArgumentError",
        "fastlm.attention_decode: v_cache must have the sizes of k_cache but the last, got (1, 2, 4, 8)",
    ),
    (
        "fastlm.attention_decode(q, k, v, cache_seqlens=x)",
        "ArgumentError",
        "fastlm.attention_decode: cache_seqlens must be (B,) = (2,) of int32 or int64, got torch.float32 (4, 6)",
    ),
    (
        "fastlm.attention_decode(q, k, v, cache_seqlens=lens, k=k)",
        "ArgumentError",
        "fastlm.attention_decode: k and v must be given together",
    ),
    (
        "fastlm.attention_decode(q, k, v, cache_seqlens=lens, k=k[:1], v=v[:1])",
        "ArgumentError",
        "fastlm.attention_decode: k must be (B, Hk, T, D) = (2, 2, T, 8), got (1, 2, 4, 8)",
    ),
    (
        "fastlm.attention_decode(q, k, v, cache_seqlens=lens + 9)",
        "ArgumentError",
        "fastlm.attention_decode: cache_seqlens[0] must be from 0 to 4, for 0 more keys to fit, got 13",
    ),
    (
        "fastlm.attention_decode(q, k, v, cache_seqlens=lens, page_table=torch.tensor([[7], [0]]))",
        "ArgumentError",
        "fastlm.attention_decode: page_table[0] must hold pages, 0 to 1, got 7",
    ),
    (
        'fastlm.attention_decode(q, k, v, cache_seqlens=lens, causal="top_left")',
        "ArgumentError",
        "fastlm.attention_decode: causal must be True, 'bottom_right' or False, got 'top_left'",
    ),
]


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[call for call, _, _ in WRONG])
def test_wrong_calls_are_told(call, error, message, choice):
    with fastlm.use_backend(choice), pytest.raises(Exception) as caught:
        eval(call)
    assert (type(caught.value).__name__, str(caught.value)) == (error, message)


def test_every_sentence_of_the_ops_is_above():
    raised = set()
    for call, _, _ in WRONG:
        for choice in ("auto", "reference"):
            try:
                with fastlm.use_backend(choice):
                    eval(call)
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                raised.add((last.filename, last.lineno))
    package = Path(fastlm.__file__).parent
    missing = []
    for path in [
        *(package / "ops").glob("*.py"),
        package / "_checks.py",
        package / "_dropout.py",
        package / "_activations.py",
    ]:
        if path.stem in ("adam", "sgd"):  # test_adam.py, test_sgd.py
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                lines = range(node.lineno, node.end_lineno + 1)
                if not any((str(path), line) in raised for line in lines):
                    missing.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not missing
