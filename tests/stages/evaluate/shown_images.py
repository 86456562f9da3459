"""Small classifiers of digits, trained for a moment, and the data set that they are shown."""

import pandas as pd
import torch

from stages.data import stage as data_stage
from stages.data.spec import DataSpec
from stages.evaluate.engine import Engine
from stages.evaluate.shards import plan_shards
from stages.models import stage as model_stage
from stages.models.images import load_processor
from stages.models.load import load
from stages.models.vision_spec import VisionSpec

DENSE = VisionSpec(size="tiny", hidden=16, neurons=16, depth=2, heads=2, patch=4, image_size=8,
                   channels=1, labels=10)
SPARSE = DENSE.model_copy(
    update={"experts": 4, "top_k": 1, "layers": (0, 1), "shared_start": False})


def made(folder):
    """Folders of ``sparse`` and ``dense`` classifiers, and the splits by name."""
    digits = DataSpec(task="images", source="builtin:digits", splits={"train": 0.6, "test": 0.4},
                      rows={"train": 500, "test": 16})
    (folder / "digits").mkdir()
    data_stage.run(digits, {}, folder / "digits")
    data = {name: pd.read_parquet(folder / "digits" / f"{name}.parquet")
            for name in ("train", "test")}
    folders = {}
    for name, spec in {"sparse": SPARSE, "dense": DENSE}.items():
        folders[name] = folder / name
        folders[name].mkdir()
        model_stage.run(spec, {}, folders[name])
        _train(folders[name], data["train"])
    return folders, data


def _train(folder, rows):
    model, processor = load(folder).train(), load_processor(folder)
    pixels = processor.normalised(processor.decode(rows["image"]))
    labels = torch.tensor(rows["label"].astype(int).to_numpy())
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        chosen = torch.randint(0, len(labels), (64,), generator=generator)
        loss = torch.nn.functional.cross_entropy(model(pixels[chosen]).logits, labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)


def scores_of(folder, evaluation, data, size=256, **options):
    """The score table, from shards of ``size`` / 16 rows."""
    engine = Engine(folder, **options)
    responses = {
        response.id: response
        for shard in plan_shards(evaluation.requests(data), size)
        for response in engine.respond(shard.requests)
    }
    return evaluation.score(data, responses)
