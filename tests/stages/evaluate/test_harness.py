"""Tasks of lm-evaluation-harness through our engine: the same answers as its ``hf`` backend, item
by item, and the same numbers."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from stages.errors import StageFailed
from stages.evaluate import harness_replay, harness_sums, seq2seq
from stages.evaluate.base import Request, Response
from stages.evaluate.harness import LmEval
from stages.evaluate.harness_tasks import describe
from stages.evaluate.scorer import conversation
from stages.evaluate.spec import EvaluateSpec
from stages.evaluate.stage import run
from stages.evaluate.techniques import collected
from stages.models.load import load, load_tokenizer
from stages.models.tiny import tiny_model, tiny_tokenizer
from tests.stages.evaluate.harness_cases import GROUPS, OWN, TAGS, TASKS, TEMPLATES, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("harness")
    own = root / "own"
    own.mkdir()
    for split, count, seed in (("train", 8, 1), ("test", 10, 2)):
        lines = [json.dumps(row) for row in rows(count, seed)]
        (own / f"{split}.jsonl").write_text("\n".join(lines))
    files = {split: f"own/{split}.jsonl" for split in ("train", "test")}
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(root / "cache")},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        text = yaml.safe_dump({"task": name, "tag": TAGS.get(name, [])} | shared | task)
        (own / f"{name}.yaml").write_text(re.sub("'!function (.*)'", r"!function \1", text))
    (own / "own.py").write_text(OWN)
    for name, group in GROUPS.items():
        (own / f"{name}.yaml").write_text(yaml.safe_dump({"group": name} | group))
    (own / "gone.yaml").write_text(
        yaml.safe_dump({"task": "gone"} | TASKS["quiz"] | {"dataset_path": "nobody/nothing"})
    )
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", tokenizer, seed=0)
    # Questions with their shots, and texts, are longer than that.
    model.config.max_position_embeddings = 160
    model.save_pretrained(root / "m")
    tokenizer.save_pretrained(root / "m")
    encoder = tiny_model("t5", tokenizer, seed=0)
    encoder.config.n_positions = 50
    encoder.save_pretrained(root / "encoder")
    tokenizer.save_pretrained(root / "encoder")
    # Shots and system texts take their place.
    model.config.max_position_embeddings = 1000
    for name, template in TEMPLATES.items():
        model.save_pretrained(root / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def beside(folder, monkeypatch):
    """The tasks' relative paths start where the sweep file lies."""
    monkeypatch.chdir(folder)
    # What the harness tells about the machine takes it longer than these tasks.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def evaluation(folder, task, **fields):
    found = describe(task, folder / "own")
    return LmEval(task=task, include_path="own", harness=found, **fields)


def ours(folder, output, task, model="m", **fields):
    spec = EvaluateSpec(evaluation=evaluation(folder, task, **fields), shard_size=5)
    output.mkdir(exist_ok=True)
    run(spec, {"checkpoint": folder / model}, output)
    scores = pd.read_parquet(output / "scores.parquet")
    return scores, json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def peer(folder):
    return HFLM(pretrained=load(folder / "m"), tokenizer=load_tokenizer(folder / "m"), batch_size=4)


def theirs(folder, peer, task, **fields):
    manager = TaskManager(include_path=str(folder / "own"), include_defaults=False)
    return simple_evaluate(peer, tasks=[task], task_manager=manager, bootstrap_iters=0, **fields)


@pytest.fixture
def seen(monkeypatch):
    """What the harness says of our answers."""
    found, replayed = {}, harness_replay.evaluate

    def spy(*arguments, **options):
        found["results"] = replayed(*arguments, **options)
        return found["results"]

    monkeypatch.setattr(harness_replay, "evaluate", spy)
    return found


def assert_same_answers(mine, other):
    assert len(mine["resps"]) == len(other["resps"])
    for (answer,), (wanted,) in zip(mine["resps"], other["resps"], strict=True):
        if isinstance(wanted, str):
            assert answer == wanted
        elif isinstance(wanted, float):
            assert answer == pytest.approx(wanted, abs=1e-4, rel=1e-6)  # summed in 32 bits there
        else:
            assert answer[0] == pytest.approx(wanted[0], abs=1e-4)
            assert answer[1] == wanted[1]


@pytest.mark.parametrize("task", TASKS)
def test_equals_the_hf_backend_item_by_item(task, folder, peer, tmp_path, seen):
    scores, summary = ours(folder, tmp_path, task)
    expected = theirs(folder, peer, task)
    for mine, other in zip(
        seen["results"]["samples"][task], expected["samples"][task], strict=True
    ):
        assert mine["arguments"] == other["arguments"]
        assert_same_answers(mine, other)
    assert len(scores) == 10 and scores["example_id"].is_unique
    for name, row in summary.items():
        metric, _, filter = name.partition(".")
        value = expected["results"][task][f"{metric},{filter or 'none'}"]
        if metric == "drawn":
            assert np.isnan(row["value"]) and row["n"] == 0
            continue
        assert row["value"] == pytest.approx(value, rel=1e-4)
        assert row["n"] == 10


