"""A whole training step of a GPT: forward, backward, clipping at 1.0, AdamW.

The baseline is the same model on torch's own ops with the fused AdamW. On a GPU fastlm's step is a CUDA graph, as in
its trainer, and "fastlm eager" the same without; what it is to reach there is for GPT-2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import fastlm
from fastlm.benchmarks.cases._common import DTYPES, compiled, no_compiler
from fastlm.benchmarks.harness import Built, Case, Variant
from fastlm.benchmarks.stock import StockGPT
from fastlm.models import GPT, GPTConfig

HYPER = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def config(n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int) -> GPTConfig:
    return GPTConfig(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size, act="relu"
    )


# (model, rows in a batch)
SIZES = {
    "cpu": [(config(6, 6, 384, 256, 65), 16), (config(6, 8, 512, 512, 8192), 8)],
    "cuda": [(config(6, 8, 512, 512, 8192), 32), *((config(12, 12, 768, 1024, 50304), rows) for rows in (16, 32))],
}
QUICK = [(config(2, 2, 128, 128, 256), 4)]


def build(shape: GPTConfig, B: int, dtype: torch.dtype, device: str, quick: bool) -> Built:
    torch.manual_seed(0)
    models = {"torch": StockGPT(shape), "fastlm": GPT(shape)}
    missing = {}
    if (reason := no_compiler(quick)) is None:
        models["torch.compile"] = StockGPT(shape)
    else:
        missing["torch.compile"] = reason
    weights = models["fastlm"].state_dict()
    for value in weights.values():  # GPT's zero weights would hide what the attention computes
        if value.dim() == 2 and not value.any():
            nn.init.normal_(value, std=0.02)
    tokens = torch.randint(shape.vocab_size, (B, shape.block_size + 1), device=device)
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    # The gate compares the models with a smooth activation: of some million ReLUs one whose input rounds to the other
    # side of 0 changes the gradients of all layers below it.
    smooth = replace(shape, act="relu_squared")
    gated = {"torch": StockGPT(smooth), "fastlm": GPT(smooth)}
    if device == "cuda":
        models["fastlm eager"] = GPT(shape)
    variants = {}
    for name, model in models.items():
        model.load_state_dict(weights)
        model.to(device)
        ours = name.startswith("fastlm")
        optimizer = (
            fastlm.optim.AdamW(model.parameters(), max_norm=1.0, capturable=device == "cuda", **HYPER)
            if ours
            else torch.optim.AdamW(model.parameters(), fused=True, **HYPER)
        )
        if name not in gated:  # torch's own compiler is not on trial, and what is not captured is fastlm once more
            run = step(compiled(model) if name == "torch.compile" else model, optimizer, idx, targets, autocast)
            variants[name] = Variant(run)
        else:
            gated[name].load_state_dict(weights)
            outputs = partial(gate_outputs, model, gated[name].to(device), idx[:1], targets[:1], autocast)
            run = step(model, optimizer, idx, targets, autocast)
            variants[name] = Variant(captured(run) if device == "cuda" and name == "fastlm" else run, outputs)
    exact = partial(gate_outputs_in_float64, shape, smooth, weights, idx[:1], targets[:1])
    return Built(variants, exact, missing)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, idx: Tensor, targets: Tensor, autocast):
    parameters = list(model.parameters())
    clips = isinstance(optimizer, fastlm.optim.AdamW)

    def run() -> None:
        with autocast():
            loss = model(idx, targets)[1]
        loss.backward()
        if not clips:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """The run as a CUDA graph, which is made at the fourth call."""
    calls, graph = 0, None

    def replay() -> None:
        nonlocal calls, graph
        calls += 1
        if calls <= 3:  # what is made or chosen at first use
            run()
            return
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        graph.replay()

    return replay


def loss_and_gradients(model: nn.Module, idx: Tensor, targets: Tensor, autocast) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    with autocast():
        loss = model(idx, targets)[1]
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach()} | {f"gradient of {n}": g for n, g in zip(named, grads, strict=True)}


def gate_outputs(timed: nn.Module, smooth: nn.Module, idx: Tensor, targets: Tensor, autocast) -> dict[str, Tensor]:
    """Loss and gradients of the smooth model, and the loss of the one that is timed."""
    with autocast(), torch.no_grad():
        loss = timed(idx, targets)[1]
    return loss_and_gradients(smooth, idx, targets, autocast) | {"loss of the timed model": loss}


def gate_outputs_in_float64(
    shape: GPTConfig, smooth: GPTConfig, weights: dict[str, Tensor], idx: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    models = [StockGPT(config).to(idx.device).double() for config in (shape, smooth)]
    for model in models:
        model.load_state_dict(weights)
    return gate_outputs(*models, idx, targets, partial(torch.autocast, idx.device.type, enabled=False))


def flops(shape: GPTConfig) -> float:
    """Of one token forward and backward: two a weight in a product, and the causal half of the attention, times 3."""
    C, T = shape.n_embd, shape.block_size
    weights = shape.n_layer * 12 * C * C + shape.vocab_size * C
    return 3 * (2 * weights + shape.n_layer * 2 * C * (T + 1))


def cases(device: str, quick: bool) -> list[Case]:
    made = []
    for shape, B in QUICK if quick else SIZES[device]:
        tokens = B * shape.block_size
        gpt2 = device == "cuda" and shape.vocab_size == 50304
        for name, dtype in DTYPES.items():
            size = f"{shape.n_layer} layers of {shape.n_embd}, vocabulary {shape.vocab_size}"
            label = f"{size}, ({B}, {shape.block_size}) tokens, {name}"
            made.append(
                Case(
                    "train",
                    label,
                    partial(build, shape, B, dtype, device, quick),
                    dtype=str(dtype).removeprefix("torch."),
                    flops=flops(shape) * tokens,
                    items=tokens,
                    device=device,
                    target="1.15x torch.compile, 50 % of the limit" if gpt2 and name == "bf16" else "",
                )
            )
    return made
