"""A look at bkg's memory while large files go through it: uploaded, validated, and read again."""

import hashlib
import http.client
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from tests.bench.memory import name_of
from tests.bench.processes import Server
from tests.bench.roster import CACHE
from tests.bench.running import ServerFailed, fresh_bkg, settle

# What these may take more than before, whatever the size of the file.
GROWTH_MAX_MIB: Final = 64.0
BOUNDED: Final = ("gateway", "candle")
_SAMPLE_S: Final = 0.2
_BLOCK_BYTES: Final = 1024 * 1024
# Until the answer: the file is also validated.
_WAIT_S: Final = 900.0
_SAID_MAX: Final = 120


class Grown(msgspec.Struct, frozen=True, kw_only=True):
    """What a process took while a file went through bkg.

    Attributes:
        name: Which process.
        before_mib: Before; 0 for one that came only then.
        peak_mib: The most.
    """

    name: str
    before_mib: float
    peak_mib: float

    @property
    def growth_mib(self) -> float:
        """How much more it took than before."""
        return self.peak_mib - self.before_mib

    @property
    def bounded(self) -> bool | None:
        """Whether it grew by no more than it may; None where nothing is promised of it."""
        return self.growth_mib <= GROWTH_MAX_MIB if self.name in BOUNDED else None


class Passage(msgspec.Struct, frozen=True, kw_only=True):
    """A file that went through bkg, one way.

    Attributes:
        mib: Its size.
        way: `up`, with its validation, or `down`.
        seconds: How long that took.
        said: What came of it.
        processes: What each process took, the largest growth first.
    """

    mib: int
    way: str
    seconds: float
    said: str
    processes: list[Grown]


def passages(sizes_mib: Sequence[int], say: Callable[[str], None]) -> list[Passage]:
    """Send files of zeros through a fresh bkg, and read them again.

    Zeros are no model: they are validated, and kept as what is not sound.

    Args:
        sizes_mib: How large they are.
        say: Is told how far it is.

    Raises:
        ServerFailed: An upload was refused, or something else came back.
    """
    found = []
    with fresh_bkg() as (server, port), ThreadPoolExecutor(1) as caller:
        for mib in sizes_mib:
            path, place = _sparse(mib), f"/api/models/zeros-{mib}/versions/1"
            try:
                digest = _digest_of(path)
                for way, work in (
                    ("up", partial(_put, port, place, path, digest)),
                    ("down", partial(_get, port, place, digest)),
                ):
                    settle(server)
                    found.append(_watched(server, mib, way, caller.submit(work)))
                    say(f"{mib} MiB {way}: {found[-1].seconds:.1f} s; {found[-1].said}")
            finally:
                path.unlink()
    return found


def grown(before: Mapping[str, float], samples: Iterable[Mapping[str, float]]) -> list[Grown]:
    """Return what samples of the memory come to, the largest growth first.

    Args:
        before: MiB of each process before.
        samples: MiB of each process that lived, at some moments since.
    """
    peaks = dict(before)
    for sample in samples:
        for name, mib in sample.items():
            peaks[name] = max(mib, peaks.get(name, 0.0))
    processes = [
        Grown(name=name, before_mib=before.get(name, 0.0), peak_mib=mib)
        for name, mib in peaks.items()
    ]
    return sorted(processes, key=lambda one: -one.growth_mib)


def _watched(server: Server, mib: int, way: str, work: "Future[str]") -> Passage:
    """Sample the memory of each process until a file has gone through."""
    before, began = _memory(server), time.monotonic()
    samples = [before]
    while wait([work], _SAMPLE_S).not_done:
        samples.append(_memory(server))
    took_s = time.monotonic() - began
    samples.append(_memory(server))
    return Passage(
        mib=mib, way=way, seconds=took_s, said=work.result(), processes=grown(before, samples)
    )


def _memory(server: Server) -> dict[str, float]:
    """Return the memory of bkg's processes (PSS, MiB), by the name of what they run."""
    memory: dict[str, float] = {}
    for process, mib in server.memory_mib().items():
        name = name_of(process)
        if name == "?":
            # It has ended since.
            continue
        memory[name] = memory.get(name, 0.0) + mib
    return memory


def _put(port: int, place: str, path: Path, digest: str) -> str:
    """Upload a file; return what its validation has found.

    Raises:
        ServerFailed: It was refused; says why.
    """
    connection = http.client.HTTPConnection(
        "127.0.0.1", port, timeout=_WAIT_S, blocksize=_BLOCK_BYTES
    )
    headers = {"Content-Length": str(path.stat().st_size), "X-Checksum-Sha256": digest}
    try:
        with path.open("rb") as file:
            connection.request("PUT", f"{place}?file=zeros.onnx", file, headers)
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServerFailed(f"the upload broke off: {type(error).__name__}: {error}") from None
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.CREATED:
        raise ServerFailed(f"the upload is answered {answer.status}: {content[:300].decode()}")
    told = json.loads(content)
    said = "sound" if told["sound"] else told["problems"][0]["what"]
    return str(said)[:_SAID_MAX]


def _get(port: int, place: str, digest: str) -> str:
    """Read a file again; return its size in words.

    Raises:
        ServerFailed: It is refused, or is another one.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_WAIT_S)
    sha, size = hashlib.sha256(), 0
    try:
        connection.request("GET", f"{place}/content")
        answer = connection.getresponse()
        while block := answer.read(_BLOCK_BYTES):
            sha.update(block)
            size += len(block)
    except (OSError, http.client.HTTPException) as error:
        raise ServerFailed(f"the download broke off: {type(error).__name__}: {error}") from None
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK or sha.hexdigest() != digest:
        raise ServerFailed(f"{place} gives {answer.status} and {size:,} bytes that were not sent")
    return f"{size:,} bytes came back as they were"


def _sparse(mib: int) -> Path:
    """Make a file of zeros that takes no room on the disk."""
    path = CACHE / f"zeros-{mib}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(mib * 1024**2)
    return path


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
