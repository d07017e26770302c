"""Retention lets the oldest and least valuable go and keeps what memories rest on; embedding anew goes on meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from builders import NOW, feedback, hashing_memory, lexical_memory, settings, trace
from click.testing import CliRunner

from optillm_memory import InvalidField, Memory, Settings
from optillm_memory.background.maintenance import prune_vectors, reembed
from optillm_memory.cli import main
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.recall.encoder import HashingEncoder, Vectors
from optillm_memory.records import Trace, new_trace_id
from optillm_memory.store import fold
from optillm_memory.store.base import Store
from optillm_memory.store.maintenance.retention import Limits, retain
from optillm_memory.store.opening import open_store

DAY_S = 86_400.0
ENDED = NOW + 100 * DAY_S


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Give an empty store of either kind."""
    server = request.param == "postgres"
    place = request.getfixturevalue("postgres").fresh() if server else str(tmp_path / "memory.db")
    opened = open_store(place, queue_size=10_000, normal=normal_answer)
    yield opened
    opened.close()


def add(store: Store, task: str, day: float, *, value: bool | None = None, source: str = "code") -> Trace:
    """Append a trace of an episode of its own on a day, and say how it went."""
    made = trace(task, f"answer to {task}", created_at=NOW + day * DAY_S, episode_id=f"ep-{new_trace_id()}")

    def work(tx: object) -> None:
        tx.add_trace(made)  # type: ignore[attr-defined]
        fold.trace_arrived(tx, made)  # type: ignore[arg-type]
        if value is not None:
            said = feedback(value, feedback_id=made.trace_id, trace_id=made.trace_id, source=source)
            fold.feedback_arrived(tx, "local", None, said, received_at=made.created_at)  # type: ignore[arg-type]

    store.write(work).result(10)
    return made


def tasks(store: Store) -> list[str]:
    """Return the tasks that are left, the oldest first."""
    return [t["task"] for t in store.traces(None, limit=1000)][::-1]


def same_as_rebuilt(store: Store) -> bool:
    """Whether what is derived is what a rebuild makes of the log."""
    before = store.derived()
    store.write(fold.rebuild).result(30)
    return before == store.derived()


def test_age_takes_all_but_what_memories_rest_on(store: Store) -> None:
    """What is older than the limit goes, whatever is known of it; verified evidence stays, and so does the memory."""
    add(store, "old, unknown", 0)
    add(store, "old, verified", 1, value=True)
    add(store, "old, guessed", 2, value=True, source="llm")
    add(store, "old, failed", 3, value=False)
    add(store, "young, unknown", 95)
    assert retain(store, Limits(days=30), ENDED)["episodes"] == 3
    assert tasks(store) == ["old, verified", "young, unknown"]
    (memory,) = store.list_memories(None)
    assert (memory.task, memory.status) == ("old, verified", "verified")
    assert same_as_rebuilt(store)
    assert retain(store, Limits(days=30), ENDED)["episodes"] == 0


def test_a_failure_of_a_standing_memory_stays(store: Store) -> None:
    """A memory does not get better by forgetting: the failures that it is weighed with stay as its successes do."""
    for day, value in ((0, True), (1, True), (2, False)):
        add(store, "the same", day, value=value)
    retain(store, Limits(days=1), ENDED)
    (memory,) = store.list_memories(None)
    assert (memory.successes, memory.failures, memory.status) == (2, 1, "verified")
    assert same_as_rebuilt(store)


def test_of_many_equal_successes_a_few_stay(store: Store) -> None:
    """A memory that always was right stands on ten of its successes: the others do not fill the disk."""
    for day in range(15):
        add(store, "the same", day, value=True)
    assert retain(store, Limits(days=1), ENDED)["episodes"] == 5
    (memory,) = store.list_memories(None)
    assert (memory.successes, memory.status) == (10, "verified")
    assert same_as_rebuilt(store)


