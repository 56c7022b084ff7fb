"""Models assembled from stock torch modules and fastlm's ops."""

from fastlm.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
