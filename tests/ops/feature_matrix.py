"""Writes docs/features.md, by running every feature on every backend; test_features.py compares.

    python tests/ops/feature_matrix.py > docs/features.md
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import ast
from pathlib import Path

import torch
from features import features

import fastlm
from fastlm import _library

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
HEAD = """\
# Features

What each backend does itself, forward and backward, found by running it: `tests/ops/feature_matrix.py` writes this file and
the tests compare it. What a backend does not do falls to the reference, which does all of it, on every device and in every
dtype; `fastlm.backends(op, **arguments)` tells for a call. Triton ran in its interpreter here, and CUDA is not in the table:
its kernels are those of `relu`, `relu_squared`, `bias_act` (no dropout), `attention` (causal, windows, grouped heads) and Adam.

"""
PROOFS = """
Every feature above is run by these tests, on every instruction set that the machine has:

| test | what it shows |
|---|---|
"""


def dtypes_on(backend: str, name: str) -> str:
    """The dtypes that a backend does."""
    _, call, inputs = features()[name]
    does = []
    for label, dtype in DTYPES.items():
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        try:
            with fastlm.use_backend(backend):
                torch.autograd.grad(call(*leaves).sum(), leaves)
        except NotImplementedError:
            continue
        does.append(label)
    return "all" if len(does) == len(DTYPES) else ", ".join(does) or "–"


def proofs() -> str:
    """The tests of all features, with their first sentences or names."""
    rows = []
    for file in ("test_features.py", "test_transforms.py"):
        tree = ast.parse(Path(__file__).with_name(file).read_text())
        for test in tree.body:
            if isinstance(test, ast.FunctionDef) and "name" in [a.arg for a in test.args.args] and test.name[:5] == "test_":
                said = ast.get_docstring(test) or test.name[5:].replace("_", " ")
                rows.append(f"| `{file}::{test.name}` | {said.splitlines()[0]} |")
    return "\n".join(rows) + "\n"


def matrix() -> str:
    rows = ["| feature | native, CPU | Triton |", "|---|---|---|"]
    for name in features():
        rows.append(f"| {name} | {dtypes_on('native', name)} | {dtypes_on('triton', name)} |")
    return HEAD + "\n".join(rows) + "\n" + PROOFS + proofs()


if __name__ == "__main__":
    _library._small_calls_to_torch = False
    print(matrix(), end="")
