"""A dataset's settings: as the command line changes them, and as they are told."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import typer
from rich.filesize import decimal
from rich.text import Text

from bus import codec
from bus import messages as m
from services.cli.console import age, out, show_json
from services.cli.options import Platform


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What the command line wants set for a dataset; None leaves it as it is.

    Attributes:
        threshold: Cosine of searches, or `default`.
        verify_threshold: Cosine of comparisons, or `default`.
        scoring: `best` or `mean`.
        keep_images: Whether images are kept.
        quality: What a face below the bounds leads to.
        bounds: `size_min_px` and its like to a number, or `none`.
    """

    threshold: str | None
    verify_threshold: str | None
    scoring: str | None
    keep_images: bool | None
    quality: str | None
    bounds: dict[str, str | None]

    def applied_to(self, before: m.DatasetSettings) -> m.DatasetSettings:
        """Return settings with these changes.

        Raises:
            typer.BadParameter: A number is none.
            InvalidRequest: One is out of its range.
        """
        said = codec.plain(before)
        for name, text in (
            ("threshold", self.threshold),
            ("verify_threshold", self.verify_threshold),
        ):
            if text is not None:
                said[name] = _number(text, "default", f"--{name.replace('_', '-')}")
        for name, value in (("scoring", self.scoring), ("keep_images", self.keep_images)):
            if value is not None:
                said[name] = value
        # Fields at their defaults are left out of it: None would read as no bound.
        quality = {field: getattr(before.quality, field) for field in _BOUNDS}
        quality["below"] = self.quality or before.quality.below
        for name, bound in self.bounds.items():
            if bound is not None:
                quality[name] = _number(bound, "none", f"--{name.replace('_', '-')}")
        return codec.convert(said | {"quality": quality}, m.DatasetSettings)

    def __bool__(self) -> bool:
        """Whether anything is to be changed."""
        given = (self.threshold, self.verify_threshold, self.scoring, self.quality)
        return (
            any(value is not None for value in (*given, *self.bounds.values()))
            or self.keep_images is not None
        )


_BOUNDS: Final = ("size_min_px", "sharpness_min", "score_min", "yaw_max")


def show_dataset(one: m.DatasetStats, at: Platform) -> None:
    """Print all that is known of a dataset."""
    if at.as_json:
        show_json(one)
        return
    out.print(Text(one.id, "bold cyan"))
    for title, text in _facts(one):
        out.print(Text(f"{title:<12} ", "dim").append(text, ""))


def _facts(one: m.DatasetStats) -> Iterable[tuple[str, str]]:
    named = f"{one.subjects:,} persons, {one.unnamed:,} entries of nobody"
    yield "entries", f"{one.entries:,}: {named}, {one.rejections:,} rejections"
    digest = f", {one.embedder_digest[:12]}" if one.embedder_digest else ""
    yield "embedder", f"{one.embedder}, {one.dimensions} values{digest}"
    yield "memory", f"{decimal(one.memory_bytes)} in each replica"
    own = "" if one.settings.threshold is None else ", set here"
    yield (
        "named from",
        f"cosine {one.threshold:.3f}{own}, by the {one.settings.scoring} of a person",
    )
    if one.expected_false is not None:
        yield "strangers", f"{one.expected_false:.2g} entries reach that in a search, as measured"
    own = "" if one.settings.verify_threshold is None else ", set here"
    yield "same from", f"cosine {one.verify_threshold:.3f}{own}"
    kept = f"kept, {one.images:,} of them" if one.settings.keep_images else "not kept"
    yield "images", kept
    yield "quality", _bounds(one.settings.quality)
    yield "created", f"{_age(one.created_at)} ago, changed {_age(one.updated_at)} ago"


def _bounds(quality: m.QualityBounds) -> str:
    named = {
        "size_min_px": "{:g} pixels wide",
        "sharpness_min": "sharpness {:g}",
        "score_min": "score {:g}",
        "yaw_max": "turned {:g} degrees at most",
    }
    values = {name: getattr(quality, name) for name in named}
    told = [named[name].format(value) for name, value in values.items() if value is not None]
    words = {"reject": "is refused", "warn": "is taken with a warning", "off": "is taken"}
    return f"{', '.join(told) or 'no bounds'}; what is below {words[quality.below]}"


def _number(text: str, none: str, option: str) -> float | None:
    if text == none:
        return None
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a number nor {none}", param_hint=option
        ) from None


def _age(moment: datetime) -> str:
    return age((m.now() - moment).total_seconds())
