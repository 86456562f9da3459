"""`data list` and `data fetch`."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from smoke import ROOT

from pipeline.cli import main
from stages.data.catalogue import CATALOGUE
from stages.data.packs import PACKS
from stages.data.published import Split, Web
from stages.data.sets import SETS

ORIGINALS = ROOT / "tests/stages/data/originals"
SMOKE = ROOT / "sweeps/smoke.yaml"


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, list[str], str]:
        code = main(["data", *arguments])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return call


def line_of(name: str, lines: list[str]) -> str:
    found, = (line for line in lines if f" {name} " in line)
    return found


def test_list_names_every_data_set_with_rows_licence_place_and_access(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_RELIABILITY_CACHE", str(tmp_path))
    code, lines, _ = run("list")
    assert code == 0
    anli = line_of("catalogue:anli_r3", lines)
    assert anli.startswith("· ") and "1,200  CC BY-NC 4.0" in anli
    assert anli.endswith("hub:facebook/anli@8e4813d81f46d313dac7892e1c28076917cfcdf9")
    assert line_of("catalogue:snli_hard", lines).endswith("_hard.jsonl (not pinned)")
    hate = line_of("catalogue:implicit_hate", lines)
    assert hate.startswith("– ") and "your own files; access: request form" in hate
    amazon = line_of("pack:vader/amazon", lines)
    assert amazon.startswith("· ") and " 2,985  MIT" in amazon
    assert amazon.endswith(f"vaderSentiment 3.3.2, sha256 {PACKS['vader'].sha256[:12]}")
    assert line_of("builtin:lookalikes", lines).startswith("✓ ")
    assert sum("catalogue:" in line and not line.startswith("Further") for line in lines) == len(
        CATALOGUE)


def test_list_of_a_sweep_tells_what_is_there(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_RELIABILITY_CACHE", str(tmp_path))
    code, lines, _ = run(
        "list", str(SMOKE), "--set", "datasets.hotels={source: 'catalogue:sst5'}",
        "--set", f"datasets.anli={{source: 'file:{ORIGINALS}/anli_test.jsonl', format: anli_r1}}",
        "--set", "datasets.gone={source: 'file:gone.tsv', format: implicit_hate}")
    assert code == 0
    assert line_of("reviews", lines).startswith("✓ ")
    assert line_of("hotels", lines).startswith("· ")
    assert line_of("anli", lines).startswith("✓ ") and "nli" in line_of("anli", lines)
    assert line_of("gone", lines).startswith("– ")


def test_fetch_brings_counts_and_sums_and_goes_on_after_what_is_missing(
    run, tmp_path, monkeypatch
):
    monkeypatch.setenv("MOE_RELIABILITY_CACHE", str(tmp_path / "packs"))
    content = json.dumps({"instructions": ["a", "b"], "inputs": []}).encode()
    (tmp_path / "served.json").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    here = Web("http://127.0.0.1:9/served.json", digest)
    monkeypatch.setitem(CATALOGUE, "alpaca_control", replace(
        CATALOGUE["alpaca_control"], splits={"test": Split(web=here, rows=3)}))
    place = tmp_path / "files" / "127.0.0.1:9" / "served.json"
    arguments = ("fetch", str(SMOKE), "--set", "datasets.control={source: 'catalogue:"
                 "alpaca_control'}", "--set", "datasets.civil={source: 'catalogue:adv_civil'}")
    code, lines, _ = run(*arguments)
    assert code == 1
    assert line_of("control", lines).startswith("✗ ") and "could not be downloaded" in line_of(
        "control", lines)
    assert "cannot be downloaded; get BOSS" in line_of("civil", lines)
    assert line_of("reviews", lines).startswith("✓ ") and "96 rows · sha256 " in line_of(
        "reviews", lines)
    assert lines[-1] == (
        "2 of 8 data sets are missing; a run shows what needs them as gaps")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    code, lines, _ = run(*arguments)
    assert code == 1
    assert line_of("control", lines) == (
        f"✓ control    2 rows · 2 rows, published are 3 · served.json {digest[:12]}")


def test_fetch_needs_a_sweep(run):
    code, lines, error = run("fetch")
    assert (code, lines) == (2, []) and error.startswith("error: data fetch: no sweep; name")


def test_listing_imports_nothing_heavy():
    script = ("import sys; from pipeline.cli import main; main(['data', 'list']); "
              "print(sorted({'torch', 'ray', 'datasets', 'transformers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_paths_start_at_the_sweep(run, tmp_path):
    text = SMOKE.read_text()
    (tmp_path / "sweep.yaml").write_text(text)
    (tmp_path / "smoke").symlink_to(Path(SMOKE).parent / "smoke")
    code, lines, _ = run("fetch", str(tmp_path / "sweep.yaml"))
    assert code == 0 and len(lines) == 6


def test_the_readme_names_data_sets_that_there_are():
    section = (ROOT / "README.md").read_text().partition("## Data\n")[2].partition("\n## ")[0]
    table = "".join(line for line in section.splitlines() if line.startswith("| "))
    named = set(re.findall(r"`([a-z0-9_]+)`", table))
    assert named <= set(CATALOGUE)
    kinds = ("sst2_", "pile_", "counterfactual_", "dynasent_")
    assert {n for n in set(CATALOGUE) - named if not n.startswith(kinds)} == set()
    packs = re.findall(r"`pack:([a-z-]+)/\{?([a-z_0-9,]+)\}?`", section)
    assert len(packs) == 7
    for pack, sets in packs:
        assert {f"pack:{pack}/{name}" for name in sets.split(",")} <= set(SETS)
