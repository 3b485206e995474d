"""The bench: its bodies, its reading of wrk, its tables, and that it leaves no process."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.bench import bodies, contest, report, roster, running, uploads, wrk
from tests.bench.balance import slowed
from tests.bench.bodies import HEADER
from tests.bench.contest import Plan, measure
from tests.bench.memory import cycled, trend
from tests.bench.models import SHAPES, example, expected, make_models
from tests.bench.processes import REPOSITORY, Server, nothing_left
from tests.bench.results import NOISE_MAX, Results, Start, Window
from tests.bench.tables import Verdict, cells, ratio, starts, verdicts
from tests.bench.uploads import Grown, grown, passages

NEEDS_WRK = pytest.mark.skipif(
    shutil.which("wrk") is None, reason="the load generator wrk is not installed"
)
FINITE = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-1e6, 1e6, width=32),
)


def window(peer="bkg", *, per_s=100.0, others=0.0, failure=None, connections=64, **more):
    place = {"model": "tiny", "kind": "json", "round": 0, "p50_ms": 1.0, "p99_ms": 2.0, **more}
    return Window(
        peer=peer, per_s=per_s, others=others, failure=failure, connections=connections, **place
    )


def results(*windows: Window, **more):
    machine = {"processor": "p", "cores": "2", "memory": "8 GiB", "system": "s", "python": "3.11"}
    return Results(
        made_at="2026-01-31T12:00:00+00:00",
        machine=machine,
        options={"rounds": 3, "seconds": 4},
        versions={},
        windows=list(windows),
        **more,
    )


@given(FINITE)
def test_a_json_body_carries_the_tensor_as_it_is(array):
    tensor = json.loads(bodies.oip_json("m", array).content)["inputs"][0]
    assert np.array_equal(np.array(tensor["data"], np.float32).reshape(tensor["shape"]), array)


@given(FINITE)
def test_a_binary_body_is_json_and_then_the_bytes_that_it_announces(array):
    body = bodies.oip_binary("m", array)
    length = int(body.headers[HEADER])
    head = json.loads(body.content[:length])
    assert head["parameters"] == {"binary_data_output": True}
    assert head["inputs"][0]["parameters"]["binary_data_size"] == len(body.content) - length
    assert np.array_equal(np.frombuffer(body.content[length:], "<f4"), array.ravel())


@given(FINITE)
def test_a_binary_body_is_the_one_of_the_stock_client(array):
    client = pytest.importorskip("tritonclient.http")
    tensor = client.InferInput("input", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array, binary_data=True)
    theirs, length = client.InferenceServerClient.generate_request_body([tensor])
    ours = bodies.oip_binary("m", array)
    ours_length = int(ours.headers[HEADER])
    assert json.loads(ours.content[:ours_length]) == json.loads(bytes(theirs)[:length])
    assert ours.content[ours_length:] == bytes(theirs)[length:]


@given(FINITE)
def test_an_answer_is_read_in_every_format(array):
    flat, shape = array.ravel(), list(array.shape)
    head = json.dumps(
        {"outputs": [{"shape": shape, "parameters": {"binary_data_size": 4 * flat.size}}]}
    )
    answers = [
        ({}, json.dumps({"outputs": [{"shape": shape, "data": flat.tolist()}]}).encode()),
        ({HEADER.lower(): str(len(head))}, head.encode() + flat.astype("<f4").tobytes()),
        ({}, json.dumps({"outputs": array.tolist()}).encode()),
        ({}, json.dumps(array.tolist()).encode()),
    ]
    for headers, content in answers:
        assert np.array_equal(bodies.numbers(headers, content), flat)


@given(st.binary(max_size=50).map(lambda rest: b"{" + rest), st.none() | st.integers(-5, 100))
def test_an_answer_that_cannot_be_read_is_told_in_a_sentence(content, length):
    headers = {} if length is None else {HEADER: str(length)}
    with pytest.raises(ValueError, match="no tensor in a known format"):
        bodies.numbers(headers, content)


def test_the_models_are_made_alike_each_time(tmp_path):
    for folder in ("a", "b"):
        make_models(tmp_path / folder)
    for model in SHAPES:
        one, other = (tmp_path / folder / f"{model}.onnx" for folder in "ab")
        assert one.read_bytes() == other.read_bytes()
        assert expected(tmp_path / "a", model).shape == (1, 4 if model == "tiny" else 10)
    assert example("conv", 2).shape == (2, 3, 112, 112)


def test_the_figures_of_wrk_are_read_from_its_last_line():
    line = (
        '{"requests":200,"took_us":2000000,"p50_us":10.5,"p99_us":20,"max_us":30,'
        '"connect":0,"read":0,"write":0,"status":0,"timeout":0}'
    )
    load = wrk.parse(f"Running 2s test\n  1 threads\n\n{line}\n")
    assert load.per_s == 100
    assert load.failure is None


@pytest.mark.parametrize("output", ["", "unable to connect to 127.0.0.1:1 Connection refused"])
def test_wrk_that_ends_without_figures_is_told_with_what_it_said(output):
    with pytest.raises(ValueError, match="did not end with its figures"):
        wrk.parse(output)


def test_errors_and_an_empty_window_are_failures():
    figures = dict.fromkeys(("read", "write", "timeout"), 0)
    none = wrk.Load(
        requests=0, took_us=1, p50_us=0, p99_us=0, max_us=0, connect=2, status=0, **figures
    )
    assert none.failure == "2 connections failed, no request was answered"
    some = wrk.Load(
        requests=9, took_us=1, p50_us=0, p99_us=0, max_us=0, connect=0, status=3, **figures
    )
    assert some.failure == "3 answers with an error's status"


def test_a_cell_is_the_median_of_its_quiet_windows():
    windows = [window(per_s=x) for x in (10, 30, 20)]
    cell = cells([*windows, window(per_s=999, others=2 * NOISE_MAX)])["bkg", "tiny", "json", 64]
    assert (cell.per_s, cell.windows, cell.noisy) == (20, 3, False)


def test_a_cell_without_a_quiet_window_says_so():
    cell = cells([window(per_s=5, others=0.5)])["bkg", "tiny", "json", 64]
    assert (cell.per_s, cell.noisy) == (5, True)


def test_one_failed_window_fails_its_cell():
    table = cells([window(), window(failure="3 reads failed"), window("kserve")])
    assert table["bkg", "tiny", "json", 64].failure == "3 reads failed"
    assert math.isnan(ratio(table, ("kserve", "tiny", "json", 64)))


def test_a_ratio_is_ours_over_theirs():
    table = cells([window(per_s=300), window("kserve", per_s=100)])
    assert ratio(table, ("kserve", "tiny", "json", 64)) == 3


@given(st.floats(0.1, 1e6), st.floats(0.1, 1e6), st.booleans())
def test_a_goal_is_met_when_its_margin_is_not_below_zero(wanted, measured, at_most):
    one = Verdict(goal="g", wanted=wanted, measured=measured, at_most=at_most)
    assert one.met == (one.margin >= 0)


def test_goals_are_judged_by_what_was_measured():
    start = Start(peer="bkg", round=0, ready_s=1.5, idle_mib=300, loaded_mib=310, processes=6)
    measured = results(
        window(per_s=1000), window("fastapi", per_s=200), window("door", per_s=2000),
        starts=[start],
    )  # fmt: skip
    met = {one.goal: one.met for one in verdicts(measured)}
    assert met["tiny, c=64: requests/s, times fastapi"] is True
    assert met["tiny, c=64: share of the door's limit"] is False
    assert met["tiny, c=64: requests/s, times kserve"] is None
    assert met["seconds to the first right answer"] is True
    assert met["idle with the models loaded: memory in MiB"] is False
    assert starts(measured)["bkg"].processes == 6


def test_the_best_peer_on_images_is_neither_ours_nor_the_door():
    conv = {"model": "conv", "kind": "binary"}
    measured = results(
        window(per_s=120, **conv), window("door", per_s=9000, **conv),
        window("bkg-capability", per_s=500, **conv), window("mosec", per_s=100, **conv),
    )  # fmt: skip
    found = [one for one in verdicts(measured) if "best peer" in one.goal and one.met is not None]
    assert [one.measured for one in found] == [1.2]


def test_figures_come_back_from_their_file(tmp_path):
    kept = results(window(), window("onnxruntime", kind="array", p50_ms=None, p99_ms=None))
    assert msgspec.json.decode(msgspec.json.encode(kept), type=Results) == kept


def test_the_tables_replace_the_marked_section_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(results(window(per_s=12_345), failures=["a <b> | c"]), page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "| bkg | 12,345 |" in text
    assert r"a \<b\> \| c" in text
    assert "old" not in text
    report.write(results(window(per_s=7)), page)
    assert page.read_text().count(report.BEGIN) == 1


def test_a_page_without_the_section_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no section between"):
        report.write(results(), page)


def test_the_page_of_the_figures_has_its_section():
    text = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    assert text.index(report.BEGIN) < text.index(report.END)


@given(st.floats(-5, 5), st.floats(0, 500))
def test_a_trend_is_the_slope_of_what_was_sampled(slope, start):
    points = [(float(t), start + slope * t) for t in range(0, 100, 5)]
    one = trend("candle", points, per=100)
    assert one.slope == pytest.approx(100 * slope, abs=1e-3)
    assert one.last - one.first == pytest.approx(slope * 70, abs=1e-3)


def test_a_memory_that_jumps_at_first_and_then_stays_is_flat():
    points = [(0.0, 50.0), *((float(t), 200.0) for t in range(10, 100, 5))]
    assert trend("candle", points, per=100).flat
    assert not trend("candle", [(float(t), 50.0 + t) for t in range(100)], per=100).flat


@pytest.mark.parametrize(
    ("last", "files", "comes_back"),
    [(150, 20, True), (166, 20, True), (600, 20, False), (150, 220, False)],
)
def test_memory_comes_back_when_later_cycles_leave_no_more_than_the_first(last, files, comes_back):
    after = [(0.0, 150.0), *((float(n), float(last)) for n in range(1, 20))]
    one = cycled(after, 45.0, [300.0], [20, files])
    assert one.comes_back is comes_back


def test_every_peer_has_its_file_and_a_name_of_its_own():
    names = [peer.name for peer in roster.PEERS]
    assert len(set(names)) == len(names)
    for peer in roster.PEERS:
        path = REPOSITORY / peer.module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True)
print(child.pid, flush=True)
"""


