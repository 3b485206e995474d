"""A run of the tests leaves no process behind."""

import asyncio
import os
import signal
import subprocess
import sys

from bus.testing import until
from tests.conftest import MARK, started_with

PARENT = "import subprocess; print(subprocess.Popen(['sleep', '99'], stdout=-3).pid, flush=True)"


async def test_a_process_whose_parent_has_ended_is_found_until_it_ends():
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await parent.communicate()
    left = int(said)
    try:
        # Between fork and exec it has another command.
        await until(lambda: f"{left}: sleep 99" in started_with(os.environ[MARK]))
    finally:
        os.kill(left, signal.SIGKILL)
    await until(lambda: not [one for one in started_with(os.environ[MARK]) if str(left) in one])


def test_what_another_run_started_does_not_count():
    with subprocess.Popen(["sleep", "99"], env=os.environ | {MARK: "another"}) as other:
        found = started_with(os.environ[MARK])
        other.kill()
    assert not [one for one in found if one.startswith(f"{other.pid}:")]
