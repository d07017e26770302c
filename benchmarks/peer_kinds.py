"""The peers, each with the same interface: records in, texts out."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol
from uuid import uuid4

from benchmarks.peer_parts import PeerEncoder, Upstream
from optillm_memory.bench.records import DIMENSION, Operation, Record, operations
from optillm_memory.conversation.parse import key_of
from optillm_memory.memory import Memory
from optillm_memory.records import Feedback, Scope
from optillm_memory.settings import Settings

TOP = 10
_TENANT = "local"
_SCOPE = Scope(_TENANT)
TIME_LIMIT_S = 30.0  # for the questions or the adds of a slow peer


class Peer(Protocol):
    """A memory as its users install it; a record counts as stored when `add` returns.

    A peer that can accept records without waiting for the disk also has `prepare`, `accept` and `settle`; one whose
    requests are more than records also has `prepare_requests` and `request`.
    """

    def add(self, text: str) -> None:
        """Store one record."""

    def add_all(self, texts: Sequence[str]) -> None:
        """Store many records in the fastest way there is."""

    def ask(self, text: str) -> list[str]:
        """Return the texts that a search finds."""

    def close(self) -> None:
        """Close it."""


class Ours:
    """optillm-memory: a request with its answer and its feedback, each acknowledged; recall with words and vectors."""

    def __init__(self, folder: Path, known: PeerEncoder, _upstream: Upstream, _size: int) -> None:
        """Open it."""
        settings = Settings(db=str(folder / "memory.db"), holdout=0.0, queue_size=20_000)
        self._memory = Memory(settings, encoder=lambda: known)
        self._memory.encoder.wait(60)
        self._known, self._prepared = known, 0
        self._prepared_writes: dict[str, tuple[Operation, Operation]] = {}
        self._pending: deque[Callable[[float], Any]] = deque()

    def add(self, text: str) -> None:
        """Finish a request, and wait until its feedback is on disk and learned."""
        self._memory.feedback([self._finished(text)])

    def add_all(self, texts: Sequence[str]) -> None:
        """Write traces with their feedback, and wait until all is on disk and learned and the vectors are indexed.

        A record is what it is to other peers, a text with its vector: no request is parsed or redacted (`request`
        is). Other peers index while they add.
        """
        self.prepare(texts)
        for text in texts:
            self.accept(text)
        self.settle()
        self.ask(texts[-1])
        while self._memory.busy:
            time.sleep(0.005)

    def prepare(self, texts: Sequence[str]) -> None:
        """Prepare the writes of texts with their vectors: encoding and parsing are not part of the store."""
        known, first = self._known, self._prepared
        self._prepared += len(texts)
        for number, text in enumerate(texts, first):
            record = Record(number, _SCOPE, text, known.vector(text))
            self._prepared_writes[text] = operations(record, _SCOPE, prefix="peers", fingerprint=known.fingerprint)

    def accept(self, text: str) -> None:
        """Queue the writes of a text, its trace and the feedback on it, without waiting for them."""
        arrives, judged = self._prepared_writes.pop(text)
        self._memory.store.post(arrives)
        self._pending.append(self._memory.store.write(judged).result)

    def prepare_requests(self, texts: Sequence[str]) -> None:
        """Encode texts in advance: other peers look vectors up directly, ours asks another thread."""
        self._memory.encoder.encode([key_of(text) for text in texts], owner=_TENANT)

    def request(self, text: str) -> None:
        """Finish a request and submit its feedback, without waiting for either."""
        self._pending.append(self._memory.submit_feedback([self._finished(text)]))

    def settle(self) -> None:
        """Wait until everything accepted is on disk and learned. Raises the error of a failed write."""
        while self._pending:
            self._pending.popleft()(TIME_LIMIT_S)

    def _finished(self, text: str) -> Feedback:
        if self._memory.encoder.cached(key := key_of(text), owner=_TENANT) is None:
            self._memory.encoder.encode([key], owner=_TENANT)
        turn = self._memory.new_turn({"model": "model", "messages": [{"role": "user", "content": text}]})
        answer = {"message": {"role": "assistant", "content": "an answer"}, "finish_reason": "stop"}
        self._memory.finish(turn, {"choices": [answer]})
        return Feedback(uuid4().hex, "success", True, "code", turn.trace_id, None, None, 0.0)

    def ask(self, text: str) -> list[str]:
        """Recall."""
        return [hit.memory.task for hit in self._memory.recall(text, limit=TOP)]

    def close(self) -> None:
        """Close it."""
        self._memory.close()


class Chroma:
    """chromadb, in process, on disk."""

    def __init__(self, folder: Path, known: PeerEncoder, _upstream: Upstream, _size: int) -> None:
        """Open it."""
        chromadb = import_module("chromadb")
        settings = import_module("chromadb.config").Settings(anonymized_telemetry=False)
        self._known = known
        self._client = chromadb.PersistentClient(path=str(folder / "chroma"), settings=settings)
        self._collection = self._client.get_or_create_collection(
            "bench", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
        )

    def add(self, text: str) -> None:
        """Add one document."""
        self.add_all([text])

    def add_all(self, texts: Sequence[str]) -> None:
        """Add documents."""
        ids, vectors = [uuid4().hex for _ in texts], self._known.encode(texts)
        self._collection.add(ids=ids, documents=list(texts), embeddings=vectors)

    def ask(self, text: str) -> list[str]:
        """Query the collection."""
        found = self._collection.query(query_embeddings=self._known.encode([text]), n_results=TOP)
        return [str(document) for document in found["documents"][0]]

    def close(self) -> None:
        """Close it, if the release can."""
        with contextlib.suppress(AttributeError):
            self._client.close()


class Mem0:
    """mem0 on a local vector store; records are stored unchanged, not through an LLM."""

    _OF: ClassVar = {"user_id": "bench"}

    def __init__(self, store: Mapping[str, Any], known: PeerEncoder, upstream: Upstream, folder: Path) -> None:
        """Open it, with our encoder and LLM in place of its own."""
        settings = {"vector_store": store, "history_db_path": str(folder / "history.db")}
        self._memory = import_module("mem0").Memory.from_config(settings)
        self._memory.embedding_model, self._memory.llm = _Mem0Encoder(known), upstream
        self._known = known

    def add(self, text: str) -> None:
        """Add one memory."""
        self._memory.add(text, infer=False, **self._OF)

    def add_inferred(self, text: str) -> None:
        """Add one memory with the default settings."""
        self._memory.add(text, **self._OF)

    def add_all(self, texts: Sequence[str]) -> None:
        """Put them into its vector store as `add` would: mem0 itself adds one at a time."""
        payloads = [{**self._OF, "data": text, "text_lemmatized": text, "role": "user"} for text in texts]
        ids = [str(uuid4()) for _ in texts]
        self._memory.vector_store.insert(vectors=self._known.lists(texts), payloads=payloads, ids=ids)

    def ask(self, text: str) -> list[str]:
        """Search."""
        found = self._memory.search(text, filters=dict(self._OF), top_k=TOP)
        return [str(item["memory"]) for item in found["results"]]

    def close(self) -> None:
        """Close it."""
        self._memory.close()
        if client := getattr(self._memory.vector_store, "client", None):
            client.close()


class _Mem0Encoder:
    """What mem0 calls for embeddings."""

    def __init__(self, known: PeerEncoder) -> None:
        self._known = known

    def embed(self, text: str, *_: Any, **__: Any) -> list[float]:
        """Return one vector."""
        return self._known.lists([text])[0]

    def embed_batch(self, texts: Sequence[str], *_: Any, **__: Any) -> list[list[float]]:
        """Return several."""
        return self._known.lists(texts)


def mem0_faiss(folder: Path, known: PeerEncoder, upstream: Upstream, _size: int) -> Mem0:
    """Open mem0 on faiss."""
    place = {"path": str(folder / "faiss"), "distance_strategy": "cosine", "embedding_model_dims": DIMENSION}
    return Mem0({"provider": "faiss", "config": {"collection_name": "bench", **place}}, known, upstream, folder)


def mem0_qdrant(folder: Path, known: PeerEncoder, upstream: Upstream, _size: int) -> Mem0:
    """Open mem0 on qdrant in a folder."""
    place = {"path": str(folder / "qdrant"), "on_disk": True, "embedding_model_dims": DIMENSION}
    return Mem0({"provider": "qdrant", "config": {"collection_name": "bench", **place}}, known, upstream, folder)


class LangGraph:
    """langgraph's SqliteStore with its vector index."""

    _SPACE = ("bench",)

    def __init__(self, folder: Path, known: PeerEncoder, _upstream: Upstream, _size: int) -> None:
        """Open it, on a SQLite that loads extensions."""
        module = import_module("langgraph.store.sqlite")
        self._put = import_module("langgraph.store.base").PutOp
        self._connection = _extensible().connect(
            str(folder / "store.db"), check_same_thread=False, isolation_level=None
        )
        index = {"dims": DIMENSION, "embed": known.lists, "text_fields": ["text"]}
        self._store = module.SqliteStore(self._connection, index=index)
        self._store.setup()

    def add(self, text: str) -> None:
        """Put one item."""
        self._store.put(self._SPACE, uuid4().hex, {"text": text})

    def add_all(self, texts: Sequence[str]) -> None:
        """Put items in batches."""
        for start in range(0, len(texts), 200):  # each adds several parameters to one statement
            self._store.batch([self._put(self._SPACE, uuid4().hex, {"text": t}) for t in texts[start : start + 200]])

    def ask(self, text: str) -> list[str]:
        """Search."""
        return [str(item.value["text"]) for item in self._store.search(self._SPACE, query=text, limit=TOP)]

    def close(self) -> None:
        """Close it."""
        self._connection.close()


