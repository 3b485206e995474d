"""Dataset files: what is written comes back the same, what is broken is refused in a sentence."""

import io
import json
import random
import resource
import tracemalloc
import zipfile
from contextlib import closing, suppress
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.errors import Unprocessable
from services.rustyface.transfers.files import (
    Head,
    Row,
    format_of,
    json_file,
    npz_arrays,
    parquet_file,
    reader,
    writer,
)
from services.rustyface.transfers.files import rows as rows_module
from tests.rustyface.transfers import FORMATS, JSON, mutated

D = 4
SEEN = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
HEAD = Head(id="people", created_at=SEEN, embedder="sface", embedder_digest="ab" * 32)


def unit(*values: float) -> np.ndarray:
    wide = np.asarray(values, np.float64)
    return np.asarray(wide / np.linalg.norm(wide), np.float32)


def some_rows(count: int = 3) -> list[Row]:
    made = [
        Row("plain", unit(1, 0, 0, 0)),
        Row("ümläut/😀", unit(1, 2, 3, 4), {"a": [1, None, "ß"], "b": {"c": 1.5}}, "Ada", SEEN,
            {"size_px": 55.5, "yaw": -3.0}),
        Row("x" * 256, unit(-1, 1e-6, 2, 0.5), "only a text", "Çelik", SEEN),
    ]  # fmt: skip
    random_ = np.random.default_rng(3)
    made += [Row(f"e{i}", unit(*random_.normal(size=D))) for i in range(count - len(made))]
    return made[:count]


def written(path, kind, rows):
    with closing(writer(path, kind, HEAD, D)) as file:
        for row in rows:
            file.add([row])
        file.finish()
    return path


def read(path, kind=None, dimensions=D) -> list[Row]:
    file = reader(path, kind or format_of(path), dimensions)
    return [row for batch in file.batches() for row in batch]


def same(one: list[Row], other: list[Row]) -> None:
    assert [(r.id, r.metadata, r.subject, r.last_seen, r.quality) for r in one] == [
        (r.id, r.metadata, r.subject, r.last_seen, r.quality) for r in other
    ]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.vector.dtype == np.float32
        assert mine.vector.tobytes() == theirs.vector.tobytes()


def refused(path, kind=None) -> str:
    with pytest.raises(Unprocessable) as raised:
        read(path, kind)
    return raised.value.message


