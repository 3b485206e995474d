"""rustyface put together: what is made of an encoder and the settings, and handed to each other."""

from pathlib import Path

from bus.client import Client
from bus.instance import Instance
from bus.subjects import (
    DATASET_MANAGE,
    FACES_DETECT,
    FACES_ENCODE,
    FACES_SEARCH,
    FACES_SHEET,
    FACES_VERIFY,
)
from services.rustyface import calibration
from services.rustyface.calibration import Thresholds
from services.rustyface.faces import Faces
from services.rustyface.galleries.galleries import Galleries
from services.rustyface.manage import Manage
from services.rustyface.photos.encoder import Encoder
from services.rustyface.photos.kept import KeptImages
from services.rustyface.photos.workers import Workers
from services.rustyface.service import Rustyface
from services.rustyface.settings import RustyfaceSettings
from services.rustyface.sheets.sheet import Sheets
from services.rustyface.transfers.transfer import GalleryJobs


def assemble(
    client: Client,
    instance: Instance,
    encoder: Encoder,
    settings: RustyfaceSettings,
    datasets_dir: Path | None,
    cache_dir: Path,
) -> Rustyface:
    """Return a worker that is ready to run.

    Args:
        client: The bus.
        instance: This process's place on it.
        encoder: Makes the vectors.
        settings: How.
        datasets_dir: Dataset files in it are taken in at the start; None for none.
        cache_dir: Where files lie while they are imported or exported.
    """
    store = client.store
    kept = KeptImages(store.faces)
    galleries = Galleries(
        store.galleries,
        client.root,
        encoder.name,
        encoder.dimensions,
        digest=encoder.digest,
        changes=store.changes,
        drop_image=kept.drop,
    )
    thresholds = Thresholds(encoder.name)
    if own := settings.own_embedder:
        verify = own.threshold if own.verify_threshold is None else own.verify_threshold
        thresholds = Thresholds(encoder.name, own.threshold, verify)
    workers = Workers(settings.max_waiting)
    faces = Faces(galleries, encoder, workers, kept, thresholds, settings.default_dataset)
    jobs = GalleryJobs(client, instance, galleries, encoder, cache_dir / "transfers")
    manage = Manage(galleries, jobs, thresholds.both, calibration.expected_false)
    sheets = Sheets(
        galleries,
        store.faces,
        faces.detect,
        faces.search,
        max_bytes=client.max_payload,
        max_pixels=encoder.max_pixels,
    )
    return Rustyface(
        instance,
        galleries,
        answers=(
            (FACES_ENCODE, faces.encode),
            (FACES_SEARCH, faces.search),
            (FACES_DETECT, faces.detect),
            (FACES_VERIFY, faces.verify),
            (FACES_SHEET, sheets.answer),
            (DATASET_MANAGE, manage.answer),
        ),
        workers=workers,
        thresholds=thresholds,
        settings=settings,
        datasets_dir=datasets_dir,
        beside=(jobs.serving,),
    )
