"""Requests that are sent in one turn of the event loop to one instance, as one message.

A message costs each of the three processes that it passes more than most requests do. What one
turn brings for the same instance travels as one pack, and so do the answers that are ready in one
turn for the same caller. Nothing ever waits for others: a request that is alone goes as it always
did. Only the way is shared: each has an inbox, a deadline, an error of its own.

A pack's reply subject says which inboxes its requests have: `<inbox>.<first>-<count>`, numbers in
hexadecimal, stands for `<inbox>.<first>` and the ones after it. The answers go there, packed too;
anything else that comes there (nobody listens, the pack cannot be read) is for all of them.
Figures are in `docs/decisions/0011-packs.md`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec
import structlog

from bus.errors import BusError, InvalidRequest, TooLarge
from bus.wire import Incoming, Replies, Waiting, Wire

# As many callers as one turn is seen to bring; more save next to nothing each.
PACK_MAX: Final = 64
# What the broker and both sides hold in one piece; others are not held up by it for long.
PACK_MAX_BYTES: Final = 64 * 1024
# From here on copying costs as much as a message of its own.
ALONE_BYTES: Final = 4 * 1024
# The content type of a pack, and of the answers to it.
PACK: Final = "application/vnd.bkg.pack"

log = structlog.get_logger("bus.packs")

T = TypeVar("T")
P = TypeVar("P", bound="_Packed")


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    """What a pack has many of."""


class PackedRequest(_Packed, frozen=True, array_like=True):
    """A request in a pack.

    Attributes:
        call: What is asked: what would follow `<root>.call.` in a subject.
        headers: As on a message of its own.
        body: Likewise.
    """

    call: str
    headers: dict[str, str]
    body: bytes


class PackedReply(_Packed, frozen=True, array_like=True):
    """An answer in a pack.

    Attributes:
        to: The last token of the inbox that it is for.
        headers: Those that it does not share with the others; they stand on the message.
        body: As on a message of its own.
    """

    to: str
    headers: dict[str, str]
    body: bytes


encode: Final = msgspec.msgpack.Encoder().encode


def join(encoded: Sequence[bytes]) -> bytes:
    """Return what was encoded one by one as one pack: a MessagePack array."""
    return b"".join((b"\xdc", len(encoded).to_bytes(2, "big"), *encoded))


def read(pack: bytes, kind: type[P]) -> list[P | InvalidRequest]:
    """Return what is in a pack; for what does not fit, what is wrong with it.

    Raises:
        InvalidRequest: It is no pack, or one over the limit.
    """
    try:
        found: list[P] = _DECODERS[kind].decode(pack)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _read_one_by_one(pack, kind)
    _check_count(len(found))
    return [*found]


def _read_one_by_one(pack: bytes, kind: type[P]) -> list[P | InvalidRequest]:
    try:
        raws = _RAWS.decode(pack)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the pack cannot be read: {error}") from None
    _check_count(len(raws))
    found: list[P | InvalidRequest] = []
    for raw in raws:
        try:
            found.append(msgspec.msgpack.decode(raw, type=kind))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            found.append(InvalidRequest(f"this part of a pack cannot be read: {error}"))
    return found


def _check_count(count: int) -> None:
    if count > PACK_MAX:
        raise InvalidRequest(f"the pack has {count} parts; {PACK_MAX} are allowed")


def pack_inbox(asker: str, first: int, count: int) -> str:
    """Return the reply subject of a pack whose requests have `count` inboxes from `first` on.

    Args:
        asker: What the asker's inboxes begin with, the last dot included.
        first: The number of the first one.
        count: How many there are.
    """
    return f"{asker}{first:x}-{count:x}"


def inboxes_of(inbox: str) -> list[str]:
    """Return the inboxes that a pack's reply subject stands for; none if it is not one."""
    found = _PACK_INBOX.fullmatch(inbox)
    if found is None:
        return []
    asker, first, count = found[1], int(found[2], 16), int(found[3], 16)
    return [f"{asker}{number:x}" for number in range(first, first + min(count, PACK_MAX))]


class _Gathering(Generic[T]):
    """What the present turn of the event loop brings, by whom it is for.

    Bounded: what reaches a limit is sent at once, all else at the end of the turn.
    """

    def __init__(self, wire: Wire, send: Callable[[str, list[T], list[bytes]], None]) -> None:
        self._wire = wire
        self._send = send
        self._open: dict[str, tuple[list[T], list[bytes]]] = {}
        self._bytes: dict[str, int] = {}

    def add(self, key: str, item: T, encoded: bytes) -> None:
        if not self._open:
            self._wire.at_end(self._send_all)
        size = self._bytes.get(key, 0) + len(encoded)
        if size > PACK_MAX_BYTES:
            self._send_one(key)
            size = len(encoded)
        items, parts = self._open.setdefault(key, ([], []))
        items.append(item)
        parts.append(encoded)
        self._bytes[key] = size
        if len(items) == PACK_MAX:
            self._send_one(key)

    def _send_one(self, key: str) -> None:
        self._bytes.pop(key)
        self._send(key, *self._open.pop(key))

    def _send_all(self) -> None:
        for key in list(self._open):
            self._send_one(key)


class Asked(Waiting, Protocol):
    """A request that may share its message.

    Attributes:
        alone: Where it goes if it is the only one.
        headers: Its headers.
        body: Its body.
        over: Whether nobody waits for the answer any more.
        inbox: Where the answer goes; is set when it is sent.
    """

    alone: str
    headers: dict[str, str]
    body: bytes
    over: bool
    inbox: str

    def not_sent(self) -> None:
        """Take note that it could not be sent this way; nobody has seen it."""


