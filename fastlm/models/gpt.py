"""A GPT: causal Transformer over tokens, in stock modules and fastlm's ops.

Pre-norm blocks (Radford et al., 2019) with rotary positions (Su et al., 2021, arXiv:2104.09864), normalised queries and
keys (Henry et al., 2020, arXiv:2010.04245), a ReLU² MLP (So et al., 2021, arXiv:2109.08668) and a head tied to the
embedding (Press and Wolf, 2017, arXiv:1608.05859). Every weight lives in an `nn.Linear`, `nn.Embedding` or
(a subclass of) `nn.LayerNorm`, so whatever works on those (sharding, adapters, quantisation, export) works here.

Letters: B batch, T tokens in a row, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.nn import LayerNorm, apply_embedding, apply_linear, is_plain
from fastlm.ops.attention import attention
from fastlm.ops.cross_entropy import cross_entropy, linear_cross_entropy
from fastlm.ops.norm import rms_norm
from fastlm.ops.rope import rope, rope_tables

ACTIVATIONS = ("relu_squared", "relu", "gelu")
# From here on the loss does without holding them: memory for some 2 % of the head's time (bench/LOG.md).
_MANY_LOGITS = 1 << 24


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a `GPT`.

    `dropout` is the probability of zeroing an element of the embedded input and of each residual branch, while
    training; attention weights are not dropped. `act` is one of relu_squared, relu, gelu. `bias` gives every linear
    layer and norm a bias. `rope_base` is the longest rotary wavelength divided by 2π, in tokens.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    act: str = "relu_squared"
    bias: bool = False
    dropout: float = 0.0
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"GPTConfig: {name} must be a positive integer, got {value!r}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"GPTConfig: n_embd must be a multiple of 2 * n_head = {2 * self.n_head} (heads of even size, "
                f"for rotary positions), got {self.n_embd}"
            )
        if self.act not in ACTIVATIONS:
            raise ValueError(f"GPTConfig: act must be one of {', '.join(ACTIVATIONS)}, got {self.act!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"GPTConfig: dropout must be in [0, 1), got {self.dropout!r}")
        if not self.rope_base > 1.0:
            raise ValueError(f"GPTConfig: rope_base must be above 1, got {self.rope_base!r}")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> GPTConfig:
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"GPTConfig: unknown {', '.join(unknown)}")
        return cls(**values)


class Cache:
    """Keys and values of the tokens seen so far, for `GPT.forward(idx, cache=...)`.

    Room for `batch_size` rows of `block_size` tokens is made on the first use; `length` tokens are filled.
    """

    def __init__(self, config: GPTConfig, batch_size: int):
        self.config, self.batch_size, self.length = config, batch_size, 0
        self._kv: list[Tensor | None] = [None] * config.n_layer  # per layer (2, B, block_size, H, D)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v (B, T, H, D) behind what is there; all of it, (B, length + T, H, D) each. `length` stays."""
        B, T, H, D = k.shape
        kv = self._kv[layer]
        if kv is None:
            kv = self._kv[layer] = k.new_empty(2, B, self.config.block_size, H, D)
        end = self.length + T
        kv[0, :, self.length : end], kv[1, :, self.length : end] = k, v
        return kv[0, :, :end], kv[1, :, :end]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.n_head, self.head_dim = config.n_head, C // config.n_head
        self.qkv = nn.Linear(C, 3 * C, bias=config.bias)
        self.proj = nn.Linear(C, C, bias=config.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: Cache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = apply_linear(self.qkv, x).view(B, T, 3, self.n_head, self.head_dim)
        qk, v = qkv.split((2, 1), dim=2)  # (B, T, 2, H, D), (B, T, 1, H, D)
        # Of unit root-mean-square, so that no logit exceeds sqrt(D) and a large learning rate stays stable.
        qk = rope(rms_norm(qk, self.head_dim).view(B, T, 2 * self.n_head, self.head_dim), cos, sin).to(v.dtype)
        (q, k), v = qk.chunk(2, dim=2), v.squeeze(2)  # (B, T, H, D) each
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, S, H, D), S = tokens in the cache + T
        # Bottom-right causal: the T queries are the last T of the S keys.
        y = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)  # (B, H, T, D)
        return apply_linear(self.proj, y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.act = config.act
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.down, apply_linear(self.up, x, self.act))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm_attn = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.norm_mlp = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: Cache | None = None) -> Tensor:
        branch = self.drop(self.attn(self.norm_attn(x), cos, sin, layer, cache))  # (B, T, C)
        y, x = self.norm_mlp(branch, residual=x)
        return x + self.drop(self.mlp(y))  # (B, T, C)