def test_a_number_takes_the_least_valuable_first(store: Store) -> None:
    """Beyond a number of traces those go first of which nothing is known, then the others, the oldest first."""
    add(store, "verified", 0, value=True)
    add(store, "failed", 1, value=False)
    for day in range(2, 8):
        add(store, f"unknown {day}", day)
    add(store, "new", 99.9)
    retain(store, Limits(traces=5), ENDED)
    assert tasks(store) == ["verified", "failed", "unknown 7", "new"]
    retain(store, Limits(traces=3), ENDED)
    assert tasks(store) == ["verified", "new"]
    retain(store, Limits(traces=1), ENDED)
    assert tasks(store) == ["verified"]
    assert same_as_rebuilt(store)


def test_bytes_in_use_are_limited(store: Store) -> None:
    """Beyond a size traces go until what is in use is below it; below it nothing goes."""
    for day in range(60):
        add(store, f"task {day} " + "padding " * 2_000, day)
    before = store.held()["bytes"]
    assert retain(store, Limits(bytes=before), ENDED)["episodes"] == 0
    assert retain(store, Limits(bytes=before // 2), ENDED)["episodes"] > 20
    assert store.held()["bytes"] <= before // 2
    assert tasks(store)[-1].startswith("task 59")


def test_an_episode_goes_whole_when_all_of_it_is_old(store: Store) -> None:
    """An episode that went on lately stays with its beginning."""
    first = add(store, "began early", 0)
    later = trace("went on", "a", episode_id=first.episode_id, created_at=NOW + 99 * DAY_S)
    store.write(lambda tx: tx.add_trace(later)).result(10)
    assert retain(store, Limits(days=30), ENDED)["episodes"] == 0
    assert retain(store, Limits(days=0.5), ENDED)["episodes"] == 1
    assert tasks(store) == []


def test_upkeep_applies_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit set, an open memory deletes behind everything else; by default nothing ever goes."""
    monkeypatch.setattr("optillm_memory.background.maintenance._LOOK_S", 0.05)
    assert not Limits(Settings().retention_days, Settings().max_traces, Settings().max_bytes)
    with lexical_memory(tmp_path, retention_days=1) as memory:
        add(memory.store, "old", 0)
        deadline = time.monotonic() + 20
        while tasks(memory.store) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert tasks(memory.store) == []
    with pytest.raises(InvalidField, match="RETENTION_DAYS"):
        settings(tmp_path, retention_days=-1)


# -- another encoder -------------------------------------------------------------------------------


class Other(HashingEncoder):
    """Another encoder, of another dimension."""

    fingerprint = "other-64"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return shorter vectors."""
        vectors = super().encode(texts)[:, :64]
        norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-9))
        return np.asarray(vectors / norms, dtype=np.float32)


