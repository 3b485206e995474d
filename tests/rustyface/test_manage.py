"""`dataset.manage`: what each action needs, does, and answers."""

import math

import numpy as np
import pytest

from bus import codec
from bus import messages as m
from bus.errors import BusError, Conflict, InvalidRequest, NotFound, Unavailable
from services.rustyface.galleries import clearing
from services.rustyface.galleries.galleries import NewEntry
from services.rustyface.manage import Manage
from tests.bus.damage import denying

EAST, NORTH = np.array([1, 0], np.float32), np.array([0, 1], np.float32)


class Entered:
    """Takes work and keeps it, as the real one does in its bucket."""

    def __init__(self) -> None:
        self.works: list[m.GalleryWork] = []
        self.dropped: list[str] = []
        self.revisions: list[int] = []
        self.refuses: BusError | None = None

    async def enter(self, work: m.GalleryWork) -> m.Job:
        self.works.append(work)
        at = m.now()
        return m.Job(job="j1", created_at=at, updated_at=at, kind="gallery", gallery=work)

    async def drop_exports(self, dataset: str, revision: int) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.dropped.append(dataset)
        self.revisions.append(revision)

    def drop_exports_behind(self, dataset: str) -> None:
        self.dropped.append(dataset)


@pytest.fixture
def jobs() -> Entered:
    return Entered()


@pytest.fixture
async def manage(replica, jobs):
    """Ask for an action; there are three entries of ann, one of bob, one of nobody."""
    async with replica() as galleries:
        await galleries.create("g")
        people = {"a0": "ann", "a1": "ann", "a2": "ann", "b0": "bob", "n0": None}
        entries = [
            NewEntry(
                id=name,
                vector=NORTH if name == "b0" else EAST,
                subject=subject,
                metadata={"n": i},
            )
            for i, (name, subject) in enumerate(people.items())
        ]
        await galleries.enrol_many("g", entries, existing="fail")

        def thresholds(_embedder: str, settings: m.DatasetSettings) -> tuple[float, float]:
            return settings.threshold or 0.45, settings.verify_threshold or 0.363

        manager = Manage(galleries, jobs, thresholds, lambda _embedder, cosine, n: cosine * n)

        async def ask(action: str, **fields) -> m.DatasetList:
            return await manager.answer(
                m.ManageDataset(**{"action": action, "dataset": "g"} | fields)
            )

        yield ask


async def test_the_list_has_every_dataset_with_its_entries_and_persons(manage):
    await manage("create", dataset="h")
    told = (await manage("list")).datasets
    assert [(one.id, one.entries, one.subjects) for one in told] == [("g", 5, 2), ("h", 0, 0)]


async def test_a_dataset_without_a_name_gets_one(manage):
    answer = await manage("create", dataset=None)
    assert len(answer.dataset.id) == 36
    assert answer.revision == answer.dataset.revision


BOUNDED = {
    "threshold": (-1, 1),
    "verify_threshold": (-1, 1),
    "quality.size_min_px": (0, 10_000),
    "quality.sharpness_min": (0, 1_040_400),
    "quality.score_min": (0, 1),
    "quality.yaw_max": (0, 180),
}


def test_every_number_of_the_settings_is_in_that_table():
    numbers = {
        f"{place}{name}"
        for kind, place in ((m.DatasetSettings, ""), (m.QualityBounds, "quality."))
        for name, field in codec.schema(kind)["$defs"][kind.__name__]["properties"].items()
        if any(one.get("type") == "number" for one in field.get("anyOf", [field]))
    }
    assert numbers == BOUNDED.keys()


