"""fastlm under the names and layouts of other packages."""

from fastlm.compat import flash_attn

__all__ = ["flash_attn"]
