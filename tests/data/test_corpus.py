"""Reading, cleaning, splitting: what goes, what stays, what is counted, and what is refused."""

from __future__ import annotations

import itertools
import os
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastlm.data import CleaningReport, clean_text, load_corpus
from fastlm.data.corpus import _stdlib_files

WORDS = [left + right for left in "bdfgklmnprst" for right in ("a", "e", "i", "o", "u", "ar", "en")]


def prose(seed: int, words: int = 400) -> str:
    choose = random.Random(seed)
    return " ".join(choose.choice(WORDS) + str(choose.randrange(1000)) for _ in range(words)) + "\n"


def write_many(folder: Path, count: int = 60) -> None:
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(prose(i))


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib")


# -- cleaning


def test_clean_text_counts_what_it_changes():
    report = CleaningReport()
    text = clean_text("\ufeffa\r\nb\rc\x0cd\u2028e\x00f\x1b[0m\tg\x7f\ncafe\u0301 \u212b\n", report)
    assert text == "a\nb\nc\nd\nef[0m\tg\ncaf\u00e9 \u00c5\n"
    assert report.newlines_normalised == 4
    assert report.control_characters_removed == 4  # NUL, ESC, DEL and the byte order mark
    assert report.lines_recomposed == 1


@given(st.text())
@example("\ufeff\ufeffa")
@example("\x00\ufeffa\r\x01\n\n\u0344")
def test_clean_text_is_idempotent_and_clean(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in once)
    assert clean_text(text.replace("\n", "\r\n")) == clean_text(text)


def test_report_reads_as_numbers(tmp_path):
    write_many(tmp_path)
    (tmp_path / "copy.txt").write_text(prose(0))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "note.txt").write_text(prose(99))
    (tmp_path / "linked").symlink_to(tmp_path / ".git")
    report = load_corpus(tmp_path).report
    assert (report.files_found, report.files_excluded, report.files_empty, report.exact_duplicates) == (65, 3, 1, 1)
    assert report.train_documents + report.val_documents == 60
    assert "1 exact duplicates" in str(report) and f"{report.val_bytes:,} bytes" in str(report)


# -- splitting


def test_split_follows_content_and_not_names_or_place(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), (second / "deep").mkdir(parents=True)
    write_many(first)
    for i in range(60):
        (second / "deep" / f"{i:03}-renamed.md").write_text(prose(i))
    one, two = load_corpus(first), load_corpus(second)
    assert one.val == two.val and one.train == two.train and one.sha256 == two.sha256
    assert not set(one.val) & set(one.train)
    assert sorted(one.val + one.train) == sorted(prose(i) for i in range(60))
    assert 0.02 <= one.report.val_bytes / (one.report.val_bytes + one.report.train_bytes) <= 0.3

    (second / "deep" / "more.md").write_text(prose(1000))
    three = load_corpus(second)
    assert set(one.val) <= set(three.val), "a new file must not move the others"
    assert three.sha256 != one.sha256


def test_split_and_hash_are_the_same_everywhere(tmp_path):
    """Pinned: two machines, or two releases, must hold out the same text and agree on its hash."""
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i}: {i * 7919 % 997}\n" * 9)
    corpus = load_corpus(tmp_path)
    assert [int(text.split()[1][:-1]) for text in corpus.val] == [15, 16, 18, 20, 34, 43, 45, 50, 54, 56, 59]
    assert corpus.sha256 == "de9ca91465c78520627cd14646e48a7dc857b97a506053591822272d904ef25d"


def test_a_single_file_holds_out_its_last_tenth_of_characters(tmp_path):
    file = tmp_path / "play.anything"
    text = "äöü\n" * 250
    file.write_text(text, encoding="utf-8")
    corpus = load_corpus(file)
    assert corpus.train == (text[:900],) and corpus.val == (text[900:],)
    assert corpus.report.val_bytes == 175 and corpus.report.train_bytes == 1575


