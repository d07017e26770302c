"""The contestants of `benchmarks ann`: our own index, faiss, usearch and hnswlib behind one small interface.

Each is used as suits rows on disk best: ours as inverted lists of rows in two planes of bytes, faiss as inverted lists
of 8 bits a number and, as 8 bits have a limit to what they find, of 16; usearch as a graph over rows of 8 bits,
hnswlib, which has no such rows, as a graph over floats. All compare unit vectors by inner product.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import math
import mmap
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from optillm_memory.bench.records import DIMENSION, Records
from optillm_memory.recall.vectors import ivf_writer, quantization
from optillm_memory.recall.vectors.ivf import IvfIndex
from optillm_memory.recall.vectors.scope_index import Batch, Limits, ScopeIndex, header_for
from optillm_memory.recall.vectors.source import Change
from optillm_memory.store.sqlite.index_files import IndexFiles

Vectors = NDArray[np.float32]
Numbers = NDArray[np.int64]
_FINGERPRINT, _NAME = "bench", "rows"
_PER_CENTROID = 40  # rows that faiss trains each centroid on: the least it does not warn of
_GRAPH_FROM = 2_048  # lists from which on a graph over the centroids is faster than to compare them all
_ROOM = 4_096  # rows that may be added to a graph whose size is fixed


class Index(Protocol):
    """One contestant, in a folder of its own. `effort` is what it trades time for recall by; 0 where it decides."""

    @property
    def efforts(self) -> Sequence[int]:
        """What may be set as effort, in ascending order."""

    def __init__(self, folder: Path) -> None:
        """Name the folder."""

    def build(self, records: Records) -> None:
        """Index all records by their numbers and put the index on disk."""

    def open(self, *, writable: bool) -> None:
        """Open what was built: mapped where that can be, unless it is to be changed."""

    def set_effort(self, effort: int) -> None:
        """Set how much a search looks at."""

    def search(self, query: Vectors, count: int) -> list[int]:
        """Return the numbers of the nearest rows, best first."""

    def insert(self, number: int, vector: Vectors) -> None:
        """Add one row."""

    def delete(self, number: int) -> None:
        """Take one row out: no search may find it afterwards."""

    def stored(self, numbers: Numbers, vectors: Vectors) -> list[bytes]:
        """Return the bytes by which rows would be recognised on disk."""

    def save(self) -> None:
        """Put the changes on disk by the quickest way there is."""

    def purge(self) -> None:
        """Put the changes on disk so that no byte of a deleted row is left."""


class Ours:
    """The index of this package: an inverted file that never changes, and the changes since in memory."""

    efforts: Sequence[int] = (0,)

    def __init__(self, folder: Path) -> None:
        """Name the folder."""
        self._files = IndexFiles(folder)
        self._index = ScopeIndex(DIMENSION, (0.0, 0.1), (0, 1))

    def build(self, records: Records) -> None:
        """Write the file as a memory that is loaded does: anew each time so many rows have come."""
        for start, vectors in records.blocks():
            self._apply([Change(n, v.tobytes(), n + 1) for n, v in enumerate(vectors, start)])
            if len(self._index.flat) >= Limits().loaded_rows or start + len(vectors) == records.size:
                self._write(retrain=False)

    def open(self, *, writable: bool) -> None:  # noqa: ARG002 - changes are kept in memory
        """Map the file, and keep what is searched in memory as far as the user may lock memory."""
        ivf = self._ivf()
        self._index = ScopeIndex(DIMENSION, (0.0, 0.1), (0, 1), ivf)
        if ivf is not None:
            list(ivf.lock_in_memory(self._files))

    def set_effort(self, effort: int) -> None:
        """Do nothing: how much is looked at was measured when the file was written."""

    def search(self, query: Vectors, count: int) -> list[int]:
        """Search the file and what changed since."""
        return [number for number, _ in self._index.search(query, count)]

    def insert(self, number: int, vector: Vectors) -> None:
        """Add a row in memory."""
        self._apply([Change(number, vector.tobytes(), self._index.since + 1)])

    def delete(self, number: int) -> None:
        """Leave a row out."""
        self._apply([Change(number, None, self._index.since + 1)])

    def stored(self, numbers: Numbers, vectors: Vectors) -> list[bytes]:  # noqa: ARG002
        """Return the high bytes, which are what lies on disk."""
        return [row.tobytes() for row in quantization.encode(vectors).high]

    def save(self) -> None:
        """Remove the file, as whoever forgets does at once: the rows are in the table, and are searched in memory."""
        self._files.remove(_NAME)

    def purge(self) -> None:
        """Write the file anew, with lists made from the rows that are left alone."""
        self._write(retrain=True)

    def _apply(self, changes: list[Change]) -> None:
        self._index.apply(Batch.of(changes, self._index.since, DIMENSION))

    def _ivf(self) -> IvfIndex | None:
        content = self._files.mapped(_NAME)
        return IvfIndex(content) if content is not None else None

    def _write(self, *, retrain: bool) -> None:
        rows, since = self._index.rows()
        with self._files.draft(_NAME) as draft:
            assert draft is not None
            header = header_for(rows, _FINGERPRINT, (0, 1), since)
            ivf_writer.write(draft, rows, header, lambda: None, retrain=retrain)
        self._index = ScopeIndex(DIMENSION, (0.0, 0.1), (0, 1), self._ivf())


class Faiss:
    """faiss: inverted lists of rows of 16-bit floats; mapped from disk it cannot be changed."""

    _bits = "QT_fp16"
    efforts: Sequence[int] = tuple(dict.fromkeys(round(1.25**n) for n in range(40)))

    def __init__(self, folder: Path) -> None:
        """Name the file."""
        self._faiss = importlib.import_module("faiss")
        self._path = str(folder / "rows.faiss")
        self._index: Any = None

    def build(self, records: Records) -> None:
        """Train 4 sqrt(rows) lists on a sample, then add everything."""
        lists, waiting = round(4 * math.sqrt(records.size)), list[tuple[int, Vectors]]()
        inner, flat = self._faiss.METRIC_INNER_PRODUCT, self._faiss.IndexFlatIP(DIMENSION)
        coarse = self._faiss.IndexHNSWFlat(DIMENSION, 32, inner) if lists > _GRAPH_FROM else flat
        bits, residual = getattr(self._faiss.ScalarQuantizer, self._bits), self._bits == "QT_8bit"
        index = self._faiss.IndexIVFScalarQuantizer(coarse, DIMENSION, lists, bits, inner, residual)
        index.cp.spherical = True
        if coarse is not flat:
            index.quantizer_trains_alone, index.clustering_index = 2, flat
            coarse.hnsw.efSearch = 64
        wanted = min(_PER_CENTROID * lists, records.size)
        for start, vectors in records.blocks():
            waiting.append((start, vectors))
            if start + len(vectors) >= wanted:
                if not index.is_trained:
                    index.train(np.concatenate([block for _, block in waiting]))
                for first, block in waiting:
                    index.add_with_ids(block, np.arange(first, first + len(block)))
                waiting.clear()
        self._faiss.write_index(index, self._path)

    def open(self, *, writable: bool) -> None:
        """Map the lists, or read them where they are to be changed."""
        self._faiss.omp_set_num_threads(1)  # one query at a time: more threads only wait for one another
        flags = 0 if writable else self._faiss.IO_FLAG_MMAP | self._faiss.IO_FLAG_READ_ONLY
        self._index = self._faiss.read_index(self._path, flags)
        if not writable:  # threads that read lists ahead take longer than a search of what is in the page cache
            self._faiss.downcast_InvertedLists(self._index.invlists).prefetch_nthread = 0

    def set_effort(self, effort: int) -> None:
        """Set how many lists are looked into."""
        self._index.nprobe = effort

    def search(self, query: Vectors, count: int) -> list[int]:
        """Search the lists nearest to the query."""
        return [number for number in self._index.search(query[None], count)[1][0].tolist() if number >= 0]

    def insert(self, number: int, vector: Vectors) -> None:
        """Add a row to its list."""
        self._index.add_with_ids(vector[None], np.array([number]))

    def delete(self, number: int) -> None:
        """Remove a row, for which all lists are gone through."""
        self._index.remove_ids(np.array([number]))

    def stored(self, numbers: Numbers, vectors: Vectors) -> list[bytes]:  # noqa: ARG002
        """Look the rows up in all lists: a row's bytes are those of its distance to its centroid."""
        lists, found, wanted = self._index.invlists, dict[int, bytes](), set(numbers.tolist())
        for number in range(lists.nlist):
            if size := lists.list_size(number):
                ids = self._faiss.rev_swig_ptr(lists.get_ids(number), size)
                for row in np.flatnonzero(np.isin(ids, numbers)).tolist():
                    rows = self._faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size)
                    found[int(ids[row])] = rows[row * lists.code_size : (row + 1) * lists.code_size].tobytes()
        return [found[number] for number in numbers.tolist() if number in wanted]

    def save(self) -> None:
        """Write everything."""
        self._faiss.write_index(self._index, self._path)

    def purge(self) -> None:
        """Write everything: removed rows are in no list any more. A centroid may still be one of them."""
        self.save()