@pytest.fixture(params=["sqlite", "postgres"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Give the setting that names a database of either kind."""
    server = request.param == "postgres"
    return {"db": request.getfixturevalue("postgres").fresh() if server else str(tmp_path / "memory.db")}


def taught(tmp_path: Path, count: int, **values: str) -> None:
    """Fill a memory with the shipped encoder."""
    with hashing_memory(tmp_path, **values) as memory:
        for number in range(count):
            add(memory.store, f"question number {number}", 0, value=True)
        assert reembed(memory.store, memory.encoder) <= count  # the server's own upkeep may have done some
        assert memory.stats()["memories_without_vector"] == 0


def test_vectors_of_another_encoder_never_mix(
    tmp_path: Path, either: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another encoder, recall goes on by words; as vectors come in, only its own are searched."""
    taught(tmp_path, 5, **either)
    monkeypatch.setattr("optillm_memory.background.maintenance.Maintenance._fill", lambda _self: None)
    with Memory(settings(tmp_path, **either), encoder=Other) as memory:
        assert memory.encoder.wait(10) == "ready"
        (best, *_) = memory.recall("question number 3")
        assert (best.memory.task, best.cosine) == ("question number 3", None)
        assert memory.stats()["memories_without_vector"] == 5
        assert reembed(memory.store, memory.encoder) == 5
        (best, *_) = memory.recall("question number 3")
        assert best.cosine == pytest.approx(1.0, abs=1e-3)
        assert memory.store.vectors.coverage() == (5, {"hashing-trigram-256": 5, "other-64": 5})
        assert prune_vectors(memory.store, memory.encoder.fingerprint) >= 5
        assert memory.store.vectors.coverage() == (5, {"other-64": 5})
        assert memory.recall("question number 3")[0].cosine == pytest.approx(1.0, abs=1e-3)


class Renamed(HashingEncoder):
    """The shipped encoder under another fingerprint, which fails where it is asked for a vector that there is."""

    fingerprint = "hashing-by-content"
    former_fingerprints = ("hashing-trigram-256", "never-used")

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Encode what no memory has."""
        assert not [text for text in texts if text.startswith("question number")]
        return super().encode(texts)


def test_vectors_under_a_former_fingerprint_are_taken_over(
    tmp_path: Path, either: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the encoder is the same under another fingerprint, nothing is encoded again, and recall goes by meaning."""
    taught(tmp_path, 150, **either)
    if "postgres" not in str(either["db"]):  # one vector is there already under the new one
        with hashing_memory(tmp_path, **either) as memory:
            copied = "SELECT key_hash, 'hashing-by-content', vector FROM vectors ORDER BY id LIMIT 1"
            memory.store.write(
                lambda tx: tx.db.execute(f"INSERT INTO vectors(key_hash, fingerprint, vector) {copied}")
            ).result(10)
    monkeypatch.setattr("optillm_memory.background.maintenance.Maintenance._fill", lambda _self: None)
    with Memory(settings(tmp_path, **either), encoder=Renamed) as memory:
        assert memory.encoder.wait(10) == "ready"
        assert reembed(memory.store, memory.encoder) >= 149
        _, embedded = memory.store.vectors.coverage()
        assert embedded["hashing-by-content"] == 150
        assert embedded.get("hashing-trigram-256", 0) <= 1
        memory.encoder._cache["local", "question number 3"] = HashingEncoder().encode(["question number 3"])[0]
        assert memory.recall("question number 3")[0].cosine == pytest.approx(1.0, abs=1e-3)


def test_embedding_anew_can_be_broken_off(
    tmp_path: Path, either: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was embedded before an interruption is kept; the next run does the rest, and says how much it was."""
    taught(tmp_path, 150, **either)
    monkeypatch.setattr("optillm_memory.background.maintenance.Maintenance._fill", lambda _self: None)
    lines: list[str] = []

    def stop_soon(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with Memory(settings(tmp_path, **either), encoder=Other) as memory:
        memory.encoder.wait(10)
        with pytest.raises(KeyboardInterrupt):
            reembed(memory.store, memory.encoder, progress=stop_soon)
        assert lines[0] == "64 of 150 memories embedded"
        assert memory.store.vectors.coverage()[1]["other-64"] == 128
        assert reembed(memory.store, memory.encoder) == 22


def test_the_command_embeds_and_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`reembed --prune` leaves the vectors of the encoder that is set alone, and refuses where none is set."""
    taught(tmp_path, 3)
    with lexical_memory(tmp_path) as memory:
        memory.store.write(lambda tx: tx.vectors.put([("k", b"1234")], "another")).result(10)
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_ENCODER", "hashing")
    where = ("--db", str(tmp_path / "memory.db"), "--json")
    done = CliRunner().invoke(main, ["reembed", "--prune", *where])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"encoder": "hashing-trigram-256", "embedded": 0, "pruned": 1, "left": []}
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_ENCODER", "none")
    assert "there is no encoder" in CliRunner().invoke(main, ["reembed", *where]).output
