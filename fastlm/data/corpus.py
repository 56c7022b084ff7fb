"""Text in: reading, cleaning and splitting a corpus.

A corpus is a list of documents (files), each cleaned, without exact duplicates, split into a training and a held-out
part by the documents' content alone, so that two machines with the same files hold out the same text. Everything that
cleaning did is counted in a `CleaningReport`. Sizes are in bytes of the cleaned text as UTF-8; held-out figures
("bits per byte") are measured against these bytes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sysconfig
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = 0.1  # share of the documents, or of each document's characters, that is held out
MIN_CHARACTERS = 100  # below it a tenth is no longer a text

# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".mdx", ".markdown", ".rst", ".adoc", ".org", ".tex", ".bib", ".srt", ".csv", ".tsv",
    ".json", ".jsonl", ".xml", ".html", ".htm", ".css", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".sh", ".sql",
    ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt",
    ".scala", ".swift", ".js", ".jsx", ".ts", ".tsx", ".php", ".pl", ".rb", ".lua", ".r", ".jl",
})
# fmt: on

# What the standard library's own text does not include. Tests repeat what they test. The codecs in `encodings` are a
# few templates filled in a hundred times: held out, they would measure memory of the copies in the training part.
# `pydoc_data` is the language manual packed into string literals, `_sysconfigdata*` and `config-*` are dumps of the
# build machine, `__hello__` and `__phello__` are the same three lines over and over.
_STDLIB_EXCLUDED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__phello__"}
)
_STDLIB_EXCLUDED_FILES = re.compile(r"^(_sysconfigdata.*|__hello__|sitecustomize|usercustomize)\.py$")
# A file is a near-duplicate if this share of its distinct lines stands in one other file.
_NEAR_DUPLICATE_SHARE = 0.7
_TELLING_CHARACTERS = 12  # shorter lines ("else:", "return") are common to unrelated files
_SEEN_CHARACTERS = 20  # from this length on, a held-out line that training has too is counted in the report

# All that ends a line or a page in Unicode (The Unicode Standard, section 5.8): CRLF, CR, VT, FF, NEL, LS, PS.
_NEWLINE = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # what is then left of C0, DEL and C1, but tab and line feed


@dataclass
class CleaningReport:
    """What became of the source, in numbers."""

    source: str = ""
    files_found: int = 0  # files looked at
    files_excluded: int = 0  # other kinds of file, links to folders, or left out by rule
    files_not_utf8: int = 0  # of the standard library only; in one's own files this is an error
    files_empty: int = 0  # nothing in them, or nothing left
    exact_duplicates: int = 0
    near_duplicates: int = 0
    bytes_read: int = 0  # of the files that were read
    newlines_normalised: int = 0  # CRLF, CR, VT, FF, NEL, LS, PS -> LF
    control_characters_removed: int = 0  # C0 but tab and line feed, DEL, C1; byte order marks
    lines_recomposed: int = 0  # lines that Unicode NFC changed
    split: str = ""  # the rule that was used
    train_documents: int = 0
    train_bytes: int = 0
    val_documents: int = 0
    val_bytes: int = 0
    val_bytes_seen: int = 0  # in lines (20 characters or more) that stand in the training part as well

    def __str__(self) -> str:
        total = self.train_bytes + self.val_bytes
        share = 100 * self.val_bytes / max(total, 1)
        seen = 100 * self.val_bytes_seen / max(self.val_bytes, 1)
        rows = [
            f"corpus    {self.source}: {self.files_found:,} files, {self.bytes_read:,} bytes read",
            f"left out  {self.files_excluded:,} by kind or rule, {self.files_empty:,} empty,"
            f" {self.files_not_utf8:,} not UTF-8, {self.exact_duplicates:,} exact duplicates,"
            f" {self.near_duplicates:,} near-duplicates",
            f"cleaned   {self.newlines_normalised:,} line ends, {self.control_characters_removed:,} control characters,"
            f" {self.lines_recomposed:,} lines recomposed (NFC)",
            f"train     {self.train_documents:,} documents, {self.train_bytes:,} bytes",
            f"held out  {self.val_documents:,} documents, {self.val_bytes:,} bytes ({share:.1f} %), {self.split};"
            f" {seen:.1f} % of it in lines that training has too",
        ]
        return "\n".join(rows)


@dataclass(frozen=True)
class Corpus:
    """A cleaned and split corpus."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    sha256: str  # of the documents, their order and their split
    report: CleaningReport


