"""Every score of every example of a sweep in one table, from which each number can be recomputed.

One row per checkpoint, evaluation, example and measured quantity. A mean is that of ``value``;
quantities with units that differ by example (the log-probability of a text's tokens) stand per unit
and weigh as many; macro-F1 counts ``label`` against ``prediction``.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stages.compare.spec import CompareSpec
from stages.evaluate.base import TEXT_COLUMNS, Evaluation

SCHEMA = pa.schema(
    [
        ("evaluation", pa.string()),
        ("dataset", pa.string()),
        ("example_id", pa.string()),
        ("model", pa.string()),
        ("recipe", pa.string()),
        ("seed", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("prediction", pa.string()),
        ("label", pa.string()),
        ("weight", pa.float64()),
        ("cluster_id", pa.string()),
    ]
)


def write_examples(spec: CompareSpec, inputs: dict[str, Path], file: Path) -> int:
    """Write the table of all scores that are there (``SCHEMA``, Parquet); how many rows it has.

    ``inputs`` are those of the comparison. A row group per checkpoint and evaluation, so that its
    size needs no memory.
    """
    rows = 0
    with pq.ParquetWriter(file, SCHEMA) as writer:
        for role, folder in inputs.items():
            if not role.startswith("scores/"):
                continue
            _, model, recipe, seed, name = role.split("/")
            path = folder / "scores.parquet"
            columns = [c for c in pq.read_schema(path).names if c not in TEXT_COLUMNS]
            scores = pd.read_parquet(path, columns=columns)
            about = {"evaluation": name, "model": model, "recipe": recipe, "seed": int(seed)}
            for part in melted(spec.evaluations[name], scores):
                table = pa.Table.from_pandas(
                    part.assign(**about)[SCHEMA.names], SCHEMA, preserve_index=False
                )
                writer.write_table(table)
                rows += len(part)
    return rows


def melted(evaluation: Evaluation, scores: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows of one score table, quantity by quantity; examples without it are left out."""
    fixed = pd.DataFrame(
        {
            "dataset": scores["example_id"].str.partition("/")[0],
            "example_id": scores["example_id"],
            "prediction": scores["prediction"].astype(str),
            "label": scores["gold"].astype(str),
            "cluster_id": scores["document"],
        }
    )
    for name in scores.select_dtypes(["number", "bool"]).columns:
        unit = evaluation.units.get(name)
        weight = scores[unit].astype(float) if unit else 1.0
        part = fixed.assign(metric=name, value=scores[name].astype(float) / weight, weight=weight)
        yield part[part["value"].notna()]
