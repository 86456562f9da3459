"""Discrete search guided by a gradient, against all replacements one by one."""

import pytest
import torch

from stages.attack import gcg
from stages.attack.objectives import Objective
from stages.attack.questions import Question, Victim
from stages.attack.text_spec import GCG
from stages.models.tiny import tiny_model, tiny_tokenizer

GENERATOR = torch.Generator().manual_seed(0)
TABLE = torch.randn(20, 6, generator=GENERATOR)
SLOPE = torch.randn(5, 6, generator=GENERATOR)
START = torch.tensor([3, 1, 4, 1, 5])
POSITIONS = torch.tensor([0, 2, 3])
ALLOWED = torch.arange(20) != 7


def value(rows):
    return (TABLE[rows] * SLOPE).sum((1, 2))


def both(rows):
    """The objective, and itself as the score."""
    return value(rows), value(rows)


def every(row):
    return torch.ones(len(row), dtype=torch.bool)


def brute_force():
    """Gain of each replacement, (positions, vocabulary)."""
    rows = START.repeat(5, 20, 1)
    for place in range(5):
        rows[place, :, place] = torch.arange(20)
    return value(rows.flatten(0, 1)).view(5, 20) - value(START[None])


def test_promised_gains_of_a_linear_objective_are_the_real_ones():
    found = gcg.promises(SLOPE, TABLE, START)
    torch.testing.assert_close(found, brute_force(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.topk(5).indices, brute_force().topk(5).indices)


def test_candidates_replace_one_token_by_one_of_the_best():
    gains = brute_force().masked_fill(~ALLOWED, -torch.inf)
    gains[torch.arange(5), START] = -torch.inf
    gains = gains[POSITIONS]
    rows = gcg.draw_candidates(
        gains, START, POSITIONS, top=4, number=100, generator=torch.Generator())
    assert len(rows) == 12 and len(rows.unique(dim=0)) == 12
    best = gains.topk(4).indices
    for row in rows:
        (place,) = (row != START).nonzero()[:, 0].tolist()
        assert row[place] in best[POSITIONS.tolist().index(place)]
    few = gcg.draw_candidates(
        gains, START, POSITIONS, top=4, number=5, generator=torch.Generator())
    assert len(few) == 5


def searched(**changes):
    settings = {"allowed": ALLOWED, "budget": 2, "steps": 6, "candidates": 100, "top": 20,
                "generator": torch.Generator().manual_seed(0), "keep": every}
    return gcg.search(
        both, lambda tokens: SLOPE, TABLE, START, POSITIONS, **settings | changes)


def test_the_best_tokens_within_the_budget_are_found():
    gains = brute_force()[POSITIONS].masked_fill(~ALLOWED, -torch.inf).max(-1)
    best = gains.values.topk(2)
    expected = START.clone()
    expected[POSITIONS[best.indices]] = gains.indices[best.indices]
    found = searched()
    assert torch.equal(found.tokens, expected)
    assert found.score == pytest.approx((value(START[None]) + best.values.sum()).item(), rel=1e-5)
    whole = searched(budget=3)
    every_gain = gains.values.clamp(min=0).sum()
    assert whole.score == pytest.approx((value(START[None]) + every_gain).item(), rel=1e-5)
    assert 7 not in whole.tokens


def test_the_search_ends_at_its_goal_and_keeps_the_start_without_candidates():
    assert searched(goal=-1000.0).steps == 0
    kept = searched(keep=lambda rows: torch.zeros(len(rows), dtype=torch.bool))
    assert torch.equal(kept.tokens, START) and kept.steps == 6
    assert searched().zero_gradients == 0


def test_the_best_step_is_kept_when_later_ones_are_worse():
    calls = []

    def falling(rows):
        calls.append(len(rows))
        return value(rows), value(rows) - 100 * len(calls)

    found = gcg.search(
        falling, lambda tokens: SLOPE, TABLE, START, POSITIONS, allowed=ALLOWED, budget=3, steps=4,
        candidates=10, top=20, generator=torch.Generator(), keep=every)
    assert torch.equal(found.tokens, START) and calls == [1, 10, 10, 10, 10]
    assert found.score == pytest.approx(value(START[None]).item() - 100)


def test_the_loss_leads_and_the_score_decides_what_is_kept():
    """Success is the token at the third place that the loss likes least; the loss leads to the same
    end whatever is kept."""
    least = int(brute_force()[2].masked_fill(~ALLOWED, torch.inf).argmin())

    def judged(rows):
        return value(rows), (rows[:, 2] == least).float() - value(rows) / 1000

    settings = {"allowed": ALLOWED, "budget": 3, "candidates": 100, "top": 20, "keep": every}

    def run(judge, **changes):
        return gcg.search(
            judge, lambda tokens: SLOPE, TABLE, START, POSITIONS,
            generator=torch.Generator().manual_seed(0), **settings | {"steps": 6} | changes)

    found, plain = run(judged), run(both)
    assert found.tokens[2] == least and plain.tokens[2] != least
    assert torch.equal(found.last, plain.last)
    # Of the candidates of a first step, all of which have one new token, one succeeds.
    first = run(judged, steps=1, goal=0.5)
    assert first.tokens.tolist() == [3, 1, least, 1, 5] and first.score > 0.5
    assert run(judged, goal=0.5).steps == 1


def test_random_replacements_change_as_many_tokens():
    drawn = gcg.random_replacements(
        START, POSITIONS, 2, ALLOWED, every, torch.Generator().manual_seed(3))
    changed = (drawn != START).nonzero()[:, 0].tolist()
    assert len(changed) == 2 and set(changed) <= {0, 2, 3} and 7 not in drawn
    # Only replacements by even numbers leave an input.
    even = gcg.random_replacements(
        START, POSITIONS, 3, ALLOWED, lambda rows: (rows[:, [0, 3]] % 2 == 0).any(1),
        torch.Generator().manual_seed(0))
    assert (even[[0, 3]] % 2 == 0).any()


def test_one_step_on_a_model_is_the_best_of_all_replacements():
    victim = Victim(tiny_model("mixtral", tiny_tokenizer(), seed=0).requires_grad_(False))
    tokens = torch.tensor([40, 50, 60, 70, 80])
    question = Question(tokens, torch.tensor([False, True, True, True, False]),
                        ((90, 91), (90, 92), (95,)), (0, 1, 1), gold=0)
    objective = Objective(victim, question, GCG())
    allowed = torch.arange(259) >= 200

    def values(rows):
        with torch.no_grad():
            parts = [torch.stack(objective(victim.table[part])) for part in rows.split(64)]
            return torch.cat(parts, dim=1)

    def gradient(row):
        embedded = victim.table[row][None].requires_grad_()
        return torch.autograd.grad(objective(embedded)[0].sum(), embedded)[0][0]

    found = gcg.search(
        values, gradient, victim.table, tokens, torch.tensor([1, 2, 3]), allowed=allowed, budget=1,
        steps=1, candidates=1000, top=259, generator=torch.Generator(), keep=every)
    rows = tokens.repeat(3, 59, 1)
    for place in range(3):
        rows[place, :, place + 1] = torch.arange(200, 259)
    brute = values(rows.flatten(0, 1))[0]
    assert found.score == pytest.approx(brute.max().item(), abs=1e-5)
    # A promise is the slope of the way from one embedding to the other.
    step = torch.zeros(5, victim.table.shape[1])
    step[2] = 1e-3 * (victim.table[210] - victim.table[60])
    with torch.no_grad():
        there, back = (objective((victim.table[tokens] + s)[None])[0] for s in (step, -step))
    promised = gcg.promises(gradient(tokens), victim.table, tokens)[2, 210].item()
    assert promised == pytest.approx(((there - back) / 2e-3).item(), rel=0.05)
