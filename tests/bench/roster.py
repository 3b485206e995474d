"""Who takes part: every server, what it needs, how it is started and asked."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Final

from tests.bench import bodies
from tests.bench.bodies import Body
from tests.bench.models import Floats

CACHE: Final = Path(__file__).parents[2] / ".cache" / "bench"
MODELS_DIR: Final = CACHE / "models"
BKG: Final = "bkg"
BKG_MODULE: Final = "services.cli"
DOOR: Final = "door"
# Not a server: onnxruntime called in a loop.
IN_PROCESS: Final = "onnxruntime"

Make = Callable[[str, Floats], Body]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A server.

    Attributes:
        name: As it is called on the command line.
        title: As it is called in tables.
        module: What is started: a file of `peers`, or a module of bkg.
        needs: Requirements from PyPI, the first one names it; none: it runs in our environment.
        base: The interpreter that its environment is made from, where there is such a file; else,
            and unless given, ours.
        launcher: Module and arguments that start `module`, where the file does not do it itself.
        json: Makes a request with JSON tensors.
        binary: Makes one with raw tensors, where it takes them.
        env: Added to its environment; ``{port}`` is where it listens.
        answers: Whether its answers are those of the models.
        note: What a reader of its figures should know.
        default: Whether it takes part unless named.
    """

    name: str
    title: str
    module: str
    needs: tuple[str, ...] = ()
    base: str = ""
    launcher: tuple[str, ...] = ()
    json: Make = bodies.oip_json
    binary: Make | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    answers: bool = True
    note: str = ""
    default: bool = True

    @property
    def venv(self) -> Path:
        """Its virtual environment; both FastAPIs share one."""
        return CACHE / "venvs" / self.distribution

    @property
    def distribution(self) -> str:
        """The distribution that gives it its name."""
        return self.needs[0].partition(">=")[0].partition("[")[0] if self.needs else "bkg"

    @property
    def python(self) -> str:
        """The interpreter that runs it."""
        return str(self.venv / "bin" / "python") if self.needs else sys.executable

    def request(self, kind: str, model: str, array: Floats) -> Body | None:
        """Return a request with tensors of a kind, `json` or `binary`; None if it has no such."""
        make = self.json if kind == "json" else self.binary
        return make(model, array) if make else None


def _rows(model: str, array: Floats) -> Body:
    return bodies.rows(f"/{model}", array)


def _raw(model: str, array: Floats) -> Body:
    return bodies.raw(f"/{model}", array)


def _capability(model: str, array: Floats) -> Body:
    return bodies.rows("/api/capabilities/candle.model.run", array, id=model)


def _serve(name: str) -> str:
    return f"tests.bench.peers.serve_{name}"


_ORT: Final = ("onnxruntime>=1.22", "numpy>=1.26")
_WEB: Final = (
    "fastapi>=0.120", "uvicorn>=0.38", "orjson>=3.11", "uvloop>=0.21", "httptools>=0.6", *_ORT,
)  # fmt: skip