def test_a_stopped_server_leaves_none_of_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.bench.processes._STOP_S", 2.0)
    ends = STUBBORN + "time.sleep(1000)\n"
    server = Server([sys.executable, "-c", ends], tmp_path / "log", {})
    wait_for(lambda: server.log.read_text().strip() and len(server.processes()) == 2)
    assert len(server.memory_mib()) == len(server.cpu_s()) == 2
    processes = server.processes()
    server.stop()
    # An orphan that has ended stays listed until init looks at it.
    wait_for(lambda: not [one for one in processes if one.is_running()])


def test_an_orphan_in_a_session_of_its_own_is_ended_too(tmp_path):
    log = tmp_path / "log"
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.bench.processes import Server, nothing_left\n"
        "with nothing_left():\n"
        f"    server = Server([sys.executable, '-c', {STUBBORN!r}], Path({str(log)!r}), {{}})\n"
        "    server._process.wait()\n"
        "    raise KeyboardInterrupt\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "KeyboardInterrupt" in done.stderr
    assert not psutil.pid_exists(int(log.read_text()))


def test_what_ran_before_runs_on(tmp_path):
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    mine = Server(sleeper, tmp_path / "mine", {})
    with nothing_left():
        theirs = Server(sleeper, tmp_path / "theirs", {})
        assert not theirs.ended
    assert theirs.ended
    assert not mine.ended
    mine.stop()


