"""NLLB-MoE (arXiv 2207.04672): transformers' model with sparse blocks that do what was published.

The blocks of the installed transformers send every token to experts 0 and 1, whatever the router
chose, and keep the capacity of the last evaluated batch for training. Here they are written anew
after the published code (fairseq, Top2Gate and MOELayer); names and shapes of the weights stay, so
that folders are read from and written for transformers. As published, expert output masking takes
an expert's whole output of a token away in training. The balancing loss of the paper is, but for a
mean over the layers, the recipe's ``gshard_loss_weight``. LayerDrop, which the released model does
without, is left out: workers that share experts would skip different layers.

Importing this module puts the class in the place of transformers' own.
"""

import torch
from transformers import AutoModelForSeq2SeqLM, NllbMoeConfig
from transformers import NllbMoeForConditionalGeneration as Unmended
from transformers.models.nllb_moe.modeling_nllb_moe import (
    NllbMoeExperts,
    NllbMoeSinusoidalPositionalEmbedding,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
)

from stages.errors import BadInput
from stages.models.capacity import within_capacity
from stages.models.pair_dropout import hand_out, keys_of

# Shape letters: B sequences, S tokens of one, T = B S tokens, E experts, K chosen experts, D hidden
# size.


class Router(NllbMoeTop2Router):
    """Scores the experts of each token and chooses the best, in training within their capacity."""

    top_k = 2

    def forward(
        self, hidden_TD: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights (T, K) and indices (T, K) of the chosen, the best first, and the logits (T, E).

        The weights are the chosen experts' probabilities, divided by their sum before or after the
        drops as the configuration says; that of a dropped choice and of padding is 0.
        ``padding_mask`` is what attention adds to its scores, shape (B, 1, queries, keys).
        """
        logits_TE = self.classifier(hidden_TD.to(self.classifier.weight.dtype))
        # The best experts by logits, as the others' probabilities may round to the same number.
        indices_TK = logits_TE.topk(self.top_k).indices
        scores_TK = logits_TE.softmax(dim=-1, dtype=self.dtype).gather(-1, indices_TK)
        kept_TK = self._kept(indices_TK, scores_TK.detach(), padding_mask)
        if self.normalize_router_prob_before_dropping:
            weights_TK = _normalised(scores_TK) * kept_TK
        else:
            weights_TK = _normalised(scores_TK * kept_TK)
        return weights_TK.to(hidden_TD.dtype), indices_TK, logits_TE

    def _kept(
        self, indices_TK: torch.Tensor, scores_TK: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> torch.Tensor:
        kept_TK = torch.zeros_like(indices_TK, dtype=torch.bool)
        real_T = torch.ones_like(kept_TK[:, 0])
        if padding_mask is not None and not self.router_ignore_padding_tokens:
            # The last query of a sequence sees all of it but its padding.
            own = len(indices_TK) // len(padding_mask)
            real_T = padding_mask[:, 0, -1, -own:].reshape(-1) == 0
        if self.training:
            kept_TK[real_T] = within_capacity(
                indices_TK[real_T],
                scores_TK[real_T],
                self.expert_capacity,
                self.num_experts,
                self.batch_prioritized_routing,
            )
        else:
            kept_TK[real_T] = True
        return kept_TK


def _normalised(scores_TK: torch.Tensor) -> torch.Tensor:
    return scores_TK / scores_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TK.dtype).eps)


class Experts(NllbMoeExperts):
    """All experts of a layer, each a module of its own."""

    def forward(
        self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum (T, D) of the chosen experts' outputs, some of them masked in training."""
        return self.weighted_sum(hidden_TD, indices_TK, self.masked(weights_TK))

    def masked(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """The weights after expert output masking: in training each is 0 with the probability
        ``moe_token_dropout``, otherwise all are multiplied by that of being kept."""
        return self.token_dropout(weights_TK) * (1 - self.moe_token_dropout)

    def weighted_sum(
        self, hidden_TD: torch.Tensor, indices_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """The same without masking; what has the weight 0 is not computed."""
        output_TD = torch.zeros_like(hidden_TD)
        pairs = (weights_TK != 0).nonzero(as_tuple=True)
        if (keys := keys_of(self, *pairs)) is not None:
            hand_out(self, indices_TK[pairs], keys)
        for expert in indices_TK[weights_TK != 0].unique().tolist():
            tokens, places = torch.where((indices_TK == expert) & (weights_TK != 0))
            outer = self[f"expert_{expert}"](hidden_TD[tokens]) * weights_TK[tokens, places, None]
            output_TD.index_add_(0, tokens, outer.to(hidden_TD.dtype))
        return output_TD


class Block(NllbMoeSparseMLP):
    """The feed-forward block of a sparse layer."""

    def forward(
        self, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states of shape (B, S, D), and the same out."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        weights_TK, indices_TK, _ = self.router(hidden_TD, padding_mask)
        return self.experts(hidden_TD, indices_TK, weights_TK).view_as(hidden)


class Positions(NllbMoeSinusoidalPositionalEmbedding):
    """The positions' embeddings in the type of the tokens', which training in bf16 does not give
    to buffers."""

    def forward(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        past_key_values_length: int = 0,
    ) -> torch.Tensor:
        """Shape (B, S, D), for tokens of the same shape."""
        found = super().forward(input_ids, inputs_embeds, past_key_values_length)
        return found.to(inputs_embeds.dtype)


MENDED = {
    NllbMoeTop2Router: Router,
    NllbMoeExperts: Experts,
    NllbMoeSparseMLP: Block,
    NllbMoeSinusoidalPositionalEmbedding: Positions,
}


class NllbMoeForConditionalGeneration(Unmended):
    """The encoder-decoder with a language modelling head; its name is written to ``config.json``,
    from which transformers takes its own class.

    Raises BadInput for a configuration under which an answer would be drawn, or depend on what else
    is in the batch.
    """

    def __init__(self, config: NllbMoeConfig):
        if config.second_expert_policy != "all":
            raise BadInput(
                f"config.json: second_expert_policy {config.second_expert_policy!r} draws the "
                "second expert of a token at random, also in evaluation; set it to 'all'"
            )
        if config.moe_eval_capacity_token_fraction < 1:
            raise BadInput(
                "config.json: moe_eval_capacity_token_fraction "
                f"{config.moe_eval_capacity_token_fraction} makes an answer depend on the others "
                "of its batch; set it to 1.0"
            )
        super().__init__(config)
        for module in self.modules():
            module.__class__ = MENDED.get(type(module), type(module))
        self.model.encoder.layerdrop = self.model.decoder.layerdrop = 0.0


AutoModelForSeq2SeqLM.register(NllbMoeConfig, NllbMoeForConditionalGeneration, exist_ok=True)
