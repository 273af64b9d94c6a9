"""A table of all exact values, recomputed, beside those of the second method. Run as

python -m tests.suite.check [names ...]
"""

import sys

import numpy as np

from tests.suite.catalogue import MODELS
from tests.suite.exact import EXACT
from tests.suite.second import SECOND


def main():
    names = sys.argv[1:] or MODELS
    print(f"{'name':<24} {'stated':>10} {'exact':>10} {'error':>8} {'second':>10} {'error':>8} {'z':>6}")
    for name in names:
        (exact, error), (second, second_error) = EXACT[name](), SECOND[name]()
        both = np.hypot(error, second_error)
        score = (second - exact) / both if both > 0 else 0.0
        print(
            f"{name:<24} {MODELS[name].exact:>10.5f} {exact:>10.5f} {error:>8.5f} {second:>10.5f} {second_error:>8.5f} "
            f"{score:>6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
