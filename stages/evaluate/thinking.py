"""What a model says to itself before it answers is stripped by rule, and the rule is recorded."""

import re

VERSION = 2
"""Raised when any answer could be stripped otherwise, which makes written answers stale."""

HARMONY_CHANNEL = "<|channel|>"
"""Begins the name of a channel in the harmony format (gpt-oss); ``final`` is the answer."""
_FINAL = re.compile(r"<\|channel\|>final\s*(?:<\|constrain\|>\w+)?<\|message\|>")
_HARMONY_END = re.compile(r"<\|(?:return|end|call|start)\|>")
_OPEN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_CLOSE = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_OPEN_AT_THE_END = re.compile(r"<think(?:ing)?>\s*\Z", re.IGNORECASE)


def opened(prompt: str) -> str:
    """The mark with which a prompt opens the thought for the model, as some chat templates do;
    empty where it does not. An answer begins with it, so that it can be stripped."""
    found = _OPEN_AT_THE_END.search(prompt)
    return found[0].strip() if found else ""


def stripped(text: str) -> tuple[str, str]:
    """The answer without the thought, and the rule that found it.

    - ``none``: there is no thought.
    - ``think``: what follows the last ``</think>``.
    - ``think, unclosed``: the thought did not end, so there is no answer.
    - ``harmony``: the last message of the final channel.
    - ``harmony, no final``: there is none, so there is no answer.
    """
    if HARMONY_CHANNEL in text:
        finals = list(_FINAL.finditer(text))
        if not finals:
            return "", "harmony, no final"
        return _HARMONY_END.split(text[finals[-1].end() :])[0].strip(), "harmony"
    closed = list(_CLOSE.finditer(text))
    if closed:
        answer = text[closed[-1].end() :]
        return ("", "think, unclosed") if _OPEN.search(answer) else (answer.strip(), "think")
    opened = _OPEN.search(text)
    if opened and not text[: opened.start()].strip():
        return "", "think, unclosed"
    return text, "none"
