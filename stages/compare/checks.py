"""The report's table of what each attack had to show, passed or not."""

import pandas as pd

from stages.compare.table import recipe_title
from stages.evaluate.hygiene import WITHOUT_BOUND


def context(checks: pd.DataFrame) -> list[dict]:
    """What the templates show of the checks (``results.compare``), one table per evaluation.

    A row is an attack and a check, a column a model after a recipe; of several seeds the value
    furthest from passing, which is the smallest share of broken examples where all must break and
    the largest elsewhere.
    """
    if checks.empty:
        return []
    return [
        {"evaluation": name, **_table(rows)}
        for name, rows in checks.groupby("evaluation", sort=False)
    ]


def _table(checks: pd.DataFrame) -> dict:
    several = checks["recipe"].nunique() > 1
    columns = {
        (model, recipe): f"{model} · {recipe_title(recipe)}" if several else model
        for model, recipe in checks[["model", "recipe"]].drop_duplicates().itertuples(index=False)
    }
    rows = []
    for (attack, check), found in checks.groupby(["attack", "check"], sort=False):
        cells = []
        for key in columns:
            here = found[(found["model"] == key[0]) & (found["recipe"] == key[1])]
            failed = here[~here["passed"]]
            here = failed if len(failed) else here
            values = here.sort_values("value", ascending=check == WITHOUT_BOUND)
            cells.append(
                {"value": f"{values.iloc[0]['value']:.2f}", "n": int(values.iloc[0]["n"]),
                 "failed": bool(len(failed))}
                if len(values) else None
            )  # fmt: skip
        rows.append({"attack": attack, "check": check, "meaning": found["meaning"].iloc[0],
                     "cells": cells})  # fmt: skip
    return {"columns": list(columns.values()), "rows": rows,
            "failed": sum(bool(cell) and cell["failed"] for row in rows for cell in row["cells"]),
            "made": sum(bool(cell) for row in rows for cell in row["cells"])}  # fmt: skip
