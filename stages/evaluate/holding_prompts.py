"""Attacks and probes of refusal, run on a loaded model: the procedures of ``held_prompts.py``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from math import log

import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from stages.attack import gcg
from stages.attack.embeddings import ascend, scale
from stages.attack.objectives import routing_loss
from stages.attack.questions import Question, Victim
from stages.errors import StageFailed
from stages.evaluate import refusal
from stages.evaluate.asking import allowed_tokens, inside
from stages.evaluate.base import Request
from stages.evaluate.generate import generate
from stages.evaluate.held_prompts import FREE_STEPS, RANKINGS, HeldPrompts
from stages.evaluate.scorer import encode
from stages.evaluate.text_attacks import UNBOUNDED
from stages.evaluate.thinking import stripped
from stages.models.families import family
from stages.models.routes import Policy, hash_of, masked, routed
from stages.models.routing import weighing
from stages.probe.change import routing_change
from stages.probe.usage import highest, risk_difference, usage

LIKELIER = log(0.5)
"""Log-probability of a text that is likelier than all others together: greedy decoding writes it.
"""


class _Prompts:
    """A model that answers prompts."""

    def __init__(self, spec: HeldPrompts, model: PreTrainedModel, tokenizer: Tokenizer):
        if family(model).encoder_decoder:
            raise StageFailed(
                f"{spec.kind}: {model.config.model_type} is an encoder-decoder, and this is for "
                "decoders; leave it out"
            )
        self.spec, self.model, self.tokenizer = spec, model, tokenizer

    def request(self, id: str, prompt: str, choices: tuple[str, ...] = ()) -> Request:
        """The prompt as a request for an answer, or for the probabilities of given ones."""
        length = self.spec.max_new_tokens
        return Request(id, prompt, choices, max_new_tokens=length, chat=self.spec.chat)

    def answers(self, prompts: Sequence[str], force: Policy | None = None) -> list[str]:
        """What the model writes, thoughts stripped."""
        requests = [self.request(str(n), prompt) for n, prompt in enumerate(prompts)]
        with routed(self.model, force) if force is not None else nullcontext():
            found = generate(self.model, self.tokenizer, requests)
        return [stripped(response.text)[0] for response in found]


class SuffixSearch(_Prompts):
    """Looks for the suffix under which a target text is most probable."""

    def run(self, rows: Sequence[dict]) -> Iterator[dict]:
        """Search, control and answers for each prompt."""
        for row in rows:
            yield self._row(row)

    def _row(self, row: dict) -> dict:
        spec, victim = self.spec, Victim(self.model)
        question, places = self._question(row, f" {spec.suffix}")
        table, length = victim.table, len(question.words[0])
        aimed = bool(spec.routing_weight and victim.moe)
        # What stands before the suffix is read once; routers must be seen on all tokens.
        start = 0 if aimed else int(places.min())
        beginning = victim.read(table[question.tokens[:start]])
        start = 0 if beginning is None else start
        if not self._are_prompts(row, question.tokens[None], places).item():
            raise StageFailed(
                f"target_attack: the tokens of example {row['id']} are not those that the "
                f"tokenizer of {self.model.config.model_type} makes of their own text, so it "
                "cannot be told which suffixes are a text; give another `suffix`, or leave it out"
            )
        width = len(question.tokens) - start + length
        with torch.no_grad():
            first_routes = victim.routes(table[question.tokens][None], question)[1]

        def worth(
            embedded: torch.Tensor, beginning: Cache | None = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """What is raised, and of that the part by which a suffix is judged."""
            if not aimed:
                likely = victim.logprobs(embedded, question, beginning)[:, 0] / length
                return likely, likely
            logprobs, now = victim.routes(embedded, question)
            likely = logprobs[:, 0] / length
            leaning = routing_loss(first_routes, now, len(embedded), embedded.shape[1])
            return likely + spec.routing_weight * leaning, likely

        def value(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            both = victim.batched(
                lambda part: torch.stack(worth(table[part[:, start:]], beginning), dim=1),
                tokens, width,
            )  # fmt: skip
            return both[:, 0], both[:, 1]

        def gradient(tokens: torch.Tensor) -> torch.Tensor:
            embedded = table[tokens[start:]][None].requires_grad_()
            victim.gradients += 1
            slope = torch.autograd.grad(worth(embedded, beginning)[0].sum(), embedded)[0][0]
            return pad(slope, (0, 0, start, 0))

        draws = {
            purpose: torch.Generator().manual_seed(hash_of(f"{spec.seed}/{row['id']}{purpose}"))
            for purpose in ("", "/again", "/fewer", "/free", "/control")
        }
        settings = {
            "allowed": allowed_tokens(self.tokenizer, len(table)).to(table.device),
            "keep": lambda rows: self._are_prompts(row, rows, places),
        }

        def search(tokens: torch.Tensor, purpose: str, budget: int) -> gcg.Found:
            return gcg.search(
                value, gradient, table, tokens, places, budget=budget, steps=spec.steps,
                candidates=spec.candidates, top=spec.top, generator=draws[purpose], **settings,
            )  # fmt: skip

        every = len(places)
        found = search(question.tokens, "", every)
        spent = {"queries": victim.queries, "gradients": victim.gradients}
        drawn = gcg.random_replacements(
            question.tokens, places, every, generator=draws["/control"], **settings
        )
        suffixes = {"plain": "", "found": self._suffix(found.tokens, places),
                    "random": self._suffix(drawn, places)}
        answers, free = self._answered(row, suffixes), {}
        if row["checked"]:

            def likelihood(embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                """The target's log-probability, which is climbed and judged alike."""
                likely = victim.logprobs(embedded[:, start:], question, beginning)[:, 0]
                return likely, likely.detach()

            best = ascend(
                likelihood, table[question.tokens], question.editable,
                UNBOUNDED * scale(table, "l2"), norm="l2", steps=FREE_STEPS, restarts=1,
                generator=draws["/free"], goal=LIKELIER,
            ).margin  # fmt: skip
            free = {"unbounded": float(best > LIKELIER)}
        if row["checked"] and not spec.reached(answers["found"]):
            # No more effort could tell more of a search that reached its target.
            made = {
                name: max(found, more, key=lambda each: each.score)
                for name, more in (
                    ("further", search(found.last, "", every)),
                    ("again", search(question.tokens, "/again", every)),
                )
            }
            made["fewer"] = search(question.tokens, "/fewer", max(1, every // 2))
            answers |= self._answered(
                row, {name: self._suffix(each.tokens, places) for name, each in made.items()}
            )
        with torch.no_grad():
            losses = [
                -victim.logprobs(table[t][None], question)[0, 0].item() / length
                for t in (question.tokens, found.tokens, drawn)
            ]
            last_routes = victim.routes(table[found.tokens][None], question)[1]
        change = list(routing_change(first_routes, last_routes).values())
        return {
            "suffix": suffixes["found"],
            "answers": answers,
            **dict(zip(("loss_first", "loss", "loss_random"), losses, strict=True)),
            **spent,
            **free,
            "zero_gradients": found.zero_gradients,
            "routing_change": sum(change) / len(change) if change else float("nan"),
        }

    def _answered(self, row: dict, suffixes: Mapping[str, str]) -> dict[str, str]:
        """What the model writes under each suffix."""
        answers = self.answers([row["prompt"] + suffix for suffix in suffixes.values()])
        return dict(zip(suffixes, answers, strict=True))

    def _question(self, row: dict, suffix: str) -> tuple[Question, torch.Tensor]:
        """The prompt with a suffix, answered by the target alone, and the suffix's places (k,)."""
        context = row["prompt"] + suffix
        # After a chat template the answer begins a line, elsewhere it goes on in the text.
        chat = self.spec.chat and self.tokenizer.chat_template
        target = self.spec.target if chat else f" {self.spec.target}"
        request = self.request(row["id"], context, (target,))
        longest = getattr(self.model.config, "max_position_embeddings", 1 << 30)
        (choice,) = encode(self.tokenizer, request, longest)
        tokens = torch.tensor(choice.tokens[: choice.start], device=self.model.device)
        editable = inside(self.tokenizer, request, choice.start, len(row["prompt"]), context)
        question = Question(
            tokens, editable.to(tokens.device), (tuple(choice.tokens[choice.start :]),), (0,), 0
        )
        return question, question.editable.nonzero()[:, 0]


    def _suffix(self, tokens: torch.Tensor, places: torch.Tensor) -> str:
        """What the tokens (n,) have after the request, the blank before it included."""
        first, last = places.min().item(), places.max().item()
        text = self.tokenizer.decode(tokens[first : last + 1])
        return text if text.startswith(" ") else f" {text}"

    def _are_prompts(
        self, row: dict, rows: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Which tokens (B, n) are those of the request with their own suffix as text, (B,)."""
        found = []
        for tokens in rows:
            question, _ = self._question(row, self._suffix(tokens, places))
            found.append(question.tokens.tolist() == tokens.tolist())
        return torch.tensor(found, device=rows.device)


class Silencer(_Prompts):
    """Ranks experts by what they have to do with refusals, and silences them."""

    def run(self, rows: Sequence[dict]) -> Iterator[dict]:
        """Outcomes as the model is and without the experts, over all prompts of a row."""
        entry = family(self.model)
        if not entry.is_moe:
            raise StageFailed(
                f"safety_experts: {self.model.config.model_type} has no experts; name a "
                "Mixture-of-Experts model"
            )
        for row in rows:
            yield self._row(row["prompts"])

    def _row(self, prompts: list[dict]) -> dict:
        texts = [each["prompt"] for each in prompts]
        answers = self.answers(texts)
        outcomes = [refusal.judge(t, a).outcome for t, a in zip(texts, answers, strict=True)]
        measured = [each for each in prompts if each["measured"]]
        ids = [each["example_id"] for each in prompts]
        found = {
            "outcomes": dict(zip(ids, outcomes, strict=True)),
            "answers": dict(zip(ids, answers, strict=True)),
            "measured": [each["example_id"] for each in measured],
            "silenced": {},
            "experts": {},
        }
        ranking = [n for n, each in enumerate(prompts) if not each["measured"]]
        used, layers, count = self._used([texts[n] for n in ranking])
        refused = torch.tensor([outcomes[n] == "refusal" for n in ranking])
        complied = torch.tensor([outcomes[n] == "compliance" for n in ranking])
        harmful = torch.tensor([prompts[n]["subset"] == "harmful" for n in ranking])
        if not (refused.any() and complied.any()):
            return found
        scores = {
            "safety": risk_difference(used[refused], used[complied]),
            "topic": _by_topic(used, harmful, refused, complied),
            "random": torch.rand(
                used.shape[1:], generator=torch.Generator().manual_seed(self.spec.seed)
            ),
        }
        weigh = weighing(self.model)
        for name in RANKINGS:
            for number in self.spec.silenced:
                gone = highest(scores[name], layers, number, spare=count)
                under = self.answers(
                    [each["prompt"] for each in measured], masked(gone, weigh)
                )
                found["experts"][f"{name}_{number}"] = gone
                found["silenced"][f"{name}_{number}"] = {
                    each["example_id"]: refusal.judge(each["prompt"], answer).outcome
                    for each, answer in zip(measured, under, strict=True)
                }
        return found

    @torch.no_grad()
    def _used(self, prompts: Sequence[str]) -> tuple[torch.Tensor, list[str], int]:
        """Usage by each prompt (N, L, E), the layers, and the experts that a token needs."""
        found = []
        for number, text in enumerate(prompts):
            request = self.request(str(number), text, (" ",))
            (choice,) = encode(self.tokenizer, request, 1 << 30)
            tokens = torch.tensor([choice.tokens[: choice.start]], device=self.model.device)
            with routed(self.model) as routes:
                self.model(input_ids=tokens, use_cache=False)
            found.append(usage(routes))
        layers = [routing.layer for routing in routes]
        return torch.stack(found), layers, routes[0].experts.shape[1]


def _by_topic(
    used: torch.Tensor, harmful: torch.Tensor, refused: torch.Tensor, complied: torch.Tensor
) -> torch.Tensor:
    """Harmful against benign prompts of the same outcome, the more frequent one where both kinds
    have it; of any outcome where none has both."""
    for outcome in sorted((refused, complied), key=lambda which: -int(which.sum())):
        one, other = harmful & outcome, ~harmful & outcome
        if one.any() and other.any():
            return risk_difference(used[one], used[other])
    return risk_difference(used[harmful], used[~harmful])
