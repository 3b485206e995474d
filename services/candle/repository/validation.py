"""Is an artefact sound? Found in a process of its own, which the artefact may end, but not leave.

A model comes from anywhere, and what opens it is C++ that was never meant for enemies. So a file
is read, checked, opened and run once by a process that has no network, may change no file and has
limits on memory and time (`confine.py`); what it does there is in `inspection.py`. Here is the
worker's side: it starts that process, watches it, and makes a report of whatever comes of it.

`python -m services.candle.repository.validation FILE` does the same without a worker.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import structlog

from bus import codec
from bus import messages as m
from bus.errors import InvalidRequest, NotFound, Unavailable
from bus.process import in_words, run
from bus.tasks import beside, to_its_end
from bus.telemetry import allowed
from services.candle.repository.cache import sha256_of
from services.candle.repository.confine import resident_bytes_of
from services.candle.repository.inspection import MAX_FOUND_BYTES, Found, Request, Stage, readable

_MIB: Final = 1 << 20
# On top of what is in use from the start, so that the limit of the process itself comes first; this
# one is for what that does not count, such as shared memory.
_RUNTIME_BYTES: Final = 512 * _MIB
_WATCH_S: Final = 0.05
_END_S: Final = 5.0
_MAX_OUTPUT_BYTES: Final = 8 * MAX_FOUND_BYTES
_MAX_SAID_BYTES: Final = 4_096

# Of the worker's environment only this: the rest has credentials in it.
_ENVIRONMENT: Final = (
    "PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ",
)  # fmt: skip
_ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}

_WHILE: Final[Mapping[Stage, str]] = {
    "starting": "before it was read",
    "reading": "while it was read",
    "checking": "in ONNX's checker",
    "opening": "while it was opened",
    "running": "while it ran",
    "done": "at the end",
}
# These come from a person or a supervisor, and say nothing about the file.
_FROM_OUTSIDE: Final = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}

log = structlog.get_logger("candle.validation")

Why = Literal["memory", "time", "output"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What looking into one file may take; unset ones follow from the file's size.

    Attributes:
        memory_bytes: Memory on top of the runtime's own: 1 GiB and four times the file, but at
            most three quarters of what this process may use.
        cpu_s: Processor time, in whole seconds: 60, and one for every 8 MiB.
        wall_s: Time, in seconds: five times `cpu_s`, for others may want the processor, too.
    """

    memory_bytes: int | None = None
    cpu_s: int | None = None
    wall_s: float | None = None

    def of(self, size_bytes: int) -> tuple[int, int, float]:
        """Return memory, processor time and time for a file of some size."""
        most = 3 * allowed()[1] // 4
        memory_bytes = self.memory_bytes or min((1 << 30) + 4 * size_bytes, most)
        cpu_s = self.cpu_s or 60 + size_bytes // (8 * _MIB)
        return memory_bytes, cpu_s, self.wall_s or 5.0 * cpu_s


