import numpy as np
import pandas as pd
import pytest

from stages.evaluate.base import mean_of
from stages.evaluate.judges import Guard, Keywords, Regressor
from stages.evaluate.language_modelling import Perplexity
from stages.evaluate.out_of_distribution import AdversarialSets, OutOfDistribution
from stages.evaluate.partial import complete, left_out, reads, unasked, without
from stages.evaluate.prompting import Shots
from stages.evaluate.safety import Refusal
from stages.evaluate.truthfulness import MultipleChoice
from stages.statistics import summarise

DOMAINS = OutOfDistribution(
    in_distribution="amazon", out_of_distribution=("tweets", "nyt", "movie"), template="sentiment"
)
REFUSAL = Refusal(harmful=("advbench", "q_harm"), benign=("lookalikes",))


def test_the_rest_of_an_evaluation_names_what_was_left_out():
    rest = without(DOMAINS, {"nyt", "elsewhere"})
    assert rest.out_of_distribution == ("tweets", "movie")
    assert left_out(rest) == ("nyt",) and left_out(DOMAINS) == ()
    assert list(rest.datasets()) == ["amazon", "tweets", "movie"]
    again = OutOfDistribution.model_validate_json(rest.model_dump_json())
    assert again == rest != DOMAINS and without(REFUSAL, {"q_harm"}).harmful == ("advbench",)


@pytest.mark.parametrize(
    ("evaluation", "missing"),
    [
        (DOMAINS, {"amazon"}),
        (DOMAINS, {"tweets", "nyt", "movie"}),
        (REFUSAL, {"lookalikes"}),
        (MultipleChoice(dataset="sciq"), {"sciq"}),
    ],
)
def test_what_cannot_be_made_on_fewer_is_not(evaluation, missing):
    assert without(evaluation, missing) is None


def test_the_rest_of_an_evaluation_is_judged_by_the_other_judges():
    judges = (
        Keywords(kind="keywords"),
        Guard(kind="guard", name="guard", source="hub:maker/guard@1"),
        Regressor(kind="regressor", name="harm", source="hub:maker/harm@1", score_range=(0, 7)),
    )
    whole = REFUSAL.model_copy(update={"judges": judges})
    rest = without(whole, (), {"harm"})
    assert rest.judges == judges[:2] and unasked(rest) == ("harm",) and unasked(whole) == ()
    again = Refusal.model_validate_json(rest.model_dump_json())
    assert again == rest != whole and unasked(again) == ("harm",)
    names = {metric.name for metric in whole.metrics()}
    kept = {metric.name for metric in complete(rest)}
    assert {m.name for m in complete(again)} == kept
    assert names - kept == {name for name in names if "harmfulness/harm/" in name}
    assert {"harmful_refusal_rate", "harmfulness/guard/harmful"} < kept
    assert "worst_harmfulness/harm/harmful" in names
    # None of them is needed, and what is left out later adds to it.
    none = without(without(rest, {"q_harm"}), (), {"guard"})
    assert (unasked(none), left_out(none)) == (("guard", "harm"), ("q_harm",))
    assert none.judges == judges[:1]


def test_a_metric_reads_what_it_declares_or_its_name_tells_or_all():
    found = {m.name: reads(m, DOMAINS) for m in DOMAINS.metrics()}
    assert found["accuracy/nyt"] == found["macro_f1/nyt"] == {"nyt"}
    assert found["ood_accuracy"] == found["ood_macro_f1"] == {"tweets", "nyt", "movie"}
    assert found["id_accuracy"] == {"amazon"}
    assert found["id_minus_ood"] == {"amazon", "tweets", "nyt", "movie"}
    refusal = {m.name: reads(m, REFUSAL) for m in REFUSAL.metrics()}
    assert refusal["harmful_refusal_rate/q_harm"] == {"q_harm"}
    assert refusal["harmful_refusal_rate"] == {"advbench", "q_harm"}
    assert refusal["over_refusal_rate"] == {"lookalikes"}
    attacked = REFUSAL.model_copy(update={"jailbreak_templates": ("dan", "own")})
    found = {m.name: reads(m, attacked) for m in attacked.metrics()}
    # Its name tells one of the data sets that it reads.
    assert found["jailbreak_success_rate/dan"] == {"dan", "advbench", "q_harm"}
    language = Perplexity(in_domain=("wiki",), out_of_domain=("law", "news"))
    found = {m.name: reads(m, language) for m in language.metrics()}
    assert found["out_of_domain_perplexity"] == {"law", "news"}
    assert found["out_of_domain_worst_bits_per_byte"] == {"law", "news"}
    assert found["bits_per_byte_gap"] == {"wiki", "law", "news"}
    # Not the name of a data set, though it has one in it.
    other = mean_of("refused", "harmfulness/advbench/worst")
    assert reads(other, REFUSAL) == {"advbench", "q_harm", "lookalikes"}


def test_no_pooled_number_is_summarised_over_fewer_data_sets():
    rest = without(DOMAINS, {"nyt"})
    domains = np.repeat(["amazon", "tweets", "movie"], 4)
    scores = pd.DataFrame(
        {
            "example_id": [f"{d}/{i}" for i, d in enumerate(domains)],
            "document": [f"{d}/{i}" for i, d in enumerate(domains)],
            "subset": np.where(domains == "amazon", "in_distribution", "out_of_distribution"),
            "gold": "positive",
            "prediction": ["positive", "positive", "positive", "negative"] * 3,
            "domain": domains,
            "correct": [1.0, 1.0, 1.0, 0.0] * 3,
        }
    )
    names = set(summarise(scores, complete(rest)))
    assert {"accuracy/tweets", "accuracy/movie", "macro_f1/tweets", "id_accuracy"} <= names
    assert not names & {"ood_accuracy", "id_minus_ood", "ood_macro_f1", "accuracy/nyt"}
    assert summarise(scores, complete(rest))["accuracy/movie"]["value"] == 0.75
    assert "ood_accuracy" in summarise(scores, complete(DOMAINS))


def test_sets_that_shots_are_taken_from_cannot_be_left_out():
    fields = {"standard": "snli", "adversarial": ("r1", "r2"), "template": "nli"}
    shown = AdversarialSets(**fields, shots=Shots(dataset="demos", count=2))
    assert without(shown, {"demos"}) is None
    names = {metric.name for metric in complete(without(shown, {"r2"}))}
    assert {"standard_accuracy", "accuracy/r1", "macro_f1/r1"} <= names
    assert names.isdisjoint(
        {"adversarial_accuracy", "adversarial_worst_accuracy", "robustness_gap", "accuracy/r2"}
    )


def test_perplexity_in_domain_stays_where_a_domain_out_of_it_is_missing():
    whole = Perplexity(in_domain=("a",), out_of_domain=("b", "c"))
    names = [metric.name for metric in complete(without(whole, {"c"}))]
    assert names == [
        *("in_domain_bits_per_byte", "in_domain_perplexity"),
        *("bits_per_byte/a", "perplexity/a", "bits_per_byte/b", "perplexity/b"),
    ]