@NEEDS_WRK
def test_wrk_sends_the_body_as_it_is_and_counts_what_comes_back(tmp_path):
    code = (
        "import http.server, sys\n"
        "class Door(http.server.BaseHTTPRequestHandler):\n"
        "    protocol_version = 'HTTP/1.1'\n"
        "    def do_POST(self):\n"
        "        body = self.rfile.read(int(self.headers['Content-Length']))\n"
        "        right = body == bytes(range(256)) and self.headers['X-Key'] == 'a\"b'\n"
        "        self.send_response(200 if right else 400)\n"
        "        self.send_header('Content-Length', '0')\n"
        "        self.end_headers()\n"
        "    def log_message(self, *args): pass\n"
        "server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Door)\n"
        "print(server.server_port, flush=True)\n"
        "server.serve_forever()\n"
    )
    with nothing_left():
        server = Server([sys.executable, "-c", code], tmp_path / "log", {})
        wait_for(lambda: server.log.read_text().strip())
        port = int(server.log.read_text())
        body = bodies.Body(path="/x", content=bytes(range(256)), headers={"X-Key": 'a"b'})
        seen = wrk.load(body, port=port, connections=2, seconds=1, folder=tmp_path)
        other = bodies.Body(path="/x", content=b"other")
        refused = wrk.load(other, port=port, connections=2, seconds=1, folder=tmp_path)
        server.stop()
    assert seen.requests > 0
    assert seen.failure is None
    assert "answers with an error's status" in (refused.failure or "")


