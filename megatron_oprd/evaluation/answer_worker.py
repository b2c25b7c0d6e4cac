"""The helper process that compares answers with math-verify. `math_answer.py` runs this script; nothing imports it.

Protocol: the helper prints `ready`. Then it reads one JSON list [ground_truth, answer] a line and answers each
line with `1` (equal) or `0`. Every rank of a training run may start a helper: this file imports nothing of this
package.
"""

import contextlib
import dataclasses
import json
import logging
import resource
import sys

MEMORY_BYTES = 4 << 30  # limit of the helper's address space


def main() -> None:
    """Compare the answers of each input line until the input ends."""
    with contextlib.suppress(ValueError, OSError):  # not every system supports the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.WARNING)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # math-verify takes t, c and other letters after a number for units: 2x+3t would equal 2x+3.
    latex = LatexExtractionConfig()
    latex = dataclasses.replace(
        latex, normalization_config=dataclasses.replace(latex.normalization_config, units=False)
    )

    def parsed(text: str) -> list[object]:
        return parse(f"${text}$", [latex, ExprExtractionConfig()])

    replies, sys.stdout = sys.stdout, sys.stderr  # a parser's own prints must not look like replies
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        ground_truth, answer = json.loads(line)
        try:
            # A right answer with a square bracket is an interval: then 1 < x <= 2 may stand for (1,2].
            is_interval = not {"[", "]"}.isdisjoint(ground_truth)
            correct = verify(parsed(ground_truth), parsed(answer), allow_set_relation_comp=is_interval)
        except Exception:  # text that breaks the parser is not a correct answer
            correct = False
        print(int(bool(correct)), file=replies, flush=True)


if __name__ == "__main__":
    main()
