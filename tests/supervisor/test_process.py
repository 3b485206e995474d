"""One child process: what it says, why it ended, and that nothing of it stays."""

import asyncio
import contextlib
import os
import sys

import psutil
import pytest

from bus.messages import PluginConfig
from bus.testing import until
from services.supervisor import process


@pytest.fixture
def said() -> list[tuple[str, str, str]]:
    return []


@pytest.fixture
def start(said):
    """Start a Python program; its records come to `said`."""

    async def start_one(program: str, **env: str) -> process.Child:
        config = PluginConfig(
            name="w", description="a test", entrypoint=sys.executable,
            args=["-c", program], capabilities=[],
        )  # fmt: skip
        return await process.start(config, env, lambda *record: said.append(record))

    return start_one


@pytest.mark.parametrize(
    ("program", "how", "why"),
    [
        ("raise SystemExit(3)", "ended with status 3", None),
        ("import os; os.kill(os.getpid(), 15)", "was ended by SIGTERM", None),
        ("import os; os.kill(os.getpid(), 9)",
         "was ended by SIGKILL (by hand?)", None),
        ("import nothing_such", "ended with status 1",
         "ModuleNotFoundError: No module named 'nothing_such'"),
        ("raise ExceptionGroup('two', [ValueError('the cause')])", "ended with status 1",
         "ValueError: the cause"),
        # What it printed beside its traceback is not why.
        ("print('bye', flush=True); raise RuntimeError('the cause')", "ended with status 1",
         "RuntimeError: the cause"),
    ],
)  # fmt: skip
async def test_an_end_is_told_in_words_with_its_cause(start, program, how, why):
    child = await start(program)
    assert await child.ended() == how
    assert child.why() == why


async def test_lines_come_without_what_was_meant_for_a_terminal(start, said):
    child = await start(r"print('\x1b]0;title\x07\x1b[1;31mred\x1b[0m \x1b(Bwords\r')")
    await child.ended()
    assert said == [("stdout", "info", "red words")]


async def test_a_traceback_is_one_record_of_bounded_size(start, said):
    child = await start(
        "print('Traceback (most recent call last):')\nfor _ in range(9000): print('  ' + 60 * 'x')"
    )
    await child.ended()
    assert said[0][1] == "error"
    assert process.TRACEBACK_MAX_CHARS < len(said[0][2]) < 2 * process.TRACEBACK_MAX_CHARS
    assert said[1] == ("stdout", "info", "  " + 60 * "x")


async def test_a_module_is_not_taken_from_the_folder_where_the_user_stands(
    said, tmp_path, monkeypatch
):
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").write_text("print('the wrong one')")
    monkeypatch.chdir(tmp_path)
    config = PluginConfig(
        name="w", description="a test", entrypoint="services.none_such", capabilities=[]
    )
    child = await process.start(config, {}, lambda *record: said.append(record))
    await child.ended()
    assert [text for _, _, text in said] == [
        f"{sys.executable}: No module named services.none_such"
    ]


async def test_one_that_floods_leaves_room_for_others(start, said):
    child = await start("while True: print('y')")
    ending = asyncio.create_task(child.ended())
    await until(lambda: len(said) > 50_000)
    in_one_round = []

    async def in_many_rounds() -> bool:
        before = len(said)
        await asyncio.sleep(0)
        if more := len(said) - before:
            in_one_round.append(more)
        return len(in_one_round) > 20

    await until(in_many_rounds)
    child.kill()
    assert await ending == "was ended by SIGKILL"
    # A line has two bytes, and what was left of the chunk before may complete one more.
    assert max(in_one_round) <= process.READ_BYTES // 2 + 1


async def test_killing_takes_what_it_has_started_along(start, said):
    child = await start(
        "import signal, subprocess\n"
        "print(subprocess.Popen(['sleep', '1000']).pid, flush=True)\nsignal.pause()"
    )
    ending = asyncio.create_task(child.ended())
    await until(lambda: said)
    grandchild = int(said[0][2])
    child.kill()
    await ending
    await until(lambda: _has_ended(grandchild))


async def test_a_leftover_is_ended_only_if_it_is_ours(start):
    ours = {"BKG_ROOT": "r", "BKG_HOST_NAME": "h", "BKG_SLOT": "0", "BKG_GENERATION": "4"}
    child = await start("import signal; signal.pause()", **ours)
    ending = asyncio.create_task(child.ended())
    stranger = {**ours, "BKG_GENERATION": "3"}
    assert await process.end_leftovers({child.pid: stranger, 2**22 + 1: ours}, 0.1) == []
    assert psutil.pid_exists(child.pid)
    # The environment is readable as soon as the program is there.
    await until(lambda: _environ(child.pid).get("BKG_SLOT") == "0")
    assert await process.end_leftovers({child.pid: ours}, 0.1) == [child.pid]
    await ending


def _environ(pid: int) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).environ()
    return {}


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return True
