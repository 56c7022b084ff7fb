"""Training a GPT on text: configuration, trainer, checkpoints, evaluation, samples."""

from fastlm.train.checkpoint import CheckpointError
from fastlm.train.config import PRESETS, TrainConfig
from fastlm.train.evaluation import Evaluation, evaluate
from fastlm.train.progress import ConsoleProgress, Progress
from fastlm.train.rundir import LoadedModel, load_model, ngram_baseline, open_run
from fastlm.train.sampling import stream_text
from fastlm.train.step import TrainingError
from fastlm.train.trainer import Result, resume, train

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConsoleProgress",
    "Evaluation",
    "LoadedModel",
    "Progress",
    "Result",
    "TrainConfig",
    "TrainingError",
    "evaluate",
    "load_model",
    "ngram_baseline",
    "open_run",
    "resume",
    "stream_text",
    "train",
]
