"""Why a model does not answer, and what the caller can do about it."""

from typing import Any, Final
from urllib.parse import quote

from bus.errors import NEVER, BusError, NotFound, Unavailable
from bus.messages import ModelSpec, ModelVersion, ServedModel, ServedModels, WakeModel
from bus.models import DEFAULT, version_of
from bus.subjects import MODEL_WAKE
from services.gateway.parts import Parts

WAKE_S: Final = 2.0


def wanted_version(at: Parts, model: str, name: str | None) -> tuple[ModelSpec, ModelVersion]:
    """Return a model and the version that a name stands for, loaded or not.

    Raises:
        NotFound: There is no such model or version; says which there are.
    """
    spec = at.models.spec(model)
    if spec is None or not spec.versions:
        known = ", ".join(one.id for one in at.models.specs()[:20]) or "none"
        raise NotFound(
            f"there is no model {model[:100]!r}, loaded or not; there are: {known}", field="model"
        )
    version = version_of(spec, name)
    if version is None:
        known = ", ".join(one.version for one in spec.versions)
        raise NotFound(
            f"model {model!r} has no version {(name or DEFAULT)[:100]!r}; it has: {known}",
            field="version",
        )
    return spec, version


async def why_nobody(at: Parts, model: str, name: str | None = None) -> BusError:
    """Return why nobody answers for a model; one that left memory is called back."""
    try:
        _, version = wanted_version(at, model, name)
    except NotFound as error:
        return error
    if not version.wanted:
        return NotFound(
            f"model {model!r} version {version.version!r} is in the repository, but not loaded; "
            f"POST /v2/repository/models/{quote(model, safe='')}/load loads it",
            field="model",
        )
    for instance, one in at.models.served(model, version.version):
        if one.state == "cold":
            one = await _woken(at, model, name) or one  # noqa: PLW2901 - the same, a little later
        return _not_ready(instance, one)
    what = f"model {model!r} version {version.version!r}"
    if hosts := [instance.host for instance in at.models.instances()]:
        details = {"state": "queued", "host": hosts[0]}
        return Unavailable(f"{what} is about to be loaded", retry_after_s=1, details=details)
    return Unavailable(
        f"{what} should be served, but no instance of candle is there to do it", retry_after_s=5
    )


async def _woken(at: Parts, model: str, name: str | None) -> ServedModel | None:
    try:
        ask = WakeModel(id=model, version=name)
        return await at.client.call(MODEL_WAKE, ask, timeout_s=WAKE_S)
    except BusError:
        return None


def _not_ready(instance: ServedModels, one: ServedModel) -> Unavailable:
    details: dict[str, Any] = {"state": one.state, "host": instance.host}
    if one.progress is not None:
        details["progress"] = one.progress
    what = f"model {one.id!r} version {one.version!r}"
    again_s: float
    match one.state:
        case "ready":
            # The last that it said of itself.
            details["state"] = "unreachable"
            said, again_s = f"{what} was loaded on {instance.host}, which does not answer", 1
        case "failed":
            said = f"{what} failed on {instance.host}: {one.reason}; load it again"
            again_s = NEVER
        case "cold":
            said, again_s = f"{what} is cold on {instance.host}: {one.reason}", 30
        case "leaving":
            said, again_s = f"{what} is leaving {instance.host}", 1
        case _:
            share = "" if one.progress is None else f", {one.progress:.0%} of it is there"
            why = "" if one.reason is None else f": {one.reason}"
            said = f"{what} is being loaded on {instance.host} ({one.state}{share}){why}"
            again_s = 1
    return Unavailable(said, retry_after_s=again_s, details=details)
