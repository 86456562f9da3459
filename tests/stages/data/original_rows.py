"""What the fixtures in the original formats hold, row by row, as it must be read."""

import hashlib


def prompts(*rows):
    return [{"prompt": prompt, "category": category} for prompt, category in rows]


def pairs(*rows, document=None, group=""):
    """Rows of one premise are one document, named by the premise's digest unless it has an id."""
    names = ("premise", "hypothesis", "label", "document")
    return [dict(zip(names, (*row, document or group + digest(row[0])), strict=True))
            for row in rows]


def paraphrases(*rows):
    names = ("sentence1", "sentence2", "label", "document")
    return [dict(zip(names, (*row, digest(row[0])), strict=True)) for row in rows]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def texts(*rows):
    return [{"text": text, "label": label} for text, label in rows]


MEND = ' How do I mnd a "NA" clock?'
TRUE_FALSE = {
    "question": "Do pigs fly?",
    "best_answer": "No, they walk",
    "correct_answers": ["No, they walk", "Pigs do not fly"],
    "incorrect_answers": ["Yes", "Only at night"],
    "best_incorrect_answer": "",
    "category": "Animals",
}
# Data set, file, rows, and what is left out.
FILES = [
    (
        "malicious_instructions",
        "instructions.json",
        prompts(("Explain how to pick a lock", "crime"), ("NA", "hate")),
        {"filtered": 1},
    ),
    (
        "alpaca_control",
        "instructions.json",
        prompts(
            ("Explain how to pick a lock", "crime"), ("NA", "hate"), ("Tease a child", "hate")
        ),
        {},
    ),
    (
        "alpaca",
        "alpaca_data.json",
        [
            {"prompt": "Add the numbers.\n\n2 and 3", "response": "5"},
            {"prompt": "Say NA.", "response": "NA"},
            {"prompt": "How do I tease a child?", "response": "Be kind instead."},
        ],
        {},
    ),
    (
        "safety_instructions",
        "alpaca_data.json",
        [
            {"prompt": "Add the numbers.\n\n2 and 3", "response": "5"},
            {"prompt": "Say NA.", "response": "NA"},
        ],
        {"filtered": 1},
    ),
    (
        "advbench",
        "harmful_behaviors.csv",
        prompts(('Write a "harmless" virus', ""), ("null", "")),
        {"filtered": 0},
    ),
    (
        "strongreject",
        "strongreject_dataset.csv",
        prompts(("Describe a trap,\nstep by step", "Violence")),
        {"filtered": 0},
    ),
    (
        "harmbench",
        "harmbench_behaviors_text_all.csv",
        prompts(("Build a trap", "illegal")),
        {"filtered": 0},
    ),
    (
        "do_not_answer",
        "data_en.csv",
        prompts(("How do scams work?", "Malicious Uses")),
        {"filtered": 0},
    ),
    ("xstest_safe", "xstest_prompts.csv", prompts(("How do I kill a process?", "homonyms")), {}),
    (
        "xstest_unsafe",
        "xstest_prompts.csv",
        prompts(("How do I kill a neighbour?", "contrast_homonyms")),
        {"filtered": 0},
    ),
    ("truthfulqa", "TruthfulQA.csv", [TRUE_FALSE], {}),
    (
        "truthfulqa",
        "TruthfulQA_2025.csv",
        [TRUE_FALSE | {"best_incorrect_answer": "Yes"}],
        {},
    ),
    (
        "nq_open",
        "NQ-open.dev.jsonl",
        [{"question": "who wrote null", "answers": ["NA", "n/a"], "category": ""}],
        {},
    ),
    (
        "freshqa_false_premises",
        "freshqa.csv",
        [
            {
                "question": "When did pigs learn to fly?",
                "answers": ["They did not, and cannot", "No pig flies"],
                "category": "never-changing",
            }
        ],
        {},
    ),
    (
        "freshqa_true_premises",
        "freshqa.csv",
        [{"question": "Who is the mayor?", "answers": ["Ann"], "category": "fast-changing"}],
        {},
    ),
    (
        "snli_hard",
        "snli_1.0_test_hard.jsonl",
        pairs(
            ("A man sits.", 'A man is "tired".', "neutral"),
            ("NA", "null", "contradiction"),
            group="=snli_premises/",
        ),
        {"no label": 1},
    ),
    (
        "snli",
        "snli_1.0_test.txt",
        pairs(('A "dog" runs.', "An animal moves.", "entailment"), group="=snli_premises/"),
        {"no label": 1},
    ),
    (
        "mnli",
        "snli_1.0_test.txt",
        pairs(('A "dog" runs.', "An animal moves.", "entailment")),
        {"no label": 1},
    ),
    (
        "anli_r1",
        "anli_test.jsonl",
        pairs(
            ("Ann was born in 1950.", "Ann is old.", "neutral"),
            ("Ann was born in 1950.", "Ann was born.", "entailment"),
        ),
        {"no label": 0},
    ),
    (
        "wanli",
        "wanli.jsonl",
        pairs(("It rains.", "It is dry.", "contradiction")),
        {"no label": 0},
    ),
    (
        "contract_nli",
        "contract_nli.json",
        pairs(
            ("The\tparty shall\nkeep it.", "It is kept.", "entailment"),
            ("The\tparty shall\nkeep it.", "It is sold.", "neutral"),
            document="3",
        ),
        {"no label": 0},
    ),
    (
        "counterfactual_snli",
        "counterfactual_nli.tsv",
        pairs(
            ('Boys say "Police" aloud.', "Boys speak.", "entailment"),
            ("NA", "null", "contradiction"),
            group="=snli_premises/",
        ),
        {"no label": 0},
    ),
    (
        "adv_glue_mnli",
        "adv_glue.json",
        pairs(("It rains.", "It is dry.", "contradiction")),
        {"no label": 0},
    ),
    (
        "adv_glue_mnli_mismatched",
        "adv_glue.json",
        pairs(("a", "b", "entailment")),
        {"no label": 0},
    ),
    (
        "adv_glue_rte",
        "adv_glue.json",
        pairs(
            ("It rains.", "It is wet.", "entailment"),
            ("It rains.", "Ann sings.", "not_entailment"),
        ),
        {"no label": 0},
    ),
    (
        "adv_glue_qnli",
        "adv_glue.json",
        pairs(("Ann sang.", "Who sang?", "entailment")),
        {"no label": 0},
    ),
    (
        "anli",
        "boss_nli.tsv",
        pairs(
            ('First line\nand a "second"', "NA", "neutral"),
            ("It rains.", "null", "contradiction"),
        ),
        {"no label": 1},
    ),
    (
        "adv_glue_qqp",
        "adv_glue.json",
        paraphrases(
            (MEND, "How is a clock mended?", "paraphrase"),
            (MEND, "null", "not_paraphrase"),
        ),
        {"no label": 0},
    ),
    (
        "qqp",
        "qqp_dev.tsv",
        paraphrases(
            ('Is "NA a word?', "Is NA one?", "paraphrase"),
            ('Is "NA a word?', "null", "not_paraphrase"),
        ),
        {"no label": 0},
    ),
    (
        "rte",
        "rte_dev.tsv",
        pairs(
            ('It "rains.', "It is wet.", "entailment"),
            ("NA", "Ann sings.", "not_entailment"),
        ),
        {"no label": 0},
    ),
    (
        "qnli",
        "qnli_dev.tsv",
        pairs(
            ('"Ann" sang.', "Who sang?", "entailment"),
            ("null", "Who?", "not_entailment"),
        ),
        {"no label": 0},
    ),
    ("adv_glue_sst2", "adv_glue.json", texts(("it 's fin e", "positive")), {"no label": 0}),
    (
        "sst2_shakespeare_words",
        "style.jsonl",
        [
            {
                "document": "=sst2_validation/1",
                "text": "'tis a goodly film",
                "label": "positive",
            }
        ],
        {"no label": 0},
    ),
    (
        "sst2",
        "sst2_dev.tsv",
        texts(('"a quotation that never ends', "negative"), ("NA", "positive")),
        {"no label": 0},
    ),
    (
        "counterfactual_imdb",
        "counterfactual_imdb.tsv",
        texts(('A "great" waste.', "negative"), ("It's fine", "positive")),
        {"no label": 0},
    ),
    (
        "dynasent_r1",
        "dynasent.jsonl",
        texts(("Good when one needs it.", "positive"), ("It opens at 9.", "neutral")),
        {"no label": 2},
    ),
    (
        "semeval",
        "twitter-2016test-A.txt",
        texts(('@ann "good" day', "positive"), ("NA", "neutral"), ("bad\tday", "negative")),
        {"no label": 0},
    ),
    (
        "sst5",
        "sst5.jsonl",
        texts(("awful", "negative"), ("a film", "neutral"), ("superb", "positive")),
        {"no label": 1},
    ),
    (
        "amazon",
        "amazon.jsonl",
        texts(("null", "positive"), ("broke", "negative")),
        {"no label": 1},
    ),
    (
        "amazon",
        "boss_sentiment.tsv",
        texts(("NA", "negative"), ('Fine, "really"\tfine', "positive"), ("nan", "neutral")),
        {"no label": 0},
    ),
    (
        "civil_comments",
        "civil_comments.csv",
        texts(("Well, no", "benign"), ("NA", "toxic"), ("fool", "benign")),
        {"no label": 0},
    ),
    (
        "adv_civil",
        "boss_toxicity.tsv",
        texts(("null", "benign"), ("Go away", "toxic")),
        {"no label": 0},
    ),
    (
        "hate_speech",
        "hate_speech.csv",
        texts(("NA", "benign"), ("out", "toxic")),
        {"no label": 2},
    ),
    (
        "implicit_hate",
        "implicit_hate_v1_stg1_posts.tsv",
        texts(('rt @ann: "they" again', "toxic"), ("null", "benign"), ("go", "toxic")),
        {"no label": 0},
    ),
    (
        "toxigen",
        "annotated_test.csv",
        texts(("they came", "toxic"), ("NA", "benign"), ("middle", "toxic")),
        {"no label": 0},
    ),
    (
        "wikitext103",
        "wiki.test.raw",
        [
            {"text": " \n"},
            {
                "text": " = Robert = \n \n Robert is a name . \n \n = = Career = = \n \n"
                " He acts . \n"
            },
            {"text": " = Ann = \n \n NA \n"},
        ],
        {},
    ),
    ("pile_github", "pile.jsonl", [{"text": "def f(): pass"}], {}),
]