class FaissBytes(Faiss):
    """The same with 8 bits a number: of the distance to the centroid, which is smaller than the vector."""

    _bits = "QT_8bit"


class Usearch:
    """usearch: a graph over rows of 8 bits a number; mapped from disk it cannot be changed."""

    efforts: Sequence[int] = tuple(dict.fromkeys(round(16 * 1.25**n) for n in range(24)))

    def __init__(self, folder: Path) -> None:
        """Name the file."""
        self._path = str(folder / "rows.usearch")
        self._index: Any = None

    def build(self, records: Records) -> None:
        """Add everything on all cores."""
        self._index = self._empty()
        for start, vectors in records.blocks():
            self._index.add(np.arange(start, start + len(vectors)), _bytes(vectors))
        self.save()

    def open(self, *, writable: bool) -> None:
        """Map the file, or read it where it is to be changed."""
        self._index = self._empty()
        self._index.load(self._path) if writable else self._index.view(self._path)

    def set_effort(self, effort: int) -> None:
        """Set how many candidates a search keeps."""
        self._index.expansion_search = effort

    def search(self, query: Vectors, count: int) -> list[int]:
        """Walk the graph."""
        return [int(number) for number in self._index.search(_bytes(query[None])[0], count, threads=1).keys]

    def insert(self, number: int, vector: Vectors) -> None:
        """Add a row."""
        self._index.add(number, _bytes(vector[None])[0])

    def delete(self, number: int) -> None:
        """Mark a row as deleted."""
        self._index.remove(number)

    def stored(self, numbers: Numbers, vectors: Vectors) -> list[bytes]:  # noqa: ARG002
        """Return the rows as bytes."""
        return [row.tobytes() for row in _bytes(vectors)]

    def save(self) -> None:
        """Write everything, deleted rows too."""
        self._index.save(self._path)

    def purge(self) -> None:
        """Make the graph anew from the rows that are left: nothing else takes their bytes out of the file."""
        keys = np.asarray(self._index.keys, dtype=np.uint64)
        fresh = self._empty()
        for start in range(0, len(keys), 4_096):
            some = keys[start : start + 4_096]
            fresh.add(some, np.asarray(self._index.get(some)))
        self._index = fresh
        self.save()

    def _empty(self) -> Any:
        index = importlib.import_module("usearch.index")
        return index.Index(ndim=DIMENSION, metric="cos", dtype="i8")


