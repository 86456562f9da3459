"""lm-evaluation-harness, once to ask and once to score, with our engine between the two.

``requests`` builds the harness's own instances and turns them into ours; ``score`` runs the
harness's evaluator on a model that answers from the stored responses. Seeds, shots and limits are
set as the harness's ``simple_evaluate`` does. An instance is known by its content, so that data
which changed between the two is told and not scored. Prompts are made before any model is there, so
a conversation travels as its turns, and the worker puts them through the model's chat template.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS, DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs

from stages.errors import StageFailed
from stages.evaluate.base import Metric, Request, Response
from stages.evaluate.examples import answers
from stages.evaluate.harness import HarnessTask, LmEval, Measure
from stages.evaluate.harness_sums import AGGREGATIONS, INFLUENCE, aggregation, influences
from stages.evaluate.harness_tasks import OUTPUT_TYPES, manager, samples

WHOLE_CONTEXT = 2**31 - 1
"""A window as long as the model's context."""
INERT = {"temperature", "top_p", "top_k", "min_p", "typical_p"}
"""Settings without effect on greedy decoding."""


def requests(evaluation: LmEval) -> list[Request]:
    """What the harness asks the model, each question once."""
    instances = [each for made in _built(evaluation).values() for each in made.instances]
    return list({asked.id: asked for asked, _ in _asked(instances)}.values())


def voter(evaluation: LmEval) -> Callable[[Request, str], str]:
    """What the filters of a task take from an answer, for samples to agree on: those agree of which
    each filter takes the same. Nothing where each finds only what it says of no match."""
    tasks = _built(evaluation)
    instances = [each for task in tasks.values() for each in task.instances]
    of = {
        request.id: instance
        for (request, _), instance in zip(_asked(instances), instances, strict=True)
    }

    def vote(request: Request, text: str) -> str:
        said = replace(of[request.id], resps=[text], filtered_resps={})
        found = False
        for ensemble in tasks[said.task_name]._filters:
            ensemble.apply([said])
            taken = said.filtered_resps[ensemble.name]
            none = [getattr(made(), "fallback", "") for made in ensemble.filters]
            found |= taken not in none and str(taken).strip() != ""
        return json.dumps(said.filtered_resps, default=str) if found else ""

    return vote


def _built(evaluation: LmEval) -> dict[str, Task]:
    """The tasks by name, with their instances."""
    with _seeded():
        tasks = _load(evaluation)["tasks"]
        for task in tasks.values():
            task.build_all_requests(
                limit=evaluation.limit,
                rank=0,
                world_size=1,
                chat_template=Conversation.of if evaluation.apply_chat_template else None,
                **evaluation.prompting,
            )
    return tasks


def score(evaluation: LmEval, responses: dict[str, Response]) -> pd.DataFrame:
    """The harness's values of each example, one row per example and task."""
    with _seeded():
        loaded = _load(evaluation)
        results = evaluate(
            Replay(responses),
            loaded,
            limit=evaluation.limit,
            bootstrap_iters=0,
            **evaluation.prompting,
        )
        rows, unsummed = [], {}
        for task in evaluation.harness.tasks:
            merged: dict[int, dict] = {}
            samples_of = results["samples"][task.name]
            for sample in samples_of:
                row = merged.setdefault(sample["doc_id"], _about(evaluation, task, sample))
                row |= _values(task, sample)
            functions = loaded["tasks"][task.name].aggregation()
            for measure in task.measures:
                if aggregation(measure.aggregation) is INFLUENCE:
                    function = functions.get(measure.metric)
                    if reason := _influence(measure, function, samples_of, merged):
                        unsummed[measure.name, task.name] = reason
            rows += merged.values()
    scores = pd.DataFrame(rows)
    _check(evaluation, scores, results["results"], unsummed)
    return scores


class Conversation(str):
    """The turns of a prompt as JSON (``Request.messages``), told from a text by its type."""

    @classmethod
    def of(cls, turns: list[dict[str, str]], add_generation_prompt: bool = True) -> "Conversation":
        """What the harness takes for the rendered prompt. A last turn of the assistant's says by
        itself that no generation prompt follows."""
        return cls(json.dumps(turns))

    @property
    def shown(self) -> str:
        """As people read it."""
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in json.loads(self))


