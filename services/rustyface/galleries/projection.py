"""The galleries as the events so far say: events in, state out, nothing asked of anybody.

Of each subject the last message alone is sure to be in the stream, so a replica that replays may
see less than one that was there. Both hold the same, because all that counts follows from the last
message of each subject and its sequence: an entry's event carries the whole entry, a name's event
all moves of that name, an import's whether it was undone. A gallery's own last event cuts off
everything below.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import structlog

from bus import codec
from bus import messages as m
from bus.errors import BusError, InvalidRequest
from bus.streams import Stored
from bus.subjects import name_of, token
from services.rustyface.galleries.cosines import units
from services.rustyface.galleries.gallery import Gallery, Kept
from services.rustyface.galleries.joined import Joined
from services.rustyface.galleries.persons import Rejection
from services.rustyface.galleries.search import Matrix

LITTLE_ENDIAN: Final = np.dtype("<f4")
DIMENSIONS_MAX: Final = 16_384
# A subject and the broker's own words beside it have to fit into a line of 4,096 bytes, otherwise
# the broker hangs up for good.
TOKEN_MAX: Final = 512
MESSAGE_ID: Final = "Nats-Msg-Id"
# No rejection has this id. That it was withdrawn says nothing, to older workers too, and can be
# stored under a condition: see `Enrolling`.
FENCE: Final = "-"

_NO_METADATA: Final = (b"", b"\xc0")

E = TypeVar(
    "E",
    m.GalleryHead,
    m.GalleryEntry,
    m.GallerySettings,
    m.GallerySubject,
    m.GalleryRejection,
    m.GalleryImport,
)

log = structlog.get_logger("rustyface.galleries")


@dataclass(frozen=True, slots=True)
class Dead:
    """An event that still is in the stream, though another one has taken it away.

    That one says that the entry was removed, replaced or moved, the rejection withdrawn, the person
    or the whole gallery removed, the import undone.

    Attributes:
        gallery: Where.
        seq: Its sequence.
        entry: The entry that it was; None for a rejection.
        removal: The event that removed whom it is about; None if it was taken away otherwise.
        image: The image that it names.
        cause: The message id of the event that took it away.
        face: It carries one. The others of a gallery that has ended may say names all the same.
        older: The id of the entry, or rejection, that it was, if it has taken the place of another
            event of that. It is to be erased before this one: whoever replays what is left would
            find it counting again.
    """

    gallery: str
    seq: int
    entry: str | None = None
    removal: int | None = None
    image: str | None = None
    cause: str | None = None
    face: bool = True
    older: str | None = None


class Projection:
    """All galleries, from their events in the order of the stream.

    Args:
        threads: Where searches run.

    Attributes:
        revision: The last event that was applied.
        galleries: By name.
        heads: Sequence of each gallery's own last event, of deleted ones too: a new gallery of
            that name follows it.
        unreadable: Those that cannot be used, because of an event that cannot be read; which.
        left_behind: Those that are gone, of which there are events in the stream all the same.
            Whoever has looked at it clears it.
        images: How many entries name an image.
    """

    def __init__(self, threads: Executor) -> None:
        self.revision = 0
        self.galleries: dict[str, Gallery] = {}
        self.heads: dict[str, int] = {}
        self.unreadable: dict[str, int] = {}
        self.left_behind: set[str] = set()
        self.images: Counter[str] = Counter()
        self._threads = threads
        self._dead: list[Dead] = []
        # Entries of the batch at hand whose vectors are not in their matrix yet.
        self._arrived: dict[str, list[tuple[Kept, bytes, str | None]]] = {}

    def apply(self, events: Iterable[Stored]) -> list[Dead]:
        """Take events in; return those that need not be in the stream any more.

        One that cannot be read is passed over. Whatever it says, the event before it on its
        subject need not be in the stream any more. So that leaves the projection as well, and a
        replica that replays knows the same as one that was there.
        """
        for stored in events:
            self.revision = stored.seq
            _, _, gallery, kind, *address = stored.subject.split(".")
            try:
                self._apply(name_of(gallery), kind, address[0] if address else "", stored)
            except BusError as error:
                log.warning("event.unreadable", subject=stored.subject, cause=error.message)
        for gallery in list(self._arrived):
            self._settle(gallery)
        dead, self._dead = self._dead, []
        return dead

    def _apply(self, gallery: str, kind: str, address: str, stored: Stored) -> None:
        if kind == "head":
            self._arrived.pop(gallery, None)
            self._apply_head(gallery, stored)
            return
        there = self.galleries.get(gallery)
        if there is None:
            self.left_behind.add(gallery)
            return
        there.revision, there.stored_at = stored.seq, stored.at
        if kind == "rejection" and address == FENCE:
            return
        if kind != "entry":
            self._settle(gallery)
        match kind:
            case "entry":
                self._apply_entry(gallery, there, address, stored)
            case "settings":
                there.settings = m.DatasetSettings()
                there.settings = _event(stored, m.GallerySettings).settings
            case "subject":
                self._apply_subject(gallery, there, address, stored)
            case "rejection":
                self._apply_rejection(gallery, there, address, stored)
            case "import":
                self._apply_import(gallery, there, address, stored)

    def _apply_head(self, gallery: str, stored: Stored) -> None:
        if (before := self.galleries.pop(gallery, None)) is not None:
            self._count_out(before.entries.values())
        self.heads[gallery] = stored.seq
        self.unreadable[gallery] = stored.seq
        head = _head(stored)
        if head.id != gallery or not 1 <= head.dimensions <= DIMENSIONS_MAX:
            raise InvalidRequest(
                f"it is about {head.id!r} with {head.dimensions} dimensions, expected are "
                f"{gallery!r} and 1 to {DIMENSIONS_MAX}"
            )
        del self.unreadable[gallery]
        if before is not None:
            # Of one whose event cannot be read nothing is: it may be a newer version's.
            self.left_behind.add(gallery)
            self._bury(stored, gallery, before.entries.values())
            self._bury(stored, gallery, before.rejections.values())
        if not head.deleted:
            matrix = Matrix(head.dimensions)
            self.galleries[gallery] = Gallery(
                head,
                stored.seq,
                matrix,
                Joined(matrix, self._threads),
                stored.seq,
                stored.at,
                settings=head.settings or m.DatasetSettings(),
            )

    def _apply_entry(self, gallery: str, there: Gallery, address: str, stored: Stored) -> None:
        try:
            entry = _entry(stored)
            if token(addressed(entry.id)) != address:
                raise InvalidRequest("it is about another entry than its subject says")
            vector = entry.embedding
            if vector is not None and len(vector) != there.matrix.dimensions * 4:
                raise InvalidRequest(
                    f"its embedding has {len(vector)} bytes, the gallery has vectors of "
                    f"{there.matrix.dimensions} values of {LITTLE_ENDIAN.itemsize} bytes"
                )
        except BusError:
            self._settle(gallery)
            lost = [e for e in there.entries if token(addressed(e)) == address]
            self._bury(stored, gallery, self._forget(there, lost))
            raise
        undone = entry.imported is not None and _undone(there, entry.imported)
        if vector is None or undone:
            if vector is None:
                there.deleted_at = stored.seq
            self._settle(gallery)
            gone = self._forget(there, [entry.id])
            self._bury(stored, gallery, gone)
            if vector is not None:
                by = stored.headers.get(MESSAGE_ID)
                older = entry.id if gone else None
                late = Dead(gallery, stored.seq, entry.id, None, entry.image, by, older=older)
                self._dead.append(late)
            return
        metadata = bytes(entry.metadata)
        kept = Kept(
            entry.id,
            stored.seq,
            stored.seq,
            utc(entry.at),
            b"" if metadata in _NO_METADATA else metadata,
            there.person(entry.subject) if entry.subject else None,
            entry.image,
            bytes(entry.quality),
            entry.imported,
        )
        by = stored.headers.get(MESSAGE_ID)
        self._arrived.setdefault(gallery, []).append((kept, vector, by))

    def _settle(self, gallery: str) -> None:
        """Put the entries that have arrived into their gallery, all vectors at once."""
        arrived = self._arrived.pop(gallery, None)
        if arrived is None:
            return
        there = self.galleries[gallery]
        values = np.frombuffer(b"".join(vector for _, vector, _ in arrived), LITTLE_ENDIAN)
        rows, sound = units(values.reshape(len(arrived), -1))
        for (kept, _, _), fine in zip(arrived, sound.tolist(), strict=True):
            if not fine:
                log.warning(
                    "event.unreadable",
                    subject=f"{gallery}: {kept.id}",
                    cause="its embedding has no direction",
                )
        # In their order: of two events of one entry the later one counts, readable or not.
        last: dict[str, int] = {}
        replaced: list[Kept] = []
        for i, (kept, _, by) in enumerate(arrived):
            before = there.entries.get(kept.id)
            if (earlier := last.get(kept.id)) is not None:
                before = arrived[earlier][0]
            elif before is not None:
                replaced.append(before)
            if before is not None:
                self._dead.append(_dead(gallery, before, by))
                kept.older = True
            last[kept.id] = i
        good = [i for i in last.values() if sound[i]]
        # In this order, or an image that both have would be gone in between.
        self.images.update(image for i in good if (image := arrived[i][0].image))
        self._count_out(replaced)
        if good:
            there.add([arrived[i][0] for i in good], rows[good])
        # Only now, or somebody who has lost one entry and got another would be gone in between.
        there.forget(one for one, i in last.items() if not sound[i])
        for kept, _, _ in arrived:
            if kept.person is not None:
                there.leave(kept.person)

    def _apply_subject(self, gallery: str, there: Gallery, address: str, stored: Stored) -> None:
        try:
            event = _event(stored, m.GallerySubject)
            if token(addressed(event.id)) != address:
                raise InvalidRequest("it is about another person than its subject says")
            there.moves.learn(event, stored.seq)
            if event.moves and event.moves[-1].into is None:
                there.deleted_at = stored.seq
        except BusError:
            # Without the moves that it has replaced, people would be called by names that they
            # have no more, or be there again though they were removed.
            self._drop(gallery, stored.seq)
            raise
        gone, rejections = there.move(event.id)
        self._count_out(gone)
        # By `since`, not by this event: what a replay comes to here may have followed another
        # name's moves to somebody who was removed long ago.
        by = stored.headers.get(MESSAGE_ID)
        taken: list[Kept | Rejection] = [*gone, *rejections]
        self._dead += [_dead(gallery, one, by, one.since) for one in taken]

    def _drop(self, gallery: str, seq: int) -> None:
        there = self.galleries.pop(gallery)
        self._count_out(there.entries.values())
        self.unreadable[gallery] = seq

    def _apply_rejection(self, gallery: str, there: Gallery, address: str, stored: Stored) -> None:
        gone = there.withdraw(name_of(address))
        if gone is not None:
            self._bury(stored, gallery, [gone])
        event = _event(stored, m.GalleryRejection)
        if token(event.id) != address:
            raise InvalidRequest("it is about another rejection than its subject says")
        if event.embedding is None:
            there.deleted_at = stored.seq
            return
        if len(event.embedding) != there.matrix.dimensions * LITTLE_ENDIAN.itemsize:
            raise InvalidRequest("its embedding has another length than those of the gallery")
        [row], [sound] = units(np.frombuffer(event.embedding, LITTLE_ENDIAN)[None])
        if not sound:
            raise InvalidRequest("its embedding has no direction")
        seq, older = stored.seq, gone is not None
        if event.imported is not None and _undone(there, event.imported):
            by = stored.headers.get(MESSAGE_ID)
            self._dead.append(Dead(gallery, seq, cause=by, older=event.id if older else None))
            return
        person = there.person(event.subject)
        there.reject(Rejection(event.id, seq, seq, person, row, event.entry, event.imported, older))

    def _apply_import(self, gallery: str, there: Gallery, address: str, stored: Stored) -> None:
        there.imports.pop(name_of(address), None)
        event = _event(stored, m.GalleryImport)
        if token(event.id) != address:
            raise InvalidRequest("it is about another import than its subject says")
        there.imports[event.id] = event
        if event.state == "undone":
            there.deleted_at = stored.seq
            brought = [one.id for one in there.entries.values() if one.imported == event.id]
            self._bury(stored, gallery, self._forget(there, brought))
            said = [one for one in there.rejections.values() if one.imported == event.id]
            for one in said:
                there.withdraw(one.id)
            self._bury(stored, gallery, said)

    def _bury(self, cause: Stored, gallery: str, gone: Iterable[Kept | Rejection]) -> None:
        by = cause.headers.get(MESSAGE_ID)
        self._dead += [_dead(gallery, one, by) for one in gone]

    def _forget(self, there: Gallery, ids: Iterable[str]) -> list[Kept]:
        gone = there.forget(ids)
        self._count_out(gone)
        return gone

    def _count_out(self, gone: Iterable[Kept]) -> None:
        for one in gone:
            if one.image is None:
                continue
            self.images[one.image] -= 1
            # A million photos that came and went would leave as many names.
            if not self.images[one.image]:
                del self.images[one.image]


class _Entry(msgspec.Struct, frozen=True):
    """An entry's event, its metadata and measures unread: a replay reads a million of them."""

    id: str
    at: datetime
    embedding: bytes | None = None
    metadata: msgspec.Raw = msgspec.Raw(b"")
    subject: str | None = None
    image: str | None = None
    quality: msgspec.Raw = msgspec.Raw(b"")
    imported: str | None = None


