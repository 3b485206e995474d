"""The plugin's settings."""

import difflib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from bus.errors import InvalidRequest
from bus.instance import Instance
from bus.messages import Name


class RustyfaceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be set.

    Attributes:
        datasets_path: Folder of dataset files that are taken in at the start, each if there is no
            dataset of its name yet; relative to the data directory. None is looked for if null.
        default_dataset: Where faces go that name no dataset; made at the start.
        telemetry_interval: Seconds between two telemetry snapshots.
        embedder: `sface` tells people apart; `pixel32` is the whole image in 32x32 grey values,
            for what was enrolled with it.
        models_dir: Folder with other weights than the shipped ones.
        threshold: Cosine from which a match counts as the same person; the embedder's own if null.
        max_waiting: Images that may wait for a processor; more are refused.
    """

    datasets_path: str | None = "datasets"
    default_dataset: Name = "default"
    telemetry_interval: Annotated[float, Meta(gt=0, le=3600)] = 10.0
    embedder: Literal["sface", "pixel32"] = "sface"
    models_dir: str | None = None
    threshold: Annotated[float, Meta(ge=-1, le=1)] | None = None
    max_waiting: Annotated[int, Meta(ge=1, le=10_000)] = 64


def settings_of(instance: Instance) -> RustyfaceSettings:
    """Return the settings of this plugin.

    Raises:
        InvalidRequest: There is one that does not exist, or cannot have its value; names it, and
            the one that was probably meant.
    """
    known = [setting.encode_name for setting in msgspec.structs.fields(RustyfaceSettings)]
    for name in instance.config.settings if instance.config else ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise InvalidRequest(f"rustyface has no setting {name!r}; {hint}", field=name)
    return instance.settings(RustyfaceSettings)