class GPT(nn.Module):
    """The model: `forward` for training and evaluation, `generate` for sampling."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight  # tied: (V, C) both ways
        self._make_rope_tables()
        self.init_weights()

    def _make_rope_tables(self) -> None:
        """Angles of every position, computed once; not weights, so not in the state_dict."""
        config, device = self.config, self.embed.weight.device
        cos, sin = rope_tables(config.block_size, config.n_embd // config.n_head, config.rope_base, device=device)
        self.register_buffer("rope_cos", cos, persistent=False)  # (block_size, D/2)
        self.register_buffer("rope_sin", sin, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> GPT:
        """What .to() and its like do. The tables stay float32: in bfloat16 far positions would share an angle."""
        super()._apply(fn, recurse)
        self._make_rope_tables()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights from torch's generator.

        Linear layers keep the scale of their input; the last layer of each branch starts at zero, so that every block
        starts as the identity (Zhang et al., 2019, arXiv:1901.09321); the embedding is small, as the head needs it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.head:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.down.weight)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits, or the loss.

        idx: (B, T) int64 tokens, T at most block_size less what the cache holds. targets: (B, T) int64, -1 where
        nothing is to be predicted. Without targets: (logits (B, T, V) float32, None). With targets: (None, mean
        cross-entropy in nats, 0-d float32). With a cache, idx continues what the cache holds and is added to it.

        Raises ValueError for sizes that do not fit, and for targets of no token.
        """
        if idx.dim() != 2:
            raise ValueError(f"GPT: idx must be (B, T), got {tuple(idx.shape)}")
        B, T = idx.shape
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            had = f" after the {start} in the cache" if cache is not None else ""
            raise ValueError(f"GPT: idx may hold at most {self.config.block_size - start} tokens a row{had}, got {T}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"GPT: targets must be {tuple(idx.shape)} as idx is, got {tuple(targets.shape)}")
        if targets is not None and idx.numel() == 0:
            raise ValueError(f"GPT: with targets idx must hold at least one token, got {tuple(idx.shape)}")
        if cache is not None and cache.batch_size != B:
            raise ValueError(f"GPT: idx must have the cache's {cache.batch_size} rows, got {B}")

        cos, sin = self.rope_cos[start : start + T], self.rope_sin[start : start + T]  # (T, D/2)
        x = self.drop(apply_embedding(self.embed, idx))  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, layer, cache)  # (B, T, C)
        if cache is not None:
            cache.length += T
        x = self.norm(x)
        if targets is not None and B * T * self.config.vocab_size >= _MANY_LOGITS and is_plain(self.head):
            return None, linear_cross_entropy(x, self.head.weight, targets, ignore_index=-1).float()
        logits = apply_linear(self.head, x).float()  # (B, T, V)
        if targets is None:
            return logits, None
        return None, cross_entropy(logits.view(B * T, -1), targets.reshape(B * T), ignore_index=-1)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Yields `max_new_tokens` times the next token of every row, (B,) int64.

        idx: (B, T >= 1) int64, what to continue; of a longer one the last block_size tokens count. temperature divides
        the logits; 0 takes the likeliest token. top_k keeps only that many likeliest tokens. generator makes the draw
        repeatable. When the window is full its older half is dropped, with the cache and without it, so both see the
        same context; the cache then costs one forward over the half window for every half window of new tokens.
        """
        if idx.dim() != 2 or idx.shape[1] < 1:
            raise ValueError(f"GPT.generate: idx must be (B, T) with T >= 1, got {tuple(idx.shape)}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"GPT.generate: temperature must be at least 0 and finite, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"GPT.generate: top_k must be at least 1, got {top_k}")
        block_size, training = self.config.block_size, self.training
        self.eval()
        try:
            window = idx[:, -block_size:]  # (B, at most block_size), all that the next token depends on
            unseen, cache = window, Cache(self.config, len(idx))
            for _ in range(max_new_tokens):
                logits = self(unseen, cache=cache)[0] if use_cache else self(window)[0]
                token = sample(logits[:, -1], temperature, top_k, generator)  # (B,)
                yield token
                unseen, window = token[:, None], torch.cat((window, token[:, None]), dim=1)
                if window.shape[1] > block_size:
                    window = window[:, -max(1, block_size // 2) :]
                    unseen, cache = window, Cache(self.config, len(idx))
        finally:
            self.train(training)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())  # parameters() names the tied weight once

    def flops_per_token(self, block_size: int | None = None) -> int:
        """Floating-point operations of one forward pass per token, in rows of block_size (the configuration's if None).

        Two for each weight of a linear layer, the head among them, and 4 C for each query-key pair under the causal
        mask, (T + 1) / 2 pairs a token in the mean. Training costs three times this: the backward pass has two products
        for each one of the forward pass.
        """
        T = block_size or self.config.block_size
        linear = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * linear + self.config.n_layer * 2 * self.config.n_embd * (T + 1)


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token (B,) int64 for each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1), the smallest one that stays
        logits = logits.masked_fill(logits < kth, -math.inf)
    # 0 for the likeliest token: a tiny temperature then makes the others -inf and nothing +inf. Beyond these limits, at
    # which the draw is the likeliest token or anything, the number or its reciprocal is 0 or infinite in float32.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / min(max(temperature, 1e-30), 1e30)
    return torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)[:, 0]