# --- There and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("count", [0, 1, 3, 2_345])
def test_what_is_written_comes_back_to_the_last_bit(tmp_path, kind, count):
    path = written(tmp_path / "d", kind, some_rows(count))
    assert format_of(path) == kind
    same(read(path), some_rows(count))
    assert [one.name for one in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_says_what_it_is(tmp_path, kind):
    file = reader(written(tmp_path / "d", kind, some_rows()), kind, D)
    list(file.batches())
    assert (file.head.id, file.head.embedder) == ("people", "sface")
    assert file.head.embedder_digest == "ab" * 32
    assert file.total in (3, None)


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_come_in_batches(tmp_path, kind):
    file = reader(written(tmp_path / "d", kind, some_rows(2_345)), kind, D)
    assert [len(batch) for batch in file.batches()] == [1_000, 1_000, 345]


def test_a_file_of_the_original_is_read(tmp_path):
    content = {
        "id": "d", "created_at": "2023-01-02T03:04:05Z", "updated_at": "2023-01-02T03:04:05Z",
        "entries": [{"id": "a", "embedding": [3, 0, 0, 4], "metadata": {"n": 1},
                     "last_seen": "2023-05-06T07:08:09+02:00"}],
    }  # fmt: skip
    (tmp_path / "d").write_text(json.dumps(content, indent=2))
    [row] = read(tmp_path / "d")
    assert row.vector.tolist() == pytest.approx([0.6, 0, 0, 0.8])
    assert row.last_seen == datetime(2023, 5, 6, 5, 8, 9, tzinfo=UTC)
    assert (row.metadata, row.subject, row.quality) == ({"n": 1}, None, {})


def test_a_plain_npz_of_numpy_is_read(tmp_path):
    path = tmp_path / "d.npz"
    vectors = np.array([[3, 0, 0, 4], [0, 1, 0, 0]], np.float64)
    seen = np.array(["2024-01-02", "NaT"], "M8[D]")
    for save in (np.savez, np.savez_compressed):
        save(path, embeddings=vectors, ids=np.array(["a", "bc"]), last_seen=seen)
        first, second = read(path)
        assert first.vector.tolist() == pytest.approx([0.6, 0, 0, 0.8])
        assert (first.last_seen, second.last_seen) == (datetime(2024, 1, 2, tzinfo=UTC), None)
        assert (first.id, second.id, first.subject, first.metadata) == ("a", "bc", None, None)


@pytest.mark.parametrize("listed", [pa.list_(pa.float64()), pa.large_list(pa.float32()),
                                    pa.list_(pa.float32(), D)])  # fmt: skip
def test_a_plain_parquet_of_others_is_read(tmp_path, listed):
    table = pa.table({
        "id": pa.array(["a", "b"]).dictionary_encode(),
        "embedding": pa.array([[3, 0, 0, 4], [0, 1, 0, 0]], listed),
        "other": [1, 2],
        "last_seen": pa.array([SEEN, None], pa.timestamp("ms")),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "d")
    first, second = read(tmp_path / "d")
    assert first.vector.tolist() == pytest.approx([0.6, 0, 0, 0.8])
    assert first.last_seen == SEEN.replace(microsecond=123000)
    assert (second.id, second.last_seen) == ("b", None)


def test_entries_that_lie_across_the_blocks_of_a_file_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "_READ_BYTES", 7)
    rows = some_rows(20)
    same(read(written(tmp_path / "d", "json", rows)), rows)


def test_brackets_and_quotes_in_texts_end_nothing(tmp_path):
    text = 'a "]}" \\" {[ \\'
    rows = [Row('"}]\\', unit(1, 1, 1, 1), {text: text}, text)]
    same(read(written(tmp_path / "d", "json", rows)), rows)


def test_entries_may_stand_before_the_rest_of_a_file(tmp_path):
    (tmp_path / "d").write_text('\ufeff {"entries": [ ] , "embedder":"pixel32","id":"late"} \n')
    file = reader(tmp_path / "d", "json", D)
    assert list(file.batches()) == []
    assert (file.head.id, file.head.embedder) == ("late", "pixel32")


def test_vectors_of_any_length_become_unit_vectors(tmp_path):
    entries = [{"id": str(i), "embedding": [v, 0, 0, -v]} for i, v in enumerate((1e-300, 7, 1e300))]
    (tmp_path / "d").write_text(json.dumps({"id": "d", "entries": entries}))
    for row in read(tmp_path / "d"):
        assert row.vector.tolist() == pytest.approx([0.5**0.5, 0, 0, -(0.5**0.5)])


# --- What is refused, and how it is said ----------------------------------------------------------


def entry(**changes):
    return {"id": "a", "embedding": [1, 0, 0, 0], **changes}


@pytest.mark.parametrize(("changes", "said"), [
    ({"id": 5}, "entry 1: id: Expected `str`, got `int`"),
    ({"id": ""}, "entry 1: id must be a text of 1 to 256 characters, it is 0 characters"),
    ({"id": "i" * 257}, "it is 257 characters"),
    ({"embedding": [1, 0, 0]}, "entry 1 ('a'): its embedding has 3 values, the dataset"),
    ({"embedding": [0, 0, 0, 0]}, "entry 1 ('a'): its embedding is all zeros"),
    ({"embedding": [1, "x", 0, 0]}, "entry 1 ('a'): embedding[1]: Expected `float`, got `str`"),
    ({"embedding": None}, "entry 1 ('a'): embedding: Expected `array`, got `null`"),
    ({"metadata": {"big": 2**70}}, "entry 1 ('a'): metadata: it cannot be stored"),
    ({"metadata": "x" * 70_000}, "metadata: it has 70,005 bytes, allowed are 65,536"),
    ({"last_seen": "yesterday"}, "entry 1 ('a'): last_seen: 'yesterday' is no time"),
    ({"last_seen": "0001-01-01T00:00:00+14:00"}, "is no time that there can be"),
    ({"last_seen": 5}, "entry 1 ('a'): last_seen: Expected `str | null`"),
    ({"subject": "s" * 300}, "subject must be a text of 1 to 256 characters"),
    ({"quality": {"a": "b"}}, "quality[...]: Expected `float`, got `str`"),
])  # fmt: skip
def test_an_entry_that_cannot_be_is_named_with_its_field(tmp_path, changes, said):
    entries = [entry(id="first"), entry(**changes)]
    (tmp_path / "d").write_text(json.dumps({"id": "d", "entries": entries}))
    assert said in refused(tmp_path / "d", "json")


@pytest.mark.parametrize(("text", "said"), [
    ("", "the file ends where '{' should"),
    ("[]", "'[' stands where '{' should: a dataset file is an object"),
    ("{}", "the file has no entries"),
    ('{"id": "d"}', "the file has no entries"),
    ('{"entries": {}}', "entries must be a list"),
    ('{"entries": []', "the file ends where '}' should"),
    ('{"entries": [],}', "nothing follows the comma"),
    ('{"entries": [], "entries": []}', "entries twice"),
    ('{"entries": []} x', "something stands behind its end"),
    ('{"entries": [1]}', "entry 0: Expected `object`, got `int`"),
    ('{"entries": [{"id": "a", "embedding": [1,0,0,0]}', "the file ends where ']' should"),
    ('{"entries": [{"id": "a", "embedding": [1,0', "ends in the middle"),
    ('{"entries": [{"id": "a", "embedding": [NaN,0,0,0]}]}', "entry 0: the body is not JSON"),
    ('{"entries": [{"id": "a", "embedding": [1e999,0,0,0]}]}', "entry 0"),
    ('{"entries": [' + "[" * 100_000 + "]" * 100_000 + "]}", "entry 0"),
    ('{"entries": [[' + " 1," * 500_000, "ends in the middle"),
    ('{"id" "d"}', "stands where ':' should"),
    ("{5: 1}", "is no name of a field"),
])  # fmt: skip
def test_a_text_that_is_no_dataset_is_refused(tmp_path, text, said):
    (tmp_path / "d").write_text(text)
    assert said in refused(tmp_path / "d", "json")


def test_no_value_of_a_file_is_held_that_is_larger_than_any_entry(tmp_path):
    size = 8 * json_file.PIECE_MAX_BYTES
    (tmp_path / "d").write_bytes(b'{"entries": [{"id": "' + b"x" * size + b'"}]}')
    assert "a value of the file has more than 2,097,152 bytes" in refused(tmp_path / "d", "json")


@pytest.mark.parametrize("kind", ["json", "npz", "parquet"])
def test_a_full_disk_leaves_nothing_beside_the_file(tmp_path, kind):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = [Row(f"e{i}", np.array([1, 0, 0, 0], np.float32)) for i in range(20_000)]
    file = writer(tmp_path / "d", kind, HEAD, D)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.add(rows)
        # What is still to be written is tried once more.
        with suppress(OSError):
            file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_says_that_nobody_reads_is_not_held(tmp_path):
    with (tmp_path / "d").open("wb") as file:
        file.write(b'{"entries": []')
        for i in range(40):
            file.write(b', "k%d": "' % i + b"x" * 1024 * 1024 + b'"')
        file.write(b', "id": "d"}')
    tracemalloc.start()
    try:
        said = reader(tmp_path / "d", "json", D)
        assert list(said.batches()) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert said.head.id == "d"
    assert peak < 12 * 1024 * 1024


@pytest.mark.parametrize(("arrays", "said"), [
    ({"embeddings": None}, "the file has no array embeddings; there are: ids"),
    ({"ids": None}, "the file has no array ids"),
    ({"ids": np.array(["a"])}, "ids has the shape [1], embeddings have 2 rows"),
    ({"ids": np.array([1, 2])}, "the array ids is of a type that is not taken here"),
    ({"ids": np.array(["a", ""])}, "entry 1: id must be a text"),
    ({"ids": np.array(["a", b"\xff"], object)}, "is of a type that is not taken here"),
    ({"embeddings": np.ones((2, D), int)}, "the array embeddings is of a type"),
    ({"embeddings": np.ones(2)}, "embeddings must be floating point numbers of shape [n, 4]"),
    ({"embeddings": np.ones((2, 3))}, "its embedding has 3 values"),
    ({"embeddings": np.asfortranarray(np.ones((2, D)))}, "stored column by column"),
    ({"embeddings": np.array([[1, 0, 0, 0], [0, 0, np.inf, 0]])},
     "entry 1 ('b'): embedding[2] is inf, not a finite number"),
    ({"metadata": np.array(["{}", "{"])}, "entry 1 ('b'): metadata is no JSON"),
    ({"last_seen": np.array([2**62, 0], "M8[s]")}, "last_seen is no time that there can be"),
    ({"last_seen": np.array(["x", ""])}, "last_seen: 'x' is no time"),
    ({"subjects": np.array([["a", "b"]])}, "subjects has the shape [1, 2]"),
])  # fmt: skip
def test_an_array_that_cannot_be_is_named(tmp_path, arrays, said):
    good = {"embeddings": np.eye(2, D), "ids": np.array(["a", "b"])}
    given_ = {name: a for name, a in (good | arrays).items() if a is not None}
    np.savez(tmp_path / "d.npz", **given_)
    assert said in refused(tmp_path / "d.npz")


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "d.npz", embeddings=np.eye(1, D), ids=np.array([{"a": 1}], object))
    assert "no objects" in refused(tmp_path / "d.npz")