def _extensible() -> Any:
    for name in ("sqlite3", "pysqlite3.dbapi2"):
        with contextlib.suppress(ImportError):
            module = import_module(name)
            if hasattr(module.Connection, "enable_load_extension"):
                return module
    raise ImportError("no SQLite here loads extensions, and langgraph's store needs one")


class GptCache:
    """GPTCache on SQLite and faiss, large enough for all records; it returns the one answer that it would serve."""

    def __init__(self, folder: Path, known: PeerEncoder, _upstream: Upstream, size: int) -> None:
        """Open it."""
        cache, api = import_module("gptcache"), import_module("gptcache.adapter.api")
        place = folder / "gptcache"
        place.mkdir(exist_ok=True)
        manager = import_module("gptcache.manager").manager_factory(
            "sqlite,faiss", data_dir=str(place), vector_params={"dimension": DIMENSION},
            eviction_params={"max_size": 2 * size + 1_000},
        )  # fmt: skip
        self._cache, self._api = cache.Cache(), api
        self._cache.init(
            pre_embedding_func=import_module("gptcache.processor.pre").get_prompt,
            embedding_func=lambda text, **_: known.vector(text),
            data_manager=manager,
            similarity_evaluation=import_module("gptcache.similarity_evaluation").SearchDistanceEvaluation(),
            config=cache.Config(similarity_threshold=0.0, disable_report=True),
        )

    def add(self, text: str) -> None:
        """Put one question with its answer."""
        self._api.put(text, text, cache_obj=self._cache)

    def add_all(self, texts: Sequence[str]) -> None:
        """Import questions."""
        self._cache.import_data(list(texts), list(texts))

    def ask(self, text: str) -> list[str]:
        """Get the answer that would be served."""
        found = self._api.get(text, cache_obj=self._cache)
        return [] if found is None else [str(found)]

    def close(self) -> None:
        """Close it: only now the index is written."""
        self._cache.data_manager.close()


