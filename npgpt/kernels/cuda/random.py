"""Random numbers on a GPU, as the kernels get them. The generator itself is in common.cu."""

from __future__ import annotations

from npgpt.kernels.reference import Array


class Key:
    """Takes the place of a random generator on a GPU.

    A random number is a function of the key, of the number of earlier uses and of the element's index. So a backward pass
    can draw the numbers of its forward pass again. See `philox` in common.cu.
    """

    def __init__(self, key: Array) -> None:
        """key: an array with one uint64, on the device. A recorded step reads it at each replay."""
        self.key, self.uses = key, 0

    def use(self) -> tuple[Array, int]:
        """The key, and a number that no other operation gets. One operation draws with both."""
        self.uses += 1
        return self.key, self.uses - 1


# The dropout arguments of a kernel that drops nothing; see `dropout_arguments`.
NO_DROPOUT: tuple[Array | None, int, int, float] = (None, 0, 0, 1.0)


def dropout_arguments(p: float, rng: Key) -> tuple[Array | None, int, int, float]:
    """(key, use, threshold, scale) for the dropout kernels: a draw below the threshold drops an element."""
    return *rng.use(), round(p * 65536), float(1 / (1 - p)) if p < 1 else 0.0
