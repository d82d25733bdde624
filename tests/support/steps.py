"""A small model with dropout and a batch for it."""

import numpy as np

from npgpt import GPTConfig

CONFIG = GPTConfig(11, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.2)


def batch(rows=7):
    ids = np.random.default_rng(0).integers(0, 11, (rows, 9))
    return ids[:, :-1], ids[:, 1:]
