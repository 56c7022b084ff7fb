"""Imports go down the layers only; read from the sources."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastlm"
# Each part of the package, and the parts that it may import besides itself.
OPS = {"ops", "_library", "_activations", "_checks", "_dropout", "_rounding", "_attention", "_version"}
MODELS = {"nn", *OPS}
MAY_IMPORT = {
    "_version": set(),
    "_activations": set(),
    "_checks": set(),
    "_rounding": set(),
    "_eight_bit": set(),
    "_step": {"_eight_bit", "_rounding"},
    "_library": {"_checks"},
    "_native": set(),
    "_attention": set(),
    "_imports": set(),
    "_flops": {"_library"},
    "_sharding": {"_library"},
    "_dropout": {"_library"},
    "kernels": {"_library", "_native", "_activations", "_dropout", "_eight_bit", "_rounding", "_attention", "_version"},
    "ops": {"_library", "_activations", "_checks", "_dropout", "_rounding", "_eight_bit", "_step", "_attention"},
    "compat": OPS,
    "nn": OPS,
    "models": MODELS,
    "optim": {"_eight_bit", *MODELS},
    "data": MODELS,
    "integrations": MODELS,
    "train": {"models", "optim", "data", "integrations", "_native", *MODELS},
    # Beside train, which it measures; the package itself for the public functions.
    "benchmarks": {"", "train", "models", "optim", "data", "integrations", "_native", *MODELS},
    "cli": {"", "train", "benchmarks", "models", "optim", "data", "integrations", "_native", *MODELS},
    # __init__.py: ops and kernels meet
    "": {
        "_flops",
        "_imports",
        "_sharding",
        "compat",
        "_library",
        "_native",
        "_version",
        "ops",
        "optim",
        "nn",
        "models",
        "integrations",
    },
}
OPTIONAL = {"numpy", "tokenizers", "safetensors", "tyro", "rich", "matplotlib", "triton", "liger_kernel"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    relative = path.relative_to(PACKAGE)
    if len(relative.parts) > 1:
        return relative.parts[0]
    return "" if relative.stem == "__init__" else relative.stem


def imports(path):
    """Every module that a file imports, at any depth, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "fastlm":  # `from fastlm import data` names a part where there is one
                for alias in node.names:
                    found = (PACKAGE / alias.name).exists() or (PACKAGE / f"{alias.name}.py").exists()
                    yield f"fastlm.{alias.name}" if found else "fastlm"
            else:
                yield node.module


def test_every_part_has_its_place():
    assert {part_of(path) for path in FILES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    part = part_of(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "fastlm":
            target = rest.partition(".")[0]
            assert target == part or target in MAY_IMPORT[part], f"{part or '__init__'} must not import {name}"
        else:
            assert top in sys.stdlib_module_names or top == "torch" or top in OPTIONAL, f"undeclared dependency {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda path: path.name)
def test_ops_do_not_know_each_other(path):
    own = f"fastlm.ops.{path.stem}"
    assert not [name for name in imports(path) if name.startswith("fastlm.ops") and name != own]


def test_simd_sources_include_plain_headers_only():
    """Whatever is compiled with AVX-512 must not become the copy of a function that a lesser machine runs."""
    plain = {"cstdint", "cstddef", "cstring", "cmath", "cfloat", "climits", "type_traits", "immintrin.h", "arm_neon.h"}
    plain.add("amx_in_software.h")  # of tests/kernels/amx, where it is asked for
    simd = ROOT / "csrc" / "cpu" / "simd"
    files = sorted(simd.iterdir())
    assert files
    for path in files:
        for line in path.read_text().splitlines():
            if not line.startswith("#include"):
                continue
            kind, name = line.split()[1][0], line.split()[1].strip('<>"')
            own = kind == '"' and ((simd / name).exists() or name in ("../../dtype.h", "../../optimizer_item.h"))
            assert own or name in plain, f"{path.name} includes {name}"