class OptillmMemory:
    """optillm's `memory` plugin with its file: an LLM extracts notes from a request, and answers with notes."""

    def __init__(self, folder: Path, _known: PeerEncoder, upstream: Upstream, _size: int) -> None:
        """Open it."""
        self._plugin = import_module("optillm.plugins.memory_plugin")
        self._path, self._upstream = str(folder / "memory.json"), upstream
        os.environ[self._plugin.MEMORY_FILE_ENV] = self._path

    def add(self, text: str) -> None:
        """Run a request through the plugin, as the host does."""
        self._plugin.run("", f"{text}\nQuery: {text}", self._upstream, "model")

    def add_all(self, texts: Sequence[str]) -> None:
        """Add notes without the LLM."""
        memory = self._plugin.Memory(persist_path=self._path)
        for text in texts[-memory.max_size :]:
            memory.add(text)

    def ask(self, text: str) -> list[str]:
        """Search the notes, in a memory that is loaded for each request, as in the plugin."""
        return list(self._plugin.Memory(persist_path=self._path).get_relevant(text, TOP))

    def close(self) -> None:
        """Nothing is open."""


class OptillmSpl:
    """optillm's `spl` plugin in its learning mode: strategies by kind of problem, which an LLM writes and judges."""

    def __init__(self, folder: Path, _known: PeerEncoder, upstream: Upstream, _size: int) -> None:
        """Keep its files in a folder, instead of in the installed package."""
        self._spl: Any = import_module("optillm.plugins.spl.main")
        made: Callable[..., Any] = import_module("optillm.plugins.spl.strategy").StrategyDatabase
        self._open: Callable[[], Any] = lambda: made(str(folder / "strategies.json"), str(folder / "metrics.json"))
        vars(self._spl)["StrategyDatabase"] = self._open
        self._upstream = upstream

    def add(self, text: str) -> None:
        """Run a request through the plugin in its learning mode."""
        self._spl.run_spl("", text, self._upstream, "model", {"spl_learning": True})

    def add_all(self, texts: Sequence[str]) -> None:
        """Run them through the plugin: there is no other way, and a few hundred fill its ten strategies per kind."""
        for text in texts[:200]:
            self.add(text)

    def ask(self, text: str) -> list[str]:
        """Run a request through the plugin with default settings, and return its strategies."""
        self._spl.run_spl("", text, self._upstream, "model", {})
        return [strategy.strategy_text for strategy in self._open().strategies]

    def close(self) -> None:
        """Nothing is open."""


Opener = Callable[[Path, PeerEncoder, Upstream, int], Peer]
# How each is opened, and its packages.
PEERS: Mapping[str, tuple[Opener, tuple[str, ...]]] = {
    "optillm-memory": (Ours, ("optillm-memory",)),
    "chromadb": (Chroma, ("chromadb",)),
    "mem0+faiss": (mem0_faiss, ("mem0ai", "faiss-cpu")),
    "mem0+qdrant": (mem0_qdrant, ("mem0ai", "qdrant-client")),
    "langgraph": (LangGraph, ("langgraph", "langgraph-checkpoint-sqlite", "sqlite-vec")),
    "gptcache": (GptCache, ("gptcache", "faiss-cpu")),
    "optillm memory": (OptillmMemory, ("optillm",)),
    "optillm spl": (OptillmSpl, ("optillm",)),
}
