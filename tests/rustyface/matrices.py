"""A gallery's vectors as tests fill and ask them: one at a time."""

import numpy.typing as npt

from services.rustyface.galleries.search import NOBODY, Hit, Matrix, Search


def put(matrix: Matrix, entry: str, vector: npt.ArrayLike, group: int = NOBODY) -> None:
    """Add an entry, or give it another vector."""
    matrix.put_many([entry], matrix.unit(vector)[None], [group], [b""])


def nearest(matrix: Matrix, query: npt.ArrayLike, k: int = 5, threshold: float = 0.0) -> list[Hit]:
    """Return the entries nearest to a query, best first, without those below `threshold`."""
    [found] = matrix.search(Search(query=matrix.unit(query), k=k, threshold=threshold))
    return found.hits
