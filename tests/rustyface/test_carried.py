"""What dataset files carry beside entries: settings and rejections, there and back, or refused."""

import json
import random
from contextlib import closing

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus import messages as m
from bus.errors import Unprocessable
from services.rustyface.transfers.files import (
    Head,
    RejectionRow,
    Row,
    json_file,
    npz_file,
    parquet_file,
    reader,
    writer,
)
from tests.rustyface.transfers import FORMATS, JSON, mutated

D = 4
SET = m.DatasetSettings(
    threshold=0.51,
    verify_threshold=-0.25,
    scoring="best",
    keep_images=True,
    quality=m.QualityBounds(below="reject", size_min_px=None, yaw_max=45.5),
)
ROW = Row("e", np.array([1, 0, 0, 0], np.float32), {"n": 1}, "Ada")


def unit(*values: float) -> np.ndarray:
    wide = np.asarray(values, np.float64)
    return np.asarray(wide / np.linalg.norm(wide), np.float32)


def some_rejections(count: int = 3) -> list[RejectionRow]:
    made = [
        RejectionRow("0a1b", "Ada", unit(1, 2, 3, 4), "e"),
        RejectionRow("x" * 64, "Çelik \"]}'", unit(-1, 1e-6, 2, 0.5)),
    ]
    numbers = np.random.default_rng(5)
    made += [
        RejectionRow(f"r{i}", f"p{i % 7}", unit(*numbers.normal(size=D)), f"e{i}")
        for i in range(count - len(made))
    ]
    return made[:count]


def written(path, kind, rejections, set_to=SET, rows=(ROW,)):
    with closing(writer(path, kind, Head("people", settings=set_to), D)) as file:
        file.add(rows)
        file.finish(rejections)
    return path


def read(path, kind, dimensions=D) -> tuple[Head, list[RejectionRow], list[Row]]:
    file = reader(path, kind, dimensions)
    rows = [row for batch in file.batches() for row in batch]
    return file.head, [one for batch in file.rejections() for one in batch], rows


