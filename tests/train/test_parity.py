"""The same training on fastlm's kernels and on the reference: the loss curves are the same.

As a test, 50 steps of the preset tiny in small batches. As a program, the long comparison, with its figures as JSON:

    python tests/train/test_parity.py --data TEXT.txt --steps 1000 --seeds 0 1 2 --out parity.json

Its runs lie in --runs; called again after an interruption, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

import fastlm
from fastlm.train import PRESETS, ConsoleProgress, Progress, TrainConfig, resume, train
from fastlm.train.metrics import read

SAME_SEED = 0.02  # nats per token at the end of a run


def run(config: TrainConfig, backend: str, progress: Progress | None = None) -> dict:
    """Loss of each step and held-out loss at each evaluation, nats per token."""
    out = Path(config.out)
    with fastlm.use_backend(backend):
        if not (out / "checkpoints").exists():
            train(config, progress)
        elif not (out / "result.json").exists():
            resume(out, progress)
    rows = read(out / "metrics.jsonl")
    return {
        "loss": [r["loss"] for r in rows if "loss" in r],
        "val_loss": {r["step"]: r["val_loss"] for r in rows if "val_loss" in r},
    }


def compare(config: TrainConfig, seeds: list[int], directory: Path, progress: Progress | None = None) -> dict:
    """Runs every seed on both sides. At each evaluation: means, the reference's range over seeds, and what is between.

    `within`: whether |difference of means| is within that range at every evaluation. `final_difference`: of the same
    seed's last held-out loss, the largest.
    """
    runs: dict[str, list[dict]] = {"auto": [], "reference": []}
    for seed in seeds:
        for backend, done in runs.items():
            out = str(directory / f"{backend}-{seed}")
            done.append(run(config.replace(seed=seed, out=out), backend, progress))
    evaluations = []
    for step in runs["reference"][0]["val_loss"]:
        ours, reference = ([r["val_loss"][step] for r in runs[side]] for side in ("auto", "reference"))
        difference = abs(sum(ours) - sum(reference)) / len(seeds)
        evaluations.append(
            {
                "step": step,
                "auto": ours,
                "reference": reference,
                "difference_of_means": difference,
                "reference_range": max(reference) - min(reference),
            }
        )
    last = evaluations[-1]
    return {
        "fastlm": fastlm.__version__,
        "precision": config.precision,
        "steps": config.steps,
        "seeds": seeds,
        "evaluations": evaluations,
        "within": all(e["difference_of_means"] <= e["reference_range"] for e in evaluations),
        "final_difference": max(abs(a - b) for a, b in zip(last["auto"], last["reference"], strict=True)),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fifty_steps_are_the_same_on_the_kernels_and_on_the_reference(precision, corpus, tmp_path):
    config = PRESETS["tiny"].replace(
        data=str(corpus), tokenizer="byte", steps=50, batch_size=2, block_size=128, evaluations=5,
        evaluation_tokens=1024, sample_tokens=0, device="cpu", precision=precision, threads=1,
    )  # fmt: skip
    ours = run(config.replace(out=str(tmp_path / "ours")), "auto")
    reference = run(config.replace(out=str(tmp_path / "reference")), "reference")
    assert reference["loss"][-1] < 0.5 * reference["loss"][0]  # it learns: a dead model would agree with anything
    tolerance = {"fp32": 2e-3, "bf16": SAME_SEED}[precision]
    assert ours["loss"] == pytest.approx(reference["loss"], abs=5 * tolerance)
    assert ours["val_loss"][50] == pytest.approx(reference["val_loss"][50], abs=tolerance)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="text file or directory")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("parity.json"))
    parser.add_argument("--runs", type=Path, default=Path("parity-runs"), help="directory of the runs")
    options = parser.parse_args()
    config = PRESETS["tiny"].replace(
        data=options.data, steps=options.steps, precision=options.precision, sample_tokens=0, device="cpu"
    )
    result = compare(config, options.seeds, options.runs, ConsoleProgress())
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    good = result["within"] and result["final_difference"] <= SAME_SEED
    print(
        f"difference of means within the reference's range at every evaluation: {result['within']};"
        f" largest same-seed difference at the end: {result['final_difference']:.4f} nats ({options.out})"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
