"""What a model says to itself before it answers is stripped by rule, and the rule is recorded."""

import re
from collections.abc import Collection

VERSION = 3
"""Raised when any answer could be stripped otherwise, which makes written answers stale."""

HARMONY_CHANNEL = "<|channel|>"
"""Begins the name of a channel in the harmony format (gpt-oss); ``final`` is the answer."""
_FINAL = re.compile(r"<\|channel\|>final\s*(?:<\|constrain\|>\w+)?<\|message\|>")
_HARMONY_END = re.compile(r"<\|(?:return|end|call|start)\|>")
_HARMONY = re.compile(r"<\|(?:start|channel|constrain|message|end|return|call)\|>")
_OPENING, _CLOSING = (rf"(?:(?i:<{c}think(?:ing)?>)|\[{c}THINK\])" for c in ("", "/"))
_OPEN, _CLOSE = re.compile(_OPENING), re.compile(_CLOSING)
_OPEN_AT_THE_END = re.compile(_OPENING + r"\s*\Z")


def marks(vocabulary: Collection[str]) -> set[str]:
    """The tokens of a vocabulary that tell thought from answer. Some tokenizers call them special,
    and must not leave them out of an answer as they do other special tokens."""
    found = {token for token in vocabulary if _OPEN.fullmatch(token) or _CLOSE.fullmatch(token)}
    if HARMONY_CHANNEL in vocabulary:
        found |= {token for token in vocabulary if _HARMONY.fullmatch(token)}
    return found


def opened(prompt: str) -> str:
    """The mark with which a prompt opens the thought for the model, as some chat templates do;
    empty where it does not. An answer begins with it, so that it can be stripped."""
    found = _OPEN_AT_THE_END.search(prompt)
    return found[0].strip() if found else ""


def stripped(text: str) -> tuple[str, str]:
    """The answer without the thought, and the rule that found it.

    - ``none``: there is no thought.
    - ``think``: what follows the last ``</think>`` or ``[/THINK]``.
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
