"""Downloads against a server of our own that forgets half of what it sends."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from stages.data import downloads, packs, sources, web
from stages.data.catalogue import CATALOGUE
from stages.data.published import Split, Web
from stages.data.spec import DataSpec
from stages.errors import StageFailed

PROMPTS = [f"prompt {number}" for number in range(40)]
CONTENT = json.dumps({"instructions": PROMPTS, "inputs": []}).encode()
DIGEST = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "a" * 40
TOY = "the_toy-1.0-py3-none-any.whl"
ROWS = b"".join(
    json.dumps({"premise": f"p{n}", "hypothesis": "h", "gold": "neutral"}).encode() + b"\n"
    for n in range(30)
)


@pytest.fixture
def server():
    """Serves CONTENT, and a hub with ROWS as test.jsonl of owner/name.

    ``cut`` breaks the next body off after so many bytes, ``down`` refuses bodies, ``tag`` is the
    ETag of ``content``, which /index lists as the archive of project toy.
    """
    state = SimpleNamespace(ranges=[], cut=0, gated=False, tokens=set(), down=False, tag=None,
                            content=CONTENT, asked=[])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            headers, content = {"ETag": state.tag} if state.tag else {}, state.content
            state.tokens.add(self.headers.get("Authorization"))
            if self.path == "/index/the-toy/":
                page = f'<a href="../../files/{TOY}#sha256=0">{TOY}</a>'.encode()
                return self.send(200, page, {}, body)
            if body and self.path.startswith(("/here", "/files")):
                state.asked.append((self.headers["Range"], self.headers["If-Range"]))
                if state.down:
                    return self.send(503, b"", {}, body)
            if self.path.startswith("/absent"):
                return self.send(404, b"{}", {}, body)
            if self.path.startswith(("/api", "/datasets")) and state.gated:
                return self.send(401, b"{}", {"X-Error-Code": "GatedRepo"}, body)
            if "/revision/" in self.path:
                found = {"id": "owner/name", "sha": COMMIT,
                         "siblings": [{"rfilename": n} for n in ("README.md", "test.jsonl")]}
                return self.send(200, json.dumps(found).encode(), {}, body)
            if "/tree/" in self.path:
                found = [{"type": "file", "path": "test.jsonl", "oid": "1", "size": len(ROWS)}]
                return self.send(200, json.dumps(found).encode(), {}, body)
            if self.path.startswith("/datasets"):
                content = ROWS
                headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT}
            self.send(200, content, headers, body)

        def send(self, status, content, headers, body):
            start = 0
            same = self.headers["If-Range"] in (None, headers.get("ETag"))
            if body and status == 200 and "Range" in self.headers and same:
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    return self.send(416, b"", {}, body)
                status = 206
                headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            file = not self.path.startswith(("/api", "/index")) and status in (200, 206)
            if body and file:
                state.ranges.append(start)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if not body:
                return
            if state.cut and file:
                self.wfile.write(content[start:start + state.cut])
                self.close_connection = True
                state.cut, state.down = 0, state.down is None
            else:
                self.wfile.write(content[start:])

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{found.server_port}"
    yield state
    found.shutdown()
    found.server_close()


@pytest.fixture
def entered(monkeypatch, tmp_path, server):
    """Enter the server's file as a data set of the catalogue."""
    monkeypatch.setenv("MOE_RELIABILITY_CACHE", str(tmp_path / "cache" / "packs"))

    def enter(path="/here.json", sha256=DIGEST):
        web = Web(server.url + path, sha256)
        made = replace(CATALOGUE["alpaca_control"], splits={"test": Split(web=web, rows=40)})
        monkeypatch.setitem(CATALOGUE, "ours", made)
        return made

    return enter


def load():
    return sources.load(DataSpec(task="prompts", source="catalogue:ours"))


def test_a_file_is_downloaded_once_checked_and_read(entered, server, tmp_path):
    made = entered()
    assert downloads.present(made, "test") == []
    loaded = load()
    assert loaded.table["prompt"].to_pylist() == PROMPTS and loaded.note == ""
    path, = downloads.present(made, "test")
    assert path.is_relative_to(tmp_path / "cache" / "files")
    assert loaded.files == {"here.json": DIGEST}
    load()
    assert server.ranges == [0]
    assert {found.suffix for found in path.parent.iterdir()} == {".json", ".lock"}


def test_an_interrupted_download_goes_on_where_it_stopped(entered, server):
    made = entered()
    path = downloads._place(made.splits["test"].web.url)
    path.parent.mkdir(parents=True)
    path.with_name("here.json.part").write_bytes(CONTENT[:100])  # what a kill leaves
    assert load().table.num_rows == 40
    assert server.ranges == [100]


