"""`bkg models` on a real broker with a real candle worker: the repository from a terminal."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from bus.client import Client, connect
from bus.instance import join
from bus.messages import DesiredState, LoadModel, ModelSpec, PluginConfig, now
from bus.settings import Settings
from bus.subjects import MODEL_INFER, MODEL_LOAD
from bus.testing import until
from services.candle.intake import taking_in
from services.candle.models import make
from services.candle.models.shipped import shipped
from services.candle.repository.cache import Cache
from services.candle.repository.repository import Repository
from services.candle.service import Candle
from services.candle.settings import CandleSettings
from services.cli import transfers
from services.gateway.app import Options, gateway
from tests.cli.terminal import BKG, shown_at_terminal, typed_at_terminal

IRIS = Path(make.__file__).parent / "iris.onnx"
DIGEST = hashlib.sha256(IRIS.read_bytes()).hexdigest()


@pytest.fixture
def ours(env: dict[str, str], root: str, settings: Settings, tmp_path: Path) -> dict[str, str]:
    """The environment that leads the commands to the broker of this test."""
    env.update(
        BKG_ROOT=root,
        BKG_NATS_URL=settings.nats_url,
        XDG_CACHE_HOME=str(tmp_path / "user-cache"),
    )
    return env


@pytest.fixture
def models(bkg: Any, ours: dict[str, str]) -> Callable[..., Awaitable[Any]]:
    """Run `bkg models ...` to its end."""

    async def run(*args: str) -> Any:
        return await bkg("models", *args)

    return run


@pytest.fixture
def done(models: Any) -> Callable[..., Awaitable[Any]]:
    """Run `bkg models ...`, which has to go well."""

    async def run(*args: str) -> Any:
        ended = await models(*args)
        assert ended.status == 0, ended.err
        return ended

    return run


@pytest.fixture
def linear(tmp_path: Path) -> Callable[..., Path]:
    """Write a linear model, sound unless changed, and return its file."""

    def write(**changes: object) -> Path:
        content = {"input_dim": 2, "output_dim": 1, "weights": [1, 1], "bias": [0], **changes}
        path = tmp_path / "linear.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest_asyncio.fixture
async def candle(client: Client, settings: Settings, tmp_path: Path) -> AsyncIterator[Candle]:
    """A worker in the test's own process, with the samples in its models folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    make.make(folder)
    config = PluginConfig(
        name="candle",
        description="a test",
        entrypoint="services.candle",
        capabilities=[],
        settings={"import_allow": ["127.0.0.0/8"], "watch_folder": False},
    )
    wanted = DesiredState(
        config=config, enabled=True, generation=1, changed_by="test", changed_at=now()
    )
    await client.store.desired.put(wanted, "candle")
    async with (
        connect(settings.nats_url, name="candle", root=settings.root) as own,
        join(own, settings, plugin="candle", description="a test") as instance,
    ):
        repository = Repository(own.store, folder, Cache(tmp_path / "artefacts", 1 << 30))
        worker = Candle(instance, repository, CandleSettings(), own.store.served)
        parts = tmp_path / "cache"
        serving = asyncio.create_task(worker.run())
        await until(lambda: instance._registration.status == "running" or serving.done(), 30)
        try:
            async with taking_in(own, instance, repository, parts, folder):
                yield worker
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


@pytest_asyncio.fixture
async def iris(client: Client, candle: Candle) -> ModelSpec:
    """The iris model, loaded."""
    await client.call(MODEL_LOAD, LoadModel(id="iris", path="iris.onnx"), timeout_s=30)

    async def served() -> ModelSpec | None:
        told = await client.store.served.all()
        ready = [one for entry in told for one in (entry.value.models if entry.value else [])]
        entry = await client.store.models.get("iris")
        return entry.value if entry and any(one.state == "ready" for one in ready) else None

    await until(served, 30)
    found = await served()
    assert found
    return found


async def test_models_are_listed_shown_and_told_where_they_are_loaded(
    done: Any, iris: ModelSpec, ours: dict[str, str]
):
    listed = (await done("list")).out.splitlines()
    assert listed[0].split()[:4] == ["model", "default", "state", "versions"]
    assert listed[1].split()[:4] == ["iris", "1", "ready", "1"]
    assert [one["id"] for one in (await done("list", "--json")).json] == ["iris"]
    assert (await done("list", "--label", "team=vision", "--json")).json == []

    shown = (await done("show", "iris")).out
    assert "flower FP32 [-1, 4]" in shown
    assert "default -> 1" in shown
    assert DIGEST[:16] in shown
    told = (await done("show", "iris:1", "--json")).json
    assert told["version"]["checksum"] == DIGEST
    assert told["served"][0]["models"][0]["state"] == "ready"

    loaded = (await done("ps")).out
    assert "candle/0 on test-host" in loaded
    assert "room" in loaded
    assert "in use" in loaded
    [instance] = (await done("ps", "--json")).json
    assert instance["models"][0]["memory_bytes"] > 0


