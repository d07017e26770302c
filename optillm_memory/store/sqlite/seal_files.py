"""What a sealed database keeps outside itself: the key, and the number and link of the latest commit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

FOLDER = "~/.config/optillm-memory/seals"
KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Head:
    """A commit: its number, and the link of the chain that it ends with."""

    number: int
    link: bytes


@dataclass(frozen=True, slots=True)
class SealFiles:
    """The two files of one database, named by its path: a copy in another place has none of them."""

    key_path: Path
    head_path: Path

    @classmethod
    def of(cls, database: Path, folder: str = "") -> SealFiles:
        """Return the files of a database, in this folder or the default one; beside it where there is no home."""
        place = str(database.expanduser().resolve())
        stem = f"{database.name}-{hashlib.blake2b(place.encode('utf-8', 'replace'), digest_size=8).hexdigest()}"
        try:
            within = Path(folder or FOLDER).expanduser()
        except RuntimeError:  # a user without a home directory
            within = database.parent
        return cls(within / f"{stem}.key", within / f"{stem}.head")

    def exist(self) -> bool:
        """Whether the database was sealed: one of the files is there."""
        return self.key_path.exists() or self.head_path.exists()

    def key(self) -> bytes | None:
        """Return the key; None where there is none that can be read."""
        try:
            found = bytes.fromhex(self.key_path.read_text("ascii").strip())
        except (OSError, ValueError):
            return None
        return found if len(found) == KEY_BYTES else None

    def make_key(self) -> bytes:
        """Return the key, made (0600) where there is none; of several processes one makes it. Raises OSError."""
        folder = self.key_path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = folder / f".{self.key_path.name}-{secrets.token_hex(8)}"
        _write_new(own, secrets.token_hex(KEY_BYTES))
        try:
            with contextlib.suppress(FileExistsError):
                os.link(own, self.key_path)  # at once, with its content: nobody reads half a key
        finally:
            own.unlink()
        if (key := self.key()) is None:
            raise OSError(f"{self.key_path} is no key")
        return key

    def replace_key(self) -> bytes:
        """Put a new key in the place of the old one; return it. Raises OSError."""
        own = self.key_path.with_name(f".{self.key_path.name}-{secrets.token_hex(8)}")
        _write_new(own, secrets.token_hex(KEY_BYTES))
        own.replace(self.key_path)
        return bytes.fromhex(self.key_path.read_text("ascii"))

    def head(self) -> Head | None:
        """Return the latest commit that was noted here; None where none can be read."""
        try:
            text, again = "", self.head_path.read_text("ascii")
            while text != again:  # it is overwritten in place
                text, again = again, self.head_path.read_text("ascii")
            number, link = text.split()
            return Head(int(number), bytes.fromhex(link))
        except (OSError, ValueError):
            return None

    def put_head(self, head: Head) -> None:
        """Note a commit. Raises OSError.

        It is not synced: after a power loss an older one may be left, which is no sign of anything. Always as long as
        before and in one write, so that a new one is there whole or not at all.
        """
        self.head_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self.head_path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.write(file, f"{head.number:020d} {head.link.hex()}\n".encode("ascii"))
        finally:
            os.close(file)

    def remove(self) -> None:
        """Delete both: the database is sealed no more."""
        self.key_path.unlink(missing_ok=True)
        self.head_path.unlink(missing_ok=True)


def _write_new(path: Path, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, text.encode("ascii"))
        os.fsync(file)
    finally:
        os.close(file)
