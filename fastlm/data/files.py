"""Files that are either wholly there or not there at all.

`write_atomically` writes beside the target, flushes to the disk, and renames over the target in one step, so that a
crash, a kill or a full disk at any moment leaves what stood under that name before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PIECE_BYTES = 1 << 20  # a single write() of Linux stops at 2 GiB; pieces also keep an interrupt responsive


def temporary_name(path: Path) -> Path:
    """A fresh hidden name beside `path`: on the same file system, so that renaming it to `path` is atomic."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable: without it a rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Writes all of `content`, of which a single call of the system may write less than asked."""
    view = memoryview(content).cast("B")
    while view:
        view = view[os.write(descriptor, view[:_PIECE_BYTES]) :]


def sealed_json(content: dict[str, Any]) -> bytes:
    """`content` as JSON with its own SHA-256, which `unsealed` compares."""
    return (json.dumps({**content, "sha256": _checksum(content)}, indent=1) + "\n").encode()


def unsealed(content: Any) -> dict[str, Any]:
    """What `sealed_json` was given, from its parsed JSON. Raises ValueError for anything else."""
    content = dict(content) if isinstance(content, dict) else {}
    if content.pop("sha256", None) != _checksum(content):
        raise ValueError("its content does not match its checksum")
    return content


def write_atomically(path: str | os.PathLike[str], content: bytes | memoryview | Iterable[bytes | memoryview]) -> None:
    """Replaces `path` by `content` (one buffer or several, in order), or leaves it as it was and raises OSError."""
    path = Path(path)
    buffers = [content] if isinstance(content, (bytes, memoryview)) else content
    temporary = temporary_name(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            for buffer in buffers:
                write_all(descriptor, buffer)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise OSError(error.errno, f"fastlm.data: {path} could not be written: {error.strerror or error}") from error
    except BaseException:  # an interrupt: leave no litter either
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
