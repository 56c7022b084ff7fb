"""One optimizer step, and what it works on: model, optimizer, learning rate, and on a GPU the graph that replays it."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastlm._library import backends
from fastlm.data import Dataset, get_batch
from fastlm.models import GPT
from fastlm.optim import AdamW
from fastlm.optim.schedule import schedule_factor
from fastlm.train.config import TrainConfig
from fastlm.train.evaluation import autocast


class TrainingError(RuntimeError):
    """The run cannot go on; what it has saved stays. The message is for the user."""


def training_step(
    model: GPT,
    optimizer: AdamW,
    config: TrainConfig,
    dataset: Dataset,
    step: int,
    lr: float,
    graph: StepGraph | None = None,
) -> tuple[float, float]:
    """One optimizer step, number `step` from 0. Loss in nats per token and the gradient's norm before clipping.

    graph: takes the step, and those before and after it. A GPU is waited for once, at the end. After a TrainingError
    the weights may be no numbers either.
    """
    seed_step(config.seed, step)  # for dropout
    batches = [
        get_batch(
            dataset.train,
            seed=config.seed,
            step=step,
            batch_size=config.batch_size,
            block_size=config.block_size,
            micro_step=micro_step,
            micro_steps=config.accumulation,
        )
        for micro_step in range(config.accumulation)
    ]
    tokens = torch.stack([torch.stack(batch) for batch in batches]).to(config.device)  # (micro-steps, x and y, B, T)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    def work(tokens: Tensor) -> Tensor:
        return _work(model, optimizer, config, tokens)

    loss, grad_norm = (work(tokens) if graph is None else graph(work, tokens)).tolist()
    if not math.isfinite(loss):
        raise TrainingError(f"the loss became {loss} in step {step + 1:,}")
    if not math.isfinite(grad_norm):
        raise TrainingError(f"the gradient's norm became {grad_norm} in step {step + 1:,}")
    return loss, grad_norm


def _work(model: GPT, optimizer: AdamW, config: TrainConfig, tokens: Tensor) -> Tensor:
    """What a step does on the device, without waiting for it: loss and norm, (2,) float64."""
    losses = []
    optimizer.zero_grad(set_to_none=True)  # a capture that failed leaves some, which were never computed
    for x, y in tokens:
        with autocast(config):
            loss = model(x, y)[1] / config.accumulation
        loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([torch.stack(losses).double().sum(), optimizer.grad_norm.double()])


class StepGraph:
    """Takes training steps, from the fourth on as a CUDA graph: the CPU then starts them all with one call.

    The first three run as they are: what is chosen or made at first use has to be there before a capture, and two of
    them are timed. Three replays are timed too, and the graph is kept if they were faster; all are steps of the run.
    `chosen` is None until that is decided, and `reason` says why in words.

    Args:
        always: keep the graph whatever it measures, and let a step that cannot be captured fail.
        capture: makes the graph of a function without arguments: what replays it, and the tensor that it fills.
    """

    _WARMUPS, _TIMED = 3, 3

    def __init__(
        self, always: bool, capture: Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]] | None = None
    ):
        self.chosen: bool | None = None
        self.reason = ""
        self._always, self._capture = always, capture or _capture
        self._eager: list[float] = []
        self._replays: list[float] = []
        self._replay: Callable[[], None] | None = None
        self._tokens = self._outcome = torch.empty(0)

    def __call__(self, work: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """work(tokens), or a replay of it; `work` must do the same at every call."""
        if self.chosen is False or len(self._eager) < self._WARMUPS:
            return self._timed(self._eager, lambda: work(tokens))
        if self._replay is None:
            self._tokens = tokens.clone()
            try:
                self._replay, self._outcome = self._capture(lambda: work(self._tokens))
            except RuntimeError as error:
                if self._always:
                    raise
                self.chosen, self.reason = False, f"the step cannot be captured in a CUDA graph: {error}"
                return work(tokens)
        self._tokens.copy_(tokens)
        outcome = self._timed(self._replays, self._replayed)
        if self.chosen is None and len(self._replays) == self._TIMED:
            self._choose()
        return outcome

    def _replayed(self) -> Tensor:
        self._replay()
        return self._outcome

    def _timed(self, seconds: list[float], run: Callable[[], Tensor]) -> Tensor:
        began = time.perf_counter()
        outcome = run().cpu()  # waits
        if self.chosen is None:
            seconds.append(time.perf_counter() - began)
        return outcome

    def _choose(self) -> None:
        eager, replayed = statistics.median(self._eager[1:]), statistics.median(self._replays)
        self.chosen = self._always or replayed < eager
        self.reason = f"a step took {replayed * 1e3:.1f} ms as a CUDA graph and {eager * 1e3:.1f} ms without"
        if not self.chosen:
            self._replay, self._outcome = None, torch.empty(0)  # with the graph goes its memory


def _capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            outcome = work()
    except RuntimeError:
        # Where CUDA itself ended the capture, torch leaves its stream current and its generator in the capture.
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay, outcome


def build_graph(config: TrainConfig) -> StepGraph | None:
    """None where a step is not to be captured. By itself only one whose optimizer is CUDA's: Triton's cannot be, and
    the reference, which then were, would not give its bits.
    """
    if config.device != "cuda" or config.cuda_graph == "off":
        return None
    always = config.cuda_graph == "on"
    native = any(s.usable for s in backends("adam_") if s.backend == "native")
    return StepGraph(always) if always or native else None


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step `step` from 0: linear warm-up to the highest, then half a cosine to the final one."""
    warmup = round(config.warmup * config.steps)
    return config.learning_rate * schedule_factor(step, config.steps, warmup=warmup, final=config.final_learning_rate)


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
    lr, captured = config.learning_rate, config.device == "cuda"
    if captured:  # where a CUDA graph reads it anew
        lr = torch.tensor(lr, device=config.device)
    return AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), max_norm=limit, capturable=captured)


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 64, so that every product has full tiles; the tokens added never occur."""
    return -(-vocab_size // 64) * 64


def seed_step(seed: int, step: int) -> None:
    """Sets torch's generator to a state that depends on seed and step alone."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