def same(one: list[RejectionRow], other: list[RejectionRow]) -> None:
    assert [(r.id, r.subject, r.entry) for r in one] == [(r.id, r.subject, r.entry) for r in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.vector.dtype == np.float32
        assert mine.vector.tobytes() == theirs.vector.tobytes()


def refused(path, kind) -> Unprocessable:
    with pytest.raises(Unprocessable) as raised:
        read(path, kind)
    return raised.value


# --- There and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("count", [0, 1, 3, 2_345])
def test_settings_and_rejections_come_back_to_the_last_bit(tmp_path, kind, count):
    head, rejections, [row] = read(written(tmp_path / "d", kind, some_rejections(count)), kind)
    assert head.settings == SET
    same(rejections, some_rejections(count))
    assert (row.id, row.subject, row.metadata) == ("e", "Ada", {"n": 1})
    assert [one.name for one in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("kind", FORMATS)
def test_rejections_come_in_batches(tmp_path, kind):
    file = reader(written(tmp_path / "d", kind, some_rejections(2_345)), kind, D)
    assert len(list(file.batches())) == 1
    assert [len(batch) for batch in file.rejections()] == [1_000, 1_000, 345]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_dataset_without_entries_has_its_settings_all_the_same(tmp_path, kind):
    head, rejections, rows = read(written(tmp_path / "d", kind, [], rows=()), kind)
    assert (head.settings, rejections, rows) == (SET, [], [])


def test_a_file_in_json_is_the_original_s_with_further_members(tmp_path):
    told = json.loads(written(tmp_path / "d", "json", some_rejections()).read_bytes())
    assert {"id", "created_at", "updated_at", "entries"} <= told.keys()
    [entry] = told["entries"]
    assert entry.keys() - {"subject", "quality"} == {"id", "embedding", "metadata", "last_seen"}
    assert told["settings"] == msgspec.to_builtins(SET)
    assert [(one["id"], one.get("entry")) for one in told["rejections"]][:2] == [
        ("0a1b", "e"),
        ("x" * 64, None),
    ]


def test_arrays_and_metadata_of_a_file_are_what_others_can_read(tmp_path):
    with np.load(written(tmp_path / "d", "npz", some_rejections())) as arrays:
        assert json.loads(str(arrays["settings"]))["threshold"] == 0.51
        assert arrays["rejection_subjects"].tolist()[:2] == ["Ada", "Çelik \"]}'"]
        assert arrays["rejection_entries"].tolist() == ["e", "", "e0"]
        assert arrays["rejection_embeddings"].shape == (3, D)
        assert arrays["ids"].tolist() == ["e"]
    said = pq.read_metadata(written(tmp_path / "d", "parquet", some_rejections())).metadata
    assert json.loads(said[b"bkg"])["settings"]["scoring"] == "best"
    assert json.loads(said[b"bkg.rejections"])[0]["subject"] == "Ada"
    assert pq.read_table(tmp_path / "d").column_names[:2] == ["id", "embedding"]


def test_rejections_may_stand_before_the_entries_and_be_larger_than_any_value(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(json_file, "_READ_BYTES", 64)
    monkeypatch.setattr(json_file, "PIECE_MAX_BYTES", 512)
    told = json.loads(written(tmp_path / "d", "json", some_rejections(100)).read_bytes())
    said = {"rejections": told.pop("rejections")} | told
    (tmp_path / "d").write_text("\ufeff" + json.dumps(said))
    head, rejections, rows = read(tmp_path / "d", "json")
    same(rejections, some_rejections(100))
    assert (head.settings, len(rows)) == (SET, 1)


def test_a_rejection_by_hand_names_a_person_and_an_entry_or_a_face(tmp_path):
    said = [{"subject": "Ada", "entry": "e"}, {"subject": "Ada", "embedding": [0, 3, 0, 4]}]
    (tmp_path / "d").write_text(json.dumps({"entries": [], "rejections": said}))
    _, [first, second], _ = read(tmp_path / "d", "json")
    assert (first.entry, first.vector) == ("e", None)
    assert second.vector.tolist() == pytest.approx([0, 0.6, 0, 0.8])
    # What has no id is known by what it says: said again, it is the same one.
    _, again, _ = read(tmp_path / "d", "json")
    assert [one.id for one in again] == [first.id, second.id]
    assert first.id != second.id


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_without_settings_and_rejections_has_none(tmp_path, kind):
    head, rejections, _ = read(written(tmp_path / "d", kind, [], None), kind)
    assert (head.settings, rejections) == (None, [])


@pytest.mark.parametrize("kind", FORMATS)
def test_when_a_dataset_was_made_is_in_its_file(tmp_path, kind):
    head = Head("people", m.now(), "sface", "ab" * 32)
    with closing(writer(tmp_path / "d", kind, head, D)) as file:
        file.finish()
    assert read(tmp_path / "d", kind)[0] == head


# --- What is refused, and how it is said ----------------------------------------------------------

BAD_SETTINGS = [
    ([], "settings", "settings must be an object of settings by name, they are of type list"),
    ({"treshold": 0.5}, "settings.treshold", "has no setting treshold; did you mean threshold?"),
    ({"threshold": 2}, "settings.threshold", "settings: threshold: Expected `float` <= 1"),
    ({"scoring": "worst"}, "settings.scoring", "settings: scoring: Invalid enum value 'worst'"),
    ({"keep_images": "yes"}, "settings.keep_images", "Expected `bool`, got `str`"),
    ({"quality": {"nose": 1}}, "settings.quality.nose", "has no setting quality.nose"),
    ({"quality": {"yaw_max": 999}}, "settings.quality.yaw_max", "Expected `float` <= 180"),
    ({"quality": 5}, "settings.quality", "Expected `object`, got `int`"),
]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("said", "field", "sentence"), BAD_SETTINGS)
def test_settings_that_there_cannot_be_are_named(tmp_path, kind, said, field, sentence):
    path = tmp_path / "d"
    if kind == "json":
        path.write_text(json.dumps({"settings": said, "entries": []}))
    elif kind == "npz":
        text = np.array(json.dumps(said))
        with path.open("wb") as file:
            np.savez(file, embeddings=np.eye(1, D), ids=np.array(["a"]), settings=text)
    else:
        table = pa.table({"id": ["a"], "embedding": [[1.0, 0, 0, 0]]})
        said = json.dumps({"settings": said})
        pq.write_table(table.replace_schema_metadata({"bkg": said}), path)
    error = refused(path, kind)
    assert (error.field, sentence in error.message) == (field, True), error.message


def one(**changes):
    said = {"id": "r", "subject": "Ada", "entry": "e", "embedding": [1, 0, 0, 0], **changes}
    return {name: value for name, value in said.items() if value is not ...}


BAD_REJECTIONS = [
    (one(subject=...), "rejection 1: subject: Object missing required field"),
    (one(subject=""), "rejection 1 ('r'): subject must be a text of 1 to 256 characters"),
    (one(subject=5), "rejection 1: subject: Expected `str`, got `int`"),
    (one(entry="e" * 257), "rejection 1 ('r'): entry must be a text of 1 to 256 characters"),
    (one(id="r" * 65), "rejection 1: id must be a text of 1 to 64 characters, it is 65"),
    (one(id=""), "rejection 1: id must be a text of 1 to 64 characters, it is 0"),
    # Withdrawing it is what fences are.
    (one(id="-"), "rejection 1: no rejection can have the id '-'"),
    (one(embedding=[1, 0]), "rejection 1 ('r'): its embedding has 2 values, the dataset has"),
    (one(embedding=[0, 0, 0, 0]), "rejection 1 ('r'): its embedding is all zeros"),
    (one(embedding=[1, "x", 0, 0]), "rejection 1: embedding[1]: Expected `float`, got `str`"),
    (one(entry=..., embedding=...), "rejection 1 ('r'): it has neither an entry nor an embedding"),
    (7, "rejection 1: Expected `object`, got `int`"),
]


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize(("said", "sentence"), BAD_REJECTIONS)
def test_a_rejection_that_cannot_be_is_named_but_not_whom_it_concerns(
    tmp_path, kind, said, sentence
):
    path, listed = tmp_path / "d", [one(id="first"), said]
    if kind == "json":
        path.write_text(json.dumps({"entries": [], "rejections": listed}))
    else:
        table = pa.table({"id": ["a"], "embedding": [[1.0, 0, 0, 0]]})
        said = {"bkg.rejections": json.dumps(listed)}
        pq.write_table(table.replace_schema_metadata(said), path)
    error = refused(path, kind)
    assert sentence in error.message
    assert "Ada" not in error.message
    assert error.field == "rejections[1]"


@pytest.mark.parametrize(("arrays", "sentence"), [
    ({"rejection_subjects": None}, "the file has no array rejection_subjects"),
    ({"rejection_embeddings": None}, "the file has no array rejection_embeddings"),
    ({"rejection_embeddings": np.eye(2, 3)}, "rejection 0: its embedding has 3 values"),
    ({"rejection_embeddings": np.ones(2)}, "must be floating point numbers of shape [n, 4]"),
    ({"rejection_embeddings": np.array([[1, 0, 0, 0], [0, np.nan, 0, 0]])},
     "rejection 1 ('s'): embedding[1] is nan, not a finite number"),
    ({"rejection_subjects": np.array(["Ada", ""])}, "rejection 1 ('s'): subject must be a text"),
    ({"rejection_entries": np.array(["e"])}, "rejection_entries has the shape [1], rejection_em"),
    ({"rejection_ids": np.array(["r", "s" * 65])}, "rejection 1: id must be a text of 1 to 64"),
    ({"rejection_ids": np.array([1, 2])}, "the array rejection_ids is of a type that is not taken"),
    ({"settings": np.array(["{}", "{}"])}, "settings must be one text of at most 65,536 bytes"),
    ({"settings": np.array("{")}, "settings are no JSON"),
])  # fmt: skip
def test_an_array_of_rejections_that_cannot_be_is_named(tmp_path, arrays, sentence):
    good = {
        "embeddings": np.eye(1, D), "ids": np.array(["a"]),
        "rejection_embeddings": np.eye(2, D), "rejection_subjects": np.array(["Ada", "Bob"]),
        "rejection_entries": np.array(["a", ""]), "rejection_ids": np.array(["r", "s"]),
    }  # fmt: skip
    given_ = {name: array for name, array in (good | arrays).items() if array is not None}
    np.savez(tmp_path / "d.npz", **given_)
    error = refused(tmp_path / "d.npz", "npz")
    assert sentence in error.message


@pytest.mark.parametrize(("text", "sentence"), [
    ('{"entries": [], "rejections": {}}', "rejections must be a list"),
    ('{"entries": [], "rejections": [], "rejections": []}', "the file has rejections twice"),
    ('{"entries": [], "rejections": [{}', "behind rejection 0"),
    ('{"entries": [], "settings": {"threshold": 0.5', "a part is missing"),
])  # fmt: skip
def test_a_list_that_is_none_is_refused(tmp_path, text, sentence):
    (tmp_path / "d").write_text(text)
    assert sentence in refused(tmp_path / "d", "json").message


@pytest.mark.parametrize("said", ["{", "[]", "[1, 2", "\xff"])
def test_metadata_of_parquet_that_are_no_json_are_refused(tmp_path, said):
    table = pa.table({"id": ["a"], "embedding": [[1.0, 0, 0, 0]]})
    pq.write_table(table.replace_schema_metadata({"bkg": said.encode("latin-1")}), tmp_path / "d")
    assert "the metadata bkg are no JSON that fits" in refused(tmp_path / "d", "parquet").message


def test_more_rejections_than_metadata_of_parquet_may_have_are_refused(tmp_path, monkeypatch):
    path = written(tmp_path / "d", "parquet", some_rejections(50))
    monkeypatch.setattr(parquet_file, "REJECTIONS_MAX_BYTES", 1_000)
    assert "bkg.rejections have" in refused(path, "parquet").message
    with (
        closing(writer(tmp_path / "e", "parquet", Head(), D)) as file,
        pytest.raises(Unprocessable, match="export in json or npz instead"),
    ):
        file.finish(some_rejections(50))


def test_more_rejections_than_a_dataset_may_have_are_refused(tmp_path, monkeypatch):
    for kind in FORMATS:
        path = written(tmp_path / kind, kind, some_rejections(6))
        monkeypatch.setattr("services.rustyface.transfers.files.carried.ENTRIES_MAX", 5)
        assert "rejection 5: a file may have 5 rejections" in refused(path, kind).message
        monkeypatch.undo()


# --- Thousands of broken ones ---------------------------------------------------------------------


def holds_or_is_refused(path, kind) -> None:
    """Read a file that may be anything: it is refused in a sentence, or all of it is sound."""
    try:
        head, rejections, _ = read(path, kind)
    except Unprocessable as error:
        assert 0 < len(error.message) < 1_000  # noqa: PT017 - it may be sound as well
        return
    if head.settings is not None:
        msgspec.convert(msgspec.to_builtins(head.settings), m.DatasetSettings)
    for row in rejections:
        assert 1 <= len(row.id) <= 64
        assert 1 <= len(row.subject) <= 256
        assert row.entry is not None or row.vector is not None
        if row.vector is not None:
            assert row.vector.shape == (D,)
            assert np.linalg.norm(row.vector) == pytest.approx(1, abs=1e-4)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound file of each format, as bytes, and a place for broken ones."""
    folder = tmp_path_factory.mktemp("sound")
    files = {
        kind: written(folder / kind, kind, some_rejections(5)).read_bytes() for kind in FORMATS
    }
    return files, folder / "broken"


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**40))
def test_mutated_files_are_refused_in_a_sentence_or_read(sound, kind, seed):
    files, path = sound
    path.write_bytes(mutated(files[kind], random.Random(seed)))  # noqa: S311 - no secret
    holds_or_is_refused(path, kind)


NUMBER = st.integers() | st.floats() | JSON
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "threshold": NUMBER,
        "verify_threshold": NUMBER,
        "scoring": st.sampled_from(["best", "mean"]) | JSON,
        "keep_images": st.booleans() | JSON,
        "quality": st.fixed_dictionaries({}, optional={"below": JSON, "yaw_max": NUMBER}) | JSON,
    },
)
REJECTION = st.fixed_dictionaries(
    {"subject": st.text(max_size=8) | JSON},
    optional={
        "id": st.text(max_size=8) | JSON,
        "entry": st.text(max_size=8) | JSON,
        "embedding": st.lists(st.floats() | st.integers(), min_size=D, max_size=D) | JSON,
    },
)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    said=SETTINGS | JSON,
    rejections=st.lists(REJECTION | JSON, max_size=3) | JSON,
    kind=st.sampled_from(FORMATS),
)
def test_settings_and_rejections_of_any_shape_are_refused_in_a_sentence_or_read(
    sound, said, rejections, kind
):
    _, path = sound
    if kind == "json":
        path.write_text(json.dumps({"entries": [], "settings": said, "rejections": rejections}))
    elif kind == "npz":
        text = np.array(json.dumps(said))
        with path.open("wb") as file:
            np.savez(file, embeddings=np.eye(1, D), ids=np.array(["a"]), settings=text)
    else:
        table = pa.table({"id": ["a"], "embedding": [[1.0, 0, 0, 0]]})
        about = {"bkg": json.dumps({"settings": said}), "bkg.rejections": json.dumps(rejections)}
        pq.write_table(table.replace_schema_metadata(about), path)
    holds_or_is_refused(path, kind)


TEXT = st.text(min_size=1, max_size=30).filter(lambda text: not text.endswith("\0"))
COSINE = st.none() | st.floats(-1, 1)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    set_to=st.builds(
        m.DatasetSettings,
        threshold=COSINE,
        verify_threshold=COSINE,
        scoring=st.sampled_from(["best", "mean"]),
        keep_images=st.booleans(),
        quality=st.builds(
            m.QualityBounds,
            below=st.sampled_from(["reject", "warn", "off"]),
            size_min_px=st.none() | st.floats(0, 10_000),
            sharpness_min=st.none() | st.floats(0, 1_040_400),
            score_min=st.none() | st.floats(0, 1),
            yaw_max=st.none() | st.floats(0, 180),
        ),
    ),
    rejections=st.lists(
        st.builds(
            RejectionRow,
            TEXT,
            TEXT,
            st.lists(st.floats(-1, 1, width=32), min_size=D, max_size=D)
            .filter(any)
            .map(lambda values: unit(*values)),
            st.none() | TEXT,
        ),
        max_size=6,
    ),
    kind=st.sampled_from(FORMATS),
)
def test_whatever_a_dataset_is_set_to_and_rejects_comes_back(sound, set_to, rejections, kind):
    _, path = sound
    head, found, _ = read(written(path, kind, rejections, set_to), kind)
    assert head.settings == set_to
    same(found, rejections)


def test_a_text_that_numpy_cannot_keep_is_refused(tmp_path):
    said = "rejection 0 .'r'.: numpy cannot keep the end of its"
    with (
        closing(npz_file.NpzWriter(tmp_path / "d", Head(), D)) as file,
        pytest.raises(Unprocessable, match=said),
    ):
        file.finish([RejectionRow("r", "Ada\0", unit(1, 0, 0, 0))])