@pytest.mark.parametrize("how", ["settings", "changes"])
@pytest.mark.parametrize("name", BOUNDED)
async def test_a_number_that_no_setting_can_have_is_refused_with_what_it_can(manage, name, how):
    """Infinity and no number at all too, which only MessagePack brings."""
    low, high = BOUNDED[name]
    place, _, last = name.rpartition(".")

    async def ask(value: float) -> m.DatasetSettings:
        said = {place: {last: value}} if place else {last: value}
        body = codec.encode({"action": "configure", how: said}, codec.MSGPACK)
        asked = codec.decode(body, m.ManageDataset, codec.MSGPACK)
        return (await manage("configure", **{how: getattr(asked, how)})).dataset.settings

    for value in (low, high):
        told = await ask(value)
        assert (getattr(told.quality, last) if place else getattr(told, last)) == value
    for value in (math.inf, math.nan, -math.inf, math.nextafter(high, math.inf), low - 1e-9):
        with pytest.raises(InvalidRequest) as refused:
            await ask(value)
        assert refused.value.field == (f"settings.{name}" if how == "settings" else name)
        assert f"`float` <= {float(high)}" in refused.value.message or (
            f"`float` >= {float(low)}" in refused.value.message
        )
    assert (await manage("stats")).dataset.settings == told


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1.5, -1.5])
@pytest.mark.parametrize(
    ("kind", "name", "more"),
    [
        (m.SearchFaces, "threshold", {}),
        (m.VerifyFaces, "threshold", {"a": {}, "b": {}}),
        (m.VerifyFaces, "false_match_rate", {"a": {}, "b": {}}),
        (m.DetectFaces, "score_min", {}),
    ],
)
def test_a_threshold_that_no_request_can_have_is_refused(kind, name, more, value):
    body = codec.encode({**more, name: value}, codec.MSGPACK)
    with pytest.raises(InvalidRequest, match=f"{name}: Expected `float` [<>]=? -?[01]") as refused:
        codec.decode(body, kind, codec.MSGPACK)
    assert refused.value.field == name


async def test_a_dataset_is_told_in_full(manage):
    settings = m.DatasetSettings(threshold=0.6, keep_images=True)
    answer = await manage("configure", settings=settings)
    assert answer.dataset == (await manage("stats")).dataset
    told = answer.dataset
    assert (told.threshold, told.verify_threshold, told.expected_false) == (0.6, 0.363, 3.0)
    assert (told.entries, told.subjects, told.unnamed, told.images) == (5, 2, 1, 0)
    assert told.settings == settings
    assert told.memory_bytes == 64 * 2 * 4
    assert told.revision == answer.revision


async def test_entries_are_told_page_by_page(manage):
    first = await manage("entries", limit=3)
    assert ([one.id for one in first.entries], first.next, first.total) == (
        ["a0", "a1", "a2"],
        "a2",
        5,
    )
    rest = await manage("entries", limit=3, after=first.next)
    assert ([one.id for one in rest.entries], rest.next) == (["b0", "n0"], None)
    assert rest.entries[0].embedding is None
    [one] = (await manage("entries", entry_id="b0", embeddings=True)).entries
    assert (one.subject, one.embedding, one.metadata) == ("bob", [0, 1], {"n": 3})


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"subject": "ann"}, ["a0", "a1", "a2"]),
        ({"filter": {"n": [1, 3]}}, ["a1", "b0"]),
        ({"filter": {"n": [1, 3]}, "subject": "ann"}, ["a1"]),
        ({"filter": {"subject": ["bob", "eve"]}}, ["b0"]),
        ({"filter": {"n": 77}}, []),
    ],
)
async def test_entries_are_found_by_person_and_by_metadata(manage, asked, told):
    answer = await manage("entries", **asked)
    assert [one.id for one in answer.entries] == told
    assert answer.total == len(told)


async def test_persons_are_told_page_by_page(manage):
    answer = await manage("subjects", limit=1)
    assert [(one.id, one.entries) for one in answer.subjects] == [("ann", 3)]
    assert (answer.next, answer.total) == ("ann", 2)
    answer = await manage("subjects", after="ann")
    assert [one.id for one in answer.subjects] == ["bob"]


async def test_persons_are_renamed_merged_and_removed(manage):
    assert (await manage("rename-subject", subject="ann", into="anna")).affected == 3
    answer = await manage("merge-subjects", subjects=["anna"], subject="bob", into="zoe")
    assert answer.affected == 4
    assert (await manage("remove-subject", subject="zoe", dry_run=True)).affected == 4
    answer = await manage("remove-subject", subject="zoe")
    assert answer.affected == 4
    assert [one.entries for one in answer.datasets] == [1]


async def test_an_entry_is_moved_and_removed(manage):
    await manage("move-entry", entry_id="a0", into="bob")
    await manage("move-entry", entry_id="a1")
    told = (await manage("entries")).entries
    assert [one.subject for one in told] == ["bob", None, "ann", "bob", None]
    assert (await manage("remove-entry", entry_id="a0", dry_run=True)).affected == 1
    answer = await manage("remove-entry", entry_id="a0")
    assert answer.affected == 1
    assert [one.entries for one in answer.datasets] == [4]


