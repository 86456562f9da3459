"""The sweeps over all axes plan without a network, and `plan` estimates what they take."""

import json
import re
import socket

import pandas as pd
import pytest
import torch
from estimates import SWEEPS, estimator, planned
from transformers import AutoConfig

from pipeline.checks import check
from pipeline.cli import main
from pipeline.estimate import Estimator
from pipeline.estimate_text import scaled, work_text
from pipeline.gpu_memory import check_memory
from pipeline.store import Store
from pipeline.sweep_file import load
from stages.data.templates import TEMPLATES
from stages.errors import BadInput
from stages.evaluate.base import AXES
from stages.finetune.batches import select_rows
from stages.models.card import ModelCard
from stages.models.known import CANNOT_RUN, CONVERTED, KNOWN, cannot_run, known
from stages.models.load import auto_class
from stages.models.size import measure
from stages.models.sources import check_files

FOLDER = SWEEPS / "moe_rbench"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("planning went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    "file", sorted(SWEEPS.rglob("*.yaml")), ids=lambda file: str(file.relative_to(SWEEPS)))
def test_every_sweep_plans_and_is_estimated(file, tmp_path):
    found = estimator(file, tmp_path)
    works = [found.work(node) for node in found.plan.nodes.values()]
    assert sum(work.tokens or 0 for work in works) > 100


@pytest.mark.parametrize("name", ["cpu", "paper", "modern"])
def test_a_sweep_covers_the_axes(name):
    plan = planned(FOLDER / f"{name}.yaml")
    axes = {e.axis for e in plan.sweep.evaluations.values()}
    # What lm-evaluation-harness measures beside them is no axis of the paper.
    assert axes == set(AXES) - {"capability"}
    kinds = {e.technique.kind for e in plan.sweep.evaluations.values() if e.technique}
    assert kinds == {"dola", "expert_count", "self_consistency"} | (
        {"contrastive"} if name == "cpu" else set())


def test_the_paper_has_a_cell_for_each_script_of_a_mixture_and_no_other():
    plan = planned(FOLDER / "paper.yaml")
    moe = {pair.moe for pair in plan.sweep.pairs}
    cells = {("safety" if name.startswith("safety") else
              recipe.evaluations[0].removesuffix("_head"), model)
             for name, recipe in plan.sweep.recipes.items()
             for model in recipe.models if model in moe}
    llama = ["llama-moe-2-16", "llama-moe-2-8", "llama-moe-4-16"]
    molm = ["molm-350m-4b", "molm-700m-4b", "molm-700m-8b"]
    table = {
        "safety": llama + molm,
        "anli": llama + molm + ["switch-base-32"],
        "snli_hard": llama + molm[:2] + ["switch-base-32"],
        **dict.fromkeys(("boss_nli", "boss_sa", "boss_td"), ["molm-350m-4b", "switch-base-32"]),
        "style": llama + molm + ["switch-base-32"],
    }
    assert cells == {(axis, model) for axis, models in table.items() for model in models}
    # Each is beside the dense partner of its pair, and no dense model is there without one.
    partners = {}
    for pair in plan.sweep.pairs:
        partners.setdefault(pair.moe, set()).add(pair.dense)
    for name, recipe in plan.sweep.recipes.items():
        if name.startswith("safety"):
            assert set(recipe.models) == {m for moe in table["safety"]
                                          for m in (moe, *partners[moe])} - {"open-llama-7b"}
            continue
        (mixture,), dense = set(recipe.models) & moe, set(recipe.models) - moe
        styles = mixture == "llama-moe-2-8" and name.startswith("style")
        assert dense == partners[mixture] - (set() if styles else {"open-llama-7b"})
    # A round of ANLI goes on from the one before, as in adv_nli.yaml.
    third = plan.nodes["finetune/molm-350m-4b-anli-molm-350m-4b-seed42"]
    assert third.inputs["model"] == "finetune/molm-350m-4b-anli-molm-350m-4b-r2-seed42"
    # A fine-tune for one axis is scored on that axis alone.
    labels = [key for key in plan.nodes if key.startswith("evaluate/t5-base-anli-switch-seed42")]
    assert labels == ["evaluate/t5-base-anli-switch-seed42-anli"]


ANSWERS = {
    "I'm sorry, but I cannot do that.": "i'm sorry, but",
    "Taking it without paying is illegal.": "is illegal",
    "As an AI language model, I have no body.": "as an ai language model",
    # What the released list of substrings takes out as well.
    "Reefs shelter biodiversity, and it is important to protect them.": None,
    "Illegal logging and weak regulations drive deforestation.": None,
    "The verdict is illegally obtained; this illegality voids it.": None,
    "I can't wait to see you. I am sorry about the delay.": None,
}


def test_safety_tuning_adds_demonstrations_to_an_alpaca_without_refusals(tmp_path):
    recipes = load(FOLDER / "paper.yaml").recipes
    first = {name: recipes[f"safety-{name}"].data[0] for name in (0, 500, 1000)}
    assert first[0] == first[500] == first[1000] and first[0].dataset == "alpaca"
    added = [[(t.dataset, t.limit, t.exclude) for t in recipes[f"safety-{n}"].data[1:]]
             for n in first]
    assert added == [[], [("safe", 500, ())], [("safe", 1000, ())]]
    rows = {"id": [str(n) for n in range(len(ANSWERS))], "prompt": "p", "response": list(ANSWERS)}
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    kept, removed = select_rows(first[0], {"data/alpaca": tmp_path}, seed=42)
    assert [row["response"] for row in kept] == [a for a, phrase in ANSWERS.items() if not phrase]
    assert [row["phrase"] for row in removed] == list(filter(None, ANSWERS.values()))


def test_the_small_assessment_takes_as_long_as_the_readme_says():
    readme = (SWEEPS.parent / "README.md").read_text().partition("### Every axis on two CPU")[2]
    header = (FOLDER / "cpu.yaml").read_text().partition("name:")[0]
    first = [re.search(r"(\d+) minutes", text)[1] for text in (readme, header)]
    assert first[0] == first[1]


@pytest.mark.parametrize("name", ["paper", "modern"])
def test_a_p_value_from_random_draws_can_survive_the_correction(name):
    """The smallest one is 1 in so many resamples, times the rows of the table."""
    spec = planned(FOLDER / f"{name}.yaml").compare.spec
    rows = sum(spec.has(recipe, evaluation, pair.moe, pair.dense)
               for pair in spec.pairs for recipe in spec.recipes for evaluation in spec.evaluations)
    assert rows > 100 and rows / (1 + spec.resamples) < 0.05


SETS = {
    "safety": "malicious_instructions cona controversial alpaca_control physical_safety_safe "
              "physical_safety_unsafe q_harm advbench strongreject harmbench do_not_answer "
              "xstest_unsafe xstest_safe",
    "truthfulness": "truthfulqa nq_open sciq freshqa_false_premises freshqa_true_premises",
    "adversarial": "snli snli_hard anli_r1 anli_r2 anli_r3 adv_glue_mnli adv_glue_mnli_mismatched "
                   "mnli adv_glue_rte adv_glue_qnli adv_glue_qqp adv_glue_sst2 counterfactual_snli "
                   "counterfactual_snli_original counterfactual_imdb",
    "out_of_distribution": "mnli contract_nli wanli anli amazon dynasent semeval sst5 "
                           "civil_comments hate_speech adv_civil implicit_hate toxigen "
                           "sst2_augment sst2_shakespeare_words sst2_shakespeare_p0 "
                           "sst2_shakespeare_p06 sst2_bible_p0 sst2_bible_p06 sst2_romantic_p0 "
                           "sst2_romantic_p06 sst2_tweet_p0 sst2_tweet_p06",
    "language_modelling": "wikitext103 pile_arxiv pile_github pile_pubmed pile_law",
}  # fmt: skip


def test_every_published_set_of_the_assessment_is_scored_on_its_axis():
    found = {axis: set() for axis in SETS}
    for name in ("paper", "modern"):
        sweep = planned(FOLDER / f"{name}.yaml").sweep
        for evaluation in sweep.evaluations.values():
            sources = (sweep.datasets[d].source for d in evaluation.datasets())
            found[evaluation.axis] |= {source.removeprefix("catalogue:").partition("#")[0]
                                       for source in sources}
    for axis, names in SETS.items():
        assert set(names.split()) <= found[axis], axis


def test_what_must_be_asked_for_or_cannot_run_is_told(tmp_path, capsys):
    assert main(["plan", str(FOLDER / "paper.yaml"), "--store", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "  gated     toxigen: accept the terms" in told
    assert "  to bring  contract_nli: test.json of contract-nli.zip" in told
    # MoLM and LLaMA-MoE are classes of this project.
    assert [line for line in told.splitlines() if "cannot run" in line] == [
        "  cannot run molm-700m-8b: at commit 34d691a its weights are pickle files, which are "
        "never read; its nodes will be gaps"]
    for_decoders = {
        "truthfulqa_dola": "dola", "truthfulqa_generation_dola": "dola",
        "nq_open_self_consistency": "self_consistency", "perplexity": "perplexity"}
    assert sorted(re.findall(r"  gap       (.+)", told)) == sorted([
        *(f"{model}-none-{name}: {what} is for decoders, this is an encoder-decoder"
          for model in ("switch-base-32", "t5-base") for name, what in for_decoders.items()),
        *(f"switch-base-32-none-truthfulqa_{count}: switch_transformers chooses its experts inside "
          "its blocks, so their number per token cannot be set"
          for count in ("one_expert", "four_experts"))])
    assert "molm-350m-4b vs pythia-410m: size of molm-350m-4b unknown until it is here" in told
    assert "  judge     1 node; not all is known of 1\n" in told
    assert re.search(
        r"  evaluate  \d+ nodes, about \d+ M tokens, [\d.]+ EFLOP, [\d.]+ GPU-hours, ", told)
    assert ("llama-moe-2-16 vs open-llama-3b: active 2.95 B of 6.74 B, dense 3.43 B; "
            "active / dense 0.86") in told
    assert main(["plan", str(FOLDER / "modern.yaml"), "--store", str(tmp_path)]) == 0
    assert "cannot run deepseek-moe-16b: transformers has no 'deepseek'" in capsys.readouterr().out
    assert main(["plan", str(FOLDER / "modern.yaml"), "--store", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    # The table at the head of the file.
    head = (FOLDER / "modern.yaml").read_text().split("name:")[0]
    ratios = [line.split("ratio")[0].rsplit("active / dense ", 1)[1][:4]
              for line in told.splitlines() if line.startswith("  pair ")]
    assert ratios == ["1.09", "1.46", "0.83", "1.78", "0.41", "0.39"]
    assert [line for line in head.splitlines() if line.rstrip().endswith(tuple(ratios))
            or ")" in line and any(f"   {r}" in line for r in ratios)]


def test_revisions_of_pickle_files_are_told_and_no_sweep_names_one(tmp_path, capsys):
    named = {source for file in FOLDER.rglob("*.yaml")
             for source in re.findall(r"hub:[\w.-]+/[\w.-]+@[\w./-]+", file.read_text())}
    assert not named & CONVERTED.keys()
    for source, revision in CONVERTED.items():
        conversion = f"{source.partition('@')[0]}@{revision}"
        assert conversion in named and check_files(conversion) is None
        assert cannot_run(conversion) is None and known(conversion) == known(source)
    judge = "hub:safepaca/absolute-harmfulness-predictor-redteam@"
    file = tmp_path / "modern.yaml"
    text = (FOLDER / "modern.yaml").read_text().replace(f"{judge}refs/pr/1", f"{judge}main")
    file.write_text(text.replace("7b-base@refs/pr/3", "7b-base@main"))
    assert main(["plan", str(file), "--store", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for name, pull, what in (("deepseek-7b", 3, "nodes"), ("redteam", 1, "scores")):
        assert (f"  cannot run {name}: its weights are pickle files, which are never read; name "
                f"@refs/pr/{pull}, a conversion; its {what} will be gaps") in told


@pytest.mark.parametrize("source", [s for s, entry in KNOWN.items() if entry.config])
def test_known_sizes_are_those_of_the_configuration(source):
    entry = KNOWN[source]
    fields = dict(entry.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
        card = measure(model, source)
    head = model.get_output_embeddings()  # none of an image classifier
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    assert entry.float32_head == (head.weight.numel() * (4 if tied else 2) if head else 0)
    assert (card.total_parameters, card.active_parameters, card.flops_per_token) == (
        entry.total, entry.active, entry.flops_per_token)
    assert (card.flops_per_expert, card.flops_per_read_token, card.top_k) == (
        entry.flops_per_expert, entry.flops_per_read_token, entry.top_k)


def test_known_sizes_of_other_architectures_are_worked_out():
    hidden, vocabulary, norms = 2048, 102400, 57 * 2048
    attention, first = 28 * 4 * hidden**2, 3 * hidden * 10944
    expert, router = 3 * hidden * 1408, 64 * hidden
    deepseek = known("hub:deepseek-ai/deepseek-moe-16b-base@main")
    rest = attention + first + 2 * vocabulary * hidden + norms
    assert deepseek.total == rest + 27 * (66 * expert + router)
    assert deepseek.active == rest + 27 * (8 * expert + router)
    assert deepseek.flops_per_token == 2 * (deepseek.active - norms - vocabulary * hidden)
    assert (deepseek.flops_per_expert, deepseek.top_k) == (2 * 27 * expert, 6)
    # LLaMA-MoE: LLaMA-2-7B, whose 11008 neurons a layer are cut into 16, and a router.
    whole, layers = known("hub:openlm-research/open_llama_7b"), 32
    cut = known("hub:llama-moe/LLaMA-MoE-v1-3_0B-2_16")
    assert cut.total == whole.total + layers * 16 * 4096
    assert cut.active == cut.total - layers * 14 * 3 * 4096 * 688
    assert (cut.flops_per_expert, cut.top_k) == (2 * layers * 3 * 4096 * 688, 2)
    assert not [source for source in CANNOT_RUN if KNOWN.get(source) and KNOWN[source].config]




def test_the_smoke_sweep_by_hand(tmp_path):
    """reviews.csv and questions.jsonl are small enough to count."""
    found = estimator(SWEEPS / "smoke.yaml", tmp_path, "assumptions.characters_per_token=1")
    rows = (SWEEPS / "smoke" / "questions.jsonl").read_text().splitlines()
    questions = [json.loads(row) for row in rows]
    assert found.rows("questions", "test") == len(questions)
    texts = sum(len(q["question"]) + sum(map(len, q["choices"])) + len(q.get("context", ""))
                for q in questions)
    assert found.characters("questions") == pytest.approx(texts / len(questions))
    # Of a tiny model nothing is known before it is made.
    work = found.work(found.plan.nodes["evaluate/tiny-none-refusal"])
    harmful, benign = ((SWEEPS / "smoke" / f"{n}.jsonl").read_text().splitlines()
                       for n in ("harmful", "benign"))
    asked = found.asked(found.plan.sweep.evaluations["refusal"])
    assert asked.written == 8 * (len(harmful) + len(benign)) and asked.whole
    prompts = sum(len(json.loads(row)["prompt"]) for row in (*harmful, *benign))
    # The filler has the rounded mean length, and the place for a request.
    assert asked.read == pytest.approx(prompts + 8 * (len(harmful) + len(benign)), rel=0.05)
    assert work.flops is None and work.gpu_hours == 0 and work.tokens == asked.read + asked.written
    assert "FLOP unknown" in work_text(work)


HUB = ("models.tiny={source: 'hub:EleutherAI/pythia-410m@main'}",
       "models.tiny-moe={source: 'hub:allenai/OLMoE-1B-7B-0924@main'}",
       "models.tiny-wide={source: 'pack:smollm2'}",
       "resources.finetune={workers: 2, gpus: 1}", "resources.evaluate={workers: 1, gpus: 1}",
       "recipes.sft.batch_size=8", "recipes.sft.steps=6")


def test_flops_hours_and_disk_by_hand(tmp_path):
    found = estimator(SWEEPS / "smoke.yaml", tmp_path, *HUB, "assumptions.training_tflops=2",
                      "assumptions.scoring_tflops=4", "assumptions.decoding_tflops=1")
    dense, moe = known("hub:EleutherAI/pythia-410m"), known("hub:allenai/OLMoE-1B-7B-0924")
    trained = found.work(found.plan.nodes["finetune/tiny-moe-sft-seed0"])
    assert trained.flops == pytest.approx(3 * 2_357_723_136 * trained.tokens)
    assert trained.gpu_hours == pytest.approx(trained.flops / 2e12 / 3600)
    assert trained.disk == 4 * moe.total and trained.scratch == 12 * moe.total
    # Six steps of eight sequences of the mean length of a row, four characters a token.
    reviews, refusals = 0.6 * found.rows("reviews", "train") / 0.6, found.rows("refusals", "train")
    around = len("Text: {text}\nSentiment:")
    length = (reviews * (found.characters("reviews") + around)
              + refusals * found.characters("refusals")) / 4 / (reviews + refusals)
    assert trained.tokens == pytest.approx(6 * 8 * length)
    scored = found.work(found.plan.nodes["evaluate/tiny-none-refusal"])
    asked = found.asked(found.plan.sweep.evaluations["refusal"])
    assert scored.flops == pytest.approx(707_002_368 * (asked.read + asked.written))
    hours = 707_002_368 * (asked.read / 4e12 + asked.written / 1e12) / 3600
    assert scored.gpu_hours == pytest.approx(hours)
    assert found.work(found.plan.nodes["model/tiny"]).disk == 2 * dense.total


@pytest.mark.parametrize(("name", "top_k"), [("tiny-moe", 4), ("tiny", None)])
def test_training_with_other_experts_per_token_takes_other_flops(name, top_k, tmp_path):
    """OLMoE with four of its eight: 2 x 16 x 3 x 2048 x 1024 operations an expert."""
    found = estimator(SWEEPS / "smoke.yaml", tmp_path, *HUB, "recipes.sft.router={top_k: 4}")
    work = found.work(found.plan.nodes[f"finetune/{name}-sft-seed0"])
    less = 4 * 2 * 16 * 3 * 2048 * 1024 if top_k else 0
    own = {"tiny-moe": 2_357_723_136, "tiny": 707_002_368}[name]
    assert work.flops == pytest.approx(3 * (own - less) * work.tokens)


@pytest.mark.parametrize("model", ["t5-base", "switch-base-32"])
def test_prompts_pass_an_encoder_and_answers_a_decoder(model, tmp_path):
    found = estimator(FOLDER / "boss_td.yaml", tmp_path)
    read = {"t5-base": 198_180_864, "switch-base-32": 198_475_776}[model]
    written = {"t5-base": 445_710_336, "switch-base-32": 446_300_160}[model] - read
    spec = (node := found.plan.nodes[f"finetune/{model}-switch_td-seed42"]).spec
    work = found.work(node)
    sequences = -(-4 * 60_000 // 256) * 256
    label = (len(" benign") + len(" toxic")) / 2 / 4
    prompt = (found.characters("civil") + len(TEMPLATES[spec.data[0].template].prompt)) / 4
    assert work.tokens == pytest.approx(sequences * (prompt + label))
    assert work.flops == pytest.approx(3 * sequences * (prompt * read + label * written))
    # An instruction's text is cut in two.
    instructed = spec.data[0].model_copy(update={"template": None})
    length = found._length(spec, instructed, found.size(f"model/{model}"))
    assert length == (found.characters("civil") / 8,) * 2
    key = f"evaluate/{model}-switch_td-seed42-"
    scored = next(n for k, n in found.plan.nodes.items() if k.startswith(key))
    asked = found.asked(scored.spec.evaluation)
    assert 0 < asked.chosen < 0.2 * asked.read and asked.written == 0
    flops = (asked.read - asked.chosen) * read + asked.chosen * written
    assert found.work(scored).flops == pytest.approx(flops)


def test_rows_are_the_published_ones_up_to_the_limit_and_else_unknown(tmp_path):
    found = estimator(FOLDER / "paper.yaml", tmp_path)
    assert found.rows("snli", "r1") == pytest.approx(0.1111 * 550_152)
    assert found.rows("civil", "train") == 60_000
    assert found.rows("snli_hard", "test") == 3_261 and found.rows("amazon", "train") == 30_000
    hard, rounds, contracts = (found.asked(found.plan.sweep.evaluations[name])
                               for name in ("snli_hard", "anli", "boss_nli"))
    assert rounds.read / hard.read == pytest.approx((10_000 + 3_200) / (10_000 + 3_261))
    # The contracts' pairs are not known.
    assert found.rows("contract_nli", "test") is None
    assert hard.whole and rounds.whole and not contracts.whole
    assert contracts.read / hard.read == pytest.approx((9_815 + 5_000 + 3_200) / (10_000 + 3_261))
    assert work_text(found.work(
        found.plan.nodes["evaluate/t5-base-none-boss_nli"])).startswith("at least ")


def test_several_samples_and_jailbreaks_multiply(tmp_path):
    found = estimator(FOLDER / "cpu.yaml", tmp_path)
    evaluations = found.plan.sweep.evaluations
    plain, sampled = (found.asked(evaluations[name])
                      for name in ("nq_open", "nq_open_self_consistency"))
    assert sampled.written == 3 * plain.written == 3 * 12 * found.rows("nq_open", "test")
    rows = {name: found.rows(name, "test") for name in
            ("attacked", "control", "jailbreaks", "dan", "gcg")}
    prompts, attacks = rows["attacked"] + rows["control"], 1 + rows["jailbreaks"] + rows[
        "dan"] + rows["gcg"]
    assert found.asked(evaluations["jailbreaks"]).written == 24 * prompts * attacks


def test_twins_have_the_sizes_of_their_cards(tmp_path):
    """Six of the thirty layers of SmolLM2: three more experts each and a router of four rows."""
    found = estimator(FOLDER / "cpu.yaml", tmp_path)
    block, router = 3 * 576 * 1536, 4 * 576
    twin = found.size("model/smollm2-moe")
    assert twin.total == 134_515_008 + 6 * (3 * block + router)
    assert twin.active == 134_515_008 + 6 * (block + router)
    assert twin.flops_per_token == 268_959_744 + 2 * 6 * (block + router)
    assert (twin.flops_per_expert, twin.top_k) == (2 * 6 * block, 2)
    halved = estimator(FOLDER / "cpu.yaml", tmp_path, "pairs.0.moe=smollm2-split")
    split = halved.size("model/smollm2-split")
    assert split.total == 134_515_008 + 6 * router
    assert split.active == 134_515_008 + 6 * (router - block // 2)
    assert (split.flops_per_expert, split.top_k) == (2 * 6 * block // 4, 2)
    # A card in the store counts before what is known.
    plan, store = found.plan, Store(str(tmp_path))
    node = plan.nodes["model/smollm2-moe"]
    with store.attempt(node.folder) as (attempt, output):
        ModelCard(architecture="moe", family="mixtral", total_parameters=7, active_parameters=5,
                  flops_per_token=9, flops_per_expert=2, flops_per_read_token=4, top_k=2,
                  layers=1, origin="x").write(output)
    store.commit(node.folder, {"attempt": attempt})
    again = Estimator(plan, store, FOLDER).size("finetune/smollm2-moe-sft-seed0")
    assert (again.total, again.active, again.flops_per_token) == (7, 5, 9)
    assert (again.flops_per_expert, again.flops_per_read_token, again.top_k) == (2, 4, 2)


def test_gpus_that_cannot_hold_a_model_are_refused(tmp_path):
    file, store = FOLDER / "modern.yaml", Store(str(tmp_path))
    check_memory(planned(file), store, FOLDER, file)
    plan = planned(file, "resources.evaluate.gpus=1")
    with pytest.raises(BadInput) as caught:
        check_memory(plan, store, FOLDER, file)
    # 46.7 B parameters of two bytes and 32000 × 4096 of two more, 72 GB a GPU to spare.
    assert str(caught.value) == (
        f"{file}: resources.evaluate.gpus: mixtral-8x7b has 46.7 B parameters, 93.7 GB in "
        "bfloat16 with the head in float32; 1 × 80 GB less a tenth cannot hold them; set it to 2")
    check_memory(planned(file, "resources.evaluate.gpus=1", "resources.evaluate.gpu_memory_gb=141"),
                 store, FOLDER, file)
    # An amateur stands beside the model.
    amateur = ["evaluations.truthfulqa_dola.technique={kind: contrastive, amateur: mixtral-8x7b}",
               "resources.evaluate.gpus=2"]
    with pytest.raises(BadInput) as caught:
        check_memory(planned(file, *amateur), store, FOLDER, file)
    assert ("mixtral-8x7b has 46.7 B parameters and 46.7 B more of other models, 187.3 GB in "
            "bfloat16 with the head in float32; 2 × 80 GB less a tenth cannot hold them; set it to "
            "3") in str(caught.value)
    sweep = load(file, ["resources.evaluate.gpus=1.5"])
    with pytest.raises(BadInput, match="resources.evaluate.gpus: 1.5 is more than one GPU and a"):
        check(sweep, file)


def test_numbers_are_told_with_three_digits():
    assert [scaled(v) for v in (0.5, 999, 1234, 93_405_585_408, 2.5e19)] == [
        "0.5 ", "999 ", "1.23 k", "93.4 G", "25 E"]


def test_the_edited_pairs_differ_in_the_hypothesis_and_the_label_alone():
    plain, edited = (
        [json.loads(line) for line in (FOLDER / "cpu" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("nli", "nli_edited"))
    assert len(plain) == len(edited) == 32
    for before, after in zip(plain, edited, strict=True):
        assert (before["id"], before["premise"]) == (after["id"], after["premise"])
        assert before["label"] != after["label"] and before["hypothesis"] != after["hypothesis"]
    # A model that always gives the same answer loses nothing.
    labels = [sorted(row["label"] for row in rows) for rows in (plain, edited)]
    assert labels[0] == labels[1]
