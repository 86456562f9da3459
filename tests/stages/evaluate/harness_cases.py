"""Tasks, groups and tags of lm-evaluation-harness, of every kind that is run, with random data."""

import random

WORDS = "river stone cloud lamp green seven bread winter door music".split()


def sentence(rng, length):
    return " ".join(rng.choice(WORDS) for _ in range(length))


def rows(count, seed):
    rng = random.Random(seed)
    return [
        {
            "question": sentence(rng, rng.randint(3, 12)),
            "passage": f"passage {number // 2}",
            "choices": [sentence(rng, rng.randint(1, 4)) for _ in range(4)],
            "answer": rng.randrange(4),
            "label": rng.randrange(2),
            "text": sentence(rng, rng.randint(1, 150)),
        }
        for number in range(count)
    ]


def metrics(*names, **fields):
    return [{"metric": n, "aggregation": "mean", "higher_is_better": True} | fields for n in names]


TASKS = {
    "quiz": {
        "output_type": "multiple_choice",
        "training_split": "train",
        "num_fewshot": 2,
        # The space at the end goes to the choices.
        "doc_to_text": "{{question}}\nAnswer: ",
        "target_delimiter": "",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": metrics("acc", "acc_norm", "acc_mutual_info", "exact_match"),
    },
    "pair": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nTrue or false?",
        "doc_to_choice": ["false", "true"],
        "doc_to_target": "label",
        "metric_list": [
            *metrics("acc"),
            {"metric": "f1"},
            {"metric": "mcc"},
            {"metric": "brier_score"},
        ],
    },
    "last": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
    },
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["Q:", "e", "\nQ:"], "max_gen_toks": 12},
        "filter_list": [
            {"name": "first", "filter": [{"function": "take_first"}]},
            {
                "name": "letters",
                "filter": [
                    {"function": "regex", "regex_pattern": "([a-z]+)"},
                    {"function": "take_first"},
                ],
            },
        ],
        "metric_list": [
            *metrics("exact_match"),
            {"metric": "bleu"},
            {"metric": "chrf"},
            {"metric": "chrf++"},
            {"metric": "ter"},
        ],
    },
    "letters": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12},
        "process_results": "!function own.first_letters",
        "metric_list": [
            {"metric": "macro_f1", "aggregation": "!function own.macro_f1"},
            {"metric": "share", "aggregation": "!function own.mean"},
            {"metric": "drawn", "aggregation": "!function own.drawn"},
        ],
    },
    "sums": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12},
        "filter_list": [
            {
                "name": name,
                "filter": [
                    {"function": "regex", "regex_pattern": pattern, "group_select": -1},
                    {"function": "take_first"},
                ],
            }
            for name, pattern in (("strict", "#### (-?[0-9]+)"), ("flexible", "-?[0-9]+"))
        ],
        "metric_list": metrics("exact_match"),
    },
    "read": {"class": "!function own.Read"},
    "begun": {
        "output_type": "generate_until",
        "training_split": "train",
        "num_fewshot": 1,
        "description": "Answer in a word.",
        "gen_prefix": "The answer:",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 6},
        "metric_list": metrics("exact_match"),
    },
}
# Tasks' own code, beside their files.
OWN = """
import random

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from sklearn.metrics import f1_score


def first_letters(doc, results):
    pair = (doc["choices"][0][:1], results[0].strip()[:1])
    return {"macro_f1": pair, "share": pair[1] in "aeiou", "drawn": pair}


def macro_f1(items):
    return f1_score(*zip(*items), average="macro")


def mean(items):
    return sum(items) / len(items)


def drawn(items):
    return random.random()


class Read(ConfigurableTask):
    \"\"\"Answers, unless no answer is more likely than one in a thousand.\"\"\"

    def __init__(self, config=None):
        super().__init__(config={k: v for k, v in config.items() if k != "class"})

    def doc_to_text(self, doc):
        return doc["question"]

    def doc_to_target(self, doc):
        return " " + doc["choices"][0]

    def construct_requests(self, doc, ctx, apply_chat_template=False, chat_template=None, **kw):
        asked = (ctx, {"until": ["e"], "max_gen_toks": 6})
        return [
            Instance(request_type="generate_until", doc=doc, arguments=asked, idx=0, **kw),
            *(
                Instance(request_type="loglikelihood", doc=doc, arguments=(ctx, text), idx=1, **kw)
                for text in (" none", self.doc_to_target(doc))
            ),
        ]

    def process_results(self, doc, results):
        text, (none, _), (right, _) = results
        return {"length": len(text), "margin": right - none, "odds": (right, none)}

    def aggregation(self):
        return {"length": mean, "margin": mean, "odds": odds}

    def higher_is_better(self):
        return {"length": False, "margin": True, "odds": True}


def odds(items):
    return sum(right for right, _ in items) / sum(none for _, none in items)
"""
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "turns": TURNS,
    # No beginning of text of its own; ends with a blank; refuses the system's turn.
    "no-system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
    "{% endif %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    "none": None,
}
GROUPS = {
    "both": {"task": ["quiz", "pair"], "aggregate_metric_list": [{"metric": "acc"}]},
    "even": {
        "task": ["quiz", {"task": "pair", "num_fewshot": 1, "training_split": "train"}],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
    },
}
TAGS = {"quiz": ["known", "choices"], "pair": ["choices"]}
