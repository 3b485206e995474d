"""Exact search over vectors: ours beside numpy, faiss and usearch, and the memory's own speed."""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from tests.bench import roster
from tests.bench.faces_platform import FOLDER, child_env
from tests.bench.roster import Peer
from tests.bench.running import ServerFailed

Floats = npt.NDArray[np.float32]

DIMENSIONS: Final = 128
BATCHES: Final = (1, 32)
K: Final = 10
LIBRARIES: Final = (
    Peer(
        name="faiss",
        title="faiss IndexFlatIP",
        module="tests.bench.peers.search_faiss",
        needs=("faiss-cpu>=1.12", "numpy>=2"),
    ),
    Peer(
        name="usearch",
        title="usearch exact",
        module="tests.bench.peers.search_usearch",
        needs=("usearch>=2.21", "numpy>=2"),
    ),
)
HERE: Final = Peer(name="ours", title="ours", module="tests.bench.peers.search_here")
_QUERIES: Final = 256
# A call of a million vectors and 32 queries takes a second in the slowest library.
_CALLS_MIN: Final = 3
# A person's vectors have this cosine to each other, about; 10 of them to a person.
_COSINE: Final = 0.7
_OF_ONE: Final = 10
_SEED: Final = 20_260_101
_ROWS_AT_ONCE: Final = 50_000
# What float32 may be off by: such a result is as good as the one it stands for.
_EQUAL: Final = 1e-5


class Searched(msgspec.Struct, frozen=True, kw_only=True):
    """How long one engine takes for a search.

    Attributes:
        engine: `read` is one pass over the memory; `numpy` a product and a threshold,
            `numpy-partition` a product and a partition; `ours` has that threshold, `ours-open`
            has 0, which is what a request has that names none; or a library.
        entries: How many vectors there are.
        batch: Queries of a call.
        best_ms: The fastest call of all rounds: others who use the machine disturb it least.
        p50_ms: Half of the calls took no longer.
        p99_ms: 99 % of them.
        cpu_ms: Processor time of a call, of all threads together; of the round that used least.
        calls: How many there were.
        recall: Share of the right results among the first ten, None for `read`.
    """

    engine: str
    entries: int
    batch: int
    best_ms: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    calls: int
    recall: float | None


def search(
    sizes: Sequence[int], threads: int, seconds: float, rounds: int, say: Callable[[str], None]
) -> tuple[list[Searched], dict[str, str]]:
    """Search with every engine in turn; return what each takes, and versions of the libraries.

    Args:
        sizes: How many vectors.
        threads: How many each engine has.
        seconds: How long each engine has in a round.
        rounds: How often each has its turn.
        say: Is told how far it is.

    Raises:
        ServerFailed: An engine failed.
        ValueError: A library cannot be installed.
    """
    for peer in LIBRARIES:
        roster.install(peer)
    found = []
    for entries in sizes:
        say(f"search: {entries:,} vectors")
        vectors, queries = made(entries)
        right = exact(vectors, queries)
        files = _kept(vectors, queries)
        try:
            found += _of_size(files, entries, right, threads, seconds, rounds, say)
        finally:
            for file in files:
                file.unlink()
    return found, {peer.name: roster.version(peer) for peer in LIBRARIES}


