"""The files of large scopes' vectors: a folder beside the database, each file replaced in one step."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from optillm_memory.records import Scope

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: two processes may then both write, and the last stays
    fcntl = None  # type: ignore[assignment]


_PIECE = 16 << 20  # bytes kept in memory with one call
_SHARE = 1 / 4  # of the memory there is, which is kept for files at most
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # a container's, v2 and v1


def folder_of(database: Path) -> Path:
    """Return the folder that belongs to a database file."""
    return database.with_name(database.name + ".index")


class _Draft:
    """A file in the making."""

    def __init__(self, file: BinaryIO, unfinished: Path, final: Path) -> None:
        self.file = file
        self._unfinished, self._final = unfinished, final

    def mapped(self) -> mmap.mmap:
        """Return what was written so far."""
        return mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)

    def commit(self) -> None:
        """Put the file on disk and in the place of the one before. Raises OSError, also where it was removed."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self._unfinished.replace(self._final)
        with contextlib.suppress(OSError):  # where folders cannot be synced the old file may come back: it serves, too
            folder = os.open(self._final.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


class IndexFiles:
    """Satisfies `recall.vectors.ivf_format.Files`. Files are named by a digest of the scope, so no name says whose."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Name the folder; it is made with the first file, and not at all where it is only read."""
        self._folder = folder
        self._read_only = read_only
        self._kept: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()

    @staticmethod
    def name(scope: Scope, fingerprint: str) -> str:
        """Return the name of a scope's file for one encoder."""
        return f"{_digest(scope)}-{hashlib.sha256(fingerprint.encode()).hexdigest()[:12]}"

    def mapped(self, name: str) -> mmap.mmap | None:
        """Return a file's content; None where there is none that can be read."""
        try:
            with (self._folder / name).open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # an empty file cannot be mapped
            return None

    def keep(self, content: mmap.mmap, start: int, end: int) -> Iterator[None]:
        """Keep a part of a mapped file in memory while it is mapped, piece by piece.

        Some kernels let go of what was not read for a minute, also where there is room. All processes share the pages.
        Where the user may not lock so much (RLIMIT_MEMLOCK), or it is a large part of what memory there is, they come
        and go as they are read.
        """
        if sum(self._kept.values()) + end - start > _SHARE * _memory():
            return
        self._kept[content] = end - start
        address = np.frombuffer(content, dtype=np.uint8).ctypes.data
        for place in range(start - start % mmap.PAGESIZE, end, _PIECE):
            if not _locked(address + place, min(_PIECE, end - place)):
                return
            yield

    def blocks(self, name: str) -> Iterator[bytes]:
        """Read a file piece by piece, without mapping it."""
        with (self._folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                yield block

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self._folder / name).is_file()

    @contextlib.contextmanager
    def draft(self, name: str) -> Iterator[_Draft | None]:
        """Make a file; None while another process does, and read-only. What is not committed is removed.

        Raises OSError.
        """
        if self._read_only:
            yield None
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = self._folder / f"{name}.unfinished"
        with self._alone(name) as alone:
            if not alone:
                yield None
                return
            unfinished.unlink(missing_ok=True)  # what a process that died left
            descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w+b") as file:
                    yield _Draft(file, unfinished, self._folder / name)
            finally:
                unfinished.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[bool]:
        descriptor = os.open(self._folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    yield False
                    return
            yield True
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        """Take a file away, and one in the making; read-only, leave it."""
        if self._read_only:
            return
        for path in (self._folder / name, self._folder / f"{name}.unfinished"):
            path.unlink(missing_ok=True)

    def forget(self, scope: Scope | None) -> int:
        """Take away every file of a scope (None: of all), also those in the making; return how many there were."""
        whose = "*" if scope is None else f"{_digest(scope)}-*"
        found = [path for path in self._folder.glob(whose) if path.suffix != ".lock"]
        for path in found:
            path.unlink(missing_ok=True)
        return len(found)


def _memory() -> int:
    """Return how many bytes of memory there are for this process; 0 where the machine does not tell."""
    try:
        least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
    for limit in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            least = min(least, int(Path(limit).read_text()))
    return least


def _locked(address: int, size: int) -> bool:
    try:
        lock = ctypes.CDLL(None, use_errno=True).mlock
    except (AttributeError, OSError, TypeError):
        return False
    return int(lock(ctypes.c_void_p(address), ctypes.c_size_t(size))) == 0


def _digest(scope: Scope) -> str:
    text = json.dumps([scope.tenant, scope.namespace, scope.user_id, scope.agent_id])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
