"""Data sets on disk: made once, found again, never half, never wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastlm.data import BPETokenizer, Dataset, iterate_all, load_corpus, ngram_bits_per_byte, prepare

FILES = ("dataset.json", "tokenizer.json", "train.bin", "val.bin")
KINDS = pytest.mark.parametrize("kind", ["byte", "bpe"])


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        lines = [f"line {j} of file {i}: {'é' * (j % 3)} {(i * 7919 + j * 104729) % 99991}" for j in range(20 + i)]
        (folder / f"{i:02}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def make(source, out, kind="bpe", vocab_size=None):
    return prepare(source, out, tokenizer=kind, vocab_size=vocab_size or (300 if kind == "bpe" else None))


def same(a: Dataset, b: Dataset) -> bool:
    return (
        np.array_equal(a.train, b.train)
        and np.array_equal(a.val, b.val)
        and (a.corpus_sha256, a.train_bytes, a.val_bytes) == (b.corpus_sha256, b.train_bytes, b.val_bytes)
    )


@KINDS
def test_what_it_holds(source, tmp_path, kind):
    data, corpus = make(source, tmp_path / "out", kind), load_corpus(source)
    assert tuple(data.documents("train")) == corpus.train and tuple(data.documents("val")) == corpus.val
    assert data.val_bytes == sum(len(t.encode()) for t in corpus.val)
    assert data.corpus_sha256 == corpus.sha256 and data.report == corpus.report
    assert data.tokenizer.vocab_size == (300 if kind == "bpe" else 257)
    assert sorted(os.listdir(data.path)) == sorted(FILES)
    assert len(os.listdir(tmp_path / "out")) == 1
    # A uniform guess costs log2(vocabulary) bits per token, ends of documents included.
    nats = sum(y.numel() for _, y in iterate_all(data.val, 64, 4)) * math.log(data.tokenizer.vocab_size)
    tokens = sum(len(data.tokenizer.encode(t)) + 1 for t in corpus.val)
    assert data.bits_per_byte(nats) == pytest.approx(tokens * math.log2(data.tokenizer.vocab_size) / data.val_bytes)


def test_the_tokenizer_learns_from_the_training_part_alone(source, tmp_path):
    make(source, tmp_path / "out").tokenizer.save(tmp_path / "made.json")
    BPETokenizer.train(load_corpus(source).train, 300).save(tmp_path / "train.json")
    assert (tmp_path / "made.json").read_bytes() == (tmp_path / "train.json").read_bytes()


def test_the_second_call_opens_the_first_ones_folder(source, tmp_path, monkeypatch):
    first = make(source, tmp_path / "out")
    monkeypatch.setattr("fastlm.data.dataset._build", lambda *a: pytest.fail("built again"))
    assert same(make(source, tmp_path / "out"), first)
    assert same(Dataset.open(first.path), first)


def test_settings_and_text_have_their_own_folders(source, tmp_path):
    paths = {
        make(source, tmp_path / "out", kind, size).path for kind, size in [("byte", 257), ("bpe", 300), ("bpe", 301)]
    }
    (source / "00.txt").write_text("something else entirely, and long enough to count as text in its own right\n" * 9)
    paths.add(make(source, tmp_path / "out").path)
    assert len(paths) == 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "altered"])
def test_a_damaged_folder_is_noticed_and_made_anew(source, tmp_path, name, damage):
    data = make(source, tmp_path / "out")
    train, val = np.array(data.train), np.array(data.val)
    file = data.path / name
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 1])
    new = {"empty": b"", "half": content[:middle], "altered": content[:middle] + flipped + content[middle + 1 :]}
    file.unlink()  # not in place: the file above is mapped
    if damage != "gone":
        file.write_bytes(new[damage])
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        Dataset.open(data.path)
    again = make(source, tmp_path / "out")
    assert np.array_equal(again.train, train) and np.array_equal(again.val, val)
    assert os.listdir(tmp_path / "out") == [data.path.name]


def test_mismatched_files_are_noticed(source, tmp_path):
    a, b = make(source, tmp_path / "out"), make(source, tmp_path / "out", "byte")
    (a.path / "tokenizer.json").write_bytes((b.path / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="vocabularies of 300"):
        Dataset.open(a.path)


@KINDS
def test_a_full_disk_loses_nothing_and_is_never_believed(source, tmp_path, full_disk, kind):
    out = tmp_path / "out"
    other = make(source, out, "bpe", 280)
    wanted = make(source, tmp_path / "elsewhere", kind)
    (out / "mine.txt").write_text("kept")
    before = set(os.listdir(out))
    failures = 0

    def action():
        for path in set(os.listdir(out)) - before:  # each run starts without the data set
            for file in (out / path).iterdir():
                file.unlink()
            (out / path).rmdir()
        make(source, out, kind)

    for k, error in full_disk.each_failure(action):
        made = set(os.listdir(out)) - before
        if error is None:  # only the flush of the folder's name failed
            assert len(made) == 1 and same(Dataset.open(out / made.pop()), wanted)
            continue
        failures += 1
        assert not made, k
        assert "No space left on device" in str(error) and str(out) in str(error), k
        assert same(Dataset.open(other.path), other) and (out / "mine.txt").read_text() == "kept"
    assert failures > 15
    assert same(make(source, out, kind), wanted)


def test_concurrent_runs_agree(source, tmp_path):
    together = threading.Barrier(4)

    def run(_):
        together.wait()
        return make(source, tmp_path / "out")

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert os.listdir(tmp_path / "out") == [results[0].path.name]
    assert all(same(result, make(source, tmp_path / "alone")) for result in results)


def test_losing_the_race_uses_the_winners_folder(source, tmp_path, monkeypatch):
    module = sys.modules["fastlm.data.dataset"]
    build = module._build

    def slow_build(folder, *args):
        build(folder, *args)
        monkeypatch.setattr(module, "_build", build)
        make(source, tmp_path / "out")  # the other process, faster

    monkeypatch.setattr(module, "_build", slow_build)
    data = make(source, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [data.path.name]


def test_killed_in_the_middle(source, tmp_path):
    script = (
        "import os, signal, sys; import fastlm.data; module = sys.modules['fastlm.data.dataset']\n"
        "write = module.TokenFile.write\n"
        "def die(path, *args):\n"
        "    write(path, *args)\n"
        "    if path.name == 'val.bin': os.kill(os.getpid(), signal.SIGKILL)\n"
        "module.TokenFile.write = die\n"
        "fastlm.data.prepare(sys.argv[1], sys.argv[2], vocab_size=300)"
    )
    out = tmp_path / "out"
    child = subprocess.run([sys.executable, "-c", script, str(source), str(out)])
    assert child.returncode == -signal.SIGKILL
    (litter,) = out.iterdir()
    assert litter.name.startswith(".tmp-")
    data = make(source, out)
    assert same(data, make(source, tmp_path / "alone"))
    assert litter.exists(), "it could be a run at work"

    shutil.rmtree(data.path)
    os.utime(litter, (0, 0))
    data = make(source, out)
    assert list(out.iterdir()) == [data.path]


def test_ngram_is_computed_once(source, tmp_path, monkeypatch):
    data = make(source, tmp_path / "out")
    corpus = load_corpus(source)
    value = data.ngram_bits_per_byte(3)
    assert value == pytest.approx(ngram_bits_per_byte(corpus.train, corpus.val, 3))
    assert same(Dataset.open(data.path), data)
    monkeypatch.setattr("fastlm.data.dataset.ngram_bits_per_byte", lambda *a: pytest.fail("computed again"))
    assert Dataset.open(data.path).ngram_bits_per_byte(3) == value


def test_ngram_survives_a_full_disk_and_a_damaged_file(source, tmp_path, full_disk):
    data = make(source, tmp_path / "out")
    value = data.ngram_bits_per_byte(2)
    (data.path / "ngram2.json").write_text("{")
    full_disk.count, full_disk.fail_at = 0, 1
    assert data.ngram_bits_per_byte(2) == value
    full_disk.fail_at = None
    assert (data.path / "ngram2.json").read_text() == "{"
    assert data.ngram_bits_per_byte(2) == value
    assert json.loads((data.path / "ngram2.json").read_text())["bits_per_byte"] == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "word"}, "tokenizer must be 'bpe' or 'byte', got 'word'"),
        ({"tokenizer": "byte", "vocab_size": 300}, "the byte tokenizer has vocab_size 257, got 300"),
        ({"vocab_size": 10}, "vocab_size must be an int in 257"),
    ],
)
def test_bad_settings(source, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_a_missing_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set at"):
        Dataset.open(tmp_path / "none")


def test_an_output_that_is_a_file(source, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError, match="no folder can be made in"):
        make(source, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_without_numpy():
    script = (
        "import sys; sys.modules['numpy'] = None\n"
        "try: import fastlm.data\n"
        "except ModuleNotFoundError as error: sys.exit(0 if \"pip install 'fastlm[train]'\" in str(error) else 1)\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
