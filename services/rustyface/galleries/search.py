"""The vectors of one gallery, and the ones nearest to a query: exact, by cosine.

Rows are float32 in one block of memory. Smaller types were measured and left out: float16 and int8
are slower than the memory's own speed through every library at hand, and the room that they save
is small beside what an entry's id and metadata take.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from bus.errors import InvalidRequest
from services.rustyface.galleries.candidates import Candidates
from services.rustyface.galleries.cosines import (
    Doubles,
    Floats,
    Ints,
    cosines_to_means,
    exact,
    means,
    units,
)
from services.rustyface.galleries.filters import Columns, Wanted

NOBODY: Final = -1

_ROWS_FIRST: Final = 64
# Such that scores stay in the processor's cache, for 32 queries at once: one product over a million
# rows takes a sixth longer. However many queries there are, it is so many rows at least.
_SCORES_AT_ONCE: Final = 1 << 19
_ROWS_AT_ONCE: Final = 1 << 10
_CACHE_LINE: Final = 64
_EPS: Final = float(np.finfo(np.float32).eps)
# By group the last word on the order has the mean, which is known of a person only once all their
# rows were looked at. So that many persons more than asked for are looked at: whoever is nearest by
# the mean is among the nearest by the best row.
_CANDIDATES_BESIDE: Final = 16
_REJECTED_MAX: Final = 48

# A score with its sign turned, the entry, its person: so that they sort best first.
_Ranked = tuple[float, str, int]


class Hit(msgspec.Struct, frozen=True, gc=False):
    """An entry near to a query.

    Attributes:
        id: The entry.
        score: The cosine, -1 to 1.
        group: The person's number; `NOBODY` for none.
        group_score: Cosine to the mean of that person's vectors; only by group.
        group_entries: How many those are; only by group.
        rejected: The query is at least as near to a face that is not this person.
    """

    id: str
    score: float
    group: int = NOBODY
    group_score: float | None = None
    group_entries: int | None = None
    rejected: bool = False


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """What is looked for.

    Attributes:
        query: The vector, of length 1.
        k: How many at most.
        threshold: Cosine below which a result leaves.
        by_group: One result for each person, with the best row; rows of nobody stand alone, and
            persons whom the query is said not to be come last.
        by_mean: By group, whether the cosine to the mean of a person's rows ranks them, not the
            best row's.
        wanted: What the entries' metadata must be.
        groups: Only rows of these persons; None for all.
        rejected: Faces that are not a person, by the person's number, shape ``[n, dimensions]``.
    """

    query: Floats
    k: int
    threshold: float
    by_group: bool = False
    by_mean: bool = False
    wanted: tuple[Wanted, ...] = ()
    groups: frozenset[int] | None = None
    rejected: Mapping[int, Floats] | None = None

    @property
    def candidates(self) -> int:
        """How many are looked at in full, so that the `k` best are among them."""
        if not self.by_group:
            return self.k
        beside = _CANDIDATES_BESIDE if self.by_mean else 0
        return self.k + beside + min(len(self.rejected or {}), _REJECTED_MAX)


class Result(msgspec.Struct, frozen=True):
    """What was found.

    Attributes:
        hits: Best first; of equal scores the smaller id comes first, so that replicas agree.
        searched: How many entries were compared.
    """

    hits: list[Hit]
    searched: int


class Matrix:
    """The embeddings of one gallery as rows of length 1.

    Belongs to one thread. Another one may read what `snapshot` gives, one at a time, until
    `release`: meanwhile no row that it has is written; what is deleted or replaced stays below
    the new rows and is overwritten at the release. So a search holds up neither the events that
    come in nor the event loop, and costs no copy of the rows.

    Args:
        dimensions: Length of each vector.
    """

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self._rows = _room(_ROWS_FIRST, dimensions)
        self._groups = np.full(_ROWS_FIRST, NOBODY, np.int32)
        self._ids: list[str] = []
        self._metadata: list[bytes] = []
        self._row_of: dict[str, int] = {}
        self._dead: list[int] = []
        self._read = False
        self._groups_read = False
        self._columns = Columns()

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, entry_id: object) -> bool:
        return entry_id in self._row_of

    @property
    def nbytes(self) -> int:
        """Memory that the vectors take, room for further ones included."""
        return self._rows.nbytes

    def ids(self) -> list[str]:
        """Return all entries, in no order that means anything."""
        return list(self._row_of)

    def vector(self, entry_id: str) -> Floats | None:
        """Return an entry's vector, of length 1, or None when there is no such entry."""
        row = self._row_of.get(entry_id)
        return None if row is None else self._rows[row].copy()

    def unit(self, vector: npt.ArrayLike) -> Floats:
        """Return a vector at length 1; any length but zero will do.

        Raises:
            InvalidRequest: It has other dimensions, no direction, or no numbers in it.
        """
        try:
            made = np.asarray(vector, np.float64)
        except (TypeError, ValueError):
            raise InvalidRequest("the embedding is no list of numbers", field="embedding") from None
        if made.shape != (self.dimensions,):
            raise InvalidRequest(
                f"the embedding has {' x '.join(map(str, made.shape)) or 'no'} dimensions, "
                f"the gallery has {self.dimensions}",
                field="embedding",
            )
        [row], [sound] = units(made[None])
        if not sound:
            found = "values that are no finite numbers" if made.any() else "only zeros"
            raise InvalidRequest(
                f"the embedding has {found}, so it has no direction", field="embedding"
            )
        return np.asarray(row, np.float32)

    def put_many(
        self,
        ids: Sequence[str],
        rows: Floats,
        groups: Sequence[int],
        metadata: Sequence[bytes],
    ) -> None:
        """Add entries, or replace them; of several with one id the last one counts.

        Args:
            ids: The entries.
            rows: Their vectors, of length 1, shape ``[n, dimensions]``.
            groups: The person of each.
            metadata: Of each, as MessagePack; empty for none.
        """
        first = len(self._ids)
        self._make_room(first + len(ids))
        self._rows[first : first + len(ids)] = rows
        self._groups[first : first + len(ids)] = groups
        self._ids.extend(ids)
        self._metadata.extend(metadata)
        for row, entry_id in enumerate(ids, first):
            if (before := self._row_of.get(entry_id)) is not None:
                self._dead.append(before)
            self._row_of[entry_id] = row
        self._settle()

    def delete(self, entry_id: str) -> bool:
        """Take an entry out and return whether it was there."""
        return self.delete_many([entry_id]) == 1

    def delete_many(self, ids: Iterable[str]) -> int:
        """Take entries out and return how many of them were there."""
        gone = [row for one in ids if (row := self._row_of.pop(one, None)) is not None]
        self._dead += gone
        self._settle()
        return len(gone)

    def regroup(self, ids: Iterable[str], group: int) -> None:
        """Give entries to another person."""
        if self._groups_read:
            # Whoever reads goes on with those that there were.
            self._groups = self._groups.copy()
            self._groups_read = False
        self._groups[[self._row_of[one] for one in ids]] = group

    def snapshot(self) -> "Snapshot":
        """Return the rows of this moment, to be read in another thread until `release`."""
        if self._read:
            raise RuntimeError("the rows are being read already")
        self._read = self._groups_read = True
        n = len(self._ids)
        return Snapshot(self._rows[:n], self._groups[:n], self._ids, self._metadata, self._columns)

    def release(self) -> None:
        """Say that nobody reads the snapshot any more."""
        self._read = self._groups_read = False
        self._settle()

    def search(self, *searches: Search) -> list[Result]:
        """Search here and now."""
        snapshot = self.snapshot()
        try:
            return snapshot.find(searches)
        finally:
            self.release()

    def _make_room(self, n: int) -> None:
        size = len(self._rows)
        if n <= size:
            return
        # Doubling copies each row once on average; mean while memory is held twice.
        while size < n:
            size *= 2
        rows = _room(size, self.dimensions)
        groups = np.full(size, NOBODY, np.int32)
        held = len(self._ids)
        rows[:held], groups[:held] = self._rows[:held], self._groups[:held]
        self._rows, self._groups = rows, groups

    def _settle(self) -> None:
        """Fill the gaps with the last rows, unless somebody reads."""
        if self._read or not self._dead:
            return
        n = len(self._ids)
        left = n - len(self._dead)
        dead = np.array(sorted(self._dead), np.int64)
        holes = dead[dead < left]
        movers = np.setdiff1d(np.arange(left, n), dead, assume_unique=True)
        self._rows[holes] = self._rows[movers]
        self._groups[holes] = self._groups[movers]
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self._ids[hole] = self._ids[mover]
            self._metadata[hole] = self._metadata[mover]
            self._row_of[self._ids[hole]] = hole
        # What was deleted is to be gone from memory, too.
        self._rows[left:n] = 0
        del self._ids[left:], self._metadata[left:]
        self._columns.move(holes, movers, left)
        self._dead.clear()


