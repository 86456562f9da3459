import pytest

from stages.evaluate.base import Request, Response
from stages.evaluate.generate import answer
from stages.evaluate.thinking import opened, stripped
from stages.models.tiny import tiny_tokenizer

CASES = {
    "Paris.": ("Paris.", "none"),
    "<think>\nFrance?\n</think>\n\nParis.": ("Paris.", "think"),
    "<thinking>x</thinking>Paris": ("Paris", "think"),
    "France is meant.</think> Paris.": ("Paris.", "think"),
    "<think>one</think> no <think>two</think> Paris.": ("Paris.", "think"),
    "<think>France is": ("", "think, unclosed"),
    "<think>one</think> then <think>again": ("", "think, unclosed"),
    "The tag <think> opens a thought.": ("The tag <think> opens a thought.", "none"),
    "<|channel|>analysis<|message|>France?<|end|><|start|>assistant<|channel|>final<|message|>"
    "Paris.<|return|>": ("Paris.", "harmony"),
    "<|channel|>analysis<|message|>France, which": ("", "harmony, no final"),
    "<|channel|>final <|constrain|>json<|message|>{}": ("{}", "harmony"),
}


@pytest.mark.parametrize("text", CASES)
def test_the_answer_and_the_rule(text):
    assert stripped(text) == CASES[text]


def test_what_a_prompt_opens():
    assert opened("<|assistant|>\n<think>\n") == "<think>"
    assert opened("… <THINKING> ") == "<THINKING>"
    for prompt in ("", "Why?", "<think>so</think>\n\n", "<think> is a tag, is it?", "</think>"):
        assert opened(prompt) == ""


def test_an_answer_begins_with_the_thought_that_its_prompt_opens():
    """As the templates of DeepSeek-R1 and QwQ do; cut off in the thought, there is no answer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")

    def said(text, **asked):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        request = Request("q", "Why?", max_new_tokens=99, **asked)
        return answer(tokenizer, request, tokens, True)

    thought = said("France is", chat=True)
    assert thought == Response("q", tokens=(9,), text="<think>France is", finished=True)
    assert stripped(thought.text) == ("", "think, unclosed")
    assert stripped(said("France.</think>Paris.", chat=True).text) == ("Paris.", "think")
    assert said("France is").text == "France is"
    # A stop text ends the answer, not the mark before it.
    assert said("a<b", chat=True, stop=("<",)).text == "<think>a"
