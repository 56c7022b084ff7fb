"""Triton's kernels run on the GPU where there is one, else in Triton's interpreter on CPU tensors.

Triton reads TRITON_INTERPRET when it decorates a kernel, so it is set here, before any test imports one.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whichever tests ran before."""
    torch.manual_seed(0)