def made(entries: int) -> tuple[Floats, Floats]:
    """Return vectors of persons, ten to each, and queries: an eleventh one of some of them.

    Shapes ``[entries, 128]`` and ``[256, 128]``, rows of length 1, the same on every run.
    """
    random = np.random.default_rng(_SEED)
    persons = _unit(random.standard_normal((-(-entries // _OF_ONE), DIMENSIONS), np.float32))
    asked = random.integers(0, len(persons), _QUERIES)
    vectors = _near(random, np.repeat(persons, _OF_ONE, axis=0)[:entries])
    # So that rows of one person do not lie side by side.
    random.shuffle(vectors)
    return vectors, _near(random, persons[asked])


def exact(vectors: Floats, queries: Floats) -> npt.NDArray[np.float64]:
    """Return the exact cosines of the `K` nearest vectors, best first, shape ``[queries, K]``."""
    wide = queries.astype(np.float64)
    best = np.full((len(queries), K), -np.inf)
    for i in range(0, len(vectors), _ROWS_AT_ONCE):
        part = wide @ vectors[i : i + _ROWS_AT_ONCE].astype(np.float64).T
        best = -np.sort(-np.concatenate([best, part], axis=1), axis=1)[:, :K]
    return best


def recall(
    vectors: Floats, queries: Floats, right: npt.NDArray[np.float64], rows: Sequence[Sequence[int]]
) -> float:
    """Return the share of results that are among the `K` nearest, by their exact cosine."""
    hits = 0
    for query, wanted, given in zip(queries, right, rows, strict=False):
        named = list(dict.fromkeys(given))[:K]
        scores = vectors[named].astype(np.float64) @ query.astype(np.float64)
        hits += int((scores >= wanted[-1] - _EQUAL).sum())
    return hits / (K * len(rows))


def _of_size(
    files: tuple[Path, Path],
    entries: int,
    right: npt.NDArray[np.float64],
    threads: int,
    seconds: float,
    rounds: int,
    say: Callable[[str], None],
) -> list[Searched]:
    took_ms: dict[tuple[str, int], list[float]] = {}
    cpu_ms: dict[tuple[str, int], list[float]] = {}
    rows: dict[tuple[str, int], list[list[int]]] = {}
    with ExitStack() as stack:
        engines = {
            name: child
            for peer in (HERE, *LIBRARIES)
            for child in [stack.enter_context(_child(peer, files, threads))]
            for name in child.engines
        }
        for number in range(rounds):
            names = list(engines)
            # Each round begins with another one.
            shift = number % len(names)
            for name in [*names[shift:], *names[:shift]]:
                for batch in BATCHES:
                    told = engines[name].ask(name, batch, seconds)
                    took_ms.setdefault((name, batch), []).extend(told["ms"])
                    cpu_ms.setdefault((name, batch), []).append(told["cpu_ms"])
                    rows[name, batch] = told["rows"]
            say(f"search: {entries:,} vectors, round {number + 1} of {rounds}")
    vectors, queries = (np.load(file) for file in files)
    return [
        Searched(
            engine=name,
            entries=entries,
            batch=batch,
            best_ms=min(each),
            p50_ms=float(np.percentile(each, 50)),
            p99_ms=float(np.percentile(each, 99)),
            cpu_ms=min(cpu_ms[name, batch]),
            calls=len(each),
            recall=recall(vectors, queries, right, rows[name, batch]) if name != "read" else None,
        )
        for (name, batch), each in took_ms.items()
    ]


class _Child:
    """A process that searches when it is asked to."""

    def __init__(self, process: "subprocess.Popen[str]", name: str) -> None:
        self._process = process
        self._name = name
        self.engines: list[str] = self._told()["engines"]

    def ask(self, engine: str, batch: int, seconds: float) -> Mapping[str, Any]:
        """Return how long each call took, and what the first one found."""
        asked = {"engine": engine, "batch": batch, "seconds": seconds, "calls": _CALLS_MIN}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._told()

    def _told(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            told: dict[str, Any] = json.loads(line)
            return told
        raise ServerFailed(f"{self._name} ended while it searched; it says why above")


@contextmanager
def _child(peer: Peer, files: tuple[Path, Path], threads: int) -> Iterator[_Child]:
    env = child_env() | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    line = [peer.python, "-m", peer.module, *map(str, files)]
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            yield _Child(process, peer.title)
        finally:
            process.kill()


def _kept(vectors: Floats, queries: Floats) -> tuple[Path, Path]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = FOLDER / "vectors.npy", FOLDER / "queries.npy"
    for file, array in zip(files, (vectors, queries), strict=True):
        np.save(file, array)
    return files


def _near(random: np.random.Generator, persons: Floats) -> Floats:
    """Return a vector for each row whose cosine to others of that row is about `_COSINE`."""
    noise = _unit(random.standard_normal(persons.shape, np.float32))
    return _unit(np.float32(_COSINE**0.5) * persons + np.float32((1 - _COSINE) ** 0.5) * noise)


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)
