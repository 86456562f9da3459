"""Later parts of a training in parts draw the rows of the whole, and go on taking turns."""

import pytest

from stages.finetune.batches import load_examples
from stages.finetune.recipe import TrainSet
from stages.models.load import load_tokenizer
from tests.stages.finetune.results import curve, measured, spec
from tests.stages.finetune.runs import Run, launch

LIMITED = {"data": (TrainSet(dataset="reviews", template="sentiment", limit=6),)}
ALTERNATE = {"workers": 1, "steps": 2, "alternate": {"every": 2}}


def test_a_part_draws_the_rows_of_the_whole(models, data):
    tokenizer = load_tokenizer(models["mixtral"])

    def drawn(**fields) -> list:
        return load_examples(spec(**LIMITED, **fields), data, tokenizer)

    whole = drawn(seed=5)
    assert len(whole) == 6 and drawn(seed=77, rows_seed=5) == whole != drawn(seed=77)
    assert drawn(seed=77, rows_seed=0) == drawn(seed=0)


def test_what_a_part_shares_is_identity_where_it_matters():
    later = {"seed": 77, "rows_seed": 5, "steps_before": 4}
    plain = spec(seed=77).identity()
    assert spec(**later).identity() == plain
    assert {"rows_seed", "steps_before"} & set(plain) == set()
    limited = spec(**LIMITED, **later).identity()
    assert limited["rows_seed"] == 5 and "steps_before" not in limited
    turns = spec(**{**ALTERNATE, **later}).identity()
    assert turns["steps_before"] == 4 and "rows_seed" not in turns


@pytest.fixture(scope="module")
def runs(models, data, tmp_path_factory):
    folder, planned = tmp_path_factory.mktemp("segments"), []
    for name, before in (("first", 0), ("second", 2), ("odd", 1)):
        (folder / name).mkdir()
        inputs = {"model": models["mixtral"], **data}
        planned.append(Run(spec(**ALTERNATE, steps_before=before), inputs, folder / name))
    launch(1, planned, folder / "store")
    return folder


@pytest.mark.parametrize("part, routers", [
    ("first", [False, False]), ("second", [True, True]), ("odd", [False, True])])
def test_turns_go_on_from_part_to_part(runs, part, routers):
    """Of two steps each, in parts of two."""
    assert (curve(runs / part)["router_change"] > 0).tolist() == routers
    assert measured(runs / part, "alternate") == {
        "steps_that_moved_the_routers": sum(routers), "steps_that_did_not": 2 - sum(routers)}
