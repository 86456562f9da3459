import hashlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from stages.data import packs
from stages.errors import StageFailed


def test_a_cached_archive_is_returned_and_a_changed_one_is_refused(tmp_path, install, make_zip):
    pin = install("toy", "toy-1.0-py3-none-any.whl", make_zip({"a": b"1"}))
    assert packs.fetch("toy") == tmp_path / pin.archive
    (tmp_path / pin.archive).write_bytes(b"PK something else")
    with pytest.raises(StageFailed) as caught:
        packs.fetch("toy")
    message = str(caught.value)
    found = hashlib.sha256(b"PK something else").hexdigest()
    for part in ("toy", pin.archive, pin.sha256, found):
        assert part in message
    command = f"-m pip download --no-deps --only-binary :all: --dest {tmp_path} toy==1.0"
    assert message.endswith(command)
    assert "\n" not in message


def test_a_source_archive_is_obtained_without_wheels(tmp_path):
    pin = packs.PACKS["vader"]
    assert pin.command(tmp_path).endswith(
        f"--no-deps --no-binary vaderSentiment --dest {tmp_path} vaderSentiment==3.3.2"
    )


def test_download_through_pip_checks_the_hash_and_leaves_nothing_behind(
    monkeypatch, tmp_path, make_zip
):
    """pip itself is run, on an index that is a folder."""
    metadata = "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n"
    wheel = make_zip(
        {
            "toy/data.txt": b"payload",
            "toy-1.0.dist-info/METADATA": metadata.encode(),
            "toy-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
            b"Tag: py3-none-any\n",
            "toy-1.0.dist-info/RECORD": b"",
        }
    )
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    name = "toy-1.0-py3-none-any.whl"
    (index / name).write_bytes(wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    right = packs.Pack("toy", "1.0", name, hashlib.sha256(wheel).hexdigest())
    monkeypatch.setitem(packs.PACKS, "toy", right)

    archive = packs.fetch("toy", cache)
    assert packs.read_member(archive, "toy/data.txt") == b"payload"
    assert sorted(path.name for path in cache.iterdir()) == [".lock", name]

    archive.unlink()
    monkeypatch.setitem(packs.PACKS, "toy", packs.Pack("toy", "1.0", name, "0" * 64))
    with pytest.raises(StageFailed, match="could not be downloaded.*0{64}|0{64}.*could not"):
        packs.fetch("toy", cache)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_the_build_script_of_a_source_archive_with_a_wrong_hash_never_runs(
    monkeypatch, tmp_path, make_tar
):
    ran = tmp_path / "ran"
    backend = f"""
import pathlib
pathlib.Path({str(ran)!r}).touch()
def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder, "toy-1.0.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: toy\\nVersion: 1.0\\n")
    return info.name
def build_wheel(*arguments):
    raise NotImplementedError
"""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    members = {"toy-1.0/pyproject.toml": project, "toy-1.0/backend.py": backend}
    content = make_tar({name: text.encode() for name, text in members.items()}, link=False)
    index, cache, archive = tmp_path / "index", tmp_path / "cache", "toy-1.0.tar.gz"
    index.mkdir()
    (index / archive).write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    monkeypatch.setitem(packs.PACKS, "toy", packs.Pack("toy", "1.0", archive, "0" * 64))
    with pytest.raises(StageFailed, match="could not be downloaded"):
        packs.fetch("toy", cache)
    assert not ran.exists()
    pin = packs.Pack("toy", "1.0", archive, hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(packs.PACKS, "toy", pin)
    assert packs.fetch("toy", cache).read_bytes() == content
    assert ran.exists()  # which is why the hash comes first


def test_concurrent_fetchers_all_get_the_whole_archive(monkeypatch, tmp_path, make_zip):
    content = make_zip({"a": b"1" * 1000})
    pin = packs.Pack("toy", "1.0", "toy.whl", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(packs.PACKS, "toy", pin)

    downloads = []

    def slow_download(name, pack, folder, cache):
        downloads.append(folder)
        target = folder / pack.archive
        with target.open("wb") as file:
            for byte in content:
                file.write(bytes([byte]))
                file.flush()
        time.sleep(0.05)
        return target

    monkeypatch.setattr(packs, "_download", slow_download)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(packs.fetch("toy", tmp_path).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "toy.whl"]
    assert len(downloads) == 1  # the others waited


KILLED = """
import os, signal, sys
from pathlib import Path
from stages.data import packs
packs.PACKS["toy"] = packs.Pack("toy", "1.0", "toy.whl", "0" * 64)
def half(name, pack, folder, cache):
    (folder / "part").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
packs._download = half
packs.fetch("toy", Path(sys.argv[1]))
"""


def test_what_a_killed_download_left_is_removed_by_the_next(monkeypatch, tmp_path, make_zip):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    left, = tmp_path.glob(".download-*")
    assert (left / "part").exists()
    content = make_zip({"a": b"1"})
    pin = packs.Pack("toy", "1.0", "toy.whl", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(packs.PACKS, "toy", pin)

    def download(name, pack, folder, cache):
        (folder / "toy.whl").write_bytes(content)
        return folder / "toy.whl"

    monkeypatch.setattr(packs, "_download", download)
    packs.fetch("toy", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "toy.whl"]


def test_members_of_zip_tar_and_nested_tar(tmp_path, make_tar, make_zip):
    wheel, source = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    wheel.write_bytes(make_zip({"a/b.txt": b"zipped"}))
    inner = make_tar({"deep/c.txt": b"nested\r\n"})
    source.write_bytes(make_tar({"x/b.txt": b"tarred", "x/inner.tar.gz": inner}))
    assert packs.read_member(wheel, "a/b.txt") == b"zipped"
    assert packs.read_member(source, "x/b.txt") == b"tarred"
    assert packs.read_member(source, "x/inner.tar.gz", "deep/c.txt") == b"nested\r\n"
    packs.extract_member(source, "x/b.txt", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"tarred"


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt", ".bin"])
def test_pickles_are_refused_by_suffix(tmp_path, suffix, make_zip):
    archive = tmp_path / "a.whl"
    archive.write_bytes(make_zip({f"weights{suffix}": b"x"}))
    with pytest.raises(StageFailed, match="never read"):
        packs.read_member(archive, f"weights{suffix}")
    with pytest.raises(StageFailed, match="never read"):
        packs.extract_member(archive, f"weights{suffix}", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_links_missing_members_and_large_ones_are_refused(tmp_path, make_tar, make_zip):
    wheel, source = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    wheel.write_bytes(make_zip({"big": b"0" * 101}))
    source.write_bytes(make_tar({"big": b"0" * 101}))
    with pytest.raises(StageFailed, match="no regular file link"):
        packs.read_member(source, "link")
    for archive in (wheel, source):
        with pytest.raises(StageFailed, match="absent"):
            packs.read_member(archive, "absent")
        assert len(packs.read_member(archive, "big", limit=101)) == 101
        with pytest.raises(StageFailed, match="101 bytes, more than the limit of 100"):
            packs.read_member(archive, "big", limit=100)
