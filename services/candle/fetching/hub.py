"""Addresses of the Hugging Face hub, `hf://owner/repo/file@revision`, as what to fetch."""

import os
import re
from typing import Final

from yarl import URL

from bus.errors import InvalidRequest, Unprocessable
from services.candle.fetching.downloads import Wanted

SCHEME: Final = "hf://"
# Of a file that is kept apart from git, the hub says the SHA-256 before it sends anybody on to it.
DIGEST_HEADER: Final = "X-Linked-Etag"
_PART: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ADDRESS: Final = re.compile(
    rf"hf://(?P<repo>{_PART}/{_PART})/(?P<file>[^@?#]+?)(?:@(?P<revision>[^@?#\s]{{1,200}}))?"
)


def is_hub(url: str) -> bool:
    """Tell whether an address is one of the hub."""
    return url.strip().lower().startswith(SCHEME)


def parts_of(url: str) -> tuple[str, str, str | None]:
    """Return repository, file and revision.

    Raises:
        InvalidRequest: It is no address of a file there.
    """
    found = _ADDRESS.fullmatch(url.strip())
    if found is None or {"", ".", ".."} & set(found["file"].split("/")):
        raise InvalidRequest(
            f"url: {url.strip()[:200]!r} is no file of the hub; the form is "
            "hf://owner/repo/file@revision",
            field="url",
        )
    return found["repo"], found["file"], found["revision"]


def on_the_hub(url: str, token: str | None) -> Wanted:
    """Return what to fetch for an address of the hub.

    Args:
        url: The address.
        token: What the hub is shown; `HF_TOKEN`, or what `hf auth login` has left, if not given.

    Raises:
        InvalidRequest: It is no address of a file there.
        Unprocessable: huggingface_hub is not installed.
    """
    repo, file, revision = parts_of(url)
    try:
        import huggingface_hub as hub  # noqa: PLC0415 - an extra, and slow to load
    except ImportError:
        raise Unprocessable(
            "hf:// needs the package huggingface_hub: install bkg with its extra, "
            "pip install 'bkg[hub]'",
            field="url",
        ) from None
    # Read anew: the library has read it when it was loaded.
    endpoint = os.environ.get("HF_ENDPOINT")
    address = hub.hf_hub_url(
        repo, file, revision=revision, endpoint=endpoint.rstrip("/") if endpoint else None
    )
    known = token or hub.get_token()
    headers = {"Authorization": f"Bearer {known}"} if known else {}
    return Wanted(url=URL(address, encoded=True), headers=headers, digest_header=DIGEST_HEADER)
