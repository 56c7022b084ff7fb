"""The n-gram baseline gives probabilities that sum to one, and the figure that its formula says."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import NGramModel, load_corpus, ngram, ngram_bits_per_byte

TEXT = Path(ngram.__file__).read_text(encoding="utf-8")
DOCUMENTS = st.lists(st.text("ab \u00e9", max_size=40), min_size=1, max_size=4).filter(any)


def spelled_out(documents, context, order):
    """The recursion of the module's docstring for one context, with dictionaries."""
    stream = [256] * (order - 1) + [s for d in documents for s in [*d.encode(), 256]]
    counts = Counter(tuple(stream[i : i + order]) for i in range(len(stream) - order + 1))
    p = np.full(257, 1 / 257)
    levels = [counts]
    for _ in range(order - 1):
        counts = Counter(gram[1:] for gram in counts)
        levels.append(counts)
    for k, counts in enumerate(reversed(levels), start=1):
        of = Counter(counts.values())
        if of[1] and of[2] and of[3]:
            y = of[1] / (of[1] + 2 * of[2])
            raw = [1 - 2 * y * of[2] / of[1], 2 - 3 * y * of[3] / of[2], 3 - 4 * y * of[4] / of[3]]
            discounts = [min(max(d, 0.05), i) for i, d in enumerate(raw, start=1)]
        else:
            discounts = [0.5] * 3
        followers = defaultdict(int)
        for gram, count in counts.items():
            if k == 1 or gram[:-1] == tuple(context[-(k - 1) :]):
                followers[gram[-1]] = count
        total = sum(followers.values())
        if not total:
            continue
        taken = {w: discounts[min(c, 3) - 1] for w, c in followers.items()}
        p = p * sum(min(taken[w], followers[w]) for w in followers) / total
        for w, c in followers.items():
            p[w] += max(c - taken[w], 0) / total
    return p


@settings(max_examples=60)
@given(DOCUMENTS, st.binary(max_size=6), st.integers(1, 7))
def test_sums_to_one(documents, context, order):
    p = NGramModel(documents, order).probabilities(context)
    assert p.shape == (257,) and (p > 0).all()
    assert p.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7])
def test_sums_to_one_on_text(order):
    model = NGramModel([TEXT, TEXT.upper()], order)
    for context in (b"", b"ngram", b"def ", b"\xff\x00qz", TEXT[1000:1010].encode()):
        assert model.probabilities(context).sum() == pytest.approx(1, abs=1e-12)


@settings(max_examples=60)
@given(DOCUMENTS, st.text("ab \u00e9", min_size=6), st.integers(1, 5))
def test_is_the_published_recursion(documents, context, order):
    symbols = [*context.encode()]
    got = NGramModel(documents, order).probabilities(symbols)
    np.testing.assert_allclose(got, spelled_out(documents, symbols, order), rtol=1e-9)


def test_is_the_published_recursion_on_text():
    documents = [TEXT[:3000], TEXT[3000:]]
    model = NGramModel(documents, 4)
    for start in range(0, 3000, 300):
        context = [*TEXT[start : start + 3].encode()]
        np.testing.assert_allclose(model.probabilities(context), spelled_out(documents, context, 4), rtol=1e-9)


def test_bits_are_the_probabilities_of_each_symbol():
    """Of the bytes and of each document's end; the next document's first contexts hold that end."""
    train, val = [TEXT[:4000], "another one"], ["some words", "some", "é"]
    model = NGramModel(train, 3)
    stream = [256, 256] + [symbol for document in val for symbol in [*document.encode(), 256]]
    total = -sum(math.log2(model.probabilities(stream[i - 2 : i])[stream[i]]) for i in range(2, len(stream)))
    assert ngram_bits_per_byte(train, val, 3) == pytest.approx(total / sum(len(d.encode()) for d in val))
    first = -sum(math.log2(model.probabilities(stream[2:i])[stream[i]]) for i in range(2, 3 + len(val[0])))
    assert model.bits(val[0]) == pytest.approx(first)


def test_noise_costs_eight_bits_and_repetition_little():
    noise = np.random.default_rng(0).integers(0, 256, 400_000, dtype=np.uint8).tobytes()
    # A model cannot win on noise; a sound one loses little.
    assert 8 <= ngram_bits_per_byte([noise[:300_000]], [noise[300_000:]]) < 8.2
    assert ngram_bits_per_byte(["abcdefgh" * 2000], ["abcdefgh" * 200]) < 0.02


def test_longer_contexts_help_on_text():
    half = len(TEXT) // 2
    figures = [ngram_bits_per_byte([TEXT[:half]], [TEXT[half:]], order) for order in (1, 2, 3)]
    assert figures[0] > figures[1] > figures[2]


def test_str_and_bytes_are_the_same():
    assert ngram_bits_per_byte(["ä" * 50], ["ä"]) == ngram_bits_per_byte(["ä".encode() * 50], ["ä".encode()])


def test_refusals():
    with pytest.raises(ValueError, match=r"order must be in 1 \.\. 7, got 8"):
        ngram_bits_per_byte(["abc"], ["abc"], 8)
    with pytest.raises(ValueError, match="documents must hold at least one byte"):
        ngram_bits_per_byte([], ["abc"])
    with pytest.raises(ValueError, match="val_docs must hold at least one byte"):
        ngram_bits_per_byte(["abc"], [""])
    with pytest.raises(TypeError, match="a sequence of texts, got one str"):
        NGramModel("abc")


def test_tinyshakespeare_beats_the_published_five_gram():
    folder = os.environ.get("FASTLM_DATA_DIR")
    path = Path(folder or ".", "tinyshakespeare.txt")
    if not folder or not path.exists():
        pytest.skip("FASTLM_DATA_DIR names no folder with tinyshakespeare.txt")
    corpus = load_corpus(path)
    # 1.67 nats per character for a plainly smoothed 5-gram on this split.
    assert 1.4 < ngram_bits_per_byte(corpus.train, corpus.val) * math.log(2) < 1.67
