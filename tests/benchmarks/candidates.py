"""Measure the table that `--minutes` chooses from: the loss of each candidate after a number of steps.

    python candidates.py data/tinyshakespeare.txt
    python candidates.py data/tiny.txt --dropout 0.1 --settings '{"n_layer": 3, "n_embd": 160, "lr": 0.003}' --steps 3000 9000

The first command measures the table in npgpt/training/plan.py again. It leaves out the last row, which is published and would
take hours on a CPU. The second command measures a configuration that is not in the table. Each run prints one line of JSON: the
exact validation loss, its standard error, the milliseconds of a step. This is not a test.
"""

import argparse
import dataclasses
import json
import statistics

import npgpt
from npgpt.text.reading import read_ids
from npgpt.training.events import Evaluation, Step
from npgpt.training.plan import CANDIDATES, dropout_for


def measure(text, settings, steps, seed):
    tokenizer, ids = read_ids(text)
    of_model = {k: v for k, v in settings.items() if k in vars(npgpt.GPTConfig(1))}
    training = {k: v for k, v in settings.items() if k not in of_model}
    config = npgpt.GPTConfig(tokenizer.vocab_size, **({"dropout": 0.0} | of_model))
    shared = {"min_lr": 0.0, "patience": 0, "sample_tokens": 0, "seed": seed, "eval_tokens": 0}
    train_config = npgpt.TrainConfig(steps=steps, eval_interval=-(-steps // 8), **(shared | training))
    if "dropout" not in of_model:
        epochs = steps * train_config.batch_size * config.block_size / (len(ids) * (1 - train_config.val_fraction))
        config = dataclasses.replace(config, dropout=dropout_for(epochs, config.num_parameters()))
    data = npgpt.Dataset(ids, config.block_size, train_config.batch_size, train_config.val_fraction, seed)
    events = list(npgpt.Trainer(npgpt.GPT(config, seed=seed), tokenizer, data, train_config).run())
    evaluations = [e for e in events if isinstance(e, Evaluation)]
    best = min(evaluations, key=lambda e: e.val_loss)
    return {
        **settings,
        "dropout": config.dropout,
        "steps": steps,
        "loss": round(best.val_loss, 4),
        "stderr": round(best.val_stderr, 4),
        "best_step": best.step,
        "train_loss": round(evaluations[-1].train_loss, 4),
        "ms": round(1e3 * statistics.median(e.seconds for e in events if isinstance(e, Step)), 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--settings", type=json.loads, help="settings of one configuration as JSON (default: the table's)")
    parser.add_argument("--steps", type=int, nargs="*", help="numbers of steps (default: the table's)")
    parser.add_argument("--dropout", type=float, help="dropout (default: the configuration's, or what --minutes takes)")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    rows = [(c.settings, args.steps or [steps for steps, _ in c.reached]) for c in CANDIDATES[:-1]]
    if args.settings:
        rows = [(args.settings, args.steps or [1000])]
    for settings, numbers in rows:
        for steps in numbers:
            changed = settings if args.dropout is None else settings | {"dropout": args.dropout}
            print(json.dumps(measure(args.text, changed, steps, args.seed)), flush=True)


if __name__ == "__main__":
    main()
