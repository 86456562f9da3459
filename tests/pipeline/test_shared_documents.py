"""The sweep for two CPU cores says which of its small files hold the same sources."""

from pathlib import Path

import pandas as pd

from pipeline.sweep_file import load
from stages.data import stage
from stages.evaluate.base import Response

SWEEPS = Path(__file__).parents[2] / "sweeps" / "moe_rbench"


def test_films_in_other_styles_and_edited_pairs_are_as_many_sources_as_there_are(
    tmp_path, monkeypatch
):
    """16 films in three forms are no 48 documents, nor 16 premises with edited hypotheses 32."""
    sweep = load(SWEEPS / "cpu.yaml")
    monkeypatch.chdir(SWEEPS)
    for name, rows, documents in (("styles", 48, 16), ("counterfactual", 64, 16),
                                  ("hard_inference", 53, 23)):
        evaluation, data = sweep.evaluations[name], {}
        for dataset in evaluation.datasets():
            output = tmp_path / name / dataset
            output.mkdir(parents=True)
            stage.run(sweep.datasets[dataset], {}, output)
            data[dataset] = pd.read_parquet(output / "test.parquet")
        responses = {r.id: Response(r.id, tuple(map(float, range(len(r.choices)))), (1,) * 3)
                     for r in evaluation.requests(data)}
        scores = evaluation.score(data, responses)
        assert (len(scores), scores["document"].nunique()) == (rows, documents), name
