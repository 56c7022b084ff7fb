"""C++ compilers that lack something: the package is built all the same, and says what is missing."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def configure(tmp_path):
    """configure(FASTLM_CPU, pattern): CMake's first step, with a compiler that fails where its arguments match."""
    pybind11 = pytest.importorskip("pybind11")
    cmake = shutil.which("cmake") or pytest.skip("needs cmake")
    real = shutil.which("c++") or pytest.skip("needs a C++ compiler")

    def run(cpu: str, pattern: str, flags: str = "") -> subprocess.CompletedProcess:
        compiler = tmp_path / "c++"
        compiler.write_text(f"""#!/bin/sh
case "$*" in {pattern}) echo "error: unknown to this compiler" >&2; exit 1;; esac
exec {real} "$@"
""")
        compiler.chmod(0o755)
        command = [cmake, "-S", ROOT, "-B", tmp_path / cpu, f"-DPython_EXECUTABLE={sys.executable}",
                   f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]  # fmt: skip
        environment = {**os.environ, "FASTLM_CPU": cpu, "FASTLM_CUDA": "OFF", "CXX": str(compiler), "CXXFLAGS": flags}
        return subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True)

    return run


def test_a_compiler_that_cannot_costs_the_cpu_module(configure, tmp_path):
    done = configure("AUTO", "*probe.cpp*")
    assert done.returncode == 0, done.stderr
    reason = f"{tmp_path / 'c++'} cannot compile it (error: unknown to this compiler)"
    assert f"cpu: {reason}\n" in (tmp_path / "AUTO" / "build_report.txt").read_text()
    done = configure("ON", "*probe.cpp*")
    assert done.returncode != 0 and f"FASTLM_CPU=ON, but {reason}" in " ".join(done.stderr.split())


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other machines have one instruction set")
def test_a_compiler_without_an_instruction_set_builds_the_others(configure, tmp_path):
    done = configure("ON", "*-mavx512bf16*")
    assert done.returncode == 0, done.stderr
    cache = (tmp_path / "ON" / "CMakeCache.txt").read_text()
    assert "FASTLM_COMPILES_avx512:INTERNAL=1" in cache and "FASTLM_COMPILES_avx512bf16:INTERNAL=1" not in cache


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other machines have one instruction set")
@pytest.mark.parametrize("flags", ["", "-march=x86-64-v3", "-march=skylake-avx512", "-mavx2"])
def test_flags_from_outside_do_not_raise_an_instruction_set(configure, tmp_path, flags):
    """Else the table for the oldest machines would hold what they cannot run."""
    assert configure("ON", "nothing", flags).returncode == 0
    macros = {"baseline": set(), "avx2": {"__AVX2__"}, "avx512": {"__AVX2__", "__AVX512F__"}}
    found = {}
    for entry in json.loads((tmp_path / "ON" / "compile_commands.json").read_text()):
        command = shlex.split(entry["command"])
        if (name := next((a.split("=")[1] for a in command if a.startswith("-DFASTLM_ISA=")), None)) in macros:
            options = [a for a in command if a.startswith("-m")]
            done = subprocess.run([command[0], *options, "-dM", "-E", "-x", "c++", os.devnull],
                                  capture_output=True, text=True, check=True)  # fmt: skip
            defined = {line.split()[1] for line in done.stdout.splitlines()}
            found[name] = defined & {"__AVX__", "__AVX2__", "__AVX512F__"} - {"__AVX__"}
            assert name != "baseline" or "__AVX__" not in defined
    assert found == macros
