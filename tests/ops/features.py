"""The features of every differentiable op, for the tests of features and transforms and for docs/features.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from op_testing import numbers
from torch import Tensor

import fastlm


class Feature(NamedTuple):
    op: str
    call: Callable[..., Tensor]
    inputs: list[Tensor]  # float32, differentiable


def _activation(name: str, call: Callable[[Tensor], Tensor]) -> dict[str, Feature]:
    return {name: Feature(name.partition(",")[0].split()[0], call, [numbers((4, 6)) + 0.05])}


def _attention(name: str, more: tuple[str, ...] = (), shape=(2, 2, 5, 7), **options) -> dict[str, Feature]:
    """shape: query heads, key heads, queries, keys. `more`: options that are tensors with a gradient."""
    heads, key_heads, queries, keys = shape
    batch = 1 if "cu_seqlens_q" in options else 2
    sizes = {"bias": (heads, queries, keys), "alibi_slopes": (heads,), "sinks": (heads,)}
    tensors = [numbers((batch, heads, queries, 8)), *(numbers((batch, key_heads, keys, 8), seed=s) for s in (1, 2))]
    tensors += [numbers(sizes[name], seed=3) for name in more]

    def call(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
        with_device = {n: o.to(q.device) if isinstance(o, Tensor) else o for n, o in options.items()}
        return fastlm.attention(q, k, v, **with_device, **dict(zip(more, extras, strict=True)))

    return {f"attention, {name}" if name else "attention": Feature("attention", call, tensors)}


def _decode(name: str, more: tuple[str, ...] = (), pages: bool = False, **options) -> dict[str, Feature]:
    """`more`: options that are tensors with a gradient."""
    sizes = {"alibi_slopes": (4,), "sinks": (4,), "k": (2, 2, 2, 8), "v": (2, 2, 2, 8)}
    cache = (5, 2, 3, 8) if pages else (2, 2, 8, 8)
    tensors = [numbers((2, 4, 2, 8)), *(numbers(cache, seed=s) for s in (7, 8))]
    tensors += [numbers(sizes[name], seed=9 + i) for i, name in enumerate(more)]

    def call(q: Tensor, k_cache: Tensor, v_cache: Tensor, *extras: Tensor) -> Tensor:
        if "k" in more:
            k_cache, v_cache = k_cache.clone(), v_cache.clone()  # they are written to
        where = {"cache_seqlens": torch.tensor([6, 4], device=q.device)}
        if pages:
            where["page_table"] = torch.tensor([[4, 1, 0], [2, 3, 9]], device=q.device)  # 9: of no key
        given = dict(zip(more, extras, strict=True))
        return fastlm.attention_decode(q, k_cache, v_cache, **where, **options, **given)

    return {f"attention_decode, {name}" if name else "attention_decode": Feature("attention_decode", call, tensors)}


def features() -> dict[str, Feature]:
    """By name, on the default device."""
    x, up, row = numbers((4, 6)) + 0.05, numbers((4, 6), seed=1), numbers((6,), seed=2)
    weight, bias = numbers((5, 6), seed=3), numbers((5,), seed=4)
    classes, seed = torch.tensor([3, -100, 0, 4]), torch.tensor(5)
    angle = torch.linspace(0, 4, 9).view(3, 3)
    query = numbers((2, 3, 2, 8))
    everything = {
        "causal": True, "window": (4, 0), "mask": numbers((5, 7), seed=6) > -1, "softcap": 2.0, "dropout_p": 0.2,
        "seed": seed,
    }  # fmt: skip

    found = {
        **_activation("relu", fastlm.relu),
        **_activation("relu_squared", fastlm.relu_squared),
        **_activation("gelu", fastlm.gelu),
        **_activation("gelu, tanh", lambda x: fastlm.gelu(x, "tanh")),
        **_activation("silu", fastlm.silu),
        **_activation("sigmoid", fastlm.sigmoid),
        **_activation("tanh", fastlm.tanh),
        "glu (SwiGLU)": Feature("glu", fastlm.glu, [x, up]),
        "glu, gelu (GEGLU)": Feature("glu", lambda g, u: fastlm.glu(g, u, "gelu"), [x, up]),
        "glu, relu (ReGLU)": Feature("glu", lambda g, u: fastlm.glu(g, u, "relu"), [x, up]),
        "bias_act": Feature("bias_act", fastlm.bias_act, [x, row]),
        "bias_act, gelu, dropout": Feature(
            "bias_act", lambda x, b: fastlm.bias_act(x, b, "gelu", 0.3, seed.to(x.device)), [x, row]
        ),
        "dropout": Feature("dropout", lambda x: fastlm.dropout(x, 0.3, seed=seed.to(x.device)), [x]),
        "layer_norm": Feature("layer_norm", lambda x: fastlm.layer_norm(x, (6,)), [x]),
        "layer_norm, affine": Feature("layer_norm", lambda x, w, b: fastlm.layer_norm(x, (6,), w, b), [x, row, up[0]]),
        "layer_norm, residual": Feature(
            "add_layer_norm", lambda x, r, w: fastlm.layer_norm(x, (6,), w, residual=r)[0], [x, up, row]
        ),
        "rms_norm": Feature("rms_norm", lambda x: fastlm.rms_norm(x, (6,)), [x]),
        "rms_norm, affine": Feature("rms_norm", lambda x, w: fastlm.rms_norm(x, (6,), w), [x, row]),
        "rms_norm, residual": Feature(
            "add_rms_norm", lambda x, r, w: fastlm.rms_norm(x, (6,), w, residual=r)[0], [x, up, row]
        ),
        "rope": Feature(
            "rope", lambda q: fastlm.rope(q.transpose(1, 2), angle.cos().to(q), angle.sin().to(q)), [query]
        ),
        "rope, gradient of the tables": Feature(
            "rope", lambda q, a: fastlm.rope(q.transpose(1, 2), a.cos(), a.sin()), [query, angle[:2]]
        ),
        "rope, interleaved, positions": Feature(
            "rope",
            lambda q, a: fastlm.rope(
                q.transpose(1, 2), a.cos(), a.sin(), interleaved=True, positions=torch.tensor([2, 0], device=q.device)
            ),
            [query, angle],
        ),
        "embedding": Feature("embedding", lambda w: fastlm.embedding(classes.clamp(0).to(w.device), w), [weight]),
        "linear_act": Feature("linear_act", lambda x, w, b: fastlm.linear_act(x, w, b), [x, weight, bias]),
        "linear_act, gelu": Feature("linear_act", lambda x, w: fastlm.linear_act(x, w, act="gelu"), [x, weight]),
        "cross_entropy": Feature("cross_entropy", lambda x: fastlm.cross_entropy(x, classes.to(x.device)), [x]),
        "cross_entropy, smoothing, z-loss, softcap": Feature(
            "cross_entropy",
            lambda x: fastlm.cross_entropy(x, classes.to(x.device), label_smoothing=0.1, z_loss=0.01, softcap=3.0),
            [x],
        ),
        "cross_entropy, class weights": Feature(
            "cross_entropy", lambda x: fastlm.cross_entropy(x, classes.to(x.device), row.abs().to(x)), [x]
        ),
        "cross_entropy, class weights, smoothing": Feature(
            "cross_entropy",
            lambda x: fastlm.cross_entropy(x, classes.to(x.device), row.abs().to(x), label_smoothing=0.1),
            [x],
        ),
        "cross_entropy, probabilities": Feature(
            "cross_entropy", lambda x: fastlm.cross_entropy(x, up.softmax(1).to(x), reduction="sum"), [x]
        ),
        "linear_cross_entropy": Feature(
            "linear_cross_entropy", lambda x, w: fastlm.linear_cross_entropy(x, w, classes.to(x.device)), [x, weight]
        ),
        "linear_cross_entropy, bias, smoothing, z-loss, softcap": Feature(
            "linear_cross_entropy",
            lambda x, w, b: fastlm.linear_cross_entropy(
                x, w, classes.to(x.device), b, label_smoothing=0.1, z_loss=0.01, softcap=3.0, reduction="sum"
            ),
            [x, weight, bias],
        ),
        "linear_cross_entropy, class weights": Feature(
            "cross_entropy",
            lambda x, w: fastlm.linear_cross_entropy(x, w, classes.to(x.device), class_weight=bias.abs().to(x)),
            [x, weight],
        ),
        "mse_loss": Feature("mse_loss", fastlm.mse_loss, [x, up]),
        **_attention(""),
        **_attention("causal", causal=True),
        **_attention("causal, top-left", causal="top_left"),
        **_attention("window", window=(2, 1)),
        **_attention("mask", mask=numbers((5, 7), seed=5) > -1),
        **_attention("bias", ("bias",)),
        **_attention("ALiBi", ("alibi_slopes",)),
        **_attention("ALiBi of each sequence", alibi_slopes=numbers((2, 2), seed=5).abs()),
        **_attention("bias, broadcast, no gradient", bias=numbers((2, 1, 1, 7), seed=5)),
        **_attention("sinks", ("sinks",)),
        **_attention("softcap", softcap=2.0),
        **_attention("dropout", dropout_p=0.3, seed=seed),
        **_attention("grouped heads", shape=(4, 2, 5, 5)),
        **_attention("one query", shape=(4, 2, 1, 9)),
        **_attention(
            "packed sequences", causal=True, cu_seqlens_q=torch.tensor([0, 2, 2, 5]),
            cu_seqlens_k=torch.tensor([0, 3, 4, 7]),
        ),
        **_attention("all together", ("bias", "alibi_slopes", "sinks"), shape=(4, 2, 5, 7), **everything),
        "attention, log-sum-exp": Feature(
            "attention",
            lambda q, k, v: torch.cat([t.flatten() for t in fastlm.attention(q, k, v, return_lse=True)]),
            [query, query.flip(2), query.flip(3)],
        ),
        **_decode(""),
        **_decode("pages", pages=True),
        **_decode("append", ("k", "v")),
        **_decode("append to pages", ("k", "v"), pages=True),
        **_decode("ALiBi", ("alibi_slopes",)),
        **_decode("sinks", ("sinks",)),
        **_decode("window, softcap", window=2, softcap=2.0),
        **_decode("pages, ALiBi, sinks, window", ("alibi_slopes", "sinks"), pages=True, window=3),
    }  # fmt: skip
    return found