async def test_a_model_is_loaded_aliased_and_unloaded(done: Any, models: Any, candle: Candle):
    await done("load", "iris", "--path", "iris.onnx", "--set", "pinned=true")
    again = await done("load", "iris", "--json")
    assert (again.json["version"], again.json["config"]["pinned"]) == ("1", True)
    assert "champion -> 1" in (await done("alias", "iris:1", "champion")).out
    assert "no aliases" in (await done("alias", "iris", "champion", "--remove")).out
    assert "served no longer" in (await done("unload", "iris")).out
    assert "served nowhere" in (await done("ps")).out
    ended = await models("load", "rose")
    assert ended.status == 1
    assert "there is no model 'rose'" in ended.err
    ended = await models("load", "iris", "--set", "thread=2")
    assert ended.status == 1
    assert "thread" in ended.err


async def test_an_artefact_is_pulled_whole_or_not_at_all(
    client: Client, done: Any, models: Any, iris: ModelSpec, tmp_path: Path
):
    target = tmp_path / "out" / "got.onnx"
    target.parent.mkdir()
    said = (await done("pull", "iris:1", "-o", str(target))).out
    assert f"sha256 {DIGEST}" in said
    assert target.read_bytes() == IRIS.read_bytes()

    ended = await models("pull", "iris", "-o", str(target))
    assert ended.status == 2
    assert "--force" in ended.err
    target.write_bytes(b"old")
    await done("pull", "iris", "-o", str(target), "--force")
    assert target.read_bytes() == IRIS.read_bytes()
    told = (await done("pull", "iris", "-o", str(tmp_path / "out"), "--json", "--force")).json
    assert (told["path"], told["checksum"]) == (str(tmp_path / "out" / "iris.onnx"), DIGEST)

    await client.store.artefacts.delete(DIGEST)
    ended = await models("pull", "iris", "-o", str(target), "--force")
    assert ended.status == 1
    assert "not stored any more" in ended.err
    assert target.read_bytes() == IRIS.read_bytes()
    assert sorted(path.name for path in target.parent.iterdir()) == ["got.onnx", "iris.onnx"]


async def test_an_artefact_is_pulled_to_stdout(ours: dict[str, str], iris: ModelSpec):
    process = await asyncio.create_subprocess_exec(
        *BKG, "models", "pull", "iris", "-o", "-",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ours,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, err) == (0, b"")
    assert out == IRIS.read_bytes()


async def test_the_examples_that_are_shown_work(
    client: Client, settings: Settings, done: Any, iris: ModelSpec, tmp_path: Path
):
    from services.cli.examples import examples_of  # noqa: PLC0415

    key = tmp_path / "a key"
    key.write_text("the-key\n")
    async with (
        join(client, settings, plugin="gateway", description="A test.", listed=False) as instance,
        gateway(client, instance, Options(port=0), "the-key") as parts,
    ):
        url = f"http://127.0.0.1:{parts.port}"
        told = examples_of("iris", iris.versions[0], url=url, key_file=key, root=client.root)

        async def run(*command: str) -> Any:
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            answer, _ = await asyncio.wait_for(process.communicate(), 60)
            return answer.decode()

        assert "probabilities" in await run(sys.executable, "-c", told.python)
        if shutil.which("curl"):
            assert "probabilities" in await run("bash", "-c", told.curl)
    subject, body = told.nats.removeprefix("nats req ").split(" \\\n  ")
    assert subject == MODEL_INFER.subject(client.root, "iris", "1")
    answer = await client.relay(subject, body.strip("'").encode(), timeout_s=30)
    assert b"probabilities" in answer.body


async def test_what_ships_with_the_plugins_is_shown_with_its_licence(
    client: Client, settings: Settings, done: Any
):
    meta = {"ships": [{**one, "plugin": "candle"} for one in _plain(shipped())]}
    async with join(client, settings, plugin="candle", description="a test", meta=meta):
        listed = (await done("shipped")).out
        told = (await done("shipped", "--json")).json
    assert "Apache-2.0" in listed
    assert {one["name"] for one in told} == {"iris.onnx", "linear-demo.json"}


