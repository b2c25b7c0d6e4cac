"""The number of random examples of a test, and how they are drawn.

With the environment variable MEGATRON_OPRD_FUZZ=N (ci/nightly.sh), every test draws N times as many examples and draws
others each time. It also makes a failing example smaller, which can take minutes. Without the variable the examples
are the same in every run, so that a change fails for its own mistakes only.
"""

import os

from hypothesis import HealthCheck, Phase, settings

FACTOR = int(os.environ.get("MEGATRON_OPRD_FUZZ", "1"))


def examples(count: int) -> settings:
    """Return the settings of a test that draws `count` examples in ci/run.sh."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate) if FACTOR == 1 else tuple(Phase),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