async def test_a_match_is_rejected_and_taken_back(manage):
    by_entry = await manage("reject-match", subject="ann", entry_id="n0")
    by_face = await manage("reject-match", subject="ann", embedding=[3.0, 4.0])
    [ann, _] = (await manage("subjects")).subjects
    assert ann.rejections == sorted([by_entry.rejection, by_face.rejection])
    assert (await manage("stats")).dataset.rejections == 2
    await manage("withdraw-rejection", rejection=by_entry.rejection)
    assert (await manage("subjects")).subjects[0].rejections == [by_face.rejection]


async def test_what_is_only_tried_changes_nothing_and_what_cannot_be_tried_is_refused(manage):
    rejection = (await manage("reject-match", subject="ann", entry_id="n0")).rejection
    before = (await manage("stats")).dataset
    await manage("withdraw-rejection", rejection=rejection, dry_run=True)
    with pytest.raises(NotFound):
        await manage("withdraw-rejection", rejection="x", dry_run=True)
    for action, fields in (
        ("create", {"dataset": "h"}),
        ("configure", {"changes": {"keep_images": True}}),
        ("move-entry", {"entry_id": "a0", "into": "bob"}),
        ("rename-subject", {"subject": "ann", "into": "anna"}),
        ("merge-subjects", {"subjects": ["ann"], "into": "bob"}),
        ("reject-match", {"subject": "bob", "entry_id": "a0"}),
        ("export", {}),
    ):
        with pytest.raises(InvalidRequest, match=f"{action} cannot be tried") as caught:
            await manage(action, dry_run=True, **fields)
        assert caught.value.field == "dry_run"
    told = await manage("list")
    assert (await manage("stats")).dataset == before
    assert [one.id for one in told.datasets] == ["g"]


async def test_the_history_is_told_page_by_page(manage):
    await manage("move-entry", entry_id="a1", by="me")
    answer = await manage("history", limit=1)
    assert [(one.action, one.by) for one in answer.history] == [("move-entry", "me")]
    answer = await manage("history", after=answer.next)
    assert [one.action for one in answer.history] == ["enrolled", "create"]
    assert answer.next is None


async def test_exported_files_go_with_whatever_is_deleted_and_only_then(manage, jobs):
    await manage("rename-subject", subject="ann", into="anna")
    await manage("move-entry", entry_id="a0", into="amy")
    await manage("merge-subjects", subjects=["amy"], into="anna")
    await manage("remove-subject", subject="bob", dry_run=True)
    assert jobs.dropped == []
    told = [
        await manage("remove-subject", subject="bob"),
        await manage("remove-entry", entry_id="a0"),
        await manage("delete-dataset"),
    ]
    assert jobs.dropped == ["g"] * 3
    # As of which an export that is under way has to be.
    assert jobs.revisions == [one.revision for one in told]


async def test_work_that_takes_long_becomes_a_job(manage, jobs):
    await manage("import", artefact="a" * 64, existing="replace", key="k", by="me")
    await manage("export", format="npz", into="left out")
    answer = await manage("reembed", into="new")
    assert answer.job.job == "j1"
    assert jobs.works == [
        m.GalleryWork(
            action="import", dataset="g", artefact="a" * 64, existing="replace", key="k", by="me"
        ),
        m.GalleryWork(action="export", dataset="g", format="npz"),
        m.GalleryWork(action="reembed", dataset="g", into="new"),
    ]


async def test_a_dataset_is_deleted_once_one_has_seen_what_that_is(manage):
    assert (await manage("delete-dataset", dry_run=True)).affected == 5
    assert (await manage("delete-dataset")).datasets == []


