"""loss.png: training and held-out loss over the run."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from fastlm.data.files import write_atomically
from fastlm.train.metrics import read


def plot_losses(out: Path, final_bits: float | None, ngram_bits: float | None) -> Path:
    """Draws `out/metrics.jsonl` into `out/loss.png`, in bits per byte of text; the learning rate behind, faintly."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read(out / "metrics.jsonl")
    whole = [r for r in rows if "bits_per_byte" in r and "learning_rate" in r]
    steps = [(r["step"], r["bits_per_byte"], r["learning_rate"]) for r in whole]
    vals = [(r["step"], r["val_bits_per_byte"]) for r in rows if "val_bits_per_byte" in r]
    ink, blue, red, grey = "#222222", "#3b6fb6", "#c8553d", "#8a8a8a"

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    smooth: list[float] = []
    if steps:
        x, y, lr = zip(*steps, strict=True)
        axes.plot(x, y, color=blue, alpha=0.18, linewidth=0.7)
        smooth = _smooth(y, max(1, len(y) // 50))
        axes.plot(x, smooth, color=blue, linewidth=1.6, label="training (smoothed)")
        rate = axes.twinx()
        rate.fill_between(x, lr, color=grey, alpha=0.10, linewidth=0)
        rate.set_ylim(0, max(lr) * 1.02)
        rate.set_yticks([0, max(lr)], ["0", f"{max(lr):.0e}"], color=grey, fontsize=8)
        rate.set_ylabel("learning rate", color=grey, fontsize=9)
        rate.spines[["top", "left", "right"]].set_visible(False)
        rate.tick_params(length=0)
        axes.set_zorder(rate.get_zorder() + 1)
        axes.patch.set_visible(False)
    if vals:
        x, y = zip(*vals, strict=True)
        axes.plot(x, y, color=red, linewidth=1.6, marker="o", markersize=3.5, label="held out (part)")
    if ngram_bits is not None:
        axes.axhline(ngram_bits, color=ink, linewidth=1, linestyle=(0, (5, 4)), label=f"5-gram: {ngram_bits:.2f}")
    if final_bits is not None and vals:
        axes.plot(
            vals[-1][0], final_bits, color=red, marker="D", markersize=7, linestyle="none",
            label=f"held out (all): {final_bits:.3f}",
        )  # fmt: skip
    marks = [v for _, v in vals] + [b for b in (ngram_bits, final_bits) if b is not None]
    lowest = min(marks + smooth, default=0.0)
    # The first steps fall from log2(vocabulary); drawn in full they would flatten all that follows.
    highest = max([v for _, v in vals[:1]] + [lowest * 2.2])
    axes.set_ylim(max(0.0, lowest - 0.12 * (highest - lowest)), highest * 1.05)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte of text")
    name = out.resolve().name.encode("utf-8", "replace").decode()  # bytes that are no UTF-8 cannot be drawn
    axes.set_title(f"{name}: held-out loss", loc="left", fontsize=11, parse_math=False)
    axes.grid(axis="y", color=grey, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    picture = io.BytesIO()
    with warnings.catch_warnings():  # a name in a script that the font does not have is drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(picture, format="png")
    write_atomically(out / "loss.png", picture.getvalue())
    return out / "loss.png"


def _smooth(values: tuple[float, ...], window: int) -> list[float]:
    """Mean over the last `window` values."""
    smooth, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        smooth.append(total / min(i + 1, window))
    return smooth
