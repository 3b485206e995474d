"""How models and artefacts leave: what uses them, what nobody needs, and what goes with what."""

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

import structlog

from bus import messages as m
from bus.errors import Conflict
from services.candle.repository import specs
from services.candle.repository.folder import FILES_MAX, scanned
from services.candle.repository.repository import Repository

# An artefact without a version may be about to become one.
ARTEFACT_GRACE: Final = timedelta(minutes=10)
# So long an upload that broke off can be taken up again.
UPLOAD_GRACE: Final = timedelta(days=1)

# So long a watched folder leaves what was removed, should its file come back.
MARK_GRACE: Final = timedelta(days=30)

log = structlog.get_logger("candle.garbage")


class Garbage:
    """Deletes models, and what is left of them.

    Args:
        repository: Where they are.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._store = repository.store

    async def removal(self, request: m.RemoveModel) -> m.RemovedModel:
        """Return what removing a model, or one version, would do, and who uses it.

        Raises:
            NotFound: There is no such model or version; says which there are.
        """
        entry = await self._store.models.get(request.id)
        spec = entry.value if entry else None
        leaving = specs.to_remove(spec, request)
        names = {version.version for version in leaving}
        aliases = sorted(a for a, v in spec.aliases.items() if v in names) if spec else []
        gone = await self._unneeded({v.checksum for v in leaving}, {request.id: names})
        sizes = {v.checksum: v.size_bytes for v in leaving}
        served = await self._served_by(request.id, names)
        if not served and any(version.wanted for version in leaving):
            served = ["wanted to be served"]
        return m.RemovedModel(
            id=request.id,
            versions=[version.version for version in leaving],
            artefacts=sorted(gone),
            freed_bytes=sum(sizes[digest] for digest in gone),
            used_by=[*served, *(f"alias {alias}" for alias in aliases)],
            dry_run=True,
        )

    async def remove(self, request: m.RemoveModel) -> tuple[m.RemovedModel, int]:
        """Delete a model or one version, with what only it needs; return also the revision.

        Raises:
            NotFound: There is no such model or version; says which there are.
            Conflict: It is served, or an alias leads to it; says by whom.
        """
        planned = await self.removal(request)
        check_unused(planned, request)
        await self._mark_removed(request)
        leaving: Sequence[m.ModelVersion] = []

        def change(spec: m.ModelSpec | None) -> m.ModelSpec | None:
            nonlocal leaving
            leaving = specs.to_remove(spec, request)
            if spec is None:
                return None
            if not request.force and any(version.wanted for version in leaving):
                raise Conflict(f"somebody has just loaded {request.id!r}; unload it first")
            return specs.without(spec, {version.version for version in leaving})

        revision = await self._repository.change(request.id, change)
        gone = await self._unneeded({version.checksum for version in leaving}, {})
        sizes = {version.checksum: version.size_bytes for version in leaving}
        for digest in sorted(gone):
            await self._drop(digest)
        log.info("model.removed", model=request.id, versions=[v.version for v in leaving])
        removed = m.RemovedModel(
            id=request.id,
            versions=[version.version for version in leaving],
            artefacts=sorted(gone),
            freed_bytes=sum(sizes[digest] for digest in gone),
            used_by=planned.used_by,
        )
        return removed, revision

    async def _mark_removed(self, request: m.RemoveModel) -> None:
        """Have watched folders leave what is removed where it lies; before it is, for good."""
        entry = await self._store.models.get(request.id)
        mark = m.RemovedFile(removed_at=m.now())
        for version in specs.to_remove(entry.value if entry else None, request):
            await self._store.removed.put(mark, request.id, version.checksum)

    async def until_unserved(self, model: str, versions: Collection[str], timeout_s: float) -> bool:
        """Wait until no instance serves any of these versions; tell whether that is so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                following = self._store.served.follow()
                async with contextlib.aclosing(following):  # type: ignore[type-var]
                    async for _ in following:
                        if not await self._served_by(model, versions):
                            return True
        return False

    async def collect(self, request: m.CollectGarbage) -> m.CollectedGarbage:
        """Delete artefacts that no version needs, what broken uploads left, and lone reports.

        With them go old marks of removed files that no longer lie in the folder here.
        """
        now = m.now()
        # In this order: what comes meanwhile is seen with whatever needs it.
        reports = [entry.names[0] for entry in await self._store.reports.all()]
        uploads = await self._store.artefacts.unfinished()
        artefacts = await self._store.artefacts.all()
        kept = specs.needed(await self._specs())
        old = [
            one for one in artefacts
            if one.digest not in kept and one.stored_at < now - ARTEFACT_GRACE
        ]  # fmt: skip
        broken = [one for one in uploads if one.written_at < now - UPLOAD_GRACE]
        stored = {one.digest for one in artefacts} | kept
        lone = [digest for digest in reports if digest not in stored]
        if request.dry_run:
            gone = [(one.digest, one.size) for one in old]
        else:
            # What was brought again since is left.
            gone = [
                (one.digest, one.size) for one in old
                if await self._drop(one.digest, now - ARTEFACT_GRACE)
            ]  # fmt: skip
            # Deletions that were cut short.
            for digest in await self._store.artefacts.half_deleted(now - ARTEFACT_GRACE):
                await self._drop(digest)
            for upload in broken:
                with contextlib.suppress(Conflict):
                    await self._store.artefacts.discard(upload.upload_id)
            for digest in lone:
                await self._store.reports.delete(digest)
            await self._forget_removed(now - MARK_GRACE)
        collected = m.CollectedGarbage(
            artefacts=[digest for digest, _ in gone],
            uploads=[upload.upload_id for upload in broken],
            freed_bytes=sum(size for _, size in gone) + sum(upload.bytes for upload in broken),
            dry_run=request.dry_run,
        )
        log.info("garbage.collected", freed_bytes=collected.freed_bytes, dry_run=request.dry_run)
        return collected

    async def _forget_removed(self, before: datetime) -> None:
        """Delete the marks of files that were removed before a moment and lie here no longer."""
        folder = self._repository.models_dir
        old = [
            entry for entry in await self._store.removed.all()
            if entry.value and entry.value.removed_at < before
        ]  # fmt: skip
        if not old or not await asyncio.to_thread(folder.is_dir):
            # A folder that is away just now may come back with all its files.
            return
        found, _ = await asyncio.to_thread(scanned, folder)
        if len(found) > FILES_MAX:
            return
        lying = {one.model for one in found}
        for entry in old:
            if entry.names[0] not in lying:
                # Unless it was removed once more meanwhile.
                with contextlib.suppress(Conflict):
                    await self._store.removed.delete(*entry.names, revision=entry.revision)

    async def _drop(self, digest: str, brought_before: datetime | None = None) -> bool:
        """Delete an artefact with its report; tell whether it was there and old enough."""
        dropped = await self._store.artefacts.delete(digest, unless_since=brought_before)
        if dropped:
            await self._store.reports.delete(digest)
        return dropped

    async def _unneeded(
        self, digests: Collection[str], leaving: Mapping[str, Collection[str]]
    ) -> set[str]:
        """Return those artefacts that no version needs, but for those that are leaving."""
        left = [specs.without(spec, leaving.get(spec.id, ())) for spec in await self._specs()]
        return set(digests) - specs.needed([spec for spec in left if spec is not None])

    async def _specs(self) -> list[m.ModelSpec]:
        return [entry.value for entry in await self._store.models.all() if entry.value]

    async def _served_by(self, model: str, versions: Collection[str]) -> list[str]:
        found = {
            f"served by {instance.plugin}.{instance.slot} on {instance.host}"
            for entry in await self._store.served.all()
            if (instance := entry.value)
            for one in instance.models
            if one.id == model and one.version in versions and one.state != "failed"
        }
        return sorted(found)


def check_unused(planned: m.RemovedModel, request: m.RemoveModel) -> None:
    """Raise Conflict where something still uses what is to be removed."""
    if planned.used_by and not request.force:
        what = f"model {request.id!r}"
        if request.version is not None:
            what = f"version {request.version!r} of {request.id!r}"
        raise Conflict(
            f"{what} is in use: {', '.join(planned.used_by)}; unload it and move its aliases "
            "first, or remove it with force",
            reasons=planned.used_by,
        )
