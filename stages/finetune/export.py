"""From the training engine back to a Hugging Face folder, and the proof that nothing was lost."""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from stages.data.templates import INSTRUCTION_CHAT
from stages.errors import StageFailed
from stages.finetune.batches import Example, micro_batch, padded
from stages.finetune.head import head_config
from stages.finetune.spec import FILES, FinetuneSpec
from stages.models.card import ModelCard
from stages.models.load import auto_class, load, load_tokenizer, reads_images
from stages.models.modes import evaluating

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


@torch.no_grad()
def training_logits(model: nn.Module, examples: list[Example]) -> torch.Tensor:
    """Logits as training computes them, fp32 on the CPU, shape (tokens, vocabulary): those of all
    tokens, or of the answers' tokens where sequences are not packed.
    """
    micro = micro_batch(examples, model.config, next(model.parameters()).device)
    arguments = {k: v for k, v in micro.arguments.items() if k != "logits_to_keep"}
    with evaluating(model):
        return model(**arguments, use_cache=False).logits[micro.answers].float().cpu()


@torch.no_grad()
def padded_logits(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """Logits of all tokens from an ordinary padded batch of the plain model."""
    ids, mask = padded([example.input_ids for example in examples], 0, torch.device("cpu"))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()].float()


def write_folder(
    state: dict[str, torch.Tensor],
    spec: FinetuneSpec,
    source: Path,
    output: Path,
    probe: list[Example],
    expected: torch.Tensor,
    steps: int,
) -> None:
    """Write weights, configuration, tokenizer and card, read them back and compare the logits.

    Raises StageFailed when the folder's logits on ``probe`` differ from ``expected``, the engine's,
    by more than 1e-4 (fp32, any token) or 5 % of the largest logit (bf16, half of the tokens).
    """
    config = AutoConfig.from_pretrained(source)
    if spec.labels is not None:
        config = head_config(config, spec.labels, load_tokenizer(source).pad_token_id)
    with torch.device("meta"):
        kind = auto_class(config)
        model = kind.from_config(config, dtype=next(iter(state.values())).dtype)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(output)
    del model
    # Tokenizer, chat template and generation settings are the source's own, byte for byte.
    made = ("config.json", *FILES)
    for file in source.iterdir():
        if file.is_file() and file.name not in made and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, output / file.name)
    instructed = any(train.template is None for train in spec.data) and not reads_images(source)
    if instructed and not load_tokenizer(source).chat_template:
        (output / "chat_template.jinja").write_text(INSTRUCTION_CHAT)

    fp32 = spec.precision == "fp32"
    exported = load(output, dtype="float32" if fp32 else "bfloat16")
    tokens = (training_logits(exported, probe) - expected).abs().amax(dim=-1)
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
            "origin": f"fine-tuned for {steps} steps from: {card.origin}",
            "notes": {**card.notes, "export_logit_difference": difference},
        }
    ).write(output)
