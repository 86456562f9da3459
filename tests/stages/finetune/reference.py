"""What a fine-tune must equal: a plain PyTorch loop of one process over the plain model."""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from stages.finetune.batches import global_batch, load_examples
from stages.models.families import Family, family
from stages.models.load import auto_class
from stages.models.routes import routed

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD,
              "adagrad": torch.optim.Adagrad}  # fmt: skip


def curve(folder):
    return pd.read_parquet(folder / "training_curve.parquet")


def weights(folder):
    return plain(folder).state_dict()


def plain(folder):
    config = AutoConfig.from_pretrained(folder)
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        biases = name.endswith(("expert_bias", "e_score_correction_bias"))  # as before saving
        # An indexer selects what attention reads; LLaMA-MoE's noise is not used.
        if biases or ".indexer." in name or ".weight_noise." in name:
            parameter.requires_grad_(False)
    return model


def counts_otherwise(entry: Family) -> bool:
    """Whether transformers has no load-balancing loss that counts the chosen experts of each router
    once and weighs them by its scores: JetMoE's counts the routers of attention twice, those of
    families with a bias of the choice and of a sampling router count the largest logits instead,
    and all take a softmax where the scores are sigmoids."""
    otherwise = entry.chooses_largest or entry.scores in ("sparsemixer", "sigmoid")
    return not entry.auxiliary_loss or otherwise or bool(entry.choice_bias)


def reference(spec, folder, inputs):
    """A plain PyTorch loop over padded micro-batches of the plain model: its curve and weights.

    Where the router draws experts at random in training, the sequences stand in one row, so that
    there are as many draws as in a fine-tune, and each micro-batch has that one's seed.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = (plain(folder) if spec.head == "language_model" else headed(folder, spec)).train()
    entry, seq2seq = family(model), model.config.is_encoder_decoder
    examples = load_examples(spec, inputs, tokenizer, encoder_decoder=seq2seq)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = spec.optimizer.model_dump(exclude={"kind"})
    optimizer = OPTIMIZERS[spec.optimizer.kind](
        trained, lr=spec.learning_rate, weight_decay=spec.weight_decay, **settings
    )
    schedule = get_linear_schedule_with_warmup(optimizer, spec.warmup_steps, spec.steps)
    rows = []
    for step in range(spec.steps):
        batch = [examples[i] for i in global_batch(len(examples), spec.batch_size, spec.seed, step)]
        answers = sum(e.answer for e in batch)
        losses, balances = [], []
        for start in range(0, spec.batch_size, spec.micro_batch):
            micro = batch[start : start + spec.micro_batch]
            ours = spec.auxiliary_loss_weight and counts_otherwise(entry)
            theirs = spec.auxiliary_loss_weight and not ours
            balance = {"output_router_logits": True} if theirs else {}
            forward = _seq2seq if seq2seq else _causal
            if spec.head == "classification":
                forward = _classified
            elif entry.scores == "sparsemixer":
                forward = _packed
                places = np.random.SeedSequence((spec.seed, step, start))
                torch.manual_seed(int(places.generate_state(1)[0]) + 1)
            with routed(model) if ours else nullcontext() as routes:
                logits, labels, out = forward(model, micro, balance)
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum"
            )
            losses.append(nll / answers)
            if spec.auxiliary_loss_weight:
                if ours:
                    auxiliary = _balance(routes, micro, entry.scores)
                elif entry.model_type == "switch_transformers":
                    auxiliary = _by_sequence(out, micro)
                else:
                    auxiliary = sum(out[part] for part in entry.auxiliary_loss)
                balances.append(auxiliary / (spec.batch_size // spec.micro_batch))
        (sum(losses) + spec.auxiliary_loss_weight * sum(balances)).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                assert "expert" in name, f"{name} has no gradient"  # one that no token was for
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(trained, spec.gradient_clipping)
        rows.append((step + 1, sum(losses).item(), norm.item(), optimizer.param_groups[0]["lr"],
                     sum(balances).item() if balances else None))  # fmt: skip
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    names = ["step", "loss", "gradient_norm", "learning_rate", "auxiliary_loss"]
    return pd.DataFrame(rows, columns=names), model.state_dict()


def headed(folder, spec):
    """transformers' classifier of the folder with the head that the seed draws."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(spec.labels))
    generator = torch.Generator().manual_seed(spec.seed)
    drawn = torch.randn(model.score.weight.shape, generator=generator)
    model.score.weight.data = drawn * model.config.initializer_range
    return model


