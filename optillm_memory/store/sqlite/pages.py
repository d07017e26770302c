"""Pages of a database file, less what they do not use: `secure_delete` alone leaves copies of rows there.

Where SQLite moves rows between pages to keep a tree in balance, their old bytes stay in the room between the rows of
the page that they left. Deleted later, a row is overwritten where it lies, and not where it lay. (A stress test of
deletions found one text in a thousand.) So the unused room of every page is overwritten, which no reader looks at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from optillm_memory.store.sqlite.connection import Connection, OperationalError, checkpoint, wal_bytes

PAGES = 256  # in one piece: others wait to write for as long as it takes to look through it
_LEAVES, _INTERIOR = (10, 13), (2, 5)  # the kinds of pages of a tree
_LINK = 4  # bytes at the start of a freed part: where the next one is, and its size
_MOST_PAGES = 1 << 24  # beyond, the first byte of an overflow page may be that of a page of a tree
_PAGE_SIZE, _FIRST_FREE, _LARGEST_ROOT = slice(16, 18), slice(32, 36), slice(52, 56)  # in the file's header
# Never closed: to close any handle on a file drops the locks that SQLite's connections of this process hold on it.
_handles: dict[tuple[int, int, int], BinaryIO] = {}  # of each process: after a fork a shared one has one position


def unused(page: bytes, *, first: bool = False) -> list[tuple[int, int]]:
    """Return the (start, end) of the parts of a tree's page that hold nothing; none for another kind of page."""
    header = 100 if first else 0
    kind = page[header]
    if kind not in (*_LEAVES, *_INTERIOR):
        return []
    free, cells, content = (int.from_bytes(page[header + at : header + at + 2], "big") for at in (1, 3, 5))
    start = header + (8 if kind in _LEAVES else 12) + 2 * cells
    content = content or 1 << 16
    if not start <= content <= len(page):
        return []
    parts = [(start, content)]
    least = content
    while free:
        following, size = (int.from_bytes(page[free + at : free + at + 2], "big") for at in (0, 2))
        if free < least or size < _LINK or free + size > len(page):
            return []
        parts.append((free + _LINK, free + size))
        least, free = free + size, following
    return parts


def scrub(connection: Connection, path: Path, start: int) -> int | None:
    """Overwrite what the pages from `start` (0 is the first) do not use; return where to go on, None at the end.

    Raises OperationalError while somebody reads an earlier state or writes, and for a file of another layout.
    """
    if not checkpoint(connection, wait_s=0.0):
        raise OperationalError("somebody reads an earlier state")
    connection.execute("BEGIN IMMEDIATE")
    try:
        upto, changed = _overwrite(path, start)
        if changed:  # what other connections keep of these pages is out of date, as after any commit
            connection.execute(_MARK)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("PRAGMA shrink_memory")  # and what this one keeps
    return upto


def _overwrite(path: Path, start: int) -> tuple[int | None, bool]:
    if wal_bytes(path):
        raise OperationalError("somebody writes")
    file = _handle(path)
    file.seek(0)
    head = file.read(100)
    size = int.from_bytes(head[_PAGE_SIZE], "big")
    size = 1 << 16 if size == 1 else size
    total = os.fstat(file.fileno()).st_size // size
    if any(head[_LARGEST_ROOT]) or total >= _MOST_PAGES:
        raise OperationalError("its pages are laid out in another way; compact it")
    free = set(_free_pages(file, size, int.from_bytes(head[_FIRST_FREE], "big"), total))
    file.seek(start * size)
    block = file.read(PAGES * size)
    zeros, changed = bytes(size), False
    for number in range(start, start + len(block) // size):
        page = block[(number - start) * size : (number - start + 1) * size]
        for begin, end in [(0, size)] if number in free else unused(page, first=number == 0):
            if page[begin:end] != zeros[: end - begin]:
                file.seek(number * size + begin)
                file.write(zeros[: end - begin])
                changed = True
    if changed:
        os.fsync(file.fileno())
    upto = start + PAGES
    return (upto if upto < total else None), changed


def _free_pages(file: BinaryIO, size: int, trunk: int, total: int) -> Iterator[int]:
    """Yield the numbers (from 0) of the pages that belong to nothing; not those that list them."""
    for _ in range(total):
        if not 0 < trunk <= total:
            return
        file.seek((trunk - 1) * size)
        page = file.read(size)
        trunk, count = int.from_bytes(page[:4], "big"), int.from_bytes(page[4:8], "big")
        for place in range(8, 8 + 4 * min(count, size // 4 - 2), 4):
            yield int.from_bytes(page[place : place + 4], "big") - 1


def _handle(path: Path) -> BinaryIO:
    status = path.stat()
    key = (os.getpid(), status.st_dev, status.st_ino)
    if key not in _handles:
        _handles[key] = path.open("r+b", buffering=0)
    return _handles[key]


_MARK = "INSERT INTO meta VALUES ('scrubbed', 1) ON CONFLICT (key) DO UPDATE SET value = meta.value + 1"
