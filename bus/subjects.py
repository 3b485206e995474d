"""Every subject and what travels on it: nobody writes a subject string elsewhere.

An `Endpoint` is a request with its reply, a `Feed` a one-way message. Both give their subject
below a root token (`bkg` unless configured), so that several deployments can share a broker.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Generic, Literal, TypeVar

import msgspec

from bus import codec
from bus import messages as m

DEFAULT_ROOT = "bkg"

# Who speaks on the bus. `instance` is every process of ours and every worker, under its own
# plugin's name; `operator` is whoever has the broker's password, the command `bkg` among them.
Role = Literal["gateway", "supervisor", "instance", "rustyface", "broker", "operator"]

Req = TypeVar("Req", bound=m.Message)
Rep = TypeVar("Rep", bound=m.Message)


@dataclass(frozen=True)
class Endpoint(Generic[Req, Rep]):
    """A subject for request and reply.

    Attributes:
        capability: Its name, `noun.verb`; the subject is `<root>.call.<capability>`.
        queue: The queue group that answers: the plugin.
        request: What is asked.
        reply: What is answered.
        keys: Fields of the request that end the subject, so that the broker routes by them.
        description: One sentence, shown by `nats service info`.
        idempotent: Whether the same request may be answered twice, by one instance or by two, and
            nobody can tell; see `bus.balance`.
        asked_by: Roles that ask; who answers is the queue group.
    """

    capability: str
    queue: str
    request: type[Req]
    reply: type[Rep]
    description: str
    keys: tuple[str, ...] = ()
    asked_by: tuple[Role, ...] = ("gateway", "operator")
    idempotent: bool = False

    def subject(self, root: str, *values: str) -> str:
        """Return the subject for the given values of `keys`."""
        if len(values) != len(self.keys):
            raise ValueError(f"{self.capability} is keyed by {self.keys}, got {values}")
        return ".".join([root, "call", self.capability, *map(token, values)])

    def subject_of(self, root: str, request: Req) -> str:
        """Return the subject for a request."""
        return self.subject(root, *(getattr(request, key) for key in self.keys))

    def subject_of_body(self, root: str, body: bytes, content_type: str | None) -> str:
        """Return the subject for an encoded request, reading of it only what the subject needs.

        Raises:
            InvalidRequest: The body cannot be read, or a key is missing.
        """
        if not self.keys:
            return self.subject(root)
        asked = codec.decode(body, _key_reader(self.request, self.keys), content_type)
        return self.subject(root, *(getattr(asked, key) for key in self.keys))


@dataclass(frozen=True)
class RawEndpoint:
    """A subject for request and reply whose bodies and headers pass as they are.

    For what has an encoding of its own, such as tensors. Without a message there is nothing that
    says which fields end the subject, so callers give them.

    Attributes:
        capability: Its name, `noun.verb`; the subject is `<root>.call.<capability>`.
        queue: The queue group that answers: the plugin.
        description: One sentence, shown by `nats service info`.
        keys: Names of the tokens that may end the subject, so that the broker routes by them.
        example: A body, to copy.
        asked_by: Roles that ask; who answers is the queue group.
        idempotent: As for `Endpoint`.
    """

    capability: str
    queue: str
    description: str
    keys: tuple[str, ...] = ()
    example: str = ""
    asked_by: tuple[Role, ...] = ("gateway", "operator")
    idempotent: bool = False

    def subject(self, root: str, *values: str) -> str:
        """Return the subject for the values of `keys`; the last ones may be left out."""
        if len(values) > len(self.keys):
            raise ValueError(f"{self.capability} is keyed by {self.keys}, got {values}")
        return ".".join([root, "call", self.capability, *map(token, values)])


@dataclass(frozen=True)
class Feed(Generic[Req]):
    """A subject for one-way messages.

    Attributes:
        template: The subject below the root, with `{name}` for each token that varies.
        payload: What travels.
        sent_by: Roles that publish.
        heard_by: Roles that subscribe, or read the stream that keeps it.
    """

    template: str
    payload: type[Req]
    sent_by: tuple[Role, ...] = ("instance",)
    heard_by: tuple[Role, ...] = ("operator",)

    def subject(self, root: str, **values: str | int) -> str:
        """Return the subject; a token that is not given is a wildcard."""
        return f"{root}." + _VARIES.sub(
            lambda name: token(str(values[name[1]])) if name[1] in values else "*", self.template
        )


def token(name: str) -> str:
    """Return a name as one token of a subject, or as a key of a bucket.

    Letters, digits, `-` and `_` stay; every other byte of its UTF-8 form becomes `=XX`.
    """
    return _ESCAPED.sub(lambda c: "".join(f"={byte:02X}" for byte in c[0].encode()), name)


def name_of(subject_token: str) -> str:
    """Return the name that a token stands for: the inverse of `token`."""
    return re.sub(
        r"(?:=[0-9A-F]{2})+",
        lambda run: bytes.fromhex(run[0].replace("=", "")).decode(errors="replace"),
        subject_token,
    )


_ESCAPED = re.compile(r"[^A-Za-z0-9_-]")
_VARIES = re.compile(r"\{(\w+)\}")


@cache
def _key_reader(request: type[m.Message], keys: tuple[str, ...]) -> type[msgspec.Struct]:
    """Return a type with only the keys: decoding it skips the tensors without building them."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(request)}
    return msgspec.defstruct(f"{request.__name__}Keys", [(key, kinds[key]) for key in keys])


