"""The load generator: wrk, with the body in memory and one connection per unit of concurrency."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Final

import msgspec

from tests.bench.bodies import Body

# Longer than the slowest server takes for one request among 64; a time-out counts as an error.
TIMEOUT_S: Final = 30
# wrk stands still for as long when a window ends; beyond that it hangs.
_GRACE_S: Final = 15
# wrk's own text rounds; this gives the figures as they are, in the last line.
_DONE: Final = """
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\n{"requests":%d,"took_us":%d,"p50_us":%f,"p99_us":%f,"max_us":%f,' ..
    '"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d}\\n',
    summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency.max,
    e.connect, e.read, e.write, e.status, e.timeout))
end
"""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What wrk saw in one window."""

    requests: int
    took_us: int
    p50_us: float
    p99_us: float
    max_us: float
    connect: int
    read: int
    write: int
    status: int
    timeout: int

    @property
    def per_s(self) -> float:
        """Answered requests per second."""
        return 1e6 * self.requests / self.took_us if self.took_us else 0.0

    @property
    def failure(self) -> str | None:
        """What went wrong, as a sentence; None when nothing did."""
        kinds = {
            "connections failed": self.connect,
            "reads failed": self.read,
            "writes failed": self.write,
            "answers with an error's status": self.status,
            "requests timed out": self.timeout,
        }
        seen = [f"{count} {what}" for what, count in kinds.items() if count]
        if not self.requests:
            seen.append("no request was answered")
        return ", ".join(seen) or None


def missing() -> str | None:
    """Return how to install wrk if it is not there."""
    if shutil.which("wrk"):
        return None
    return "the load generator wrk is not installed; on Debian and Ubuntu: apt-get install wrk"


def command(body: Body, *, port: int, connections: int, seconds: int, folder: Path) -> list[str]:
    """Write the script and the body to a folder, and return the command that sends them."""
    folder.mkdir(parents=True, exist_ok=True)
    content, script = folder / "body", folder / "request.lua"
    content.write_bytes(body.content)
    script.write_text(lua(body, content))
    return [
        *("wrk", "--threads", "1", "--connections", str(connections)),
        *("--duration", f"{seconds}s", "--timeout", f"{TIMEOUT_S}s"),
        *("--script", str(script), f"http://127.0.0.1:{port}{body.path}"),
    ]


def lua(body: Body, content: Path) -> str:
    """Return the script; without a `request` function wrk formats the request only once."""
    headers = "".join(
        f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}\n"
        for name, value in body.headers.items()
    )
    return (
        'wrk.method = "POST"\n'
        f'local file = assert(io.open({json.dumps(str(content))}, "rb"))\n'
        'wrk.body = file:read("*a")\n'
        "file:close()\n"
        f"{headers}{_DONE}"
    )


def load(body: Body, *, port: int, connections: int, seconds: int, folder: Path) -> Load:
    """Send one request again and again, over so many connections, for so long."""
    line = command(body, port=port, connections=connections, seconds=seconds, folder=folder)
    done = subprocess.run(
        line, check=True, capture_output=True, timeout=seconds + TIMEOUT_S + _GRACE_S
    )
    return parse(done.stdout.decode())


def parse(output: str) -> Load:
    """Read what our script prints in the last line.

    Raises:
        ValueError: There is no such line; shows what there was.
    """
    lines = output.strip().splitlines()
    try:
        return msgspec.json.decode(lines[-1], type=Load)
    except (IndexError, msgspec.MsgspecError) as error:
        raise ValueError(f"wrk did not end with its figures ({error}): {output[-500:]!r}") from None