async def validate(
    file: Path,
    *,
    name: str,
    checksum: str | None = None,
    sample: Mapping[str, Any] | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> m.ModelReport:
    """Return whether a file is a sound model, and what else can be said of it.

    Whatever stands in the file, this returns; a file that ends the process or uses it up is not
    sound. Nothing of it is read into this process but for its digest. Cancelled, it ends the
    process first.

    Args:
        file: The file.
        name: What it is called; its suffix names the format.
        checksum: Its SHA-256, if that is known.
        sample: An inference request of the Open Inference Protocol to run in place of zeros.
        limits: What that may take.

    Raises:
        InvalidRequest: The model is opened, but does not take the sample.
        Unavailable: The file cannot be read, or the process cannot be started or was ended from
            outside: nothing is known about the file.
    """
    try:
        size_bytes = (await asyncio.to_thread(file.stat)).st_size
        if checksum is None:
            checksum = await to_its_end(sha256_of, file)
    except OSError as error:
        raise Unavailable(f"{name} cannot be read: {error.strerror or error}") from None
    memory_bytes, cpu_s, wall_s = limits.of(size_bytes)
    request = Request(
        path=str(file),
        name=name,
        parent=os.getpid(),
        memory_bytes=memory_bytes,
        cpu_s=cpu_s,
        sample=None if sample is None else dict(sample),
    )
    began = time.monotonic()
    inspection = _Inspection(memory_bytes + _RUNTIME_BYTES, wall_s)
    await inspection.run(codec.encode(request))
    found = inspection.found
    if found.unreadable is not None:
        raise Unavailable(found.unreadable)
    if found.refused is not None:
        where = f"sample.{found.refused.field}" if found.refused.field else "sample"
        raise InvalidRequest(f"the sample does not fit: {found.refused.message}", field=where)
    if what := inspection.failure(request, wall_s):
        # The first one: it is what ended everything.
        found.problems.insert(0, m.ModelProblem(where="", what=readable(f"{name}: {what}")))
    report = m.ModelReport(
        checksum=checksum,
        sound=not found.problems,
        validated_at=m.now(),
        size_bytes=size_bytes,
        **{key: getattr(found, key) for key in _SHARED},
    )
    log.info(
        "model.validated",
        file=name,
        checksum=checksum,
        sound=report.sound,
        problem=report.problems[0].what if report.problems else None,
        took_s=round(time.monotonic() - began, 3),
    )
    return report


_SHARED: Final = sorted(set(m.ModelReport.__struct_fields__) & set(Found.__struct_fields__))


class _Inspection:
    """One process that looks into a file: started, watched and ended.

    Args:
        memory_bytes: What it may have in use.
        wall_s: How long it may take.

    Attributes:
        found: What it said last.
    """

    def __init__(self, memory_bytes: int, wall_s: float) -> None:
        self.found = Found()
        self._memory_bytes = memory_bytes
        self._wall_s = wall_s
        self._said = b""
        self._status = 0
        self._why: Why | None = None

    async def run(self, request: bytes) -> None:
        """Run it to its end.

        Raises:
            Unavailable: It cannot be started, or was ended from outside.
        """
        try:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "services.candle.repository.inspection",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={k: v for k in _ENVIRONMENT if (v := os.environ.get(k))} | _ONE_THREAD,
                # A Ctrl-C at the terminal is for the worker, which ends this one.
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise Unavailable(
                f"the process that validates cannot be started: {error.strerror or error}",
                retry_after_s=5,
            ) from None
        try:
            async with beside(self._watch(child)):
                _, out, self._said, self._status = await asyncio.gather(
                    _feed(child.stdin, request),
                    self._output(child),
                    _last(child.stderr),
                    child.wait(),
                )
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await child.wait()
        # What is behind the last line break was cut off.
        for line in reversed(out.split(b"\n")[:-1]):
            with contextlib.suppress(InvalidRequest):
                self.found = codec.decode(line, Found)
                break
        if self.found.stage == "starting":
            # The file has not been touched.
            said = self._said.decode(errors="replace").strip()
            log.error("validation.failed", status=self._status, said=said)
            raise Unavailable(
                "the process that validates came to nothing before it read the file: "
                f"{readable(said.splitlines()[-1] if said else in_words(self._status))}",
                retry_after_s=5,
            )
        if self._why is None and -self._status in _FROM_OUTSIDE:
            raise Unavailable(
                "the process that validates was ended from outside "
                f"({signal.Signals(-self._status).name})",
                retry_after_s=5,
            )

    def failure(self, request: Request, wall_s: float) -> str | None:
        """Return why it did not come to its end, as words about the file; None if it did."""
        at = _WHILE[self.found.stage]
        said = self._said.decode(errors="replace")
        memory = (
            f"it took more than {request.memory_bytes // _MIB:,} MiB of memory {at} "
            "(validation_memory_mb)"
        )
        if self._why == "memory" or self.found.out_of_memory or "std::bad_alloc" in said:
            return memory
        if self._why == "time":
            return f"looking into it was not done after {wall_s:g} s, {at} (validation_wall_s)"
        if self._why == "output":
            return f"it made the process that validates say more than {_MAX_OUTPUT_BYTES:,} bytes"
        if self._status < 0:
            number = -self._status
            if number == signal.SIGXCPU:
                return (
                    f"it took more than {request.cpu_s} s of processor time {at} (validation_cpu_s)"
                )
            if number == signal.SIGKILL:
                return f"it was killed (SIGKILL) {at}, as a host does that runs out of memory"
            names = {known.value: known.name for known in signal.Signals}
            return f"the runtime crashed on it ({names.get(number, number)}) {at}"
        if self._status or self.found.stage != "done":
            log.error("validation.failed", status=self._status, said=said)
            last = said.strip().rpartition("\n")[2] or f"status {self._status}"
            return f"looking into it failed {at}: {last}"
        return None

    async def _watch(self, child: asyncio.subprocess.Process) -> None:
        """End it when it takes too much memory or time."""
        until = time.monotonic() + self._wall_s
        while time.monotonic() < until:
            if (resident_bytes_of(child.pid) or 0) > self._memory_bytes:
                return self._end(child, "memory")
            await asyncio.sleep(_WATCH_S)
        return self._end(child, "time")

    def _end(self, child: asyncio.subprocess.Process, why: Why) -> None:
        if child.returncode is None:
            self._why = why
            child.kill()

    async def _output(self, child: asyncio.subprocess.Process) -> bytes:
        assert child.stdout is not None  # noqa: S101 - asked for
        out = bytearray()
        while block := await child.stdout.read(65_536):
            if len(out) + len(block) > _MAX_OUTPUT_BYTES:
                self._end(child, "output")
            else:
                out += block
        return bytes(out)


async def _feed(stream: asyncio.StreamWriter | None, content: bytes) -> None:
    assert stream is not None  # noqa: S101 - asked for
    # It may end before it has read everything.
    with contextlib.suppress(ConnectionError):
        stream.write(content)
        await stream.drain()
    stream.close()
    with contextlib.suppress(ConnectionError):
        await stream.wait_closed()


async def _last(stream: asyncio.StreamReader | None) -> bytes:
    """Read a stream to its end, and return the last of it."""
    assert stream is not None  # noqa: S101 - asked for
    said = b""
    while block := await stream.read(65_536):
        said = (said + block)[-_MAX_SAID_BYTES:]
    return said


def main() -> int:
    """Validate a file from the command line; return 0 if it is sound, and 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m services.candle.repository.validation",
        description="Say whether a model is sound.",
    )
    parser.add_argument("file", type=Path, help="a model, .onnx or .json")
    parser.add_argument("--sample", type=Path, help="an inference request in JSON to run it on")
    parser.add_argument("--json", action="store_true", help="print the whole report")
    asked = parser.parse_args()
    # Whoever reads stdout wants the report alone.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    sound = False

    async def work() -> None:
        nonlocal sound
        sample = None
        if asked.sample is not None:
            try:
                sample = codec.decode(asked.sample.read_bytes(), dict[str, Any])
            except OSError as error:
                raise NotFound(f"{asked.sample} cannot be read: {error.strerror}") from None
        report = await validate(asked.file, name=asked.file.name, sample=sample)
        sound = report.sound
        lines = [codec.encode(report).decode()] if asked.json else list(_as_text(report))
        sys.stdout.write("\n".join(lines) + "\n")

    return run(work) or int(not sound)


def _as_text(report: m.ModelReport) -> Iterator[str]:
    yield "sound" if report.sound else "not sound"
    for problem in report.problems:
        yield f"problem: {problem.what}"
    for advice in report.advice:
        yield f"advice: {advice}"


if __name__ == "__main__":
    sys.exit(main())