# --- Endpoints ------------------------------------------------------------------------------------

SUPERVISOR, CANDLE, RUSTYFACE = "supervisor", "candle", "rustyface"

PLUGINS_LIST = Endpoint(
    "plugins.list", SUPERVISOR, m.Empty, m.PluginList, "Every plugin with its state."
)
PLUGINS_GET = Endpoint("plugins.get", SUPERVISOR, m.NamePlugin, m.PluginState, "One plugin.")
PLUGINS_START = Endpoint(
    "plugins.start", SUPERVISOR, m.NamePlugin, m.PluginState, "Start a plugin; wait until ready."
)
PLUGINS_STOP = Endpoint(
    "plugins.stop", SUPERVISOR, m.NamePlugin, m.PluginState, "Stop a plugin; wait until stopped."
)
PLUGINS_RESTART = Endpoint(
    "plugins.restart", SUPERVISOR, m.NamePlugin, m.PluginState, "Replace every replica in turn."
)
PLUGINS_CONFIGURE = Endpoint(
    "plugins.configure",
    SUPERVISOR,
    m.ConfigurePlugin,
    m.PluginState,
    "Store a configuration; wait until every instance has it, live or by a rolling restart.",
)
PLUGINS_CHECK = Endpoint(
    "plugins.check",
    SUPERVISOR,
    m.ConfigurePlugin,
    m.ConfigCheck,
    "Say what storing a configuration would do.",
)
PLUGINS_SCALE = Endpoint(
    "plugins.scale", SUPERVISOR, m.ScalePlugin, m.PluginState, "Change the number of replicas."
)
PLUGINS_HISTORY = Endpoint(
    "plugins.history",
    SUPERVISOR,
    m.HistoryOfPlugin,
    m.PluginHistory,
    "The kept revisions of a plugin's desired state, newest first.",
)
PLUGINS_ROLLBACK = Endpoint(
    "plugins.rollback",
    SUPERVISOR,
    m.RollbackPlugin,
    m.PluginState,
    "Store an older configuration as a new revision.",
)

HOSTS_LIST = Endpoint("hosts.list", SUPERVISOR, m.Empty, m.HostList, "Every host that is there.")
HOSTS_DRAIN = Endpoint(
    "hosts.drain", SUPERVISOR, m.NameHost, m.HostInfo, "Move a host's replicas away; wait for it."
)
HOSTS_UNDRAIN = Endpoint(
    "hosts.undrain", SUPERVISOR, m.NameHost, m.HostInfo, "Let a drained host take replicas again."
)

# One subject per model: a replica listens only for the models that it has loaded. So the broker
# routes, and a model that nobody has is answered at once, not after a time-out.
MODEL_RUN = Endpoint(
    "candle.model.run",
    CANDLE,
    m.RunModel,
    m.ModelOutput,
    "Run rows through a model.",
    keys=("id",),
    idempotent=True,
)
MODEL_LOAD = Endpoint(
    "candle.model.load", CANDLE, m.LoadModel, m.LoadedModel, "Serve a file as a model."
)
MODEL_UNLOAD = Endpoint(
    "candle.model.unload", CANDLE, m.UnloadModel, m.UnloadedModel, "Serve a model no longer."
)
MODEL_ALIAS = Endpoint(
    "candle.model.alias",
    CANDLE,
    m.AliasModel,
    m.ModelAliases,
    "Let a name stand for another version; answered when an instance serves it so.",
)
MODEL_WAKE = Endpoint(
    "candle.model.wake",
    CANDLE,
    m.WakeModel,
    m.ServedModel,
    "Bring a model that left memory back; answers with its state, at once.",
)
MODEL_ADD = Endpoint(
    "candle.model.add",
    CANDLE,
    m.AddModel,
    m.AddedModel,
    "Make an artefact of the object store a version of a model, validated, not yet served.",
)
MODEL_VALIDATE = Endpoint(
    "candle.model.validate", CANDLE, m.ValidateModel, m.ModelReport, "Validate a version again."
)
MODEL_DESCRIBE = Endpoint(
    "candle.model.describe",
    CANDLE,
    m.DescribeModel,
    m.ModelSpec,
    "Change a model's description, labels and licence.",
)
MODEL_REMOVE = Endpoint(
    "candle.model.remove",
    CANDLE,
    m.RemoveModel,
    m.RemovedModel,
    "Delete a model, or one version of it, with what only it needs.",
)
MODEL_GC = Endpoint(
    "candle.model.gc",
    CANDLE,
    m.CollectGarbage,
    m.CollectedGarbage,
    "Delete artefacts that no version needs, and what broken uploads left.",
)
MODEL_IMPORT = Endpoint(
    "candle.model.import",
    CANDLE,
    m.ImportModel,
    m.Job,
    "Fetch a model from elsewhere; answers with the job that does it, at once.",
)
JOB_CANCEL = Endpoint(
    "candle.job.cancel", CANDLE, m.NameJob, m.Job, "End a job; one that has ended stays as it is."
)
JOB_RETRY = Endpoint(
    "candle.job.retry",
    CANDLE,
    m.NameJob,
    m.Job,
    "Take up a job that failed or was cancelled, from where it was.",
)
CANDLE_STATS = Endpoint(
    "candle.stats", CANDLE, m.Empty, m.CandleStats, "The models that this instance serves.",
    idempotent=True,
)  # fmt: skip

