"""A run small enough to be repeated for every write that can fail."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from fastlm.train import Progress, TrainConfig


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """20 kB of sentences from a small grammar: learnable, and different at each place."""
    draw = random.Random(0)
    names, verbs = ["the cat", "a dog", "the old man", "Zoë"], ["sees", "hears", "likes", "follows"]
    lines = [f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}.\n" for _ in range(800)]
    path = tmp_path_factory.mktemp("corpus") / "sentences.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def small(corpus, tmp_path) -> TrainConfig:
    """Twelve steps of a model of some thousand weights, with evaluations and checkpoints after every third."""
    return TrainConfig(
        data=str(corpus),
        out=str(tmp_path / "run"),
        tokenizer="byte",
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=16,
        batch_size=4,
        steps=12,
        evaluations=4,
        evaluation_tokens=256,
        sample_tokens=8,
        device="cpu",
        precision="fp32",
        threads=1,
        keep_memory=False,
    )


class Hook(Progress):
    """Calls `action` after step `at`, once, and keeps what was said."""

    def __init__(self, at: int | None = None, action=lambda: None):
        self.at, self.action, self.lines, self.warnings, self.losses = at, action, [], [], {}

    def say(self, line: str) -> None:
        self.lines.append(line)

    def warn(self, line: str) -> None:
        self.warnings.append(line)

    def step(self, step, loss, bits, lr, grad_norm, tokens, seconds) -> None:
        self.losses[step] = loss
        if step == self.at:
            self.action()


@pytest.fixture
def hook():
    return Hook


@pytest.fixture
def final_state():
    """Hashes of a finished run's last weights and moments: equal only if every bit is."""

    def hashes(out) -> dict[str, str]:
        last = sorted(Path(out, "checkpoints").glob("step-*"))[-1]
        return {"step": last.name} | {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in last.glob("*.safetensors")
        }

    return hashes
