"""Images that are kept, while one replica enrols what another one removes."""

import asyncio
import contextlib
import random
from dataclasses import dataclass

import numpy as np
import pytest

from bus import messages as m
from bus.artefacts import Artefacts
from bus.client import Client
from bus.errors import Unavailable
from bus.jetstream import ask_jetstream
from services.rustyface.galleries import clearing
from services.rustyface.galleries.galleries import Galleries, NewEntry
from services.rustyface.photos.kept import KeptImages

EAST = np.array([1, 0], np.float32)
PHOTO = np.random.default_rng(7).bytes(300 * 1024)


class Keeper(KeptImages):
    """Stops whoever drops an image where a test says so."""

    def __init__(self, store: Artefacts) -> None:
        super().__init__(store)
        self.before_drop = self.after_look = nothing

    async def drop(self, digest, named) -> None:
        async def looked(image: str) -> bool:
            found = await named(image)
            await self.after_look()
            return found

        await self.before_drop()
        await super().drop(digest, looked)


async def nothing() -> None:
    """Stop nobody."""


@dataclass
class Side:
    """One of two replicas.

    Attributes:
        client: Its connection.
        galleries: What it has read.
        kept: How it keeps images.
    """

    client: Client
    galleries: Galleries
    kept: Keeper

    async def enrol(self, entry: str, photo: bytes = PHOTO) -> str:
        """Enrol an entry with its image, in the order of `Faces`."""
        digest = await self.kept.keep(photo)
        new = NewEntry(id=entry, vector=EAST, image=digest)
        await self.galleries.enrol("g", new)
        await self.kept.ensure(digest, photo)
        return digest

    async def remove(self, entry: str) -> None:
        assert (await self.galleries.remove("g", entry)).unerased is None


@pytest.fixture
async def sides(connected, replica, client):
    async with contextlib.AsyncExitStack() as opened:
        made = []
        for _ in range(2):
            mine = await connected()
            kept = Keeper(mine.store.faces)
            galleries = await opened.enter_async_context(replica(mine, drop_image=kept.drop))
            made.append(Side(mine, galleries, kept))
        await made[0].galleries.create("g")
        yield made


async def read(client, digest: str) -> bytes:
    return b"".join([block async for block in client.store.faces.read(digest)])


async def chunks(client) -> int:
    return sum((await client.store.faces._stream.occupied("$O.*.C.*")).subjects.values())


@pytest.mark.parametrize("moment", ["before_drop", "after_look"])
async def test_a_photo_that_is_enrolled_while_another_replica_drops_it_is_kept(
    sides, client, moment
):
    removes, enrols = sides
    digest = await enrols.enrol("old")

    async def enrol() -> None:
        setattr(removes.kept, moment, nothing)
        await enrols.enrol("new")

    setattr(removes.kept, moment, enrol)
    await removes.remove("old")
    assert await read(client, digest) == PHOTO
    assert await chunks(client) == 3
    # And it goes with that one.
    await removes.remove("new")
    assert await client.store.faces.all() == []
    assert await chunks(client) == 0


@pytest.mark.parametrize("moment", ["after_look", "after_all"])
async def test_whoever_enrols_sees_that_an_image_went_that_was_there_when_it_brought_it(
    sides, client, moment
):
    removes, enrols = sides
    digest = await enrols.enrol("old")
    assert await enrols.kept.keep(PHOTO) == digest

    async def enrol() -> None:
        assert await client.store.faces.size(digest) is None
        await enrols.galleries.enrol("g", NewEntry(id="new", vector=EAST, image=digest))
        await enrols.kept.ensure(digest, PHOTO)

    if moment == "after_look":
        removes.kept.after_look = enrol
    await removes.remove("old")
    if moment == "after_all":
        await enrol()
    assert await read(client, digest) == PHOTO
    assert await chunks(client) == 3


async def test_an_image_that_came_back_into_sight_too_late_to_be_decided_is_decided_again(
    sides, client, monkeypatch
):
    """The broker went away between the two; the entry is read meanwhile."""
    removes, enrols = sides
    monkeypatch.setattr(clearing, "PAUSE_S", 0.05)
    digest = await enrols.enrol("old")

    async def enrol() -> None:
        removes.kept.before_drop = nothing
        await enrols.enrol("new")

    async def away() -> None:
        removes.kept.after_look = nothing
        await removes.galleries.wait(await removes.galleries.newest())
        raise Unavailable("the broker is away")

    removes.kept.before_drop, removes.kept.after_look = enrol, away
    await removes.remove("old")
    assert await read(client, digest) == PHOTO


async def test_in_whatever_order_two_replicas_come_every_entry_has_its_image(sides, client):
    chance = random.Random(4)  # noqa: S311 - no secret
    photos = [PHOTO[i : i + 1_000] for i in range(3)]

    async def work(side: Side, name: str) -> None:
        for turn in range(40):
            await asyncio.sleep(chance.random() / 200)
            await side.enrol(f"{name}{turn}", chance.choice(photos))
            await asyncio.sleep(chance.random() / 200)
            if turn % 8:
                await side.galleries.remove("g", f"{name}{turn}")

    async with asyncio.TaskGroup() as tasks:
        for i, side in enumerate((*sides, *sides)):
            tasks.create_task(work(side, f"{i}-"))
    for side in sides:
        await side.galleries._ledger.chores_done()
    entries, _, total = await sides[0].galleries.entries("g", limit=1_000)
    assert total == 4 * 5
    wanted = {one.image for one in entries}
    for digest in wanted:
        assert await read(client, digest) in photos
    assert {one.digest for one in await client.store.faces.all()} == wanted
    assert await chunks(client) == len(wanted)
    assert await client.store.faces.half_deleted(m.now()) == []


async def test_enrolling_asks_the_broker_one_small_question_more_where_images_are_kept(
    sides, monkeypatch
):
    _, enrols = sides
    digest = await enrols.kept.keep(PHOTO)
    asked = []

    async def counted(nc, subject, *told: object, **more):
        asked.append(subject.split(".")[:5])
        return await ask_jetstream(nc, subject, *told, **more)

    monkeypatch.setattr("bus.streams.ask_jetstream", counted)
    await enrols.kept.ensure(digest, PHOTO)
    assert asked == [["$JS", "API", "STREAM", "MSG", "GET"]]
