"""The commands of plugins over HTTP, answered as a supervisor answers them."""

from typing import Annotated

import msgspec
import pytest
import pytest_asyncio
from msgspec import Meta

from bus import codec
from bus.instance import join
from bus.testing import until
from services.supervisor.commands import answering

SECRET = "hunter2-never-to-be-shown"
CONFIG = {
    "name": "echo",
    "description": "Says it again.",
    "entrypoint": "tests.echo",
    "capabilities": ["echo.say"],
}
ASYNC = {"Prefer": "wait=5, respond-async"}


class Wanted(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5
    mode: str = "fast"
    password: Annotated[str, Meta(extra_json_schema={"format": "password"})] | None = None


@pytest_asyncio.fixture
async def supervisor(client, settings, gate):
    """The commands of a real supervisor, and nobody who starts or stops processes."""
    async with (
        join(client, settings, plugin="supervisor", description="a test", listed=False) as instance,
        answering(client, instance, gate.parts.view),
    ):
        yield instance


@pytest_asyncio.fixture
async def echo(client, settings, gate, wanted, supervisor):
    """An instance of the plugin `echo` that takes `threshold` live."""
    await wanted(enabled=True, settings={"password": SECRET})
    async with join(
        client, settings, plugin="echo", description="a test", config_schema=codec.schema(Wanted)
    ) as instance:
        instance.on_config(["threshold"], lambda: None)
        await instance.ready()
        await until(lambda: (s := gate.parts.view.get("echo")) and s.status == "running")
        yield instance


async def revision(gate) -> int:
    return (await gate.json("/api/plugins/echo"))["revision"]


def with_settings(**settings: object) -> dict[str, object]:
    return {**CONFIG, "settings": settings}


async def test_the_etag_of_a_plugin_is_its_revision(gate, wanted):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    async with gate.http.get("/api/plugins/echo") as response:
        state = await response.json()
        assert response.headers["ETag"] == f'"{state["revision"]}"'


@pytest.mark.parametrize(
    ("path", "body"),
    [("config", CONFIG), ("scale", {"replicas": 2}), ("rollback", {"revision": 1})],
)
async def test_if_match_with_an_old_revision_is_409_and_names_the_present_one(
    gate, echo, path, body
):
    present = await revision(gate)
    if path == "rollback":
        body = {"revision": present}
    problem = await gate.post(
        f"/api/plugins/echo/{path}", body, status=409, headers={"If-Match": '"999999"'}
    )
    assert problem["revision"] == present
    assert await revision(gate) == present


async def test_if_match_with_the_present_revision_holds(gate, echo):
    tag = f'"{await revision(gate)}"'
    state = await gate.post(
        "/api/plugins/echo/config", with_settings(threshold=0.7, password="********"),
        headers={"If-Match": tag},
    )  # fmt: skip
    assert state["config"]["settings"] == {"threshold": 0.7, "password": "********"}
    assert echo.config.settings["password"] == SECRET
    await gate.post("/api/plugins/echo/scale", {"replicas": 2}, 409, headers={"If-Match": tag})


async def test_scale_changes_the_number_of_replicas(gate, echo):
    generation = (await gate.json("/api/plugins/echo"))["generation"]
    state = await gate.post("/api/plugins/echo/scale", {"replicas": 1})
    assert state["replicas"] == {"desired": 1, "ready": 1}
    problem = await gate.post("/api/plugins/echo/scale?timeout=0.5", {"replicas": 2}, status=504)
    assert "replica 1 is not there yet" in problem["detail"]
    state = await gate.json("/api/plugins/echo")
    assert (state["replicas"]["desired"], state["generation"]) == (2, generation)


@pytest.mark.parametrize("replicas", [-1, 101, "many", None, 1.5])
async def test_scale_to_what_is_no_number_from_0_to_100_is_400(gate, echo, replicas):
    problem = await gate.post("/api/plugins/echo/scale", {"replicas": replicas}, status=400)
    assert problem["field"] == "replicas"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("restart", None),
        ("stop", None),
        ("scale", {"replicas": 5}),
        ("config", with_settings(mode="exact")),
    ],
)
async def test_a_caller_that_prefers_not_to_wait_gets_202_and_the_state(gate, echo, path, body):
    present = await revision(gate)
    async with gate.http.post(f"/api/plugins/echo/{path}", json=body, headers=ASYNC) as response:
        assert response.status == 202
        assert response.headers["Preference-Applied"] == "respond-async"
        state = await response.json()
    assert state["name"] == "echo"
    assert state["revision"] > present


