import pytest

from stages.evaluate.base import Request, Response
from stages.evaluate.generate import answer
from stages.evaluate.thinking import marks, opened, stripped
from stages.models.tiny import tiny_tokenizer

CASES = {
    "Paris.": ("Paris.", "none"),
    "<think>\nFrance?\n</think>\n\nParis.": ("Paris.", "think"),
    "<thinking>x</thinking>Paris": ("Paris", "think"),
    "France is meant.</think> Paris.": ("Paris.", "think"),
    "[THINK]France?[/THINK]Paris.": ("Paris.", "think"),
    "[THINK]France": ("", "think, unclosed"),
    "[think] is no tag": ("[think] is no tag", "none"),
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
    assert opened("[/INST][THINK]") == "[THINK]"
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


@pytest.mark.parametrize(("begin", "end"), [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
@pytest.mark.parametrize("opens", [False, True])
def test_marks_that_are_special_tokens_stay_and_other_special_tokens_go(begin, end, opens):
    """Also where the chat template opens the thought, so that the answer has the end alone."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [begin, end, "<|eot|>"]})
    if opens:
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "<|im_start|>assistant\n", f"<|im_start|>assistant\n{begin}")
    written = f"{'' if opens else begin}Can I?{end}Sure.<|eot|><|im_end|>"
    tokens = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "Can I?Sure."
    found = answer(tokenizer, Request("q", "Why?", max_new_tokens=99, chat=True), tokens, True)
    assert found.text == f"{begin}Can I?{end}Sure."
    assert found.tokens == (len(tokens),)
    assert stripped(found.text) == ("Sure.", "think")
    # Stop texts that are special tokens have no trace either.
    stop = Request("q", "Why?", max_new_tokens=99, stop=("<|im_end|>", "\n"))
    assert answer(tokenizer, stop, tokens, True).text == written.removesuffix("<|eot|><|im_end|>")
    plain = Request("q", "Why?", max_new_tokens=99, thoughts=False)
    assert answer(tokenizer, plain, tokens, True).text == "Can I?Sure."


def test_harmony_keeps_its_own_special_tokens_alone():
    tokenizer = tiny_tokenizer()
    names = [f"<|{name}|>" for name in ("start", "channel", "message", "end", "return", "fim")]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    written = ("<|channel|>analysis<|message|>So?<|end|><|start|>assistant<|channel|>final"
               "<|message|>Paris.")
    tokens = tokenizer(written + "<|fim|>", add_special_tokens=False)["input_ids"]
    found = answer(tokenizer, Request("q", "Why?", max_new_tokens=99), tokens, True)
    assert found.text == written and stripped(found.text) == ("Paris.", "harmony")


def test_marks_of_a_vocabulary():
    assert marks(["<think>", "</think>", "[THINK]", "a", "<|end|>"]) == {
        "<think>", "</think>", "[THINK]"}
    assert marks(["<|channel|>", "<|end|>", "<|fim|>"]) == {"<|channel|>", "<|end|>"}
    assert not marks(tiny_tokenizer().get_added_vocab())
