"""Probes of the experts, run on a loaded model: the procedures of ``probes.py``."""

from collections.abc import Callable, Iterator, Sequence

import torch

from stages.attack.embeddings import ascend, scale
from stages.attack.objectives import Objective, repeated
from stages.attack.questions import Question, cross_entropy, tokens_of
from stages.attack.text_spec import EmbeddingPGD
from stages.evaluate.asking import Asker
from stages.evaluate.intervening import Intervening, refuse_dense
from stages.models import routes
from stages.models.families import family
from stages.models.routes import Policy, hash_of, imposed
from stages.models.routing import Routing, weighing
from stages.probe.block_slopes import block_slopes
from stages.probe.geometry import Watched, measured, watched
from stages.probe.lipschitz import Function, jacobian_norm, random_slope, steepest
from stages.probe.usage import usage


class Intervenor(Intervening, Asker):
    """Puts other experts in the place of those that were chosen."""

    counted: torch.Tensor | None = None

    def run(self, rows: Sequence[dict]) -> Iterator[dict]:
        """Answers under each intervention, row by row."""
        refuse_dense(self.spec, self.model)
        for row in rows:
            question = self.question(row, row["text"])
            asked = self._attacked(row, question) if self.spec.epsilon else None
            plain, routing = self._answer(question, asked)
            layers = [each.layer for each in routing]
            used = self._usage(row) if self.spec.prune else None
            interventions = {
                name: self._answer(question, asked, policy)[0]
                for name, policy in self.policies(row["id"], layers, used)
            }
            for name, count in self.other_counts():
                with count as policy:
                    interventions[name] = self._answer(question, asked, policy)[0]
            yield plain | {
                "interventions": interventions,
                "operations": self.operations(),
                # By layer, the largest rise of the loss over random masks of half its experts.
                "criticality": {
                    layer: max(
                        self._answer(question, asked, policy)[0]["loss"] - plain["loss"]
                        for policy in policies
                    )
                    for layer, policies in self.masks(routing)
                },
            }

    def _attacked(self, row: dict, question: Question) -> torch.Tensor:
        """The embeddings (n, D) of the text under the attack."""
        attack = EmbeddingPGD(epsilon=self.spec.epsilon, steps=self.spec.steps, restarts=1)
        seed = hash_of(f"{self.spec.seed}/{row['id']}/attack")
        clean = self.victim.table[question.tokens]
        found = ascend(
            Objective(self.victim, question, attack), clean, question.editable,
            attack.epsilon * scale(self.victim.table, attack.norm), norm=attack.norm,
            steps=attack.steps, restarts=attack.restarts,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return clean + found.delta

    @torch.no_grad()
    def _answer(
        self,
        question: Question,
        embedded: torch.Tensor | None = None,
        force: Policy | None = None,
    ) -> tuple[dict, list]:
        """The answer to a text as it is, or with other embeddings (n, D), and its routes."""
        asked = self.victim.table[question.tokens] if embedded is None else embedded
        logprobs, found = self.victim.routes(asked[None], question, force)
        answer = {
            "prediction": self.labels[int(logprobs.argmax())],
            "loss": cross_entropy(logprobs, question).item(),
        }
        return answer, found

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
            seed = hash_of(f"{self.spec.seed}/{row['id']}/attack")
            made = ascend(
                Objective(self.victim, question, attack), clean, question.editable, radius,
                norm="l2", steps=attack.steps, restarts=attack.restarts,
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            with torch.no_grad():
                after = self.victim.logprobs((clean + made.delta)[None], question)
            rise = cross_entropy(after, question) - cross_entropy(logprobs, question)
            yield {
                "prediction": self.labels[int(logprobs.argmax())],
                "loss_rise": rise.item(),
                "layers": layers,
            }

    def _measured(self, each: Watched, length: int, row: dict) -> dict[str, float]:
        each.routing = tokens_of(each.routing, 1, length)
        each.hidden = each.hidden[:length]
        seed = hash_of(f"{self.spec.seed}/{row['id']}")
        return measured(each, torch.Generator().manual_seed(seed))


class Climber(Asker):
    """Looks for the steepest slope of the answers around each text."""

    def run(self, rows: Sequence[dict]) -> Iterator[dict]:
        """Slopes with routes free and frozen."""
        weigh = weighing(self.model) if family(self.model).is_moe else None
        for row in rows:
            question = self.question(row, row["text"])
            clean, editable = self.victim.table[question.tokens], question.editable

            def free(embedded: torch.Tensor, question=question) -> torch.Tensor:
                return self.victim.logprobs(embedded, question)

            with torch.no_grad():
                logprobs, routing = self.victim.routes(clean[None], question)
            held = self._held(question, routing, weigh) if routing else None
            norm = jacobian_norm(free, clean, editable)
            found = {"prediction": self.labels[int(logprobs.argmax())], "jacobian": norm}
            for suffix, radius in self.spec.sizes.items():
                for name, value in self._slopes(row, question, radius, free, held, norm).items():
                    found[name + suffix] = value
            fixed = self._held(question, routing, None)
            found["jacobian_frozen"] = (
                jacobian_norm(fixed, clean, editable) if routing else float("nan")
            )
            yield found | {"blocks": self._blocks(row, question, weigh)}

    def _slopes(
        self,
        row: dict,
        question: Question,
        radius: float,
        free: Function,
        held: Function | None,
        norm: float,
    ) -> dict[str, float]:
        """The steepest slopes found within one radius; ``norm`` is that of the Jacobian."""
        spec, clean = self.spec, self.victim.table[question.tokens]
        radius = radius * scale(self.victim.table, "l2")

        def slope(function: Function) -> float:
            seed = hash_of(f"{spec.seed}/{row['id']}")
            found = steepest(
                function, clean, question.editable, radius, steps=spec.steps,
                restarts=spec.restarts, generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            # Embeddings may move in every direction, so that slopes come as near to the norm as one
            # likes in any ball. With the experts held, the Jacobian is the same: near the text the
            # choice is that anyway. (That of ``jacobian_frozen`` lacks what the weights do.)
            return max(found, norm)

        generator = torch.Generator().manual_seed(hash_of(f"{spec.seed}/{row['id']}/random"))
        return {
            "lipschitz": slope(free),
            "lipschitz_random": random_slope(
                free, clean, question.editable, radius, spec.samples, generator
            ),
            "lipschitz_frozen": slope(held) if held else float("nan"),
        }

    def _blocks(
        self, row: dict, question: Question, weigh: routes.Weigh | None
    ) -> dict[str, dict[str, float]]:
        """By feed-forward block, the mean over the prompt's tokens of the steepest slopes."""
        length = len(question.tokens)

        def draw(start: int, shape: torch.Size) -> torch.Tensor:
            seed = hash_of(f"{self.spec.seed}/{row['id']}/blocks/{start}")
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        clean = self.victim.table[question.tokens][None]
        found = block_slopes(
            self.model, lambda: self.victim.logprobs(clean, question), draw,
            radius=self.spec.block_radius, steps=self.spec.steps, restarts=self.spec.restarts,
            samples=self.spec.samples, weigh=weigh,
        )  # fmt: skip
        return {
            path: {name: slopes.flatten()[:length].mean().item() for name, slopes in each.items()}
            for path, each in found.items()
        }

    def _held(
        self, question: Question, routing: list[Routing], weigh: routes.Weigh | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The answers with the experts of the clean text, under its weights or weighed anew."""

        def answers(embedded: torch.Tensor) -> torch.Tensor:
            kept = [repeated(each, len(embedded)) for each in routing]
            return self.victim.routes(embedded, question, imposed(kept, weigh=weigh))[0]

        return answers
