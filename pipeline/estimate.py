"""What a plan's nodes will take: tokens, operations, GPU-hours and disk, before any is run.

Known are the counts that data sets declare, the limits of the sweep, the sizes of released models
(``stages/models/known.py``) and of those in the store. The rest is assumed as the sweep's
``assumptions`` say. What follows from neither is unknown, and is said to be. Imports no torch.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.filler import filler
from pipeline.plan import Node, Plan
from pipeline.sizes import twin, with_top_k
from pipeline.store import Store
from pipeline.sweep import Assumptions
from pipeline.sweep_file import located
from stages.data.sets import SIZES
from stages.data.sources import CatalogueSet, KnownSet, LocalFile, load, parse
from stages.data.spec import TASK_COLUMNS, TEMPLATED, DataSpec
from stages.data.templates import TEMPLATES
from stages.evaluate import passes
from stages.evaluate.base import Evaluation
from stages.evaluate.harness import LmEval
from stages.evaluate.held_prompts import HeldPrompts
from stages.evaluate.shards import PROCEDURE_WORK
from stages.evaluate.spec import AMATEUR
from stages.evaluate.techniques import applied
from stages.finetune.spec import FinetuneSpec, TrainSet
from stages.models.card import CARD_FILE
from stages.models.known import Known, known
from stages.models.spec import SourceSpec, UpcycleSpec, indices
from stages.models.vision_spec import VisionSpec

SAMPLE = 200
"""Rows of a data set that stand for all of it when requests are counted."""
MOMENTS = {"adamw": 2, "adam": 2, "adagrad": 1, "sgd": 1}
"""Vectors that an optimiser keeps beside each weight."""


@dataclass(frozen=True)
class Work:
    """What one node takes; None is unknown."""

    tokens: float | None = 0
    """Tokens that pass a model, forward."""
    flops: float | None = 0
    """Floating-point operations."""
    gpu_hours: float | None = 0
    """0 where no GPU is asked for."""
    disk: float | None = 0
    """Bytes of the result."""
    scratch: float | None = 0
    """Bytes of resumable state, while it trains."""
    whole: bool = True
    """Nothing is left out; otherwise the numbers are lower bounds."""


@dataclass(frozen=True)
class Asked:
    """Tokens that an evaluation puts to a model."""

    read: float
    """Of prompts and choices."""
    chosen: float
    """Those of the choices among them, which an encoder-decoder's decoder reads."""
    written: float
    """Of answers, each as long as it may become."""
    whole: bool
    """Every data set's rows are known; otherwise these are the tokens of the others."""


