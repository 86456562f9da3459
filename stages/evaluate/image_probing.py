"""Probes of image classifiers, run on a loaded model: the procedures of ``image_probes.py``."""

from collections.abc import Callable, Iterator

import torch

from stages.attack.image_geometry import Draws
from stages.attack.image_spec import PGD
from stages.attack.images import attack_images
from stages.evaluate.intervening import Intervening, refuse_dense
from stages.evaluate.showing import Shown
from stages.models.routes import Policy, Weigh, hash_of, imposed, per_input, routed
from stages.models.routing import Routing, weighing
from stages.probe.block_slopes import block_slopes
from stages.probe.geometry import measured, watched
from stages.probe.slopes import jacobian_norms, random_slopes, steepest_slopes
from stages.probe.usage import usage


class ImageIntervenor(Intervening, Shown):
    """Puts other experts in the place of those that were chosen."""

    def run(self) -> list[dict]:
        """Predictions under each intervention."""
        refuse_dense(self.spec, self.model)
        if self.spec.budget:
            attack, seeds = PGD(steps=self.spec.steps, restarts=1), self.seeds("attack")
            self.pixels = attack_images(
                self.classifier, attack, self.pixels, self.labels, self.spec.budget, seeds
            ).images
        found, losses, routing = self._answers()
        layers = [each.layer for each in routing]
        used = None
        if self.spec.prune:
            used = usage(self.seen(self.decoded(self.rows[0]["calibration"]))[1])
        for row in found:
            row |= {"interventions": {}, "criticality": {}, "operations": self.operations()}
        under = {}
        for each in zip(*(self.policies(id, layers, used) for id in self.ids), strict=True):
            under[each[0][0]] = self._answers(per_input([policy for _, policy in each]))[0]
        for name, count in self.other_counts():
            with count as policy:
                under[name] = self._answers(policy)[0]
        for name, answers in under.items():
            for row, answer in zip(found, answers, strict=True):
                row["interventions"][name] = answer
        for layer, policies in self.masks(routing):
            rises = torch.stack([self._answers(policy)[1] - losses for policy in policies])
            for row, rise in zip(found, rises.amax(0).tolist(), strict=True):
                row["criticality"][layer] = rise
        return found

    def _answers(
        self, force: Policy | None = None
    ) -> tuple[list[dict], torch.Tensor, list[Routing]]:
        """Predictions with their losses, the losses (B,) again, and the routes."""
        logits, routing = self.seen(self.pixels, force)
        losses = self.losses(logits)
        answers = [
            {"prediction": prediction, "loss": loss}
            for prediction, loss in zip(self.predictions(logits), losses.tolist(), strict=True)
        ]
        return answers, losses, routing


class ImageSurveyor(Shown):
    """Measures what each router's decisions hang on."""

    def run(self) -> Iterator[dict]:
        """Means over each image's tokens by layer, and the loss that an attack adds."""
        spec, count = self.spec, len(self.ids)
        with torch.no_grad(), watched(self.model) as blocks:
            logits = self.classifier(self.pixels)
        attack = PGD(steps=spec.steps, restarts=1)
        outcome = attack_images(
            self.classifier, attack, self.pixels, self.labels, spec.budget, self.seeds("attack")
        )
        rises = self.losses(outcome.logits) - self.losses(logits)
        parts = [each.split(count) for each in blocks]
        for index, (id, prediction, rise) in enumerate(
            zip(self.ids, self.predictions(logits), rises.tolist(), strict=True)
        ):
            seed = hash_of(f"{spec.seed}/{id}")
            with torch.no_grad():
                layers = {
                    part[index].routing.layer: measured(
                        part[index], torch.Generator().manual_seed(seed)
                    )
                    for part in parts
                }
            yield {"prediction": prediction, "loss_rise": rise, "layers": layers}


class ImageClimber(Shown):
    """Looks for the steepest slope of the logits around each image."""

    def run(self) -> list[dict]:
        """Slopes with routes free and frozen."""
        logits, routing = self.seen(self.pixels)
        unknown = torch.full((len(self.ids),), torch.nan)
        free = self.classifier
        weigh = weighing(self.model) if routing else None
        held = self._held(routing, weigh)
        # Unlike in texts, the Jacobian's norm is none of the slopes found: its steepest direction
        # and the opposite one may both leave the valid range, as where pixels are black and white.
        columns = {"jacobian": jacobian_norms(free, self.pixels, self._draws("jacobian")),
                   "jacobian_frozen": unknown}  # fmt: skip
        for suffix, radius in self.spec.sizes.items():
            columns[f"lipschitz{suffix}"] = self._steepest(free, radius)
            columns[f"lipschitz_random{suffix}"] = random_slopes(
                free, self.pixels, radius, self.spec.samples, self._draws("random")
            )
            columns[f"lipschitz_frozen{suffix}"] = (
                self._steepest(held, radius) if routing else unknown
            )
        if routing:
            fixed = self._held(routing, None)
            columns["jacobian_frozen"] = jacobian_norms(
                fixed, self.pixels, self._draws("jacobian")
            )
        values = {name: column.tolist() for name, column in columns.items()}
        blocks = self._blocks(weigh)
        return [
            {"prediction": prediction, "blocks": blocks[i]}
            | {name: column[i] for name, column in values.items()}
            for i, prediction in enumerate(self.predictions(logits))
        ]

    def _blocks(self, weigh: Weigh | None) -> list[dict[str, dict[str, float]]]:
        """Of each image, by feed-forward block the mean over its tokens of the steepest slopes."""
        count = len(self.ids)

        def draw(start: int, shape: torch.Size) -> torch.Tensor:
            # The tokens of an image follow each other.
            tokens = shape[:-1].numel() // count
            return self._draws(f"blocks/{start}").normal((tokens, shape[-1])).view(shape)

        found = block_slopes(
            self.model, lambda: self.classifier(self.pixels), draw,
            radius=self.spec.block_radius, steps=self.spec.steps, restarts=self.spec.restarts,
            samples=self.spec.samples, inputs=count, weigh=weigh,
        )  # fmt: skip
        means = {
            path: {name: slopes.view(count, -1).mean(1).tolist() for name, slopes in each.items()}
            for path, each in found.items()
        }
        return [
            {path: {name: values[i] for name, values in each.items()}
             for path, each in means.items()}
            for i in range(count)
        ]  # fmt: skip

    def _draws(self, purpose: str) -> Draws:
        return Draws(self.seeds(purpose))

    def _steepest(
        self, function: Callable[[torch.Tensor], torch.Tensor], radius: float
    ) -> torch.Tensor:
        return steepest_slopes(
            function, self.pixels, radius, steps=self.spec.steps,
            restarts=self.spec.restarts, draws=self._draws("ascent"),
        )  # fmt: skip

    def _held(
        self, routing: list[Routing], weigh: Weigh | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The logits with the experts of the clean images, under their weights or weighed anew."""

        def logits(images: torch.Tensor) -> torch.Tensor:
            with routed(self.model, imposed(routing, weigh=weigh)):
                return self.classifier(images)

        return logits
