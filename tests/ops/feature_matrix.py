"""Writes docs/features.md, by running every feature on every backend; test_features.py compares.

python tests/ops/feature_matrix.py > docs/features.md
"""

import ast
import contextlib
import os
from pathlib import Path

import torch
from features import features

import fastlm
from fastlm import _library

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
HEAD = """\
# Features

What each backend does itself, forward and backward, found by running it: `tests/ops/feature_matrix.py` writes this
file and the tests compare it ("forward": the gradient is the reference's). What a backend does not do falls to the
reference, which does all of it, on every device and in every dtype; `fastlm.backends(op, **arguments)` tells for a
call. Triton ran in its interpreter here (its `linear_cross_entropy` takes 16 bits on a GPU), and CUDA is not in the
table: its kernels are those of the activations, `glu`, `bias_act`, `dropout`, the norms, `rope` without interleaved
pairs, `embedding`, `linear_act`, `cross_entropy` and `linear_cross_entropy` with classes as targets, `mse_loss`,
`attention` and `attention_decode` (both with all options, without float64) and Adam.

"""
PROOFS = """
Each of them is run by these tests (those of transforms on the best instruction set that the machine has), beside the
tests of the op's own file, torch's samples and error inputs for the functions that it has too (`test_opinfo.py`),
random shapes, layouts and options (`test_properties.py`; 2,000 cases an op with `make nightly`), more than 2^31
elements (`test_past_32_bits.py`, there too), and for DTensors `test_sharding.py`:

| test | what it shows |
|---|---|
"""


def dtypes_on(backend: str, name: str) -> str:
    """The dtypes that a backend does."""
    op, call, inputs = features()[name]
    forward, both = [], []
    for label, dtype in DTYPES.items():
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        try:
            with fastlm.use_backend(backend):
                y = call(*leaves)
            forward.append(label)
            with _no_reference(op):
                torch.autograd.grad(y.sum(), leaves)
        except NotImplementedError:
            continue
        both.append(label)
    found, which = (both, "") if both else (forward, ", forward")
    return ("all" if len(found) == len(DTYPES) else ", ".join(found)) + which if found else "–"


@contextlib.contextmanager
def _no_reference(op: str):
    """A backward that would differentiate the reference raises NotImplementedError."""

    def refuse(*args):
        raise NotImplementedError

    op, reference = _library._ops[op], _library._ops[op].reference
    op.reference = refuse
    try:
        yield
    finally:
        op.reference = reference


def under_autocast(name: str) -> str:
    """The dtype of the result, by that of what is given."""
    _, call, inputs = features()[name]
    labels = {dtype: label for label, dtype in DTYPES.items()}
    found = []
    for label in ("fp32", "bf16"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(f"{label} → {labels[call(*(t.to(DTYPES[label]) for t in inputs)).dtype]}")
    return ", ".join(found)


def proofs() -> str:
    """The tests of all features, and what they say of themselves."""
    rows = []
    for file in ("test_features.py", "test_transforms.py"):
        tree = ast.parse(Path(__file__).with_name(file).read_text())
        for test in tree.body:
            if (
                isinstance(test, ast.FunctionDef)
                and "name" in [a.arg for a in test.args.args]
                and test.name[:5] == "test_"
            ):
                said = " ".join(ast.get_docstring(test).split())
                rows.append(f"| `{file}::{test.name}` | {said} |")
    return "\n".join(rows) + "\n"


def matrix() -> str:
    rows = ["| feature | native, CPU | Triton | under autocast to bf16 |", "|---|---|---|---|"]
    for name in features():
        rows.append(f"| {name} | {dtypes_on('native', name)} | {dtypes_on('triton', name)} | {under_autocast(name)} |")
    return HEAD + "\n".join(rows) + "\n" + PROOFS + proofs()


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, at the first call
    _library._small_calls_to_torch = False
    print(matrix(), end="")
