"""From the training engine back to a Hugging Face folder, and the proof that nothing was lost."""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.errors import StageFailed
from stages.finetune.batches import Example, pack
from stages.finetune.spec import FinetuneSpec
from stages.models.card import ModelCard
from stages.models.load import load

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


@torch.no_grad()
def packed_logits(model: nn.Module, examples: list[Example]) -> torch.Tensor:
    """Logits of all tokens as training computes them: fp32 on the CPU, (tokens, vocabulary)."""
    training = model.training
    arguments, _ = pack(examples, next(model.parameters()).device)
    del arguments["logits_to_keep"]
    logits = model.eval()(**arguments, use_cache=False).logits[0].float().cpu()
    model.train(training)
    return logits


@torch.no_grad()
def padded_logits(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """The same logits from an ordinary padded batch of the plain model."""
    length = max(len(example.input_ids) for example in examples)
    ids = torch.zeros((len(examples), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        mask[row, : len(example.input_ids)] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()].float()


def write_folder(
    state: dict[str, torch.Tensor],
    spec: FinetuneSpec,
    source: Path,
    output: Path,
    probe: list[Example],
    expected: torch.Tensor,
) -> None:
    """Write weights, configuration, tokenizer and card, read them back and compare the logits.

    Raises StageFailed when the folder's logits on ``probe`` differ from ``expected``, the engine's,
    by more than 1e-4 (fp32, any token) or 5 % of the largest logit (bf16, half of the tokens).
    """
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=next(iter(state.values())).dtype)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(output)
    del model
    # Tokenizer, chat template and generation settings are the source's own, byte for byte.
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, output / file.name)

    fp32 = spec.precision == "fp32"
    exported = load(output, dtype="float32" if fp32 else "bfloat16")
    tokens = (packed_logits(exported, probe) - expected).abs().amax(dim=-1)
    # bf16 rounds a few tokens of a Mixture-of-Experts onto other experts.
    difference = (tokens.max() if fp32 else tokens.median()).item()
    tolerance = 1e-4 if fp32 else 0.05 * expected.abs().max().item()
    if not difference <= tolerance:
        raise StageFailed(
            f"{output}: the exported model's logits differ from the training engine's by "
            f"{difference:.2e} (allowed {tolerance:.2e}); report this as a defect"
        )
    card = ModelCard.read(source)
    card.model_copy(
        update={
            "origin": f"fine-tuned for {spec.steps} steps from: {card.origin}",
            "notes": {**card.notes, "export_logit_difference": difference},
        }
    ).write(output)
