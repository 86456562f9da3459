"""What ``plan`` prints of the estimate: a line per node, and the lines below them."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.estimate import Estimator, Work
from pipeline.plan import Node, Plan
from pipeline.survey import State
from pipeline.sweep_file import located
from stages.data import downloads
from stages.data.sources import CatalogueSet, parse
from stages.evaluate.registry import for_decoders
from stages.evaluate.techniques import ExpertCount
from stages.models.known import cannot_run
from stages.models.sources import Facts, describe, uncounted
from stages.models.spec import SourceSpec


def work_text(work: Work) -> str:
    """One node's estimate in a line; nothing where it takes nothing."""
    parts = [
        _said(work.tokens, "", "tokens", "tokens"),
        _said(work.flops, "FLOP", "", "FLOP"),
        _said(work.gpu_hours, "", "GPU-hours", "GPU-hours"),
        _said(work.disk, "B", "", "disk"),
        _said(work.scratch, "B", "while it trains", "scratch"),
    ]
    text = ", ".join(part for part in parts if part)
    return text and f"{'about' if work.whole else 'at least'} {text}"


def counted(nodes: int) -> str:
    """A number of nodes, in words."""
    return f"{nodes} node{'s' * (nodes != 1)}"


def _said(value: float | None, unit: str, what: str, name: str) -> str:
    if value is None:
        return f"{name} unknown"
    return f"{scaled(value)}{unit}".strip() + f" {what}".rstrip() if value else ""


def scaled(value: float) -> str:
    """A number of three digits with the prefix of its thousands, ready for a unit."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def summary_lines(
    plan: Plan, states: dict[str, State], estimator: Estimator, works: dict[str, Work]
) -> Iterator[str]:
    """Totals of what is to run, the pairs' sizes, what cannot be had, and what was assumed."""
    todo = {key: works[key] for key, state in states.items() if state.status != "done"}
    if not todo:
        return
    yield ""
    yield "estimate of what is to run: sums of what is known, `--all` has each node's"
    for stage in dict.fromkeys(plan.nodes[key].stage for key in todo):
        these = [work for key, work in todo.items() if plan.nodes[key].stage == stage]
        sums = (sum(getattr(work, name) or 0 for work in these)
                for name in ("tokens", "flops", "gpu_hours", "disk"))
        unknown = sum(None in (w.tokens, w.flops, w.gpu_hours, w.disk) or not w.whole
                      for w in these)
        text = ", ".join(filter(None, (counted(len(these)), work_text(Work(*sums)))))
        yield f"  {stage:<9} {text}" + (f"; not all is known of {unknown}" if unknown else "")
    yield from _pairs(plan, estimator)
    yield from _not_to_be_had(plan, estimator.folder)
    a = plan.sweep.assumptions
    yield (f"  assumed   {a.characters_per_token:g} characters a token; answers as long as they "
           f"may be; one GPU sustains {a.training_tflops:g} TFLOP/s training, "
           f"{a.scoring_tflops:g} reading, {a.decoding_tflops:g} writing "
           "(`assumptions` of the sweep)")
    yield ("  left out  attention scores, padding, loading, judges that are models, the layers "
           "that DoLa reads out, single experts that probes ask")


def _pairs(plan: Plan, estimator: Estimator) -> Iterator[str]:
    for pair in plan.sweep.pairs:
        moe, dense = (
            # Of models whose weights are drawn anew for each seed, any.
            estimator.size(next(key for key in plan.nodes
                                if key == f"model/{name}" or key.startswith(f"model/{name}-seed")))
            for name in (pair.moe, pair.dense)
        )
        if moe is None or dense is None:
            unknown = [name for name, size in ((pair.moe, moe), (pair.dense, dense)) if not size]
            yield (f"  pair      {pair.name}: size of {' and '.join(unknown)} unknown until it is "
                   "here")
            continue
        yield (f"  pair      {pair.name}: active {parameters(moe.active)} of "
               f"{parameters(moe.total)}, dense {parameters(dense.total)}; active / dense "
               f"{moe.active / dense.total:.2f}, operations per token "
               f"{moe.flops_per_token / dense.flops_per_token:.2f}")



def _facts(plan: Plan, node: Node, folder: Path) -> Facts:
    """What is known of the model of an evaluation that comes from a source; nothing of others."""
    while node.stage != "model":
        node = plan.nodes[node.inputs["checkpoint" if node.stage == "evaluate" else "model"]]
    if not isinstance(node.spec, SourceSpec):
        return Facts()
    return describe(SourceSpec(source=located(node.spec.source, folder)))


def _unable(plan: Plan, node: Node, folder: Path) -> str:
    """What of an evaluation its model cannot do, with the reason; empty where there is nothing."""
    what = for_decoders(node.spec.evaluation)
    if what and _facts(plan, node, folder).reads_first:
        return f"{what} is for decoders, this is an encoder-decoder"
    if isinstance(node.spec.evaluation.technique, ExpertCount):
        return uncounted(_facts(plan, node, folder))
    return ""


def _not_to_be_had(plan: Plan, folder: Path) -> Iterator[str]:
    """Data that must be asked for or brought, models and judges that cannot be run, and what an
    architecture cannot do."""
    for node in plan.nodes.values():
        if node.stage == "evaluate" and (reason := _unable(plan, node, folder)):
            yield f"  gap       {node.name}: {reason}"
        if node.stage in ("model", "judge"):
            reason = cannot_run(getattr(node.spec, "source", ""))
            if reason:
                what = "nodes" if node.stage == "model" else "scores"
                yield f"  cannot run {node.name}: {reason}; its {what} will be gaps"
        if node.stage != "data":
            continue
        source = parse(located(node.spec.source, folder), format=node.spec.format)
        if not isinstance(source, CatalogueSet):
            continue
        published, split = source.published, source.split
        here = source.path.exists() if source.path else downloads.present(published, split)
        if published.gated and not here:
            yield f"  gated     {node.name}: {published.gated}"
        elif published.pinned(split) is None and not here:
            yield (f"  to bring  {node.name}: {published.files} (source: file:PATH, "
                   f"format: {source.name})")


def parameters(count: int) -> str:
    """A number of parameters, in millions or (B) thousands of millions."""
    if count >= 1e9:
        return f"{count / 1e9:.3g} B"
    return f"{count / 1e6:.0f} M" if count >= 1e7 else f"{count / 1e6:.2g} M"
