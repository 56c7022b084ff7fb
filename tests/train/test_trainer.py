"""Runs: learning, exact resume, signals, a loss that is no number, a disk that fills."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastlm.models import GPT
from fastlm.train import CheckpointError, TrainingError, evaluate, load_model, resume, train
from fastlm.train.metrics import read
from fastlm.train.sampling import known_word_share
from fastlm.train.step import learning_rate


def test_a_run_learns_and_leaves_what_it_promises(small, hook):
    result = train(small.replace(steps=150, learning_rate=1e-2), progress := hook())
    out = Path(small.out)
    assert result.out == out and result.step == 150 and result.stopped_by is None
    assert progress.losses[1] > 5.0 > 2.5 > progress.losses[150]
    assert result.evaluation.tokens == result_json(out)["val_tokens"]
    assert result_json(out)["val_bits_per_byte"] == result.evaluation.bits_per_byte < 3.5
    assert 0.2 < result.ngram_bits_per_byte < 1.0
    assert (out / "sample.txt").read_text(encoding="utf-8") == result.sample
    assert result_json(out)["sample_words_known"] == result.sample_words_known
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = read(out / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 151))
    vals = [r for r in rows if "val_loss" in r]
    assert len(vals) == 4 and vals[-1]["val_bits_per_byte"] < vals[0]["val_bits_per_byte"]
    assert len(list((out / "checkpoints").iterdir())) == 2  # the newest two, the best among them


def test_words_of_a_sample_are_looked_up_in_the_text():
    documents = ["the cat sees a dog", "Zoë likes cats"]
    assert known_word_share("the cat likes Zoë; the zebra 42 x", documents) == 5 / 6
    assert known_word_share("The", documents) == 0
    assert known_word_share("a 1 2", documents) is None


def result_json(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def test_the_whole_held_out_text_is_measured_in_a_fixed_order(small):
    result = train(small)
    loaded = load_model(small.out)
    again = evaluate(loaded.model, loaded.config, loaded.dataset.val, loaded.dataset.val_bytes)
    assert again == result.evaluation
    assert again.tokens == len(loaded.dataset.val) - 1
    half = evaluate(loaded.model, loaded.config, loaded.dataset.val, loaded.dataset.val_bytes, limit=again.tokens // 2)
    assert 0.4 * again.tokens < half.tokens < 0.6 * again.tokens
    assert half.bits_per_byte == pytest.approx(again.bits_per_byte, rel=0.1)


def test_the_seed_decides_everything(small, final_state, tmp_path):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small.replace(out=str(tmp_path / name), seed=seed, dropout=0.2))
        states.append(final_state(tmp_path / name))
    assert states[0] == states[1] != states[2]


def test_accumulation_gives_the_same_gradient_as_a_larger_batch(small, hook, tmp_path):
    one, two = hook(), hook()
    train(small.replace(out=str(tmp_path / "a"), batch_size=8), one)
    train(small.replace(out=str(tmp_path / "b"), batch_size=4, accumulation=2), two)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)


def test_learning_rate_rises_and_falls_along_a_cosine(small):
    config = small.replace(steps=100, warmup=0.1, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:11] == pytest.approx([i / 11 for i in range(1, 11)] + [1.0])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[(10 + 99) // 2] == pytest.approx(0.55, abs=0.02)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_leaves_and_resume_ends_as_if_nothing_had_been(small, hook, final_state, tmp_path, name):
    config = small.replace(dropout=0.1)
    train(config.replace(out=str(tmp_path / "straight")))
    before = signal.getsignal(getattr(signal, name))
    progress = hook(7, lambda: os.kill(os.getpid(), getattr(signal, name)))
    result = train(config, progress)
    assert result.stopped_by == name and result.step == 7 and result.evaluation is None
    assert progress.lines[-1] == f"stopped by {name} after step 7; continue with: fastlm resume {small.out}"
    assert final_state(small.out)["step"] == "step-00000007"
    assert signal.getsignal(getattr(signal, name)) == before

    assert resume(small.out).stopped_by is None
    assert final_state(small.out) == final_state(tmp_path / "straight")
    assert result_json(Path(small.out)) == result_json(tmp_path / "straight")
    strip = [
        {k: v for k, v in row.items() if k != "tokens_per_second"} for row in read(Path(small.out, "metrics.jsonl"))
    ]
    assert strip == [
        {k: v for k, v in row.items() if k != "tokens_per_second"}
        for row in read(tmp_path / "straight" / "metrics.jsonl")
    ]


def test_kill_9_at_a_random_step_and_resume_give_the_same_bits(small, final_state, tmp_path):
    config = small.replace(steps=400, evaluations=40, dropout=0.1)
    train(config.replace(out=str(tmp_path / "straight")))
    target = random.randrange(20, 380)
    out = Path(config.out)
    code = (
        "import sys; sys.path[:] = sys.argv[2:]; import json; from fastlm.train import TrainConfig, train;"
        " train(TrainConfig.from_dict(json.loads(sys.argv[1])))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(config.to_dict()), *sys.path])
    while process.poll() is None and len(read(out / "metrics.jsonl")) < target:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    resume(out)
    assert final_state(out) == final_state(tmp_path / "straight"), f"killed after about {target} steps"


def test_resuming_a_finished_run_only_reports_again(small, hook, final_state):
    first = train(small)
    state = final_state(small.out)
    again = resume(small.out, progress := hook())
    assert (again.evaluation, again.sample) == (first.evaluation, first.sample)
    assert progress.losses == {} and final_state(small.out) == state


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(small, hook, monkeypatch):
    forward, calls = GPT.forward, 0

    def broken(self, idx, targets=None, **keywords):
        nonlocal calls
        logits, loss = forward(self, idx, targets, **keywords)
        if targets is not None and self.training:
            calls += 1
            loss = loss * float("nan") if calls == 8 else loss
        return logits, loss

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(TrainingError, match="the loss became nan in step 8; the last good checkpoint stays"):
        train(small, progress := hook())
    assert max(progress.losses) == 7
    monkeypatch.undo()
    assert load_model(small.out, "last").step == 6
    assert all(p.isfinite().all() for p in load_model(small.out, "last").model.parameters())


def test_a_gradient_that_is_no_number_never_reaches_the_weights(small, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(TrainingError, match="the gradient's norm became inf in step 1;"):
        train(small)


def test_a_run_is_not_overwritten_unless_told(small, tmp_path, monkeypatch):
    train(small)
    with pytest.raises(ValueError, match=f"{small.out} holds a run already; go on with it by `fastlm resume"):
        train(small)
    train(small.replace(steps=3), overwrite=True)
    assert [r["step"] for r in read(Path(small.out, "metrics.jsonl")) if "loss" in r] == [1, 2, 3]
    monkeypatch.chdir(tmp_path)
    assert [str(train(small.replace(out=None, steps=1)).out) for _ in range(2)] == ["runs/tiny-1", "runs/tiny-2"]


def test_a_corrupted_checkpoint_is_named_and_the_one_before_taken(small, hook, final_state):
    train(small)
    state = final_state(small.out)
    newest = Path(small.out, "checkpoints", "step-00000012")
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    resume(small.out, progress := hook())
    assert progress.warnings == [
        f"{newest / 'model.safetensors'} is corrupted: its content does not match its checksum;"
        " going on from step 9 instead"
    ]
    assert sorted(progress.losses) == [10, 11, 12]
    assert final_state(small.out) == state


def test_nothing_left_to_resume_from(small):
    train(small.replace(steps=2))
    for path in Path(small.out, "checkpoints").iterdir():
        (path / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read: .*step-00000002 is corrupted"):
        resume(small.out)


def test_a_disk_that_fills_at_any_write_loses_nothing(small, hook, final_state, full_disk, tmp_path):
    config = small.replace(steps=4, evaluations=2)
    train(config.replace(out=str(tmp_path / "straight")))
    expected = final_state(tmp_path / "straight")
    out, half = Path(config.out), tmp_path / "half"
    train(config, hook(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    shutil.copytree(out, half)

    for k in range(1, 200):
        shutil.rmtree(out)
        shutil.copytree(half, out)
        kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "metrics.jsonl"}
        full_disk.count, full_disk.fail_at = 0, k
        try:
            resume(out)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
        finally:
            full_disk.fail_at = None
        gone = [path for path, content in kept.items() if not path.exists() or path.read_bytes() != content]
        # A checkpoint goes only when a newer one has its name.
        assert not gone or (out / "checkpoints" / "step-00000004").exists(), f"write {k}: lost {gone}"
        resume(out)
        assert final_state(out) == expected, f"write {k}"
        assert [r["step"] for r in read(out / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4], f"write {k}"
    assert 20 < k < 199
