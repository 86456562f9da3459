"""The auxiliary losses equal their definitions, and reach the router in every family."""

import math

import pytest
import torch

from stages.finetune.batches import Example, micro_batch
from stages.finetune.evidence import Evidence
from stages.finetune.head import with_head
from stages.finetune.knobs import Knobs
from stages.finetune.recipe import Recipe, TrainSet
from stages.finetune.router_losses import balance_by_sequence, load_balancing_loss, z_loss
from stages.models.families import FAMILIES, family
from stages.models.routing import Routing, blocks, intercept
from stages.models.tiny import tiny_model, tiny_tokenizer
from stages.models.tiny_shapes import TINY

RECIPE = {
    "data": (TrainSet(dataset="reviews", template="sentiment"),),
    "steps": 1,
    "batch_size": 1,
    "learning_rate": 1e-3,
    "auxiliary_loss_weight": 0.1,
}


def routing(logits, experts):
    logits = torch.tensor(logits)
    return Routing("block", logits, torch.tensor(experts), torch.ones(len(logits), 1))


def test_a_case_worked_by_hand():
    # Two experts, logits ln 3 and 0: probabilities 3/4 and 1/4; both tokens go to expert 0.
    seen = [routing([[math.log(3), 0.0]] * 2, [[0], [0]])]
    assert load_balancing_loss(seen, "softmax").item() == pytest.approx(2 * 1 * 0.75)
    assert z_loss(seen).item() == pytest.approx(math.log(4) ** 2)
    # A second layer whose tokens are spread evenly: f = (3/4, 1/4), P = (5/8, 3/8).
    seen.append(routing([[0.0, 0.0]] * 2, [[0], [1]]))
    pooled = 2 * (0.75 * 0.625 + 0.25 * 0.375)
    assert load_balancing_loss(seen, "softmax").item() == pytest.approx(pooled)
    assert z_loss(seen).item() == pytest.approx((math.log(4) ** 2 + math.log(2) ** 2) / 2)


def test_sigmoids_are_balanced_on_their_shares_of_the_sum():
    """DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20, of one sequence and layer, times K."""
    # Scores 3/4 and 1/2: shares 3/5 and 2/5 of each of two tokens, which both go to expert 0.
    seen = [routing([[math.log(3), 0.0]] * 2, [[0], [0]])]
    assert load_balancing_loss(seen, "sigmoid").item() == pytest.approx(2 * 1 * 0.6)
    far = [routing([[-200.0, -201.0]], [[0]])]  # where each sigmoid is 0 in single precision
    share = 1 / (1 + math.exp(-1))
    assert load_balancing_loss(far, "sigmoid").item() == pytest.approx(2 * share)

    model, seen = tiny_model("deepseek_v3", tiny_tokenizer(), seed=3), []
    path, block = next(iter(blocks(model).items()))
    with intercept({path: block}, choice=seen.append):
        model(input_ids=torch.arange(3, 60)[None])
    scores = seen[0].logits.sigmoid().double()
    tokens, count = scores.shape
    balance = 0.0
    for expert in range(count):
        chosen = sum(expert in row for row in seen[0].experts.tolist())
        share = sum((row[expert] / row.sum()).item() for row in scores) / tokens
        balance += count / (2 * tokens) * chosen * share
    assert load_balancing_loss(seen, "sigmoid").item() == pytest.approx(2 * balance, rel=1e-6)
    assert abs(load_balancing_loss(seen, "softmax").item() / (2 * balance) - 1) > 1e-3


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "olmoe", "granitemoe", "gpt_oss", "nllb-moe"]
)
def test_load_balancing_equals_transformers(name):
    model, seen, tokens = tiny_model(name, tiny_tokenizer(), seed=3), [], torch.arange(3, 60)[None]
    asked = {"labels": tokens[:, :9]} if model.config.is_encoder_decoder else {}
    with intercept(blocks(model), choice=seen.append):
        out = model(input_ids=tokens, **asked, output_router_logits=True)
    expected = sum(out[part] for part in family(model).auxiliary_loss).item()
    assert load_balancing_loss(seen, "softmax").item() == pytest.approx(expected, rel=1e-6)


