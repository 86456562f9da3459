"""Whether the GPUs of an evaluation's actors can hold its model; imports no torch."""

import math
from pathlib import Path

from pipeline.estimate import Estimator
from pipeline.estimate_text import parameters
from pipeline.plan import Node, Plan
from pipeline.store import Store
from stages.errors import BadInput
from stages.evaluate.spec import AMATEUR, SURROGATE
from stages.models.known import Known

SPARE = {"transformers": (0.1, "a tenth"), "vllm": (0.2, "a fifth")}
"""Share of the memory that weights leave to the cache and to what a pass holds, by engine; vLLM
leaves about a tenth to others besides."""


def check_memory(plan: Plan, store: Store, folder: Path, path: Path) -> None:
    """Refuse evaluations of a model of known size that the GPUs of an actor cannot hold, or over
    which vLLM cannot cut its layers.

    Memory is checked where the sweep says how much a GPU has. Raises ``BadInput``.
    """
    if not plan.sweep.resources.evaluate.gpus:
        return
    estimator, problems = Estimator(plan, store, folder), {}
    for node in plan.nodes.values():
        if node.stage != "evaluate":
            continue
        size = estimator.size(node.inputs["checkpoint"])
        # Those that an actor holds beside the model.
        others = [estimator.size(key) for role, key in node.inputs.items()
                  if role.startswith((AMATEUR, SURROGATE))]
        problem = size and _misfit(node, size, [other for other in others if other])
        if problem:
            name = node.inputs["checkpoint"].partition("/")[2]
            problems.setdefault(name, f"{path}: resources.evaluate.gpus: {name} {problem}")
    if problems:
        raise BadInput("\n".join(problems.values()))


def _misfit(node: Node, size: Known, others: list[Known]) -> str:
    """Why the GPUs of one actor do not do for a model and others beside it; empty where they do."""
    gpus, memory = node.resources.gpus, node.resources.gpu_memory_gb
    heads = size.config.get("num_attention_heads") if node.spec.engine == "vllm" else None
    if heads and heads % gpus:
        counts = [n for n in range(1, heads + 1) if heads % n == 0]
        return (f"has {heads} attention heads, which vLLM cannot deal out evenly to {gpus:g} GPUs; "
                f"set it to one of {', '.join(map(str, counts))}")
    spare, word = SPARE[node.spec.engine]
    more = sum(other.total for other in others)
    precision = node.spec.dtype
    need = (size.total + more) * {"float32": 4, "bfloat16": 2}[precision]
    if precision != "float32" and node.spec.engine == "transformers":
        need += sum(each.float32_head for each in (size, *others))
        precision += " with the head in float32"
    if memory is None or need <= (room := memory * 1e9 * (1 - spare)) * gpus:
        return ""
    enough = math.ceil(need / room)
    if heads:
        enough = next((n for n in range(enough, heads + 1) if heads % n == 0), None)
    remedy = f"set it to {enough}" if enough else "use GPUs with more memory"
    beside = f" and {parameters(more)} more of other models" if more else ""
    return (f"has {parameters(size.total)} parameters{beside}, {need / 1e9:.1f} GB in "
            f"{precision}; "
            f"{gpus:g} × {memory:g} GB less {word} cannot hold them; {remedy}")
