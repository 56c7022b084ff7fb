"""Runs: learning, exact resume, signals, a loss that is no number, a disk that fills."""

import dataclasses
import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import fastlm
from fastlm import _library, _native
from fastlm.data.files import sealed_json, unsealed
from fastlm.models import GPT
from fastlm.train import CheckpointError, TrainingError, evaluate, load_model, resume, train
from fastlm.train import checkpoint as checkpoints
from fastlm.train.evaluation import _rows
from fastlm.train.metrics import Metrics, read
from fastlm.train.rundir import claimed, free_directory, locked, settle
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


def test_a_part_of_the_held_out_text_keeps_to_its_limit(small):
    T, B = small.block_size, small.batch_size
    for length in (T + 1, 10 * T, 10 * T + 1, 57 * T + 5):
        tokens = np.arange(length, dtype=np.uint16)
        for limit in (1, T, 3 * T + 2, 29 * T, length - 2, length - 1, 2 * length):
            rows = [(x, y) for xs, ys in _rows(tokens, small, limit) for x, y in zip(xs, ys, strict=True)]
            seen = torch.cat([y for _, y in rows])
            assert min(limit, length - 1) - T < len(seen) <= max(limit, T)
            assert all(torch.equal(x + 1, y) for x, y in rows) and len(seen.unique()) == len(seen)
            assert len(seen) == length - 1 or all(len(x) == T and x[0] % T == 0 for x, _ in rows)
            assert all(len(xs) <= B for xs, _ in _rows(tokens, small, limit))


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
    config = small.replace(steps=400, evaluations=10, dropout=0.1)
    train(config.replace(out=str(tmp_path / "straight")))
    code = (
        "import sys; sys.path[:] = sys.argv[2:]; import json; from fastlm.train import TrainConfig, train;"
        " train(TrainConfig.from_dict(json.loads(sys.argv[1])))"
    )
    for target in (random.randrange(20), random.randrange(20, 380)):  # the first checkpoint comes after step 40
        out = tmp_path / f"killed-{target}"
        settings = json.dumps(config.replace(out=str(out)).to_dict())
        process = subprocess.Popen([sys.executable, "-c", code, settings, *sys.path])
        while process.poll() is None and not (out / "config.json").exists():
            time.sleep(0.002)
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


def test_a_gradient_that_is_no_number_reaches_no_checkpoint(small, monkeypatch):
    monkeypatch.setattr(fastlm.optim._fused, "grad_norm", lambda grads: torch.tensor(float("inf")))
    with pytest.raises(TrainingError) as first:
        train(small)
    with pytest.raises(TrainingError) as again:
        resume(small.out)
    # There is no checkpoint yet that could stay.
    said = "the gradient's norm became inf in step 1; try a lower --learning-rate"
    assert str(first.value) == str(again.value) == said


@pytest.mark.parametrize("whole", [False, True])
def test_a_held_out_loss_that_is_no_number_stops_with_the_last_good_checkpoint(small, monkeypatch, whole):
    calls = itertools.count(1)

    def broken(model, config, tokens, text_bytes, limit=None):
        result = evaluate(model, config, tokens, text_bytes, limit)
        bad = limit is None if whole else next(calls) == 2
        return dataclasses.replace(result, nats_per_token=math.nan, bits_per_byte=math.nan) if bad else result

    monkeypatch.setattr("fastlm.train.trainer.evaluate", broken)
    with pytest.raises(TrainingError, match=r"the held-out loss became nan after step \d+; the last good checkpoint"):
        train(small)
    assert load_model(small.out, "last").step == (12 if whole else 3)
    assert "NaN" not in Path(small.out, "metrics.jsonl").read_text()
    assert not Path(small.out, "result.json").exists()


