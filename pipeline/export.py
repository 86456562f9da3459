"""A checkpoint of the store as a folder that other programs load: the ``export`` verb.

The files are those of the store, byte for byte: configuration, safetensors, tokenizer, generation
settings and card; a ``README.md`` tells where the model comes from.
"""

import argparse
import json
import shutil
from pathlib import Path

from pipeline.asked import sweep_recipes
from pipeline.plan import Plan
from pipeline.store import Store
from pipeline.survey import adopt, survey
from pipeline.sweep import Sweep
from pipeline.sweep_file import nearest
from stages.errors import BadInput, StageFailed
from stages.finetune.spec import EVIDENCE_FILE
from stages.models.card import ModelCard
from stages.models.families import FAMILIES
from stages.models.stage import FILES

CHECKPOINTS = ("model", "finetune")
README = """\
# {name}

{origin}.

| | |
|---|---|
| architecture | {card.family} ({kind}) |
| parameters | {card.total_parameters:,}, of which one token uses {card.active_parameters:,} |
| made by | moe-reliability, node `{folder}`{commit} |

```
lm_eval --model hf --model_args pretrained={output} --tasks hellaswag
vllm serve {output}
```
{recipe}"""


def node_of_sweep(sweep: Sweep, plan: Plan, store: Store, options: argparse.Namespace) -> str:
    """The store's folder of the sweep's checkpoint that the options name."""
    models = list(dict.fromkeys(m for pair in sweep.pairs for m in (pair.moe, pair.dense)))
    recipes = sweep_recipes(sweep)
    model, recipe = options.model, options.recipe or list(recipes)[-1]
    if model not in models:
        raise BadInput(f"--model {model}: is of no pair of the sweep{nearest(model or '', models)}")
    if recipe not in recipes:
        raise BadInput(f"--recipe {recipe}: not in the sweep{nearest(recipe, list(recipes))}")
    seed = recipes[recipe][0] if options.seed is None else options.seed
    if seed not in recipes[recipe]:
        known = ", ".join(map(str, recipes[recipe]))
        raise BadInput(f"--seed {seed}: {recipe} is run for {known}; name one of them")
    key = plan.compare.inputs.get(f"checkpoint/{model}/{recipe}/{seed}")
    if key is None:
        raise BadInput(f"--recipe {recipe}: does not fine-tune {model}; name another")
    adopt(plan, store)
    if survey(plan, store)[key].status != "done":
        raise StageFailed(f"{key} has not been run; "
                          f"run `moe-reliability run {options.checkpoint}` first")
    return plan.nodes[key].folder


def node_of_store(store: Store, options: argparse.Namespace) -> str:
    """The folder of a checkpoint that is named itself, ``finetune/NAME@FINGERPRINT``."""
    folder = options.checkpoint.as_posix().rstrip("/")
    stage, _, name = folder.partition("/")
    where = f"CHECKPOINT {folder}"
    if stage not in CHECKPOINTS or "/" in name:
        raise BadInput(f"{where}: neither a sweep file nor a checkpoint of the store; name "
                       "model/NAME@FINGERPRINT or finetune/NAME@FINGERPRINT")
    given = [n for n in ("model", "recipe", "seed") if getattr(options, n) is not None]
    if given:
        raise BadInput(f"--{given[0]}: chooses among a sweep's checkpoints; remove it")
    if store.manifest(folder) is None:
        known = sorted(f"{stage}/{each}" for each in store.folders(stage))
        finished = sorted(store.finished(known))
        raise BadInput(f"{where}: no finished checkpoint of {store.uri}{nearest(folder, finished)}")
    return folder


def export(store: Store, folder: str, output: Path) -> list[str]:
    """Write a checkpoint of the store into a new folder; returns what to tell the user."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BadInput(f"--to {output}: is there already and not empty; name a new folder")
    source, manifest = store.fetch(folder), store.manifest(folder)
    card = ModelCard.read(source)
    reason = FAMILIES[card.family].no_export
    if reason:
        raise BadInput(f"CHECKPOINT {folder}: {card.family} cannot be exported: {reason}; "
                       "evaluate it here")
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted({file for pattern in FILES for file in source.glob(pattern)}):
        if file.name != EVIDENCE_FILE:
            shutil.copyfile(file, output / file.name)
    if not (output / "generation_config.json").exists():
        from transformers import AutoConfig, GenerationConfig

        config = AutoConfig.from_pretrained(output)
        GenerationConfig.from_model_config(config).save_pretrained(output)
    recipe = ""
    if folder.startswith("finetune/"):
        asked = json.dumps(manifest["identity"], indent=1)
        recipe = f"\n## Fine-tuning\n\n```json\n{asked}\n```\n"
    commit = f", commit `{manifest['commit']}`" if manifest["commit"] else ""
    (output / "README.md").write_text(README.format(
        name=folder.partition("/")[2].rpartition("@")[0], origin=card.origin, card=card,
        kind={"moe": f"Mixture-of-Experts, top-{card.top_k} of {card.experts}"}.get(
            card.architecture, "dense"),
        folder=folder, commit=commit, output=output.resolve().name, recipe=recipe))
    size = sum(file.stat().st_size for file in output.iterdir())
    return [f"{folder} → {output} ({size / 2**20:,.0f} MiB)",
            f"lm_eval --model hf --model_args pretrained={output} --tasks …",
            f"vllm serve {output}"]