@pytest.mark.parametrize("task", ["quiz", "pair", "last", "write"])
def test_an_encoder_reads_what_the_hf_backend_gives_it(task, folder, tmp_path, seen):
    """The end of a context, which may be empty; a blank behind it belongs to the choices."""
    model, tokenizer = load(folder / "encoder"), load_tokenizer(folder / "encoder")
    scores, _ = ours(folder, tmp_path, task, "encoder")
    assert scores["prompt"].str.len().max() > 50
    expected = theirs(folder, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), task)
    samples = expected["samples"][task]
    for mine, other in zip(seen["results"]["samples"][task], samples, strict=True):
        if task == "write":  # the backend goes on by the length of the batch's prompts
            (answer,), (wanted,) = mine["resps"][0], other["resps"][0]
            assert answer == wanted[:12]
        else:
            assert_same_answers(mine, other)


def test_an_encoder_reads_other_contexts_whole(folder):
    model, tokenizer = load(folder / "encoder"), load_tokenizer(folder / "encoder")
    long = Request("q", "0123456789 " * 20, (" yes",))
    cut = replace(long, context=long.context[-51:])  # a byte is a token, and the blank a choice's
    whole, end = (response.logprobs[0] for response in seq2seq.score(model, tokenizer, [long, cut]))
    asked = [replace(long, harness=True), replace(cut, harness=True)]
    found = [response.logprobs[0] for response in seq2seq.score(model, tokenizer, asked)]
    assert found == pytest.approx([end, end], abs=1e-5) and abs(whole - end) > 0.01


SYSTEM = "You know everything."
CHATS = [
    ("turns", "quiz", {}),
    ("turns", "quiz", {"fewshot_as_multiturn": False, "system_instruction": SYSTEM}),
    ("turns", "last", {"system_instruction": SYSTEM}),
    ("turns", "write", {}),
    ("turns", "begun", {}),
    ("turns", "begun", {"fewshot_as_multiturn": False, "system_instruction": SYSTEM}),
    ("turns", "read", {"system_instruction": SYSTEM}),
    ("turns", "prose", {}),  # a whole text is no conversation
    ("no-system", "pair", {}),
    ("no-system", "quiz", {"system_instruction": SYSTEM}),
    ("no-system", "begun", {"system_instruction": SYSTEM}),
]


@pytest.mark.parametrize(("name", "task", "fields"), CHATS)
def test_chat_templates_equal_the_hf_backend_item_by_item(
    name, task, fields, folder, tmp_path, seen
):
    model, tokenizer = load(folder / name), load_tokenizer(folder / name)
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    scores, summary = ours(folder, tmp_path, task, name, apply_chat_template=True, **fields)
    expected = theirs(folder, peer, task, apply_chat_template=True, **fields)
    samples = zip(seen["results"]["samples"][task], expected["samples"][task], strict=True)
    for mine, other in samples:
        for (asked, *_), (wanted, *_) in zip(mine["arguments"], other["arguments"], strict=True):
            if isinstance(asked, harness_replay.Conversation):
                asked = conversation(tokenizer, json.loads(asked))
            assert asked == wanted
        assert_same_answers(mine, other)
    for name, row in summary.items():
        value = expected["results"][task][f"{name},none" if "." not in name else
                                          name.replace(".", ",")]  # fmt: skip
        assert row["value"] == pytest.approx(value, rel=1e-4)
    if task == "begun":
        # Without the template's marks, as people read it.
        assert "assistant: The answer:" in scores["prompt"][0]


def test_turns_of_shots_and_the_system_are_as_asked_for(folder):
    def turns(**fields):
        asked = evaluation(folder, "quiz", apply_chat_template=True, **fields).requests({})
        return [turn["role"] for turn in json.loads(asked[0].messages)]

    assert turns() == ["user", "assistant", "user", "assistant", "user"]
    assert turns(fewshot_as_multiturn=False) == ["user"]
    assert turns(system_instruction="s", num_fewshot=1) == ["system", *turns()[:3]]
    # Without a chat template the system's text stands before the others.
    (asked, *_) = evaluation(folder, "quiz", system_instruction="Hear: ").requests({})
    assert asked.messages == "" and asked.context.startswith("Hear: ")


