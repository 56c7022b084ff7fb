"""Held-out loss, in nats per token and in bits per byte of the original text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastlm.data import bits_per_byte, iterate_all
from fastlm.models import GPT
from fastlm.train.config import TrainConfig


@dataclass(frozen=True)
class Evaluation:
    nats_per_token: float
    bits_per_byte: float
    tokens: int  # predicted


def autocast(config: TrainConfig) -> torch.autocast:
    """What the configuration's precision means: bf16 products under autocast, or nothing changed."""
    return torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16")


@torch.no_grad()
def evaluate(
    model: GPT, config: TrainConfig, tokens: np.ndarray, text_bytes: int, limit: int | None = None
) -> Evaluation:
    """Loss over a token stream in a fixed order, in rows of block_size; `text_bytes` is the length of its text.

    limit: take only so many rows, evenly spread and always the same, that they have at most this many tokens; a single
    row where it has more. Bits per byte are then those of the whole stream, if the rest is like them.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for x, y in _rows(tokens, config, limit):
        with autocast(config):
            loss = model(x.to(config.device), y.to(config.device))[1]
        total += loss.item() * y.numel()  # nats, summed in fp64
        count += y.numel()
    model.train(training)
    return Evaluation(total / count, bits_per_byte(total / count * (len(tokens) - 1), text_bytes), count)


def _rows(tokens: np.ndarray, config: TrainConfig, limit: int | None):
    """Batches x, y (B, T) of the whole stream, or of some rows of it."""
    T, B = config.block_size, config.batch_size
    if limit is None or limit >= len(tokens) - 1:
        yield from iterate_all(tokens, T, B)
        return
    rows = (len(tokens) - 1) // T
    count = min(rows, max(1, limit // T))
    starts = np.arange(count) * rows // count * T
    for i in range(0, len(starts), B):
        picked = torch.from_numpy(tokens[starts[i : i + B, None] + np.arange(T + 1)].astype(np.int64))  # (B, T + 1)
        yield picked[:, :-1], picked[:, 1:]
