"""A disk that fills: every write, and every call that gives a file its name, can be made to fail once counted."""

from __future__ import annotations

import errno
import os

import pytest


class FullDisk:
    """Counts the calls that can need disk space; from the `fail_at`-th on they raise ENOSPC."""

    CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count = 0
        self.fail_at: int | None = None
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name, call):
        def wrapper(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return call(*args, **kwargs)  # reading needs no space
            self.count += 1
            if self.fail_at is not None and self.count >= self.fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return wrapper

    def each_failure(self, action, most: int = 200):
        """Runs `action` with the disk full from the k-th call on, k = 1, 2, ..., until it needs fewer than k calls.

        Yields (k, the OSError) after each failed run, with the disk in order again.
        """
        for k in range(1, most):
            self.count, self.fail_at = 0, k
            try:
                action()
            except OSError as error:
                failure: OSError | None = error
            else:
                failure = None
            failed = self.count >= k
            self.fail_at = None
            if not failed:
                assert k > 1, "the action never touched the disk: the simulation does not see its writes"
                return
            yield k, failure
        raise AssertionError(f"more than {most} writes")
