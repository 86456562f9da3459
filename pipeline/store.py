"""The artifact store: one folder per node, finished when its manifest lies there.

Layout, on a local folder or any file system that pyarrow knows (``s3://``, ``gs://``)::

    <stage>/<name>@<fingerprint>/
        manifest.json        written last; names the attempt that it stands for
        attempt-<id>/        the files of one attempt
        progress.json        how far the running attempt is
        responses/, train/   resumable work: shards of responses, training checkpoints
        unjudged.json        judges that failed when they were asked, by role, with the reason

Work happens in an attempt's own folder, so two writers of one node cannot mix, and no rename is
needed. A folder without a manifest is unfinished and never read. On a remote store an attempt is
written to a local temporary folder and uploaded before its manifest; finished nodes are downloaded
once per machine.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from stages.errors import BadInput

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
UNJUDGED = "unjudged.json"
WEIGHTS = ".safetensors"
"""How the names of files end that hold a model's weights."""


class Store:
    """An artifact store at a folder or URI."""

    def __init__(self, uri: str):
        """``uri`` is a local folder or ``SCHEME://BUCKET/FOLDER``."""
        if "://" in uri and not uri.startswith("file://"):
            try:
                self.fs, self.root = fs.FileSystem.from_uri(uri)
            except (ValueError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise BadInput(f"--store {uri}: {reason}; name a folder, s3:// or gs://") from None
            self.uri = uri.rstrip("/")
            self.local = False
        else:
            self.root = str(Path(uri.removeprefix("file://")).resolve())
            self.fs = fs.LocalFileSystem()
            self.uri = self.root
            self.local = True

    def check_writable(self) -> None:
        """Raise ``BadInput`` if nothing can be written to the store."""
        probe = f"{self.root}/.probe-{uuid.uuid4().hex[:8]}"
        try:
            self.fs.create_dir(self.root, recursive=True)
            with self.fs.open_output_stream(probe) as stream:
                stream.write(b"ok")
            self.fs.delete_file(probe)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"--store {self.uri}: cannot be written ({reason}); "
                           "choose a folder you own, or mend its permissions") from None

    # Reading

    def folders(self, stage: str) -> set[str]:
        """Names of all node folders of a stage, finished or not."""
        selector = fs.FileSelector(f"{self.root}/{stage}", allow_not_found=True)
        return {
            info.base_name
            for info in self.fs.get_file_info(selector)
            if info.type == fs.FileType.Directory
        }

    def finished(self, folders: Iterable[str]) -> set[str]:
        """Those of the node folders (``<stage>/<name>@<fingerprint>``) that hold a manifest."""
        folders = list(folders)
        infos = self.fs.get_file_info([f"{self.root}/{f}/{MANIFEST}" for f in folders])
        return {
            folder for folder, info in zip(folders, infos, strict=True)
            if info.type == fs.FileType.File
        }

    def read_json(self, path: str) -> dict | None:
        """A JSON file of the store, or None where there is none."""
        try:
            with self.fs.open_input_stream(f"{self.root}/{path}") as stream:
                return json.loads(stream.read())
        except FileNotFoundError:
            return None

    def read_bytes(self, path: str) -> bytes:
        """A file of the store, whole."""
        with self.fs.open_input_stream(f"{self.root}/{path}") as stream:
            return stream.read()

    def open(self, path: str) -> pa.NativeFile:
        """A file of the store, to be read in part."""
        return self.fs.open_input_file(f"{self.root}/{path}")

    def manifest(self, folder: str) -> dict | None:
        """The manifest of a node folder, or None if it is unfinished."""
        return self.read_json(f"{folder}/{MANIFEST}")

    def attempt_of(self, folder: str) -> str:
        """The attempt that a finished node stands for, as ``<node folder>/<attempt>``."""
        manifest = self.manifest(folder)
        if manifest is None:
            raise FileNotFoundError(f"{self.uri}/{folder} holds no manifest")
        return f"{folder}/{manifest['attempt']}"

    def fetch(self, folder: str, weights: bool = True) -> Path:
        """A local folder with the files of a finished node, or all but a model's weights."""
        attempt = self.attempt_of(folder)
        if self.local:
            return Path(self.root) / attempt
        cached = self._cache() / ("" if weights else "no-weights") / attempt
        if not cached.exists():
            partial = cached.with_name(f"{cached.name}-{uuid.uuid4().hex[:8]}")
            skipped = () if weights else (WEIGHTS,)
            _copy(self.fs, f"{self.root}/{attempt}", fs.LocalFileSystem(), str(partial), skipped)
            try:
                partial.rename(cached)
            except OSError:  # another process was first
                shutil.rmtree(partial)
        return cached

    def download(self, path: str) -> Path | None:
        """A local folder with the files of a folder that changes; None where there is none."""
        if self.fs.get_file_info(f"{self.root}/{path}").type != fs.FileType.Directory:
            return None
        if self.local:
            return Path(self.root) / path
        local = self._cache() / path
        shutil.rmtree(local, ignore_errors=True)
        _copy(self.fs, f"{self.root}/{path}", fs.LocalFileSystem(), str(local))
        return local

    def _cache(self) -> Path:
        key = self.uri.replace("://", "-").replace("/", "-")
        folder = Path(tempfile.gettempdir()) / f"moe-reliability-{os.getuid()}" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # Writing

    def path(self, folder: str) -> str:
        """Where a node's folder lies, for libraries that write into the store themselves."""
        return f"{self.uri}/{folder}"

    def write_json(self, path: str, content: dict) -> None:
        """Write a JSON file whole: a reader sees the old content or the new, never a part."""
        data = json.dumps(content, indent=1).encode()
        self.write_bytes(path, data)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file whole (on a local store by rename, elsewhere uploads are atomic)."""
        target = f"{self.root}/{path}"
        self.fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
        if not self.local:
            with self.fs.open_output_stream(target) as stream:
                stream.write(data)
            return
        partial = f"{target}.{uuid.uuid4().hex[:8]}"
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)

    @contextmanager
    def attempt(self, folder: str) -> Iterator[tuple[str, Path]]:
        """An attempt's id and the local folder that it writes; uploaded at the end, if remote.

        Files of a failed attempt are removed. ``commit`` makes a finished one count.
        """
        attempt = f"attempt-{uuid.uuid4().hex[:8]}"
        if self.local:
            output = Path(self.root) / folder / attempt
            output.mkdir(parents=True)
        else:
            output = Path(tempfile.mkdtemp(prefix="moe-reliability-"))
        try:
            yield attempt, output
            if not self.local:
                _copy(fs.LocalFileSystem(), str(output), self.fs,
                      f"{self.root}/{folder}/{attempt}")
        except BaseException:
            shutil.rmtree(output, ignore_errors=True)
            raise
        if not self.local:
            shutil.rmtree(output)

    def commit(self, folder: str, manifest: dict) -> None:
        """Make the attempt that the manifest names the node's result."""
        self.write_json(f"{folder}/{MANIFEST}", manifest)

    def publish(self, folder: Path, path: str) -> None:
        """Copy the files of a local folder to a place in the store, replacing what was there."""
        self.delete(path)
        _copy(fs.LocalFileSystem(), str(folder), self.fs, f"{self.root}/{path}")

    def delete(self, path: str) -> None:
        """Delete a folder of the store; nothing happens where there is none."""
        if self.fs.get_file_info(f"{self.root}/{path}").type == fs.FileType.Directory:
            self.fs.delete_dir(f"{self.root}/{path}")

    def size(self, folder: str) -> int:
        """Bytes of all files under a folder."""
        selector = fs.FileSelector(f"{self.root}/{folder}", recursive=True, allow_not_found=True)
        return sum(info.size or 0 for info in self.fs.get_file_info(selector))

    def files(self, folder: str) -> set[str]:
        """Names of the files directly in a folder."""
        selector = fs.FileSelector(f"{self.root}/{folder}", allow_not_found=True)
        return {
            info.base_name
            for info in self.fs.get_file_info(selector)
            if info.type == fs.FileType.File
        }


def _copy(
    source: fs.FileSystem,
    folder: str,
    target: fs.FileSystem,
    path: str,
    skipped: tuple[str, ...] = (),
) -> None:
    """Copy a folder between file systems, without the files whose name ends with one of
    ``skipped``."""
    target.create_dir(path, recursive=True)
    if not skipped:
        fs.copy_files(folder, path, source_filesystem=source, destination_filesystem=target)
        return
    for info in source.get_file_info(fs.FileSelector(folder, recursive=True)):
        if info.type == fs.FileType.File and not info.base_name.endswith(skipped):
            to = f"{path}/{info.path.removeprefix(folder).lstrip('/')}"
            target.create_dir(to.rpartition("/")[0], recursive=True)
            fs.copy_files(info.path, to, source_filesystem=source, destination_filesystem=target)
