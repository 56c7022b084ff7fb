"""The model of fastlm/models/gpt.py on torch's own ops: what the training step is compared with.

The same weights under the same names, so a state_dict fits both and the two must agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models import GPTConfig

ACTIVATIONS = {"relu_squared": lambda x: F.relu(x).square(), "relu": F.relu, "gelu": F.gelu}


class StockAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        D = C // self.n_head
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, D).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        q, k = (rotated(F.rms_norm(t, (D,)), cos, sin).to(v.dtype) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) at rotary positions; cos, sin (T, D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class StockMLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.act]
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class StockBlock(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm_attn = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = StockAttention(config)
        self.norm_mlp = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = StockMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm_attn(x), cos, sin)
        return x + self.mlp(self.norm_mlp(x))


class StockGPT(nn.Module):
    """forward(idx, targets), both (B, T) int64, gives (None, mean cross-entropy) as fastlm.models.GPT does.

    Without dropout, which the benchmark does not use.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.dropout:
            raise ValueError(f"StockGPT: dropout must be 0, got {config.dropout}")
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(StockBlock(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        half = config.n_embd // config.n_head // 2
        frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(config.block_size, dtype=torch.float64), frequency)  # (block_size, D/2)
        self.register_buffer("rope_cos", angle.cos().float(), persistent=False)
        self.register_buffer("rope_sin", angle.sin().float(), persistent=False)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        T = idx.shape[1]
        x = self.embed(idx)
        for block in self.blocks:
            x = block(x, self.rope_cos[:T], self.rope_sin[:T])
        logits = self.head(self.norm(x))
        # float64 stays, for the gate
        logits = logits.float() if logits.dtype != torch.float64 else logits
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
