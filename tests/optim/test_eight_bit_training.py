"""Training with states of 8 bits ends where training in float32 does, as near as another seed's."""

import os
from pathlib import Path

import pytest
import torch

from fastlm.optim import AdamW
from fastlm.train import PRESETS, train, trainer
from fastlm.train.metrics import read

SEEDS = range(3)


def final_loss(config, state_dtype, monkeypatch):
    """Held-out, nats per token."""
    plain = trainer.build_optimizer

    def build_optimizer(model, config):
        optimizer = plain(model, config)
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
        betas = (config.beta1, config.beta2)
        return AdamW(groups, config.learning_rate, betas, max_norm=optimizer.max_norm, state_dtype=state_dtype)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "build_optimizer", build_optimizer)
        train(config)
    return [row["val_loss"] for row in read(Path(config.out) / "metrics.jsonl") if "val_loss" in row][-1]


def test_a_small_model_learns_as_in_float32(tmp_path, monkeypatch):
    """Of the preset tiny half the layers and width, on bytes of Shakespeare; states of 8 bits make up all but norms."""
    text = Path(os.environ.get("FASTLM_DATA_DIR") or ".") / "tinyshakespeare.txt"
    if not text.exists():
        pytest.skip("FASTLM_DATA_DIR names no folder with tinyshakespeare.txt")
    part = tmp_path / "text.txt"
    part.write_bytes(text.read_bytes()[:300_000])
    config = PRESETS["tiny"].replace(
        data=str(part), tokenizer="byte", n_layer=2, n_embd=96, block_size=64, batch_size=4, steps=40, evaluations=1,
        evaluation_tokens=4096, sample_tokens=0, precision="fp32", device="cpu", threads=1,
    )  # fmt: skip
    losses = {}
    for name, state_dtype in (("float32", None), ("8 bits", torch.uint8)):
        losses[name] = [
            final_loss(config.replace(seed=seed, out=str(tmp_path / f"{name} {seed}")), state_dtype, monkeypatch)
            for seed in SEEDS
        ]
    wide, narrow = (torch.tensor(losses[name]) for name in ("float32", "8 bits"))
    assert (narrow.mean() - wide.mean()).abs() <= wide.max() - wide.min(), losses
    assert ((narrow - wide).abs() < 0.1).all(), losses
    assert (wide < 4.5).all()  # from ln 257 = 5.5
