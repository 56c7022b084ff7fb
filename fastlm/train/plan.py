"""Before a run: how many steps fit into a time, and what a configuration costs."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastlm import _native
from fastlm.data import Dataset
from fastlm.models import GPT
from fastlm.train.allocator import on_glibc
from fastlm.train.config import TrainConfig
from fastlm.train.evaluation import autocast, evaluate
from fastlm.train.step import build_graph, build_model, build_optimizer, training_step

_TIMED_SECONDS = 5.0  # of steps
# Of training, at least, where the width is to be fitted: with fewer a narrower model learns more (bench/LOG.md), since
# the best number of tokens grows with that of parameters (Hoffmann et al., 2022, arXiv:2203.15556).
_TOKENS_PER_PARAMETER = 3.0
_DISK_BYTES_PER_SECOND = 200e6  # of a checkpoint with its checksum: a plain disk
_REPORT_SECONDS = 4.0  # loading matplotlib, the picture, the process's end
_SAMPLE_TOKENS_PER_SECOND = 60
_EVALUATIONS_SHARE = 0.15  # of the time that steps and evaluations have together, at most
_RESERVE = 0.08  # of the time for steps: a machine slows down as it warms up and shares its clock
# What glibc's heap holds at the peak for each byte in use: tensors of many sizes come and go, and leave gaps that the
# next ones do not fit. Measured on models of 2 M and 11 M parameters, 8 to 32 rows, with and without hardware for
# bf16: 1.35 to 1.50 in bf16, 1.30 to 1.52 in fp32. The same without keep_memory, for glibc by itself comes to take
# blocks of up to 32 MiB from the heap (mallopt(3)). With every tensor in pages of its own, as other C libraries keep
# large blocks, the two are 1.02 and 1.01.
_HEAP_PER_BYTE = {"bf16": 1.45, "fp32": 1.42}
# In bf16 without instructions for it, where parts of the operands are converted first: 1.43 to 1.74, from run to run.
_HEAP_BY_CONVERSION = 1.55
_PAGES_PER_BYTE = 1.02


def plan_steps(config: TrainConfig, dataset: Dataset, spent: float) -> TrainConfig:
    """The configuration with as many steps as fit into `config.minutes`, of which `spent` seconds are over.

    On a slow machine it has fewer evaluations too, since they may not eat the time of the steps, and with
    `config.fit_width` a narrower model. Times steps and evaluation on models that are thrown away. All this is decided
    here once, so the learning rate runs its full course and the run can be repeated and resumed. Raises ValueError if
    no step fits.
    """
    began = time.perf_counter()
    if config.fit_width:
        config = _fit_width(config, dataset, config.minutes * 60 - spent)
    model, step_seconds = _timed_step(config, dataset, _TIMED_SECONDS)
    start = time.perf_counter()
    evaluated = evaluate(model, config, dataset.val, dataset.val_bytes, 8 * config.batch_size * config.block_size)
    token_seconds = (time.perf_counter() - start) / evaluated.tokens

    subset = min(config.evaluation_tokens, len(dataset.val)) * token_seconds
    checkpoint = 12 * model.num_parameters() / _DISK_BYTES_PER_SECOND
    after = len(dataset.val) * token_seconds + config.sample_tokens / _SAMPLE_TOKENS_PER_SECOND + _REPORT_SECONDS
    left = config.minutes * 60 - spent - (time.perf_counter() - began)
    affordable = int(_EVALUATIONS_SHARE * (left - after) / (subset + checkpoint))
    evaluations = max(1, min(config.evaluations, affordable))
    steps = int((left - evaluations * (subset + checkpoint) - after) * (1 - _RESERVE) / step_seconds)
    if steps < 1:
        raise ValueError(
            f"--minutes {config.minutes:g} leaves no time for a step: preparing took"
            f" {config.minutes * 60 - left:.0f} s, evaluations would take"
            f" {evaluations * (subset + checkpoint) + after:.0f} s"
        )
    return config.replace(steps=steps, evaluations=evaluations)


def _fit_width(config: TrainConfig, dataset: Dataset, seconds: float) -> TrainConfig:
    """Fewer heads of the same size, until training sees enough tokens for each parameter or one head is left."""
    while True:
        model, step_seconds = _timed_step(config, dataset)
        tokens = seconds / step_seconds * config.tokens_per_step
        if config.n_head == 1 or tokens >= _TOKENS_PER_PARAMETER * model.num_parameters():
            return config
        config = config.replace(n_head=config.n_head - 1, n_embd=config.n_embd // config.n_head * (config.n_head - 1))


def _timed_step(config: TrainConfig, dataset: Dataset, seconds: float = 0.0) -> tuple[GPT, float]:
    """Seconds of a training step, from at least five steps in at least `seconds`, and the model that they used up."""
    model = build_model(config, dataset)
    optimizer, graph = build_optimizer(model, config), build_graph(config)
    timed: list[float] = []
    while len(timed) < 5 or (sum(timed) < seconds and len(timed) < 100):
        start = time.perf_counter()
        training_step(model, optimizer, config, dataset, len(timed), 0.0, graph)
        if graph is None or graph.chosen is not None:  # not while that is found out
            timed.append(time.perf_counter() - start)
    timed = sorted(timed[2:])  # the first ones also take memory
    return model, sum(timed) / len(timed)


@dataclass(frozen=True)
class Estimate:
    """What a configuration costs."""

    parameters: int
    flops_per_token: int  # forward and backward
    flops_per_step: int
    memory: int  # bytes at the peak of a step: weights, gradients, moments, activations


def estimate(config: TrainConfig, vocab_size: int) -> Estimate:
    """Counts one training step on tensors without content: nothing of the model's size is allocated.

    The configuration's device and precision must be decided (`prepare_machine`).
    """
    with FakeTensorMode(), _LiveBytes() as live:
        model = GPT(config.model_config(vocab_size))
        idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64)  # (B, T)
        moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        with autocast(config.replace(device="cpu")):
            loss = model(idx, idx)[1]
        loss.backward()
        del loss, moments
        parameters, flops_per_token = model.num_parameters(), 3 * model.flops_per_token()
    per_byte = _PAGES_PER_BYTE
    if on_glibc():
        isa = _native.cpu.active_isa() if _native.cpu is not None else None
        converts = config.precision == "bf16" and isa not in ("amx", "avx512bf16", None)
        per_byte = _HEAP_BY_CONVERSION if converts else _HEAP_PER_BYTE[config.precision]
    memory = live.peak if config.device == "cuda" else int(live.peak * per_byte)
    return Estimate(parameters, flops_per_token, flops_per_token * config.tokens_per_step, memory)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made under it that are alive; `peak` is the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size
