"""How much a search of an inverted file has to look at: measured on the file's own rows when it is written.

For some rows, and for blends of two, the true nearest ten are found by comparing all rows. Then `nprobe` is the rank
within which the lists of nearly all of them come, and `candidates` the rank within which the rows themselves come by
their PCA prefixes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.relevance_floor import spread_of
from optillm_memory.recall.vectors.flat import EXCLUDED, top_k
from optillm_memory.recall.vectors.ivf import IvfIndex
from optillm_memory.recall.vectors.ivf_format import Header
from optillm_memory.recall.vectors.pca import PREFIX, Rest
from optillm_memory.recall.vectors.quantization import Vectors, dot_products_of_many, encode_query

# A file's own rows are easier to find than requests: the lists were trained on them. So more of their neighbours must
# be found than of those of blends, which are near to nothing.
_OF_ROWS, _MARGIN, _OF_BLENDS = 0.985, 1.1, 0.93
_QUERIES, _AT_ONCE, _NEAREST = 384, 4, 10
_COMPARED = 1_280  # rows that get exact cosines to find the true nearest ten
LEAST_ROWS, LEAST_CANDIDATES = 4_096, 500  # rows that a search probes in any case, and looks at in full


def calibrate(index: IvfIndex, rest: Rest) -> Header:
    """Return the file's header with what a search needs to find the nearest, and with the spread of its pairs."""
    head = index.header
    random = np.random.default_rng(1)
    rows, others = (random.permutation(len(index))[:_QUERIES] for _ in range(2))
    vectors = index.codes.vectors(rows)
    own = _needed(index, vectors, rows, rest)
    blends = (vectors + index.codes.vectors(others))[: _QUERIES // 3]
    blends /= np.maximum(np.linalg.norm(blends, axis=1, keepdims=True), 1e-9)
    nprobe, candidates = (
        max(_MARGIN * _rank_of(of_rows, _OF_ROWS), _rank_of(of_blends, _OF_BLENDS))
        for of_rows, of_blends in zip(own, _needed(index, blends, None, rest), strict=True)
    )
    nprobe = min(math.ceil(max(nprobe, LEAST_ROWS * head.nlist / len(index))), head.nlist)
    candidates = min(math.ceil(max(candidates, LEAST_CANDIDATES)), len(index))
    median, spread = spread_of(vectors) if len(rows) > 1 else (0.0, 0.0)
    index.drop_pages()
    return replace(
        head, nprobe=nprobe, candidates=candidates, recall=float(np.mean(own[0] <= nprobe)), pair_median=median,
        pair_spread=spread,
    )  # fmt: skip


def _needed(index: IvfIndex, queries: Vectors, own_rows: NDArray[np.int64] | None, rest: Rest) -> NDArray[np.int64]:
    """Return the ranks (see `_ranks`) of the nearest of all queries.

    `own_rows` are the rows that the queries are, which do not count.
    """
    found, prefixes = [], index.prefixes
    for start in range(0, len(queries), _AT_ONCE):
        block = queries[start : start + _AT_ONCE]
        products = dot_products_of_many(index.codes.high, np.stack([encode_query(query) for query in block]))
        projected = block @ index.components
        by_prefix = dot_products_of_many(
            prefixes, np.stack([encode_query(query[: prefixes.shape[1]]) for query in projected])
        )
        for at, query in enumerate(block):
            scores = np.asarray(products[at] * index.codes.scale, dtype=np.float32)
            if own_rows is not None:
                scores[own_rows[start + at]] = EXCLUDED
            found.append(_ranks(index, query, scores, projected[at], by_prefix[at]))
            rest()
    return np.hstack(found) if found else np.zeros((2, 0), dtype=np.int64)


def _ranks(
    index: IvfIndex, query: Vectors, approximate: NDArray[np.float32], projected: Vectors, by_prefix: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Return the ranks of a query's nearest: first of their lists among lists, then of the rows by their prefixes."""
    near = top_k(approximate, min(_COMPARED, len(approximate)))
    near = near[approximate[near] > EXCLUDED]
    nearest = near[np.argsort(-index.codes.cosines(near, query))[:_NEAREST]]
    rank = np.empty(index.header.nlist, dtype=np.int64)
    rank[np.argsort(-index.nearness(projected))] = np.arange(1, index.header.nlist + 1)
    products = by_prefix[nearest]
    above = np.sort(by_prefix[by_prefix > products.min(initial=127 * 127 * PREFIX)])
    return np.array([rank[index.list_of(nearest)], len(above) - np.searchsorted(above, products, side="right") + 1])


def _rank_of(ranks: NDArray[np.int64], share: float) -> int:
    """Return the rank within which this share of the ranks lies."""
    return int(np.sort(ranks)[math.ceil(share * len(ranks)) - 1]) if len(ranks) else 1
