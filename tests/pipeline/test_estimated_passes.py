"""What `plan` counts of procedures in the sweeps of the project, by hand."""

import pytest
from estimates import IMAGENET, SWEEPS, estimator

from stages.evaluate.shards import PROCEDURE_WORK


def test_passes_of_images_by_hand(tmp_path):
    found = estimator(IMAGENET, tmp_path)
    nodes = found.plan.nodes
    dense = 174_587_904
    trained = found.work(nodes["finetune/vit-b32-released-seed0"])
    assert trained.tokens == 10_000 * 1024 * 145 and trained.flops == 3 * dense * trained.tokens
    plain = found.work(nodes["evaluate/vit-b32-released-seed0-images"])
    assert plain.tokens == 5_000 * 145 and plain.whole
    curve = found.work(nodes["evaluate/vit-b32-released-seed0-curve"])
    # Once as it is, twice beside its mirror image, once in bfloat16.
    # At each budget 40 gradients, a last look and a clean gradient twice (paper and pgd), 40 points
    # of noise; all seen again; three for the random perturbation and the worst images. 16 images
    # meet pgd with twice the steps, from another start, and once without a bound.
    at_budget, harder = 2 * (124 + 1) + 41 + 3, 26 * (244 + 124) + 124
    assert curve.tokens == 145 * (1_000 * (4 + 26 * at_budget) + 16 * harder) and curve.whole
    sparse = found.work(nodes["evaluate/vmoe-b32-e8-k2-every2-released-seed0-curve"])
    # Routes exchanged both ways: as they are, weighed anew, in each of 6 layers.
    assert sparse.tokens - curve.tokens == 145 * 1_000 * 26 * 2 * 8
    probes = found.work(nodes["evaluate/vmoe-b32-e8-k2-every2-released-seed0-interventions"])
    # 5 substitutions at 4 shares, 2 numbers of experts, 8 masks of each of 6 routers.
    assert probes.tokens == 145 * 1_000 * (1 + 20 + 2 + 48) and probes.whole
    assert curve.gpu_hours == pytest.approx(dense * curve.tokens / 200e12 / 3600)
    assert found.plan.sweep.resources.evaluate.shard_size == 32 * PROCEDURE_WORK
    wide = found.size("model/vit-b32-wide")
    assert wide.active / found.size("model/vmoe-b32-e8-k2-every2").active == pytest.approx(1, 1e-3)


def test_passes_of_texts_by_hand(tmp_path):
    """The four requests of the text sweep: 20 steps of 32 candidates for eight tokens."""
    found = estimator(SWEEPS / "adversarial_moe" / "text_cpu.yaml", tmp_path)
    suffixes = found.plan.sweep.evaluations["suffixes"]
    asked = found.asked(suffixes)
    # The filler's requests end with the place for one, {prompt}.
    prompt = (round(found.characters("advbench")) + len("{prompt}")) / 4
    searched = 8 + 3
    each = 5 * (prompt + searched) + (1 + 20 * 35) * searched + prompt + 3 * (prompt + 8)
    # Of the first one the search goes on and is made twice again, to three more answers; 60 steps
    # of free embeddings.
    more = 3 * ((1 + 20 * 35) * searched + prompt + 8) + 181 * searched
    assert asked.read == pytest.approx(4 * each + more)
    assert asked.written == (4 * 3 + 3) * 24 and asked.whole
    # Slopes of 4 texts: a start of 4 steps and 4 samples within two radii, 2 labels; a model with
    # experts twice. The inputs of its blocks once more.
    slopes = found.plan.sweep.evaluations["slopes"]
    ascent, jacobian = 1 + 13, 1 + 2 * 2
    length = (round(found.characters("amazon_attacked")) + len("Text: \nSentiment:")) / 4
    for layers, sides in ((0, 1), (6, 2)):
        passes = 1 + 2 * (sides * ascent + 5) + sides * jacobian + 1
        assert found.asked(slopes, layers).read == pytest.approx(4 * length * passes)
    moe = "evaluate/smollm2-moe-sft-seed0-attacks"
    assert found.sparse_blocks(found.plan.nodes[moe].inputs["checkpoint"]) == 6
    assert found.sparse_blocks("model/smollm2") == 0
    assert found.work(found.plan.nodes[moe]).whole