def test_of_switch_it_is_transformers_own_of_each_sequence_without_padding():
    model = tiny_model("switch_transformers", tiny_tokenizer(), seed=3)
    knobs = Knobs(model, Recipe(**RECIPE), Evidence())
    knobs.attach()

    def losses(*lengths):
        """This project's over a micro-batch, and transformers' own."""
        rows = [Example(tuple(range(3, 3 + n)), answer=n // 3) for n in lengths]
        part = micro_batch(rows, model.config, torch.device("cpu"))
        with torch.no_grad(), knobs.forward() as seen:
            out = model(**part.arguments, output_router_logits=True)
        ours = balance_by_sequence(part.by_sequence(part.without_padding(seen)), "softmax")
        return ours.item(), (out.encoder_aux_loss + out.decoder_aux_loss).item()

    alone = [losses(n) for n in (60, 21, 33)]
    for ours, transformers in (*alone, losses(21, 21)):
        assert ours == pytest.approx(transformers, rel=1e-5)
    ours, transformers = losses(60, 21, 33)
    assert ours == pytest.approx(sum(loss for loss, _ in alone) / 3, rel=1e-5)
    assert abs(transformers / ours - 1) > 1e-3  # which counts padding


@pytest.mark.parametrize("name", ["minimax_m2", "laguna", "ernie4_5_moe", "flint"])
def test_the_chosen_experts_count_by_their_scores_where_a_bias_moves_them_or_sigmoids_make_them(
    name,
):
    model, seen = tiny_model(name, tiny_tokenizer(), seed=3), []
    with intercept(blocks(model), choice=seen.append):
        out = model(input_ids=torch.arange(3, 60)[None], output_router_logits=True)
    logits = torch.cat([r.logits for r in seen]).float()
    experts, scores = torch.cat([r.experts for r in seen]), FAMILIES[name].scores
    assert scores == ("softmax" if name == "ernie4_5_moe" else "sigmoid")
    own = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
    expected = []
    for chosen, p in ((experts, own), (logits.topk(2).indices, logits.softmax(-1))):
        share = torch.nn.functional.one_hot(chosen, 4).sum(1).float().mean(0)
        expected.append(4 * (share * (p / p.sum(-1, keepdim=True)).mean(0)).sum().item())
    ours, transformers = expected
    assert load_balancing_loss(seen, scores).item() == pytest.approx(ours, rel=1e-6)
    assert out.aux_loss.item() == pytest.approx(transformers, rel=1e-6)  # by logits alone
    assert abs(ours / transformers - 1) > 2e-5


MOE = [n for n in TINY if FAMILIES[n].is_moe and not FAMILIES[n].no_training]
DECODERS = [n for n in MOE if not FAMILIES[n].encoder_decoder]


@pytest.mark.parametrize(
    ("name", "headed"), [*((n, False) for n in MOE), *((n, True) for n in DECODERS)]
)
def test_both_losses_reach_the_routers_of_every_family_and_head(name, headed):
    """Also where transformers' own head has no such loss, as those of classification."""
    model, tokenizer = tiny_model(name, tiny_tokenizer(), seed=3), tiny_tokenizer()
    entry, tokens = FAMILIES[name], torch.arange(3, 60)[None]
    if headed:
        model = with_head(model, ("no", "yes"), tokenizer.pad_token_id, seed=0)
    asked = {"labels": tokens[:, :9]} if entry.encoder_decoder else {}
    knobs = Knobs(model, Recipe(**RECIPE), Evidence())
    knobs.attach()
    with knobs.forward() as seen:
        model(input_ids=tokens, **asked, use_cache=False)
    routers = [p for path in entry.modules(model, "router")
               for n, p in model.get_submodule(path).named_parameters(prefix=path)
               if p.requires_grad and not entry.has_no_gradient(n)]  # fmt: skip
    assert len(routers) >= len(seen) > 0
    for loss in (load_balancing_loss(seen, entry.scores), z_loss(seen)):
        gradients = torch.autograd.grad(loss, routers, retain_graph=True)
        assert all(gradient.norm() > 1e-6 for gradient in gradients)


@pytest.mark.parametrize("name", ["jetmoe", "moduleformer"])
def test_a_choice_that_cannot_be_seen_is_that_of_the_largest_logits(name):
    """The experts are called with sorted tokens and their counts, which must be the same."""
    model, counts = tiny_model(name, tiny_tokenizer(), seed=3), {}
    for path, module in family(model).modules(model, "expert").items():
        module.register_forward_pre_hook(lambda _, args, path=path: counts.update({path: args[1]}))
    knobs = Knobs(model, Recipe(**RECIPE), Evidence())
    knobs.attach()
    tokens = torch.arange(3, 60)[None]
    with knobs.forward() as seen:
        out = model(input_ids=tokens, output_router_logits=True)
    assert len(seen) == 4 == len(counts) // 2
    chosen = sorted(torch.bincount(r.experts.flatten(), minlength=4).tolist() for r in seen)
    assert chosen == sorted(list(counts.values())[::2])
    loss = load_balancing_loss(seen, family(model).scores)
    if name == "jetmoe":  # transformers counts the routers of attention twice
        twice = [*seen, *(r for r in seen if "self_attention" in r.layer)]
        counted = load_balancing_loss(twice, "softmax").item()
        assert counted == pytest.approx(out.aux_loss.item(), rel=1e-6)
    routers = [p for router, _ in blocks(model).values() for p in router.parameters()]
    assert all(g.norm() > 1e-6 for g in torch.autograd.grad(loss, routers))
