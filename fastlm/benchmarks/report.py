"""What was measured, as a table, JSON and a picture."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlm.benchmarks.harness import Row

_COLOURS = {"fastlm": "#c8102e", "torch": "#8a8d91", "torch.compile": "#4a6fa5", "torch default": "#c9cbce"}


# Variants that targets name, besides the baseline.
_BESIDE = ("torch flash", "torch cuDNN", "torch.compile", "three products", "four products", "Liger", "torch default",
           "fastlm fp32 states")  # fmt: skip


def seconds(value: float) -> str:
    """In the unit that leaves one to three digits before the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value / size < 100 else f"{value / size:.0f} {unit}"
    return f"{value / 1e-9:.3g} ns"


def rate(row: Row) -> str:
    if row.items:
        return f"{row.items / row.seconds:,.0f} tokens/s"
    if row.flops:
        value, unit = row.flops / row.seconds / 1e9, "GFLOP/s"
        return f"{value:,.0f} {unit}" if value < 1e4 else f"{value / 1e3:,.0f} T{unit[1:]}"
    return f"{row.bytes / row.seconds / 1e9:,.1f} GB/s" if row.bytes else ""


def _cells(row: Row) -> list[str]:
    if row.missing:
        return [row.case, row.variant, row.allocator, "-", row.missing, "", "", ""]
    spread = (row.quartiles[1] - row.quartiles[0]) / row.seconds
    low, high = row.ratio_quartiles
    ratio = f"{row.ratio:.2f} ({low:.2f}-{high:.2f})"
    if math.isnan(row.ratio) or low == high == 1:
        ratio = ""
    share = "" if math.isnan(row.share) else f"{100 * row.share:.0f} %"
    remarks = [f"±{50 * spread:.0f} %"] + ["noisy"] * row.noisy + ["loaded machine"] * row.loaded
    if row.variant == "fastlm":
        remarks += [f"{row.ratios[name]:.2f}x {name}" for name in _BESIDE if name in row.ratios]
    if not math.isnan(row.memory):
        remarks.append(f"{row.memory / 1e9:.2f} GB")
    if row.remark:
        remarks.append(row.remark)
    median = seconds(row.seconds) + (f" (target {row.target})" if row.target else "")
    return [row.case, row.variant, row.allocator, median, rate(row), share, ratio, ", ".join(remarks)]


HEADINGS = ["case", "variant", "allocator", "median", "rate", "of limit", "times faster", "spread"]


def print_table(group: str, rows: Sequence[Row]) -> None:
    """With rich where it is installed, plain otherwise."""
    cells = [_cells(row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [HEADINGS, *cells]) for i in range(len(HEADINGS))]
        print(f"\n{group}")
        for line in [HEADINGS, *cells]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=group, title_justify="left", box=None, header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in ("median", "rate", "of limit") else "left")
    before = None
    for row, line in zip(rows, cells, strict=True):
        line[0] = "" if row.case == before else line[0]
        before = row.case
        table.add_row(*line, style="bold" if row.variant == "fastlm" else None)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print()
    console.print(table)


def draw(rows: Sequence[Row], machine: dict[str, Any], path: Path) -> bool:
    """A bar for every variant: its share of the machine's limit where it has one, its time otherwise. False without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [row for row in rows if not row.missing]
    groups = list(dict.fromkeys(row.group for row in measured))
    heights = [len({(r.case, r.allocator, r.variant) for r in measured if r.group == g}) for g in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(10, 0.24 * sum(heights) + 1.1 * len(groups) + 0.8), squeeze=False,
        height_ratios=[h + 2.0 for h in heights], layout="constrained",
    )  # fmt: skip
    for axis, group in zip(axes[:, 0], groups, strict=True):
        _draw_group(axis, group, [row for row in measured if row.group == group])
    figure.suptitle(
        f"fastlm {machine['fastlm']} beside torch {machine['torch']}: {machine['device']}"
        + (f", {machine['cpu']}, {machine['threads']} threads, {machine['isa']}" if machine["device"] == "cpu" else ""),
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _draw_group(axis: Any, group: str, rows: list[Row]) -> None:
    shares = not any(math.isnan(row.share) for row in rows)
    unit, scale = ("ms", 1e3) if max(row.seconds for row in rows) > 1e-3 else ("µs", 1e6)
    values = [100 * row.share if shares else scale * row.seconds for row in rows]
    y, ticks, names = 0.0, [], []
    longest = max(values)
    before = None
    for row, value in zip(rows, values, strict=True):
        if before is not None and (row.case, row.allocator) != before:
            y += 0.6
        if (row.case, row.allocator) != before:
            ticks.append(y)
            names.append(row.case + (", freed memory kept" if row.allocator == "kept" else ""))
        before = (row.case, row.allocator)
        axis.barh(y, value, height=0.9, color=_COLOURS.get(row.variant, "#b8860b"), label=row.variant)
        text = rate(row) or seconds(row.seconds)
        if row.variant == "fastlm" and not math.isnan(row.ratio):
            text += f"   {row.ratio:.2f}x"
        weight = "bold" if row.variant == "fastlm" else "normal"
        axis.annotate(text, (value, y), (4, 0), textcoords="offset points", va="center", fontsize=8, fontweight=weight)
        y += 1
    axis.set_yticks(ticks, names, fontsize=8)
    axis.invert_yaxis()
    if shares:
        axis.set_xlim(0, max(115, 1.25 * longest))
        axis.axvline(100, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel("% of the limit measured in the same run, more is better", fontsize=8)
    else:
        axis.set_xlim(0, 1.25 * longest)
        axis.set_xlabel(f"{unit}, less is better", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(group, loc="left", fontsize=10, fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axis.legend(
        handles.values(), handles.keys(), fontsize=7, frameon=False, ncols=len(handles), loc="lower right",
        bbox_to_anchor=(1, 1), borderaxespad=0,
    )  # fmt: skip
