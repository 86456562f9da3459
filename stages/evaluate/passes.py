"""How many passes through a model procedures take, for estimates of what a plan's nodes take.

A pass is one example's way forward; a gradient with respect to the input is two more. Attacks that
stop where they succeed count as if they never did. What one expert or one block computes for a
probe, and what a gradient through experts that were not chosen takes beyond a plain one, are left
out. Light to import: no torch.

``layers`` is the number of a model's sparse blocks, 0 for a dense model.
"""

from collections.abc import Mapping

from stages.attack.image_spec import APGD, PGD, AnyImageAttack, Noise, PaperPGD, Square, Transfer
from stages.attack.text_spec import (
    GCG,
    AnyTextAttack,
    DeepWordBug,
    EmbeddingPGD,
    WordNeighbours,
)
from stages.data.templates import TEMPLATES
from stages.evaluate import held_prompts, image_attacks, text_attacks
from stages.evaluate.base import Evaluation
from stages.evaluate.held_prompts import RANKINGS, SafetyExperts, TargetAttack
from stages.evaluate.image_attacks import ImageAttacks
from stages.evaluate.image_probes import ImageGeometry, ImageLipschitz
from stages.evaluate.labelled_images import LabelledImages
from stages.evaluate.labelled_texts import LabelledTexts
from stages.evaluate.probes import Interventions, LocalLipschitz, RouterGeometry
from stages.evaluate.sharpness import Sharpness
from stages.evaluate.text_attacks import TextAttacks

GRADIENT = 3
"""Passes of a loss and its gradient."""
POWER_ITERATIONS = 20
"""Assumed of the norm of a Jacobian over pixels; two gradients each."""
LANCZOS_ITERATIONS = 40
"""Assumed of the largest eigenvalue of a Hessian."""
HESSIAN, FORMS = 2 * GRADIENT, 3 * GRADIENT
"""Passes of a product of the Hessian with a vector, and of each example's part of one."""
LETTERS, WORD = 5, 6
"""Assumed letters of a word, and characters with the blank after it."""


def of_image(evaluation: LabelledImages, layers: int, checked: bool = False) -> int:
    """Passes of each image; with those of the checks for one that attacks are checked on."""
    match evaluation:
        case ImageAttacks():
            return _image_attacks(evaluation, layers, checked)
        case Interventions():
            pgd = PGD(steps=evaluation.steps, restarts=1)
            attacked = evaluation.budget and _on_image(pgd, False)
            return attacked + _interventions(evaluation, layers)
        case ImageGeometry():
            return 1 + _on_image(PGD(steps=evaluation.steps, restarts=1), False)
        case ImageLipschitz():
            # Of outputs and of a first gradient, then iterations.
            jacobian = 1 + 2 * (1 + 2 * POWER_ITERATIONS)
            return _slopes(evaluation, jacobian, bool(layers))
        case Sharpness():
            each = 1 + LANCZOS_ITERATIONS * HESSIAN + (evaluation.vectors + 1) * FORMS
            return 1 + (1 + len(evaluation.parts)) * each
    return 1


def of_text(
    evaluation: LabelledTexts, characters: int, layers: int, checked: bool = False
) -> int:
    """Passes of each prompt, whose text has so many characters; as ``of_image``."""
    match evaluation:
        case TextAttacks():
            return _text_attacks(evaluation, characters, layers, checked)
        case Interventions():
            pgd = EmbeddingPGD(steps=evaluation.steps, restarts=1)
            attacked = evaluation.epsilon and _on_text(pgd, characters, False)
            return attacked + _interventions(evaluation, layers)
        case RouterGeometry():
            pgd = EmbeddingPGD(steps=evaluation.steps, restarts=1)
            return 1 + _on_text(pgd, characters, False) + 1
        case LocalLipschitz():
            jacobian = 1 + 2 * len(TEMPLATES[evaluation.template].labels)
            return _slopes(evaluation, jacobian, bool(layers))
    return 1


def calibration(evaluation: Evaluation) -> int:
    """Passes that each shard takes beside those of its examples."""
    return evaluation.calibration_rows * bool(evaluation.prune) if isinstance(
        evaluation, Interventions) else 0