PEERS: Final[tuple[Peer, ...]] = (
    Peer(
        name=BKG,
        title="bkg",
        module=BKG_MODULE,
        binary=bodies.oip_binary,
        note="as `bkg up` starts it: broker, supervisor, gateway, one candle, one rustyface idle",
    ),
    Peer(
        name="bkg-capability",
        title="bkg, candle.model.run",
        module=BKG_MODULE,
        json=_capability,
        note="rows in JSON through the capability route, which takes no images",
        default=False,
    ),
    Peer(
        name="fastapi",
        title="FastAPI, well made",
        module=_serve("fastapi"),
        needs=_WEB,
        binary=bodies.oip_binary,
        note="one process, no batches; the convolutions in a thread, the rest on the loop",
    ),
    Peer(
        name="fastapi-naive",
        title="FastAPI, naive",
        module=_serve("fastapi_naive"),
        needs=_WEB,
        note="typed lists, a plain function",
    ),
    Peer(
        name="mosec",
        title="mosec",
        module=_serve("mosec"),
        needs=("mosec>=0.9.6", "msgspec>=0.20", *_ORT),
        json=_rows,
        binary=_raw,
        env={"MOSEC_PORT": "{port}", "MOSEC_ADDRESS": "127.0.0.1", "MOSEC_LOG_LEVEL": "warning"},
        note="door in Rust, its own body format, a process for each model",
    ),
    Peer(
        name="pytriton",
        title="PyTriton",
        module=_serve("pytriton"),
        needs=("nvidia-pytriton>=0.7", *_ORT),
        # Its wheel brings the core of a Python and takes the standard library from ours; with that
        # of 3.11.7 its workers die (no `_recursion_count`), with Debian's 3.11.2 they run.
        base="/usr/bin/python3.11",
        binary=bodies.oip_binary,
        note="server in C++",
    ),
    Peer(
        name="mlserver",
        title="MLServer",
        module=_serve("mlserver"),
        needs=("mlserver>=1.7", *_ORT),
        note="no raw tensors over HTTP",
    ),
    Peer(
        name="kserve",
        title="KServe",
        module=_serve("kserve"),
        needs=("kserve>=0.15", *_ORT),
        binary=bodies.oip_binary,
        note="no batches",
    ),
    Peer(
        name="litserve",
        title="LitServe",
        module=_serve("litserve"),
        needs=("litserve>=0.2.16", *_ORT),
        json=_rows,
        note="its own body format",
    ),
    Peer(
        name="bentoml",
        title="BentoML",
        module=_serve("bentoml"),
        needs=("bentoml>=1.4.25", *_ORT),
        launcher=("bentoml", "serve", "{module}:Models", "--host", "127.0.0.1", "--port", "{port}"),
        json=_rows,
        env={"BENTOML_DO_NOT_TRACK": "True"},
        note="its own body format",
    ),
    Peer(
        name="ray",
        title="Ray Serve",
        module=_serve("ray"),
        needs=("ray[serve]>=2.50", *_ORT),
        json=_rows,
        env={"RAY_USAGE_STATS_ENABLED": "0"},
        note="its own body format",
    ),
    Peer(
        name=DOOR,
        title="aiohttp, a constant",
        module=_serve("door"),
        binary=bodies.oip_binary,
        answers=False,
        note="the limit of the door",
    ),
)


def command(peer: Peer, *, port: int, data_dir: Path) -> list[str]:
    """Return what starts a peer."""
    if peer.module == BKG_MODULE:
        options = ["up", "--no-auth", "--port", str(port), "--data-dir", str(data_dir)]
        return [peer.python, "-m", peer.module, *options]
    if peer.launcher:
        filled = (part.format(module=peer.module, port=port) for part in peer.launcher)
        return [peer.python, "-m", *filled]
    return [peer.python, "-m", peer.module]


def install(peer: Peer) -> None:
    """Install a peer into an environment of its own, unless it is there as the table wants it.

    Raises:
        ValueError: It could not be installed; says why.
    """
    base = peer.base if peer.base and Path(peer.base).exists() else sys.executable
    wanted = "\n".join((base, *peer.needs))
    stamp = peer.venv / "installed"
    if not peer.needs or (stamp.exists() and stamp.read_text() == wanted):
        return
    for line in (
        [base, "-m", "venv", "--clear", str(peer.venv)],
        [peer.python, "-m", "pip", "install", "--quiet", *peer.needs],
    ):
        done = subprocess.run(line, check=False, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{peer.title} cannot be installed: {done.stderr.strip()[-500:]}")
    stamp.write_text(wanted)


def version(peer: Peer) -> str:
    """Return the version of the distribution that gives a peer its name."""
    if not peer.needs:
        return installed_version("aiohttp" if peer.name == DOOR else "bkg")
    asked = f"import importlib.metadata as m; print(m.version({peer.distribution!r}))"
    done = subprocess.run([peer.python, "-c", asked], check=True, capture_output=True, text=True)
    return done.stdout.strip()
