"""What a model turns out not to be able to do, once it is there, fails its own evaluation alone."""

import json

import pytest
from smoke import SMOKE, planned

from pipeline import evaluate
from pipeline.job import Job, run_stage
from pipeline.store import Store

DOLA = "{kind: multiple_choice, dataset: questions, technique: {kind: dola}}"
LABEL = "evaluate/encoder-none-"


@pytest.fixture
def answered(monkeypatch):
    """Passes by one actor in this process; how often its model was asked."""
    found = []

    def by_actors(missing, jobs, store, checkpoint, dtype):
        files = [(each.shard.file, each.folder) for each in missing]
        actor = evaluate.Responder(store.uri, files, checkpoint, dtype, 1, 0, {}, {})
        respond = actor.engine.respond
        actor.engine.respond = lambda requests: found.append(len(requests)) or respond(requests)
        for number, each in enumerate(missing):
            (problem,) = actor({"file": [number], "group": [each.shard.group]})["problem"]
            yield each.node, problem

    monkeypatch.setattr(evaluate, "_by_actors", by_actors)
    return found


def test_one_evaluation_that_a_model_cannot_do_leaves_the_others_of_its_pass(answered, tmp_path):
    plan = planned(
        "recipes={}", "models.encoder={source: 'tiny:t5'}", "resources.evaluate.shard_size=4",
        "pairs=[{moe: tiny-moe, dense: encoder}]", f"evaluations.contrast={DOLA}")
    store = Store(str(tmp_path))
    keys = [f"{LABEL}contrast", f"{LABEL}questions"]
    for key in plan.nodes:
        if key in plan.needs(keys) and key not in keys:
            done = run_stage(Job.of(plan.nodes[key], plan, store, SMOKE.parent))
            assert done.status == "done", done.message

    def run():
        return evaluate.run_pass([Job.of(plan.nodes[k], plan, store, SMOKE.parent) for k in keys])

    outcomes = run()
    failed, done = (outcomes[key] for key in keys)
    assert failed.status == "failed" and done.status == "done"
    assert failed.message.startswith("technique.kind: dola is for decoders, ")
    rows = json.loads((store.fetch(plan.nodes[keys[1]].folder) / "summary.json").read_text())
    assert rows["accuracy"]["n"] == 8
    # It is asked about one shard only, and answers all of the other evaluation.
    shards = len(store.files(f"{plan.nodes[keys[1]].folder}/responses"))
    assert shards > 1 and len(answered) == shards + 1
    # The next run asks for it again and for nothing else.
    answered.clear()
    assert run()[keys[0]].message == failed.message and len(answered) == 1