def clean_text(text: str, report: CleaningReport | None = None) -> str:
    """Line ends become LF, control characters but tab and LF and a leading byte order mark go, the rest becomes NFC.

    Idempotent. What was changed is added to `report`.
    """
    report = CleaningReport() if report is None else report
    text, newlines = _NEWLINE.subn("\n", text)
    text, controls = _CONTROL.subn("", text)
    stripped = text.lstrip("\ufeff")
    report.newlines_normalised += newlines
    report.control_characters_removed += controls + len(text) - len(stripped)
    if unicodedata.is_normalized("NFC", stripped):
        return stripped
    # NFC never joins characters across a line feed, so line by line is the same and can be counted.
    lines = stripped.split("\n")
    recomposed = [unicodedata.normalize("NFC", line) for line in lines]
    report.lines_recomposed += sum(before != after for before, after in zip(lines, recomposed, strict=True))
    return "\n".join(recomposed)


def load_corpus(source: str | os.PathLike[str]) -> Corpus:
    """Reads, cleans and splits a corpus.

    source: "stdlib" (the running Python's own library: Python source, without tests, installed packages, generated
        files and near-duplicates), a text file of any suffix, or a directory (files with a suffix of `TEXT_SUFFIXES`,
        hidden and linked directories left out, in the order of their paths).

    The split is 90/10 by the hash of each file's cleaned content; where that would hold out less than 2 % or more than
    30 % of the bytes (a single file, or a few) the last tenth of each file's characters is held out instead.

    Raises FileNotFoundError for a path that does not exist and ValueError for text that cannot be used: not UTF-8,
    empty, nothing left after cleaning, or too small to split. OSError for what cannot be read.
    """
    if source == "stdlib":
        directory = Path(sysconfig.get_path("stdlib"))
        report = CleaningReport(source=f"stdlib of Python {platform.python_version()}")
        if not directory.is_dir():
            raise FileNotFoundError(
                f"fastlm.data: this Python keeps no library sources in {directory}; give a text file or a directory"
            )
        documents = list(_read(_stdlib_files(directory, report), report, skip_undecodable=True))
        documents = _without_near_duplicates(documents, report)
    else:
        path = Path(source)
        report = CleaningReport(source=str(source))
        if path.is_dir():
            files = list(_text_files(path, report))
            if not files:
                raise ValueError(f"fastlm.data: {path} holds no text files (suffixes such as .txt, .md, .py are read)")
        elif path.exists():
            files = [path]
            report.files_found = 1
            if path.is_file() and path.stat().st_size == 0:
                raise ValueError(f"fastlm.data: {path} is empty")
        else:
            raise FileNotFoundError(
                f"fastlm.data: {path} does not exist; expected 'stdlib', a text file or a directory"
            )
        documents = list(_read(files, report))
    if not documents:
        raise ValueError(f"fastlm.data: nothing is left of {source} after cleaning; expected readable text")
    return _split(documents, report)


def _text_files(directory: Path, report: CleaningReport) -> Iterator[Path]:
    for root, names, files in os.walk(directory, onerror=_unreadable):
        names[:] = sorted(name for name in names if not name.startswith(".") and name != "__pycache__")
        links = sum(Path(root, name).is_symlink() for name in names)  # not followed: they may lead in circles
        report.files_found += links
        report.files_excluded += links
        for name in sorted(files):
            report.files_found += 1
            path = Path(root, name)
            if path.suffix.lower() in TEXT_SUFFIXES and path.is_file():  # not a pipe, nor a link to nothing
                yield path
            else:
                report.files_excluded += 1


