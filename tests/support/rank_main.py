"""What mpiexec starts in tests: write this process's number into FOLDER, then run an npgpt command, or a check of MpiRanks.

python rank_main.py FOLDER train ...    or    python rank_main.py FOLDER operations
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from npgpt.cli import main
from npgpt.parallel.ranks import OtherRankError, RankError, open_ranks
from npgpt.parallel.workers import Workers


def operations(ranks):
    """Check every operation of MpiRanks against its definition."""
    size, rank = ranks.size, ranks.rank
    for dtype in (np.float32, np.float64):
        for n in (0, 1, size - 1, 1000, 1001):
            parts = [np.random.default_rng(i).standard_normal(n).astype(dtype) for i in range(size)]
            expected = parts[0].copy()
            for part in parts[1:]:
                expected += part
            array = parts[rank].copy()
            ranks.add_up(array)
            np.testing.assert_array_equal(array, expected)  # in the order of the ranks, so to the last bit
    assert ranks.gather("x" * rank) == ["x" * i for i in range(size)]
    large = ranks.broadcast({"rank": rank, "array": np.arange(1_000_000) + rank})
    assert large["rank"] == 0
    assert large["array"][-1] == 999_999
    assert ranks.together(lambda: rank) == rank
    assert ranks.on_first(lambda: rank) == 0
    with Workers(2) as workers:
        mapped = ranks.mapper(workers).map(lambda i: (i, rank), range(7))
    assert mapped == [(i, i % size) for i in range(7)]

    def fail_on_last():
        if rank == size - 1:
            raise ValueError("no")

    with pytest.raises(RankError if rank == size - 1 else OtherRankError) as caught:
        ranks.together(fail_on_last)
    if rank == size - 1:
        assert str(caught.value).startswith(f"rank {rank} on ")
        assert str(caught.value).endswith(": no")


if __name__ == "__main__":
    Path(sys.argv[1], f"rank{os.environ['PMI_RANK']}").write_text(str(os.getpid()), encoding="ascii")
    if sys.argv[2] == "operations":
        with open_ranks() as all_ranks:
            operations(all_ranks)
            if all_ranks.gather("right") == ["right"] * all_ranks.size and all_ranks.is_first:
                print(f"all operations of {all_ranks.size} ranks", flush=True)
    else:
        sys.exit(main(sys.argv[2:]))
