"""faiss, exact."""

import sys

import faiss

from tests.bench.peers.search_loop import THREADS, Floats, K, load, serve


def _main(vectors_file: str, queries_file: str) -> None:
    faiss.omp_set_num_threads(THREADS)
    vectors, queries = load(vectors_file), load(queries_file)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    del vectors

    def search(batch: Floats) -> list[list[int]]:
        _, rows = index.search(batch, K)
        found: list[list[int]] = rows.tolist()
        return found

    serve({"faiss": search}, queries)


if __name__ == "__main__":
    _main(*sys.argv[1:])
