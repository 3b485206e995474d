"""The README's quick start, word for word, as a new user types it."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Generator
from pathlib import Path

import psutil
import pytest

from bus.testing import until
from tests.journeys.conftest import REPOSITORY, without_bkg

Blocks = dict[str, str]
# What a `make` around the tests was given is not for the one in the quick start.
STRIPPED = ("XDG_", "MAKE", "MFLAGS", "ARGS")


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    """The shell blocks of the quick start, by a word of each."""
    text = (REPOSITORY / "README.md").read_text()
    part = text[text.index("## Quick start") : text.index("## What it does")]
    found = re.findall(r"```sh\n(.*?)```", part, re.DOTALL)
    return dict(zip(("address", "models", "faces", "plugins"), found, strict=True))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory in which nothing of bkg has been yet."""
    return tmp_path


@pytest.fixture
def make_run(home: Path) -> Generator[Callable[[], None]]:
    """`make run` as in a shell: once more after Ctrl-C."""
    running: list[subprocess.Popen[bytes]] = []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 43119)), "port 43119 is in use; stop what uses it"

    def ctrl_c() -> None:
        shell = running.pop()
        family = [psutil.Process(shell.pid), *psutil.Process(shell.pid).children(recursive=True)]
        os.killpg(shell.pid, signal.SIGINT)
        shell.wait(10)
        _, left = psutil.wait_procs(family, 5)
        assert not left

    def start() -> None:
        if running:
            ctrl_c()
        shell = subprocess.Popen(
            ["make", "run"], cwd=REPOSITORY, env=environment(home), start_new_session=True
        )
        running.append(shell)
        asyncio.run(until(lambda: ready() or shell.poll() is not None, 120))
        assert shell.poll() is None

    yield start
    if running:
        ctrl_c()


def environment(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in without_bkg().items() if not k.startswith(STRIPPED)}
    return kept | {"HOME": str(home)}


def ready() -> bool:
    try:
        with urllib.request.urlopen("http://127.0.0.1:43119/readyz", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture
def shell(home: Path, blocks: Blocks) -> Callable[[str], list[str]]:
    """Run a block in a second shell, and return the lines that it printed."""

    def run(block: str) -> list[str]:
        script = "set -euo pipefail\n" + blocks["address"] + blocks[block]
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=REPOSITORY, env=environment(home), capture_output=True, text=True, timeout=60,
            check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    return run


def test_the_quick_start_does_what_it_says(make_run, shell, blocks, home):
    make_run()
    loaded, ran, iris, flower = (json.loads(line) for line in shell("models"))
    assert (loaded["id"], loaded["input_dim"], loaded["output_dim"]) == ("demo", 3, 2)
    assert ran["outputs"] == [[6.0, -1.5]]
    assert iris["format"] == "onnx"
    assert flower["named"]["species"] == [2]

    astronaut, cameraman, found, no_face = shell("faces")
    assert astronaut.startswith('{"id":"astronaut","dataset":"default"')
    assert cameraman.startswith('{"id":"cameraman","dataset":"default"')
    best, other = json.loads("{" + found)["results"]
    assert (best["id"], best["known"]) == ("astronaut", True)
    assert (other["id"], other["known"]) == ("cameraman", False)
    assert best["score"] > other["score"] + 0.4
    refused = json.loads(no_face)
    assert refused["status"] == 422
    assert "no face was found" in refused["detail"]

    stopped, status, started, _ = shell("plugins")
    assert json.loads(stopped) == {"status": "stopped"}
    assert json.loads(status)["status"] == "stopped"
    assert started.startswith('{"name":"candle","status":"running"')
    # A record is there a moment after what it tells of.
    blocks["log"] = blocks["plugins"].splitlines()[3]
    asyncio.run(until(lambda: "instance.ready" in shell("log")[0], 20))

    # Ctrl-C, and again: models, faces and log records are still there.
    make_run()
    again = blocks["models"].splitlines()
    blocks["runs only"] = "\n".join(line for line in again if "candle.model.run" in line)
    assert [json.loads(line)["outputs"] for line in shell("runs only")] == [
        [[6.0, -1.5]],
        flower["outputs"],
    ]
    blocks["search only"] = "\n".join(
        line for line in blocks["faces"].splitlines() if "photo()" in line or "search" in line
    )
    [found_again] = shell("search only")
    assert json.loads("{" + found_again)["results"] == [best, other]
    blocks["early log"] = blocks["plugins"].splitlines()[3].replace("limit=10", "limit=100")
    records = json.loads(shell("early log")[0])
    assert sum(record["message"] == "instance.ready" for record in records) == 3