def _classified(model, micro, balance):
    rows = [e.input_ids for e in micro]
    ids = _filled(rows, model.config.pad_token_id)
    mask = _filled([[1] * len(row) for row in rows], 0)
    out, labels = model(input_ids=ids, attention_mask=mask), torch.tensor([e.label for e in micro])
    if balance:
        config = model.config
        router_logits = model.model(input_ids=ids, attention_mask=mask, **balance).router_logits
        out["aux_loss"] = load_balancing_loss_func(
            router_logits, config.num_local_experts, config.num_experts_per_tok, mask)
    return out.logits[:, None], labels[:, None], out


def _causal(model, micro, balance):
    rows = [e.input_ids for e in micro]
    ids, mask = _filled(rows, 0), _filled([[1] * len(row) for row in rows], 0)
    prompts = [[-100] * (len(e.input_ids) - e.answer) for e in micro]
    answers = [e.input_ids[-e.answer :] for e in micro]
    labels = _filled([[*p, *a] for p, a in zip(prompts, answers, strict=True)], -100)
    out = model(input_ids=ids, attention_mask=mask, **balance)
    return out.logits[:, :-1], labels[:, 1:], out


def _packed(model, micro, balance):
    """One row of all sequences, whose positions start again."""
    ids = torch.tensor([[token for e in micro for token in e.input_ids]])
    positions = torch.tensor([[place for e in micro for place in range(len(e.input_ids))]])
    labels = [[-100] * (len(e.input_ids) - e.answer) + [*e.input_ids[-e.answer :]] for e in micro]
    labels = torch.tensor([sum(labels, [])])
    out = model(input_ids=ids, position_ids=positions, use_cache=False, **balance)
    return out.logits[:, :-1], labels[:, 1:], out


def _balance(routes, micro, scores):
    """Experts times the sum of f_e P_e, over the real tokens of all layers."""
    real = _filled([[1] * len(e.input_ids) for e in micro], 0).flatten().bool()
    probabilities, chosen = [], []
    for routing in routes:
        rows = real if len(real) == len(routing.logits) else slice(None)  # no padding in one row
        logits = routing.logits[rows].float()
        shares = logits.sigmoid() if scores == "sigmoid" else logits.exp()
        probabilities.append(shares / shares.sum(-1, keepdim=True))
        experts = torch.nn.functional.one_hot(routing.experts[rows], routing.logits.shape[-1])
        chosen.append(experts.sum(1).float())
    frequency, probability = torch.cat(chosen).mean(0), torch.cat(probabilities).mean(0)
    return len(frequency) * (frequency * probability).sum()


def _by_sequence(out, micro):
    """Experts times the sum of f_e P_e of each sequence's real tokens alone, encoder's and
    decoder's added, as a mean over the sequences."""
    losses = []
    for part in ("encoder", "decoder"):
        logits = torch.stack(out[f"{part}_router_logits"])  # layers, rows, tokens, experts
        for row, example in enumerate(micro):
            prompt = len(example.input_ids) - example.answer
            real = logits[:, row, : prompt if part == "encoder" else example.answer].flatten(0, 1)
            share = torch.nn.functional.one_hot(real.argmax(-1), real.shape[-1]).float().mean(0)
            losses.append(len(share) * (share * real.softmax(-1).mean(0)).sum())
    return sum(losses) / len(micro)


def _seq2seq(model, micro, balance):
    rows = [e.input_ids[: -e.answer] for e in micro]
    ids = _filled(rows, model.config.pad_token_id)
    mask = _filled([[1] * len(row) for row in rows], 0)
    labels = _filled([e.input_ids[-e.answer :] for e in micro], -100)
    told = (labels != -100).long()
    given = {"attention_mask": mask, "decoder_attention_mask": told}
    out = model(input_ids=ids, labels=labels, **given, **balance)
    return out.logits, labels, out


def _filled(rows, value):
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def assert_same_training(folder, spec, model, inputs, norm=1e-5):
    expected, state = reference(spec, model, inputs)
    got = curve(folder)
    assert expected["gradient_norm"].max() > spec.gradient_clipping  # clipping took place
    compared = ["step", "loss", "gradient_norm", "learning_rate"]
    for column in compared + ["auxiliary_loss"] * bool(spec.auxiliary_loss_weight):
        same = pytest.approx(expected[column].to_numpy(), rel=norm if "norm" in column else 1e-5)
        assert got[column].to_numpy() == same, f"{column}: {(got[column] / expected[column]).max()}"
    for key, value in weights(folder).items():
        torch.testing.assert_close(
            value, state[key], rtol=0, atol=2e-4, msg=lambda m, k=key: f"{k} {m}"
        )
