"""Training a GPT on text: `train` starts a run, `resume` continues one.

Everything random in a run is a pure function of its seed and the step: the initial weights of the seed, each batch of
seed and step, dropout of seed and step. So a run that was interrupted and resumed from a checkpoint gives the same
weights, bit for bit, as one that was not (on the same machine, with the same number of threads).
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from fastlm.data import Dataset
from fastlm.data.files import write_atomically
from fastlm.train import checkpoint as checkpoints
from fastlm.train.config import TrainConfig, prepare_machine
from fastlm.train.evaluation import Evaluation, evaluate
from fastlm.train.metrics import Metrics
from fastlm.train.plan import plan_steps
from fastlm.train.plot import plot_losses
from fastlm.train.progress import Progress
from fastlm.train.rundir import NGRAM_TEXT_LIMIT, claim, clear, ngram_baseline, open_run, prepare_data, write_run
from fastlm.train.sampling import known_word_share, stream_text
from fastlm.train.step import build_model, build_optimizer, learning_rate, training_step


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    out: Path
    step: int  # steps done
    stopped_by: str | None  # name of the signal that ended it early
    evaluation: Evaluation | None  # of the best checkpoint, on the whole held-out text; None if stopped early
    ngram_bits_per_byte: float | None  # of the 5-gram on the same text; None if it was not computed
    sample: str | None
    sample_words_known: float | None  # share of the sample's words that the training text holds; None if not counted


def train(
    config: TrainConfig, progress: Progress | None = None, *, peak: float | None = None, overwrite: bool = False
) -> Result:
    """Starts a run in `config.out`.

    peak: floating-point operations per second that the machine can do in the configuration's precision, to report what
    share of it training takes. overwrite: replace the run that is there. Raises ValueError or OSError for text or a
    directory that cannot be used and TrainingError when the loss stops being a number.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    config = prepare_machine(claim(config, overwrite))
    out = Path(config.out)
    dataset = prepare_data(config, progress)
    ngram = ngram_baseline(dataset, progress)
    if config.minutes is not None:
        config = plan_steps(config, dataset, spent=time.perf_counter() - started)
        progress.say(f"{config.minutes:g} minutes: {config.steps:,} steps of {config.tokens_per_step:,} tokens")
    clear(out)
    write_run(out, config, dataset)
    return _run(out, config, dataset, ngram, progress, peak, None)


def resume(out: str | os.PathLike[str], progress: Progress | None = None, *, peak: float | None = None) -> Result:
    """Continues the run in `out` from its newest checkpoint that is whole, to the end that was planned for it."""
    progress = progress or Progress()
    out = Path(out)
    config, dataset = open_run(out)
    config = prepare_machine(config)
    checkpoint = checkpoints.load_newest(out / "checkpoints", progress.warn)
    return _run(out, config, dataset, ngram_baseline(dataset, progress), progress, peak, checkpoint)


def _run(
    out: Path,
    config: TrainConfig,
    dataset: Dataset,
    ngram: float | None,
    progress: Progress,
    peak: float | None,
    checkpoint: checkpoints.Checkpoint | None,
) -> Result:
    # Model and optimizer, as the seed or the checkpoint has them.
    model = build_model(config, dataset)
    optimizer = build_optimizer(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    step, val_loss, best_val_loss = 0, None, None
    if checkpoint is not None:
        step, val_loss, best_val_loss = checkpoint.step, checkpoint.val_loss, checkpoint.best_val_loss
        checkpoints.restore_model(model, checkpoint)
        checkpoints.restore_optimizer(optimizer, names, checkpoint.optimizer)
    saved = step if checkpoint is not None else None
    bits = len(dataset.train) / dataset.train_bytes / math.log(2)  # nats per token -> bits per byte, training text
    flops = 3 * model.flops_per_token() * config.tokens_per_step  # of one step
    metrics = Metrics(out / "metrics.jsonl", keep_steps=step)

    def save() -> None:
        nonlocal saved
        if saved != step:
            checkpoints.save(
                out / "checkpoints",
                step=step,
                val_loss=val_loss,
                best_val_loss=best_val_loss,
                model_config=model.config.to_dict(),
                model={name: parameter for parameter, name in names.items()},
                optimizer=checkpoints.optimizer_tensors(optimizer, names),
            )
            saved = step

    # Steps.
    interval = config.evaluation_interval
    with metrics, StopRequest() as stop, progress.steps(config.steps, step, flops, peak):
        while step < config.steps and stop.name is None:
            began = time.perf_counter()
            lr = learning_rate(config, step)
            loss, grad_norm = training_step(model, optimizer, config, dataset, step, lr)
            step, val_loss = step + 1, None
            seconds = time.perf_counter() - began

            metrics.write(
                step=step,
                loss=loss,
                bits_per_byte=loss * bits,
                learning_rate=lr,
                grad_norm=grad_norm,
                tokens_per_second=round(config.tokens_per_step / seconds, 1),
            )
            progress.step(step, loss, loss * bits, lr, grad_norm, config.tokens_per_step, seconds)

            if step % interval == 0 or step == config.steps:
                evaluation = evaluate(model, config, dataset.val, dataset.val_bytes, config.evaluation_tokens)
                val_loss = evaluation.nats_per_token
                best_val_loss = val_loss if best_val_loss is None else min(best_val_loss, val_loss)
                metrics.write(step=step, val_loss=val_loss, val_bits_per_byte=evaluation.bits_per_byte)
                progress.evaluated(step, evaluation)
                save()
        if stop.name is not None and step < config.steps:
            save()
            progress.say(f"stopped by {stop.name} after step {step:,}; continue with: fastlm resume {out}")
            return Result(out, step, stop.name, None, ngram, None, None)

    # The best weights, measured on all of the held-out text.
    best = checkpoints.load_best(out / "checkpoints", progress.warn)
    checkpoints.restore_model(model, best)
    progress.say(f"evaluating step {best.step:,} on all {dataset.val_bytes:,} bytes of held-out text")
    evaluation = evaluate(model, config, dataset.val, dataset.val_bytes)
    text = words_known = None
    if config.sample_tokens:
        pieces = stream_text(
            model, config, dataset.tokenizer, "", config.sample_tokens, seed=config.seed, one_document=False
        )
        text = "".join(pieces)
        write_atomically(out / "sample.txt", text.encode())
        if dataset.train_bytes <= NGRAM_TEXT_LIMIT:
            words_known = known_word_share(text, dataset.documents("train"))
    summary = {
        "step": best.step,
        "val_loss": evaluation.nats_per_token,
        "val_bits_per_byte": evaluation.bits_per_byte,
        "val_tokens": evaluation.tokens,
        "val_bytes": dataset.val_bytes,
        "ngram5_bits_per_byte": ngram,
        "sample_words_known": words_known,
    }
    write_atomically(out / "result.json", (json.dumps(summary, indent=2) + "\n").encode())
    plot_losses(out, evaluation.bits_per_byte, ngram)
    return Result(out, step, None, evaluation, ngram, text, words_known)


class StopRequest:
    """Catches SIGINT and SIGTERM for the length of a `with`: `name` says which came, the loop ends after its step.

    A second one of the same kind acts as it always does. Outside the main thread, where Python allows no handlers, it
    does nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._previous[number])
