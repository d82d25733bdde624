"""npgpt: a GPT built from NumPy, with its own automatic differentiation.

The package reads from the bottom up: kernels (what each operation computes, there and back) and backend
(where), tensor and ops (the engine) with gradcheck beside them, nn and optim, config, gpt (the model),
tokenizer and data, checkpoint, parallel (a step on worker threads), evaluate, generate and train, and the
command line on top.
"""

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig, GPTConfig, TrainConfig
from npgpt.engine import ops
from npgpt.engine.gradcheck import GradientError, gradcheck
from npgpt.engine.graph import no_grad
from npgpt.engine.streams import Stream
from npgpt.engine.tensor import Tensor, record
from npgpt.evaluation.loss import compare, evaluate
from npgpt.generation.generate import generate
from npgpt.model.gpt import GPT
from npgpt.storage.checkpoint import Checkpoint, CheckpointError, load, save
from npgpt.text.characters import CharTokenizer
from npgpt.text.dataset import Dataset, read_text
from npgpt.training.optim import AdamW, clip_grad_norm, learning_rate
from npgpt.training.trainer import End, Evaluation, Outcome, Step, Trainer

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "AdamW",
    "CharTokenizer",
    "Checkpoint",
    "CheckpointError",
    "Dataset",
    "End",
    "Evaluation",
    "GPTConfig",
    "GenerateConfig",
    "GradientError",
    "Outcome",
    "RequestError",
    "Step",
    "Stream",
    "Tensor",
    "TrainConfig",
    "Trainer",
    "clip_grad_norm",
    "compare",
    "evaluate",
    "generate",
    "gradcheck",
    "learning_rate",
    "load",
    "no_grad",
    "ops",
    "read_text",
    "record",
    "save",
]