async def test_start_and_rollback_need_not_be_waited_for_either(gate, wanted, supervisor):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    first = await revision(gate)
    state = await gate.post("/api/plugins/echo/start", status=202, headers=ASYNC)
    assert state["replicas"] == {"desired": 1, "ready": 0}
    await gate.post("/api/plugins/echo/config", {**CONFIG, "args": ["-v"]}, 202, headers=ASYNC)
    state = await gate.post(
        "/api/plugins/echo/rollback", {"revision": first}, status=202, headers=ASYNC
    )
    assert "args" not in state["config"]


async def test_a_check_answers_what_would_change_and_stores_nothing(gate, echo):
    present = await revision(gate)
    path = "/api/plugins/echo/config?check=1"
    assert await gate.post(path, with_settings(threshold=0.7, password="********")) == {
        "valid": True,
        "errors": [],
        "changes": [{"field": "settings.threshold", "after": 0.7}],
        "restarts": False,
    }
    found = await gate.post(path, with_settings(mode="exact", password="other"))
    assert found["restarts"]
    assert found["changes"] == [
        {"field": "settings.mode", "after": "exact"},
        {"field": "settings.password", "before": "********", "after": "********"},
    ]
    wrong = await gate.post(path, with_settings(threshold=2, moed=1, password="********"))
    assert (wrong["valid"], [one["field"] for one in wrong["errors"]]) == (
        False,
        ["settings.moed", "settings.threshold"],
    )
    # What is no configuration at all is told in the same form, if a field can be named.
    wrong = await gate.post(path, {**CONFIG, "replicas": -1})
    assert (wrong["valid"], wrong["errors"][0]["field"]) == (False, "replicas")
    assert (await gate.post(path, {**CONFIG, "name": "other"}))["errors"][0]["field"] == "name"
    await gate.post(path, b"{", status=400)
    await gate.post("/api/plugins/echo/config?check=maybe", CONFIG, status=400)
    assert await revision(gate) == present


async def test_a_configuration_that_is_not_allowed_is_400_with_all_errors(gate, echo):
    problem = await gate.post(
        "/api/plugins/echo/config", with_settings(threshold=2, moed=1), status=400
    )
    assert problem["field"] == "settings.moed"
    assert problem["reasons"] == [
        "settings has no 'moed'; did you mean 'mode'?",
        "settings.threshold is 2; allowed is a number from 0 to 1",
    ]


async def test_history_and_rollback(gate, echo):
    first = await revision(gate)
    await gate.post("/api/plugins/echo/config", with_settings(threshold=0.7, password="********"))
    found = await gate.json("/api/plugins/echo/history")
    assert [one["changedBy"] for one in found] == ["admin", "test"]
    assert found[0]["changes"] == [{"field": "settings.threshold", "after": 0.7}]
    assert [one["revision"] for one in found] == [await revision(gate), first]
    assert len(await gate.json("/api/plugins/echo/history", limit=1)) == 1
    state = await gate.post("/api/plugins/echo/rollback", {"revision": first})
    assert state["config"]["settings"] == {"password": "********"}
    assert state["revision"] > found[0]["revision"]
    assert echo.config.settings == {"password": SECRET}
    problem = await gate.post("/api/plugins/echo/rollback", {"revision": 999_999}, status=404)
    assert "kept are" in problem["detail"]
    for limit in ("0", "65", "many", "-1"):
        await gate.json("/api/plugins/echo/history", status=400, limit=limit)
    await gate.json("/api/plugins/nobody/history", status=404)


async def test_changing_needs_the_key(gate, echo):
    for path in ("scale", "rollback", "config"):
        async with gate.anonymous.post(f"/api/plugins/echo/{path}", json={}) as response:
            assert response.status == 401


async def test_a_secret_is_in_no_answer(gate, echo, client):
    new = with_settings(password=f"{SECRET}-2")
    for path, body, status in (
        ("/api/plugins/echo/config?check=1", new, 200),
        ("/api/plugins/echo/config", with_settings(password=[SECRET]), 400),
        ("/api/plugins/echo/config", new, 202),
    ):
        async with gate.http.post(path, json=body, headers=ASYNC) as response:
            assert response.status == status
            assert SECRET not in await response.text()
    for path in ("/api/plugins", "/api/plugins/echo", "/api/plugins/echo/history", "/health"):
        async with gate.http.get(path) as response:
            assert SECRET not in await response.text()
    async with gate.http.ws_connect("/ws/plugins") as socket:
        await socket.send_json({"action": "SUB", "topic": "status"})
        for _ in range(2):
            assert SECRET not in (await socket.receive()).data
    assert SECRET.encode() not in codec.encode(await client.store.events(limit=100))
    assert SECRET.encode() not in codec.encode(await client.store.logs(None, limit=1_000))