def test_chat_templates_that_cannot_act(folder, tmp_path):
    with pytest.raises(ValueError, match="fewshot_as_multiturn has no effect without apply_chat"):
        evaluation(folder, "quiz", fewshot_as_multiturn=False)
    with pytest.raises(StageFailed, match="no chat template to put a conversation into"):
        ours(folder, tmp_path, "pair", "none", apply_chat_template=True)


def test_answers_are_stored_as_the_harness_cuts_them(folder, tmp_path):
    scores, _ = ours(folder, tmp_path, "write")
    assert not scores["answer"].str.contains("e").any()
    assert (scores["answer"].str.len() > 0).any()
    assert {"exact_match.first", "exact_match.letters", "bleu.first.correct_1"} <= {*scores.columns}


@pytest.mark.parametrize(
    ("group", "weighted"), [("both", True), ("even", False)]
)  # all examples alike, or all tasks
def test_a_group_s_number_and_those_of_its_tasks(group, weighted, folder, peer, tmp_path):
    scores, summary = ours(folder, tmp_path, group, limit=6 if weighted else None)
    expected = theirs(folder, peer, group, limit=6 if weighted else None)["results"]
    assert summary["acc"]["value"] == pytest.approx(expected[group]["acc,none"])
    for task in ("quiz", "pair"):
        assert summary[f"acc/{task}"]["value"] == expected[task]["acc,none"]
    assert scores["subset"].value_counts().to_dict() == dict.fromkeys(
        ("quiz", "pair"), 6 if weighted else 10
    )


def test_shots_and_limit_are_the_harness_s(folder, peer, tmp_path):
    scores, _ = ours(folder, tmp_path, "quiz", num_fewshot=1, limit=3)
    expected = theirs(folder, peer, "quiz", num_fewshot=1, limit=3)["samples"]["quiz"]
    assert list(scores["prompt"]) == [sample["arguments"][0][0] for sample in expected]
    assert scores["prompt"].str.count("Answer:").tolist() == [2, 2, 2]


def test_examples_of_one_source_are_one_cluster(folder, tmp_path):
    scores, summary = ours(folder, tmp_path, "quiz", document="passage")
    assert scores["document"].nunique() == 5
    assert summary["acc"]["n"] == 10 and summary["acc"]["documents"] == 5
    with pytest.raises(StageFailed, match="document: quiz has no column 'source'; it has answer"):
        ours(folder, tmp_path / "again", "quiz", document="source")


def test_choices_of_a_question_are_one_request(folder):
    asked = evaluation(folder, "quiz").requests({})
    # Each question with its four choices; and the choices without the question, for mutual
    # information.
    assert len(asked) == 20
    assert {len(request.choices) for request in asked} <= {3, 4}
    assert len({request.id for request in asked}) == 20


def test_data_that_changed_is_told_and_not_scored(folder, tmp_path):
    spec = EvaluateSpec(evaluation=evaluation(folder, "pair"))
    asked = spec.evaluation.requests({})
    file = folder / "own" / "test.jsonl"
    before = file.read_text()
    file.write_text(before.replace("river", "lake"))
    try:
        with pytest.raises(StageFailed, match="responses are missing"):
            spec.evaluation.score({}, {request.id: None for request in asked})
        changed = evaluation(folder, "pair").harness.digest
    finally:
        file.write_text(before)
    assert changed != spec.evaluation.harness.digest


def test_a_tag_is_its_tasks_without_a_number_of_its_own(folder, peer, tmp_path):
    scores, summary = ours(folder, tmp_path, "choices", limit=4)
    expected = theirs(folder, peer, "choices", limit=4)["results"]
    assert set(expected) == {"quiz", "pair"}
    assert "acc" not in summary
    for task in expected:
        assert summary[f"acc/{task}"]["value"] == expected[task]["acc,none"]
    assert scores["subset"].value_counts().to_dict() == {"quiz": 4, "pair": 4}
    # Of a tag with one task the metrics are that task's.
    assert evaluation(folder, "known").primary == "acc"


def test_a_class_is_described_without_its_data(folder):
    (task,) = evaluation(folder, "read").harness.tasks
    assert task.output_types == ("loglikelihood", "generate_until")
    assert [(m.name, m.aggregation, m.higher_is_better) for m in task.measures] == [
        ("length", "own.mean", False), ("margin", "own.mean", True), ("odds", "own.odds", True)
    ]  # fmt: skip
    assert evaluation(folder, "read").writes_texts and not evaluation(folder, "read").generates


def test_a_class_that_asks_for_something_else_is_refused(folder, monkeypatch):
    made = harness_replay._load

    def load_other(asked):
        loaded = made(asked)
        task, given = loaded["tasks"]["last"], loaded["tasks"]["last"].construct_requests

        def other(**options):
            instance = given(**options)
            instance.request_type = "attention"
            return instance

        task.construct_requests = other
        return loaded

    monkeypatch.setattr(harness_replay, "_load", load_other)
    with pytest.raises(StageFailed, match="task last asks the model for attention, which is none"):
        evaluation(folder, "last").requests({})


