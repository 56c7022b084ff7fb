"""What the scripts at the root refuse, and where they work."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not Path(ROOT, ".ci", "run").exists(), reason="needs a git checkout")
@pytest.mark.parametrize("name", ["lnt", "tes", ".*", ""])
def test_a_step_that_is_not_there_does_not_pass(name):
    done = subprocess.run(["bash", ROOT / ".ci" / "run", name], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"there is no step '{name}'; expected one of test lint isa ")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_works_in_a_path_with_a_space(tmp_path):
    """What its commands are, from a directory with what the targets need and nothing in it."""
    there = tmp_path / "a b"
    for name in ("csrc", "cmake", "fastlm"):
        (there / name).mkdir(parents=True)
    for name in ("pyproject.toml", "CMakeLists.txt", "constraints.txt"):
        (there / name).touch()
    for name in ("Makefile", "gpu.mk"):
        shutil.copy(ROOT / name, there)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # `make test` runs this
    tests = ["TESTS=tests/ops tests/data", "GPU_TESTS=tests/cuda tests/ops"]
    for target, wanted in {
        "demo": {f"{there}/runs/demo"},
        "bench": {f"{there}/runs/bench"},
        "test": {f"{there}", f"{there}/pyproject.toml", f"{there}/tests/ops", f"{there}/tests/data"},
        "gpu-test": {f"{there}/tests/cuda", f"{there}/tests/ops"},
        "gpu-hopper": {f"{there}/tests/cuda"},
        "gpu-build": {f"{there}/tests/cuda/versions.py"},
        "gpu-sanitize": {f"{there}/tests/cuda/sanitize.py"},
    }.items():
        command = ["make", "-n", target, *tests]
        done = subprocess.run(command, cwd=there, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        words = shlex.split(done.stdout, comments=True)
        assert {word for word in words if str(tmp_path) in word} == wanted, target