def _unreadable(error: OSError) -> None:
    raise OSError(error.errno, f"fastlm.data: the folder {error.filename} cannot be read: {error.strerror}") from error


def _stdlib_files(directory: Path, report: CleaningReport) -> Iterator[Path]:
    for root, names, files in os.walk(directory, onerror=_unreadable):
        names[:] = sorted(
            name
            for name in names
            if name not in _STDLIB_EXCLUDED_DIRECTORIES and name != "__pycache__" and not name.startswith("config-")
        )
        for name in sorted(files):
            if not name.endswith(".py"):
                continue
            report.files_found += 1
            if _STDLIB_EXCLUDED_FILES.match(name):
                report.files_excluded += 1
            else:
                yield Path(root, name)


def _read(files, report: CleaningReport, skip_undecodable: bool = False) -> Iterator[str]:
    """The cleaned, distinct, non-empty texts of `files`."""
    seen: set[str] = set()
    for path in files:
        content = path.read_bytes()
        report.bytes_read += len(content)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            if skip_undecodable:
                report.files_not_utf8 += 1
                continue
            raise ValueError(
                f"fastlm.data: {path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}"
                f" ({error.reason}); convert the file to UTF-8 first"
            ) from None
        text = clean_text(text, report)
        if not text.strip():
            report.files_empty += 1
        elif (key := _sha256(text)) in seen:
            report.exact_duplicates += 1
        else:
            seen.add(key)
            yield text


def _without_near_duplicates(documents: list[str], report: CleaningReport) -> list[str]:
    """Drops each document most of whose lines stand in one document before it."""
    kept: list[str] = []
    holders: dict[str, list[int]] = defaultdict(list)  # line -> the kept documents that hold it
    for text in documents:
        lines = {line for line in map(str.strip, text.split("\n")) if len(line) >= _TELLING_CHARACTERS}
        shared = Counter(holder for line in lines for holder in holders.get(line, ()))
        if lines and max(shared.values(), default=0) >= _NEAR_DUPLICATE_SHARE * len(lines):
            report.near_duplicates += 1
            continue
        for line in lines:
            holders[line].append(len(kept))
        kept.append(text)
    return kept


def _split(documents: list[str], report: CleaningReport) -> Corpus:
    total = sum(map(len, documents))
    if total < MIN_CHARACTERS:
        raise ValueError(
            f"fastlm.data: {report.source} is too small to split into training and held-out text:"
            f" {total} characters after cleaning, expected at least {MIN_CHARACTERS}"
        )
    held_out = [int(_sha256(text)[:16], 16) < HELD_OUT * 2**64 for text in documents]
    share = sum(len(text) for text, out in zip(documents, held_out, strict=True) if out) / total
    if 0.02 <= share <= 0.3:
        report.split = "split by file hash"
        train = [text for text, out in zip(documents, held_out, strict=True) if not out]
        val = [text for text, out in zip(documents, held_out, strict=True) if out]
    else:
        report.split = "the last tenth of each file"
        cuts = [len(text) * 9 // 10 for text in documents]
        train = [text[:cut] for text, cut in zip(documents, cuts, strict=True) if cut]
        val = [text[cut:] for text, cut in zip(documents, cuts, strict=True)]
    report.train_documents, report.train_bytes = len(train), _utf8_bytes(train)
    report.val_documents, report.val_bytes = len(val), _utf8_bytes(val)
    train_lines = {line for text in train for line in text.splitlines(keepends=True)}
    report.val_bytes_seen = sum(
        len(line.encode())
        for text in val
        for line in text.splitlines(keepends=True)
        if len(line) >= _SEEN_CHARACTERS and line in train_lines
    )
    digest = hashlib.sha256()
    for part in (train, val):
        digest.update(len(part).to_bytes(8, "little"))
        for text in part:
            digest.update(bytes.fromhex(_sha256(text)))
    return Corpus(tuple(train), tuple(val), digest.hexdigest(), report)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _utf8_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)