def test_the_report_is_on_the_best_weights_and_not_on_the_last(small, monkeypatch):
    part = iter([3.0, 1.0, 2.0, 2.5])  # of the evaluations during the run

    def scripted(model, config, tokens, text_bytes, limit=None):
        result = evaluate(model, config, tokens, text_bytes, limit)
        return result if limit is None else dataclasses.replace(result, nats_per_token=next(part))

    monkeypatch.setattr("fastlm.train.trainer.evaluate", scripted)
    result = train(small)
    best, last = load_model(small.out), load_model(small.out, "last")
    assert (best.step, last.step, result_json(Path(small.out))["step"]) == (6, 12, 6)
    measured = [evaluate(m.model, m.config, m.dataset.val, m.dataset.val_bytes) for m in (best, last)]
    assert result.evaluation == measured[0] != measured[1]
    assert result_json(Path(small.out))["val_loss"] == measured[0].nats_per_token


def test_metrics_are_whole_lines_of_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda descriptor, content, write=os.write: write(descriptor, content[:3]))
    with Metrics(tmp_path / "metrics.jsonl", keep_steps=0) as metrics:
        metrics.write(step=1, loss=0.5)
        with pytest.raises(ValueError, match="not JSON compliant"):
            metrics.write(step=2, loss=math.inf)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_stay(small, overwrite):
    out = Path(small.out)
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "epoch1.pt").write_text("a month of work")
    (out / "config.json").write_text('{"model": "another"}')
    before = files(out)
    with pytest.raises(ValueError, match=f"{out} holds config.json, and no run that can be read; move it away or give"):
        train(small, overwrite=overwrite)
    assert files(out) == before

    (out / "checkpoints" / "epoch1.pt").rename(out / "epoch1.pt")
    (out / "checkpoints").rmdir()
    (out / "config.json").unlink()
    train(small)
    (out / "epoch1.pt").rename(out / "checkpoints" / "epoch1.pt")
    before = files(out)
    with pytest.raises(ValueError, match=r"epoch1\.pt is no checkpoint of a run; move it away or give another --out"):
        train(small, overwrite=overwrite)
    assert files(out) == before


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_is_not_overwritten_unless_told(small, hook, tmp_path, monkeypatch):
    train(small, progress := hook(), overwrite=True)
    assert "replacing" not in "".join(progress.lines)
    with pytest.raises(ValueError, match=f"{small.out} holds a run already; go on with it by `fastlm resume"):
        train(small)
    train(small.replace(steps=3), progress := hook(), overwrite=True)
    assert progress.lines[0] == f"replacing the run at step 12 in {small.out}"
    assert [r["step"] for r in read(Path(small.out, "metrics.jsonl")) if "loss" in r] == [1, 2, 3]
    assert not Path(small.out, ".replaced-run").exists()
    monkeypatch.chdir(tmp_path)
    assert [str(train(small.replace(out=None, steps=1)).out) for _ in range(2)] == ["runs/tiny-1", "runs/tiny-2"]


def test_runs_that_start_at_once_get_directories_of_their_own(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start(_) -> str:
        with claimed(small.replace(out=None), False) as config:
            return config.out

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(start, range(40))) == sorted(f"runs/tiny-{i}" for i in range(1, 41))
    assert free_directory(small.replace(out=None), False).out == "runs/tiny-41"


