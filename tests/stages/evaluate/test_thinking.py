import pytest

from stages.evaluate.thinking import stripped

CASES = {
    "Paris.": ("Paris.", "none"),
    "<think>\nFrance?\n</think>\n\nParis.": ("Paris.", "think"),
    "<thinking>x</thinking>Paris": ("Paris", "think"),
    # The prompt of some chat templates ends with the opening mark.
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