def test_what_a_kill_left_whole_is_kept_and_what_nothing_identifies_begins_anew(entered, server):
    """A server refuses to go on behind the end of a file."""
    for sha256, left, asked in ((DIGEST, CONTENT, []), (None, CONTENT, [0]), (None, b"old", [0])):
        made = entered(sha256=sha256)
        path = downloads._place(made.splits["test"].web.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.with_name("here.json.part").write_bytes(left)
        server.ranges.clear()
        assert load().table["prompt"].to_pylist() == PROMPTS
        assert server.ranges == asked


def test_what_is_longer_than_the_file_begins_anew_at_the_next_try(entered, server):
    made = entered()
    path = downloads._place(made.splits["test"].web.url)
    path.parent.mkdir(parents=True)
    path.with_name("here.json.part").write_bytes(CONTENT + b"of an older one")
    with pytest.raises(StageFailed, match="416"):
        load()
    assert load().table.num_rows == 40
    assert server.ranges == [0]


def test_a_connection_that_breaks_is_taken_up_again(entered, server, monkeypatch):
    # The library writes, and so resumes, in steps of this size; 10 MiB otherwise.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16)
    entered()
    server.cut = 64
    assert load().table.num_rows == 40
    assert server.ranges == [0, 64]


@pytest.fixture
def breaking(server, monkeypatch):
    """The server breaks off after 64 bytes and is down then, so that the first try fails."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16)
    server.cut, server.down, server.tag = 64, None, '"one"'
    return server


def test_without_a_checksum_the_servers_tag_says_what_to_go_on_with(entered, breaking):
    made = entered(sha256=None)
    path = downloads._place(made.splits["test"].web.url)
    with pytest.raises(StageFailed, match="503"):
        load()
    assert path.with_name("here.json.part").read_bytes() == CONTENT[:64]
    breaking.down = False
    assert load().files == {"here.json": DIGEST}
    assert breaking.asked == [
        (None, '"one"'), ("bytes=64-", '"one"'), ("bytes=64-", '"one"')]
    assert breaking.ranges == [0, 64]
    assert {found.name for found in path.parent.iterdir()} == {"here.json", "here.json.lock"}


def test_without_a_checksum_a_file_that_changed_begins_anew(entered, breaking):
    """Between two tries, and under a try: the server then answers with the whole."""
    made = entered(sha256=None)
    path = downloads._place(made.splits["test"].web.url)
    with pytest.raises(StageFailed, match="503"):
        load()
    other = CONTENT.replace(b"prompt", b"demand")
    breaking.down, breaking.tag, breaking.content = False, '"two"', other
    assert load().table["prompt"][0].as_py() == "demand 0"
    assert breaking.asked[2:] == [(None, '"two"')] and path.read_bytes() == other

    part, tag = path.with_name("here.json.part"), path.with_name("here.json.validator")
    path.rename(part)
    os.truncate(part, 64)
    tag.write_text('"two"')
    told = web._state

    def changes_after_it_told(*arguments):
        found = told(*arguments)
        breaking.tag, breaking.content = '"one"', CONTENT
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "_state", changes_after_it_told)
        assert load().files == {"here.json": DIGEST}
    assert breaking.asked[3:] == [("bytes=64-", '"two"')] and breaking.ranges[-1] == 0


def test_a_size_of_none_is_not_believed(entered, breaking, monkeypatch):
    """Of what a server makes when it is asked for, it may say 0 bytes beforehand."""
    entered(sha256=None)
    breaking.cut, breaking.down = 0, False
    from huggingface_hub import get_session

    class Silent:
        def head(self, *arguments, **options):
            answer = get_session().head(*arguments, **options)
            answer.headers["Content-Length"] = "0"
            return answer

    monkeypatch.setattr("huggingface_hub.get_session", Silent)
    assert load().files == {"here.json": DIGEST}


def test_a_weak_tag_tells_nothing_about_bytes(entered, breaking):
    entered(sha256=None)
    breaking.tag = 'W/"one"'
    with pytest.raises(StageFailed, match="503"):
        load()
    breaking.down = False
    assert load().files == {"here.json": DIGEST}
    assert breaking.asked[2:] == [(None, None)]


def test_a_pack_goes_on_where_it_stopped(breaking, monkeypatch, tmp_path):
    """Its index is the one that pip is configured for."""
    monkeypatch.setenv("PIP_INDEX_URL", f"{breaking.url}/index")
    monkeypatch.setitem(packs.PACKS, "toy", packs.Pack("The.Toy", "1.0", TOY, DIGEST))
    part = tmp_path / f"{TOY}.part"
    # What a kill left is gone on with, and so is what a connection brought before it broke.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr(packs, "_download", None)  # pip would begin anew
    part.write_bytes(CONTENT[:32])
    breaking.down = False
    assert packs.fetch("toy", tmp_path).read_bytes() == CONTENT
    assert breaking.asked == [("bytes=32-", None), ("bytes=96-", None)]
    assert sorted(found.name for found in tmp_path.iterdir()) == [".lock", TOY]


def test_a_pack_that_breaks_off_says_how_to_go_on(breaking, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", f"{breaking.url}/index")
    monkeypatch.setitem(packs.PACKS, "toy", packs.Pack("The.Toy", "1.0", TOY, DIGEST))
    monkeypatch.setattr(packs, "_download", None)
    get = "huggingface_hub.file_download.http_get"

    def breaks(url, file, **_):
        file.write(CONTENT[:10])
        raise ConnectionResetByPeer("gone")

    class ConnectionResetByPeer(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get, breaks)
        with pytest.raises(StageFailed, match="broke off after 10 bytes: gone; run again to go on"):
            packs.fetch("toy", tmp_path)
    breaking.cut, breaking.down = 0, False
    assert packs.fetch("toy", tmp_path).read_bytes() == CONTENT
    assert breaking.asked == [("bytes=10-", None)]


def test_an_index_without_the_archive_is_left_to_pip(breaking, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", f"{breaking.url}/index")
    pack = packs.Pack("The.Toy", "1.1", "the_toy-1.1-py3-none-any.whl", DIGEST)
    assert packs._listed(pack) is None
    monkeypatch.setenv("PIP_INDEX_URL", f"{breaking.url.replace('//', '//user:word@')}/index")
    assert packs._indexes() == []
    monkeypatch.setenv("PIP_INDEX_URL", f"{breaking.url}/index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert packs._indexes() == []


def test_a_changed_file_is_refused_and_not_kept(entered):
    made = entered(sha256="0" * 64)
    with pytest.raises(StageFailed, match="has sha256 .*, expected 0000") as caught:
        load()
    assert "\n" not in str(caught.value)
    assert downloads.present(made, "test") == []
    assert not downloads._place(made.splits["test"].web.url).with_name("here.json.part").exists()


def test_what_cannot_be_had_is_one_line_with_a_remedy(entered):
    entered(path="/absent.json")
    with pytest.raises(StageFailed, match="404.*or get I-Alpaca.json .* source: file:") as told:
        load()
    assert "\n" not in str(told.value)


HUB = """
import json, sys
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 100
from dataclasses import replace
from stages.data import downloads, sources
from stages.data.catalogue import CATALOGUE
from stages.data.published import Hub, Split
from stages.data.spec import DataSpec
from stages.errors import StageFailed
made = replace(CATALOGUE["wanli"], hub=Hub("owner/name", sys.argv[1]), gated="ask the owner",
               splits={"test": Split(("*.jsonl",), rows=30), "more": Split(("*.csv",))})
CATALOGUE["wanli"] = made
out = {"before": len(downloads.present(made, "test"))}
for split in ("test", "more"):
    try:
        loaded = sources.load(DataSpec(task="nli", source="catalogue:wanli#" + split))
        out[split] = [loaded.table.num_rows, loaded.note, *loaded.files.values()]
    except StageFailed as error:
        out[split] = str(error)
print(json.dumps(out | {"after": len(downloads.present(made, "test"))}))
"""


def hub(server, tmp_path, revision=COMMIT, **changed):
    """What a process sees whose hub is ours; the hub's address is read when it starts."""
    environment = os.environ | {
        "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "MOE_RELIABILITY_CACHE": str(tmp_path / "packs"),
        "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_ours",
    } | changed
    done = subprocess.run([sys.executable, "-c", HUB, revision], env=environment, text=True,
                          capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_hub_files_are_brought_in_pieces_and_found_again_without_a_network(server, tmp_path):
    server.cut = 500
    found = hub(server, tmp_path)
    digest = hashlib.sha256(ROWS).hexdigest()
    assert (found["before"], found["test"], found["after"]) == (0, [30, "", digest], 1)
    assert "it has no file *.csv" in found["more"]
    assert server.ranges == [0, 500] and server.tokens == {"Bearer hf_ours"}
    part = next((tmp_path / "files").rglob("test.jsonl"))
    part.rename(part.with_name("test.jsonl.part"))
    os.truncate(part.with_name("test.jsonl.part"), 1000)  # what a kill leaves
    next(part.parent.glob(".*.json")).unlink()
    assert hub(server, tmp_path)["test"] == [30, "", digest]
    assert server.ranges == [0, 500, 1000]
    again = hub(server, tmp_path, HF_HUB_OFFLINE="1")
    assert (again["before"], again["test"]) == (1, [30, "", digest])
    assert len(server.ranges) == 3


def test_a_gated_hub_set_says_how_to_get_access(server, tmp_path):
    server.gated = True
    found = hub(server, tmp_path)
    assert found["test"] == (
        "catalogue:wanli#test: the hub does not give out owner/name: ask the owner; or get "
        "test.jsonl and set source: file:PATH and format: wanli#test")
    assert found["after"] == 0