def test_a_run_that_never_began_leaves_nothing(small, tmp_path, full_disk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine", "notes.txt").write_text("mine")
    Path("runs").mkdir()
    for change in ({"data": "absent.txt"}, {"block_size": 10_000}, {"minutes": 1e-6}):
        for out in (None, "new", "mine"):
            with pytest.raises((ValueError, FileNotFoundError)):
                train(small.replace(out=out, **change))
            assert list(Path("runs").iterdir()) == [] and not Path("new").exists()
            assert Path("mine", "notes.txt").read_text() == "mine" and not Path("mine", "config.json").exists()
    for writes, _ in full_disk.each_failure(lambda: train(small.replace(out="new", steps=1))):
        if Path("new", "config.json").exists():
            assert writes > 10
            break
        assert not Path("new").exists() or list(Path("new").iterdir()) == []  # without the lock it is not touched
        shutil.rmtree("new", ignore_errors=True)


@pytest.mark.parametrize("package", ["matplotlib", "safetensors"])
def test_a_missing_package_is_missed_at_once(small, hook, monkeypatch, package):
    train(small, hook(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    monkeypatch.setitem(sys.modules, package, None)
    for start in (lambda said: train(small.replace(out=small.out + "-2"), said), lambda said: resume(small.out, said)):
        with pytest.raises(ModuleNotFoundError, match=package):
            start(progress := hook())
        assert progress.lines == [] and progress.losses == {}
    assert not Path(small.out + "-2").exists()


def test_a_run_that_fails_before_its_first_checkpoint_gives_back_the_one_it_replaces(small, hook, monkeypatch):
    train(small)
    before = files(Path(small.out))
    with monkeypatch.context() as patch, pytest.raises(TrainingError):
        patch.setattr(fastlm.optim._fused, "grad_norm", lambda grads: torch.tensor(math.nan))
        train(small.replace(seed=1), overwrite=True)
    assert files(Path(small.out)) == before
    with pytest.raises(ZeroDivisionError):  # after the first one the new run is the one that stays
        train(small.replace(seed=1), hook(4, lambda: 1 / 0), overwrite=True)
    assert load_model(small.out, "last").step == 3 and load_model(small.out).config.seed == 1
    assert not Path(small.out, ".replaced-run").exists()


def test_killed_while_it_replaces_a_run(small, final_state, monkeypatch, tmp_path):
    """SIGKILL after each rename, and in the first step: `resume` goes on with the old run or with the new one."""
    train(small)
    old = final_state(small.out)
    train(small.replace(seed=1, out=str(tmp_path / "new")))
    new = final_state(tmp_path / "new")
    ready = Path(shutil.copytree(small.out, tmp_path / "ready"))
    code = (
        "import sys; sys.path[:] = sys.argv[3:]; import json, os, signal; from fastlm.train import TrainConfig, train\n"
        "import fastlm.train.trainer as trainer\n"
        "left = int(sys.argv[2])\n"
        "def replace(a, b, call=os.replace):\n"
        "    global left\n"
        "    call(a, b)\n"
        "    if '.replaced-run' in str(b): left -= 1\n"
        "    if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "def step(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace, trainer.training_step = replace, step\n"
        "train(TrainConfig.from_dict(json.loads(sys.argv[1])), overwrite=True)\n"
    )
    settings = json.dumps(small.replace(seed=1).to_dict())
    for renames, expected in ((1, old), (6, old), (7, new)):
        shutil.rmtree(small.out)
        shutil.copytree(ready, small.out)
        killed = subprocess.run([sys.executable, "-c", code, settings, str(renames), *sys.path])
        assert killed.returncode == -signal.SIGKILL
        if expected is old:
            with pytest.raises(ValueError, match=r"`fastlm resume .*run` brings back the one set aside"):
                load_model(small.out)
        resume(small.out)
        assert final_state(small.out) == expected, renames
        assert not Path(small.out, ".replaced-run").exists()


def test_a_disk_that_fills_while_a_run_is_replaced_loses_neither(small, final_state, full_disk, tmp_path):
    config = small.replace(steps=2, evaluations=1, sample_tokens=0)
    train(config)
    out, ready, old = Path(config.out), tmp_path / "ready", final_state(config.out)
    shutil.copytree(out, ready)
    train(config.replace(seed=1, out=str(tmp_path / "new")))
    ends = {"old": old, "new": final_state(tmp_path / "new")}
    seen = []
    for k in range(1, 200):
        shutil.rmtree(out)
        shutil.copytree(ready, out)
        full_disk.count, full_disk.fail_at = 0, k
        try:
            train(config.replace(seed=1), overwrite=True)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
        finally:
            full_disk.fail_at = None
        settle(out)  # as `resume` does
        whole = [path.name for path in checkpoints.paths(out / "checkpoints")]
        assert whole == ["step-00000002"], f"write {k}"
        seen += [name for name, state in ends.items() if final_state(out) == state]
        assert len(seen) == k, f"write {k}"
        if seen[-1] == "old":
            assert files(out) == files(ready), f"write {k}"
    assert 20 < k < 199 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def test_another_environment_is_said_on_resume(small, hook, monkeypatch):
    with fastlm.use_backend("reference"):
        train(small, hook(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        recorded = json.loads(Path(small.out, "config.json").read_text())
        assert recorded["backend"] == "reference"
        assert recorded["cpu_isa"] == (_native.cpu.active_isa() if _native.cpu else None)
        resume(small.out, progress := hook(9, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert progress.warnings == []
    monkeypatch.setattr(torch, "__version__", "9.9")
    resume(small.out, progress := hook())
    assert progress.warnings == [
        f"since the run was started, torch {recorded['torch']} -> 9.9, backend reference -> {_library._state.backend}:"
        " it goes on, but no longer with the same bits"
    ]


def test_loading_a_model_leaves_the_process_alone(small, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fastlm.train.config.keep_freed_memory", lambda: True)
        train(small.replace(steps=1, keep_memory=True))
    for name in ("fastlm.train.config.keep_freed_memory", "torch.set_num_threads"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("set for the whole process"))
    assert load_model(small.out).config.keep_memory


def test_only_one_process_trains_in_a_directory(small, hook, final_state, tmp_path):
    train(small.replace(out=str(tmp_path / "alone")))
    refused = []

    def intrude():
        for start in (lambda: train(small.replace(seed=1), overwrite=True), lambda: resume(small.out)):
            with pytest.raises(ValueError, match=f"another process trains in {small.out}; stop it or give another"):
                start()
            refused.append(start)

    train(small, hook(2, intrude))  # before its first checkpoint, and once more when it goes on
    resume(small.out)
    assert len(refused) == 2
    assert final_state(small.out) == final_state(tmp_path / "alone")
    assert not Path(small.out, ".fastlm-lock").exists()
    train(small.replace(seed=1), hook(2, intrude), overwrite=True)
    assert len(refused) == 4 and load_model(small.out).config.seed == 1


def test_a_lock_file_that_was_removed_keeps_nobody_out(tmp_path):
    """Between opening the file and locking it the process before may end: then a new file is locked."""
    fcntl = pytest.importorskip("fcntl")
    flock, removed = fcntl.flock, []

    def late(descriptor, operation):
        if not removed:
            removed.append(Path(tmp_path, ".fastlm-lock").unlink())
        flock(descriptor, operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with locked(tmp_path), pytest.raises(ValueError, match="another process trains in"), locked(tmp_path):
            pass
        patch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
        with locked(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_another_run_are_refused(small, hook, final_state, tmp_path):
    other = small.replace(out=str(tmp_path / "other"), learning_rate=1e-2, steps=60, evaluations=3)
    train(other)
    train(small.replace(out=str(tmp_path / "straight")))
    train(small, hook(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    newer = Path(small.out, "checkpoints", "step-00000060")
    shutil.copytree(Path(other.out, "checkpoints", newer.name), newer)
    assert load_model(small.out).step == 6  # though the other's loss is lower
    resume(small.out, progress := hook(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert progress.warnings == [f"{newer} is of another run; going on from step 6 instead"]

    same_step = Path(small.out, "checkpoints", "step-00000012")
    shutil.copytree(Path(tmp_path, "straight", "checkpoints", same_step.name), same_step)
    resume(small.out)
    assert load_model(small.out, "last").step == 12  # its own, written over the other's
    assert final_state(small.out) == final_state(tmp_path / "straight")
    shutil.rmtree(same_step.parent)
    shutil.copytree(Path(other.out, "checkpoints"), same_step.parent)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read: .*step-00000060 is of another run"):
        resume(small.out)


def test_a_run_from_before_runs_had_names_goes_on(small, hook, final_state, tmp_path):
    train(small.replace(out=str(tmp_path / "straight")))
    train(small, hook(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    for file in (Path(small.out, "config.json"), *Path(small.out).glob("checkpoints/*/checkpoint.json")):
        content = unsealed(json.loads(file.read_text()))
        del content["run"]
        file.write_bytes(sealed_json(content))
    resume(small.out, progress := hook())
    assert sorted(progress.losses) == [8, 9, 10, 11, 12] and progress.warnings == []
    assert final_state(small.out) == final_state(tmp_path / "straight")


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_new_checkpoint_outlives_later_ones_that_cannot_be_read(small, hook):
    directory = Path(small.out, "checkpoints")
    train(small, hook(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    shutil.copytree(directory / "step-00000006", Path(small.out, "step-6"))
    resume(small.out)
    shutil.copytree(directory / "step-00000012", directory / "step-00000099")  # another step's, so unreadable
    for name in ("step-00000009", "step-00000012"):
        corrupt(directory / name / "model.safetensors")
    with pytest.raises(CheckpointError, match="step-00000099 is corrupted: it is of step 12"):
        checkpoints.load(directory / "step-00000099")
    Path(small.out, "step-6").rename(directory / "step-00000006")
    resume(small.out, hook(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert [path.name for path in checkpoints.paths(directory)] == ["step-00000006", "step-00000007"]
    assert load_model(small.out, "last").step == 7


def test_altered_records_are_refused(small):
    train(small.replace(steps=1))
    record = Path(small.out, "checkpoints", "step-00000001", "checkpoint.json")
    good = record.read_text()
    for change in ({"step": 2}, {"sha256": 3}, {"files": 3}, {"val_loss": 0.0}):
        record.write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(CheckpointError, match="step-00000001 is corrupted: its content does not match"):
            checkpoints.load(record.parent)
    for content in ("[]", "3", "null", ""):
        record.write_text(content)
        with pytest.raises(CheckpointError, match="step-00000001 is corrupted"):
            load_model(small.out)
    record.write_text(json.dumps({"version": 1}))
    with pytest.raises(CheckpointError, match="has checkpoint format 1; this fastlm reads 2"):
        checkpoints.load(record.parent)
    config = Path(small.out, "config.json")
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match=r"config.json cannot be used: its content does not match its checksum"):
        resume(small.out)


def test_damaged_metrics_do_not_keep_a_run_from_going_on(small, hook, final_state, tmp_path):
    train(small.replace(out=str(tmp_path / "straight")))
    train(small, hook(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    metrics = Path(small.out, "metrics.jsonl")
    lines = metrics.read_bytes().splitlines()
    lines[1:5] = [b"\xff\xfe" + lines[1], b"\0" * 100, b'[{"step": 3}]', b'{"step": "3", "loss": 1.0}']
    lines[6] = lines[6].replace(b'"learning_rate"', b'"lea\xf2ning_rate"')
    metrics.write_bytes(b"\n".join([*lines, b'{"loss": 1.0}', b"7", b'{"step": ' + b"9" * 5000 + b"}", b'{"step"']))
    resume(small.out)
    assert final_state(small.out) == final_state(tmp_path / "straight")
    assert Path(small.out, "loss.png").exists()
    steps = [row["step"] for row in read(metrics) if "loss" in row]
    assert len(steps) < 12 and steps == sorted(set(steps)) and set(range(8, 13)) <= set(steps)


def test_a_corrupted_checkpoint_is_named_and_the_one_before_taken(small, hook, final_state):
    train(small)
    state = final_state(small.out)
    newest = Path(small.out, "checkpoints", "step-00000012")
    corrupt(newest / "model.safetensors")
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
