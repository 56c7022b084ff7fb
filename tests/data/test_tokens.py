"""Token files, training batches, and the walk over the held-out split."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data import TokenFile, bits_per_byte, get_batch, iterate_all
from fastlm.data.tokens import _mix

# -- files


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65536, "<u2"), (65537, "<u4"), (2**32, "<u4")])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_round_trip(tmp_path, vocab_size, dtype, count):
    ids = np.random.default_rng(0).integers(0, vocab_size, count, dtype=np.uint64)
    TokenFile.write(tmp_path / "t.bin", ids, vocab_size)
    opened = TokenFile.open(tmp_path / "t.bin", verify=True)
    assert opened.vocab_size == vocab_size and opened.tokens.dtype == dtype
    assert np.array_equal(opened.tokens, ids)
    assert not opened.tokens.flags.writeable


def test_refuses_what_it_cannot_hold(tmp_path):
    for bad in (np.zeros((2, 2), np.int64), np.zeros(3)):
        with pytest.raises(ValueError, match="1-d array of integers"):
            TokenFile.write(tmp_path / "t.bin", bad, 10)
    for bad in ([0, 10], [-1, 3]):
        with pytest.raises(ValueError, match=r"tokens must be in 0 \.\. 9, got"):
            TokenFile.write(tmp_path / "t.bin", np.array(bad), 10)
    with pytest.raises(ValueError, match="vocab_size"):
        TokenFile.write(tmp_path / "t.bin", np.array([0]), 0)
    assert not list(tmp_path.iterdir())


def test_every_truncation_and_every_altered_byte_is_noticed(tmp_path):
    file = tmp_path / "t.bin"
    TokenFile.write(file, np.arange(40), 300)
    good = file.read_bytes()
    for length in range(len(good)):
        file.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"t.bin is (truncated|not a token file)"):
            TokenFile.open(file)
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 0x10
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"t.bin (is (corrupted|truncated|not a token)|has token file format)"):
            TokenFile.open(file, verify=True)
    file.write_bytes(good + b"\0")
    with pytest.raises(ValueError, match="40 tokens take 144 bytes, it has 145"):
        TokenFile.open(file)
    with pytest.raises(FileNotFoundError, match="no token file at"):
        TokenFile.open(tmp_path / "none.bin")


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr("fastlm.data.files._PIECE_BYTES", 64)  # many writes
    file = tmp_path / "t.bin"
    old, new = np.arange(50), np.arange(200)
    TokenFile.write(file, old, 300)
    failures = 0
    for _, error in full_disk.each_failure(lambda: TokenFile.write(file, new, 300)):
        failures += 1
        assert "t.bin could not be written: No space left on device" in str(error)
        tokens = TokenFile.open(file, verify=True).tokens
        assert np.array_equal(tokens, old) or np.array_equal(tokens, new)
        assert os.listdir(tmp_path) == ["t.bin"], "the temporary file was left behind"
    assert failures >= 10
    assert np.array_equal(TokenFile.open(file).tokens, new)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files the POSIX way")
def test_a_limit_of_the_system_leaves_the_old_file(tmp_path):
    """As above with nothing simulated: the kernel refuses each file from a size on."""
    script = (
        "import resource, signal, sys; import numpy as np; from fastlm.data import TokenFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); failed = 0\n"
        "for limit in [0, 1, 63, 64, 65, 1000, 2063]:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "    try: TokenFile.write(sys.argv[1], np.arange(1000), 1000)\n"
        "    except OSError: failed += 1\n"
        "sys.stdout.write(str(failed)) if failed == 7 else sys.exit(1)"
    )
    file = tmp_path / "t.bin"
    TokenFile.write(file, np.arange(50), 300)
    subprocess.run([sys.executable, "-c", script, str(file)], check=True, stdout=subprocess.DEVNULL)
    assert np.array_equal(TokenFile.open(file, verify=True).tokens, np.arange(50))
    assert os.listdir(tmp_path) == ["t.bin"]


# -- training batches

SIZES = st.tuples(st.integers(2, 400), st.integers(1, 40)).filter(lambda pair: pair[0] > pair[1])


@given(SIZES, st.integers(0, 2**70), st.integers(0, 10**6), st.integers(1, 9))
def test_batch_is_text_and_its_next_token(sizes, seed, step, batch_size):
    count, block_size = sizes
    tokens = np.arange(count, dtype=np.uint16)
    x, y = get_batch(tokens, seed=seed, step=step, batch_size=batch_size, block_size=block_size)
    assert x.shape == y.shape == (batch_size, block_size) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(block_size))
    assert int(y.max()) < count


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 500)), min_size=2, max_size=12), st.randoms())
def test_batch_has_no_history(calls, shuffler):
    tokens = np.arange(3000, dtype=np.uint16)

    def batch(seed, step):
        return get_batch(tokens, seed=seed, step=step, batch_size=4, block_size=64)[0].numpy().tobytes()

    first = {call: batch(*call) for call in calls}
    shuffler.shuffle(calls)
    assert {call: batch(*call) for call in calls} == first


def test_batch_is_the_same_everywhere():
    """Pinned: a change of platform, numpy or torch that moved these would break every resumed run."""
    x, _ = get_batch(np.arange(10_000), seed=1234, step=7, batch_size=4, block_size=32)
    assert x[:, 0].tolist() == [3981, 7917, 2477, 2445]
    # SplitMix64 from state 1234567, as published with the reference implementation's test values.
    gamma = np.uint64(0x9E3779B97F4A7C15)
    states = np.uint64(1234567) + gamma * np.arange(3, dtype=np.uint64)
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(0, 5), st.integers(1, 7))
def test_an_epoch_takes_each_window_once(seed, batch_size):
    count, block_size = 1000, 16
    windows = (count - 1) // block_size - 1
    steps = -(-2 * windows // batch_size)
    rows = torch.cat(
        [
            get_batch(np.arange(count), seed=seed, step=step, batch_size=batch_size, block_size=block_size)[0][:, 0]
            for step in range(steps)
        ]
    ).tolist()
    for epoch in range(2):
        starts = sorted(rows[epoch * windows : (epoch + 1) * windows])
        assert [b - a for a, b in itertools.pairwise(starts)] == [block_size] * (windows - 1)
    assert rows[:windows] != sorted(rows[:windows]), "not shuffled"
    assert rows[:windows] != rows[windows : 2 * windows], "both epochs alike"


def test_epochs_cut_at_different_places():
    firsts = {
        min(
            int(get_batch(np.arange(1000), seed=0, step=e * 61 + i, batch_size=1, block_size=16)[0][0, 0])
            for i in range(61)
        )
        for e in range(40)
    }
    assert len(firsts) > 12


@given(st.integers(1, 6), st.integers(0, 50))
def test_micro_steps_split_the_same_step(micro_steps, step):
    tokens = np.arange(5000)
    whole = get_batch(tokens, seed=3, step=step, batch_size=2 * micro_steps, block_size=32)
    parts = [
        get_batch(tokens, seed=3, step=step, batch_size=2, block_size=32, micro_step=i, micro_steps=micro_steps)
        for i in range(micro_steps)
    ]
    for k in (0, 1):
        assert torch.equal(whole[k], torch.cat([part[k] for part in parts]))


def test_seeds_and_steps_differ():
    tokens = np.arange(100_000)
    seen = {
        tuple(get_batch(tokens, seed=seed, step=step, batch_size=2, block_size=8)[0][:, 0].tolist())
        for seed in range(10)
        for step in range(10)
    }
    assert len(seen) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"block_size": 100}, "block_size must be less than the number of tokens, 100, got 100"),
        ({"micro_step": 1}, r"micro_step must be in 0 \.\. micro_steps - 1 = 0, got 1"),
        ({"micro_step": -1, "micro_steps": 2}, "micro_step must be in"),
    ],
)
def test_bad_batches(change, message):
    arguments = {"seed": 0, "step": 0, "batch_size": 2, "block_size": 10, **change}
    with pytest.raises(ValueError, match=message):
        get_batch(np.arange(100), **arguments)


@pytest.mark.parametrize("name", ["seed", "step", "batch_size", "block_size"])
def test_fractions_are_not_rounded(name):
    arguments = {"seed": 0, "step": 0, "batch_size": 2, "block_size": 10, name: 2.5}
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 2.5"):
        get_batch(np.arange(100), **arguments)


@pytest.mark.parametrize("tokens", [[1, 2, 3], np.zeros((2, 3), int), np.zeros(9), torch.arange(9)])
def test_bad_streams(tokens):
    with pytest.raises(TypeError, match="1-d numpy array of integers"):
        get_batch(tokens, seed=0, step=0, batch_size=1, block_size=1)
    with pytest.raises(TypeError, match="1-d numpy array of integers"):
        iterate_all(tokens, 1, 1)


# -- the whole held-out split


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 7))
def test_each_token_after_the_first_is_a_target_once(count, block_size, batch_size):
    tokens = np.arange(count, dtype=np.uint16)
    targets = []
    for x, y in iterate_all(tokens, block_size, batch_size):
        assert x.shape == y.shape and x.dtype == y.dtype == torch.int64
        assert 1 <= x.shape[0] <= batch_size and 1 <= x.shape[1] <= block_size
        assert torch.equal(y, x + 1)
        targets += y.flatten().tolist()
    assert targets == list(range(1, count))


def test_bad_sizes():
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            iterate_all(np.arange(10), *sizes)


def test_bits_per_byte_of_a_uniform_guess():
    tokens = np.arange(100) % 7
    nats = sum(y.numel() * math.log(7) for _, y in iterate_all(tokens, 8, 2))
    assert bits_per_byte(nats, 50) == pytest.approx(99 * math.log2(7) / 50)
    with pytest.raises(ValueError, match="total_bytes must be at least 1"):
        bits_per_byte(1.0, 0)