async def test_a_pushed_file_is_a_version_with_its_report_and_serves(
    client: Client, done: Any, models: Any, candle: Candle, linear: Callable[..., Path]
):
    more = ["--licence", "MIT", "--label", "team=vision", "--description", "Iris species"]
    said = await done("push", str(IRIS), "iris", *more, "--load")
    assert f"iris:1 is in the repository, sha256 {DIGEST}" in said.out
    assert "sound" in said.out
    assert "flower FP32 [-1, 4]" in said.out
    assert "iris:1 is served" in said.out
    assert "pushing iris.onnx: " in said.err
    entry = await client.store.models.get("iris")
    assert entry
    assert entry.value
    assert (entry.value.licence, entry.value.labels) == ("MIT", {"team": "vision"})
    assert (entry.value.versions[0].sound, entry.value.versions[0].wanted) == (True, True)

    # The same bytes again are the same version, and are not sent.
    again = await done("push", str(IRIS), "iris:1", "--json")
    assert (again.json["created"], again.err) == (False, "")
    ended = await models("push", str(linear()), "iris:1")
    assert ended.status == 1
    assert "1" in ended.err
    assert (await done("list", "--label", "team=vision", "--json")).json[0]["id"] == "iris"


async def test_what_is_not_sound_is_kept_told_of_and_not_loaded(
    models: Any, candle: Candle, linear: Callable[..., Path]
):
    ended = await models("push", str(linear(weights=[1])), "broken", "--load")
    assert ended.status == 1
    assert "not sound: " in ended.out
    assert "is served" not in ended.out
    assert "unsound" in (await models("list")).out
    ended = await models("load", "broken:1")
    assert ended.status == 1
    assert "weights" in ended.err
    told = await models("validate", "broken:1", "--json")
    assert (told.status, told.json["sound"]) == (1, False)


async def test_a_version_is_validated_again_with_a_sample(
    models: Any, done: Any, iris: ModelSpec, tmp_path: Path
):
    sample = tmp_path / "sample.json"
    tensor = {"name": "flower", "datatype": "FP32", "shape": [2, 4], "data": [1.0] * 8}
    sample.write_text(json.dumps({"inputs": [tensor]}))
    told = (await done("validate", "iris", "--sample", str(sample), "--json")).json
    assert (told["sound"], told["checksum"]) == (True, DIGEST)
    sample.write_text("{")
    ended = await models("validate", "iris", "--sample", str(sample))
    assert ended.status == 1
    assert "is not JSON" in ended.err


async def test_a_description_changes_and_the_rest_stays(done: Any, iris: ModelSpec):
    await done("describe", "iris", "--licence", "MIT")
    told = (await done("describe", "iris", "--description", "Flowers", "--json")).json
    assert (told["description"], told["licence"]) == ("Flowers", "MIT")
    assert "Flowers" in (await done("show", "iris")).out


async def test_a_model_is_removed_only_when_nothing_uses_it_or_by_force(
    client: Client, done: Any, models: Any, iris: ModelSpec
):
    planned = await done("rm", "iris:1", "--dry-run")
    assert f"artefact {DIGEST}" in planned.out
    assert "used: " in planned.out
    assert (await done("rm", "iris", "--dry-run", "--json")).json["dry_run"] is True
    ended = await models("rm", "iris", "--yes")
    assert ended.status == 1
    assert "nothing was removed, --force" in ended.err
    assert await client.store.models.get("iris")
    assert "are free again" in (await done("rm", "iris", "--yes", "--force")).out
    assert (await done("list", "--json")).json == []
    assert await client.store.artefacts.size(DIGEST) is None


@pytest.mark.parametrize(("answer", "status", "left"), [("n", 1, 1), ("y", 0, 0)])
async def test_removal_is_asked_for_at_a_terminal(
    done: Any, candle: Candle, ours: dict[str, str], answer: str, status: int, left: int
):
    await done("push", str(IRIS), "iris")
    ended, err = await typed_at_terminal(ours, "models", "rm", "iris", typed=f"{answer}\n")
    assert ended == status, err
    assert "Remove it?" in err
    assert len((await done("list", "--json")).json) == left


async def test_what_nobody_needs_is_collected_and_what_is_young_stays(
    client: Client, done: Any, candle: Candle
):
    async with client.store.artefacts.writing() as upload:
        await upload.write(b"nobody's")
        await upload.commit()
    assert "0 bytes would be free again" in (await done("gc", "--dry-run")).out
    assert (await done("gc", "--json")).json["artefacts"] == []


async def test_a_model_is_imported_and_its_job_followed(
    done: Any, models: Any, bkg: Any, candle: Candle
):
    async def file(request: web.Request) -> web.StreamResponse:
        if request.path == "/absent.onnx":
            return web.Response(status=404)
        return web.FileResponse(IRIS)

    runner = web.ServerRunner(web.Server(file))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        said = await done("import", f"{address}/iris.onnx", "--load", "--sha256", DIGEST)
        assert f"iris:1 is in the repository, sha256 {DIGEST}" in said.out
        assert "iris: " in said.err
        assert "iris:1" in (await done("ps")).out

        detached = (await done("import", f"{address}/absent.onnx", "lost", "--detach")).out
        job = detached.split()[1]
        ended = await bkg("jobs", "watch", job)
        assert ended.status == 1
        assert "404" in ended.out
        ended = await bkg("jobs", "retry", job)
        assert ended.status == 0, ended.err
        assert (await bkg("jobs", "cancel", job)).status == 0
        assert (await bkg("jobs", "show", job, "--json")).json["state"] in {"cancelled", "failed"}
    finally:
        await runner.cleanup()


