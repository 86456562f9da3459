"""Hand-made score tables of attacks and probes, and the spec that compares them."""

import numpy as np
import pandas as pd

from stages.compare.claim import Claim
from stages.compare.contrast import Contrast
from stages.compare.hypotheses import judge
from stages.compare.measured import Measured
from stages.compare.spec import CompareSpec, Pair
from stages.models.card import ModelCard

N = 40
BUDGETS = ("8", "16")
EVALUATIONS = {
    "attacks": {
        "kind": "image_attacks",
        "dataset": "mnist",
        "budgets": [8 / 255, 16 / 255],
        "attacks": {
            "pgd": {"kind": "pgd"},
            "joint": {"kind": "apgd", "routing": "joint"},
            "noise": {"kind": "noise"},
        },
    },
    "slopes": {"kind": "image_lipschitz", "dataset": "mnist"},
    "interventions": {
        "kind": "image_interventions", "dataset": "mnist", "shares": [0.5, 1.0], "top_k": [2],
    },
    "geometry": {"kind": "image_geometry", "dataset": "mnist"},
}  # fmt: skip
OF_TEXTS = {"dataset": "shop", "template": "sentiment"}
TEXTS = {
    "attacks": {
        "kind": "text_attacks", **OF_TEXTS,
        "attacks": [
            {"kind": "embedding_pgd"},
            {"kind": "embedding_pgd", "name": "joint", "routing": "joint"},
            {"kind": "deep_word_bug"},
        ],
    },
    "slopes": {"kind": "local_lipschitz", **OF_TEXTS},
    "interventions": {
        "kind": "expert_interventions", **OF_TEXTS, "shares": [0.5, 1.0], "top_k": [2],
    },
    "geometry": {"kind": "router_geometry", **OF_TEXTS},
}  # fmt: skip
LAYERS = ("model.layers.1.mlp", "model.layers.3.mlp")
EXPERTS = {"vit": 0, "vmoe-4": 4, "vmoe-8": 8}


def spec_of(pairs=(("vmoe-4", "vit"), ("vmoe-8", "vit")), **changes):
    fields = {
        "title": "Attacked",
        "pairs": [Pair(name=f"{m} vs {d}", moe=m, dense=d) for m, d in pairs],
        "recipes": ("scratch",),
        "seeds": (0, 1, 2),
        "evaluations": EVALUATIONS,
        "resamples": 200,
        "hypotheses": True,
    }
    return CompareSpec(**fields | changes)


def card(name, **changes):
    experts = EXPERTS.get(name, 0)
    fields = {
        "architecture": "moe" if experts else "dense",
        "family": "vit_moe" if experts else "vit",
        "total_parameters": 200_000 * (experts or 1),
        "active_parameters": 200_000,
        "flops_per_token": 400_000 + 500 * experts,
        "experts": experts,
        "top_k": 1 if experts else 0,
        "moe_layers": (1, 3) if experts else (),
        "layers": 4,
        "origin": "made for a test",
    }
    return ModelCard(**fields | changes)


def share(of, n=N):
    """0/1 scores of which a share are 1: the first ones."""
    return (np.arange(n) < round(of * n)).astype(float)


def examples(n=N, **columns):
    ids = [f"mnist/{i}" for i in range(n)]
    return pd.DataFrame({"example_id": ids, "document": ids, "subset": "mnist"} | columns)


def attacks(robust=0.5, moe=True, change=0.6, at_random=0.2, noise=0.0, kept=1.0, n=N):
    """``robust`` accuracy at the first budget, half of it at the second."""
    values = {"correct": share(0.95, n)}
    values |= {"worst/8": share(robust, n), "worst/16": share(robust / 2, n)}
    values["robust"] = (values["worst/8"] + values["worst/16"]) / 2
    nan = np.full(n, np.nan)
    ripple = 0.01 * (np.arange(n) % 5 - 2)
    for budget in BUDGETS:
        for attack in ("pgd", "joint", "noise"):
            values[f"robust/{attack}/{budget}"] = values[f"worst/{budget}"]
            values[f"prediction_change/{attack}/{budget}"] = 1 - values[f"worst/{budget}"]
            # An attack on the routes changes them all: it must not count as a finding.
            level = {"pgd": change, "joint": 1.0, "noise": 0.0}[attack] + ripple
            values[f"routing_change/{attack}/{budget}"] = level if moe else nan
            for column in ("loss_rise", "zero_gradient"):
                values[f"{column}/{attack}/{budget}"] = np.zeros(n)
            for layer in LAYERS:
                values[f"routing_change/{attack}/{budget}/{layer}"] = level if moe else nan
        values[f"routing_change_random/{budget}"] = at_random + ripple / 2 if moe else nan
        values[f"swap_clean_attacked/{budget}"] = share(kept, n) if moe else nan
        values[f"swap_clean_attacked_correct/{budget}"] = share(0.95 * kept, n) if moe else nan
        values[f"swap_attacked_clean/{budget}"] = share(kept / 2, n) if moe else nan
    values["routing_change_noise"] = np.full(n, noise) if moe else nan
    values["routing_change_chance"] = np.full(n, 0.82) if moe else nan
    return examples(n, **values)