@pytest.mark.parametrize(
    ("action", "fields", "field"),
    [
        *[
            (action, {"dataset": None}, "dataset")
            for action in (
                "configure", "delete-dataset", "stats", "entries", "remove-entry", "move-entry",
                "subjects", "rename-subject", "merge-subjects", "remove-subject", "reject-match",
                "withdraw-rejection", "history", "imports", "undo-import", "import", "export",
                "reembed",
            )
            if action not in ("rename-subject", "merge-subjects", "reject-match")
        ],
        ("configure", {}, "settings"),
        ("remove-entry", {}, "entry_id"),
        ("move-entry", {"into": "x"}, "entry_id"),
        ("rename-subject", {"into": "x"}, "subject"),
        ("rename-subject", {"subject": "ann"}, "into"),
        ("merge-subjects", {"into": "x"}, "subjects"),
        ("merge-subjects", {"subjects": ["ann"]}, "into"),
        ("remove-subject", {}, "subject"),
        ("reject-match", {"entry_id": "n0"}, "subject"),
        ("reject-match", {"subject": "ann"}, "entry_id"),
        ("reject-match", {"subject": "ann", "entry_id": "n0", "embedding": [1.0]}, "entry_id"),
        ("reject-match", {"subject": "ann", "embedding": [0.0, 0.0]}, "embedding"),
        ("withdraw-rejection", {}, "rejection"),
        ("undo-import", {}, "imported"),
        ("import", {}, "artefact"),
        ("reembed", {}, "into"),
        ("reembed", {"into": "no/name"}, "into"),
        ("history", {"after": "x"}, "after"),
        ("history", {"after": "9" * 200}, "after"),
        ("entries", {"filter": {"a..b": 1}}, "filter"),
    ],
)  # fmt: skip
async def test_what_an_action_needs_is_named(manage, action, fields, field):
    with pytest.raises(InvalidRequest) as refused:
        await manage(action, **fields)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("action", "fields", "field"),
    [
        ("stats", {"dataset": "x"}, "dataset"),
        ("export", {"dataset": "x"}, "dataset"),
        ("entries", {"entry_id": "x"}, "entry_id"),
        ("entries", {"subject": "x"}, "subject"),
        ("remove-entry", {"entry_id": "x"}, "entry_id"),
        ("remove-entry", {"entry_id": "x", "dry_run": True}, "entry_id"),
        ("move-entry", {"entry_id": "x"}, "entry_id"),
        ("remove-subject", {"subject": "x"}, "subject"),
        ("withdraw-rejection", {"rejection": "x"}, "rejection"),
        ("undo-import", {"imported": "x"}, "imported"),
    ],
)
async def test_what_is_not_there_is_named(manage, action, fields, field):
    with pytest.raises(NotFound) as refused:
        await manage(action, **fields)
    assert refused.value.field == field


async def test_a_name_that_is_somebody_s_is_taken_by_a_merge_alone(manage):
    with pytest.raises(Conflict, match="merge-subjects makes one person of both"):
        await manage("rename-subject", subject="ann", into="bob")


async def test_every_action_that_can_be_asked_is_answered(manage, jobs):
    actions = m.ManageDataset.__annotations__["action"].__args__
    galleries_alone = Manage(None, jobs, None, None)
    assert set(galleries_alone._actions) == set(actions)


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"action": "remove-entry", "entry_id": "a0"}, 1),
        ({"action": "remove-subject", "subject": "ann"}, 3),
        ({"action": "delete-dataset"}, 5),
    ],
)
async def test_a_deletion_claims_no_more_than_was_erased(manage, jobs, client, asked, left):
    await denying(client, f"{client.root}-galleries")
    answer = await manage(**asked)
    assert answer.unerased == left
    [said] = answer.warnings
    assert said.startswith(
        f"gone for every question, but not erased from the broker's files yet: {left} of the "
    )
    assert said.endswith(
        "message delete not permitted; it is tried again, and the log says galleries.not_erased"
    )
    # All else that belongs to it is done.
    assert jobs.dropped == ["g"]


async def test_a_deletion_that_takes_long_says_that_it_goes_on(manage, monkeypatch):
    monkeypatch.setattr(clearing, "PATIENT_S", 0)
    answer = await manage("remove-subject", subject="ann")
    assert answer.unerased == 3
    assert answer.warnings[0].endswith("images; that goes on behind this answer")


async def test_a_deletion_is_done_though_exported_files_of_it_could_not_be_deleted(manage, jobs):
    jobs.refuses = Unavailable("the broker is away")
    answer = await manage("remove-entry", entry_id="a0")
    assert (answer.affected, answer.unerased) == (1, None)
    [said] = answer.warnings
    assert said.startswith("exported files of 'g' may still have what was deleted, for an hour at")
    assert said.endswith("most: the broker is away")
