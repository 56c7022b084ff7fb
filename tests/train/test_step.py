"""What a step computes, and what is reported of it, beside the same by hand."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from fastlm.data import get_batch
from fastlm.models import GPT
from fastlm.train import load_model, open_run, resume, train
from fastlm.train.metrics import read
from fastlm.train.step import learning_rate


def test_three_steps_are_those_of_stock_adamw_by_hand(small):
    config = small.replace(
        steps=3, evaluations=1, accumulation=2, bias=True, sample_tokens=0,
        learning_rate=0.02, warmup=0.4, weight_decay=0.5, beta1=0.6, beta2=0.8, max_grad_norm=1e-3,
    )  # fmt: skip
    train(config)
    dataset = open_run(config.out)[1]
    rows = [row for row in read(Path(config.out, "metrics.jsonl")) if "loss" in row]

    torch.manual_seed(config.seed)
    model = GPT(config.model_config(320))  # 257 tokens and what fills the last tile
    decays = {True: [], False: []}
    for parameter in model.parameters():
        decays[parameter.dim() == 2].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decays[True], "weight_decay": 0.5}, {"params": decays[False], "weight_decay": 0.0}],
        betas=(0.6, 0.8),
    )
    for step, row in enumerate(rows):
        losses = []
        for half in range(2):
            sizes = {"batch_size": 4, "block_size": 16, "micro_step": half, "micro_steps": 2}
            losses.append(model(*get_batch(dataset.train, seed=config.seed, step=step, **sizes))[1])
        loss = sum(losses) / 2
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()

        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 0.1
        assert row["learning_rate"] == pytest.approx([0.01, 0.02, 0.0004][step])
        bits = row["loss"] * len(dataset.train) / dataset.train_bytes / math.log(2)
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    trained = dict(load_model(config.out, "last").model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_bits_per_byte_are_of_the_text_and_not_of_its_tokens(small):
    config = small.replace(tokenizer="bpe", vocab_size=300, steps=2, evaluations=2, sample_tokens=0)
    result = train(config)
    dataset = open_run(config.out)[1]
    assert len(dataset.train) < 0.7 * dataset.train_bytes
    per_byte = {
        "": len(dataset.train) / dataset.train_bytes / math.log(2),
        "val_": (len(dataset.val) - 1) / dataset.val_bytes / math.log(2),
    }
    for row in read(Path(config.out, "metrics.jsonl")):
        part = "val_" if "val_loss" in row else ""
        assert row[f"{part}bits_per_byte"] == pytest.approx(row[f"{part}loss"] * per_byte[part], rel=1e-12)
    final = result.evaluation
    assert final.bits_per_byte == pytest.approx(final.nats_per_token * per_byte["val_"], rel=1e-12)


def test_the_share_of_the_peak_counts_forward_and_backward(small, hook):
    progress, seen = hook(7, lambda: os.kill(os.getpid(), signal.SIGTERM)), []
    steps = progress.steps
    progress.steps = lambda *arguments: seen.append(arguments) or steps(*arguments)
    train(small, progress, peak=lambda config: 5e9)
    resume(small.out, progress, peak=lambda config: 6e9)
    weights = 12 * 16 * 16 + 320 * 16
    token = 2 * weights + 2 * 16 * 17  # a multiplication and an addition a weight; attention to 8.5 tokens in the mean
    assert seen == [(12, 0, 3 * token * 4 * 16, 5e9), (12, 7, 3 * token * 4 * 16, 6e9)]
