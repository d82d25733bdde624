"""npgpt: a GPT built from NumPy, with its own automatic differentiation.

The package reads from the bottom up: kernels (what each operation computes, there and back) and backend
(where), tensor and ops (the engine) with gradcheck beside them, nn and optim, config, gpt (the model),
tokenizer and data, checkpoint, parallel (a step on worker threads), evaluate, generate and train, and the
command line on top.
"""

from npgpt import ops
from npgpt.backend import Stream
from npgpt.checkpoint import Checkpoint, CheckpointError, load, save
from npgpt.config import GenerateConfig, GPTConfig, RequestError, TrainConfig
from npgpt.data import Dataset, read_text
from npgpt.evaluate import evaluate
from npgpt.generate import generate
from npgpt.gpt import GPT
from npgpt.gradcheck import GradientError, gradcheck
from npgpt.optim import AdamW, clip_grad_norm, learning_rate
from npgpt.tensor import Tensor, no_grad
from npgpt.tokenizer import CharTokenizer
from npgpt.train import Trainer

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "AdamW",
    "CharTokenizer",
    "Checkpoint",
    "CheckpointError",
    "Dataset",
    "GPTConfig",
    "GenerateConfig",
    "GradientError",
    "RequestError",
    "Stream",
    "Tensor",
    "TrainConfig",
    "Trainer",
    "clip_grad_norm",
    "evaluate",
    "generate",
    "gradcheck",
    "learning_rate",
    "load",
    "no_grad",
    "ops",
    "read_text",
    "save",
]
