"""The table `forgotten`: memories that were deleted on purpose, so that no copy of them is used."""

from __future__ import annotations

from collections.abc import Collection

from optillm_memory.store.sqlite.connection import Connection, marks

# Memories that were forgotten and not learned again.
FORGOTTEN = """
    SELECT memory_id FROM forgotten WHERE NOT EXISTS (
        SELECT 1 FROM memories WHERE memories.memory_id = forgotten.memory_id AND status <> 'unfounded')"""
GONE = f"memory_id IN ({FORGOTTEN})"


def gone_of(db: Connection, memory_ids: Collection[str]) -> set[str]:
    """Return those of the memories that were forgotten and not learned again."""
    sql = f"SELECT memory_id FROM forgotten WHERE memory_id IN ({marks(memory_ids)}) AND {GONE}"
    return {row[0] for row in db.execute(sql, list(memory_ids))}
