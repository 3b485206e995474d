"""A gallery with persons: who has which entries, and what of them the broker has."""

import numpy as np

from bus import codec
from bus import messages as m
from bus.subjects import gallery_events
from services.rustyface.galleries.galleries import Galleries, NewEntry, Query

EAST, NORTH = np.array([1, 0], np.float32), np.array([0, 1], np.float32)
NEARLY_EAST = np.array([1, 0.1], np.float32)


def new(name: str, vector=EAST, **more) -> NewEntry:
    return NewEntry(id=name, vector=vector, **more)


async def persons(*replicas: Galleries) -> dict[str, list[str]]:
    """Return who has which entries, of which all replicas have to be of one mind."""
    newest = await replicas[0].newest()
    told = []
    for one in replicas:
        await one.wait(newest)
        subjects, _, _ = await one.subjects("g", limit=1_000)
        people = {}
        for subject in subjects:
            entries, _, _ = await one.entries("g", limit=1_000, subject=subject.id)
            people[subject.id] = [entry.id for entry in entries]
        told.append(people)
    assert all(one == told[0] for one in told)
    return told[0]


async def vectors_of(client) -> list[str]:
    """Return the last token of every subject that carries a vector in the stream."""
    kinds = {"entry": m.GalleryEntry, "rejection": m.GalleryRejection}
    found = []
    async for stored in client.store.galleries.read(gallery_events(client.root)):
        kind, name = stored.subject.split(".")[3:][0], stored.subject.rpartition(".")[2]
        if kind in kinds:
            event = codec.decode(stored.body, kinds[kind], stored.headers.get(codec.CONTENT_TYPE))
            if event.embedding is not None:
                found.append(name)
    return sorted(found)


async def found(galleries, vector=EAST, **more):
    query = {"vector": vector, "k": 5, "threshold": 0.0, "revision": None, **more}
    return (await galleries.search("g", Query(**query))).matches