class Asking:
    """The caller's side.

    Args:
        wire: Sends.
        replies: Knows who waits for which answer.
    """

    def __init__(self, wire: Wire, replies: Replies) -> None:
        self._wire = wire
        self._replies = replies
        self._gathering: _Gathering[Asked] = _Gathering(wire, self._send)

    def ask(self, to: str, call: str, asked: Asked) -> bool:
        """Have a request sent at the end of this turn, with what else goes to the same subject.

        Args:
            to: Where packs for the instance go.
            call: What is asked, as in a pack.
            asked: The request.

        Returns:
            Whether that will be done; if not, it is nothing for a pack.
        """
        if len(asked.body) > ALONE_BYTES or not self._wire.plain(asked.headers):
            return False
        try:
            encoded = encode(PackedRequest(call, asked.headers, asked.body))
        except UnicodeEncodeError:
            return False
        if len(encoded) > ALONE_BYTES:
            return False
        self._gathering.add(to, asked, encoded)
        return True

    def take(self, message: Incoming) -> None:
        """Give what comes to an inbox to whoever waits for it."""
        headers = message.headers
        if headers.get("Content-Type") == PACK:
            self._unpack(message)
        elif not self._replies.take(message):
            # For a pack as a whole: nobody listens there, or it cannot be read.
            for inbox in inboxes_of(message.subject):
                self._replies.give(inbox, message)

    def _unpack(self, message: Incoming) -> None:
        asker = message.subject[: message.subject.rfind(".") + 1]
        shared = {k: v for k, v in message.headers.items() if k != "Content-Type"}
        for part in read(message.data, PackedReply):
            if isinstance(part, InvalidRequest):
                log.warning("reply.unreadable", subject=message.subject, cause=part.message)
                continue
            inbox = asker + part.to
            self._replies.give(inbox, Incoming(inbox, "", part.body, {**shared, **part.headers}))

    def _send(self, to: str, asked: list[Asked], encoded: list[bytes]) -> None:
        gone = [one.over for one in asked]
        if any(gone):
            encoded = [part for part, left in zip(encoded, gone, strict=True) if not left]
            asked = [one for one, left in zip(asked, gone, strict=True) if not left]
        if not asked:
            return
        first = self._replies.reserve(len(asked))
        for number, one in enumerate(asked, first):
            one.inbox = self._replies.inbox(number)
            self._replies.await_at(one.inbox, one)
        try:
            if len(asked) == 1:
                one = asked[0]
                sent = self._wire.send(one.alone, one.inbox, one.body, one.headers)
            else:
                inbox = pack_inbox(self._replies.prefix, first, len(asked))
                sent = self._wire.send(to, inbox, join(encoded), _PACK_HEADERS)
        except BusError:
            sent = False
        if not sent:
            for one in asked:
                self._replies.forget(one.inbox)
                one.not_sent()


def unpack(message: Incoming, root: str) -> list[tuple[Incoming, InvalidRequest | None]]:
    """Return the requests in a pack, each as if it had come alone, and what is wrong with it.

    Raises:
        InvalidRequest: The pack cannot be read.
    """
    pack, parts = message.reply, read(message.data, PackedRequest)
    inboxes = inboxes_of(pack)
    if len(inboxes) != len(parts):
        raise InvalidRequest(
            f"the pack has {len(parts)} parts, its reply subject stands for {len(inboxes)}"
        )
    return [
        (Incoming("", inbox, b"", {}, pack), part)
        if isinstance(part, InvalidRequest)
        else (Incoming(f"{root}.call.{part.call}", inbox, part.body, part.headers, pack), None)
        for part, inbox in zip(parts, inboxes, strict=True)
    ]


class Answering:
    """The side of the instance that is asked.

    Args:
        wire: Tells when a turn ends.
        shared: Headers of every answer.
        post: Sends a message: subject, body and headers; raises `TooLarge`.
    """

    def __init__(
        self,
        wire: Wire,
        shared: Mapping[str, str],
        post: Callable[[str, bytes, Mapping[str, str]], None],
    ) -> None:
        self._headers = {**shared, "Content-Type": PACK}
        self._post = post
        self._gathering: _Gathering[str] = _Gathering(wire, self._send)

    def answer(self, inbox: str, pack: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Answer a request of a pack, with what else is ready in this turn for the same asker.

        Args:
            inbox: Whose answer it is.
            pack: The reply subject of the pack that it came in.
            body: The answer.
            headers: Its headers, without the shared ones.

        Raises:
            TooLarge: It is over the broker's limit.
        """
        dot = inbox.rfind(".") + 1
        encoded = encode(PackedReply(inbox[dot:], dict(headers), body))
        if len(encoded) > ALONE_BYTES:
            self._post(pack, join([encoded]), self._headers)
        else:
            self._gathering.add(inbox[:dot], pack, encoded)

    def _send(self, _asker: str, packs: list[str], encoded: list[bytes]) -> None:
        # Any of the asker's inboxes; but a broker may allow only subjects that were to be answered.
        try:
            self._post(packs[-1], join(encoded), self._headers)
        except TooLarge:
            # A broker that takes less than a pack may have.
            for pack, part in zip(packs, encoded, strict=True):
                self._post(pack, join([part]), self._headers)


_PACK_INBOX = re.compile(r"(\S*\.)([0-9a-f]{1,15})-([0-9a-f]{1,2})")
_PACK_HEADERS: Final = {"Content-Type": PACK}
_RAWS: Final = msgspec.msgpack.Decoder(list[msgspec.Raw])
_DECODERS: Final[dict[type[_Packed], msgspec.msgpack.Decoder[Any]]] = {
    kind: msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
    for kind in (PackedRequest, PackedReply)
}
