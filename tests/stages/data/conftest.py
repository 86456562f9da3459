"""Tiny archives of the layout that package packs have."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from stages.data import packs


def tar_of(members: dict[str, bytes], link: bool = True) -> bytes:
    """A tar.gz with the given files, and a symbolic link of that name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(info)
    return buffer.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def make_tar():
    return tar_of


@pytest.fixture
def make_zip():
    return zip_of


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Enter a pack of the given content, present in ``tmp_path``, which becomes the cache."""

    def enter(name: str, archive: str, content: bytes) -> packs.Pack:
        pin = packs.Pack(name, "1.0", archive, hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(packs.PACKS, name, pin)
        monkeypatch.setenv("MOE_RELIABILITY_CACHE", str(tmp_path))
        (tmp_path / archive).write_bytes(content)
        return pin

    return enter
