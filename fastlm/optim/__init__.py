"""Optimizers with torch.optim's names, arguments and state."""

from fastlm.optim.adam import Adam, AdamW
from fastlm.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
