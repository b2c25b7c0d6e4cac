"""Mark the words of an answer that another answer does not have at the same place."""

from __future__ import annotations

from difflib import SequenceMatcher
from itertools import groupby

from megatron_oprd.report.charts import escape


def marked(text: str, reference: str) -> tuple[str, float]:
    """Return the text as HTML with the words marked that are not in `reference`, and the share of common words.

    The words in common are those of the matching blocks of `difflib`, in order. The share is twice their number
    divided by the words of both texts: 1 for equal texts.
    """
    words, others = text.split(), reference.split()
    blocks = SequenceMatcher(None, words, others, autojunk=False).get_matching_blocks()
    common = {place for block in blocks for place in range(block.a, block.a + block.size)}
    parts, rest = [], text
    for place, word in enumerate(words):
        space, rest = rest.split(word, 1)
        parts.append((place in common, space, word))
    html = []
    for is_common, group in groupby(parts, lambda part: part[0]):
        (_, first_space, first), *others_of_group = group
        inner = escape(first + "".join(space + word for _, space, word in others_of_group))
        html.append(escape(first_space) + (inner if is_common else f"<mark>{inner}</mark>"))
    total = len(words) + len(others)
    return "".join(html), 2 * len(common) / total if total else 1.0
