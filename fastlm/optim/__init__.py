"""Optimizers with torch.optim's names, arguments and state."""

from fastlm.optim.adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