class Replay(LM):
    """A model of the harness that has answered already."""

    def __init__(self, responses: dict[str, Response]):
        super().__init__()
        self.responses = responses

    tokenizer_name = ""
    """Part of the name of the harness's own cache of prompts, which is not used."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Conversation:
        """The turns as they are."""
        return Conversation.of(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        return [(found.logprobs[i], found.greedy[i]) for found, i in self._found(requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of each text."""
        return [found.logprobs[0] for found, _ in self._found(requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The texts."""
        return [found.text for found, _ in self._found(requests)]

    def _found(self, instances: list[Instance]) -> Iterator[tuple[Response, int]]:
        asked = _asked(instances)
        found = answers([request.id for request, _ in asked], self.responses)
        return zip(found, [place for _, place in asked], strict=True)


def _load(evaluation: LmEval) -> dict:
    """The tasks with their data, set up as the evaluation says."""
    try:
        folder = evaluation.include_path and Path(evaluation.include_path)
        tasks = manager(evaluation.task, folder).load([evaluation.task])
    except Exception as error:  # of many libraries: network, hub, formats, the task's own code
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise StageFailed(
            f"lm_eval task {evaluation.task}: its data cannot be had: {reason}; check the network "
            "and HF_TOKEN, or put a task file of your own with local data into include_path"
        ) from error
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        # A task that fixes no examples stays so, whatever is asked for.
        if evaluation.num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=evaluation.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return tasks


@contextmanager
def _seeded() -> Iterator[None]:
    """The harness's seeds inside, this process's own random state afterwards."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def _asked(instances: list[Instance]) -> list[tuple[Request, int]]:
    """For each instance the request that answers it, and the place of its choice in there.

    The continuations of one context of an example are choices of one request.
    """
    keys, choices = [], {}
    for instance in instances:
        key = (instance.task_name, instance.doc_id, instance.request_type, instance.args[0])
        if instance.request_type == "loglikelihood":
            choices.setdefault(key, {})[instance.args[1]] = None
        keys.append(key)
    made = {key: _scored(key, tuple(found)) for key, found in choices.items()}
    asked = []
    for instance, key in zip(instances, keys, strict=True):
        if key in made:
            asked.append((made[key], made[key].choices.index(instance.args[1])))
        elif instance.request_type == "loglikelihood_rolling":
            asked.append((_text(key), 0))
        elif instance.request_type == "generate_until":
            asked.append((_generation(key, instance.args[1]), 0))
        else:
            raise StageFailed(
                f"lm_eval task {key[0]} asks the model for {instance.request_type}, which is none "
                f"of {', '.join(OUTPUT_TYPES)}; choose another task"
            )
    return asked


def _id(key: tuple, content: object = None) -> str:
    text = json.dumps([key[2:], content], sort_keys=True)
    return f"{key[0]}/{key[1]}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _put(id: str, context: str, **fields: object) -> Request:
    if isinstance(context, Conversation):
        return Request(id, "", messages=str(context), harness=True, **fields)
    return Request(id, context, harness=True, **fields)


def _scored(key: tuple, choices: tuple[str, ...]) -> Request:
    return _put(_id(key, choices), key[3], choices=choices)


def _text(key: tuple) -> Request:
    return Request(_id(key), key[3], window=WHOLE_CONTEXT, special_tokens=True)


def _generation(key: tuple, settings: dict) -> Request:
    known = normalize_gen_kwargs(settings, DEFAULT_MAX_GEN_TOKS)
    if samples(known):
        raise StageFailed(
            f"lm_eval task {key[0]} samples its answers, so that its numbers cannot be reproduced "
            "item by item; choose another task"
        )
    until, longest = known.pop("until"), known.pop("max_gen_toks")
    acting = set(known) - INERT - {"do_sample"}
    if acting:
        raise StageFailed(
            f"lm_eval task {key[0]} decodes with {', '.join(sorted(acting))}, and only greedy "
            "decoding is done here; choose another task"
        )
    stop = tuple(text for text in until if text)
    asked = {"max_new_tokens": longest, "stop": stop}
    # As the harness's own backend decodes: without any special token.
    return _put(_id(key, [longest, stop]), key[3], thoughts=False, **asked)


def _about(evaluation: LmEval, task: HarnessTask, sample: dict) -> dict:
    """The columns of a row that are no score."""
    # With the hash, examples of another state of the data are never paired with these.
    example = f"{task.name}/{sample['doc_id']}-{sample['doc_hash'][:8]}"
    document = example
    if evaluation.document is not None:
        if evaluation.document not in sample["doc"]:
            raise StageFailed(
                f"document: {task.name} has no column {evaluation.document!r}; it has "
                f"{', '.join(sorted(sample['doc']))}"
            )
        document = f"{task.name}/{sample['doc'][evaluation.document]}"
    prediction, answer = "", ""
    prompt, (first, *_) = sample["arguments"][0][0], sample["resps"][0]
    if isinstance(first, str):
        prediction, answer = str(sample["filtered_resps"][0]), first
    elif isinstance(first, tuple):
        found = {
            arguments[1]: given[0][0]
            for arguments, given in zip(sample["arguments"], sample["resps"], strict=True)
            if arguments[0] == prompt and isinstance(given[0], tuple)
        }
        prediction = max(found, key=found.get).strip() if len(found) > 1 else ""
    return {
        "example_id": example,
        "document": document,
        "subset": task.name,
        "prompt": prompt.shown if isinstance(prompt, Conversation) else prompt,
        "gold": str(sample["target"]),
        "prediction": prediction,
        "answer": answer,
    }


def _values(task: HarnessTask, sample: dict) -> dict[str, float]:
    """The harness's values of an example after one filter, as score columns."""
    values = {}
    for measure in task.measures:
        summed = AGGREGATIONS.get(measure.aggregation)
        if summed and measure.filter == sample["filter"] and measure.metric in sample:
            names = [measure.name + part for part in summed.parts]
            values |= dict(zip(names, summed.split(sample[measure.metric]), strict=True))
    return values


def _influence(
    measure: Measure, function: Callable, samples_of: list[dict], rows: dict[int, dict]
) -> str:
    """Put into a task's rows, by example, their influences on a number that it computes by a
    function of its own; returns why there are none, where there are none."""
    measured = {
        sample["doc_id"]: sample[measure.metric]
        for sample in samples_of
        if sample["filter"] == measure.filter and measure.metric in sample
    }
    documents = [rows[doc]["document"] for doc in measured]
    column = measure.name + INFLUENCE.parts[0]
    try:
        found = influences(function, list(measured.values()), documents)
    except ValueError as error:
        found, reason = np.full(len(measured), np.nan), str(error)
    else:
        reason = ""
    for doc, value in zip(measured, found, strict=True):
        rows[doc][column] = value
    return reason


def _check(
    evaluation: LmEval, scores: pd.DataFrame, results: dict, unsummed: dict[tuple[str, str], str]
) -> None:
    """That every metric is the number that the harness reports, but for those of tasks whose own
    function cannot be used on a part of the examples.

    ``unsummed``: why, by metric and task; if there is nothing else, the evaluation fails.
    """
    numbers = 0
    for metric in evaluation.metrics():
        if metric.gap:
            continue
        try:
            found = float(metric.value(metric.statistics(scores).sum(axis=0)))
        except KeyError as error:
            raise StageFailed(
                f"lm_eval task {evaluation.task} gives no value {error} for any example though its "
                "definition names it; choose another task"
            ) from None
        if np.isnan(found) and any(name == metric.name.partition("/")[0] for name, _ in unsummed):
            continue
        expected = _reported(evaluation, metric, results)
        if not np.isclose(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True):
            raise StageFailed(
                f"lm_eval task {evaluation.task}: {metric.name} is {found:.9g} from the examples "
                f"and {expected:.9g} as the harness sums it up; please report this task"
            )
        numbers += 1
    if not numbers:
        named = "; ".join(f"{name} of {task}: {why}" for (name, task), why in unsummed.items())
        raise StageFailed(
            f"lm_eval task {evaluation.task}: the functions that sum up its metrics are of no use "
            f"for intervals ({named}); choose another task"
        )


def _reported(evaluation: LmEval, metric: Metric, results: dict) -> float:
    name, slash, task = metric.name.partition("/")
    if not slash:
        task = evaluation.task if evaluation.harness.group else evaluation.harness.tasks[0].name
    measures = (m for each in evaluation.harness.tasks for m in each.measures)
    key = next(measure.key for measure in measures if measure.name == name)
    return results[task][key]
