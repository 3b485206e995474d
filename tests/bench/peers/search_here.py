"""Our own search, numpy as one would write it, and one pass over the memory."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from services.rustyface.galleries.search import NOBODY, Matrix
from services.rustyface.galleries.search import Search as Asked
from tests.bench.peers.search_loop import THREADS, Floats, K, Search, load, serve

# Above what strangers mostly have, below what the same person has.
_THRESHOLD: Final = 0.35
# Events come from the broker in batches, too.
_TOGETHER: Final = 10_000


def _reading(vectors: Floats) -> Search:
    """Return a pass over all vectors, by as many threads as the others have; it finds nothing."""
    threads = ThreadPoolExecutor(THREADS)
    parts = np.array_split(vectors.view(np.int64).reshape(-1), THREADS)
    touch: Callable[..., object] = np.bitwise_or.reduce

    def read(_batch: Floats) -> list[list[int]]:
        list(threads.map(touch, parts))
        return []

    return read


def _filtering(vectors: Floats) -> Search:
    """Return a matrix product, a threshold, and a partition of what is left."""

    def search(batch: Floats) -> list[list[int]]:
        found = []
        for scores in batch @ vectors.T:
            (rows,) = np.nonzero(scores >= _THRESHOLD)
            found.append(_best(rows, scores[rows]))
        return found

    return search


def _partitioning(vectors: Floats) -> Search:
    """Return a matrix product and a partition of everything."""

    def search(batch: Floats) -> list[list[int]]:
        found = []
        for scores in batch @ vectors.T:
            rows = np.argpartition(scores, len(scores) - K)[-K:]
            found.append(_best(rows, scores[rows]))
        return found

    return search


def _best(rows: "np.ndarray[tuple[int], np.dtype[np.int64]]", scores: Floats) -> list[int]:
    if len(rows) > K:
        part = np.argpartition(scores, len(scores) - K)[-K:]
        rows, scores = rows[part], scores[part]
    found: list[int] = rows[np.argsort(-scores)].tolist()
    return found


def _ours(matrix: Matrix, threshold: float) -> Search:
    def search(batch: Floats) -> list[list[int]]:
        asked = [Asked(query=query, k=K, threshold=threshold) for query in batch]
        return [[int(hit.id) for hit in found.hits] for found in matrix.search(*asked)]

    return search


def _filled(vectors: Floats) -> Matrix:
    matrix = Matrix(vectors.shape[1])
    for first in range(0, len(vectors), _TOGETHER):
        rows = vectors[first : first + _TOGETHER]
        ids = [str(first + i) for i in range(len(rows))]
        matrix.put_many(ids, rows, [NOBODY] * len(rows), [b""] * len(rows))
    return matrix


def _main(vectors_file: str, queries_file: str) -> None:
    vectors, queries = load(vectors_file), load(queries_file)
    matrix = _filled(vectors)
    engines = {
        "read": _reading(vectors),
        "numpy": _filtering(vectors),
        "numpy-partition": _partitioning(vectors),
        "ours": _ours(matrix, _THRESHOLD),
        "ours-open": _ours(matrix, 0.0),
    }
    serve(engines, queries)


if __name__ == "__main__":
    _main(*sys.argv[1:])
