"""The estimate of the memory that training needs."""

import dataclasses

from npgpt import GPTConfig, TrainConfig
from npgpt.training.memory import estimate_memory


def test_memory_estimate_grows_with_every_dimension():
    base = {"vocab_size": 65, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 64}
    config = TrainConfig(micro_batch=8, threads=1)
    small = estimate_memory(GPTConfig(**base), config)
    assert estimate_memory(GPTConfig(**base), dataclasses.replace(config, micro_batch=16)) > 1.5 * small
    assert estimate_memory(GPTConfig(**base), dataclasses.replace(config, threads=2)) > 1.5 * small
    for name in base:
        assert estimate_memory(GPTConfig(**base | {name: 2 * base[name]}), config) > small, name
