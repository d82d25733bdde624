"""Small models for tests."""

import numpy as np

from npgpt import GPT, CharTokenizer, GPTConfig


def model_with_clear_logits(tokenizer: CharTokenizer, **options) -> GPT:
    """A tiny GPT whose logits differ clearly, as those of a new model do not."""
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8, **options), seed=1)
    rng = np.random.default_rng(0)
    for p in model.parameters():
        p.data[...] += rng.standard_normal(p.shape)
    return model
