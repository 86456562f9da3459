"""What the README tells to type is there: commands, files, kinds, and the rows of its table."""

import importlib.util
import re
import shlex
from typing import get_args

import pytest
from smoke import ROOT

from pipeline.cli import _parser
from pipeline.sweep_file import load
from stages.evaluate.registry import KINDS
from stages.evaluate.techniques import AnyTechnique

README = (ROOT / "README.md").read_text()
PROGRAM = r"(?:\S*/)?(?:moe-reliability|python -m pipeline) "


def section(heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    return re.split(r"^#", README.partition(f"# {heading}\n")[2], flags=re.M)[0]


def spans(text: str) -> list[str]:
    """What stands between backquotes, and the lines of blocks, continued ones as one."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```", "", text, flags=re.M | re.S)) + lines


def parse(command: str):
    """A command as the program reads it, with names for the words that stand for something."""
    command = command.partition("#")[0].replace("…", "").replace("[SWEEP]", "SWEEP")
    return _parser().parse_args(shlex.split(command.replace("SWEEP", "sweeps/smoke.yaml")))


def commands() -> list[str]:
    found = [re.search(PROGRAM + r"([a-z][^`]*)", span) for span in spans(README)]
    return [match[1] for match in found if match]


def test_every_verb_is_told_with_arguments_that_it_takes():
    told = re.findall(r"^\| `([^`]+)` \|", section("The command line"), re.M)
    for command in told:
        assert parse(command).verb.__name__ == f"_{command.split()[0]}"
    (verbs,) = (action.choices for action in _parser()._actions if action.choices)
    assert {command.split()[0] for command in told} == set(verbs)
    # Options that the explanations name.
    options = set(re.findall(r"`(--[a-z-]+)", section("The command line")))
    known = {o for verb in verbs.values() for o in verb._option_string_actions}
    assert options <= known


@pytest.mark.parametrize("command", commands())
def test_every_command_is_accepted(command):
    options = parse(command)
    if "sweep" in options and options.sweep is not None:
        assert load(ROOT / options.sweep).name


def test_every_target_file_and_module_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^`?make ([a-z-]+)|`make ([a-z-]+)", README, re.M):
        assert f"\n{''.join(target)}:" in makefile
    folders = "sweeps|stages|tests|deepspeed_configs|benchmarks"
    for place in re.findall(rf"`((?:{folders})/[^`\n]*)`", README):
        head, brace, rest = place.partition("{")
        names, _, tail = rest.partition("}")
        for name in names.split(",") if brace else [""]:
            assert list(ROOT.glob((head + name + tail).rstrip("/"))), place
    for module in re.findall(r"python -m (stages[\w.]+)", README):
        assert importlib.util.find_spec(module)


def test_every_kind_of_evaluation_and_technique_is_told():
    fields = section("The sweep file")
    between = fields.partition("**`evaluations.NAME`**")[2].partition("**`statistics`**")[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", between, re.M)
    assert {kind for cell in cells for kind in re.findall(r"`(\w+)`", cell)} == set(KINDS)
    told = re.findall(r"^\| `(\w+)` \|", section("Evaluations").split("**Inference")[1], re.M)
    kinds = {t.model_fields["kind"].annotation for t in get_args(get_args(AnyTechnique)[0])}
    assert set(told) - {"kind"} == {name for kind in kinds for name in get_args(kind)}


def test_the_table_of_all_axes_has_the_rows_of_its_sweep():
    """Every evaluation of cpu.yaml by its primary metric, under its axis."""
    text = section("Every axis on two CPU cores")
    evaluations = load(ROOT / "sweeps/moe_rbench/cpu.yaml").evaluations
    assert f"with {len(evaluations)} evaluations" in text
    found, axis = {}, None
    for line in text.splitlines():
        if heading := re.match(r"\| \*\*(.+)\*\* \|", line):
            axis = heading[1]
        elif line.startswith("| `"):
            name, label, sign, numbers = re.match(r"\| `(\w+)`: (.+) ([↑↓]) \|(.*)", line).groups()
            found[name] = (axis, label, sign)
            values = [float(v.replace("−", "-")) for v in re.findall(r"[+−]?\d\.\d{3}", numbers)]
            # Tuned MoE minus dense is the difference, within the rounding of all three.
            assert values[2] - values[3] == pytest.approx(values[4], abs=0.0016), name
            assert values[5] <= values[4] <= values[6]
    expected = {}
    for name, evaluation in evaluations.items():
        (metric,) = (m for m in evaluation.metrics() if m.name == evaluation.primary)
        expected[name] = (evaluation.axis.replace("_", " "), metric.label,
                          "↑" if metric.higher_is_better else "↓")
    assert found == expected


WORK = re.compile(r"\bthe papers?\b|\bpaper's\b|moe-rbench|2210\.10253", re.I)
VALUE = re.compile(r"\d+(?:\.\d+)? ?%|(?<![\d.])0?\.\d{2,}|\d+(?:\.\d+)? points")
IDENTIFIER = re.compile(r"\d{4}\.\d{4,5}")  # of arXiv


def results_told_of_a_paper(text: str) -> list[str]:
    sentences = re.split(r"(?<=[.!?:;|])\s+|\n\s*\n|\n- ", text)
    return [s for s in sentences if WORK.search(s) and VALUE.search(IDENTIFIER.sub("", s))]


def test_no_document_and_no_report_tells_a_number_as_a_papers():
    assert len(results_told_of_a_paper(
        "As in the paper, 71.3 % were right. Ours: 0.52.\n\nMoE-RBench has 0.713. See 2210.10253."
    )) == 2
    for pattern in ("*.md", "sweeps/**/*.md", "sweeps/**/*.yaml", "benchmarks/*.md",
                    "deepspeed_configs/*.md", "stages/compare/*.jinja"):
        for file in ROOT.glob(pattern):
            assert results_told_of_a_paper(file.read_text()) == [], file
