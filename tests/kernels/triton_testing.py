"""What the tests of the Triton kernels share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm import _library

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


def reference(op, *args, dtype=None):
    """The op's reference, in plain torch, on its arguments in another floating-point dtype."""
    return _library._ops[op].reference(
        *(a.to(dtype or a.dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    )


def assert_exact(run, op, *args, ulps=4, **tolerance):
    """Each result of the kernel `run` errs at most twice as much as that of the reference in the same dtype, and a few
    ulps."""
    results = zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (
        run(*args), reference(op, *args, dtype=torch.float64), reference(op, *args)
    )), strict=True)  # fmt: skip
    for got, want, stock in results:
        assert got.dtype == stock.dtype
        if got.dtype == torch.float64:  # in which nothing is more exact
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
            continue
        assert_close(got, want, stock=stock, ulps=ulps, **tolerance)


def assert_self_checks(*families):
    """What the first call on a GPU asks of every kernel of these families."""
    checked = 0
    for op in _library.all_ops():
        if op.family in families and (found := _library._kernels.get((op.name, "triton", DEVICE))):
            assert op.mismatch(found, DEVICE) is None, op.name
            checked += 1
    assert checked >= len(families)


def assert_lean(compiled, but_for=None):
    """No register spilled, 128-bit accesses, and nothing of float64 where the tensors are not, but for one kernel. In
    float64 kernels are there for checks, not for speed."""
    for c in compiled:
        if c["dtype"] != "fp64":
            what = (c["kernel"], c["dtype"], c["architecture"], c["constants"])
            assert c["spilled"] == 0, what
            assert "ld.global.v" in c["ptx"], what
            assert ".f64" not in c["ptx"] or c["kernel"] == but_for, what


def compile_for_gpu(code, architectures=(80, 90)):
    """Compile what `code` launches for each architecture, without a GPU: a list of dicts, see compile_triton.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_triton.py")), *map(str, architectures)]
    done = subprocess.run(command, input=code, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
