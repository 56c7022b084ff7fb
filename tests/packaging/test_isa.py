"""The instruction sets: the forced one runs, each is compiled with its own instructions, and none leaks out."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastlm import _native

ROOT = Path(__file__).parents[2]
needs_cpu = pytest.mark.skipif(_native.cpu is None, reason="fastlm._cpu was not built")


@needs_cpu
def test_the_forced_one_is_active():
    wanted = os.environ.get("FASTLM_CPU_ISA") or _native.cpu.usable_isas()[0]
    assert _native.cpu.active_isa() == wanted


@needs_cpu
@pytest.mark.parametrize("isa", _native.cpu.usable_isas() if _native.cpu is not None else [])
def test_the_environment_forces_one(isa):
    code = "from fastlm import _native; print(_native.cpu.active_isa())"
    environment = {**os.environ, "FASTLM_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [isa]


@needs_cpu
def test_an_unknown_one_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of .*baseline.*, got sse9"):
        _native.cpu.select_isa("sse9")


@needs_cpu
def test_tensors_are_read_the_way_that_was_asked_for():
    has_capsule = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    forced_off = os.environ.get("FASTLM_TEST_EXCHANGE") == "off"
    assert _native.cpu.use_exchange(True) == has_capsule
    assert _native.cpu.use_exchange(False) is False
    if not forced_off:
        _native.cpu.use_exchange(True)


# --- the objects ------------------------------------------------------------------------------------------------------
def flags_of(isa):
    """The compiler flags that CMakeLists.txt gives an instruction set."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(rf"set\(flags_{isa} (.*)\)", text)[1]
    if found == '""':
        return []
    return [f for word in found.split() for f in (flags_of(word[8:-1]) if word.startswith("${flags_") else [word])]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Each set's kernels, compiled as the build does."""
    compiler = os.environ.get("CXX") or "g++"
    if os.uname().machine != "x86_64" or not shutil.which(compiler) or not shutil.which("objdump"):
        pytest.skip("needs x86-64, a C++ compiler and objdump")
    folder = tmp_path_factory.mktemp("objects")

    def build(isa):
        target = folder / f"{isa}.o"
        source = ROOT / "csrc" / "cpu" / "simd" / "kernels.cpp"
        options = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-w"]
        options.append("-fno-exceptions")
        command = [compiler, "-c", source, "-o", target, f"-DFASTLM_ISA={isa}", *options, *flags_of(isa)]
        subprocess.run(command, check=True, capture_output=True)
        return target

    isas = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(isas, pool.map(build, isas), strict=True))


def disassembled(path):
    return subprocess.run(["objdump", "-d", path], check=True, capture_output=True, text=True).stdout


def test_each_set_has_its_instructions_and_no_better_ones(objects):
    marks = {"avx2": r"%ymm\d", "avx512": r"%zmm\d", "avx512bf16": r"\bvcvtne2ps2bf16\b", "amx": r"\btdpbf16ps\b"}
    order = ["baseline", *marks]  # rising
    for isa, path in objects.items():
        code = disassembled(path)
        for mark, pattern in marks.items():
            expected = order.index(mark) <= order.index(isa)
            assert bool(re.search(pattern, code)) == expected, f"{pattern} in {isa}"
    assert re.search(r"\bvfmadd\w+ps\b", disassembled(objects["avx2"]))


@pytest.mark.parametrize(("isa", "instruction"), [("avx512bf16", "vdpbf16ps"), ("amx", "tdpbf16ps")])
def test_the_bf16_kernels_multiply_in_bf16(objects, isa, instruction):
    """More than the peak measurement's own loop holds the instruction."""
    code = disassembled(objects[isa])
    functions = {name for name, body in re.findall(r"<([^>]+)>:\n((?:.+\n)+)", code) if instruction in body}
    assert [name for name in functions if "dot_bf16_rounds" not in name]


def test_the_sets_share_no_function(objects):
    """A weak symbol could become the one copy that every machine runs."""
    for isa, path in objects.items():
        listed = subprocess.run(["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True).stdout
        symbols = re.findall(r"^\S+ ([A-Za-z]) (.+)$", listed, flags=re.M)
        assert not [name for kind, name in symbols if kind in "WwVvu"], isa
        exported = [name for kind, name in symbols if kind in "TDRB"]
        assert exported == [f"fastlm::cpu::{isa}::kTable"]


@needs_cpu
def test_the_module_exports_its_init_function_alone():
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    command = ["nm", "-DC", "--defined-only", _native.cpu.__file__]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = [line.split(maxsplit=2)[2] for line in listed.splitlines()]
    assert "PyInit__cpu" in names
    assert not [name for name in names if "fastlm" in name or "pybind11" in name]
