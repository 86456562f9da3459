"""What a space can draw is tried before a search starts, as its trials would be refused."""

import re

import pytest
from search_sweeps import searching
from smoke import SMOKE

from pipeline.search.checks import check_search
from pipeline.search.plan import members, selecting, trial_plan
from stages.errors import BadInput
from stages.finetune.refusals import inapplicable
from stages.models.sources import Facts


def refusal(space: dict) -> str:
    with pytest.raises(BadInput) as caught:
        check_search(searching(space=space), SMOKE)
    return str(caught.value)


@pytest.mark.parametrize("drawn", [
    {"uniform": [1, 4]}, {"choice": [1, 2, 4]}, {"choice": [None, 1, 4]}])
def test_the_models_own_number_of_experts_per_token_is_drawn_as_none(drawn):
    """2 of 4 experts are the model's own; that field of a recipe would be refused with 2."""
    sweep = searching(space={"router.top_k": drawn, "learning_rate": {"choice": [1e-3, 2e-3]}},
                      trials=24)
    contents, trials = check_search(sweep, SMOKE), selecting(sweep)
    moe, dense = members(trials, contents, SMOKE.parent)
    assert dense.idle == ("router.top_k",)
    draws = [moe.space.draw(0, number) for number in range(24)]
    values = {draw["router.top_k"] for draw in draws}
    assert values == set(drawn.get("choice", range(1, 5)))
    for draw in draws:
        recipe = moe.space.recipe(draw)
        assert recipe.router.top_k == {2: None}.get(draw["router.top_k"], draw["router.top_k"])
        assert not [*inapplicable(recipe, Facts("moe", "mixtral", experts=4, top_k=2))]
        assert trial_plan(trials, contents, "tiny-moe", [recipe], [0], [])[1]


def test_each_model_has_its_own_number_of_experts_per_token():
    other = ["models.other={upcycle: {from: tiny, experts: 4, top_k: 1, layers: [1, 3]}}",
             "pairs=[{moe: tiny-moe, dense: tiny}, {moe: other, dense: tiny}]"]
    sweep = searching(*other, trials=2, space={
        "router.top_k": {"choice": [1, 2]}, "learning_rate": {"choice": [1e-3, 2e-3]}})
    found = members(selecting(sweep), check_search(sweep, SMOKE), SMOKE.parent)
    assert {m.model: [m.space.recipe({"router.top_k": k}).router.top_k for k in (1, 2)]
            for m in found if m.side == "moe"} == {"tiny-moe": [1, None], "other": [None, 2]}


REFUSED_DRAWS = {
    "range of batch sizes": (
        {"batch_size": {"uniform": [4, 32]}},
        "search.space.batch_size: 5 is refused: batch_size: 5 cannot be cut into 2 equal parts, "
        "one per worker; use a multiple; or list the values that work as a choice"),
    "batch size of a choice": (
        {"batch_size": {"choice": [4, 7]}},
        "search.space.batch_size: 7 is refused: batch_size: 7 cannot be cut into 2 equal parts, "
        "one per worker; use a multiple"),
    "more experts than there are": (
        {"router.top_k": {"uniform": [1, 6]}},
        "search.space.router.top_k: 6 is refused: router.top_k: tiny-moe: 6 is more than the 4 "
        "experts; lower it; or list the values that work as a choice"),
    "knob that the family lacks": (
        {"dropout.residual": {"choice": [0.0, 0.1]}, "router.capacity": {"choice": [None, 1]}},
        "search.space.router.capacity: 1 is refused: router.capacity: tiny-moe: qwen2_moe has no "
        "capacity that can be set"),
}


@pytest.mark.parametrize("case", REFUSED_DRAWS)
def test_a_value_that_its_trial_would_be_refused_for_is_refused_at_once(case):
    space, expected = REFUSED_DRAWS[case]
    found = refusal(space)
    assert expected in found and len(found.splitlines()) == 1


def test_a_long_range_is_tried_at_its_ends_and_where_it_is_drawn():
    """Of 1,999 even and odd sizes the ends are even; among the four draws is an odd one."""
    found = refusal({"batch_size": {"uniform": [2, 2000]}})
    assert re.search(r"search.space: trial \d \(batch_size=\d*[13579]\) is refused: batch_size",
                     found)
    assert "narrow the space" in found
