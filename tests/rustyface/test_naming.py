"""Who is named by a search: whom the dataset's scoring decides for, and nobody who was rejected."""

import asyncio

import msgspec
import numpy as np
import pytest

from bus import messages as m
from bus.errors import Conflict, InvalidRequest
from bus.subjects import DATASET_MANAGE, FACES_SEARCH
from services.rustyface.galleries.galleries import NewEntry, Query
from services.rustyface.galleries.ledger import Ledger
from services.rustyface.photos.encoder import PixelEncoder

THRESHOLD = 0.45


def at_cosine(cosine: float, axis: int) -> np.ndarray:
    """Return a vector with a cosine to the query, otherwise along an axis of its own."""
    vector = np.zeros(128, np.float32)
    vector[0], vector[axis] = cosine, (1 - cosine**2) ** 0.5
    return vector


QUERY = at_cosine(1, 1)
# By their best entry it is ann, by the mean of all bob: 0.31 and 0.88.
FACES = {
    "a0": ("ann", at_cosine(0.9, 1)),
    "a1": ("ann", at_cosine(-0.6, 2)),
    "b0": ("bob", at_cosine(0.8, 3)),
    "b1": ("bob", at_cosine(0.8, 4)),
    "n0": (None, at_cosine(0.3, 5)),
}


async def manage(client, action, **more) -> m.DatasetList:
    return await client.call(DATASET_MANAGE, m.ManageDataset(action=action, dataset="g", **more))


@pytest.fixture
async def people(client, worker):
    """A worker; of ann, bob and nobody there are faces."""
    async with worker() as galleries:
        await galleries.create("g", settings=m.DatasetSettings(threshold=THRESHOLD))
        entries = [
            NewEntry(id=name, vector=vector, subject=subject)
            for name, (subject, vector) in FACES.items()
        ]
        await galleries.enrol_many("g", entries, existing="fail")
        yield galleries


async def search(client, **asked) -> m.FaceMatches:
    given = {"dataset": "g", "embedding": QUERY.tolist(), "threshold": -1.0} | asked
    return await client.call(FACES_SEARCH, m.SearchFaces(**given))


async def scored(client, scoring) -> None:
    await manage(client, "configure", changes={"scoring": scoring})


@pytest.mark.parametrize(
    ("scoring", "named"),
    [
        ("best", [("ann", True), ("bob", True), (None, False)]),
        ("mean", [("bob", True), ("ann", False), (None, False)]),
    ],
)
async def test_the_scoring_ranks_persons_and_decides_who_is_known(people, client, scoring, named):
    await scored(client, scoring)
    found = await search(client, group_by="subject")
    assert [(one.subject, one.known) for one in found.results] == named
    assert (found.known, found.subject) == (True, named[0][0])


@pytest.mark.parametrize(("scoring", "name"), [("best", "ann"), ("mean", "bob")])
async def test_whoever_is_named_is_so_as_well_when_only_one_is_asked_for(
    people, client, scoring, name
):
    await scored(client, scoring)
    found = await search(client, group_by="subject", top_k=1)
    assert [one.subject for one in found.results] == [name]
    assert (found.known, found.subject) == (True, name)


@pytest.mark.parametrize("top_k", [1, 5])
async def test_whoever_was_rejected_stands_behind_and_the_next_one_is_named(people, client, top_k):
    await scored(client, "best")
    await manage(client, "reject-match", subject="ann", embedding=QUERY.tolist())
    found = await search(client, group_by="subject", top_k=top_k)
    assert found.results[0].subject == "bob"
    assert (found.known, found.subject) == (True, "bob")
    if top_k > 1:
        assert (found.results[-1].subject, found.results[-1].rejected) == ("ann", True)


async def test_by_entry_the_order_is_that_of_the_cosines_and_the_first_that_counts_names(
    people, client
):
    await manage(client, "reject-match", subject="ann", embedding=QUERY.tolist())
    found = await search(client)
    assert [one.id for one in found.results] == ["a0", "b0", "b1", "n0", "a1"]
    assert [one.known for one in found.results] == [False, True, True, False, False]
    assert (found.known, found.subject) == (True, "bob")


async def test_nobody_is_named_where_no_match_counts(people, client):
    found = await search(client, filter={"subject": ["ann"]}, group_by="subject")
    assert [one.known for one in found.results] == [False]
    assert (found.known, found.subject) == (False, None)


async def test_the_right_person_is_found_among_many_whose_best_entry_is_nearer(people, client):
    """Each of them has one near face and one far away, as of a wrongly sorted photo."""
    entries = []
    for i in range(12):
        for name, cosine in (("near", 0.85 + i / 1_000), ("far", -0.9)):
            vector = at_cosine(cosine, 10 + i)
            entries.append(NewEntry(id=f"{name}{i}", vector=vector, subject=f"p{i:02}"))
    await people.enrol_many("g", entries, existing="fail")
    found = await search(client, group_by="subject", top_k=1)
    assert (found.known, found.subject) == (True, "bob")