class Hnswlib:
    """hnswlib: a graph over floats, which is read into memory as a whole."""

    efforts: Sequence[int] = tuple(dict.fromkeys(round(10 * 1.25**n) for n in range(24)))

    def __init__(self, folder: Path) -> None:
        """Name the file."""
        self._path = str(folder / "rows.hnsw")
        self._index: Any = self._empty()

    def build(self, records: Records) -> None:
        """Add everything on all cores, with its default of 16 links and 200 candidates."""
        self._index.init_index(max_elements=records.size, ef_construction=200, M=16)
        for start, vectors in records.blocks():
            self._index.add_items(vectors, np.arange(start, start + len(vectors)))
        self._index.save_index(self._path)

    def open(self, *, writable: bool) -> None:
        """Read the file, with room for more rows."""
        self._index = self._empty()
        self._index.load_index(self._path)
        if writable:
            self._index.resize_index(self._index.get_max_elements() + _ROOM)

    def set_effort(self, effort: int) -> None:
        """Set how many candidates a search keeps."""
        self._index.set_ef(effort)

    def search(self, query: Vectors, count: int) -> list[int]:
        """Walk the graph."""
        found: list[int] = self._index.knn_query(query[None], k=count, num_threads=1)[0][0].tolist()
        return found

    def insert(self, number: int, vector: Vectors) -> None:
        """Add a row."""
        self._index.add_items(vector[None], np.array([number]))

    def delete(self, number: int) -> None:
        """Mark a row as deleted."""
        self._index.mark_deleted(number)

    def stored(self, numbers: Numbers, vectors: Vectors) -> list[bytes]:  # noqa: ARG002
        """Return the rows as bytes."""
        return [row.tobytes() for row in vectors]

    def save(self) -> None:
        """Write everything, deleted rows too."""
        self._index.save_index(self._path)

    def purge(self) -> None:
        """Make the graph anew from the rows that are left."""
        labels = [label for label in self._index.get_ids_list() if self._lives(label)]
        fresh = self._empty()
        fresh.init_index(max_elements=len(labels), ef_construction=200, M=16)
        for start in range(0, len(labels), 4_096):
            some = labels[start : start + 4_096]
            fresh.add_items(np.array(self._index.get_items(some)), np.array(some))
        self._index = fresh
        self.save()

    def _lives(self, label: int) -> bool:
        with contextlib.suppress(RuntimeError):  # the label was deleted
            self._index.get_items([label])
            return True
        return False

    @staticmethod
    def _empty() -> Any:
        return importlib.import_module("hnswlib").Index(space="ip", dim=DIMENSION)


