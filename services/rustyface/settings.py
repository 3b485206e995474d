"""The plugin's settings."""

import difflib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from bus.errors import InvalidRequest
from bus.instance import Instance
from bus.messages import Name

EMBEDDERS = ("sface", "pixel32")
ModelRef = Annotated[str, Meta(min_length=1, max_length=512)]
"""An ONNX file: `NAME` or `NAME@VERSION` of the model repository, the SHA-256 of an artefact in it,
or a path below the data directory that ends in `.onnx`."""
Cosine = Annotated[float, Meta(ge=-1, le=1)]
Level = Annotated[float, Meta(ge=-1_000, le=1_000)]
Spread = Annotated[float, Meta(gt=0, le=1_000)]
# Lists, and not tuples of three: of a tuple whose members have bounds msgspec 0.22 makes a decoder
# that the garbage collector crashes on.
Levels = Level | Annotated[list[Level], Meta(min_length=3, max_length=3)]
Spreads = Spread | Annotated[list[Spread], Meta(min_length=3, max_length=3)]


class OwnEmbedder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A net of one's own that embeds aligned faces of 112 x 112 pixels, as ArcFace does.

    Attributes:
        model: Its file.
        name: What datasets name it by. Another file, or other levels, need another name.
        threshold: Cosine from which a search names somebody: nobody else can know it.
        verify_threshold: Cosine from which two faces are one person; `threshold` if null.
        channels: Which of a pixel's values comes first.
        mean: What is taken off each value from 0 to 255; three numbers for three channels.
        std: What it is divided by then.
    """

    model: ModelRef
    name: Name
    threshold: Cosine
    verify_threshold: Cosine | None = None
    channels: Literal["rgb", "bgr"] = "rgb"
    mean: Levels = 127.5
    std: Spreads = 127.5


class NetFiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Other files for the nets than the shipped ones.

    Attributes:
        yunet: Finds faces; the shipped one if null.
        sface: Embeds them; likewise.
    """

    yunet: ModelRef | None = None
    sface: ModelRef | None = None


class RustyfaceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be set.

    Attributes:
        datasets_path: Folder of dataset files that are taken in at the start, each if there is no
            dataset of its name yet; relative to the data directory. None is looked for if null.
        default_dataset: Where faces go that name no dataset; made at the start.
        telemetry_interval: Seconds between two telemetry snapshots.
        embedder: `sface` tells people apart; `pixel32` is the whole image in 32x32 grey values,
            for what was enrolled with it.
        own_embedder: A net of one's own takes the place of `sface`.
        models_dir: Folder with other weights than the shipped ones.
        weights: Single files in place of the shipped ones; they come before `models_dir`.
        threshold: Cosine from which a search names somebody, in datasets that have none of their
            own; the embedder's if null.
        score_min: How sure the detector has to be of a face.
        max_pixels: Largest width times height of an image; decoding takes up to 10 bytes for each.
        max_waiting: Images that may wait for a processor; more are refused.
    """

    datasets_path: str | None = "datasets"
    default_dataset: Name = "default"
    telemetry_interval: Annotated[float, Meta(gt=0, le=3600)] = 10.0
    embedder: Literal["sface", "pixel32"] = "sface"
    own_embedder: OwnEmbedder | None = None
    models_dir: str | None = None
    weights: NetFiles = NetFiles()
    threshold: Cosine | None = None
    score_min: Annotated[float, Meta(ge=0.1, lt=1)] = 0.7
    max_pixels: Annotated[int, Meta(ge=10_000, le=500_000_000)] = 50_000_000
    max_waiting: Annotated[int, Meta(ge=1, le=10_000)] = 64


def settings_of(instance: Instance) -> RustyfaceSettings:
    """Return the settings of this plugin.

    Raises:
        InvalidRequest: There is one that does not exist, cannot have its value, or contradicts
            another; names it, and the one that was probably meant.
    """
    known = [setting.encode_name for setting in msgspec.structs.fields(RustyfaceSettings)]
    for name in instance.config.settings if instance.config else ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise InvalidRequest(f"rustyface has no setting {name!r}; {hint}", field=name)
    settings = instance.settings(RustyfaceSettings)
    own = settings.own_embedder
    if own and own.name in EMBEDDERS:
        raise InvalidRequest(
            f"own_embedder.name: {own.name!r} is the name of one that comes with rustyface",
            field="own_embedder.name",
        )
    if own and settings.embedder != EMBEDDERS[0]:
        raise InvalidRequest(
            f"embedder: it is {settings.embedder!r} and there is an own_embedder; give one of them",
            field="embedder",
        )
    return settings
