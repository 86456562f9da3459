"""Gradient evaluations per second of Auto-PGD, against pyautoattack's on the same model and images.

A Vision Transformer with experts and its dense twin, random weights, 32 random images of 28 x 28.
Also what recording the routes adds to a forward pass, and what soft routing adds to a gradient.
Run alone: ``python benchmarks/image_attacks.py``.
"""

import argparse
import logging
import statistics
import time

import torch
from pyautoattack.autopgd_base import APGDAttack

from stages.attack.image_spec import APGD
from stages.attack.images import attack_images
from stages.models.images import Classifier
from stages.models.routes import routed
from stages.models.vision import from_scratch
from stages.models.vision_spec import VisionSpec

BUDGET = 8 / 255


def seconds(rounds, device, *works):
    """The median of some rounds of each, taking turns, after one that does not count.

    Processor time on the CPU, so that other work on the machine counts little.
    """
    found = [[] for _ in works]
    for turn in range(rounds + 1):
        for work, times in zip(works, found, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter if device == "cuda" else time.process_time
            start = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times.append(clock() - start)
    return [statistics.median(times) for times in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--patch", type=int, default=7)
    parser.add_argument("--channels", type=int, default=1)
    asked = parser.parse_args()
    images = torch.rand(
        asked.images, asked.channels, asked.image_size, asked.image_size,
        generator=torch.Generator().manual_seed(0),
    ).to(asked.device)  # fmt: skip
    seeds = [(0, i) for i in range(asked.images)]
    for experts in (0, 8):
        spec = VisionSpec(size=asked.size, patch=asked.patch, image_size=asked.image_size,
                          channels=asked.channels, labels=10, experts=experts,
                          shared_start=False)
        model, processor = from_scratch(spec)
        classifier = Classifier(model.to(asked.device).requires_grad_(False), processor)
        labels = classifier(images).argmax(1)
        peer = APGDAttack(classifier, n_iter=asked.steps, norm="Linf", eps=BUDGET, seed=0,
                          n_restarts=1, verbose=False, device=asked.device,
                          logger=logging.getLogger("peer"))
        peer.loss = "ce"

        def ours(routing="as_is", classifier=classifier, labels=labels):
            attack = APGD(steps=asked.steps, routing=routing)
            attack_images(classifier, attack, images, labels, BUDGET, seeds)

        def theirs(peer=peer, labels=labels):
            # All of it, on every image: `perturb` would leave out those that are misclassified.
            peer.init_hyperparam(images)
            peer.attack_single_run(images, labels)

        # Both look at the gradient of the clean or first image once more than they step.
        rate = (asked.steps + 1) * asked.images
        took = seconds(asked.rounds, asked.device, ours, theirs)
        mine, other = rate / took[0], rate / took[1]
        name = f"V-MoE, {experts} experts" if experts else "ViT"
        print(f"{name}: {mine:,.0f} gradients/s, pyautoattack {other:,.0f}: {mine / other:.2f}")
        if not experts:
            continue
        soft = rate / seconds(asked.rounds, asked.device, lambda: ours("soft"))[0]
        print(f"  with soft routing over all experts {soft:,.0f}: {soft / mine:.2f}")

        @torch.no_grad()
        def plain(classifier=classifier):
            for _ in range(10):
                classifier(images)

        @torch.no_grad()
        def recorded(classifier=classifier):
            with routed(classifier.model):
                for _ in range(10):
                    classifier(images)

        without, with_routes = seconds(4 * asked.rounds, asked.device, plain, recorded)
        print(f"  recording routes: {with_routes / without - 1:+.1%} of a forward pass")


if __name__ == "__main__":
    main()
