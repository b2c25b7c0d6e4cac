"""A process of its own that compares answers with math-verify: run as a script by `math_answer.py`, never imported.

Protocol: it prints `ready`, then reads one JSON list [ground_truth, answer] a line and prints `1` or `0` for each.
Every rank of a training may start one, so it imports nothing of this package.
"""

import contextlib
import json
import logging
import resource
import sys

MEMORY_BYTES = 4 << 30


def main() -> None:
    with contextlib.suppress(ValueError, OSError):  # not every system can limit it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.WARNING)
    from math_verify import parse, verify

    replies, sys.stdout = sys.stdout, sys.stderr  # nothing that a parser prints may be taken for a reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        ground_truth, answer = json.loads(line)
        try:
            correct = verify(parse(f"${ground_truth}$"), parse(f"${answer}$"))
        except Exception:  # whatever a parser makes of model output, it is not a correct answer
            correct = False
        print(int(bool(correct)), file=replies, flush=True)


if __name__ == "__main__":
    main()
