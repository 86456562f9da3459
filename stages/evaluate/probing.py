"""Probes of the experts, run on a loaded model: the procedures of ``probes.py``."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch

from stages.attack.embeddings import ascend, scale
from stages.attack.objectives import Objective, repeated
from stages.attack.questions import Question, cross_entropy, tokens_of
from stages.attack.text_spec import EmbeddingPGD
from stages.errors import StageFailed
from stages.evaluate.asking import Asker
from stages.models import routes
from stages.models.routes import Policy, hash_of, imposed
from stages.models.routing import Routing, weighing
from stages.probe.geometry import differences, margins, radii, watched
from stages.probe.lipschitz import jacobian_norm, random_slope, steepest
from stages.probe.smoothness import smoothness
from stages.probe.usage import pruned, usage


class Intervenor(Asker):
    """Puts other experts in the place of those that were chosen."""

    counted: torch.Tensor | None = None

    def run(self, rows: Sequence[dict]) -> Iterator[dict]:
        """Answers under each intervention, row by row."""
        if not self.victim.moe:
            raise StageFailed(
                f"expert_interventions: {self.model.config.model_type} has no experts; name a "
                "Mixture-of-Experts model"
            )
        for row in rows:
            question = self.question(row, row["text"])
            plain, routing = self._answer(question)
            yield plain | {
                "interventions": {
                    name: self._answer(question, policy)[0]
                    for name, policy in self._policies(row, routing)
                },
                "criticality": self._criticality(row, question, plain["loss"], routing),
            }

    @cached_property
    def weigh(self) -> routes.Weigh:
        """The family's rule from logits to weights."""
        return weighing(self.model)

    @torch.no_grad()
    def _answer(self, question: Question, force: Policy | None = None) -> tuple[dict, list]:
        embedded = self.victim.table[question.tokens][None]
        logprobs, found = self.victim.routes(embedded, question, force)
        answer = {
            "prediction": self.labels[int(logprobs.argmax())],
            "loss": cross_entropy(logprobs, question).item(),
        }
        return answer, found

    def _policies(self, row: dict, routing: list[Routing]) -> Iterator[tuple[str, Policy]]:
        spec = self.spec
        seed = hash_of(f"{spec.seed}/{row['id']}")
        weigh = self.weigh if spec.weights == "by_logits" else None
        made: dict[str, Callable[[], Policy]] = {
            "next_ranked": lambda: routes.next_ranked(weigh),
            "random": lambda: routes.at_random(seed, weigh),
            "drop_first": routes.without_first,
            "drop_output": routes.without_output,
            "permuted": lambda: routes.permuted(spec.seed),
        }
        for name in spec.substitutions:
            for share in spec.shares:
                yield f"{name}_{share:g}", routes.at_share(made[name](), share, seed)
        for count in spec.top_k:
            yield f"top_{count}", routes.another_k(count, self.weigh)
        layers = [each.layer for each in routing]
        for count in spec.prune:
            for which in ("least_used", "most_used", "random"):
                gone = pruned(self._usage(row), layers, count, which, spec.seed)
                yield f"prune_{which}_{count}", routes.masked(gone, self.weigh)

    def _usage(self, row: dict) -> torch.Tensor:
        """How often each expert is chosen in the calibration texts, (L, E); they are the same for
        every row, so it is computed once."""
        if self.counted is None:
            found = []
            for text in row["calibration"]:
                question = self.question(text, text["text"])
                found.append(usage(self._answer(question)[1]))
            self.counted = torch.stack(found).mean(0)
        return self.counted

    def _criticality(
        self, row: dict, question: Question, loss: float, routing: list[Routing]
    ) -> dict[str, float]:
        """By layer, the largest rise of the loss over random masks of half its experts."""
        found = {}
        for each in routing if self.spec.random_masks else ():
            experts = each.logits.shape[1]
            rises = []
            for number in range(self.spec.random_masks):
                generator = torch.Generator().manual_seed(
                    hash_of(f"{self.spec.seed}/{each.layer}/{number}")
                )
                gone = torch.randperm(experts, generator=generator)[: experts // 2].tolist()
                answer, _ = self._answer(question, routes.masked({each.layer: gone}, self.weigh))
                rises.append(answer["loss"] - loss)
            found[each.layer] = max(rises)
        return found


class Surveyor(Asker):
    """Measures what each router's decisions hang on."""

    def run(self, rows: Sequence[dict]) -> Iterator[dict]:
        """Means over the prompt's tokens by layer, and the loss that an attack adds."""
        attack = EmbeddingPGD(
            epsilon=self.spec.epsilon, steps=self.spec.steps, restarts=1, loss="cross_entropy"
        )
        radius = attack.epsilon * scale(self.victim.table, "l2")
        for row in rows:
            question = self.question(row, row["text"])
            clean = self.victim.table[question.tokens]
            with torch.no_grad():
                with watched(self.model) as found:
                    logprobs = self.victim.logprobs(clean[None], question)
                layers = {
                    each.routing.layer: self._measured(each, len(clean), row) for each in found
                }
            made = ascend(
                Objective(self.victim, question, attack), clean, question.editable, radius,
                norm="l2", steps=attack.steps, restarts=1, generator=torch.Generator(),
            )  # fmt: skip
            with torch.no_grad():
                after = self.victim.logprobs((clean + made.delta)[None], question)
            rise = cross_entropy(after, question) - cross_entropy(logprobs, question)
            yield {
                "prediction": self.labels[int(logprobs.argmax())],
                "loss_rise": rise.item(),
                "layers": layers,
            }

    def _measured(self, each, length: int, row: dict) -> dict[str, float]:
        generator = torch.Generator().manual_seed(hash_of(f"{self.spec.seed}/{row['id']}"))
        each.routing = tokens_of(each.routing, 1, length)
        each.hidden = each.hidden[:length]
        values = margins(each.routing) | differences(each, generator)
        if each.scorers is not None:
            values |= radii(each.routing, each.scorers)
        found = {name: value.nanmean().item() for name, value in values.items()}
        return found | self._smoothness(each, generator)

    def _smoothness(self, each, generator: torch.Generator) -> dict[str, float]:
        """Tokens grouped by their best expert, and the same sizes dealt out at random."""
        hidden, experts = each.hidden, each.routing.logits.argmax(-1)
        if len(hidden) > hidden.shape[1]:
            return {}  # no linear map goes through more points than dimensions
        target = each.expert(hidden, experts)
        shuffled = experts[torch.randperm(len(experts), generator=generator)]
        found = {}
        for name, groups in (("smoothness", experts), ("smoothness_random", shuffled)):
            numbers = groups.unique().tolist()
            parts = [groups == number for number in numbers]
            fits = smoothness([hidden[p] for p in parts], [target[p] for p in parts])
            # Equal tokens with different targets, or nearly dependent ones, have no common map.
            found[name] = fits.ratio if fits.residual < 1e-3 else float("nan")
        return found


class Climber(Asker):
    """Looks for the steepest slope of the answers around each text."""

    def run(self, rows: Sequence[dict]) -> Iterator[dict]:
        """Slopes with routes free and frozen."""
        spec = self.spec
        radius = spec.radius * scale(self.victim.table, "l2")
        for row in rows:
            question = self.question(row, row["text"])
            clean, editable = self.victim.table[question.tokens], question.editable

            def free(embedded: torch.Tensor, question=question) -> torch.Tensor:
                return self.victim.logprobs(embedded, question)

            def slope(function, clean=clean, editable=editable, row=row) -> float:
                seed = hash_of(f"{spec.seed}/{row['id']}")
                return steepest(
                    function, clean, editable, radius, steps=spec.steps, restarts=spec.restarts,
                    generator=torch.Generator().manual_seed(seed),
                )  # fmt: skip

            generator = torch.Generator().manual_seed(hash_of(f"{spec.seed}/{row['id']}/random"))
            with torch.no_grad():
                logprobs, routing = self.victim.routes(clean[None], question)
            found = {
                "prediction": self.labels[int(logprobs.argmax())],
                "lipschitz": slope(free),
                "lipschitz_random": random_slope(
                    free, clean, editable, radius, spec.samples, generator
                ),
                "jacobian": jacobian_norm(free, clean, editable),
                "lipschitz_frozen": float("nan"),
                "jacobian_frozen": float("nan"),
            }
            if routing:
                held = self._held(question, routing, weighing(self.model))
                fixed = self._held(question, routing, None)
                found["lipschitz_frozen"] = slope(held)
                found["jacobian_frozen"] = jacobian_norm(fixed, clean, editable)
            yield found

    def _held(
        self, question: Question, routing: list[Routing], weigh: routes.Weigh | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The answers with the experts of the clean text, under its weights or weighed anew."""

        def answers(embedded: torch.Tensor) -> torch.Tensor:
            kept = [repeated(each, len(embedded)) for each in routing]
            return self.victim.routes(embedded, question, imposed(kept, weigh=weigh))[0]

        return answers
