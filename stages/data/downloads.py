"""Bringing a published data set to this machine, and telling whether it is there.

Files lie beside the package packs, at a place named for their address, so that a commit names its
own place. A download that was interrupted, by a broken connection or a kill, goes on where it
stopped (the hub library's own cache would begin a file anew), unless it has changed since; two
processes never write the same file.
"""

import fnmatch
import hashlib
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from stages.data import web
from stages.data.packs import default_cache
from stages.data.published import Hub, Published
from stages.errors import StageFailed


def bring(name: str, published: Published, split: str) -> list[Path]:
    """The files of a split, downloaded where they are not here yet.

    ``name`` begins the messages. Raises StageFailed, with what to do about it, for what cannot be
    had.
    """
    found = present(published, split)
    if found:
        return found
    part = published.splits[split]
    own = f"get {published.files} and set source: file:PATH and format: {name}"
    if part.web is None and not (published.hub and part.files):
        ask = f"; access: {published.gated}" if published.gated else ""
        raise StageFailed(f"catalogue:{name}: cannot be downloaded{ask}; {own}")
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        if part.web is not None:
            return [_fetch(part.web.url, _place(part.web.url), part.web.sha256)]
        return _fetch_hub(published.hub, part.files)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        ask = published.gated or "check HF_TOKEN"
        raise StageFailed(
            f"catalogue:{name}: the hub does not give out {published.hub.repository}: {ask}; "
            f"or {own}"
        ) from error
    except Exception as error:  # of many libraries: network, HTTP, disk
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        pack = f"set source: {published.pack}, or " if published.pack else ""
        raise StageFailed(
            f"catalogue:{name}: {published.where(split)} could not be downloaded: {reason}; "
            f"check the network and run again, or {pack}{own}"
        ) from error


def present(published: Published, split: str) -> list[Path]:
    """The files of a split that are already on this machine; none where one is missing."""
    part = published.splits[split]
    if part.web is not None:
        path = _place(part.web.url)
        return [path] if path.exists() else []
    if published.hub is None or not part.files:
        return []
    listing = _listing(published.hub, part.files)
    if not listing.exists():
        return []
    return [listing.parent / name for name in json.loads(listing.read_text())]


def _fetch_hub(hub: Hub, patterns: tuple[str, ...]) -> list[Path]:
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    where = {"repo_type": "dataset", "revision": hub.revision}
    listed = sorted(HfApi().list_repo_files(hub.repository, **where))
    names = [n for pattern in patterns for n in listed if fnmatch.fnmatchcase(n, pattern)]
    if not names:
        raise FileNotFoundError(f"it has no file {' or '.join(patterns)}")
    listing = _listing(hub, patterns)
    for name in names:
        url = hf_hub_url(hub.repository, name, **where)
        headers = build_hf_headers()
        about = get_hf_file_metadata(url, headers=headers)
        if urlsplit(about.location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # the token is for the hub alone
        large = about.etag if re.fullmatch(r"[0-9a-f]{64}", about.etag or "") else None
        # A branch may have moved on under what an earlier try left.
        size = about.size if hub.pinned else None
        _fetch(about.location, listing.parent / name, large, headers, size)
    listing.write_text(json.dumps(names))
    return [listing.parent / name for name in names]


def _fetch(
    url: str,
    path: Path,
    sha256: str | None,
    headers: dict | None = None,
    size: int | None = None,
) -> Path:
    """Download one file unless it is here; raises OSError where it is not the expected one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            web.download(url, path, sha256, headers, size)
    return path


def _place(url: str) -> Path:
    address = urlsplit(url)
    return default_cache().parent / "files" / address.netloc / address.path.lstrip("/")


def _listing(hub: Hub, patterns: tuple[str, ...]) -> Path:
    """The file that names what was brought for some patterns, written when all of it is here."""
    folder = _place(f"//huggingface.co/datasets/{hub.repository}/{hub.revision}")
    return folder / f".{hashlib.sha256(json.dumps(patterns).encode()).hexdigest()[:12]}.json"