def test_a_zip_bomb_takes_no_memory(tmp_path):
    header = io.BytesIO()
    described = {"descr": "<U65000", "fortran_order": False, "shape": (10_000_000,)}
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("embeddings.npy", "w") as member:
            np.lib.format.write_array(member, np.ones((1, D)))
        with archive.open("ids.npy", "w") as member:
            member.write(header.getvalue())
            for _ in range(50):
                member.write(bytes(1 << 20))
    assert "10000000" in refused(tmp_path / "d.npz")


def test_a_zip_with_more_members_than_a_dataset_has_is_not_listed(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        for i in range(5_000):
            archive.writestr(f"{i}.npy", b"")
    assert "list of members has" in refused(tmp_path / "d.npz")


def test_an_array_that_ends_early_or_goes_on_is_refused(tmp_path):
    for shape, said in (((3, D), "ends before its last row"), ((1, D), "goes on behind")):
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            with archive.open("embeddings.npy", "w") as member:
                described = {"descr": "<f8", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, described)
                member.write(np.ones((2, D)).tobytes())
            with archive.open("ids.npy", "w") as member:
                np.lib.format.write_array(member, np.array([str(i) for i in range(shape[0])]))
        assert said in refused(tmp_path / "d.npz")


@pytest.mark.parametrize(("columns", "said"), [
    ({"id": None}, "the file has no column id; there are: embedding"),
    ({"embedding": None}, "the file has no column embedding"),
    ({"id": pa.array([1, 2])}, "id must be texts, it is int64"),
    ({"id": pa.array(["a", None])}, "entry 1: id must be a text of 1 to 256 characters, it is m"),
    ({"embedding": pa.array([1.0, 2.0])}, "embedding must be a list of floats, it is double"),
    ({"embedding": pa.array([[1.0, 0, 0, 0], None])}, "entry 1 ('b'): its embedding is missing"),
    ({"embedding": pa.array([[1.0, 0, 0, 0], [1.0]])}, "entry 1 ('b'): its embedding has 1 values"),
    ({"embedding": pa.array([[1.0, 0, 0, 0], [1.0, 0, None, 0]])},
     "entry 1 ('b'): embedding[2] is null"),
    ({"embedding": pa.array([[1.0, 0, 0, 0], [1.0, 0, 0, float("nan")]])},
     "entry 1 ('b'): embedding[3] is nan"),
    ({"metadata": pa.array(["1", "{"])}, "entry 1 ('b'): metadata is no JSON"),
    ({"last_seen": pa.array([2**62, 0], pa.timestamp("us"))}, "is no time that there can be"),
])  # fmt: skip
def test_a_column_that_cannot_be_is_named(tmp_path, columns, said):
    good = {"id": pa.array(["a", "b"]), "embedding": pa.array(np.eye(2, D).tolist())}
    given_ = {name: c for name, c in (good | columns).items() if c is not None}
    pq.write_table(pa.table(given_), tmp_path / "d")
    assert said in refused(tmp_path / "d")


def test_a_group_of_rows_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    path = written(tmp_path / "d", "parquet", some_rows(5))
    monkeypatch.setattr(parquet_file, "GROUP_MAX_BYTES", 10)
    assert "row group 0 has" in refused(path)


def test_without_pyarrow_parquet_is_refused_in_a_sentence(tmp_path, monkeypatch):
    path = written(tmp_path / "d", "parquet", some_rows())
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install 'bkg[parquet]'" in refused(path, "parquet")


def test_metadata_that_would_blow_up_an_npz_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_arrays, "COLUMN_MAX_BYTES", 1_000)
    with pytest.raises(Unprocessable, match="export in json or parquet instead"):
        written(tmp_path / "d", "npz", [Row(str(i), unit(1, 0, 0, 0), "x" * 300) for i in range(9)])


