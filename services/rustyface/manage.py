"""Answers `dataset.manage`: each of its actions is a question to the galleries, or one change."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np
import structlog

from bus import codec
from bus import messages as m
from bus.errors import BusError, DeadlineExceeded, InvalidRequest, NotFound, Unavailable
from services.rustyface.galleries.asked import changed
from services.rustyface.galleries.galleries import Galleries, Removed

# What has left a dataset leaves its exported files as well.
_DELETIONS: Final = {
    "delete-dataset",
    "remove-entry",
    "remove-subject",
    "withdraw-rejection",
    "undo-import",
}
_CHANGES: Final = {
    "create",
    "configure",
    "delete-dataset",
    "remove-entry",
    "move-entry",
    "rename-subject",
    "merge-subjects",
    "remove-subject",
    "reject-match",
    "withdraw-rejection",
    "undo-import",
}

_JOBS: Final = {"import", "export", "reembed"}

log = structlog.get_logger("rustyface.manage")


class Jobs(Protocol):
    """Where work goes that outlives its request."""

    async def enter(self, work: m.GalleryWork) -> m.Job:
        """Enter work as a job, and return it; with a known key, the job that was entered first."""
        ...

    async def drop_exports(self, dataset: str, revision: int) -> None:
        """Delete every exported file of a dataset: something was deleted, at that revision.

        Raises:
            BusError: One is left.
        """
        ...

    def drop_exports_behind(self, dataset: str) -> None:
        """Do the same, and let nobody wait for it."""
        ...


class Manage:
    """Lists and changes datasets.

    Args:
        galleries: Where they are.
        jobs: Where imports, exports and embedding anew go.
        thresholds: Says of an embedder and a dataset's settings which cosine counts, in searches
            and in comparisons.
        expected_false: Says of an embedder how many entries of strangers reach a cosine, of so
            many; None where that was not measured.
    """

    def __init__(
        self,
        galleries: Galleries,
        jobs: Jobs,
        thresholds: Callable[[str, m.DatasetSettings], tuple[float, float]],
        expected_false: Callable[[str, float, int], float | None],
    ) -> None:
        self._galleries = galleries
        self._jobs = jobs
        self._thresholds = thresholds
        self._expected_false = expected_false
        self._actions: Mapping[str, Callable[[m.ManageDataset], Awaitable[dict[str, Any]]]] = {
            "list": self._list,
            "create": self._create,
            "configure": self._configure,
            "delete-dataset": self._delete,
            "stats": self._stats,
            "entries": self._entries,
            "remove-entry": self._remove_entry,
            "move-entry": self._move_entry,
            "subjects": self._subjects,
            "rename-subject": self._rename,
            "merge-subjects": self._merge,
            "remove-subject": self._remove_subject,
            "reject-match": self._reject,
            "withdraw-rejection": self._withdraw,
            "history": self._history,
            "imports": self._imports,
            "undo-import": self._undo,
            "import": self._enter,
            "export": self._enter,
            "reembed": self._enter,
        }

    async def answer(self, request: m.ManageDataset) -> m.DatasetList:
        """Do what is asked; the answer lists all datasets as they are after it.

        Raises:
            InvalidRequest: A field that the action needs is missing, or what can only be done is to
                be tried; or as the galleries raise.
            NotFound: There is no such dataset, entry, person, rejection or import.
            Conflict: It does not fit what is there.
        """
        if request.dry_run and request.action in _CHANGES - _DELETIONS | _JOBS:
            raise InvalidRequest(
                f"{request.action} cannot be tried; dry_run goes with "
                f"{', '.join(sorted(_DELETIONS))}",
                field="dry_run",
            )
        deletes = request.action in _DELETIONS and not request.dry_run
        try:
            told = await self._actions[request.action](request)
        except (asyncio.CancelledError, DeadlineExceeded, Unavailable):
            # It may be deleted all the same, and nobody would ask again.
            if deletes and request.dataset:
                self._jobs.drop_exports_behind(request.dataset)
            raise
        if deletes and request.dataset:
            told = await self._without_exports(request.dataset, told)
        if request.action in _CHANGES and not request.dry_run:
            # Whom it concerned does not go into the log: it outlives a deletion.
            log.info(
                "dataset.changed",
                action=request.action,
                dataset=request.dataset,
                affected=told.get("affected"),
                by=request.by,
            )
        return m.DatasetList(datasets=self._galleries.datasets(), **told)

    async def _list(self, _request: m.ManageDataset) -> dict[str, Any]:
        await self._galleries.wait(await self._galleries.newest())
        return {}

    async def _create(self, request: m.ManageDataset) -> dict[str, Any]:
        name = request.dataset or str(uuid.uuid4())
        revision = await self._galleries.create(name, settings=request.settings, by=request.by)
        return {"dataset": await self._told(name), "revision": revision}

    async def _configure(self, request: m.ManageDataset) -> dict[str, Any]:
        name = _dataset(request)
        if (request.settings is None) == (request.changes is None):
            found = "neither" if request.changes is None else "both"
            raise InvalidRequest(
                f"configure needs either settings or changes; there is {found}", field="settings"
            )

        def made(before: m.DatasetSettings) -> m.DatasetSettings:
            if request.settings is not None:
                return request.settings
            return changed(before, request.changes or {})

        revision = await self._galleries.configure(
            name, made, by=request.by, since=request.revision
        )
        return {"dataset": await self._told(name), "revision": revision}

    async def _delete(self, request: m.ManageDataset) -> dict[str, Any]:
        name = _dataset(request)
        if request.dry_run:
            return {"affected": (await self._told(name)).entries}
        removed = await self._galleries.delete(name, by=request.by)
        return {"revision": removed.revision, **_unerased(removed)}

    async def _stats(self, request: m.ManageDataset) -> dict[str, Any]:
        return {"dataset": await self._told(_dataset(request))}

    async def _entries(self, request: m.ManageDataset) -> dict[str, Any]:
        entries, following, total = await self._galleries.entries(
            _dataset(request),
            limit=request.limit,
            after=request.after,
            subject=request.subject,
            entry=request.entry_id,
            filter=request.filter,
            embeddings=request.embeddings,
        )
        if not total and request.entry_id is not None:
            raise NotFound(f"there is no entry {request.entry_id!r} of those", field="entry_id")
        if not total and request.subject is not None and not request.filter:
            raise NotFound(f"there is nobody called {request.subject!r}", field="subject")
        return {"entries": entries, "next": following, "total": total}

    async def _remove_entry(self, request: m.ManageDataset) -> dict[str, Any]:
        name, entry = _dataset(request), _needed(request, "entry_id")
        if request.dry_run:
            _, _, total = await self._galleries.entries(name, limit=1, entry=entry)
            if not total:
                raise NotFound(f"the dataset {name!r} has no entry {entry!r}", field="entry_id")
            return {"affected": total}
        return _removed(await self._galleries.remove(name, entry, by=request.by))

    async def _move_entry(self, request: m.ManageDataset) -> dict[str, Any]:
        name, entry = _dataset(request), _needed(request, "entry_id")
        revision = await self._galleries.move_entry(name, entry, request.into, by=request.by)
        return {"affected": 1, "revision": revision}

    async def _subjects(self, request: m.ManageDataset) -> dict[str, Any]:
        subjects, following, total = await self._galleries.subjects(
            _dataset(request), limit=request.limit, after=request.after
        )
        return {"subjects": subjects, "next": following, "total": total}

    async def _rename(self, request: m.ManageDataset) -> dict[str, Any]:
        return await self._move(request, [_needed(request, "subject")], fresh=True)

    async def _merge(self, request: m.ManageDataset) -> dict[str, Any]:
        if not request.subjects and request.subject is None:
            raise InvalidRequest("merge-subjects needs the field subjects", field="subjects")
        own = [] if request.subject is None else [request.subject]
        return await self._move(request, [*request.subjects, *own], fresh=False)

    async def _move(
        self, request: m.ManageDataset, subjects: list[str], *, fresh: bool
    ) -> dict[str, Any]:
        affected, revision = await self._galleries.move_subjects(
            _dataset(request), subjects, _needed(request, "into"), fresh=fresh, by=request.by
        )
        return {"affected": affected, "revision": revision}

    async def _remove_subject(self, request: m.ManageDataset) -> dict[str, Any]:
        removed = await self._galleries.remove_subject(
            _dataset(request), _needed(request, "subject"), by=request.by, dry_run=request.dry_run
        )
        return _removed(removed)

    async def _reject(self, request: m.ManageDataset) -> dict[str, Any]:
        given = request.embedding
        if (request.entry_id is None) == (given is None):
            found = "neither" if given is None else "both"
            raise InvalidRequest(
                f"reject-match needs either entry_id or embedding; there is {found}",
                field="entry_id",
            )
        rejection, revision = await self._galleries.reject(
            _dataset(request),
            _needed(request, "subject"),
            entry=request.entry_id,
            vector=None if given is None else np.asarray(given, np.float64),
            by=request.by,
        )
        return {"rejection": rejection, "revision": revision}

    async def _withdraw(self, request: m.ManageDataset) -> dict[str, Any]:
        name, rejection = _dataset(request), _needed(request, "rejection")
        removed = await self._galleries.withdraw(
            name, rejection, by=request.by, dry_run=request.dry_run
        )
        return {"revision": removed.revision, **_unerased(removed)}

    async def _history(self, request: m.ManageDataset) -> dict[str, Any]:
        after = request.after
        # Longer than any number that there can be, it would not be read as one.
        if after is not None and not (after.isascii() and after.isdigit() and len(after) < 19):
            raise InvalidRequest(
                f"after: it is {after[:40]!r}; the history goes on behind a number, the answer's "
                "next",
                field="after",
            )
        changes, following = await self._galleries.history(
            _dataset(request), limit=request.limit, after=None if after is None else int(after)
        )
        return {"history": changes, "next": None if following is None else str(following)}

    async def _imports(self, request: m.ManageDataset) -> dict[str, Any]:
        return {"imports": await self._galleries.imports(_dataset(request))}

    async def _undo(self, request: m.ManageDataset) -> dict[str, Any]:
        removed = await self._galleries.undo_import(
            _dataset(request), _needed(request, "imported"), by=request.by, dry_run=request.dry_run
        )
        return _removed(removed)

    async def _enter(self, request: m.ManageDataset) -> dict[str, Any]:
        name = _dataset(request)
        if request.action == "import":
            _needed(request, "artefact")
        else:
            # What is not there cannot be exported, and is told at once.
            await self._galleries.settings(name)
        if request.action == "reembed":
            _needed(request, "into")
        asked = {
            "action": request.action,
            "dataset": name,
            "artefact": request.artefact if request.action == "import" else None,
            "file_name": request.file_name if request.action == "import" else None,
            "format": request.format,
            "existing": request.existing,
            "file_settings": request.file_settings,
            "into": request.into if request.action == "reembed" else None,
            "by": request.by,
            "key": request.key,
        }
        # A person may be called otherwise than a dataset: `into` has to be looked at again.
        return {"job": await self._jobs.enter(codec.convert(asked, m.GalleryWork))}

    async def _without_exports(self, dataset: str, told: dict[str, Any]) -> dict[str, Any]:
        """Delete a dataset's exported files; what that comes to is said beside what is told."""
        try:
            await self._jobs.drop_exports(dataset, told["revision"])
        except BusError as error:
            # The deletion itself is done: an error would say that it is not.
            log.error("exports.not_deleted", dataset=dataset, cause=error.message)
            said = (
                f"exported files of {dataset!r} may still have what was deleted, for an hour at "
                f"most: {error.message}"
            )
            return {**told, "warnings": [*told.get("warnings", ()), said]}
        return told

    async def _told(self, name: str) -> m.DatasetStats:
        return await self._galleries.stats(name, self._thresholds, self._expected_false)


def _removed(removed: Removed) -> dict[str, Any]:
    return {
        "affected": removed.affected,
        "revision": removed.revision,
        **_unerased(removed),
    }


def _unerased(removed: Removed) -> dict[str, Any]:
    """Return what is said of what a removal has left in the broker's files; nothing of nothing."""
    left = removed.unerased
    if left is None:
        return {}
    count = f"{left.left:,}" if left.left else "an unknown number"
    said = (
        f"gone for every question, but not erased from the broker's files yet: {count} of "
        "the deleted faces and images"
    )
    if left.cause is None:
        said += "; that goes on behind this answer"
    else:
        said += f": {left.cause}; it is tried again, and the log says galleries.not_erased"
    return {"unerased": left.left, "warnings": [said]}


def _dataset(request: m.ManageDataset) -> str:
    name: str = _needed(request, "dataset")
    return name


def _needed(request: m.ManageDataset, name: str) -> Any:
    value = getattr(request, name)
    if value is None:
        raise InvalidRequest(f"{request.action} needs the field {name}", field=name)
    return value