def of_prompts(
    evaluation: TargetAttack | SafetyExperts,
    row: Mapping,
    weights: Mapping[str, float],
    per_token: float,
) -> tuple[float, float]:
    """Tokens read and written for a row of ``target_attack`` or ``safety_experts``.

    ``weights`` says how many prompts of a data set one prompt stands for. A routing loss of the
    former, which reads the whole prompt for each candidate, is left out.
    """
    answer = evaluation.max_new_tokens
    if isinstance(evaluation, TargetAttack):
        # A short word is a token, whatever its length.
        suffix, target = (len(text.split()) for text in (evaluation.suffix, evaluation.target))
        prompt = len(row["prompt"]) / per_token
        whole, searched = prompt + suffix + target, suffix + target
        tries = 1 + evaluation.steps * (GRADIENT + evaluation.candidates)
        # Where the attack is checked, the search goes on, is made again and with half the budget,
        # with an answer each; and embeddings take the suffix's place.
        searches, answers = (4, 6) if row["checked"] else (1, 3)
        free = row["checked"] * (held_prompts.FREE_STEPS * GRADIENT + 1)
        # Routes before and after, three losses, the answers, what is before the suffix once.
        read = 5 * whole + (searches * tries + free) * searched + prompt
        return read + answers * (prompt + suffix), answers * answer
    read = written = 0.0
    for each in row["prompts"]:
        weight = weights.get(each["example_id"].partition("/")[0], 1.0)
        again = len(RANKINGS) * len(evaluation.silenced) if each["measured"] else 0
        # The other half is read once more, for the routes.
        read += weight * (1 + again + (not each["measured"])) * len(each["prompt"]) / per_token
        written += weight * (1 + again) * answer
    return read, written


def _image_attacks(evaluation: ImageAttacks, layers: int, checked: bool) -> int:
    moe, attacks = layers > 0, evaluation.tried
    # Each pair of routes exchanged as they are, weighed anew, and in each layer alone.
    exchanged = 2 * (2 + layers) if moe else 0
    # The attacked images are seen once more; a random perturbation is made, seen and exchanged.
    at_budget = sum(_on_image(attack, moe) + 1 for attack in attacks.values()) + 3 + exchanged
    # As it is, beside its mirror image, in bfloat16.
    total = 1 + 2 + 1 + len(evaluation.budgets) * at_budget
    if not checked:
        return total
    for name, attack in attacks.items():
        harder = image_attacks.variants(name, attack).values()
        total += len(evaluation.budgets) * sum(_on_image(each, moe) for _, each in harder)
        total += _on_image(attack, moe) * image_attacks.checked_without_bound(attack)
    return total


def _on_image(attack: AnyImageAttack, moe: bool) -> int:
    """Passes of one attack at one budget."""
    if isinstance(attack, Square | Noise):
        return attack.queries
    routing = getattr(attack, "routing", "as_is") if moe else "as_is"
    # Success is judged by the free model as well; the clean routes are looked up first.
    forward, first = 1 + (routing == "frozen"), routing in ("frozen", "targeted", "joint")
    climb = GRADIENT - 1 + forward
    zero = climb  # the share of gradients that are zero at the clean image
    if isinstance(attack, PaperPGD):
        return attack.steps * climb + 1 + zero
    if isinstance(attack, PGD):
        return first + attack.restarts * (attack.steps * climb + forward) + zero
    run = first + attack.restarts * attack.steps * climb
    if isinstance(attack, APGD) and attack.targets:
        return 1 + attack.targets * run + zero
    return run + zero + isinstance(attack, Transfer)


def _text_attacks(evaluation: TextAttacks, characters: int, layers: int, checked: bool) -> int:
    moe = layers > 0
    total = 4  # as it is, beside another text, in bfloat16
    for attack in evaluation.attacks:
        total += _on_text(attack, characters, moe) + 2  # seen again, and its control
        if moe and isinstance(attack, EmbeddingPGD | GCG):
            total += 4 * (1 + layers * evaluation.swap_layers)
        if checked:
            total += sum(
                1 + (variant != attack) * _on_text(variant, characters, moe)
                for _, variant in text_attacks.variants(attack)
            )
    return total


def _on_text(attack: AnyTextAttack, characters: int, moe: bool) -> int:
    """Passes of one attack on a text of so many characters."""
    if isinstance(attack, EmbeddingPGD | GCG):
        routing = attack.routing if moe else "as_is"
        forward, first = 1 + (routing == "frozen"), routing in ("frozen", "targeted", "joint")
        climb = GRADIENT - 1 + forward
        if isinstance(attack, GCG):
            return first + forward + attack.steps * (climb + forward * attack.candidates)
        return first + attack.restarts * (attack.steps * climb + forward)
    # Every word is left out once; then each edit tries all forms of a word.
    forms = LETTERS
    if isinstance(attack, DeepWordBug):
        forms *= len(attack.operations)
    elif isinstance(attack, WordNeighbours):
        forms = attack.neighbours
    return 1 + characters // WORD + attack.edits * forms


def _interventions(evaluation: Interventions, layers: int) -> int:
    return 1 + len(evaluation.interventions) + layers * evaluation.random_masks


def _slopes(evaluation: ImageLipschitz | LocalLipschitz, jacobian: int, moe: bool) -> int:
    steepest = 1 + evaluation.restarts * (evaluation.steps * GRADIENT + 1)
    at_radius = (1 + moe) * steepest + 1 + evaluation.samples
    # The inputs of the blocks are seen once more.
    return 1 + (1 + len(evaluation.radii)) * at_radius + (1 + moe) * jacobian + 1
