"""The data sets of the MoE-RBench assessment and its extensions, one declaration each.

A sweep names one as ``catalogue:NAME`` or ``catalogue:NAME#SPLIT``; a file of one's own is read as
one with ``source: file:PATH`` and ``format: NAME``. Counts were read off the files themselves or
off the data set's card; where neither was to be had, the count is None. A revision is a commit
where one was confirmed and otherwise a branch, which ``data list`` marks as not pinned.
"""

import difflib

from stages.data.catalogue import (
    counterfactual,
    glue,
    inference,
    safety,
    sentiment,
    text,
    toxicity,
    truthfulness,
    vision,
)
from stages.data.published import Published
from stages.errors import BadInput

CATALOGUE: dict[str, Published] = {
    **safety.SETS,
    **truthfulness.SETS,
    **inference.SETS,
    **sentiment.SETS,
    **glue.SETS,
    **counterfactual.SETS,
    **toxicity.SETS,
    **text.SETS,
    **vision.SETS,
}


def find(name: str, where: str) -> tuple[Published, str]:
    """The data set and split that ``NAME[#SPLIT]`` stands for; raises BadInput for an unknown one.

    Without a split it is the first declared one: the one that is reported.
    """
    base, _, split = name.partition("#")
    if base not in CATALOGUE:
        near = difflib.get_close_matches(base, CATALOGUE, n=1)
        hint = f"did you mean {near[0]}?" if near else "`moe-reliability data list` names them"
        raise BadInput(f"{where}: the catalogue has no data set {base!r}; {hint}")
    found = CATALOGUE[base]
    if not split:
        return found, next(iter(found.splits))
    if split not in found.splits:
        raise BadInput(
            f"{where}: {base} has no split {split!r}; name one of {', '.join(found.splits)}"
        )
    return found, split
