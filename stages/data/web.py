"""One file over HTTP, whose download goes on where it was interrupted.

The transfer is huggingface_hub's ``http_get``: it asks for the rest of a file, takes up a
connection that breaks, and begins anew where a server answers with the whole. Whether the rest
belongs to what is here it leaves to its caller: a digest or a commit's address tells, or else the
server's own validator, which is stored beside the partial file and sent as If-Range (RFC 9110).
"""

import os
from pathlib import Path

from stages.data import files


def download(
    url: str,
    path: Path,
    sha256: str | None,
    headers: dict[str, str] | None = None,
    size: int | None = None,
) -> None:
    """Download one file to ``path``, from ``path.part`` on where an earlier try left one.

    ``size`` in bytes is given where the address stands for a content that never changes. Only one
    process may do this for a path at a time. Raises OSError where the server refuses or the file is
    not the expected one, and the HTTP library's error where the connection breaks for good.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    part, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.validator")
    # Ranges count the bytes that are sent, which are the file's only where nothing packs them.
    headers = {**(headers or {}), "Accept-Encoding": "identity"}
    # A server refuses to go on with what is whole already.
    if not (sha256 and part.exists() and files.digest(part) == sha256):
        if sha256 is None and size is None:
            validator, size = _state(url, headers)
            if not (validator and tag.exists() and tag.read_text() == validator):
                part.unlink(missing_ok=True)
            if validator:
                tag.write_text(validator)
                # Beside no Range, as in the first request, a server ignores it.
                headers["If-Range"] = validator
        try:
            with part.open("ab") as file:
                http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=size)
        except HfHubHTTPError as error:
            if error.response.status_code == 416:  # longer than the file is by now
                part.unlink()
            raise
    if sha256 is not None and (found := files.digest(part)) != sha256:
        part.unlink()
        raise OSError(f"it has sha256 {found}, expected {sha256}")
    os.replace(part, path)
    tag.unlink(missing_ok=True)


def _state(url: str, headers: dict[str, str]) -> tuple[str | None, int | None]:
    """What tells one content of an address from another, and its size in bytes.

    Neither, where the server tells only one of them: a file whose size is unknown may be whole.
    """
    from huggingface_hub import constants, get_session

    answer = get_session().head(url, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    tag = answer.headers.get("ETag", "")
    # A weak tag stands for any content of the same meaning, so not for the same bytes.
    validator = tag if tag.startswith('"') else answer.headers.get("Last-Modified")
    size = answer.headers.get("Content-Length")
    # 0 is what some servers say of a file that they make only when it is asked for.
    if answer.status_code != 200 or validator is None or not int(size or 0):
        return None, None
    return validator, int(size)