KINDS: dict[str, type[Index]] = {
    "ours": Ours, "faiss": Faiss, "faiss-8bit": FaissBytes, "usearch": Usearch, "hnswlib": Hnswlib,
}  # fmt: skip
PACKAGES = {"ours": "optillm-memory", "faiss": "faiss-cpu", "usearch": "usearch", "hnswlib": "hnswlib"}


def version_of(name: str) -> str | None:
    """Return the version of a contestant's package, None where it is not installed."""
    name = name.partition("-")[0]
    if name != "ours" and importlib.util.find_spec(name) is None:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(PACKAGES[name])
    return "unknown"


def _bytes(vectors: Vectors) -> NDArray[np.int8]:
    """Return unit vectors in bytes, each as large as a byte can hold: a cosine does not see the factor."""
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    return np.asarray(np.rint(vectors * (127 / np.maximum(largest, 1e-9))), dtype=np.int8)


# -- AVX2 alone ------------------------------------------------------------------------------------


def avx2_environment() -> dict[str, str]:
    """Return the variables that keep numpy, its BLAS and faiss from newer instructions; set before they are loaded."""
    features = importlib.import_module("numpy._core._multiarray_umath")
    newer = [name for name in features.__cpu_dispatch__ if "512" in name or "V4" in name]
    there = [name for name in newer if features.__cpu_features__.get(name)]
    masked = {"NPY_DISABLE_CPU_FEATURES": " ".join(there)} if there else {}
    return {**masked, "OPENBLAS_CORETYPE": "Haswell", "FAISS_SIMD_LEVEL": "AVX2"}


def mask_newer_than_avx2(name: str, folder: Path) -> bool:
    """Keep this process's contestant from instructions newer than AVX2; return whether that could be done."""
    if name.startswith("faiss"):
        faiss = importlib.import_module("faiss")
        return bool(faiss.SIMDConfig.get_level_name() == "AVX2")
    if name == "hnswlib" or importlib.util.find_spec("numkong") is None:
        return name == "ours"  # hnswlib was compiled for this machine; without numkong ours is numpy alone
    numkong = importlib.import_module("numkong")
    for family, there in numkong.get_capabilities().items():
        if there and family not in ("serial", "haswell"):
            numkong.disable_capability(family)
    return name == "ours" or _answer_for_usearch(folder)


def _answer_for_usearch(folder: Path) -> bool:
    """Have usearch find the families that are left: it asks the machine anew, unless another library answers first."""
    extension = importlib.import_module("numkong._numkong")
    compiler = shutil.which("cc")
    try:
        left = ctypes.c_uint64.in_dll(ctypes.CDLL(extension.__file__), "static_capabilities").value
    except ValueError:
        return False
    if compiler is None or not left:
        return False
    source, library = folder / "families.c", folder / "families.so"
    source.write_text(f"unsigned long long nk_capabilities(void) {{ return {left}ULL; }}\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    index = importlib.import_module("usearch.index").Index(ndim=DIMENSION, metric="cos", dtype="i8")
    return str(index.hardware_acceleration) in ("haswell", "serial")


def found_in(folder: Path, patterns: Iterable[bytes]) -> int:
    """Return how many patterns lie in any file of a folder."""
    wanted, found = list(patterns), set[int]()
    for path in folder.iterdir():
        if path.suffix not in (".c", ".so") and path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                found |= {at for at, pattern in enumerate(wanted) if content.find(pattern) >= 0}
    return len(found)
