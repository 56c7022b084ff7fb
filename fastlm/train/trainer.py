"""Training a GPT on text: `train` starts a run, `resume` continues one.

Everything random in a run is a pure function of its seed and the step: the initial weights of the seed, each batch of
seed and step, dropout of seed and step. So a run that was interrupted and resumed from a checkpoint gives the same
weights, bit for bit, as one that was not (on the same machine, with the same number of threads).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
from fastlm.train.rundir import (
    NGRAM_TEXT_LIMIT,
    changed_environment,
    claimed,
    identity,
    locked,
    ngram_baseline,
    open_run,
    prepare_data,
    replacing,
    settle,
    write_run,
)
from fastlm.train.sampling import known_word_share, stream_text
from fastlm.train.step import (
    TrainingError,
    build_graph,
    build_model,
    build_optimizer,
    learning_rate,
    training_step,
)


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
    config: TrainConfig,
    progress: Progress | None = None,
    *,
    peak: Callable[[TrainConfig], float] | None = None,
    spent: float = 0.0,
    overwrite: bool = False,
) -> Result:
    """Starts a run in `config.out`.

    peak: measures the floating-point operations per second that the machine can do in the configuration's precision,
    to report what share of it training takes. spent: seconds of `config.minutes` that were over before this call.
    overwrite: replace the run that is there, which goes once the new one has a checkpoint. Raises ValueError or OSError
    for text or a directory that cannot be used and TrainingError when the loss stops being a number.
    """
    began = time.perf_counter() - spent
    _import_extras()
    progress = progress or Progress()
    with claimed(prepare_machine(config), overwrite) as config:
        out = Path(config.out)
        if (out / "config.json").exists():
            progress.say(f"replacing the run at step {checkpoints.last_step(out / 'checkpoints'):,} in {out}")
        dataset = prepare_data(config, progress)
        ngram = ngram_baseline(dataset, progress)
        limit = peak(config) if peak is not None else None
        if config.minutes is not None:
            width, config = config.n_embd, plan_steps(config, dataset, spent=time.perf_counter() - began)
            plan = f"{config.minutes:g} minutes: {config.steps:,} steps of {config.tokens_per_step:,} tokens"
            if config.n_embd != width:
                plan += f"; {config.n_embd} wide instead of {width}, which learns more in that time on this machine"
            progress.say(plan)
        with replacing(out), _advising(out):
            write_run(out, config, dataset)
            return _run(out, config, dataset, ngram, progress, limit, None)


def resume(
    out: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    peak: Callable[[TrainConfig], float] | None = None,
) -> Result:
    """Continues the run in `out` to the end that was planned for it.

    It goes on from its newest checkpoint that is whole; from the start, if it was stopped before the first one. Raises
    ValueError where there is no run, or another process trains there, and CheckpointError where none can be read.
    """
    _import_extras()
    progress = progress or Progress()
    out = Path(out)
    if not out.is_dir():
        raise ValueError(f"{out} holds no run: there is no such directory")
    with locked(out):
        settle(out)
        config, dataset = open_run(out)
        config = prepare_machine(config)
        if (changed := changed_environment(out)) is not None:
            progress.warn(changed)
        checkpoint = None
        if checkpoints.paths(out / "checkpoints"):
            checkpoint = checkpoints.load_newest(out / "checkpoints", identity(out), progress.warn)
        else:
            progress.say("stopped before its first checkpoint: starting again from step 0")
        limit = peak(config) if peak is not None else None
        with _advising(out):
            return _run(out, config, dataset, ngram_baseline(dataset, progress), progress, limit, checkpoint)


def _import_extras() -> None:
    """What a run first uses at its first checkpoint and at its end is missed before it begins."""
    import matplotlib  # noqa: F401
    import safetensors  # noqa: F401


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
    step, val_loss = 0, None
    if checkpoint is not None:
        step = checkpoint.step
        checkpoints.restore_model(model, checkpoint)
        checkpoints.restore_optimizer(optimizer, names, checkpoint.optimizer)
    saved = step if checkpoint is not None else None
    bits = len(dataset.train) / dataset.train_bytes / math.log(2)  # nats per token -> bits per byte, training text
    flops = 3 * model.flops_per_token() * config.tokens_per_step  # of one step
    run = identity(out)
    metrics = Metrics(out / "metrics.jsonl", keep_steps=step)

    def save() -> None:
        nonlocal saved
        if saved != step:
            checkpoints.save(
                out / "checkpoints",
                run=run,
                step=step,
                val_loss=val_loss,
                model_config=model.config.to_dict(),
                model={name: parameter for parameter, name in names.items()},
                optimizer=checkpoints.optimizer_tensors(optimizer, names),
            )
            saved = step
            settle(out)

    # Steps.
    interval, graph = config.evaluation_interval, build_graph(config)
    with metrics, StopRequest() as stop, progress.steps(config.steps, step, flops, peak):
        while step < config.steps and stop.name is None:
            began = time.perf_counter()
            lr = learning_rate(config, step)
            undecided = graph is not None and graph.chosen is None
            loss, grad_norm = training_step(model, optimizer, config, dataset, step, lr, graph)
            if undecided and graph.chosen is not None:
                progress.say(graph.reason)
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
                val_loss = _finite(evaluation, step).nats_per_token
                metrics.write(step=step, val_loss=val_loss, val_bits_per_byte=evaluation.bits_per_byte)
                progress.evaluated(step, evaluation)
                save()
        if stop.name is not None and step < config.steps:
            save()
            progress.say(f"stopped by {stop.name} after step {step:,}; continue with: fastlm resume {out}")
            return Result(out, step, stop.name, None, ngram, None, None)

    # The best weights, measured on all of the held-out text.
    best = checkpoints.load_best(out / "checkpoints", run, progress.warn)
    checkpoints.restore_model(model, best)
    progress.say(f"evaluating step {best.step:,} on all {dataset.val_bytes:,} bytes of held-out text")
    evaluation = _finite(evaluate(model, config, dataset.val, dataset.val_bytes), best.step)
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


def _finite(evaluation: Evaluation, step: int) -> Evaluation:
    if not math.isfinite(evaluation.nats_per_token):
        raise TrainingError(f"the held-out loss became {evaluation.nats_per_token} after step {step:,}")
    return evaluation


@contextlib.contextmanager
def _advising(out: Path) -> Iterator[None]:
    """Adds to a TrainingError what is left of the run and what to try."""
    try:
        yield
    except TrainingError as error:
        stays = "the last good checkpoint stays, " if checkpoints.paths(out / "checkpoints") else ""
        raise TrainingError(f"{error}; {stays}try a lower --learning-rate") from error


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
