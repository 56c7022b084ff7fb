"""What a run says while it runs. The trainer calls these; nothing else of it writes to a terminal."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlm.train.evaluation import Evaluation


class Progress:
    """Says nothing: for use from a program. `ConsoleProgress` talks."""

    def say(self, line: str) -> None:
        pass

    def warn(self, line: str) -> None:
        pass

    @contextlib.contextmanager
    def steps(self, total: int, done: int, flops: int, peak: float | None) -> Iterator[None]:
        """Around the steps. flops: of one step. peak: the machine's measured FLOP/s, if known."""
        yield

    def step(
        self, step: int, loss: float, bits: float, lr: float, grad_norm: float, tokens: int, seconds: float
    ) -> None:
        """After each step. loss in nats per token, bits the same in bits per byte, tokens of the step and its time."""

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """After each evaluation."""


class ConsoleProgress(Progress):
    """A live line on a terminal, plain lines elsewhere (after each evaluation and at least every 30 s)."""

    _PLAIN_SECONDS = 30.0
    _SMOOTHING = 0.95  # of loss and speed: about the last 20 steps

    def __init__(self) -> None:
        from rich.console import Console

        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(highlight=False, soft_wrap=True, stderr=True)

    def say(self, line: str) -> None:
        self._out.print(line, markup=False)

    def warn(self, line: str) -> None:
        self._err.print(f"warning: {line}", markup=False, style="yellow")

    @contextlib.contextmanager
    def steps(self, total: int, done: int, flops: int, peak: float | None) -> Iterator[None]:
        from rich.progress import Progress, TextColumn

        self._total, self._first, self._flops, self._peak = total, done, flops, peak
        self._loss = self._bits = self._seconds = self._val = None
        self._began = self._printed = time.monotonic()
        if not self._out.is_terminal:
            self._bar = None
            yield
            return
        text = TextColumn("{task.description}", markup=False)
        with Progress(text, console=self._out, refresh_per_second=4) as self._bar:
            self._task = self._bar.add_task("", total=None)
            yield

    def step(
        self, step: int, loss: float, bits: float, lr: float, grad_norm: float, tokens: int, seconds: float
    ) -> None:
        self._bits = self._smooth(self._bits, bits)
        self._seconds = self._smooth(self._seconds, seconds)
        self._now = (step, lr, grad_norm, tokens)
        if self._bar is not None:
            self._bar.update(self._task, description=self._line(self._out.width))
        elif time.monotonic() - self._printed > self._PLAIN_SECONDS:
            self._print()

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self._val = evaluation.bits_per_byte
        if self._bar is None:
            self._print()
        else:
            self._bar.update(self._task, description=self._line(self._out.width))

    def _line(self, width: float = math.inf) -> str:
        """All there is to say, or without what is least missed where it is longer than `width` columns."""
        step, lr, grad_norm, tokens = self._now
        left = int((self._total - step) * (time.monotonic() - self._began) / (step - self._first))
        fields = {
            "step": f"{step:,}/{self._total:,}",
            "loss": f"loss {self._bits:.3f}",
            "val": "val " + ("-" if self._val is None else f"{self._val:.3f}"),
            "unit": "bits/byte",
            "lr": f"lr {lr:.1e}",
            "norm": f"|g| {grad_norm:.2f}",
            "speed": f"{tokens / self._seconds:,.0f} tokens/s",
            "peak": f"{100 * self._flops / self._seconds / self._peak:.0f} % of peak" if self._peak else "",
            "left": f"{left // 60}:{left % 60:02d} left",
        }
        for name in ("norm", "lr", "unit", "speed", "val", "peak", None):
            line = "  ".join(filter(None, fields.values()))
            if len(line) <= width:
                break
            fields.pop(name, None)
        return line

    def _print(self) -> None:
        self._printed = time.monotonic()
        self.say(self._line())
        sys.stdout.flush()

    def _smooth(self, old: float | None, new: float) -> float:
        return new if old is None else self._SMOOTHING * old + (1 - self._SMOOTHING) * new