# --- What counts ----------------------------------------------------------------------------------


async def test_a_dataset_of_another_embedder_has_that_ones_threshold_and_rates(client, worker):
    async with worker(encoder=PixelEncoder()) as galleries:
        await galleries.create("g")
        vector = np.ones(galleries.dimensions, np.float32)
        await galleries.enrol("g", NewEntry(id="e", vector=vector))
    async with worker():
        stats = (await manage(client, "stats")).dataset
        found = await search(client, embedding=vector.tolist())
    assert (stats.threshold, stats.verify_threshold) == (0.99, 0.99)
    assert stats.expected_false is None
    assert found.threshold == 0.99


# --- As of when -----------------------------------------------------------------------------------


async def test_a_revision_that_is_not_there_yet_is_refused_at_once_with_the_newest(people, client):
    newest = await people.newest()
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(InvalidRequest, match=f"it is {newest + 9}, .* is {newest}") as no:
        await search(client, revision=newest + 9)
    assert no.value.field == "revision"
    assert loop.time() - began < 2
    assert (await search(client, revision=newest)).revision <= newest


async def test_several_faces_are_answered_from_the_same_rows_after_one_question(people):
    ledger, rows = people._ledger, people._galleries["g"].joined
    # Telling the history asks, too.
    await people._ledger.telling.all_told()
    asked, passes = ledger._last_seq.asked, rows.passes
    query = Query(vector=QUERY, k=1, threshold=-1, revision=None)
    others = [at_cosine(0.3, 5), at_cosine(-0.6, 2)]
    found = await people.search_each("g", query, [QUERY, *others])
    assert [one.matches[0].entry.id for one in found] == ["a0", "n0", "a1"]
    assert (ledger._last_seq.asked - asked, rows.passes - passes) == (1, 1)


async def test_searches_that_wait_together_ask_the_broker_together(people):
    asked = people._ledger._last_seq.asked
    query = Query(vector=QUERY, k=1, threshold=-1, revision=None)
    await asyncio.gather(*(people.search("g", query) for _ in range(200)))
    assert people._ledger._last_seq.asked - asked <= 2


# --- Settings -------------------------------------------------------------------------------------


async def test_two_changes_at_the_same_moment_are_both_kept(people, client):
    changes = [{"threshold": 0.5}, {"verify_threshold": 0.4}, {"scoring": "best"}]
    changes += [{"quality": {"below": "reject"}}, {"quality": {"yaw_max": 40.0}}]
    await asyncio.gather(*(manage(client, "configure", changes=one) for one in changes))
    settings = (await manage(client, "stats")).dataset.settings
    assert settings == m.DatasetSettings(
        threshold=0.5,
        verify_threshold=0.4,
        scoring="best",
        quality=m.QualityBounds(below="reject", yaw_max=40.0),
    )


async def test_a_change_that_comes_in_between_is_built_upon(people, client, monkeypatch):
    append = Ledger.append_after

    async def late(self, *args: object, **kwargs):
        monkeypatch.undo()
        await people.configure("g", lambda now: msgspec.structs.replace(now, threshold=0.6))
        return await append(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "append_after", late)
    await people.configure("g", lambda now: msgspec.structs.replace(now, scoring="best"))
    settings = (await manage(client, "stats")).dataset.settings
    assert settings == m.DatasetSettings(threshold=0.6, scoring="best")


async def test_settings_are_not_changed_over_a_change_that_was_not_seen(people, client):
    seen = (await manage(client, "stats")).dataset.revision
    await people.enrol("g", NewEntry(id="x", vector=QUERY))
    # Other events than of the settings do not matter.
    mine = m.DatasetSettings(threshold=0.5)
    await manage(client, "configure", settings=mine, revision=seen)
    with pytest.raises(Conflict, match="changed at revision .* after revision") as no:
        await manage(client, "configure", settings=m.DatasetSettings(), revision=seen)
    assert no.value.revision > seen
    assert (await manage(client, "stats")).dataset.settings == mine


@pytest.mark.parametrize(
    ("asked", "field", "says"),
    [
        ({"changes": {"treshold": 1}}, "treshold", "did you mean threshold?"),
        ({"changes": {"quality": {"yaw": 1}}}, "quality.yaw", "did you mean yaw_max?"),
        ({"changes": {"threshold": 2}}, "threshold", "threshold"),
        ({"changes": {}, "settings": m.DatasetSettings()}, "settings", "there is both"),
    ],
)
async def test_a_change_that_cannot_be_is_refused_by_its_name(people, client, asked, field, says):
    before = (await manage(client, "stats")).dataset
    with pytest.raises(InvalidRequest, match=says) as no:
        await manage(client, "configure", **asked)
    assert no.value.field == field
    assert (await manage(client, "stats")).dataset == before
