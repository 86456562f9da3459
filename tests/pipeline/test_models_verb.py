"""``moe-reliability models`` says of each architecture what the registry says."""

import subprocess
import sys
from dataclasses import replace

from pipeline.models import model_lines
from stages.models.families import FAMILIES


def test_every_architecture_stands_once_with_its_reasons(monkeypatch):
    refusing = replace(FAMILIES["jamba"], no_training="its steps are not exact")
    monkeypatch.setitem(FAMILIES, "jamba", refusing)
    lines = model_lines()
    names = [line.split()[0] for line in lines[1:] if line and ":" not in line]
    assert sorted(names) == sorted(FAMILIES)
    mixtral = next(line for line in lines if line.startswith("mixtral")).split()
    assert mixtral == ["mixtral", "✓", "✓", "✓", "✓", "into", "one", "✓"]
    deepseek = next(line for line in lines if line.startswith("deepseek_v3")).split()
    assert deepseek == ["deepseek_v3", "✓", "✓", "✓", "·", "✓"]
    nllb = next(line for line in lines if line.startswith("nllb-moe")).split()
    assert nllb == ["nllb-moe", "✓", "✓", "✓", "✓", "✓"]
    assert "jamba: no train: its steps are not exact" in lines
    assert "longcat_flash: refused: its router may choose experts that compute nothing" in lines


def test_the_verb_imports_neither_torch_nor_ray():
    code = (
        "import sys; from pipeline.cli import main; assert main(['models']) == 0\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
