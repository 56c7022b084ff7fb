"""Optimizers with torch.optim's names, arguments and state, and a learning rate's course."""

from fastlm.optim.adam import Adam, AdamW
from fastlm.optim.schedule import warmup_schedule
from fastlm.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "warmup_schedule"]
