"""One optimizer step, and what it works on: model, optimizer, learning rate."""

from __future__ import annotations

import hashlib
import math

import torch

from fastlm.data import Dataset, get_batch
from fastlm.models import GPT
from fastlm.optim import AdamW
from fastlm.train.config import TrainConfig
from fastlm.train.evaluation import autocast


class TrainingError(RuntimeError):
    """The run cannot go on; what it has saved stays. The message is for the user."""


def training_step(
    model: GPT, optimizer: AdamW, config: TrainConfig, dataset: Dataset, step: int, lr: float
) -> tuple[float, float]:
    """One optimizer step, number `step` from 0. Loss in nats per token and the gradient's norm before clipping."""
    seed_step(config.seed, step)  # for dropout
    loss = 0.0
    for micro_step in range(config.accumulation):
        x, y = get_batch(
            dataset.train,
            seed=config.seed,
            step=step,
            batch_size=config.batch_size,
            block_size=config.block_size,
            micro_step=micro_step,
            micro_steps=config.accumulation,
        )  # (B, T) each
        with autocast(config):
            micro_loss = model(x.to(config.device), y.to(config.device))[1] / config.accumulation
        micro_loss.backward()
        loss += micro_loss.item()
    if not math.isfinite(loss):
        raise TrainingError(f"the loss became {loss} in step {step + 1:,}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    grad_norm = optimizer.grad_norm.item()
    if not math.isfinite(grad_norm):  # nor are the weights, which nobody will see
        raise TrainingError(f"the gradient's norm became {grad_norm} in step {step + 1:,}")
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step `step` from 0: linear warm-up to the highest, then half a cosine to the final one."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, config.steps - 1 - warmup)  # 0 .. 1
    low = config.final_learning_rate
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def build_model(config: TrainConfig, dataset: Dataset) -> GPT:
    torch.manual_seed(config.seed)
    return GPT(config.model_config(padded_vocab_size(dataset.tokenizer.vocab_size))).to(config.device)


def build_optimizer(model: GPT, config: TrainConfig) -> AdamW:
    """AdamW that decays matrices alone: a norm's or a bias's scale is no complexity to be paid for."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    limit = config.max_grad_norm or math.inf
    return AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), max_norm=limit)


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 64, so that every product has full tiles; the tokens added never occur."""
    return -(-vocab_size // 64) * 64


def seed_step(seed: int, step: int) -> None:
    """Sets torch's generator to a state that depends on seed and step alone."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
