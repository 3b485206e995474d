"""usearch, exact."""

import sys

from usearch.index import MetricKind
from usearch.index import search as exact

from tests.bench.peers.search_loop import THREADS, Floats, K, load, serve


def _main(vectors_file: str, queries_file: str) -> None:
    vectors, queries = load(vectors_file), load(queries_file)

    def search(batch: Floats) -> list[list[int]]:
        found = exact(vectors, batch, K, MetricKind.IP, exact=True, threads=THREADS)
        rows: list[list[int]] = found.keys.reshape(len(batch), -1).tolist()
        return rows

    serve({"usearch": search}, queries)


if __name__ == "__main__":
    _main(*sys.argv[1:])