def test_few_files_hold_out_the_end_of_each(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(prose(i))
    corpus = load_corpus(tmp_path)
    if corpus.report.split == "the last tenth of each file":
        assert [train + val for train, val in zip(corpus.train, corpus.val, strict=True)] == [
            prose(i) for i in range(3)
        ]
    share = corpus.report.val_bytes / (corpus.report.val_bytes + corpus.report.train_bytes)
    assert 0.02 <= share <= 0.3


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_no_text_is_lost_by_splitting(tmp_path_factory, count, seed):
    folder = tmp_path_factory.mktemp("split")
    texts = [prose(seed + i, 30 + i) for i in range(count)]
    for i, text in enumerate(texts):
        (folder / f"{i:02}.txt").write_text(text)
    corpus = load_corpus(folder)
    assert corpus.train and corpus.val
    assert sum(map(len, corpus.train + corpus.val)) == sum(map(len, texts))
    assert corpus.report.train_bytes == sum(len(t.encode()) for t in corpus.train)


def test_lines_seen_in_training_are_counted(tmp_path):
    line = "a line of twenty-four chr"
    (tmp_path / "x.txt").write_text((line + "\n") * 100)
    report = load_corpus(tmp_path / "x.txt").report
    assert report.val_bytes_seen == report.val_bytes == 260


# -- the standard library


def test_stdlib_has_no_tests_tables_or_copies(stdlib):
    import encodings.cp1252
    import inspect
    import json.decoder

    everything = set(stdlib.train + stdlib.val)
    assert clean_text(inspect.getsource(encodings.cp1252)) not in everything
    assert clean_text(Path(json.decoder.__file__).read_text(encoding="utf-8")) in everything
    assert len(everything) == len(stdlib.train + stdlib.val)
    assert stdlib.report.train_bytes > 3_000_000
    assert 0.05 < stdlib.report.val_bytes / stdlib.report.train_bytes < 0.2
    assert stdlib.report.val_bytes_seen < 0.12 * stdlib.report.val_bytes


def test_stdlib_exclusions(tmp_path):
    keep = ["os.py", "json/decoder.py"]
    drop = [
        "test/test_os.py",
        "idlelib/idle_test/test_run.py",
        "lib2to3/tests/test_all.py",
        "site-packages/torch/nn.py",
        "dist-packages/apt/cache.py",
        "encodings/cp437.py",
        "pydoc_data/topics.py",
        "__phello__/spam.py",
        "__hello__.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "__pycache__/os.cpython-311.pyc",
        "LICENSE.txt",
    ]
    for name in keep + drop:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in _stdlib_files(tmp_path, CleaningReport())]
    assert sorted(found) == sorted(keep)


def test_stdlib_near_duplicates_and_undecodable_files_go(tmp_path, monkeypatch):
    originals = [prose(i).replace(" ", "\n") for i in range(60)]
    originals = ["".join(f"{a} stands before {b}\n" for a, b in itertools.pairwise(t.split())) for t in originals]
    for i, text in enumerate(originals):
        (tmp_path / f"{i:03}.py").write_text(text)
    lines = originals[7].splitlines()
    (tmp_path / "copy.py").write_text("\n".join([*lines[:300], *(f"# another line, number {i}" for i in range(99))]))
    (tmp_path / "half.py").write_text("\n".join([*lines[:200], *(f"# another line, number {i}" for i in range(200))]))
    (tmp_path / "latin.py").write_bytes(b"# \xe9\xe8 caf\xe9")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    corpus = load_corpus("stdlib")
    assert corpus.report.near_duplicates == 1 and corpus.report.files_not_utf8 == 1
    assert set(corpus.train + corpus.val) == {*originals, (tmp_path / "half.py").read_text()}


def test_a_python_without_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(FileNotFoundError, match=r"no library sources in .*python311.zip"):
        load_corpus("stdlib")


# -- refusals


def test_a_missing_path(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere.txt does not exist; expected 'stdlib', a text file or a directory"
    ):
        load_corpus(tmp_path / "nowhere.txt")


def test_an_empty_file(tmp_path):
    (tmp_path / "void.txt").touch()
    with pytest.raises(ValueError, match=r"void.txt is empty"):
        load_corpus(tmp_path / "void.txt")


@pytest.mark.parametrize("inside_directory", [False, True])
def test_not_utf8_names_file_and_offset(tmp_path, inside_directory):
    (tmp_path / "latin.txt").write_bytes(b"caf" + "é".encode("latin-1") + b" au lait")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 3 "):
        load_corpus(tmp_path if inside_directory else tmp_path / "latin.txt")


@pytest.mark.parametrize("source", ["stdlib", "folder"])
def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch, source):
    write_many(tmp_path)
    (tmp_path / "closed").mkdir()

    def scandir(path, real=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(PermissionError, match=r"the folder .*closed cannot be read: Permission denied"):
        load_corpus("stdlib" if source == "stdlib" else tmp_path)


def test_nothing_left(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\x00\x01 \r\n\x02")
    (tmp_path / "b.txt").touch()
    with pytest.raises(ValueError, match=r"nothing is left of .* after cleaning"):
        load_corpus(tmp_path)


def test_too_small(tmp_path):
    (tmp_path / "a.txt").write_text("short\n")
    with pytest.raises(ValueError, match=r"too small to split .*: 6 characters after cleaning, expected at least 100"):
        load_corpus(tmp_path / "a.txt")


def test_a_directory_without_text(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="holds no text files"):
        load_corpus(tmp_path)


def test_tinyshakespeare_splits_as_published():
    folder = os.environ.get("FASTLM_DATA_DIR")
    path = Path(folder or ".", "tinyshakespeare.txt")
    if not folder or not path.exists():
        pytest.skip("FASTLM_DATA_DIR names no folder with tinyshakespeare.txt")
    report = load_corpus(path).report
    assert (report.train_bytes, report.val_bytes) == (1003854, 111540)
