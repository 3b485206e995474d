"""The bench of faces: its rates, its pairs, its search children, its tables."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.rustyface import samples
from tests.bench import faces, faces_accuracy, faces_encode, faces_search, report
from tests.bench.faces import Found
from tests.bench.faces_accuracy import Accuracy, rates
from tests.bench.faces_encode import Encoded, Steady, medians
from tests.bench.faces_photos import Photo, all_pairs, labelled, lfw_pairs
from tests.bench.faces_replay import Enrolled, Joined, Replayed
from tests.bench.faces_search import Searched
from tests.bench.memory import trend

MACHINE = {"processor": "p", "cores": "2", "memory": "8 GiB", "system": "s", "python": "3.11"}
SCORES = hnp.arrays(np.float32, st.integers(2, 60), elements=st.floats(-1, 1, width=32))
ASTRONAUT = Path(next(iter(samples.__path__))) / "astronaut.jpg"


def photos(**count: int) -> list[Photo]:
    return [
        Photo(person, Path(person) / f"{person}_{number:04}.jpg")
        for person, times in count.items()
        for number in range(1, times + 1)
    ]


def rated(same: list[float], different: list[float]) -> faces_accuracy.Rates:
    folds = (np.arange(len(scores)) % 10 for scores in (same, different))
    return rates(np.float32(same), np.float32(different), *folds)


def accuracy(embedder="sface") -> Accuracy:
    return Accuracy(
        embedder=embedder,
        source="a folder",
        persons=3,
        photos=9,
        missed=1,
        rates=rated([0.9] * 20, [0.1] * 150),
    )


def everything() -> Found:
    searched = [
        Searched(
            engine=engine,
            entries=10_000,
            batch=batch,
            best_ms=best,
            p50_ms=best,
            p99_ms=9.0,
            cpu_ms=best,
            calls=99,
            recall=1.0,
        )
        for engine, best in (("numpy", 1.0), ("ours", 1.1), ("faiss", 2.0), ("usearch", 0.5))
        for batch in (1, 32)
    ]
    window = Joined(callers=32, asks_broker=True, per_s=500.0, p50_ms=60.0, p99_ms=90.0)
    return Found(
        made_at="2026-01-31T12:00:00+00:00",
        machine=MACHINE,
        versions={"faiss": "1.15"},
        accuracy=[accuracy()],
        encoded=[
            Encoded(way="opencv", side_by_side=2, per_s=60.0, cpu_ms=33.0),
            Encoded(way="ours", side_by_side=2, per_s=70.0, cpu_ms=28.0),
            Encoded(way="msgpack", side_by_side=4, per_s=63.0, cpu_ms=29.0, p50_ms=60, p99_ms=80),
        ],
        searched=searched,
        replayed=[
            Replayed(
                entries=100_000,
                replay_s=4.0,
                replay_cpu_s=3.5,
                bytes_per_entry=1_000.0,
                peak_bytes_per_entry=2_000.0,
                searches=[window],
            )
        ],
        enrolled=[Enrolled(callers=0, per_s=5_000.0)],
        steady=Steady(
            images=10_000,
            per_s=50.0,
            faces=8_000,
            trend=trend("rustyface", [(float(i), 200.0) for i in range(9)], per=1_000),
        ),
    )


@given(SCORES, SCORES)
def test_the_area_is_the_share_of_pairs_in_the_right_order(same, different):
    above = (same[:, None] > different).mean()
    equal = (same[:, None] == different).mean()
    assert faces_accuracy.area(same, different) == pytest.approx(above + equal / 2)


@given(SCORES, SCORES, st.sampled_from([0.5, 0.1, 0.02]))
def test_at_a_false_match_rate_no_more_strangers_pass_and_no_lower_threshold_would_do(
    same, different, rate
):
    found = faces_accuracy.at_rate(same, different, rate)
    assert (different >= np.float32(found.threshold)).mean() <= rate
    lower = np.nextafter(np.float32(found.threshold), np.float32(-2))
    assert (different >= lower).mean() > rate
    assert found.true_match_rate == (same >= np.float32(found.threshold)).mean()


def test_rates_that_the_pairs_cannot_show_are_left_out():
    found = rated([0.9] * 10, [0.1] * 150)
    assert [one.false_match_rate for one in found.at_rates] == [5e-2, 1e-2]


def test_thresholds_of_the_product_come_with_how_sure_they_are():
    at_363, at_45 = rated([0.4] * 5 + [0.8] * 5, [0.1] * 99 + [0.38]).at_thresholds
    assert (at_363.true_match_rate, at_363.false_match_rate) == (1.0, 0.01)
    assert (at_45.true_match_rate, at_45.false_match_rate) == (0.5, 0.0)
    low, high = at_45.true_match_interval
    assert low == pytest.approx(0.2366, abs=1e-4)  # Wilson's own for 5 of 10
    assert high == pytest.approx(0.7634, abs=1e-4)
    assert 0 < at_45.false_match_interval[1] < 0.04


def test_the_threshold_of_a_fold_is_found_on_the_others():
    # The last fold would be perfect with a threshold of its own, between 0.15 and 0.2.
    same, different = [0.9] * 9 + [0.2], [0.1] * 9 + [0.15]
    assert rated(same, different).balanced == pytest.approx(0.95)


def test_all_pairs_are_compared_once():
    found = all_pairs(photos(ann=3, bob=2, cy=1))
    assert len(found.same) == 4
    assert len(found.different) == 11
    pairs = {tuple(sorted(pair)) for pair in [*found.same.tolist(), *found.different.tolist()]}
    assert len(pairs) == 15


def test_lfws_own_pairs_and_folds_are_taken(tmp_path):
    listed = tmp_path / "pairs.txt"
    listed.write_text("2\t1\nann\t1\t2\nann\t1\tbob\t1\nbob\t1\t2\nann\t2\tbob\t2\n")
    found = lfw_pairs(listed, photos(ann=2, bob=2))
    assert found.same.tolist() == [[0, 1], [2, 3]]
    assert found.different.tolist() == [[0, 2], [1, 3]]
    assert (found.same_fold.tolist(), found.different_fold.tolist()) == ([0, 1], [0, 1])


@pytest.mark.parametrize("line", ["ann\t1\t9", "ann\tone\t2", "who\t1\t2", "ann"])
def test_a_pair_that_is_not_there_is_named_with_its_line(tmp_path, line):
    listed = tmp_path / "pairs.txt"
    listed.write_text(f"1\t1\nann\t1\t2\n{line}\n")
    with pytest.raises(ValueError, match="pairs.txt, line 3"):
        lfw_pairs(listed, photos(ann=2))


def test_a_folder_without_two_photos_of_somebody_is_refused(tmp_path):
    for name in ("ann/1.jpg", "bob/1.jpg", "bob/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="2 photos of 2 persons; wanted is a folder for each"):
        labelled(tmp_path)
    (tmp_path / "bob" / "2.PNG").touch()
    assert [photo.person for photo in labelled(tmp_path)] == ["ann", "bob", "bob"]


def test_photos_of_a_folder_are_compared_by_both_embedders(tmp_path, monkeypatch):
    monkeypatch.setattr(faces_accuracy, "CACHE", tmp_path / "cache")
    for name in ("ann/1.jpg", "ann/2.jpg", "bob/1.jpg", "bob/broken.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ASTRONAUT, tmp_path / "photos" / name)
    (tmp_path / "photos" / "bob" / "broken.jpg").write_bytes(b"no picture")
    said: list[str] = []
    sface, pixels = faces_accuracy.accuracy(tmp_path / "photos", said.append)
    assert (sface.embedder, pixels.embedder) == ("sface", "pixel32")
    assert (sface.persons, sface.photos, sface.missed) == (2, 4, 1)
    assert (sface.rates.same, sface.rates.different) == (1, 2)
    # All of them are one photo: nobody can tell these persons apart.
    assert sface.rates.auc == 0.5
    assert sface.rates.at_thresholds[0].false_match_rate == 1.0
    assert any(line.startswith("broken.jpg: ") for line in said)


def test_vectors_of_one_person_are_near_and_of_strangers_are_not():
    vectors, queries = faces_search.made(2_000)
    assert vectors.shape == (2_000, 128)
    assert np.allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    ten = faces_search.exact(vectors, queries)
    assert ten[:, -1].min() > 0.5
    assert np.median(vectors @ queries.T) < 0.05


def test_the_exact_nearest_are_those_of_a_full_sort():
    random = np.random.default_rng(1)
    vectors = random.standard_normal((120_000, 8), np.float32)
    queries = random.standard_normal((3, 8), np.float32)
    full = np.sort(queries.astype(np.float64) @ vectors.astype(np.float64).T, axis=1)
    assert np.allclose(faces_search.exact(vectors, queries), full[:, :-11:-1])


def test_every_engine_of_ours_finds_the_exact_nearest(tmp_path):
    vectors, queries = faces_search.made(1_000)
    files = tmp_path / "vectors.npy", tmp_path / "queries.npy"
    np.save(files[0], vectors)
    np.save(files[1], queries)
    right = faces_search.exact(vectors, queries)
    with faces_search._child(faces_search.HERE, files, 1) as child:
        assert child.engines == ["read", "numpy", "numpy-partition", "ours", "ours-open"]
        for engine in child.engines[1:]:
            for batch in faces_search.BATCHES:
                told = child.ask(engine, batch, 0)
                assert len(told["ms"]) == 3
                assert len(told["rows"]) == batch
                assert faces_search.recall(vectors, queries, right, told["rows"]) == 1


def test_a_wrong_or_doubled_result_lowers_the_recall():
    vectors, queries = faces_search.made(500)
    right = faces_search.exact(vectors, queries)
    order = np.argsort(-(vectors @ queries[0]))
    best = order[:10].tolist()
    assert faces_search.recall(vectors, queries, right, [best]) == 1
    assert faces_search.recall(vectors, queries, right, [[*best[:9], int(order[-1])]]) == 0.9
    assert faces_search.recall(vectors, queries, right, [[*best[:9], best[0]]]) == 0.9


def test_the_median_over_the_rounds_counts():
    found = medians(
        [Encoded(way="ours", side_by_side=1, per_s=per_s, cpu_ms=1.0) for per_s in (9, 1, 5)]
    )
    assert [(one.per_s, one.p50_ms) for one in found] == [(5, None)]


def test_the_pictures_of_a_run_have_ever_other_sizes_and_are_the_same_on_the_next():
    first, again = (list(faces_encode._pictures(8)) for _ in range(2))
    assert first == again
    assert len(set(first)) == 8


def test_tables_and_goals_say_what_was_measured():
    found = everything()
    titles = [sheet.title.partition(":")[0] for sheet in faces.sheets(found)]
    assert titles == [
        "Accuracy",
        "Encoding",
        "Search",
        "Replay",
        "Search in that replica",
        "Enrolment",
        "Memory of a worker over images of changing sizes",
        "Goals",
    ]
    met = {one.goal: one.met for one in faces.verdicts(found)}
    assert met["faces.encode: images/s, times OpenCV's own"] is True
    assert met["faces.encode: CPU per image, times our pipeline in process"] is True
    assert met["search, 10,000, batch 32: CPU of a call, times numpy"] is True
    assert met["search, 10,000, batch 32: CPU of a call, times usearch"] is False
    assert met["replay of 100,000 entries, s"] is True
    assert met["memory over 10,000 images: last, times first"] is True


def test_parts_that_were_measured_apart_are_shown_as_one():
    whole, empty = everything(), Found(made_at="2026-02-01T12:00:00+00:00", machine=MACHINE)
    other = Found(made_at="2026-02-02T12:00:00+00:00", machine=MACHINE, threads=2)
    other.searched = whole.searched[:1]
    found = faces.joined([whole, empty, other])
    assert (found.made_at, found.threads) == (whole.made_at, 2)
    assert found.searched == other.searched
    assert found.encoded == whole.encoded


def test_a_run_that_measured_nothing_has_no_tables():
    empty = Found(made_at="2026-01-31T12:00:00+00:00", machine=MACHINE)
    assert faces.sheets(empty) == []
    assert all(one.met is None for one in faces.verdicts(empty))


def test_few_pairs_are_called_few_and_a_missed_result_is_named():
    found = everything()
    found.searched.append(
        Searched(
            engine="faiss",
            entries=9,
            batch=1,
            best_ms=1,
            p50_ms=1,
            p99_ms=1,
            cpu_ms=1,
            calls=9,
            recall=0.9,
        )
    )
    said = faces.remarks(found)
    assert any("so few pairs" in line for line in said)
    assert "search: faiss, 9: recall 0.9000" in said


def test_the_tables_go_between_the_marks_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    shutil.copy(Path(__file__).parents[1] / "docs" / "benchmarks.md", page)
    before = page.read_text()
    report.fill(page, faces.BEGIN, faces.END, faces.markdown(everything()))
    text = page.read_text()
    assert "### Encoding: a photo of 640 x 480 pixels with one face" in text
    assert text.split(faces.BEGIN)[0] == before.split(faces.BEGIN)[0]
    assert text.split(faces.END)[1] == before.split(faces.END)[1]


def test_a_share_that_was_not_measured_is_no_number():
    found = everything()
    found.encoded = [one for one in found.encoded if one.way == "ours"]
    assert all(math.isnan(goal.measured) for goal in faces._goals_of_encoding(found.encoded))
