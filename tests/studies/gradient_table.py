"""Print the table of docs/gradcheck.md: each operation's error against finite differences and against PyTorch.

    python tests/studies/gradient_table.py

The last three columns need torch. Every figure is the worst relative error over the sizes that the tests use.
"""

import importlib.util
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent)]

import numpy as np
from support import parity
from support.op_cases import CASES, GRADIENT_DIMS, PARITY_DIMS, inputs_of

from npgpt import gradcheck


def main():
    with_torch = importlib.util.find_spec("torch") is not None
    print("| operation | derivatives | finite differences | PyTorch, float64 | float32: ours | float32: PyTorch's |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        rng = np.random.default_rng(7)
        reports = [r for dims in GRADIENT_DIMS for r in gradcheck(case.fn, inputs_of(case, dims, rng))]
        row = [name, sum(r.checked for r in reports), f"{max(r.max_error for r in reports):.0e}"]
        if with_torch:
            worst = np.zeros(3)
            for dims in PARITY_DIMS:
                arrays = inputs_of(case, dims, np.random.default_rng(7))
                exact = parity.theirs(case, arrays)
                worst[0] = max(worst[0], *map(parity.relative_error, parity.ours(case, arrays), exact))
                if not name.startswith("array"):  # such a case uses a float64 array, which widens the result to float64
                    single = [a.astype(np.float32) for a in arrays]
                    exact = parity.theirs(case, [a.astype(np.float64) for a in single])
                    worst[1] = max(worst[1], *map(parity.relative_error, parity.ours(case, single), exact))
                    worst[2] = max(worst[2], *map(parity.relative_error, parity.theirs(case, single), exact))
            row += [f"{w:.0e}" if w else "0" for w in worst]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