# Not idempotent: asked twice it enrols twice, unless the entry has a name.
FACES_ENCODE = Endpoint(
    "faces.encode", RUSTYFACE, m.EncodeFace, m.EncodedFace, "Embed a face, and enrol it."
)
FACES_DETECT = Endpoint(
    "faces.detect", RUSTYFACE, m.DetectFaces, m.DetectedFaces, "Find the faces of an image.",
    idempotent=True,
)  # fmt: skip
FACES_VERIFY = Endpoint(
    "faces.verify",
    RUSTYFACE,
    m.VerifyFaces,
    m.VerifiedFaces,
    "Say whether two faces are one person.",
    idempotent=True,
)
FACES_SHEET = Endpoint(
    "faces.sheet",
    RUSTYFACE,
    m.DrawSheet,
    m.Sheet,
    "Draw a contact sheet of a dataset or a search.",
    idempotent=True,
)
FACES_SEARCH = Endpoint(
    "faces.search", RUSTYFACE, m.SearchFaces, m.FaceMatches, "Find the nearest enrolled faces.",
    idempotent=True,
)  # fmt: skip
DATASET_MANAGE = Endpoint(
    "dataset.manage", RUSTYFACE, m.ManageDataset, m.DatasetList, "List and change datasets."
)
DATASET_JOB_CANCEL = Endpoint(
    "dataset.job.cancel",
    RUSTYFACE,
    m.NameJob,
    m.Job,
    "End a job of a dataset; one that has ended stays as it is.",
)
DATASET_JOB_RETRY = Endpoint(
    "dataset.job.retry",
    RUSTYFACE,
    m.NameJob,
    m.Job,
    "Take up a job of a dataset that failed or was cancelled.",
)

# By the kind of the job: whoever does it ends it, and takes it up again.
JOB_CANCELS: Mapping[str, Endpoint[m.NameJob, m.Job]] = {
    "import": JOB_CANCEL,
    "gallery": DATASET_JOB_CANCEL,
}
JOB_RETRIES: Mapping[str, Endpoint[m.NameJob, m.Job]] = {
    "import": JOB_RETRY,
    "gallery": DATASET_JOB_RETRY,
}

ENDPOINTS: tuple[Endpoint[m.Message, m.Message], ...] = (  # type: ignore[assignment]
    PLUGINS_LIST, PLUGINS_GET, PLUGINS_START, PLUGINS_STOP, PLUGINS_RESTART, PLUGINS_CONFIGURE,
    PLUGINS_CHECK, PLUGINS_SCALE, PLUGINS_HISTORY, PLUGINS_ROLLBACK,
    HOSTS_LIST, HOSTS_DRAIN, HOSTS_UNDRAIN,
    MODEL_RUN, MODEL_LOAD, MODEL_UNLOAD, MODEL_ALIAS, MODEL_WAKE, CANDLE_STATS,
    MODEL_ADD, MODEL_VALIDATE, MODEL_DESCRIBE, MODEL_REMOVE, MODEL_GC,
    MODEL_IMPORT, JOB_CANCEL, JOB_RETRY,
    FACES_ENCODE, FACES_DETECT, FACES_VERIFY, FACES_SEARCH, FACES_SHEET, DATASET_MANAGE,
    DATASET_JOB_CANCEL, DATASET_JOB_RETRY,
)  # fmt: skip
# One subject per model, and per version of it; see `MODEL_RUN`.
MODEL_INFER = RawEndpoint(
    "candle.model.infer",
    CANDLE,
    "Run tensors through a model: Open Inference Protocol bodies, JSON or binary.",
    keys=("model", "version"),
    idempotent=True,
    example='{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[1,2,3]}]}',
)

