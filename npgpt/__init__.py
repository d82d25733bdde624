"""npgpt: a GPT built from NumPy, with its own automatic differentiation.

Each folder is a room with one subject. From the bottom up: config (settings), kernels (arithmetic on arrays), engine
(Tensors and gradients), model (the GPT), text (ids and batches), storage (checkpoints), parallel (workers), exchange
(other formats), generation, evaluation, training, report (pages), serving (HTTP), console and commands. A file imports from
its own room and from earlier rooms. The names that users need are imported here.
"""

from npgpt.config.fields import RequestError
from npgpt.config.settings import GenerateConfig, GPTConfig, TrainConfig
from npgpt.engine import ops
from npgpt.engine.gradcheck import GradientError, gradcheck
from npgpt.engine.graph import no_grad
from npgpt.engine.streams import Stream
from npgpt.engine.tensor import Tensor, record
from npgpt.evaluation.comparison import compare
from npgpt.evaluation.loss import evaluate
from npgpt.generation.generate import generate
from npgpt.model.gpt import GPT
from npgpt.model.inside import Inside, inside
from npgpt.storage.archive import CheckpointError
from npgpt.storage.checkpoint import Checkpoint, load, save
from npgpt.text.bpe import BPETokenizer
from npgpt.text.characters import CharTokenizer
from npgpt.text.dataset import Dataset
from npgpt.text.reading import read_text
from npgpt.training.events import End, Evaluation, Outcome, Step
from npgpt.training.muon import Muon
from npgpt.training.optim import AdamW, clip_grad_norm, learning_rate
from npgpt.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "AdamW",
    "BPETokenizer",
    "CharTokenizer",
    "Checkpoint",
    "CheckpointError",
    "Dataset",
    "End",
    "Evaluation",
    "GPTConfig",
    "GenerateConfig",
    "GradientError",
    "Inside",
    "Muon",
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
    "inside",
    "learning_rate",
    "load",
    "no_grad",
    "ops",
    "read_text",
    "record",
    "save",
]
