"""Jobs of datasets for tests: what does them, files for them, and what has become of them."""

import contextlib
import hashlib
import random
from pathlib import Path

import msgspec
import numpy as np
from hypothesis import strategies as st

from bus import job_rules
from bus import jobs as jobs_module
from bus import messages as m
from bus.client import connect
from bus.instance import join
from bus.tasks import beside
from bus.testing import until
from services.rustyface.galleries.galleries import Galleries, Query
from services.rustyface.photos.embedding import Pixel32
from services.rustyface.photos.images import decode
from services.rustyface.transfers.files import Head, Row, writer
from services.rustyface.transfers.transfer import GalleryJobs

REPOSITORY = Path(__file__).parents[2]
D = 8
# So many take a second: time to see an import on its way, and to end it there.
LARGE = 20_000
FORMATS = ("json", "npz", "parquet")
# Of any shape.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


class Tiny:
    """Names vectors of eight values; asked for none."""

    name, digest, dimensions = "tiny", "t1", D

    def encode(self, data: bytes):
        raise AssertionError(data)


class Pixels:
    """Embeds whole pictures, really."""

    name, digest, dimensions = "pixel32", Pixel32.digest, 1024

    def encode(self, data: bytes):
        return Pixel32().embed([decode(data)])[0], []


class Worker:
    def __init__(self, client, galleries, jobs) -> None:
        self.client, self.galleries, self.jobs = client, galleries, jobs

    async def do(self, action, dataset, state="done", **more) -> m.Job:
        """Have a job done, and return it when it has ended."""
        job = await self.jobs.enter(m.GalleryWork(action=action, dataset=dataset, **more))
        return await ended_as(self.client, job, state)


def starting(settings, tmp_path):
    """Return what starts what does jobs of datasets in a rustyface."""

    @contextlib.asynccontextmanager
    async def start(slot=0, encoder=None, at_once=1):
        here = msgspec.structs.replace(settings, slot=slot)
        encoder = encoder or Tiny()
        async with (
            connect(here.nats_url, name="rustyface", root=here.root) as own,
            join(own, here, plugin="rustyface", description="a test") as instance,
        ):
            store = own.store
            galleries = Galleries(
                store.galleries,
                own.root,
                encoder.name,
                encoder.dimensions,
                digest=encoder.digest,
                changes=store.changes,
            )
            folder = tmp_path / f"transfers-{slot}"
            jobs = GalleryJobs(own, instance, galleries, encoder, folder, lambda: at_once)
            async with beside(galleries.run()):
                await galleries.caught_up.wait()
                async with jobs.serving():
                    yield Worker(own, galleries, jobs)

    return start


def hurry(monkeypatch) -> None:
    """Make leases short, and have news told often."""
    monkeypatch.setattr(job_rules, "LEASE_S", 1.5)
    monkeypatch.setattr(jobs_module, "RENEW_S", 0.3)
    monkeypatch.setattr(jobs_module, "TELL_S", 0.05)


async def now_of(client, job: m.Job) -> m.Job:
    return (await client.store.jobs.get(job.job)).value


async def ended_as(client, job: m.Job, state: str, timeout_s: float = 60) -> m.Job:
    async def has_ended() -> bool:
        return (await now_of(client, job)).state in ("done", "failed", "cancelled")

    await until(has_ended, timeout_s)
    found = await now_of(client, job)
    assert found.state == state, found
    return found


async def writing(client, job: m.Job) -> m.Job:
    async def is_writing() -> bool:
        now = await now_of(client, job)
        return now.stage == "writing" and now.entries > 0

    await until(is_writing, 60)
    return await now_of(client, job)


def vector(*values: float) -> np.ndarray:
    wide = np.zeros(D)
    wide[: len(values)] = values
    return np.asarray(wide / np.linalg.norm(wide), np.float32)


def rows_of(count: int) -> list[Row]:
    numbers = np.random.default_rng(11)
    made = numbers.normal(size=(count, D))
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return [Row(f"e{i}", made[i].astype(np.float32), {"n": i}) for i in range(count)]


def as_file(path: Path, rows, kind="npz", head=None) -> Path:
    with contextlib.closing(writer(path, kind, head or Head(), D)) as file:
        file.add(rows)
        file.finish()
    return path


async def uploaded(client, path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: ASYNC240
    await client.store.faces.put(digest, path)
    return digest


async def stored(client) -> set[str]:
    return {one.digest for one in await client.store.faces.all()}


async def in_stream(client, galleries, dataset: str) -> list[str]:
    """Return the ids of a dataset as a replica that begins anew reads them from the stream."""
    anew = Galleries(client.store.galleries, client.root, "tiny", D)
    async with beside(anew.run()):
        await anew.caught_up.wait()
        assert anew.ids(dataset) == galleries.ids(dataset)
        return anew.ids(dataset)


async def answers(galleries, dataset, query):
    found = await galleries.search(dataset, Query(vector=query, k=5, threshold=-1, revision=None))
    return [
        (one.entry.id, round(one.score, 6), one.entry.subject, one.entry.metadata,
         one.entry.last_seen, one.entry.quality)
        for one in found.matches
    ]  # fmt: skip


def mutated(content: bytes, luck: random.Random) -> bytes:
    """Return bytes with some of them changed, cut out, doubled or cut off."""
    body = bytearray(content)
    for _ in range(luck.choice((1, 1, 2, 8))):
        at = luck.randrange(len(body) + 1)
        match luck.randrange(6):
            case 0:
                del body[at:]
            case 1:
                del body[at : at + luck.randrange(1, 40)]
            case 2:
                body[at:at] = body[at : at + luck.randrange(1, 60)]
            case 3:
                body[at:at] = luck.choice((b"\xff", b'"', b"{", b"]", b"\0" * 9, b"1e999", b"\\u"))
            case 4 if body:
                body[at % len(body)] ^= 1 << luck.randrange(8)
            case 5 if body:
                body[at % len(body)] = luck.randrange(256)
    return bytes(body)
