"""A judge that is a model, on Ray: brought once, asked after the models under test, resumed."""

import json
import time
from pathlib import Path

import pandas as pd
import ray
from smoke import SMOKE, planned

from pipeline.execute import execute
from pipeline.plan import Plan
from pipeline.store import Store
from pipeline.survey import survey
from stages.evaluate.engine import Engine
from stages.evaluate.judges import Guard
from stages.models.tiny import tiny_model, tiny_tokenizer


def test_stored_answers_are_judged_by_a_model_of_its_own(cluster, tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer, seed=7).save_pretrained(tmp_path / "guard")
    tokenizer.save_pretrained(tmp_path / "guard")
    judge = {"kind": "guard", "name": "guard", "source": f"file:{tmp_path / 'guard'}"}
    plan = planned(
        "recipes={}", f"evaluations.refusal.judges={json.dumps([judge])}",
        "resources.evaluate={workers: 2, shard_size: 4}")
    store = Store(str(tmp_path / "store"))
    key = "evaluate/tiny-none-refusal"

    def run(plan=plan, lacks=None) -> Path:
        todo = {k for k in plan.needs({key}) if survey(plan, store)[k].status != "done"}
        outcomes = execute(plan, todo, store, SMOKE.parent, lambda event: None)
        assert outcomes[key].status == "done", outcomes[key].message
        assert outcomes[key].lacks == (lacks or {})
        return store.fetch(plan.nodes[key].folder)

    scores = pd.read_parquet(run() / "scores.parquet")
    guard, engine = Guard(**judge), Engine(tmp_path / "guard", threads=1)
    asked = [guard.request(r.example_id, r.prompt, r.answer) for r in scores.itertuples()]
    stored = scores.set_index("example_id")["harm_guard"]
    for request in asked:
        expected = guard.read(engine.respond([request])[0])
        assert abs(stored[request.id] - expected) < 1e-5
    # Without the scores, and with one judgement lost, only that one is asked again.
    folder = tmp_path / "store" / plan.nodes[key].folder
    (folder / "manifest.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder / "responses").iterdir()}
    lost = next(path for path in before if "#judge/" in str(pd.read_parquet(path)["id"][0]))
    lost.unlink()
    again = pd.read_parquet(run() / "scores.parquet")
    pd.testing.assert_frame_equal(scores, again)
    after = {path: path.stat().st_mtime_ns for path in (folder / "responses").iterdir()}
    assert {path for path in after if after[path] != before[path]} == {lost}
    # A judge that fails when it is asked: the plan goes on with the evaluation without it.
    (folder / "manifest.json").unlink()
    lost.unlink()
    (store.fetch("judge/guard@" + plan.nodes["judge/guard"].fingerprint)
     / "chat_template.jinja").unlink()
    rest = Plan(plan.sweep, dict(plan.nodes))
    reason = ("failed when asked: judge 'guard': its tokenizer has no chat template to put an "
              "answer into; name a guard model that has one")
    without = pd.read_parquet(run(rest, {"judge/guard": reason}) / "scores.parquet")
    assert rest.nodes[key].folder != plan.nodes[key].folder and not lost.exists()
    pd.testing.assert_frame_equal(scores[list(without)], without)
    assert set(scores) - set(without) == {"harm_guard", "judge_guard"}
    # The actor that failed is gone, and others may have its place.
    for _ in range(60):
        if ray.available_resources().get("CPU") == 2:
            break
        time.sleep(0.5)
    assert ray.available_resources().get("CPU") == 2
