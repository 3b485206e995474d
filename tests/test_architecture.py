"""Who may import whom: the first arrow that runs the wrong way fails."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
WINGS = ("cli", "supervisor", "candle", "rustyface", "gateway")
# From the ground up; a room may use those below it.
FLOORS = (
    {"errors", "messages", "balance", "late"},
    {
        "codec",
        "job_rules",
        "masking",
        "subjects",
        "tasks",
        "settings",
        "process",
        "redaction",
        "wire",
    },
    {"answers", "log_search", "statistics", "followed", "jetstream", "connection"},
    {"consumers"},
    {"streams"},
    {"uploads", "assets", "log_stream"},
    {"objects"},
    {"artefacts", "bodies"},
    {"state", "relay"},
    {"hedging"},
    {"client", "plugins", "models", "broker", "reference"},
    {"logs", "telemetry", "metrics", "probes"},
    {"served", "registration"},
    {"serving"},
    {"discovery", "vitals", "live_config"},
    {"instance"},
    {"jobs"},
    {"testing"},
)
OUTSIDERS = {
    "nats": {"bus/client.py", "bus/connection.py", "bus/consumers.py", "bus/jetstream.py",
             "bus/state.py", "bus/streams.py"},
    "orjson": {"services/candle/serving/kserve.py",
               "services/rustyface/transfers/files/carried.py"},
    "pyarrow": {"services/rustyface/transfers/files/parquet_file.py"},
    "psutil": {
        "bus/telemetry.py", "bus/metrics.py", "services/supervisor/process.py", "services/cli",
    },
    "re2": {"bus/log_search.py"},
    "msgpack": {"bus/codec.py"},
    "onnx": {"services/candle/runtimes/onnx_file.py", "services/candle/models/make.py",
             "services/rustyface/photos/weights.py"},
    "onnxruntime": {"services/candle/runtimes/onnx.py", "services/rustyface/photos/weights.py"},
    "numpy": {"services/candle", "services/rustyface"},
    "cv2": {"services/rustyface"},
    "aiohttp": {"bus/probes.py", "services/gateway", "services/cli",
                "services/supervisor/health.py", "services/candle/fetching/downloads.py",
                "services/candle/fetching/exchange.py"},
    "huggingface_hub": {"services/candle/fetching/hub.py"},
    "prometheus_client": {"bus/metrics.py", "bus/probes.py"},
    "typer": {"services/cli"},
    "jsonschema": {"services/supervisor/config.py"},
    "referencing": {"services/supervisor/config.py"},
    "rich": {"services/cli"},
    "structlog": {"bus", "services"},
    "uvloop": {"bus/process.py"},
}  # fmt: skip
# These know no subject: they can be read, tested and timed alone.
DEAF = (
    "services/supervisor/reconcile.py",
    "services/candle/serving/batcher.py",
    "services/candle/serving/kserve.py",
    "services/candle/serving/tensors.py",
    "services/candle/serving/joining.py",
    "services/candle/serving/pace.py",
    "services/candle/runtimes",
    "services/rustyface/photos/exif.py",
    "services/rustyface/photos/formats.py",
    "services/rustyface/photos/images.py",
    "services/rustyface/photos/detection.py",
    "services/rustyface/photos/alignment.py",
    "services/rustyface/photos/embedding.py",
    "services/rustyface/photos/pipeline.py",
    "services/rustyface/galleries/search.py",
    "services/rustyface/galleries/candidates.py",
)


def files() -> list[str]:
    found = [*REPOSITORY.glob("bus/**/*.py"), *REPOSITORY.glob("services/**/*.py")]
    return sorted(str(path.relative_to(REPOSITORY)) for path in found)


def imports(file: str) -> Iterator[str]:
    """Give every module that a file imports, wherever in it, with the names taken from it."""
    for node in ast.walk(ast.parse((REPOSITORY / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(file: str) -> str:
    """Return which room of the bus a file is, or belongs to: a room may be a folder."""
    return Path(file).parts[1].removesuffix(".py")


def inside(file: str, places: set[str] | tuple[str, ...]) -> bool:
    return any(file == place or file.startswith(f"{place}/") for place in places)


@pytest.mark.parametrize("file", files())
def test_every_arrow_runs_the_right_way(file):
    for module in imports(file):
        parts = module.split(".")
        if file.startswith("bus/"):
            assert parts[0] != "services", f"the bus imports {module}"
        if parts[0] == "services" and len(parts) > 1 and parts[1] in WINGS:
            assert file.split("/")[1] == parts[1], f"one wing imports another: {module}"
        if places := OUTSIDERS.get(parts[0]):
            assert inside(file, places), f"{module} belongs into {', '.join(sorted(places))}"
        if inside(file, DEAF) and parts[0] == "bus":
            assert parts[1:2] in ([], ["errors"], ["codec"]), f"{module}: this file knows no bus"


@pytest.mark.parametrize("file", [f for f in files() if f.startswith("bus/")])
def test_the_rooms_of_the_bus_stand_on_those_below(file):
    room = room_of(file)
    if room == "__init__":
        return
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    below = set().union(*FLOORS[: floor + 1])
    used = {m.split(".")[1] for m in imports(file) if m.startswith("bus.")}
    assert used & set().union(*FLOORS) <= below


@pytest.mark.parametrize("room", ["photos", "galleries"])
def test_photos_and_galleries_know_neither_each_other_nor_who_uses_them(room):
    wing = "services/rustyface"
    for file in (file for file in files() if file.startswith(f"{wing}/{room}/")):
        own = [m for m in imports(file) if m.startswith("services.rustyface")]
        allowed = (f"services.rustyface.{room}", "services.rustyface.settings")
        rest = {m for m in own if m != "services.rustyface" and not m.startswith(allowed)}
        assert not rest, f"{file} imports {', '.join(sorted(rest))}"


def test_there_are_no_circles():
    known = {f.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): f for f in files()}
    uses = {
        module: {used for used in imports(file) if used in known and used != module}
        for module, file in known.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for used in uses[module]:
                visit(used, (*way, module))
            done.add(module)

    for module in uses:
        visit(module, ())


@pytest.mark.parametrize("wing", ["supervisor", "candle", "rustyface", "gateway"])
def test_a_service_is_put_together_in_a_few_lines(wing):
    lines = (REPOSITORY / "services" / wing / "__main__.py").read_text().splitlines()
    assert len(lines) <= 40


def test_nothing_stands_at_the_top_without_need():
    kept = {
        ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
        "bus", "deploy", "docs", "pyproject.toml", "services", "tests",
    }  # fmt: skip
    made = {".git", ".venv", ".cache", ".mypy_cache", ".ruff_cache", ".pytest_cache",
            ".hypothesis", "build", "dist", "bkg.egg-info"}  # fmt: skip
    assert {path.name for path in REPOSITORY.iterdir()} <= kept | made
