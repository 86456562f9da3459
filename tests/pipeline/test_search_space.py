"""The space of recipes: dotted fields, draws, grids, conditions."""

import collections

import numpy as np
import pytest
from search_sweeps import BASE, search_of

from pipeline.search.space import Space
from pipeline.search.trial import value_of
from stages.errors import BadInput, StageFailed


def space(**dimensions: dict) -> Space:
    return Space(BASE, search_of(space=dimensions).space)


def test_values_are_set_by_dotted_path_in_lists_too():
    found = space(steps={"choice": [3]}, **{"data.1.repeat": {"choice": [4]}}).recipe(
        {"steps": 3, "data.1.repeat": 4, "learning_rate": 0.5})
    assert found == BASE.model_copy(update={
        "steps": 3, "learning_rate": 0.5,
        "data": (BASE.data[0], BASE.data[1].model_copy(update={"repeat": 4}))})


@pytest.mark.parametrize("path, reason", [
    ("learning_rat", "unknown field; did you mean 'learning_rate'?"),
    ("data.2.repeat", "data has 2 items; count from 0"),
    ("data.0.repeats", "unknown field; did you mean 'repeat'?"),
    ("steps.first", "steps is 9 in the base recipe and has no such part"),
])
def test_an_unknown_field_is_refused_with_the_nearest(path, reason):
    with pytest.raises(BadInput, match=reason.replace("?", r"\?")):
        space(**{path: {"choice": [1]}})


def test_ranges_cover_their_ends_evenly():
    found = space(warmup_steps={"uniform": [0, 3]}, weight_decay={"uniform": [0.1, 0.3]},
                  learning_rate={"log_uniform": [1e-5, 1e-1]})
    trials = [found.draw(7, number) for number in range(2000)]
    warmup = collections.Counter(t["warmup_steps"] for t in trials)
    assert sorted(warmup) == [0, 1, 2, 3] and all(type(v) is int for v in warmup)
    # Binomial, n = 2000, p = 1/4: five standard deviations are 97.
    assert all(abs(count - 500) < 97 for count in warmup.values())
    decay = np.array([t["weight_decay"] for t in trials])
    assert 0.1 <= decay.min() < 0.101 and 0.299 < decay.max() <= 0.3
    exponent = np.log10([t["learning_rate"] for t in trials])
    assert exponent.mean() == pytest.approx(-3, abs=5 * 4 / np.sqrt(12 * 2000))
    assert exponent.std() == pytest.approx(4 / np.sqrt(12), rel=0.05)
    assert abs(np.corrcoef(decay, exponent)[0, 1]) < 5 / np.sqrt(2000)


def test_a_draw_depends_on_seed_and_number_alone():
    one = space(learning_rate={"log_uniform": [1e-5, 1e-1]}, weight_decay={"uniform": [0, 1]})
    other = space(weight_decay={"uniform": [0, 1]})
    assert one.draw(3, 11) == one.draw(3, 11) != one.draw(3, 12)
    assert one.draw(3, 11) != one.draw(4, 11)
    # Fields that two spaces share get the same values in both.
    assert one.draw(3, 11)["weight_decay"] == other.draw(3, 11)["weight_decay"]


def test_a_condition_leaves_a_field_to_the_base_recipe():
    found = space(schedule={"choice": ["constant", "linear"]},
                  warmup_steps={"uniform": [1, 4], "when": {"schedule": ["linear"]}})
    trials = [found.draw(0, number) for number in range(100)]
    assert {("warmup_steps" in t, t["schedule"]) for t in trials} == {
        (True, "linear"), (False, "constant")}
    assert [values for path, values in found.probes() if path == "warmup_steps"] == [
        {"schedule": "linear", "warmup_steps": 1}, {"schedule": "linear", "warmup_steps": 4}]


def test_a_grid_has_each_combination_once_and_conditions_prune_it():
    found = space(
        schedule={"grid": ["constant", "linear"]}, precision={"grid": ["fp32", "bf16"]},
        warmup_steps={"grid": [1, 2, 3], "when": {"schedule": ["linear"]}})
    points = found.combinations()
    assert len(points) == 2 * 3 + 2 * 1
    assert len({tuple(sorted(point.items())) for point in points}) == len(points)
    assert [p["warmup_steps"] for p in points if p["schedule"] == "linear"] == [1, 2, 3] * 2


def test_random_draws_go_through_the_grids_in_turn():
    found = space(steps={"grid": [3, 6]}, weight_decay={"uniform": [0, 1]})
    trials = [found.draw(0, number) for number in range(6)]
    assert [t["steps"] for t in trials] == [3, 6, 3, 6, 3, 6]
    assert len({t["weight_decay"] for t in trials}) == 6


def test_weighted_sums_have_short_names_that_tell_them_apart():
    sums = [{"score": {"a/x": 1.0, "b/y": -0.5}}, {"score": {"a/x": 1.0}}]
    one = search_of(objectives=[{"score": "a/x"}, sums[0]])
    assert [one.label(o) for o in one.objectives] == ["a/x", "weighted sum"]
    two = search_of(objectives=sums[:1], algorithm={"kind": "asha", "intermediate": sums[1]})
    assert [two.label(o) for o in (two.objectives[0], two.intermediate)] == [
        "weighted sum 1", "weighted sum 2"]


def test_a_weighted_sum_by_hand():
    (one,) = search_of(objectives=[{"score": {"a/x": 1.0, "b/y": -0.5}}]).objectives
    assert value_of(one, {"a/x": 0.75, "b/y": 0.5, "c/z": 9.0}) == pytest.approx(0.5)
    with pytest.raises(StageFailed, match="b/y has no value on the selection split"):
        value_of(one, {"a/x": 0.75, "b/y": float("nan")})


@pytest.mark.parametrize("dimensions, reason", [
    ({"steps": {"choice": [3], "when": {"schedule": ["linear"]}}},
     "steps.when: schedule is not in the space"),
    ({"steps": {"choice": [3], "when": {"schedule": ["cosine"]}},
      "schedule": {"choice": ["linear"]}},
     "steps.when.schedule: 'cosine' is none of its values"),
    ({"steps": {"choice": [3], "when": {"weight_decay": [0]}}, "weight_decay": {"uniform": [0, 1]}},
     "steps.when.weight_decay: it is a range"),
    ({"steps": {"choice": [3], "when": {"schedule": ["linear"]}},
      "schedule": {"choice": ["linear"], "when": {"steps": [3]}}},
     r"waits for itself \(steps for schedule for steps\)"),
    ({"warmup_steps": {"grid": [1, 2], "when": {"schedule": ["cosine"]}},
      "schedule": {"choice": ["linear", "cosine"]}},
     "warmup_steps.when.schedule: is drawn, and grids are gone through in turn; write schedule as"),
])
def test_conditions_that_cannot_be_met_are_refused(dimensions, reason):
    with pytest.raises(BadInput, match=reason):
        space(**dimensions)