async def test_a_file_here_is_validated_without_a_platform(
    bkg: Any, tmp_path: Path, linear: Callable[..., Path]
):
    told = await bkg("models", "validate", str(IRIS))
    assert told.status == 0, told.err
    assert "flower FP32 [-1, 4]" in told.out
    told = await bkg("models", "validate", str(linear(weights=[1])), "--json")
    assert (told.status, told.json["sound"]) == (1, False)
    assert told.json["problems"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
async def test_a_push_that_was_broken_off_goes_on_where_it_was(
    client: Client, ours: dict[str, str], tmp_path: Path, how: signal.Signals
):
    file = tmp_path / "large.onnx"
    file.write_bytes(os.urandom(192 << 20))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    process = await asyncio.create_subprocess_exec(
        *BKG, "models", "push", str(file), "large", env=ours, stderr=subprocess.PIPE
    )

    async def begun() -> bool:
        return any(one.bytes for one in await client.store.artefacts.unfinished())

    await until(begun, 60)
    process.send_signal(how)
    _, err = await asyncio.wait_for(process.communicate(), 60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert b"give the same command to go on" in err
    [left] = await client.store.artefacts.unfinished()
    assert 0 < left.bytes < file.stat().st_size

    ended = await asyncio.create_subprocess_exec(
        *BKG, "models", "push", str(file), "large", env=ours, stderr=subprocess.PIPE
    )
    _, err = await asyncio.wait_for(ended.communicate(), 100)
    assert b"going on behind" in err
    # No worker is here to add it; the bytes have come, once.
    assert ended.returncode == 3
    assert await client.store.artefacts.size(digest) == file.stat().st_size
    assert await client.store.artefacts.unfinished() == []
    assert list((tmp_path / "user-cache" / "bkg" / "uploads").iterdir()) == []


async def test_a_terminal_gets_a_bar_with_bytes_and_rate(
    client: Client, ours: dict[str, str], iris: ModelSpec, tmp_path: Path
):
    shown = await shown_at_terminal(
        ours, "models", "pull", "iris", "-o", str(tmp_path / "got.onnx")
    )
    assert "pulling iris:1" in shown
    assert "760/760 bytes" in shown


async def test_two_pushes_of_one_file_do_not_share_an_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with transfers._remembered("a file") as first:
        first.write("the-upload")
        with transfers._remembered("a file") as second:
            second.write("another")
            assert second.upload == ""
    with transfers._remembered("a file") as again:
        assert again.upload == "the-upload"
        again.forget()
    with transfers._remembered("a file") as fresh:
        assert fresh.upload == ""


@pytest.mark.parametrize(("args", "said"), [
    (["push", "absent.onnx"], "absent.onnx is not there"),
    (["push", str(IRIS), "iris:1", "--version", "2"], "two versions"),
    (["push", str(IRIS), "iris", "--label", "vision"], "is no KEY=VALUE"),
    (["pull", ":2"], "names no model"),
    (["alias", "iris", "champion"], "a version is missing"),
    (["alias", "iris:2", "champion", "--remove"], "--remove takes a model without a version"),
    (["describe", "iris"], "nothing to change"),
    (["validate", "./absent.onnx"], "is no file here"),
    (["rm", "iris"], "--yes"),
    (["import", "https://example.org/model.onnx"], "suggests no name"),
    (["import", "./iris.onnx", "--detach"], "--detach is for what is fetched"),
    (["load", "iris", "--set", "pinned"], "is not NAME=VALUE"),
])  # fmt: skip
async def test_wrong_usage_is_told_in_a_sentence(models: Any, args: list[str], said: str):
    ended = await models(*args)
    assert ended.status == 2, ended.err
    assert said in " ".join(ended.err.replace("│", " ").split())


async def test_every_command_has_an_example_in_its_help(bkg: Any):
    for app in ("models", "jobs"):
        listed = (await bkg(app, "--help")).out.split("Commands", 1)[1]
        names = [line.split()[1] for line in listed.splitlines() if line[2:3].isalpha()]
        assert len(names) >= 5
        for name in names:
            ended = await bkg(app, name, "--help")
            assert f"Example: bkg {app} {name}" in ended.out
            assert "--json" in ended.out


def _plain(models: Any) -> Any:
    from bus import codec  # noqa: PLC0415

    return codec.plain(models)
