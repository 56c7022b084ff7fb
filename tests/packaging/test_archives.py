"""What the wheel and the source distribution hold: all that is needed, nothing else."""

import importlib.metadata
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

import fastlm
from fastlm import _native

ROOT = Path(__file__).parents[2]


def tracked():
    """The checkout's files, as git knows them."""
    done = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if done.returncode != 0 or "fastlm/_version.py" not in done.stdout.split():
        pytest.skip("needs a git checkout")
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


def test_the_wheel_holds_the_package_alone():
    if Path(fastlm.__file__).is_relative_to(ROOT / "fastlm"):
        pytest.skip("fastlm is not installed")
    files = {str(f) for f in importlib.metadata.files("fastlm") if "__pycache__" not in f.parts}
    wanted = {name for name in tracked() if name.startswith("fastlm/")}
    compiled = {f for f in files if f.endswith(".so")}
    extra = {f for f in files - wanted - compiled if ".dist-info/" not in f and not f.endswith("/bin/fastlm")}
    assert wanted <= files
    assert extra == {"fastlm/build_report.txt"}
    assert any("_cpu" in f for f in compiled) == ("cpu" not in _native.reasons)
    assert any(f.endswith(".dist-info/licenses/LICENSE") for f in files)


def test_torch_is_the_only_hard_dependency():
    if Path(fastlm.__file__).is_relative_to(ROOT / "fastlm"):
        pytest.skip("fastlm is not installed")
    assert [r for r in importlib.metadata.requires("fastlm") if "extra ==" not in r] == ["torch>=2.6"]


def test_the_source_distribution_builds_and_tests_itself():
    """FASTLM_SDIST names the archive."""
    if not os.environ.get("FASTLM_SDIST"):
        pytest.skip("FASTLM_SDIST names no archive")
    with tarfile.open(os.environ["FASTLM_SDIST"]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {name for name in tracked() if name.startswith(("csrc/", "cmake/", "fastlm/", "tests/"))}
    assert wanted | {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "constraints.txt"} <= files
    assert not [name for name in files if name.endswith((".so", ".pyc", ".o"))]
    assert files - tracked() - {"PKG-INFO", ""} == set()
