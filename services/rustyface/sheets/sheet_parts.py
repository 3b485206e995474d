"""What contact sheets are made of, and the words on them, in the reader's language."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from services.rustyface.photos.images import Image

Mark = Literal["known", "unknown", "rejected"]

SIDE_PX: Final = 208
TITLE_MAX: Final = 80


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One entry, or one match.

    Attributes:
        title: What it is called.
        lines: What else is known of it.
        picture: A square of `SIDE_PX`; None if there is none.
        gap: What stands in its place.
        mark: How it counts, as a match.
        mark_text: That in words.
        score: Its cosine, as a match.
        score_text: That in words.
        threshold: The cosine from which it would count.
    """

    title: str
    lines: Sequence[str] = ()
    picture: Image | None = None
    gap: str = ""
    mark: Mark | None = None
    mark_text: str = ""
    score: float | None = None
    score_text: str = ""
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """A person with their entries, or a face with its matches.

    Attributes:
        title: What they are called.
        about: What else is known of them.
        cells: The entries, or the matches.
        number: Of the face, as it stands on the photo.
        mark: Whether the face is known.
        picture: The face.
        empty: What is said where there are no cells.
    """

    title: str
    about: str
    cells: Sequence[Cell]
    number: int | None = None
    mark: Mark | None = None
    picture: Image | None = None
    empty: str = ""


@dataclass(frozen=True)
class Boxed:
    """A face on the photo: left, top, width and height of its box, in the photo's pixels."""

    number: int
    box: Sequence[float]
    mark: Mark


@dataclass(frozen=True, kw_only=True, eq=False)
class Page:
    """A sheet.

    Attributes:
        language: Of its words.
        title: What it shows.
        about: The same in numbers.
        empty: What is said where there is nothing.
        groups: What is on it.
        photo: That was searched for.
        boxes: The faces on it.
    """

    language: str
    title: str
    about: str
    empty: str
    groups: Sequence[Group]
    photo: Image | None = None
    boxes: Sequence[Boxed] = field(default_factory=list)


class Words:
    """Says things in one language.

    Args:
        language: `en` or `de`.
    """

    def __init__(self, language: str) -> None:
        self._phrases = _PHRASES[language]
        self._comma = "," if language == "de" else "."

    def __call__(self, phrase: str, /, **values: Any) -> str:
        """Return a phrase with values in it."""
        return self._phrases[phrase].format_map(values)

    def entries(self, count: int) -> str:
        """Return so many entries."""
        return self("entry" if count == 1 else "entries", count=count)

    def faces(self, count: int) -> str:
        """Return so many faces."""
        return self("one_face" if count == 1 else "faces", count=count)

    def number(self, value: float) -> str:
        """Return a number as it is read: of small ones two digits that are not 0."""
        text = f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
        return text.replace(".", self._comma)

    def moment(self, at: datetime) -> str:
        """Return a day and a time, in UTC."""
        return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def words_in(language: str) -> Words:
    """Return the words of a language."""
    return Words(language)


def clipped(text: str) -> str:
    """Return what of a name fits, without what is no sign."""
    plain = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return plain if len(plain) <= TITLE_MAX else f"{plain[: TITLE_MAX - 1]}…"


_PHRASES: Final = {
    "en": {
        "dataset": "Dataset {name}",
        "search": "Search in {name}",
        "shown": "{shown} of {total} entries",
        "empty": "There are no entries.",
        "nobody": "Nobody's",
        "entry": "{count} entry",
        "entries": "{count} entries",
        "one_face": "{count} face",
        "faces": "{count} faces",
        "size": "face {px} px wide",
        "gone": "picture is gone",
        "not_kept": "no picture kept",
        "face": "face of {px} px, detected with {score}",
        "threshold": "{faces} · known from {threshold} on · {searched} compared",
        "known": "known",
        "unknown": "unknown",
        "rejected": "rejected",
        "stranger": "Unknown",
        "no_match": "Nobody is like this face.",
        "expected_false": "{count} strangers expected",
    },
    "de": {
        "dataset": "Datensatz {name}",
        "search": "Suche in {name}",
        "shown": "{shown} von {total} Einträgen",
        "empty": "Es gibt keine Einträge.",
        "nobody": "Ohne Person",
        "entry": "{count} Eintrag",
        "entries": "{count} Einträge",
        "one_face": "{count} Gesicht",
        "faces": "{count} Gesichter",
        "size": "Gesicht {px} px breit",
        "gone": "Bild ist weg",
        "not_kept": "kein Bild aufbewahrt",
        "face": "Gesicht von {px} px, erkannt mit {score}",
        "threshold": "{faces} · bekannt ab {threshold} · {searched} verglichen",
        "known": "bekannt",
        "unknown": "unbekannt",
        "rejected": "abgelehnt",
        "stranger": "Unbekannt",
        "no_match": "Niemand gleicht diesem Gesicht.",
        "expected_false": "{count} Fremde zu erwarten",
    },
}