def text_attacks(robust=0.5, moe=True, change=0.3, clean=0.9, n=N):
    """The second attack finds what the first misses: it fails the check of that."""
    nan = np.full(n, np.nan)
    values = {"clean": share(clean, n), "correct": share(robust, n)}
    values |= {"noise": np.full(n, 0.01) if moe else nan, "chance": np.full(n, 0.6) if moe else nan}
    levels = {"embedding_pgd": robust + 0.1, "joint": robust, "deep_word_bug": 0.7}
    for attack, level in levels.items():
        values |= {f"correct/{attack}": share(level, n), f"random/{attack}": share(clean, n)}
        values[f"changed/{attack}"] = 1 - values[f"correct/{attack}"]
        values[f"success/{attack}"] = values[f"changed/{attack}"]
        values |= {f"{c}/{attack}": np.zeros(n) for c in ("queries", "zero_gradients")}
        # Of the dense model's tokens the nearest are nearer.
        values[f"size/{attack}"] = np.full(n, 0.0 if "word" in attack else 1.5 if moe else 3.0)
        moved = 1.0 if attack == "joint" else change
        for column, level_of in (("routing_change", moved), ("routing_change_random", 0.1)):
            for end in ("", *(f"/{layer}" for layer in LAYERS)):
                values[f"{column}/{attack}{end}"] = np.full(n, level_of) if moe else nan
        for swap in ("clean_attacked", "attacked_clean"):
            for what in ("routes", "experts"):
                kept = share(clean, n) if moe and attack != "deep_word_bug" else nan
                values[f"swap_{swap}_{what}/{attack}"] = kept
        checked = np.where(np.arange(n) < 4, 1.0, np.nan)
        values |= {f"check/{attack}/budget {b}": checked for b in ("0.05", "0.1")}
    return examples(n, **values)


def slopes(level=2.0, moe=True, n=N):
    lipschitz = level * (1 + 0.1 * (np.arange(n) % 3 - 1))
    frozen = 0.9 * lipschitz if moe else np.full(n, np.nan)
    values = {"lipschitz": lipschitz, "lipschitz_frozen": frozen, "jacobian_frozen": frozen}
    values |= {"block": lipschitz / 4, "block_random": lipschitz / 8, "block_frozen": frozen / 4}
    for layer in LAYERS:
        values |= {f"block/{layer}": lipschitz / 4, f"block_frozen/{layer}": frozen / 4}
    return examples(n, **values, lipschitz_random=lipschitz / 2, jacobian=lipschitz / 2,
                    routing_share=lipschitz / frozen)


def interventions(second=0.9, drawn=0.3, own=0.95, dropped=0.1, n=N):
    values = {"correct": share(own, n)}
    for name, level in (("next_ranked", second), ("random", drawn), ("drop_output", dropped)):
        values[f"correct/{name}_0.5"] = share((own + level) / 2, n)
        values[f"correct/{name}_1"] = share(level, n)
        for of in ("0.5", "1"):
            values[f"changed/{name}_{of}"] = values["correct"] - values[f"correct/{name}_{of}"]
    return examples(n, **values, **{"correct/top_2": share(own, n)})


def geometry(slope=1.0, n=N):
    term = np.arange(n) / n
    scatter = np.cos(7 * np.arange(n))
    return examples(
        n, routing_term=term, router_margin=1 - term, loss_rise=slope * term + 0.2 * scatter,
        disagreement=0.4 + 0 * term, disagreement_random=0.6 + 0 * term,
    )  # fmt: skip


def study(folder, spec, **overrides):
    """Inputs of every role; ``overrides`` maps a role's last parts to another table, or none."""
    inputs = {}

    def put(role, table):
        if table is None:
            return
        inputs[role] = folder / role
        inputs[role].mkdir(parents=True)
        table.to_parquet(inputs[role] / "scores.parquet")

    for model, architecture in spec.models.items():
        moe = architecture == "moe"
        for recipe in spec.recipes:
            if model not in spec.models_of.get(recipe, spec.models):
                continue
            for seed in spec.seeds_of(recipe):
                made = {"attacks": attacks(0.6 if moe else 0.4, moe), "slopes": slopes(2, moe)}
                if moe:
                    made |= {"interventions": interventions(), "geometry": geometry()}
                for name, table in made.items():
                    if name not in spec.evaluations:
                        continue
                    key = f"{model}/{recipe}/{seed}/{name}"
                    chosen = overrides
                    for ending in (key, f"{model}/{name}", name):
                        if ending in chosen:
                            table = chosen[ending]
                            break
                    if callable(table):
                        table = table(model, seed)
                    put(f"scores/{key}", table)
                role = f"checkpoint/{model}/{recipe}/{seed}"
                inputs[role] = folder / role
                inputs[role].mkdir(parents=True)
                card(model).write(inputs[role])
    return inputs


MANY = 400
"""Examples of the hypotheses on harmlessness; 40 cannot tell 0 from 5 %."""


def verdicts(folder, spec=None, cards=None, gaps=None, without=(), **tables):
    """One row per claim, from the standard study with other tables in it."""
    spec = spec or spec_of()
    inputs = study(folder, spec, **tables)
    inputs = {role: path for role, path in inputs.items() if role not in without}
    cards = {name: card(name) for name in spec.models} | (cards or {})
    return judge(Measured(spec, inputs, gaps or {}), cards)


def of(table, hypothesis):
    """The rows of one hypothesis, which have one verdict."""
    rows = table[table["hypothesis"] == hypothesis]
    assert rows["verdict"].nunique() == 1
    return rows.reset_index(drop=True)


def claim(p_value, value, above=True, **fields):
    """A claim of which only this is known."""
    found = Contrast(value, np.nan, np.nan, 0.0, p_value, np.nan, (), 10, 10, 3)
    return Claim("", found, above, **fields)


def text_spec(**changes):
    return spec_of(pairs=(("vmoe-4", "vit"),), seeds=(0,), evaluations=TEXTS, **changes)


def text_study(model, seed):
    return text_attacks(0.6 if model != "vit" else 0.4, model != "vit", n=MANY)
