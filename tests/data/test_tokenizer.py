"""Tokenizers lose nothing, repeat themselves exactly, and refuse files that are not theirs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastlm.data import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from fastlm.data import tokenizer as module

TEXT = (Path(module.__file__).read_text(encoding="utf-8") + "Ein süßer Öltänzer übt: 1234567 Mal, 你好 🙂\n") * 2
BPE = BPETokenizer.train([TEXT], 600)
BYTES = ByteTokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
ANY_TEXT = st.text()  # that is, of all characters but lone surrogates, which have no UTF-8 form


@BOTH
def test_protocol(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.eot == tokenizer.vocab_size - 1
    assert tokenizer.dtype == np.uint16


@BOTH
@given(text=ANY_TEXT)
@example(text="")
@example(text="<|endoftext|>\x00\r\n\t  \u2028 e\u0301 🙂\U0010ffff")
@example(text="def f(x):\n\n        return  x\n    \n")
def test_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == tokenizer.dtype and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids


@BOTH
@given(texts=st.lists(ANY_TEXT))
def test_documents_are_the_texts_between_separators(tokenizer, texts):
    stream = tokenizer.encode_documents(texts)
    assert stream[0] == tokenizer.eot and stream[-1] == tokenizer.eot
    ends = np.flatnonzero(stream == tokenizer.eot)
    parts = [stream[a + 1 : b] for a, b in itertools.pairwise(ends)]
    assert [tokenizer.decode(part) for part in parts] == texts
    assert all(np.array_equal(part, tokenizer.encode(text)) for part, text in zip(parts, texts, strict=True))


@BOTH
def test_long_texts_are_chunked_without_loss(tokenizer, monkeypatch):
    whole = tokenizer.encode(TEXT)
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 100)
    lines = tokenizer.encode(TEXT)
    assert tokenizer.decode(lines) == TEXT
    assert len(whole) <= len(lines) < 1.2 * len(whole)
    assert tokenizer.decode(tokenizer.encode("x" * 1050)) == "x" * 1050  # no line end to cut at


def test_bpe_is_shorter_than_bytes():
    assert BPE.vocab_size == 600
    assert len(BPE.encode(TEXT)) < 0.5 * len(BYTES.encode(TEXT))


def test_a_poor_text_gives_a_smaller_vocabulary():
    tokenizer = BPETokenizer.train(["abc"], 5000)
    assert tokenizer.vocab_size == 257
    assert tokenizer.decode(tokenizer.encode("zebra Ω")) == "zebra Ω"


def test_large_vocabularies_use_four_bytes():
    assert module._ByteLevel([b"x"] * 65535).dtype == np.uint16
    assert module._ByteLevel([b"x"] * 65536).dtype == np.uint32


@BOTH
def test_decoding_half_a_character_and_the_separator(tokenizer):
    ids = [int(i) for b in "é".encode()[:1] for i in [tokenizer._id_to_bytes.index(bytes([b]))]]
    assert tokenizer.decode(ids) == "\ufffd"
    assert tokenizer.decode_bytes(ids) == b"\xc3"
    assert tokenizer.decode([tokenizer.eot]) == ""


@BOTH
@pytest.mark.parametrize("ids", [[-1], [10**6]])
def test_decoding_an_unknown_id(tokenizer, ids):
    with pytest.raises(ValueError, match=rf"ids must be in 0 \.\. {tokenizer.vocab_size - 1}, got {ids[0]}"):
        tokenizer.decode(ids)


@BOTH
def test_text_that_cannot_be_utf8(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800"):
        tokenizer.encode("a\ud800")
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        tokenizer.encode(b"a")
    with pytest.raises(TypeError, match="texts must be a sequence of str, got one str"):
        tokenizer.encode_documents("abc")
    with pytest.raises(TypeError, match="texts must be an iterable of str, got one str"):
        BPETokenizer.train("abc", 300)


@pytest.mark.parametrize("size", [256, 0, 4096.0, "4096"])
def test_bad_vocab_size(size):
    with pytest.raises(ValueError, match="vocab_size must be an int in 257"):
        BPETokenizer.train([TEXT], size)


# -- files


@BOTH
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    loaded = load_tokenizer(tmp_path / "t.json")
    assert type(loaded) is type(tokenizer) and loaded.vocab_size == tokenizer.vocab_size
    assert np.array_equal(loaded.encode(TEXT), tokenizer.encode(TEXT))
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "t.json").read_bytes()


def test_training_is_deterministic_across_processes(tmp_path):
    script = (
        "import sys; from pathlib import Path; from fastlm.data import BPETokenizer\n"
        "text = Path(sys.argv[1]).read_text(encoding='utf-8')\n"
        "BPETokenizer.train([text, text.upper()], 900).save(sys.argv[2])"
    )
    source = Path(module.__file__)
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "there.json")]
    subprocess.run(command, check=True, env=environment)
    text = source.read_text(encoding="utf-8")
    for _ in range(3):
        BPETokenizer.train([text, text.upper()], 900).save(tmp_path / "here.json")
        assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


@BOTH
def test_corrupted_files_get_a_sentence(tokenizer, tmp_path):
    file = tmp_path / "t.json"
    tokenizer.save(file)
    good = file.read_bytes()
    content = json.loads(good)
    bad = {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "binary": b"\xff\xfe\x00",
        "another": b'{"model": 1}',
        "a list": b"[]",
        "altered": json.dumps({**content, "vocab_size": 77}).encode(),
        "newer": json.dumps({**content, "version": 99}).encode(),
        "no checksum": json.dumps({k: v for k, v in content.items() if k != "sha256"}).encode(),
    }
    for name, data in bad.items():
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"t.json (is|has|holds)"):
            load_tokenizer(file)
            pytest.fail(f"a file that is {name} was accepted")
    with pytest.raises(FileNotFoundError, match="no tokenizer file at"):
        load_tokenizer(tmp_path / "none.json")


def test_every_altered_byte_is_noticed_or_harmless(tmp_path):
    file = tmp_path / "t.json"
    BPE.save(file)
    good = file.read_bytes()
    want = BPE.encode(TEXT).tobytes()
    for position in np.random.default_rng(0).integers(0, len(good), 60):
        data = bytearray(good)
        data[position] ^= 1
        file.write_bytes(data)
        try:
            assert load_tokenizer(file).encode(TEXT).tobytes() == want  # white space between JSON values
        except ValueError as error:
            assert str(file) in str(error)


@BOTH
def test_a_full_disk_leaves_the_old_file(tokenizer, tmp_path, full_disk):
    file = tmp_path / "t.json"
    ByteTokenizer().save(file)
    before = file.read_bytes()
    full = tmp_path / "wanted.json"
    tokenizer.save(full)
    wanted = full.read_bytes()
    full.unlink()
    failures = 0
    for _, error in full_disk.each_failure(lambda: tokenizer.save(file)):
        failures += 1
        assert "t.json could not be written: No space left on device" in str(error)
        assert file.read_bytes() in (before, wanted)  # after the rename only the directory's own flush can fail
        assert os.listdir(tmp_path) == ["t.json"], "the temporary file was left behind"
    assert failures >= 4
    assert file.read_bytes() == wanted


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastlm\[train\]'"):
        BPETokenizer.train([TEXT], 300)