class Estimator:
    """Works out the nodes of a plan; ``folder`` is where the sweep's ``file:`` sources start."""

    def __init__(self, plan: Plan, store: Store, folder: Path):
        self.plan, self.store, self.folder = plan, store, folder
        self.assumed: Assumptions = plan.sweep.assumptions
        self.sizes: dict[str, Known | None] = {}
        self.loaded: dict[str, tuple[int, float]] = {}
        self.counted: dict[str, Asked] = {}

    def work(self, node: Node) -> Work:
        """What a node takes."""
        match node.stage:
            case "model" | "judge":
                size = self.size(node.key)
                return Work(disk=size and size.total * size.bytes_per_parameter)
            case "finetune":
                return self._training(node)
            case "evaluate":
                return self._evaluation(node)
            case "data":
                if node.spec.task == "images":
                    return Work(disk=None)  # encoded images are of any size
                counts = [self.rows(node.name, split) for split in node.spec.splits]
                rows = None if None in counts else sum(counts)
                return Work(disk=rows and rows * self.characters(node.name))
        return Work()

    # --- data -----------------------------------------------------------------------------------

    def rows(self, dataset: str, split: str) -> float | None:
        """Rows of a split: the published or counted ones times its share, or its limits."""
        spec, declared = self.plan.sweep.datasets[dataset], self._source_size(dataset)[0]
        here = [] if declared is None else [declared * spec.splits[split]]
        if split in spec.rows:
            here.append(spec.rows[split])
        labels = self._labels(spec)
        if split in spec.rows_per_label and labels:
            here.append(spec.rows_per_label[split] * labels)
        return min(here, default=None)

    def _labels(self, spec: DataSpec) -> int | None:
        """How many labels a data set has, where that is declared."""
        source = parse(located(spec.source, self.folder), format=spec.format)
        published = getattr(source, "published", None)
        return len(published.labels if published else set(spec.labels.values())) or None

    def characters(self, dataset: str) -> float:
        """Of the text of a row: counted, or assumed for its task."""
        counted = self._source_size(dataset)[1]
        task = self.plan.sweep.datasets[dataset].task
        return counted or self.assumed.tokens_per_row[task] * self.assumed.characters_per_token

    def _source_size(self, dataset: str) -> tuple[float | None, float | None]:
        """Rows and characters of a row of what a data set is read from."""
        entry = self.plan.sweep.datasets[dataset]
        source = located(entry.source, self.folder)
        match parse(source, format=entry.format):
            case KnownSet():
                return SIZES[source]
            case LocalFile():
                return self._file_size(dataset, source)
            case CatalogueSet(path=path) if path is not None and path.exists():
                return self._file_size(dataset, source)
            case CatalogueSet(published=published, split=split):
                return published.splits[split].rows, None
        return None, None

    def _file_size(self, dataset: str, source: str) -> tuple[int, float]:
        if dataset not in self.loaded:
            entry = self.plan.sweep.datasets[dataset]
            fields = {f: getattr(entry, f) for f in DataSpec.model_fields} | {"source": source}
            table = load(DataSpec(**fields)).table
            no_texts = ("label", "answer", "category", "image")
            texts = [column for column in TASK_COLUMNS[entry.task] if column not in no_texts]
            length = sum(
                sum(map(len, value)) if isinstance(value, list) else len(value)
                for column in texts
                for value in table[column].to_pylist()
            )
            self.loaded[dataset] = table.num_rows, length / max(1, table.num_rows)
        return self.loaded[dataset]

    # --- models ---------------------------------------------------------------------------------

    def size(self, key: str) -> Known | None:
        """The size of a checkpoint: of its card where it is in the store, else as known."""
        if key not in self.sizes:
            self.sizes[key] = self._size(self.plan.nodes[key])
        return self.sizes[key]

    def _size(self, node: Node) -> Known | None:
        if node.stage == "finetune":
            return self.size(node.inputs["model"])
        manifest = self.store.manifest(node.folder)
        card = manifest and self.store.read_json(
            f"{node.folder}/{manifest['attempt']}/{CARD_FILE}")
        if card:
            # The twins are written in float32, other models stay as they come.
            found = known(getattr(node.spec, "source", ""))
            same = ("flops_per_token", "flops_per_expert", "flops_per_read_token", "top_k")
            return Known(card["total_parameters"], card["active_parameters"],
                         bytes_per_parameter=found.bytes_per_parameter if found else 4,
                         tokens_per_image=card["notes"].get("tokens_per_image", 0),
                         **{name: card[name] for name in same if name in card})
        if isinstance(node.spec, SourceSpec) or node.stage == "judge":
            return known(node.spec.source)
        if isinstance(node.spec, VisionSpec):
            return Known(*node.spec.counts(), 4, tokens_per_image=node.spec.tokens,
                         top_k=node.spec.top_k, flops_per_expert=node.spec.flops_per_expert)
        dense = self.size(node.inputs["dense"])
        return dense and twin(node.spec, dense)

    # --- stages ---------------------------------------------------------------------------------

    def _training(self, node: Node) -> Work:
        spec, size = node.spec, self.size(node.key)
        trained = self._trained_tokens(node, size)
        tokens = None if trained is None else sum(trained)
        flops = None
        if size and trained is not None:
            as_trained = with_top_k(size, spec.router.top_k)
            # Forward, and backward twice as much.
            flops = 3 * spec.passes * as_trained.flops(*trained)
            flops += size.flops(*self._validated_tokens(node, size))
        moments = MOMENTS[spec.optimizer.kind]
        return Work(
            tokens,
            flops,
            self._hours(node, flops, self.assumed.training_tflops),
            size and (4 if spec.precision == "fp32" else 2) * size.total,
            size and 4 * (1 + moments) * size.total,
        )

    def _trained_tokens(self, node: Node, size: Known | None) -> tuple[float, float] | None:
        """Tokens of prompts and of answers; None where the rows are unknown."""
        spec, read, written = node.spec, 0.0, 0.0
        rows = self._epoch(spec)
        if not rows:
            return None
        for train in spec.data:
            count = self.rows(train.dataset, train.split)
            count = min(count, train.limit or count) * train.repeat
            prompt, answer = self._length(spec, train, size)
            read, written = read + count * prompt, written + count * answer
        sequences = self._steps(spec, rows) * spec.batch_size
        return sequences * read / rows, sequences * written / rows

    def _validated_tokens(self, node: Node, size: Known) -> tuple[float, float]:
        """The same of all looks at the rows that are held out."""
        spec, validation = node.spec, node.spec.validation
        if validation is None:
            return 0.0, 0.0
        last = self._steps(spec, self._epoch(spec))
        looks = sum(validation.due(step + 1, last) for step in range(last))
        prompt, answer = self._length(spec, validation.rows, size)
        return looks * validation.limit * prompt, looks * validation.limit * answer

    def _epoch(self, spec: FinetuneSpec) -> int | None:
        """Rows of one epoch; None where some are unknown."""
        counts = [self.rows(train.dataset, train.split) for train in spec.data]
        if None in counts:
            return None
        return sum(min(count, train.limit or count) * train.repeat
                   for count, train in zip(counts, spec.data, strict=True))

    def _steps(self, spec: FinetuneSpec, rows: float) -> int:
        steps = spec.steps or math.ceil(spec.epochs * rows / spec.batch_size)
        return min(steps, spec.until or steps)

    def _length(
        self, spec: FinetuneSpec, train: TrainSet, size: Known | None
    ) -> tuple[float, float]:
        """Mean tokens of a row: of its prompt, and of its answer where a decoder of its own writes
        that. A label's word counts for such a model alone; of an instruction, whose two texts are
        counted together, half is taken to be the response."""
        if size and size.tokens_per_image:
            return size.tokens_per_image, 0.0
        template = TEMPLATES[train.template] if train.template else None
        per_token = self.assumed.characters_per_token
        characters = self.characters(train.dataset) + (len(template.prompt) if template else 0)
        length = min(characters / per_token, spec.max_length)
        if not size or size.flops_per_read_token is None:
            return length, 0.0
        if template is None:
            return length / 2, length / 2
        words = [len(word) for word in template.labels.values()]
        return length, max(1.0, sum(words) / len(words) / per_token)

    def _evaluation(self, node: Node) -> Work:
        size = self.size(node.inputs["checkpoint"])
        if size and size.tokens_per_image:
            return self._of_images(node, size)
        layers, rows = self.sparse_blocks(node.inputs["checkpoint"]), self._shard(node)
        asked = self.asked(node.spec.evaluation, layers, rows)
        sizes = [self.size(key) for role, key in node.inputs.items()
                 if role == "checkpoint" or role.startswith(AMATEUR)]
        tokens = asked.read + asked.written
        disk = tokens * self.assumed.characters_per_token
        if None in sizes:
            return Work(tokens, None, self._hours(node, None, 1), disk, whole=asked.whole)
        prompts = asked.read - asked.chosen
        read = sum(size.flops(prompts, asked.chosen) for size in sizes)
        written = sum(size.flops(0, asked.written) for size in sizes)
        hours = (self._hours(node, read, self.assumed.scoring_tflops)
                 + self._hours(node, written, self.assumed.decoding_tflops))
        return Work(tokens, read + written, hours, disk, whole=asked.whole)

    def _of_images(self, node: Node, size: Known) -> Work:
        """An evaluation of a vision model: all passes of its images, of their attacks and probes,
        a gradient as three."""
        evaluation, count, whole = node.spec.evaluation, 0.0, True
        layers, rows_a_shard = self.sparse_blocks(node.inputs["checkpoint"]), self._shard(node)
        for dataset, split in evaluation.datasets().items():
            rows = self.rows(dataset, split)
            whole = whole and rows is not None
            images = min(rows or 0, getattr(evaluation, "limit", math.inf))
            checked = min(images, getattr(evaluation, "checked", 0))
            count += (images - checked) * passes.of_image(evaluation, layers)
            count += checked * passes.of_image(evaluation, layers, checked=True)
            count += math.ceil(images / rows_a_shard) * passes.calibration(evaluation)
        tokens = count * size.tokens_per_image
        flops = tokens * size.flops_per_token
        return Work(tokens, flops, self._hours(node, flops, self.assumed.training_tflops),
                    whole=whole)

    def sparse_blocks(self, key: str) -> int:
        """Sparse blocks of a checkpoint, 0 for a dense model; of a released Mixture-of-Experts
        model every layer counts as one."""
        node, size = self.plan.nodes[key], self.size(key)
        if node.stage == "finetune":
            return self.sparse_blocks(node.inputs["model"])
        if isinstance(node.spec, VisionSpec):
            return len(node.spec.moe_layers) + node.spec.has_head_experts
        if isinstance(node.spec, UpcycleSpec):
            dense = self.size(node.inputs["dense"])
            return len(indices(node.spec.layers, dense.config["num_hidden_layers"])) if (
                dense and dense.config) else 0
        moe = size is not None and size.active < size.total
        return size.config.get("num_hidden_layers", 0) if moe else 0

    def _shard(self, node: Node) -> int:
        """Rows of a procedure that are worked on together."""
        return max(1, node.spec.shard_size // PROCEDURE_WORK)

    def _hours(self, node: Node, flops: float | None, tflops: float) -> float | None:
        if not node.resources.gpus:
            return 0
        return None if flops is None else flops / (tflops * 1e12 * 3600)

    def asked(self, evaluation: Evaluation, layers: int = 0, rows_a_shard: int = 1) -> Asked:
        """Tokens of an evaluation: its own requests for rows of filler, weighted by the rows.

        A request belongs to the data set that its id begins with. Sets that multiply others
        (jailbreaks) count in full up to ``SAMPLE`` rows. Procedures count by their passes
        (``passes.py``), for a model of so many sparse blocks and so many rows in a shard.
        """
        key = f"{evaluation.model_dump_json()} {layers} {rows_a_shard}"
        if key not in self.counted:
            self.counted[key] = self._count(evaluation, layers, rows_a_shard)
        return self.counted[key]

    def _count(self, evaluation: Evaluation, layers: int, rows_a_shard: int) -> Asked:
        if isinstance(evaluation, LmEval):  # its data is the harness's and not here yet
            return Asked(0.0, 0.0, 0.0, whole=False)
        data, weights, whole = {}, {}, True
        for key, (dataset, split) in evaluation.sources().items():
            rows = self.rows(dataset, split)
            sampled = min(max(1, round(rows or 1)), SAMPLE)
            task = self.plan.sweep.datasets[dataset].task
            labels = tuple(TEMPLATES[evaluation.template].labels) if task in TEMPLATED else ()
            # Examples of a prompt are never what is scored.
            number = int(key != dataset)
            data[key] = filler(task, sampled, self.characters(dataset), labels, number)
            if key == dataset:  # not the examples that stand before each question
                whole = whole and rows is not None
                weights[dataset] = (rows or 0) / sampled
        read = chosen = written = 0.0
        per_token = self.assumed.characters_per_token
        for request in applied(evaluation.technique, evaluation.requests(data)):
            weight = weights.get(request.id.partition("/")[0], 1.0)
            if not request.procedure:
                choices = weight * sum(map(len, request.choices)) / per_token
                read += weight * len(request.context) / per_token + choices
                chosen += choices
                written += weight * request.max_new_tokens
                continue
            row = json.loads(request.row)
            if isinstance(evaluation, HeldPrompts):
                tokens = passes.of_prompts(evaluation, row, weights, per_token)
                read, written = read + weight * tokens[0], written + weight * tokens[1]
                continue
            prompt = sum(len(row[part]) for part in ("before", "text", "after")) / per_token
            each = passes.of_text(evaluation, len(row["text"]), layers)
            read += prompt * weight * (each + passes.calibration(evaluation) / rows_a_shard)
            if row.get("checked"):
                more = passes.of_text(evaluation, len(row["text"]), layers, checked=True)
                read += prompt * (more - each)
        return Asked(read, chosen, written, whole)
