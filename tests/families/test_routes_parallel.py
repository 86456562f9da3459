"""Routes while the experts are spread over two ranks: each records and forces those of its tokens,
and what it computes is what one process with all experts does."""

import json

import torch

from stages.models import routes
from stages.models.routes import routed, soft_backward
from stages.models.routing import weighing
from stages.models.tiny import tiny_model, tiny_tokenizer
from tests.stages.finetune.runs import in_ranks, process_group

FAMILIES = ("mixtral", "deepseek_v3")


def test_two_ranks_record_and_force_what_one_process_does(tmp_path):
    in_ranks(_compare, (tmp_path, tmp_path / "store"))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 2 * 6
        for what, (difference, size) in found.items():
            assert difference <= 1e-5 * size, what
            assert size > 1e-3, what


def _compare(rank, output, store):
    from stages.finetune.loop import start_distributed
    from stages.models.expert_parallel import convert

    with process_group(rank, 2, store):
        start_distributed()
        found = {}
        for name in FAMILIES:
            plain, spread = (tiny_model(name, tiny_tokenizer(), seed=3) for _ in range(2))
            convert(spread, 2, grouped_mm=True)
            for what, values in _seen(plain, spread, rank).items():
                one, other = (value.detach().double() for value in values)
                found[f"{name}: {what}"] = (
                    (one - other).abs().max().item(), one.abs().max().item())
        (output / f"{rank}.json").write_text(json.dumps(found))


def _seen(plain, spread, rank):
    """Pairs of tensors that must be equal; the ranks have other tokens, and not as many."""
    generator = torch.Generator().manual_seed(rank)
    tokens, others = torch.randint(3, 259, (2, 1, 20 + rank), generator=generator)
    weigh = weighing(plain)

    @torch.no_grad()
    def run(model, inputs, policy=None):
        with routed(model, policy) as found:
            return model(input_ids=inputs, use_cache=False).logits, found

    def gradient(model):
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        with soft_backward(model, weigh):
            logits = model(inputs_embeds=embedded, use_cache=False).logits
        return torch.autograd.grad(logits.square().sum(), embedded)[0]

    (before, clean), (after, recorded) = run(plain, tokens), run(spread, tokens)
    pairs = {"logits": (before, after)}
    pairs["experts"] = tuple(torch.stack([r.experts for r in each]) for each in (clean, recorded))
    pairs["weights"] = tuple(torch.stack([r.weights for r in each]) for each in (clean, recorded))
    for what, policy in {
        "forced on another input": routes.imposed(recorded),
        "at random, weighed anew": routes.at_random(7, weigh),
    }.items():
        pairs[what] = run(plain, others, policy)[0], run(spread, others, policy)[0]
    pairs["soft backward"] = gradient(plain), gradient(spread)
    assert torch.equal(run(spread, tokens, routes.imposed(recorded))[0], after)  # bit for bit
    return pairs