_READER: Final = msgspec.msgpack.Decoder(_Entry)


def _entry(stored: Stored) -> _Entry:
    """Read an entry's event; raises as `_event` does."""
    if stored.headers.get(codec.CONTENT_TYPE) == codec.MSGPACK:
        try:
            return _READER.decode(stored.body)
        except (msgspec.MsgspecError, OverflowError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the body is no entry: {error}") from None
    event = _event(stored, m.GalleryEntry)
    return _Entry(
        event.id,
        event.at,
        event.embedding,
        msgspec.Raw(codec.encode(event.metadata, codec.MSGPACK)),
        event.subject,
        event.image,
        msgspec.Raw(codec.encode(event.quality, codec.MSGPACK) if event.quality else b""),
        event.imported,
    )


def _dead(gallery: str, one: Kept | Rejection, by: str | None, removal: int | None = None) -> Dead:
    """Return the event of an entry, or of a rejection, that another one has taken away."""
    entry, image = (one.id, one.image) if isinstance(one, Kept) else (None, None)
    older = one.id if one.older else None
    return Dead(gallery, one.seq, entry, removal, image, by, older=older)


def as_dead(gallery: str, stored: Stored) -> Dead:
    """Return what is known of an event of a gallery that has ended."""
    kind = stored.subject.split(".")[3]
    if kind == "entry":
        with contextlib.suppress(BusError):
            entry = _entry(stored)
            face = entry.embedding is not None
            return Dead(gallery, stored.seq, entry.id, image=entry.image, face=face)
    if kind == "rejection":
        with contextlib.suppress(BusError):
            face = _event(stored, m.GalleryRejection).embedding is not None
            return Dead(gallery, stored.seq, face=face)
    # Of an entry or a rejection that cannot be read nobody knows.
    return Dead(gallery, stored.seq, face=kind in {"entry", "rejection"})


def _event(stored: Stored, kind: type[E]) -> E:
    """Read an event, its time in UTC.

    Raises:
        InvalidRequest: It is none of that kind.
    """
    try:
        event = codec.decode(stored.body, kind, stored.headers.get(codec.CONTENT_TYPE))
    except OverflowError:
        raise InvalidRequest("its time is beyond the year 9999") from None
    at = utc(event.at)
    return event if at is event.at else msgspec.structs.replace(event, at=at)


class _HeadAlone(m.GalleryHead, frozen=True):
    settings: Any = None


def _head(stored: Stored) -> m.GalleryHead:
    """Read a gallery's own event; raises as `_event` does.

    Settings that cannot be read are the usual ones, as in an event of their own: what may be set
    can become less, and nobody loses faces by that.
    """
    try:
        return _event(stored, m.GalleryHead)
    except InvalidRequest as error:
        if error.field is None or error.field.partition(".")[0] != "settings":
            raise
        log.warning("event.unreadable", subject=stored.subject, cause=error.message)
    return msgspec.structs.replace(_event(stored, _HeadAlone), settings=None)


def utc(at: datetime) -> datetime:
    """Return a time with a zone; one without is in UTC."""
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _undone(there: Gallery, imported: str) -> bool:
    known = there.imports.get(imported)
    return known is not None and known.state == "undone"


def addressed(name: str) -> str:
    """Return what stands for an entry or a person in a subject: the name, or a long one's digest.

    A short one that looks like a digest is turned into one too, or it could take another's place.
    """
    if len(token(name)) <= TOKEN_MAX and not name.startswith("sha256-"):
        return name
    return f"sha256-{hashlib.sha256(name.encode()).hexdigest()}"
