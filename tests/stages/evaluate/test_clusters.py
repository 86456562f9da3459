"""Documents that several data sets are declared to share are one cluster in every evaluation that
reads several; all others stay apart."""

import pandas as pd
import pytest

from stages.evaluate.base import Response
from stages.evaluate.held_prompts import TargetAttack
from stages.evaluate.language_modelling import Perplexity
from stages.evaluate.open_questions import FalsePremises
from stages.evaluate.safety import Refusal
from stages.evaluate.vision import ImageClassification

DOCUMENTS = ["=group/a", "0123456789abcdef", "b"]
COLUMNS = {"text": "text", "prompt": "Explain bribes.", "category": "", "question": "Why?"}


def scored(evaluation, data):
    responses = {r.id: Response(r.id, (-1.0,), (1,), text="No.") for r in evaluation.requests(data)}
    return evaluation.score(data, responses)


CASES = [
    (Refusal(harmful=("one",), benign=("two",)), scored),
    (FalsePremises(false=("one",), true=("two",)), scored),
    (Perplexity(in_domain=("one",), out_of_domain=("two",), window=8), scored),
    (TargetAttack(harmful=("one", "two")), TargetAttack.about),
    (ImageClassification(dataset="one", shifted=("two",)), ImageClassification.about),
]


@pytest.mark.parametrize(("evaluation", "rows"), CASES, ids=lambda value: type(value).__name__)
def test_shared_documents_are_one_cluster(evaluation, rows):
    frame = pd.DataFrame({"id": list("xyz"), "document": DOCUMENTS, "answers": [["x"]] * 3,
                          "image": [b"x"] * 3, **COLUMNS})  # fmt: skip
    # Other labels: these images are not the same in another form.
    data = {name: frame.assign(label=name) for name in ("one", "two")}
    assert rows(evaluation, data)["document"].tolist() == [
        "=group/a", "one/0123456789abcdef", "one/b",
        "=group/a", "two/0123456789abcdef", "two/b",
    ]  # fmt: skip