def test_more_entries_than_a_dataset_may_have_are_refused(tmp_path, monkeypatch):
    for kind in FORMATS:
        path = written(tmp_path / kind, kind, some_rows(6))
        monkeypatch.setattr(rows_module, "ENTRIES_MAX", 5)
        monkeypatch.setattr(json_file, "ENTRIES_MAX", 5)
        assert "5" in refused(path)
        monkeypatch.undo()


@pytest.mark.parametrize("start", [b"", b"GIF89a", b"\x00" * 100, b"[1]", b"id,embedding\n"])
def test_a_file_of_no_known_format_is_refused(tmp_path, start):
    (tmp_path / "d").write_bytes(start)
    with pytest.raises(Unprocessable, match="allowed are json .* npz .* and parquet"):
        format_of(tmp_path / "d")


# --- Thousands of broken ones ---------------------------------------------------------------------


def holds_or_is_refused(path, kind) -> None:
    """Read a file that may be anything: it is refused in a sentence, or all its rows are sound."""
    try:
        rows = read(path, kind)
    except Unprocessable as error:
        assert 0 < len(error.message) < 1_000  # noqa: PT017 - it may be sound as well
        return
    for row in rows:
        assert 1 <= len(row.id) <= 256
        row.id.encode()
        assert row.vector.shape == (D,)
        assert np.linalg.norm(row.vector) == pytest.approx(1, abs=1e-4)
        assert row.last_seen is None or row.last_seen.tzinfo is UTC


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound file of each format, as bytes, and a place for broken ones."""
    folder = tmp_path_factory.mktemp("sound")
    files = {kind: written(folder / kind, kind, some_rows(5)).read_bytes() for kind in FORMATS}
    return files, folder / "broken"


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**40))
def test_mutated_files_are_refused_in_a_sentence_or_read(sound, kind, seed):
    files, path = sound
    path.write_bytes(mutated(files[kind], random.Random(seed)))  # noqa: S311 - no secret
    holds_or_is_refused(path, kind)


VECTOR = st.lists(st.floats() | st.integers(), min_size=D, max_size=D) | JSON
ENTRY = st.fixed_dictionaries(
    {"id": st.text(max_size=8) | JSON, "embedding": VECTOR},
    optional={"metadata": JSON, "last_seen": st.datetimes().map(str) | JSON,
              "subject": JSON, "quality": JSON},
)  # fmt: skip


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.fixed_dictionaries({"id": JSON, "entries": st.lists(ENTRY | JSON, max_size=4)}))
def test_json_of_any_shape_is_refused_in_a_sentence_or_read(sound, content):
    _, path = sound
    path.write_text(json.dumps(content))
    holds_or_is_refused(path, "json")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.builds(
            Row,
            st.text(min_size=1, max_size=30).filter(lambda text: not text.endswith("\0")),
            st.lists(st.floats(-1, 1, width=32), min_size=D, max_size=D)
            .filter(any)
            .map(lambda values: unit(*values)),
            st.none() | st.dictionaries(st.text(max_size=5), st.integers(-9, 9), min_size=1),
            st.none()
            | st.text(min_size=1, max_size=30).filter(lambda text: not text.endswith("\0")),
            st.none() | st.datetimes(timezones=st.just(UTC)),
            st.dictionaries(st.text(max_size=5), st.floats(0, 100), max_size=3),
        ),
        max_size=8,
    ),
    kind=st.sampled_from(FORMATS),
)
def test_whatever_a_dataset_holds_comes_back(sound, rows, kind):
    _, path = sound
    same(read(written(path, kind, rows)), rows)
