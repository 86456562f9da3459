"""What stands in for vLLM behind ``ray.data.llm`` where it is not installed."""

import json
import os
import sys
from pathlib import Path

import torch
from ray import cloudpickle
from ray.data import llm
from ray.llm._internal.batch.stages.base import StatefulStageUDF

from stages.evaluate.decoding import Sampler
from stages.models.load import load, load_tokenizer

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests


class StandIn(StatefulStageUDF):
    """The actor of the processor's engine stage: the same arguments, rows in and rows out.

    Does with a plain loop over transformers what a row's sampling parameters say. Rows whose prompt
    has as many tokens as the file ``fails`` of the model's folder says are errors; with a file
    ``dies`` (``always`` or ``once``) the actor ends as ray.data.llm ends one whose engine died.
    Each batch is written to ``asked``, beside it, with the arguments of the engine.
    """

    def __init__(self, data_column, expected_input_keys, *, model, engine_kwargs, **options):
        super().__init__(data_column, expected_input_keys)
        assert options["should_continue_on_error"] and options["task_type"] == "generate"
        self.folder, self.arguments = Path(model), engine_kwargs
        self.model = load(self.folder, dtype=engine_kwargs["dtype"])
        self.tokenizer = load_tokenizer(self.folder)

    async def udf(self, rows):
        """One output for each row, the last row first."""
        prompts = [list(map(int, row["tokenized_prompt"])) for row in rows]
        with open(self.folder / "asked", "a") as asked:
            asked.write(json.dumps({"prompts": prompts, "arguments": self.arguments}) + "\n")
        dies = self.folder / "dies"
        if dies.exists():
            if dies.read_text() == "once":
                dies.unlink()
            os._exit(1)
        fails = self.folder / "fails"
        failing = int(fails.read_text()) if fails.exists() else None
        for row, prompt in reversed(list(zip(rows, prompts, strict=True))):
            place = {self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN]}
            if len(prompt) == failing:
                yield place | {"generated_tokens": [], "__inference_error__": "ValueError: too odd"}
            else:
                tokens = self.written(prompt, row["sampling_params"])
                yield place | {"generated_tokens": tokens, "__inference_error__": ""}

    @torch.inference_mode()
    def written(self, prompt: list[int], sampling: dict) -> list[int]:
        """Tokens to the end token or the one that completes a stop text, or ``max_tokens``."""
        assert len(prompt) + sampling["max_tokens"] <= self.arguments["max_model_len"]
        sampler = None
        if sampling["temperature"]:
            sampler = Sampler(sampling["temperature"], 0, "")
            sampler.generator.manual_seed(sampling["seed"])
        tokens = []
        while len(tokens) < sampling["max_tokens"]:
            logits = self.model(torch.tensor([prompt + tokens])).logits[0, -1]
            tokens.append(sampler.draw(logits) if sampler else int(logits.argmax()))
            text = self.tokenizer.decode(tokens) if sampling["detokenize"] else ""
            if tokens[-1] in sampling["stop_token_ids"] or any(s in text for s in sampling["stop"]):
                break
        return tokens


def build_processor(*arguments, **fields):
    """``ray.data.llm.build_processor``, with the stand-in for vLLM's own actor."""
    processor = llm.build_processor(*arguments, **fields)
    (stage,) = processor.stages.values()
    # Not by assignment: the stage would be validated again, after its resources were taken out.
    stage.__dict__["fn"] = StandIn
    return processor
