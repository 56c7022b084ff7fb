"""What a run is: one typed dataclass, and the presets that fill it."""

from __future__ import annotations

import dataclasses
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastlm.models import GPTConfig
from fastlm.train.allocator import keep_freed_memory


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the numbers of a run. A run directory keeps it, resolved, as config.json."""

    preset: str = "tiny"
    """Preset that the other values start from: tiny, small or gpt2."""
    out: str | None = None
    """Directory of the run: its configuration, tokens, checkpoints, metrics.jsonl, loss.png and sample.txt. If not
    given, the first free one of runs/PRESET-1, runs/PRESET-2, ..."""

    # Text
    data: str = "stdlib"
    """Text to learn: stdlib (the running Python's own library), a text file, or a directory of them."""
    tokenizer: Literal["bpe", "byte"] = "bpe"
    """Byte pairs learnt from the training text, or plain bytes."""
    vocab_size: int = 2048
    """Most tokens of a bpe tokenizer; bytes have 257."""

    # Model
    n_layer: int = 4
    """Blocks of attention and MLP."""
    n_head: int = 3
    """Attention heads in each block."""
    n_embd: int = 192
    """Width of the model, a multiple of twice the heads."""
    block_size: int = 256
    """Tokens in a row, and the longest context of the model."""
    act: Literal["relu_squared", "relu", "gelu"] = "relu_squared"
    """Activation of the MLP."""
    bias: bool = False
    """Biases in linear layers and norms."""
    dropout: float = 0.0
    """Share of the embedded input and of each residual branch that is zeroed in training."""

    # Length of the run
    steps: int = 2000
    """Optimizer steps; where --minutes is given, that decides them."""
    minutes: float | None = None
    """Wall-clock time for all of it. The number of steps is then set at the start, from timed steps, and recorded."""
    fit_width: bool = False
    """With --minutes: take fewer heads, each of the same size, where the machine is too slow for so wide a model."""
    batch_size: int = 8
    """Rows in one forward pass."""
    accumulation: int = 1
    """Forward and backward passes in one step."""
    seed: int = 0
    """Decides the first weights, the batches, dropout and the sample."""

    # Optimizer: AdamW, linear warm-up, cosine decay
    learning_rate: float = 3e-3
    """Highest learning rate."""
    final_learning_rate: float = 0.02
    """Last learning rate, as a share of the highest one."""
    warmup: float = 0.04
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    """Of matrices; norms and biases have none."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""

    # Machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA GPU if torch sees one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Products in bf16 with fp32 weights and sums (autocast), or all in fp32. auto: bf16 where it is in hardware."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the step as a CUDA graph. auto: if it is faster, by the first six steps. Nothing on a CPU."""
    threads: int = 0
    """Threads for the CPU; 0 leaves torch's choice."""
    keep_memory: bool = True
    """Ask the C library to keep freed memory instead of returning it to the system after every step (glibc only)."""

    # Evaluation
    evaluations: int = 20
    """Evaluations and checkpoints during the run, evenly spread."""
    evaluation_tokens: int = 16384
    """Held-out tokens in each of them; the last one takes all."""
    sample_tokens: int = 256
    """Length of the sample text at the end; 0 for none."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option(field.name)} must be a finite number, got {value}")
        for name in ("vocab_size", "steps", "batch_size", "accumulation", "evaluations", "evaluation_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{option(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("threads", "sample_tokens", "max_grad_norm", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{option(name)} must be at least 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "warmup", "final_learning_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{option(name)} must be in [0, 1), got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"{option('learning_rate')} must be above 0, got {self.learning_rate}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"{option('minutes')} must be above 0, got {self.minutes}")
        if self.fit_width and self.minutes is None:
            raise ValueError("--fit-width goes with --minutes: it fits the model's width to the time")
        if self.tokenizer == "bpe" and not 257 <= self.vocab_size <= 2**24:  # the bytes and the end of a document
            raise ValueError(f"{option('vocab_size')} must be in 257 .. 2**24 for bpe, got {self.vocab_size}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"{option('seed')} must be in [0, 2**63), got {self.seed}")
        self.model_config(self.vocab_size)  # raises for a shape that cannot be

    def model_config(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(
            vocab_size=vocab_size,
            block_size=self.block_size,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            act=self.act,
            bias=self.bias,
            dropout=self.dropout,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.block_size

    @property
    def evaluation_interval(self) -> int:
        """Steps from one evaluation and checkpoint to the next."""
        return max(1, round(self.steps / self.evaluations))

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown options {', '.join(unknown)}")
        return cls(**values)


PRESETS = {
    # About 2 M parameters: minutes on two CPU cores.
    "tiny": TrainConfig(preset="tiny"),
    # About 11 M: an hour or two on a desktop CPU, minutes on a GPU.
    "small": TrainConfig(
        preset="small",
        vocab_size=4096,
        n_layer=6,
        n_head=6,
        n_embd=384,
        batch_size=16,
        steps=5000,
        learning_rate=1.5e-3,
        evaluation_tokens=65536,
    ),
    # The shape of GPT-2's smallest model, 124 M with its vocabulary: a GPU.
    "gpt2": TrainConfig(
        preset="gpt2",
        vocab_size=50304,
        n_layer=12,
        n_head=12,
        n_embd=768,
        block_size=1024,
        batch_size=8,
        accumulation=60,
        steps=20000,
        learning_rate=6e-4,
        final_learning_rate=0.1,
        evaluations=100,
        evaluation_tokens=524288,
    ),
}


def option(field: str) -> str:
    """A field's name on the command line."""
    return "--" + field.replace("_", "-")


def prepare_machine(config: TrainConfig) -> TrainConfig:
    """The configuration with what was left open decided, its threads and allocator applied to this process."""
    config = decide(config)
    torch.set_num_threads(config.threads)
    if config.keep_memory:
        keep_freed_memory()
    return config


def decide(config: TrainConfig) -> TrainConfig:
    """The configuration with what was left open decided; changes nothing in this process.

    The number of threads is decided too: sums depend on it, so a run must be resumed with the number it began with.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA GPU on this machine")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return config.replace(device=device, precision=precision, threads=config.threads or torch.get_num_threads())


def has_fast_bf16(device: str) -> bool:
    """Whether the hardware multiplies bf16 directly; where it does not, bf16 is emulated and slower than fp32."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    wanted = "bf16" if platform.machine() in ("aarch64", "arm64") else ("avx512_bf16", "amx_bf16")
    return any(flag in flags for flag in ((wanted,) if isinstance(wanted, str) else wanted))
