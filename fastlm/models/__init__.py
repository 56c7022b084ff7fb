"""Models assembled from stock torch modules and fastlm's ops."""

from fastlm.models.gpt import GPT, Cache, GPTConfig

__all__ = ["GPT", "Cache", "GPTConfig"]
