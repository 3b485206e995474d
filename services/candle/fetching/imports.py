"""What an import does: fetch, store, validate and enter, and load where that is wanted."""

import asyncio
import base64
import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
from yarl import URL

from bus import messages as m
from bus.errors import BusError, InvalidRequest, Unprocessable
from bus.job_rules import Progress
from bus.jobs import KeptError, Told
from services.candle.fetching import hub
from services.candle.fetching.downloads import Downloads, Fetched, Limits, Wanted
from services.candle.fetching.outside import Rules, name_in, parsed, rules_from, shown, trusted
from services.candle.repository.repository import Repository
from services.candle.runtimes import FORMATS
from services.candle.settings import MIB, CandleSettings

Load = Callable[[m.LoadModel], Awaitable[object]]


class Imports:
    """Brings models from elsewhere into the repository.

    Args:
        folder: Where partial files lie.
        repository: Where they go.
        settings: The plugin's settings, as they are now.
        load: Has a version served, and returns when it is.
    """

    kind: Final = "import"

    def __init__(
        self,
        folder: Path,
        repository: Repository,
        settings: Callable[[], CandleSettings],
        load: Load,
    ) -> None:
        self._folder = folder
        self._repository = repository
        self._settings = settings
        self._load = load

    def check(self) -> None:
        """Look at the settings.

        Raises:
            InvalidRequest: One of them cannot be meant; names it.
        """
        settings = self._settings()
        rules_of(settings)
        if settings.import_ca_file is not None:
            trusted(settings.import_ca_file)

    def checked(self, request: m.ImportModel) -> tuple[m.ImportModel, str | None]:
        """Return a request without the password in its address, and that.

        Raises:
            NotAllowed: The address may not be asked.
            InvalidRequest: It is none.
            Unprocessable: It is one of the hub, and the package for that is missing.
        """
        settings = self._settings()
        if hub.is_hub(request.url):
            rules_of(settings).check_url(hub.on_the_hub(request.url, settings.hf_token).url)
            return msgspec.structs.replace(request, url=request.url.strip()), None
        url, secret = parsed(request.url)
        rules_of(settings).check_url(url)
        return msgspec.structs.replace(request, url=str(url)), secret

    async def carry(self, job: m.Job, secret: str | None, told: Told) -> m.AddedModel:
        """Do an import, going on from what an earlier try on this host has left.

        Raises:
            KeptError: It came, but is no sound model or cannot be loaded.
            BusError: It did not come, or could not be stored or loaded.
        """
        request, settings = job.request, self._settings()
        if request is None:
            raise InvalidRequest(f"job {job.job!r} does not say what to import", field="request")

        def fetching(progress: Progress) -> None:
            told("fetching", progress)

        downloads = self._downloads(settings)
        fetched = await downloads.fetch(
            job.job, wanted(request, secret, settings), limits_of(settings), fetching
        )
        told("storing", None)
        await self._repository.store.artefacts.put(fetched.checksum, fetched.path)
        told("validating", None)
        added = await self._repository.enter(_as_added(request, fetched))
        if not added.report.sound:
            await asyncio.to_thread(downloads.discard, job.job)
            problem = added.report.problems[0].what if added.report.problems else "it cannot be run"
            why = Unprocessable(
                f"{fetched.file_name} came, and is no sound model: {problem}; it is kept as "
                f"version {added.version}"
            )
            raise KeptError(why, added)
        if request.load:
            told("loading", None)
            try:
                await self._load(m.LoadModel(id=added.id, version=added.version))
            except BusError as error:
                raise KeptError(_for_good(error), added) from None
        await asyncio.to_thread(downloads.discard, job.job)
        return added

    async def closed(self, job: m.Job) -> None:
        """Leave what has come: another try goes on from it, and `tidy` removes it after a day."""

    async def tidy(self, live: set[str]) -> None:
        """Remove partial files that nobody has touched for a day, but for those of live jobs."""
        await asyncio.to_thread(self._downloads(self._settings()).tidy, live)

    def _downloads(self, settings: CandleSettings) -> Downloads:
        rules = rules_of(settings)
        return Downloads(
            self._folder,
            rules,
            ca_file=settings.import_ca_file,
            check_room=self._repository.store.artefacts.check_room,
        )


def rules_of(settings: CandleSettings) -> Rules:
    """Return who may be asked, by the settings."""
    return rules_from(
        settings.import_allow,
        settings.import_deny,
        settings.import_only,
        offline=settings.import_offline,
    )


def limits_of(settings: CandleSettings) -> Limits:
    """Return what a download may take, by the settings."""
    return Limits(
        max_bytes=settings.import_max_mb * MIB,
        total_s=settings.import_timeout_s,
        stall_s=settings.import_stall_s,
        suffixes=tuple(FORMATS),
    )


def wanted(request: m.ImportModel, secret: str | None, settings: CandleSettings) -> Wanted:
    """Return what is to be fetched for a request, and what to show for it."""
    if hub.is_hub(request.url):
        found = hub.on_the_hub(request.url, settings.hf_token)
    else:
        url = URL(request.url)
        found = Wanted(url=url, headers=authorization(url, secret, settings.import_credentials))
    return dataclasses.replace(found, sha256=request.sha256)


def authorization(
    url: URL, secret: str | None, credentials: Mapping[str, str]
) -> Mapping[str, str]:
    """Return the header that shows a host what is known for it: from the address, or settings."""
    known = secret
    if known is None:
        host = name_in(url)
        known = credentials.get(f"{host}:{url.port}", credentials.get(host))
    if known is None:
        return {}
    if secret is None and " " in known:
        return {"Authorization": known}
    return {"Authorization": f"Basic {base64.b64encode(known.encode()).decode()}"}


def _for_good(error: BusError) -> BusError:
    """Return why a version was not loaded; a lack of memory stays, however often it is fetched."""
    if "budget_bytes" not in (error.details or {}):
        return error
    return Unprocessable(f"{error.message}; the version is kept, and can be loaded later")


def _as_added(request: m.ImportModel, fetched: Fetched) -> m.AddModel:
    address = request.url if hub.is_hub(request.url) else shown(URL(request.url))
    return m.AddModel(
        id=request.id,
        checksum=fetched.checksum,
        file_name=fetched.file_name,
        version=request.version,
        source=m.ModelSource(
            kind="import", file_name=fetched.file_name, by=request.by, url=address
        ),
    )
