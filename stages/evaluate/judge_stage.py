"""Judge stage: brings the model of a judge, so that every evaluation that names it shares it."""

import json
from pathlib import Path

from stages.errors import StageFailed
from stages.evaluate.heads import has_head
from stages.evaluate.spec import JUDGE_FILE, JudgeSpec
from stages.models.load import load_tokenizer
from stages.models.stage import bring


def run(spec: JudgeSpec, inputs: dict[str, Path], output: Path) -> None:
    """Write the judge's Hugging Face folder.

    Raises StageFailed when it cannot be had, or is not what its kind needs.
    """
    brought = bring(spec.source, output)
    (output / JUDGE_FILE).write_text(json.dumps({"source": spec.source} | brought) + "\n")
    if has_head(output) != (spec.kind == "regressor"):
        need = "a model with a head" if spec.kind == "regressor" else "a causal language model"
        raise StageFailed(f"{spec.source}: a {spec.kind} judge needs {need}; it holds another kind")
    if spec.kind == "guard" and not load_tokenizer(output).chat_template:
        raise StageFailed(
            f"{spec.source}: a guard judge reads answers through its chat template, and this one "
            "has none; name a guard model that has one"
        )
