"""The training workloads of the benchmarks: three for a CPU, one for a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    dropout: float
    vocab_size: int = 65


WORKLOADS = {
    "seed": Workload(4, 4, 256, 128, 32, 0.1),  # the defaults
    "nano": Workload(4, 4, 128, 64, 12, 0.0),  # nanoGPT's configuration for a CPU
    "char": Workload(6, 6, 384, 256, 16, 0.2),  # nanoGPT's configuration for a GPU, smaller batch
}
ON_A_GPU = {"char, batch 64": Workload(6, 6, 384, 256, 64, 0.2)}  # nanoGPT's configuration for a GPU