class Snapshot:
    """The rows of a matrix at one moment; may be read in another thread."""

    def __init__(
        self,
        rows: Floats,
        groups: npt.NDArray[np.int32],
        ids: Sequence[str],
        metadata: Sequence[bytes],
        columns: Columns,
    ) -> None:
        self._rows = rows
        self._groups = groups
        self._ids = ids
        self._metadata = metadata
        self._columns = columns

    def find(self, searches: Sequence[Search]) -> list[Result]:
        """Answer searches in one pass over the rows."""
        queries = np.array([search.query for search in searches])
        masks = [self._mask(search.wanted, search.groups) for search in searches]
        best = Candidates(
            [search.threshold for search in searches],
            [search.candidates for search in searches],
            [search.by_group for search in searches],
            self._groups,
            self._slack,
        )
        filled = _in_fours(queries)
        step = max(_ROWS_AT_ONCE, _SCORES_AT_ONCE // len(searches))
        for begin in range(0, len(self._rows), step):
            rows = self._rows[begin : begin + step]
            scores = (filled @ rows.T)[: len(searches)]
            for i, mask in enumerate(masks):
                if mask is not None:
                    scores[i, ~mask[begin : begin + step]] = -2
            best.take(scores, begin)
        ranked = self._ranked(searches, queries, *best.left())
        # One look at who each row shows, for all searches together.
        persons = self._rows_of(set().union(*map(_asked_about, searches, ranked)))
        by_group = any(search.by_group for search in searches)
        mean_of = self._means(persons) if by_group else {}
        return [
            Result(
                self._hits(search, rank, persons, mean_of),
                len(self._rows) if mask is None else int(np.count_nonzero(mask)),
            )
            for search, rank, mask in zip(searches, ranked, masks, strict=True)
        ]

    def matching(self, wanted: tuple[Wanted, ...], groups: frozenset[int] | None) -> list[str]:
        """Return the entries that a filter lets pass, in no order that means anything."""
        mask = self._mask(wanted, groups)
        rows = range(len(self._rows)) if mask is None else np.flatnonzero(mask).tolist()
        return [self._ids[row] for row in rows]

    @property
    def _slack(self) -> float:
        """By how much a product in float32 may miss the exact one."""
        return float(self._rows.shape[1] * _EPS)

    def _mask(
        self, wanted: tuple[Wanted, ...], groups: frozenset[int] | None
    ) -> npt.NDArray[np.bool_] | None:
        mask: npt.NDArray[np.bool_] | None = None
        if groups is not None:
            mask = np.isin(self._groups, np.array(sorted(groups), np.int32))
        for one in wanted:
            fits = self._columns.fits(one, self._metadata, len(self._rows))
            mask = fits if mask is None else mask & fits
        return mask

    def _ranked(
        self, searches: Sequence[Search], queries: Floats, asked: Ints, rows: Ints
    ) -> list[list[_Ranked]]:
        """Return the best of some rows for each search, best first.

        What a product of matrices gives depends, in its last bits, on where a row stands and on
        who else asks; replicas have to agree. So the last word has a sum in float64, row by row.
        """
        below = -exact(self._rows, rows, queries, asked)
        ids = map(self._ids.__getitem__, rows.tolist())
        every = list(zip(below.tolist(), ids, self._groups[rows].tolist(), strict=True))
        counts = np.bincount(asked, minlength=len(searches)).tolist()
        ranked, end = list[list[_Ranked]](), 0
        for search, count in zip(searches, counts, strict=True):
            own = sorted(every[end : end + count])
            end += count
            while own and -own[-1][0] < search.threshold:
                own.pop()
            if search.by_group:
                own = _first_of_each(own)
            ranked.append(own[: search.candidates])
        return ranked

    def _means(self, persons: Mapping[int, Ints]) -> dict[int, Doubles]:
        return dict(zip(persons, means(self._rows, list(persons.values())), strict=True))

    def _hits(
        self,
        search: Search,
        ranked: list[_Ranked],
        persons: Mapping[int, Ints],
        mean_of: Mapping[int, Doubles],
    ) -> list[Hit]:
        if not search.by_group and not search.rejected:
            return [Hit(entry, -below, group) for below, entry, group in ranked]
        shown = [group for _, _, group in ranked if group in persons] if search.by_group else []
        directions = np.array([mean_of[group] for group in shown]).reshape(-1, len(search.query))
        cosines = cosines_to_means(directions, search.query)
        to_mean = dict(zip(shown, cosines.tolist(), strict=True))
        hits = []
        for below, entry, group in ranked:
            own = persons.get(group)
            unlike = (search.rejected or {}).get(group)
            rejected = False
            if unlike is not None and own is not None:
                nearest = _nearest(self._rows, own, search.query)
                away = _nearest(unlike, np.arange(len(unlike)), search.query)
                rejected = away >= nearest
            hits.append(
                Hit(
                    entry,
                    -below,
                    group,
                    to_mean.get(group),
                    len(persons[group]) if group in to_mean else None,
                    rejected,
                )
            )
        if search.by_group:
            hits.sort(key=lambda hit: (hit.rejected, -_decisive(search, hit), hit.id))
        return hits[: search.k]

    def _rows_of(self, groups: set[int]) -> dict[int, Ints]:
        """Return the rows of persons."""
        if not groups:
            return {}
        # The last place stands for nobody.
        member = np.zeros(int(self._groups.max()) + 2, np.bool_)
        member[list(groups)] = True
        rows = np.flatnonzero(member[self._groups])
        of_row = self._groups[rows]
        order = np.argsort(of_row, kind="stable")
        rows, of_row = rows[order], of_row[order]
        starts = np.flatnonzero(np.diff(of_row, prepend=NOBODY - 1))
        return {int(self._groups[own[0]]): own for own in np.split(rows, starts[1:])}


def _room(n: int, dimensions: int) -> Floats:
    """Return room for rows, from the beginning of a cache line on.

    Where rows lie across lines, their product with a query takes a fifth longer: measured with
    10,000 of them, which stay in the cache.
    """
    made = np.empty(n * dimensions + _CACHE_LINE // 4, np.float32)
    first = -made.ctypes.data % _CACHE_LINE // 4
    return made[first : first + n * dimensions].reshape(n, dimensions)


def _in_fours(queries: Floats) -> Floats:
    """Return queries with zeros behind them, so that they are a multiple of four, or one.

    Measured with OpenBLAS: the product with 7 takes half as long again as that with 8, and the
    product with 31 a sixth longer than that with 32.
    """
    n, dimensions = queries.shape
    if n == 1 or n % 4 == 0:
        return queries
    filled = np.zeros((n + -n % 4, dimensions), np.float32)
    filled[:n] = queries
    return filled


def _asked_about(search: Search, ranked: list[_Ranked]) -> set[int]:
    """Return the persons of which all rows have to be looked at."""
    if not search.by_group and not search.rejected:
        return set()
    persons = {group for _, _, group in ranked} - {NOBODY}
    return persons if search.by_group else persons & (search.rejected or {}).keys()


def _nearest(rows: Floats, at: Ints, query: Floats) -> float:
    return float(exact(rows, at, query[None], np.zeros(len(at), np.int64)).max())


def _decisive(search: Search, hit: Hit) -> float:
    if search.by_mean and hit.group != NOBODY and hit.group_score is not None:
        return hit.group_score
    return hit.score


def _first_of_each(ranked: list[_Ranked]) -> list[_Ranked]:
    seen: set[int] = set()
    first = []
    for one in ranked:
        group = one[2]
        if group == NOBODY or group not in seen:
            seen.add(group)
            first.append(one)
    return first
