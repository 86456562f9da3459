"""Recipes with a classification head, and recipes that start where another one ended."""

import pytest
from smoke import SMOKE

from pipeline.checks import check
from pipeline.plan import build
from pipeline.search.checks import check_search
from pipeline.sweep_file import load
from stages.errors import BadInput

HEAD = (
    "recipes.head={data: [{dataset: reviews, template: sentiment}], head: classification, "
    "steps: 4, batch_size: 8, learning_rate: 0.001}"
)
ASKED = (
    "evaluations.heads={kind: out_of_distribution, in_distribution: reviews, "
    "out_of_distribution: [hotels], template: sentiment, method: head}"
)
NEXT = HEAD.replace("recipes.head", "recipes.next").replace("head: cl", "after: head, head: cl")
NLI = "evaluations.heads.template=sentiment_with_neutral"


def planned(*overrides):
    sweep = load(SMOKE, [*overrides])
    return build(sweep, check(sweep, SMOKE))


def scored(plan, recipe):
    return {role.split("/")[-1] for role in plan.compare.inputs
            if role.startswith("scores/") and role.split("/")[2] == recipe}


def test_heads_and_language_models_are_each_scored_on_what_asks_for_them():
    plan = planned(HEAD, ASKED)
    language = {"refusal", "questions", "edits", "domains"}
    assert scored(plan, "none") == scored(plan, "sft") == language
    assert scored(plan, "head") == {"heads"}
    spec = plan.compare.spec
    assert not spec.has("none", "heads") and spec.has("head", "heads", "tiny-moe", "tiny")
    assert not spec.has("head", "questions")


def test_a_recipe_after_another_starts_from_its_checkpoint_of_the_same_model_and_seed():
    plan = planned("seeds=[0, 1]", HEAD, ASKED, NEXT)
    for model in ("tiny-moe", "tiny"):
        for seed in (0, 1):
            node = plan.nodes[f"finetune/{model}-next-seed{seed}"]
            assert node.inputs["model"] == f"finetune/{model}-head-seed{seed}"
            assert plan.nodes[node.inputs["model"]].inputs["model"] == f"model/{model}"
    before = plan.nodes["finetune/tiny-next-seed0"].fingerprint
    longer = planned("seeds=[0, 1]", HEAD, ASKED, NEXT, "recipes.head.steps=5")
    assert longer.nodes["finetune/tiny-next-seed0"].fingerprint != before


def test_a_first_stage_that_nothing_is_scored_on_is_trained_and_not_reported():
    first = HEAD.replace("head: classification, ", "").replace("recipes.head", "recipes.first")
    after = NEXT.replace("after: head", "after: first")
    sweep = load(SMOKE, [first, after, ASKED, "untuned=false"])
    heads_only = sweep.model_copy(update={
        "recipes": {name: sweep.recipes[name] for name in ("first", "next")},
        "evaluations": {"heads": sweep.evaluations["heads"]}})
    plan = build(heads_only, check(heads_only, SMOKE))
    assert plan.compare.spec.recipes == ("next",)
    assert plan.nodes["finetune/tiny-next-seed0"].inputs["model"] == "finetune/tiny-first-seed0"


def test_other_words_than_the_trained_ones_are_for_what_no_recipe_trained():
    """The untuned models, a recipe of other data, and other labels of another data set."""
    chat = "evaluations.domains.chat=true"
    three = "evaluations.domains.template=sentiment_with_neutral"
    limited = "recipes.sft.evaluations=[refusal, questions, edits]"
    for asked in (chat, three):
        with pytest.raises(BadInput, match="or leave domains out of the recipe's evaluations"):
            planned(asked)
        assert "domains" in scored(planned(asked, limited), "none")
        assert "domains" in scored(planned(asked, "recipes.sft.data=[{dataset: refusals}]"), "sft")
    other = ("evaluations.domains.in_distribution=hotels",
             "evaluations.domains.out_of_distribution=[others]",
             "datasets.others={task: classification, source: 'file:smoke/hotels.csv'}")
    assert "domains" in scored(planned(three, *other), "sft")
    with pytest.raises(BadInput, match="domains.chat: recipe sft trains reviews"):
        planned(chat, *other)


@pytest.mark.parametrize(
    "overrides, reason, remedy",
    [
        ((ASKED,), "evaluations.heads.method: head needs a recipe", "use label_words"),
        ((HEAD, ASKED, NLI), "evaluations.heads.method: the head of recipe head is for negative, "
         "positive", "use the template that it is trained with"),
        ((HEAD, ASKED, "recipes.head.evaluations=[questions]"), "recipes.head.evaluations: "
         "questions cannot score a classification head", "remove it"),
        ((HEAD, ASKED, "recipes.sft.evaluations=[heads]"), "recipes.sft.evaluations: heads cannot "
         "score a language model", "set its method to label_words"),
        ((HEAD, ASKED, "recipes.head.data.0={dataset: refusals}"),
         "recipes.head.data.0.template: is missing", "or remove head"),
        ((HEAD, ASKED, "recipes.sft.after=hed"), "recipes.sft.after: unknown recipe 'hed'",
         "did you mean 'head'"),
        ((HEAD, ASKED, NEXT, "recipes.head.after=next"), "recipes.head.after: comes after itself "
         "(head after next after head)", "break the circle"),
        ((HEAD, ASKED, "recipes.sft.after=head"), "recipes.sft.after: head ends with a head for "
         "negative, positive", "same labels"),
        ((HEAD, ASKED, NEXT, "recipes.head.models=[tiny]"), "recipes.next.after: head does not "
         "fine-tune tiny-moe", "mend its models"),
    ],
)
def test_what_cannot_work_is_refused(overrides, reason, remedy):
    sweep = load(SMOKE, [*overrides])
    with pytest.raises(BadInput) as caught:
        check(sweep, SMOKE)
    line = next(line for line in str(caught.value).splitlines() if reason in line)
    assert remedy in line


def test_a_search_starts_from_the_models_as_they_are_and_scores_what_it_trains():
    search = ("search={base: BASE, space: {learning_rate: {log_uniform: [0.001, 0.01]}}, "
              "objectives: [{score: edits/clean_accuracy}], trials: 2}")
    for base, reason in (("next", "search.base: next comes after another recipe"),
                         ("head", "edits cannot score what head trains")):
        sweep = load(SMOKE, [HEAD, ASKED, NEXT, search.replace("BASE", base)])
        with pytest.raises(BadInput, match=reason):
            check_search(sweep, SMOKE)
