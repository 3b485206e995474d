"""The command line without a running platform: usage, exit statuses, sentences."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.cli.running import version

SILENT = "nats://127.0.0.1:9"


@pytest.mark.parametrize("args", [["nonsense"], ["up", "--port", "x"], ["up", "--port", "70000"],
                                  ["logs", "--level", "loud"], ["plugins", "start"],
                                  ["logs", "--since", "soon"], ["logs", "--grep", "("],
                                  ["logs", "--slot", "-1"], ["events", "--since", "soon"],
                                  ["plugins", "log-level", "candle"],
                                  ["plugins", "log-level", "candle", "loud"],
                                  ["plugins", "log-level", "candle", "debug", "--for", "2d"],
                                  ["call", "a.b", "{"], ["call", "a.b", "@absent"]])  # fmt: skip
async def test_wrong_usage_has_status_2_and_a_reason(args: list[str], bkg: Any):
    ended = await bkg(*args)
    assert ended.status == 2
    assert "Error" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("args", [["status"], ["logs"], ["plugins", "start", "candle"],
                                  ["events"], ["plugins", "log-level", "candle", "debug"],
                                  ["call", "candle.stats"], ["worker", "candle"],
                                  ["models", "list"], ["models", "pull", "iris"],
                                  ["jobs", "list"]])  # fmt: skip
async def test_without_a_platform_every_command_says_how_to_start_one(
    args: list[str], bkg: Any, data_dir: Path
):
    ended = await bkg(*args)
    assert ended.status == 3
    assert_one_sentence(ended, f"no bkg runs with the data directory {data_dir}")
    assert "`bkg up`" in ended.err


async def test_a_broker_that_does_not_answer_has_status_3(bkg: Any):
    ended = await bkg("status", "--nats", SILENT)
    assert ended.status == 3
    assert_one_sentence(ended, "127.0.0.1:9")


async def test_a_worker_of_an_unknown_plugin_is_told_the_known_ones(bkg: Any):
    ended = await bkg("worker", "candel", "--nats", SILENT)
    assert ended.status == 1
    assert_one_sentence(ended, "has no plugin 'candel'; it has candle")


async def test_the_version_is_told(bkg: Any):
    ended = await bkg("version")
    assert (ended.status, ended.out) == (0, f"{version()}\n")


def test_help_loads_nothing_that_takes_long():
    program = (
        "import sys; sys.argv = ['bkg', '--help']\n"
        "from services.cli.__main__ import main\n"
        "main()\n"
        "heavy = {'nats', 'aiohttp', 'numpy', 'onnxruntime', 'cv2', 'psutil', 'msgspec'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def assert_one_sentence(ended: Any, text: str) -> None:
    assert ended.err.startswith("bkg: ")
    assert ended.err.count("\n") == 1
    assert text in ended.err