@NEEDS_WRK
def test_a_contest_measures_bkg_the_door_and_onnxruntime_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "CACHE", tmp_path)
    plan = Plan(
        peers=["bkg-capability", "door", "onnxruntime"],
        models=["tiny"], kinds=["json", "binary"], connections=[2], seconds=1, rounds=1, repeats=0,
    )  # fmt: skip
    found, before = results(), psutil.Process().children()
    with nothing_left():
        measure(plan, found, print)
    assert not found.failures
    assert {(one.peer, one.kind) for one in found.windows} == {
        ("bkg-capability", "json"), ("door", "json"), ("door", "binary"), ("onnxruntime", "array"),
    }  # fmt: skip
    assert all(one.per_s > 0 and one.failure is None for one in found.windows)
    by_peer = starts(found)
    # Broker, supervisor, gateway, two workers, and `bkg up` itself; for a moment also one that
    # validates what lies in the models folder.
    assert by_peer["bkg-capability"].processes in {6, 7}
    assert by_peer["door"].processes == 1
    assert psutil.Process().children() == before
    assert report.markdown(found)


@NEEDS_WRK
def test_a_server_that_does_not_start_is_told_and_the_others_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "CACHE", tmp_path)
    door = next(peer for peer in roster.PEERS if peer.name == "door")
    broken = dataclasses.replace(door, name="kserve", title="KServe", module="no_such_module")
    monkeypatch.setattr(contest, "PEERS", (broken, door))
    plan = Plan(
        peers=["kserve", "door"],
        models=["tiny"], kinds=["json"], connections=[1], seconds=1, rounds=1, repeats=0,
    )  # fmt: skip
    found = results()
    with nothing_left():
        measure(plan, found, print)
    assert "KServe ended while it started" in found.failures[0]
    assert "no_such_module" in found.failures[0]
    assert [one.peer for one in found.windows] == ["door"]


@NEEDS_WRK
def test_a_server_whose_answers_are_wrong_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "CACHE", tmp_path)
    monkeypatch.setattr(running, "START_S", 2.0)
    door = next(peer for peer in roster.PEERS if peer.name == "door")
    monkeypatch.setattr(contest, "PEERS", (dataclasses.replace(door, answers=True),))
    plan = Plan(
        peers=["door"],
        models=["tiny"], kinds=["json"], connections=[1], seconds=1, rounds=1, repeats=0,
    )  # fmt: skip
    found = results()
    with nothing_left():
        measure(plan, found, print)
    assert "gave no right answer" in found.failures[0]
    assert not found.windows


def test_a_window_begins_when_the_server_has_done_what_was_left(tmp_path, monkeypatch):
    # Longer looks than in earnest: on a loaded machine a busy process may get little for a moment.
    monkeypatch.setattr(running, "_SETTLE_S", 1.0)
    monkeypatch.setattr(running, "_IDLE_SHARE", 0.05)
    busy = "import time\nend = time.monotonic() + 3\nwhile time.monotonic() < end: pass\n"
    server = Server([sys.executable, "-c", f"{busy}print(1, flush=True)\ntime.sleep(600)"],
                    tmp_path / "log", {})  # fmt: skip
    wait_for(lambda: sum(server.cpu_s().values()) > 0.1)
    running.settle(server)
    assert server.log.read_text() == "1\n"
    server.stop()


def test_the_growth_of_a_process_is_from_before_to_its_peak():
    """Also of one that came and went in between; what leaves takes nothing less."""
    before = {"gateway": 40.0, "broker": 30.0}
    samples = [{"gateway": 90.0, "candle.inspection": 70.0}, {"gateway": 50.0, "broker": 20.0}]
    found = grown(before, samples)
    assert [(one.name, one.growth_mib, one.bounded) for one in found] == [
        ("candle.inspection", 70.0, None),
        ("gateway", 50.0, True),
        ("broker", 0.0, None),
    ]
    assert not Grown(name="candle", before_mib=10.0, peak_mib=75.0).bounded


def test_a_file_goes_through_bkg_and_comes_back_while_its_memory_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "CACHE", tmp_path)
    monkeypatch.setattr(uploads, "CACHE", tmp_path)
    with nothing_left():
        up, down = passages([3], print)
    assert (up.way, up.mib, down.way) == ("up", 3, "down")
    assert "zeros.onnx" in up.said
    assert f"{3 * 1024**2:,} bytes" in down.said
    for one in (up, down):
        assert {"gateway", "candle", "broker"} <= {process.name for process in one.processes}
    assert not list(tmp_path.glob("*.onnx"))


def test_a_slowed_process_runs_again_afterwards():
    code = "import time\nwhile True: time.sleep(0.01)"
    with subprocess.Popen([sys.executable, "-c", code]) as one:
        process = psutil.Process(one.pid)
        with slowed(process, 10):
            wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
        wait_for(lambda: process.status() != psutil.STATUS_STOPPED)
        one.kill()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