def test_influences_of_a_task_s_own_mean_are_its_examples_values(folder, tmp_path):
    scores, summary = ours(folder, tmp_path, "read")
    assert scores["length.influence"].tolist() == scores["answer"].str.len().tolist()
    assert scores["prediction"].tolist() == scores["answer"].tolist()
    # A ratio of sums: what the delta method gives.
    assert scores["odds.influence"].mean() == pytest.approx(summary["odds"]["value"])
    assert summary["odds"]["ci_low"] < summary["odds"]["value"] < summary["odds"]["ci_high"]


def test_where_no_number_has_an_interval_the_reason_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(harness_replay, "influences", lambda *a: harness_sums.influences(
        lambda items: {"short": 0.5}, *a[1:]))  # fmt: skip
    with pytest.raises(StageFailed, match=r"no use for intervals \(length of read: it fails with "
                       r"TypeError: float.*; margin of read"):  # fmt: skip
        ours(folder, tmp_path, "read")


def test_a_metric_that_jumps_is_a_gap_with_a_reason(folder):
    found = evaluation(folder, "pair")
    task = found.harness.tasks[0]
    median = task.measures[0].model_copy(update={"aggregation": "median"})
    tasks = (task.model_copy(update={"measures": (median, *task.measures[1:])}),)
    harness = found.harness.model_copy(update={"tasks": tasks})
    metrics = found.model_copy(update={"harness": harness}).metrics()
    assert [(m.name, m.gap) for m in metrics] == [
        ("f1", ""),
        ("mcc", ""),
        ("brier_score", ""),
        ("acc", "the harness sums it up by median, which is no function of sums over examples"),
    ]


def test_a_number_that_is_not_the_harness_s_is_refused(folder, tmp_path, monkeypatch):
    values = harness_replay._values
    monkeypatch.setattr(
        harness_replay, "_values", lambda *a: {n: 0.5 for n in values(*a)}
    )
    with pytest.raises(StageFailed, match="is 0 from the examples and 0.66.* as the harness"):
        ours(folder, tmp_path, "pair")


def test_data_that_cannot_be_had_is_a_reason(folder, monkeypatch):
    import datasets

    def refuse(path, **options):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        StageFailed, match="lm_eval task gone: its data cannot be had: Couldn't reach 'nobody/noth"
    ):
        evaluation(folder, "gone").requests({})


def test_texts_have_no_special_token_as_in_the_harness(folder):
    """Not even those that tell thought from answer, which other evaluations keep."""
    asked = evaluation(folder, "write").requests({})
    assert len(asked) == 10 and not any(request.thoughts for request in asked)


SAMPLED = {"kind": "self_consistency", "samples": 3}
SAID = [
    # What three samples say, and which of them stands for them.
    (("1 + 4 #### 5", "2 + 2 #### 4", "6 - 2 #### 4"), 1),
    (("#### 5", "It is 4", "So it is 4"), 1),  # agree where only the second filter finds any
    (("Who knows?", "Not I", "#### 5"), 2),
    (("Who knows?", "Not I", "Nor I"), 0),
]


@pytest.mark.parametrize(("said", "chosen"), SAID, ids=lambda value: str(value)[:20])
def test_samples_agree_on_what_the_filters_take_from_them(said, chosen, folder):
    found = evaluation(folder, "sums", technique=SAMPLED)
    request = found.requests({})[3]
    responses = {f"{request.id}#sample{n}": Response("", text=text) for n, text in enumerate(said)}
    voted = collected(found.technique, [request], responses, found.voter({}))
    assert voted[request.id].text == said[chosen]


def test_a_task_is_scored_on_what_its_samples_agree_on(folder, tmp_path, seen):
    """Runs as a whole; each example's answer is one of its samples."""
    scores, _ = ours(folder, tmp_path, "sums", technique=SAMPLED | {"temperature": 5.0}, limit=3)
    texts = pd.concat(map(pd.read_parquet, sorted((tmp_path / "responses").iterdir())))
    assert len(texts) == 9 and len(scores) == 3
    assert set(scores["answer"]) <= set(texts["text"])


@pytest.mark.parametrize("task", ["begun", "letters"])
def test_samples_of_a_task_without_a_filter_are_refused(task, folder):
    with pytest.raises(ValueError, match=f"votes on what a task's filter .* {task} has no filter; "
                                         "remove technique"):  # fmt: skip
        evaluation(folder, task, technique=SAMPLED)
