"""What the tests of the Triton kernels share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
# bfloat16 arithmetic and rounding are not right in the interpreter.
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
# Not multiples of any block, blocks themselves, one off a block, and nothing.
SIZES = [0, 1, 63, 64, 65, 1023, 1024, 1025, 3000]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def assert_close(got, want, *, dtype=None, ulps=4, stock=None, factor=2, cancelled=None):
    """`got` is within `factor` times the error of `stock`, plain torch in the same dtype, and a few ulps of `want`.

    `want` is float64. Without `stock`, the ulps alone are allowed. They are taken at the largest value, since sums
    cancel, or where `cancelled`, what an element is the difference of, is larger, at that.
    """
    assert got.shape == want.shape
    want = want.to(got.device)
    finite = want.isfinite()
    assert torch.equal(got.double().nan_to_num(0, 1, -1)[~finite], want.nan_to_num(0, 1, -1)[~finite])
    error = (got.double() - want)[finite].abs()
    if not error.numel():
        return
    scale = want[finite].abs().max().expand_as(error)
    if cancelled is not None:
        scale = scale.maximum(cancelled.to(got.device)[finite])
    allowed = ulps * torch.finfo(dtype or got.dtype).eps * scale
    if stock is not None:
        allowed = allowed + factor * (stock.double() - want)[finite].abs().max()
    worst = (error - allowed).argmax()
    assert error[worst] <= allowed[worst], f"off by {error[worst]:.3g}, {allowed[worst]:.3g} allowed"


def compile_for_gpu(code, architectures=(80, 90)):
    """Compile what `code` launches for each architecture, without a GPU: a list of dicts, see compile_triton.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_triton.py")), *map(str, architectures)]
    done = subprocess.run(command, input=code, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
