"""Attacks on labelled texts, run on a loaded model: the procedure of ``text_attacks``."""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property

import torch

from stages.attack import edits, embeddings, gcg
from stages.attack.objectives import Objective
from stages.attack.questions import Question, margin
from stages.attack.text_spec import (
    GCG,
    AnyTextAttack,
    DeepWordBug,
    EmbeddingPGD,
    GreedyEdits,
    Homoglyphs,
)
from stages.attack.wordnet import WordNet, folder
from stages.errors import StageFailed
from stages.evaluate.asking import Asker, allowed_tokens
from stages.evaluate.text_attacks import SWAPS, variants
from stages.models.routes import Weigh, hash_of, imposed
from stages.models.routing import Routing, weighing
from stages.probe.change import chance, choice_changes, routing_change


@dataclass(frozen=True)
class Attempt:
    """An input that an attack, or its control, has made."""

    embedded: torch.Tensor
    """(n, D)."""
    question: Question
    text: str
    edits: int
    zero_gradients: float = 0.0
    size: float = 0.0
    """Of a perturbation, in half distances to the nearest token's embedding."""


class Attacker(Asker):
    """Everything about a model that its attacks share."""

    def run(self, rows: Sequence[dict]) -> Iterator[dict]:
        """What every attack did to each row."""
        for row in rows:
            yield self._row(row)

    @cached_property
    def scale(self) -> dict[str, float]:
        """What a radius of 1 means in each norm."""
        return {norm: embeddings.scale(self.victim.table, norm) for norm in ("l2", "linf")}

    @cached_property
    def half_distance(self) -> float:
        """Half the median distance of an embedding to its nearest neighbour."""
        return embeddings.nearest_distance(self.victim.table) / 2

    @cached_property
    def allowed(self) -> torch.Tensor:
        """Tokens that may be put into a text, booleans (V,)."""
        return allowed_tokens(self.tokenizer, len(self.victim.table)).to(self.model.device)

    @cached_property
    def vocabulary(self) -> tuple[list[str], torch.Tensor]:
        """Whole words of one token, and their embeddings of length 1 (words, D)."""
        words, numbers = [], []
        for number in self.allowed.nonzero()[:, 0].tolist():
            # What it adds to itself: many a decoder takes the blank at a text's beginning away.
            once, twice = (self.tokenizer.decode([number] * times) for times in (1, 2))
            text = twice[len(once) :]
            if text.startswith(" ") and text[1:].isalpha() and text[1:].islower():
                words.append(text[1:])
                numbers.append(number)
        table = self.victim.table[torch.tensor(numbers, dtype=torch.long)]
        return words, torch.nn.functional.normalize(table.float(), dim=-1)

    @cached_property
    def rules(self) -> dict[str, Weigh | None]:
        """How the experts of other routes are weighed: as they were, and by the family's rule where
        that is known."""
        try:
            return {"routes": None, "experts": weighing(self.model)}
        except StageFailed:
            return {"routes": None}

    @cached_property
    def wordnet(self) -> WordNet:
        """Synonyms, read once."""
        return WordNet(folder())

    def near(self, word: str, count: int, cosine: float) -> list[str]:
        """The nearest words to one in the model's input embedding, the nearest first."""
        words, table = self.vocabulary
        if word.lower() not in words:
            return []
        here = words.index(word.lower())
        nearness = table @ table[here]
        nearness[here] = -torch.inf
        best = nearness.topk(min(count, len(words)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [words[index] for value, index in pairs if value >= cosine]

    def _row(self, row: dict) -> dict:
        question = self.question(row, row["text"])
        clean = Attempt(self.victim.table[question.tokens], question, row["text"], 0)
        answer, routes = self._asked(clean)
        with torch.no_grad():
            beside = torch.stack([clean.embedded, clean.embedded.flip(0)])
            batch = self.victim.routes(beside, question)[1]
        first = [r.only(torch.arange(len(r.logits)) < len(r.logits) // 2) for r in batch]
        with torch.autocast(self.model.device.type, torch.bfloat16):
            rounded = self._asked(clean)[1]
        # The tokens that an attack's change is taken over, without those of the labels.
        places = torch.arange(len(clean.embedded))
        found = {
            "prediction": self.labels[int(answer.argmax())],
            "noise": routing_change(routes, first, (places, places)),
            "noise_bfloat16": routing_change(routes, rounded, (places, places)),
            "chance": chance(routes[0].logits.shape[-1], routes[0].experts.shape[-1])
            if routes
            else float("nan"),
            "attacks": {},
        }
        for attack in self.spec.attacks:
            found["attacks"][attack.label] = self._attacked(attack, row, clean, routes)
        return found

    def _attacked(
        self, attack: AnyTextAttack, row: dict, clean: Attempt, routes: list[Routing]
    ) -> dict:
        """One attack and its control on one row, and the checks where the row is one of them."""
        before = self.victim.queries, self.victim.gradients
        made = self.attempt(attack, row, clean)
        spent = self.victim.queries - before[0], self.victim.gradients - before[1]
        control = self.control(attack, row, clean)
        answer, now = self._asked(made)
        random_answer, random_now = self._asked(control)
        # A search replaces tokens in their places, edits of words shift those that follow.
        aligned = not isinstance(attack, GreedyEdits)
        found = {
            "prediction": self.labels[int(answer.argmax())],
            "margin": margin(answer, made.question).item(),
            "random_prediction": self.labels[int(random_answer.argmax())],
            "text": made.text,
            "edits": made.edits,
            "queries": spent[0],
            "gradients": spent[1],
            "zero_gradients": made.zero_gradients,
            "size": made.size,
            "routing": self._change(clean, routes, made, now, aligned),
            "random_routing": self._change(clean, routes, control, random_now, aligned),
            "untouched_routing": self._change(clean, routes, made, now, aligned, untouched=True),
            "choices": choice_changes(
                routes, now, pairs=self._pairs(clean, made, aligned, untouched=False)
            )[0],
            "swap": {},
            "swap_layers": {},
            "checks": {},
        }
        if routes and aligned:
            found["swap"] = self._swapped(clean, routes, made, now)
            if self.spec.swap_layers:
                found["swap_layers"] = {
                    each.layer: self._swapped(clean, routes, made, now, {each.layer})
                    for each in routes
                }
        if row["checked"]:
            for key, variant in variants(attack):
                same = variant == attack
                # A check asks whether it succeeds, and not by how much.
                other = made if same else self.attempt(variant, row, clean, goal=0.0)
                found["checks"][key] = self.labels[int(self._asked(other)[0].argmax())]
        return found

    def attempt(
        self, attack: AnyTextAttack, row: dict, clean: Attempt, goal: float = float("inf")
    ) -> Attempt:
        """Run one attack on one row; an ascent ends where its margin is above ``goal``, the others
        where they succeed."""
        seed = hash_of(f"{self.spec.seed}/{row['id']}/{attack.label}")
        if isinstance(attack, EmbeddingPGD):
            return self._ascent(attack, clean, torch.Generator().manual_seed(seed), goal)
        if isinstance(attack, GCG):
            return self._search(attack, row, clean, torch.Generator().manual_seed(seed))
        found = edits.greedy(
            row["text"], self._variants(attack), lambda texts: self._margins(row, texts),
            attack.edits, random.Random(seed),
        )  # fmt: skip
        return self._written(row, found.text, found.edits)

    def control(self, attack: AnyTextAttack, row: dict, clean: Attempt) -> Attempt:
        """Random edits that spend the attack's budget, however little of it the attack spent: one
        that does nothing must not be compared with nothing."""
        seed = hash_of(f"{self.spec.seed}/{row['id']}/{attack.label}/control")
        generator = torch.Generator().manual_seed(seed)
        if isinstance(attack, EmbeddingPGD):
            drawn = embeddings.random_perturbation(
                clean.embedded, clean.question.editable, self._radius(attack), attack.norm,
                generator,
            )  # fmt: skip
            edited = int(clean.question.editable.sum())
            return Attempt(clean.embedded + drawn, clean.question, clean.text, edited)
        if isinstance(attack, GCG):
            positions = clean.question.editable.nonzero()[:, 0]
            tokens = gcg.random_replacements(
                clean.question.tokens, positions, attack.substitutions, self.allowed,
                self._keep(row, clean), generator,
            )  # fmt: skip
            return self._replaced(row, clean, tokens)
        rng = random.Random(seed)
        text, done = edits.at_random(row["text"], self._variants(attack), attack.edits, rng)
        return self._written(row, text, done)

    def _ascent(
        self, attack: EmbeddingPGD, clean: Attempt, generator: torch.Generator, goal: float
    ) -> Attempt:
        found = embeddings.ascend(
            Objective(self.victim, clean.question, attack), clean.embedded,
            clean.question.editable, self._radius(attack), norm=attack.norm, steps=attack.steps,
            restarts=attack.restarts, generator=generator, goal=goal,
        )  # fmt: skip
        self.victim.gradients += found.gradients
        length = found.delta.norm(dim=-1).max().item()
        return Attempt(
            clean.embedded + found.delta, clean.question, clean.text,
            int(clean.question.editable.sum()), found.zero_gradients, length / self.half_distance,
        )  # fmt: skip

    def _radius(self, attack: EmbeddingPGD) -> float:
        return attack.epsilon * self.scale[attack.norm]

    def _search(
        self, attack: GCG, row: dict, clean: Attempt, generator: torch.Generator
    ) -> Attempt:
        question, table = clean.question, self.victim.table
        objective = Objective(self.victim, question, attack)
        width = len(question.tokens) * len(question.beginnings)

        def value(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            both = self.victim.batched(
                lambda part: torch.stack(objective(table[part]), dim=1), rows, width
            )
            return both[:, 0], both[:, 1]

        def gradient(tokens: torch.Tensor) -> torch.Tensor:
            embedded = table[tokens][None].requires_grad_()
            self.victim.gradients += 1
            return torch.autograd.grad(objective(embedded)[0].sum(), embedded)[0][0]

        found = gcg.search(
            value, gradient, table, question.tokens, question.editable.nonzero()[:, 0],
            allowed=self.allowed, budget=attack.substitutions, steps=attack.steps,
            candidates=attack.candidates, top=attack.top, generator=generator,
            keep=self._keep(row, clean), goal=0.0,
        )  # fmt: skip
        return self._replaced(row, clean, found.tokens, found.zero_gradients)

    def _replaced(
        self, row: dict, clean: Attempt, tokens: torch.Tensor, zero: float = 0.0
    ) -> Attempt:
        question = Question(
            tokens, clean.question.editable, clean.question.words, clean.question.answers,
            clean.question.gold,
        )  # fmt: skip
        (text,) = self.texts(row, clean.question, tokens[None])
        changed = int((tokens != clean.question.tokens).sum())
        return Attempt(self.victim.table[tokens], question, text, changed, zero)

    def _written(self, row: dict, text: str, count: int) -> Attempt:
        question = self.question(row, text)
        return Attempt(self.victim.table[question.tokens], question, text, count)

    def _keep(self, row: dict, clean: Attempt) -> Callable[[torch.Tensor], torch.Tensor]:
        """Which tokens (B, n) are an input: a text in the row's prompt.

        Raises StageFailed where not even the clean ones are, since a search would find nothing then
        and the example count as robust.
        """
        question = clean.question
        if not self.are_prompts(row, question, question.tokens[None]).item():
            raise StageFailed(
                f"gcg: the tokens of example {row['id']} are not those that the tokenizer of "
                f"{self.model.config.model_type} makes of their own text, so it cannot be told "
                "which others are a text; leave gcg out, or the example"
            )
        return lambda rows: self.are_prompts(row, question, rows)

    def _margins(self, row: dict, texts: Sequence[str]) -> list[float]:
        questions = [self.question(row, text) for text in texts]
        return self.victim.margins([q.tokens for q in questions], questions[0]).tolist()

    def _variants(self, attack: GreedyEdits) -> Callable[[str, random.Random], list[str]]:
        if isinstance(attack, DeepWordBug):
            return edits.character_variants(attack.operations)
        if isinstance(attack, Homoglyphs):
            return edits.homoglyph_variants
        if attack.synonyms == "wordnet":
            return edits.neighbour_variants(
                lambda word: self.wordnet.synonyms(word)[: attack.neighbours]
            )
        return edits.neighbour_variants(
            lambda word: self.near(word, attack.neighbours, attack.cosine)
        )

    @torch.no_grad()
    def _asked(self, attempt: Attempt) -> tuple[torch.Tensor, list[Routing]]:
        """Log-probabilities (1, C) and routes of one input, as the model is."""
        return self.victim.routes(attempt.embedded[None], attempt.question)

    def _change(
        self, clean: Attempt, routes: list[Routing], made: Attempt, now: list[Routing],
        aligned: bool, untouched: bool = False,
    ) -> dict[str, float]:
        """The routing change by layer, over the tokens that both inputs have, or over those alone
        whose embeddings are the same in both."""
        if not routes:
            return {}
        return routing_change(routes, now, self._pairs(clean, made, aligned, untouched))

    def _pairs(
        self, clean: Attempt, made: Attempt, aligned: bool, untouched: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of the tokens that both inputs have; ``untouched``: with the same embeddings."""
        if not aligned:
            return common(clean.question.tokens.tolist(), made.question.tokens.tolist())
        places = torch.arange(len(clean.embedded))
        if untouched:
            places = places[(clean.embedded == made.embedded).all(-1).cpu()]
        return places, places

    @torch.no_grad()
    def _swapped(
        self, clean: Attempt, routes: list[Routing], made: Attempt, now: list[Routing],
        layers: Collection[str] | None = None,
    ) -> dict[str, str]:
        """The answer to each input under the routes of the other, in some layers or all: with their
        weights (``routes``) and, where the family's rule is known, weighed anew (``experts``)."""
        found = {}
        for swap, (attempt, other) in zip(SWAPS, ((clean, now), (made, routes)), strict=True):
            for what, weigh in self.rules.items():
                answer, _ = self.victim.routes(
                    attempt.embedded[None], attempt.question,
                    imposed(other, weigh=weigh, layers=layers),
                )  # fmt: skip
                found[f"{swap}/{what}"] = self.labels[int(answer.argmax())]
        return found


def common(before: Sequence[int], after: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the tokens that two sequences have in common, in order."""
    pairs = [
        (block.a + step, block.b + step)
        for block in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
        for step in range(block.size)
    ]
    places = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    return places[:, 0], places[:, 1]