RAW_ENDPOINTS = (MODEL_INFER,)

CAPABILITIES: Mapping[str, Endpoint[m.Message, m.Message]] = {e.capability: e for e in ENDPOINTS}

# --- Feeds ----------------------------------------------------------------------------------------

LOG = Feed("log.{plugin}.{slot}.{level}", m.LogEvent)
# The broker republishes what the log stream stored here, with its sequence in a header.
LIVE_LOG = Feed(
    "live.log.{plugin}.{slot}.{level}",
    m.LogEvent,
    sent_by=("broker",),
    heard_by=("gateway", "operator"),
)
TELEMETRY = Feed("telemetry.{plugin}.{slot}", m.TelemetrySnapshot, heard_by=("gateway", "operator"))
STATUS = Feed("status.{plugin}.{slot}", m.InstanceState, sent_by=("supervisor",))
HEALTH = Feed("health.{plugin}.{slot}", m.Heartbeat, heard_by=("supervisor", "operator"))
HOST_TELEMETRY = Feed(
    "hosts.{host}.telemetry",
    m.HostTelemetry,
    sent_by=("supervisor",),
    heard_by=("gateway", "operator"),
)
BROKER_TELEMETRY = Feed(
    "broker.telemetry",
    m.BrokerTelemetry,
    sent_by=("supervisor",),
    heard_by=("gateway", "operator"),
)
LOG_LEVEL = Feed(
    "inst.{plugin}.{slot}.log-level",
    m.SetLogLevel,
    sent_by=("gateway", "operator"),
    heard_by=("instance",),
)
# A caller that has gone, or given up. Every instance hears it; whoever has that request stops.
CANCEL = Feed("cancel", m.CancelCall, sent_by=("instance", "operator"), heard_by=("instance",))
EVENT = Feed(
    "event.{kind}.{name}.{verb}",
    m.Event,
    sent_by=("supervisor",),
    heard_by=("gateway", "operator"),
)
JOB = Feed("job.{job}", m.Job, heard_by=("gateway", "operator"))
GALLERY_HEAD = Feed(
    "gallery.{gallery}.head", m.GalleryHead, sent_by=("rustyface",), heard_by=("rustyface",)
)
GALLERY_ENTRY = Feed(
    "gallery.{gallery}.entry.{entry}",
    m.GalleryEntry,
    sent_by=("rustyface",),
    heard_by=("rustyface",),
)
GALLERY_SETTINGS = Feed(
    "gallery.{gallery}.settings",
    m.GallerySettings,
    sent_by=("rustyface",),
    heard_by=("rustyface",),
)
GALLERY_SUBJECT = Feed(
    "gallery.{gallery}.subject.{subject}",
    m.GallerySubject,
    sent_by=("rustyface",),
    heard_by=("rustyface",),
)
GALLERY_REJECTION = Feed(
    "gallery.{gallery}.rejection.{rejection}",
    m.GalleryRejection,
    sent_by=("rustyface",),
    heard_by=("rustyface",),
)
GALLERY_IMPORT = Feed(
    "gallery.{gallery}.import.{imported}",
    m.GalleryImport,
    sent_by=("rustyface",),
    heard_by=("rustyface",),
)
# The newest of each person, and of what concerns no one person (`subject` is then `-`).
GALLERY_CHANGE = Feed(
    "gallery-history.{gallery}.{subject}",
    m.GalleryChange,
    sent_by=("rustyface",),
    heard_by=("rustyface", "operator"),
)


def instance_calls(root: str, plugin: str, slot: int) -> str:
    """Return where one instance hears everything that it can be asked.

    What follows `call.` there means the same as after `<root>.call.`; but one process is asked,
    not whichever of a queue group the broker picks.
    """
    return f"{root}.inst.{token(plugin)}.{slot}.call.>"


def gallery_events(root: str, gallery: str | None = None) -> str:
    """Return the subject of every event of a gallery, or of all of them."""
    return f"{root}.gallery.>" if gallery is None else f"{root}.gallery.{token(gallery)}.>"


FEEDS = (
    LOG, LIVE_LOG, TELEMETRY, HOST_TELEMETRY, BROKER_TELEMETRY, LOG_LEVEL,
    CANCEL, STATUS, HEALTH, EVENT, JOB, GALLERY_HEAD, GALLERY_SETTINGS, GALLERY_ENTRY,
    GALLERY_SUBJECT, GALLERY_REJECTION, GALLERY_IMPORT, GALLERY_CHANGE,
)  # fmt: skip
