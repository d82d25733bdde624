"""How far a logit of a text among others is from the logit of the text alone, for models of several widths.

    python tests/benchmarks/rounding.py

`generation/side_by_side.py` relies on it: ROUNDINGS must be well above the largest number in the last column.
"""

import numpy as np

import npgpt
from npgpt.generation.decode import NextLogits

MODELS = [  # n_layer, n_embd, vocab_size, position
    (4, 128, 65, "learned"),
    (4, 256, 63, "learned"),
    (6, 384, 65, "rotary"),
    (2, 512, 512, "rotary"),
    (4, 768, 4096, "learned"),
    (4, 1024, 65, "learned"),
    (2, 1024, 2000, "rotary"),
]
EPS = np.finfo(np.float32).eps


def largest_difference(model, n_texts, steps=20):
    """The largest difference of a logit over some steps, in roundings of the largest logit of its row."""
    rng, room, vocab_size = np.random.default_rng(n_texts), model.config.block_size, model.config.vocab_size
    together, largest = NextLogits(model, None, threads=1), 0.0
    texts = {k: rng.integers(0, vocab_size, rng.integers(1, room // 2)).tolist() for k in range(n_texts)}
    alone = {k: NextLogits(model, None, threads=1) for k in texts}
    for _ in range(steps):
        logits = together(texts)
        for row, k in enumerate(texts):
            own = alone[k]({0: texts[k]})[0]
            largest = max(largest, np.abs(logits[row] - own).max() / np.abs(own).max() / EPS)
            texts[k].append(int(rng.integers(0, vocab_size)))
    return largest


def main():
    print("| n_layer | n_embd | vocab_size | positions | weights | roundings | / sqrt(n_embd) |\n|---|---|---|---|---|---|---|")
    for n_layer, n_embd, vocab_size, position in MODELS:
        for weights in ("new", "with noise"):
            config = npgpt.GPTConfig(vocab_size, 64, n_layer, 4, n_embd, position=position)
            model = npgpt.GPT(config, seed=1)
            if weights != "new":
                noise = np.random.default_rng(5).standard_normal(model.num_parameters(), dtype=np.float32)
                model.parameters().data += 0.03 * noise
            roundings = max(largest_difference(model, n) for n in (3, 16, 32))
            row = (n_layer, n_embd, vocab_size, position, weights, f"{roundings:.1f}", f"{roundings / n_embd**0.5:.2f}")
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
