"""Answers and margins as attacks see them equal those of the evaluations, and routes add up."""

import pytest
import torch

from stages.attack.objectives import Objective, repeated, routing_loss
from stages.attack.questions import Question, Victim, cross_entropy, margin
from stages.attack.text_spec import GCG
from stages.evaluate.base import Request
from stages.evaluate.scorer import encode, score
from stages.models.routes import imposed
from stages.models.routing import Routing
from stages.models.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WORDS = (" no", " never", " yes")


@pytest.fixture(scope="module")
def victim():
    return Victim(tiny_model("mixtral", TOKENIZER, seed=0).requires_grad_(False))


def question_of(text="Is it raining?"):
    choices = encode(TOKENIZER, Request("q", text, WORDS), 1000)
    start = choices[0].start
    tokens = torch.tensor(choices[0].tokens[:start])
    words = tuple(tuple(choice.tokens[start:]) for choice in choices)
    return Question(tokens, torch.ones(start, dtype=torch.bool), words, (0, 0, 1), gold=1)


def test_answers_are_those_of_the_scorer(victim):
    question = question_of()
    assert question.beginnings == sorted({word[:-1] for word in question.words})
    with torch.no_grad():
        found = victim.logprobs(victim.table[question.tokens][None].repeat(2, 1, 1), question)
    (response,) = score(victim.model, TOKENIZER, [Request("q", "Is it raining?", WORDS)])
    no, never, yes = torch.tensor(response.logprobs)
    expected = torch.stack([torch.logaddexp(no, never), yes])
    torch.testing.assert_close(found, expected.expand(2, 2), rtol=1e-4, atol=1e-4)
    by_hand = expected[0] - expected[1]
    torch.testing.assert_close(margin(found, question), by_hand.expand(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        cross_entropy(found, question), torch.log1p(by_hand.exp()).expand(2), rtol=1e-4, atol=1e-4)


def test_margins_of_texts_of_several_lengths_and_their_count(victim):
    questions = [question_of(text) for text in ("A", "Longer text", "B", "Longer tExt")]
    before = victim.queries
    found = victim.margins([q.tokens for q in questions], questions[0])
    assert victim.queries - before == 4
    for value, question in zip(found, questions, strict=True):
        with torch.no_grad():
            alone = victim.logprobs(victim.table[question.tokens][None], question)
        assert value.item() == pytest.approx(margin(alone, question).item(), abs=1e-4)


def test_batches_are_as_large_as_memory_allows():
    """A device that holds 30 tokens; each row takes 4."""
    victim, sizes = Victim(tiny_model("llama", TOKENIZER, seed=0)), []

    def value(rows):
        sizes.append(len(rows))
        if 4 * len(rows) > 30:
            raise torch.OutOfMemoryError("too many")
        return rows.sum(1).float()

    rows = torch.arange(60).view(20, 3)
    victim.most = None  # as on a device other than a CPU
    for _ in range(2):
        torch.testing.assert_close(victim.batched(value, rows, 4), rows.sum(1).float())
    # All 20, halves, quarters; what fits is remembered.
    assert sizes == [20, 10, 5, 5, 5, 5, 5, 5, 5, 5] and victim.most == 20
    def never(rows):
        raise torch.OutOfMemoryError("too many")

    with pytest.raises(torch.OutOfMemoryError):
        victim.batched(never, rows, 4)
    on_cpu = Victim(victim.model)
    assert on_cpu.most == 4096
    sizes.clear()
    on_cpu.batched(lambda rows: sizes.append(len(rows)) or rows.sum(1), rows, 1024)
    assert sizes == [4, 4, 4, 4, 4]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v2", "qwen3_next"])
def test_a_beginning_is_read_once_for_many_prompts(name):
    victim = Victim(tiny_model(name, TOKENIZER, seed=0).requires_grad_(False))
    question = question_of()
    rows = question.tokens.repeat(3, 1)
    rows[1, 9], rows[2, 11] = 70, 80
    with torch.no_grad():
        whole = victim.logprobs(victim.table[rows], question)
        beginning = victim.read(victim.table[question.tokens[:9]])
        if name == "qwen3_next":  # carries a state from token to token
            assert beginning is None
            return
        for _ in range(2):  # and it can be used again
            parts = victim.logprobs(victim.table[rows[:, 9:]], question, beginning)
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert victim.read(victim.table[:0]) is None


def test_routing_loss_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 4.0]])
    clean = Routing("x", logits, torch.tensor([[0], [2]]), torch.ones(2, 1))
    # (1 + 0) / 2 - 3 and (0 + 2) / 2 - 4.
    assert routing_loss([clean], [clean], 1, 2).tolist() == [-2.75]
    away = Routing("x", logits.flip(0), clean.experts, clean.weights)
    # (2 + 4) / 2 - 0 and (3 + 1) / 2 - 0.
    assert routing_loss([clean], [away], 1, 2).tolist() == [2.5]
    # Two inputs of one row each, whose third token belongs to an answer.
    both = Routing("x", torch.cat([logits, logits[:1], logits.flip(0), logits[:1]]),
                   torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1))
    longer = Routing("x", torch.cat([logits, logits[:1]]), torch.tensor([[0], [2], [0]]),
                     torch.ones(3, 1))
    assert routing_loss([longer], [both], 2, 2).tolist() == [-2.75, 2.5]


def gradients(victim, **changes):
    question = question_of()
    embedded = victim.table[question.tokens][None].clone().requires_grad_()
    loss, reached = Objective(victim, question, GCG(**changes))(embedded)
    return loss.item(), reached.item(), torch.autograd.grad(loss.sum(), embedded)[0]


def test_ways_around_the_choice_of_experts(victim):
    plain = gradients(victim)
    for routing in ("soft", "frozen", "targeted", "joint"):
        loss, reached, gradient = gradients(victim, routing=routing, routing_weight=0.5)
        assert reached == plain[1] and gradient.isfinite().all()
        different = not torch.allclose(gradient, plain[2], rtol=1e-3, atol=1e-6)
        # With the routes of the clean input, which this is, frozen routing changes nothing.
        assert different == (routing != "frozen")
        if routing == "soft":
            assert loss == plain[0]
        if routing == "frozen":
            assert loss == pytest.approx(plain[0], abs=1e-5)
        if routing == "joint":
            away = gradients(victim, routing="targeted")[0]
            assert loss == pytest.approx(plain[0] + 0.5 * away, abs=1e-5)


def test_frozen_routes_are_those_of_the_clean_input(victim):
    question = question_of()
    objective = Objective(victim, question, GCG(routing="frozen"))
    other = victim.table[question_of("Was it coming?").tokens][None].repeat(2, 1, 1)
    loss, reached = objective(other)
    routes = [repeated(routing, 2) for routing in objective.routes]
    with torch.no_grad():
        forced, _ = victim.routes(other, question, imposed(routes, weigh=objective.weigh))
        free = victim.logprobs(other, question)
    torch.testing.assert_close(loss, margin(forced, question))
    torch.testing.assert_close(reached, margin(free, question))
    assert (loss - reached).abs().max() > 1e-4


def test_a_dense_model_is_attacked_as_it_is():
    dense = Victim(tiny_model("llama", TOKENIZER, seed=0).requires_grad_(False))
    assert torch.equal(gradients(dense, routing="joint")[2], gradients(dense)[2])
