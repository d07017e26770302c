"""Values on their way to PostgreSQL and back, so that they are what SQLite would give; results come in binary form."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import numpy as np

# PostgreSQL's texts have no place for NUL: it is written with an escape that is escaped itself.
_ESCAPE = "\ue000"
_ESCAPED = _ESCAPE.encode()


class Vector(bytes):
    """A vector's float32 numbers, on their way to a column of that type."""


def adapt(psycopg: Any, connection: Any) -> None:
    """Convert values as SQLite does: numbers for booleans, exact sums, vectors as bytes, NUL in a text."""
    _adapt_to_server(psycopg, connection.adapters)
    _adapt_from_server(psycopg, connection.adapters)
    with contextlib.suppress(Exception):
        row = connection.execute("SELECT 'public.vector'::regtype::oid").fetchone()
        connection.adapters.register_loader(int(row[0]), _vector_loader(psycopg))


def _adapt_to_server(psycopg: Any, adapters: Any) -> None:
    base = psycopg.adapt

    class Untyped(base.Dumper):  # type: ignore[misc, name-defined]
        """A number without a type: the column it goes to has one, boolean or number."""

        oid = 0

        def dump(self, value: Any) -> bytes:
            return str(int(value)).encode()

        def quote(self, value: Any) -> bytes:
            return bytes(self.dump(value))

    class TextToServer(psycopg.types.string.StrDumperUnknown):  # type: ignore[misc]
        """A text to the server."""

        def dump(self, value: str) -> Any:
            if "\x00" in value or _ESCAPE in value:
                value = value.replace(_ESCAPE, _ESCAPE + "e").replace("\x00", _ESCAPE + "0")
            return super().dump(value)

    class VectorToServer(base.Dumper):  # type: ignore[misc, name-defined]
        """A vector to the server, in the form of pgvector's `vector_recv`."""

        format, oid = psycopg.pq.Format.BINARY, 0

        def dump(self, value: bytes) -> bytes:
            return struct.pack(">HH", len(value) // 4, 0) + np.frombuffer(value, "<f4").astype(">f4").tobytes()

    for kind in (int, bool):
        adapters.register_dumper(kind, Untyped)
    adapters.register_dumper(str, TextToServer)
    adapters.register_dumper(Vector, VectorToServer)


def _adapt_from_server(psycopg: Any, adapters: Any) -> None:
    base = psycopg.adapt

    class TextFromServer(base.Loader):  # type: ignore[misc, name-defined]
        """A text from the server."""

        format = psycopg.pq.Format.BINARY

        def load(self, data: Any) -> str:
            raw = bytes(data)
            if _ESCAPED in raw:
                raw = raw.replace(_ESCAPED + b"0", b"\x00").replace(_ESCAPED + b"e", _ESCAPED)
            return raw.decode()

    class Exact(psycopg.types.numeric.NumericBinaryLoader):  # type: ignore[misc]
        """Sums of whole numbers are whole."""

        def load(self, data: Any) -> int | float:
            number = super().load(data)
            return int(number) if number == number.to_integral_value() else float(number)

    adapters.register_loader("text", TextFromServer)
    adapters.register_loader("numeric", Exact)


def _vector_loader(psycopg: Any) -> type:
    base = psycopg.adapt

    class VectorFromServer(base.Loader):  # type: ignore[misc, name-defined]
        """A vector as the bytes of its float32 numbers."""

        format = psycopg.pq.Format.BINARY

        def load(self, data: Any) -> bytes:
            return np.frombuffer(data, ">f4", offset=4).astype("<f4").tobytes()

    return VectorFromServer
