"""The CUDA module as it is compiled: registers, instructions, symbols, and what happens where it cannot be built."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_testing import ROOT, digest, find_nvcc, find_tool, made_once, run

ARCHITECTURES = ("sm_80", "sm_90a")
WIDTHS = (64, 96, 128, 192, 256)


def configure(folder: Path, cuda: str, **environment: str) -> subprocess.CompletedProcess:
    """CMake's first step for the CUDA module alone."""
    pybind11 = pytest.importorskip("pybind11")
    cmake = shutil.which("cmake") or pytest.skip("needs cmake")
    command = [
        cmake, "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
    ]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if k not in ("CUDAARCHS", "CUDACXX")}
    return subprocess.run(
        [str(c) for c in command],
        env={**clean, "FASTLM_CPU": "OFF", "FASTLM_CUDA": cuda, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="session")
def built() -> Path:
    """A folder with the module for ARCHITECTURES and, in ptxas.log, what the compiler said."""
    nvcc = find_nvcc()
    folder = ROOT / "build" / f"cuda-{digest(run(nvcc, '--version'), sys.version, ARCHITECTURES)}"
    log = folder / "ptxas.log"
    with made_once(folder):
        if log.exists():
            return folder
        archs = ";".join(a.removeprefix("sm_") + "-real" for a in ARCHITECTURES)
        configured = configure(folder, "ON", CUDAARCHS=archs, CUDACXX=nvcc)
        assert configured.returncode == 0, configured.stdout
        text = run("cmake", "--build", folder, "--clean-first", "--parallel", os.cpu_count() or 1, "--verbose")
        partial = folder / "partial.log"
        partial.write_text(text)
        partial.rename(log)
    return folder


@pytest.fixture(scope="session")
def module(built) -> Path:
    return next(built.glob("_cuda*.so"))


def short_name(mangled: str) -> str:
    """attention_fwd_kernel<__half, 64> and the like, without namespaces and arguments."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    plain = re.sub(r"\w+::|\(anonymous namespace\)::|^void ", "", plain)
    return re.sub(r">\(.*", ">", plain)


@pytest.fixture(scope="session")
def resources(built) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> registers and bytes spilled."""
    if shutil.which("c++filt") is None:
        pytest.skip("needs c++filt")
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*\n"
        r"ptxas info\s+: Function properties for (?P=name)\s*\n"
        r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads\s*\n"
        r"ptxas info\s+: Used (?P<registers>\d+) registers"
    )
    text = (built / "ptxas.log").read_text()
    found, matches = {}, 0
    for m in pattern.finditer(text):  # a template that two files use comes twice
        matches += 1
        name = short_name(m["name"])
        found[m["arch"], name] = {k: int(m[k]) for k in ("stack", "stores", "loads", "registers")}
    assert matches == text.count("Compiling entry function"), "some kernels were not read from the log"
    return found


def test_every_kernel_is_compiled_for_every_architecture(resources):
    names = {name for _, name in resources}
    assert {(a, n) for a in ARCHITECTURES for n in names} == set(resources)
    for t in ("__half", "__nv_bfloat16"):
        for width in WIDTHS:
            assert sum(n.startswith(f"attention_fwd_kernel<{t}, {width}, ") for n in names) == 2
            assert sum(n.startswith(f"attention_bwd_kernel<{t}, {width}, ") for n in names) == 4
    assert sum(n.startswith("attention") for n in names) <= 150


def test_nothing_is_spilled(resources):
    assert not {k: v for k, v in resources.items() if v["stores"] or v["loads"] or v["stack"]}


# --- instructions -----------------------------------------------------------------------------------------------------
def machine_code(module: Path, arch: str) -> dict[str, list[str]]:
    """Kernel -> its instructions."""
    tool = find_tool("cuobjdump")
    path = f"{Path(find_tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"
    text = run(tool, "-sass", "-arch", arch, module, env={**os.environ, "PATH": path})
    found = {}
    for section in text.split("Function : ")[1:]:
        name, _, body = section.partition("\n")
        found[short_name(name.strip())] = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body)
    return found


@pytest.fixture(scope="session")
def instructions(module) -> dict[str, list[str]]:
    return machine_code(module, "sm_80")


@pytest.mark.parametrize(
    "dtype, product", [("__half", "HMMA.16816.F32"), ("__nv_bfloat16", "HMMA.16816.F32.BF16")], ids=["fp16", "bf16"]
)
@pytest.mark.parametrize("width", WIDTHS)
def test_attention_runs_on_tensor_cores(instructions, dtype, product, width):
    kernels = {n: i for n, i in instructions.items() if re.match(rf"attention_(fwd|bwd)_kernel<{dtype}, {width}\b", n)}
    assert len(kernels) == 6  # forward, dq, dk and dv, each without terms and with them
    for name, body in kernels.items():
        # Two products of at least (16 x 16) x (16 x width) a warp in forward, three or four in backward.
        products = 2 if "fwd" in name else 3
        assert body.count(product) >= products * width // 8, name
        assert any(i.startswith("LDSM") for i in body), f"{name} does not use ldmatrix"
        assert any(i.startswith("LDGSTS") for i in body), f"{name} does not use cp.async"
        assert any(i.startswith("STG") and "128" in i for i in body), f"{name} does not write 16 bytes at a time"


def test_attention_on_hopper_uses_its_instructions(module, built):
    kernels = {n: i for n, i in machine_code(module, "sm_90a").items() if "sm90_kernel" in n}
    assert len(kernels) == 2 * 2 * 4  # dtypes, widths; forward, dq, dk and dv, all three
    for name, body in kernels.items():
        width = 64 if ", 64" in name else 128
        products = [i for i in body if i.startswith("HGMMA")]
        # In the loop and once outside of it. Forward: scores over `width`, values over 128 keys. Backward: two products
        # over `width`, one or two over 64 rows, and for all three one over `width` keys. By 16.
        sums = {"0": 4, "1": 8, "2": 8 + width // 16}
        in_loop = width // 16 + 8 if "fwd" in name else 2 * width // 16 + sums[name[name.index("(Role)") + 6]]
        assert len(products) == 2 * in_loop, name
        assert any(i.startswith("UTMALDG.4D") for i in body), f"{name} does not use the copy engine"
        assert sum(i.startswith("USETMAXREG") for i in body) == 2, f"{name} does not share registers out"
        assert not any(i.startswith("HMMA") for i in body), name
        # Masks are no branches: but for loops, waits and whether a tile is masked, elements go straight through.
        at = [i for i, instruction in enumerate(body) if instruction.startswith("HGMMA")]
        assert max(sum(i.startswith("BRA") for i in body[a:b]) for a, b in itertools.pairwise(at)) < 24, name
        if "bwd" in name:
            continue
        # The exponentials of one tile run beside the product with the values of another, not after it.
        waits = [at for at, i in enumerate(body) if i.startswith("WARPGROUP.DEPBAR")]
        assert any(body[a:b].count("MUFU.EX2") >= 64 for a, b in itertools.pairwise(waits)), name
    log = (built / "ptxas.log").read_text()
    assert "serialized" not in log and "setmaxnreg ignored" not in log


def test_float32_attention_stays_float32(instructions):
    kernels = [body for name, body in instructions.items() if name.startswith("attention_f32")]
    assert len(kernels) == 18
    for body in kernels:
        assert "FFMA" in body and not any(re.match(r"[HDIQ]?G?MMA", i) for i in body)


def test_memory_bound_kernels_access_16_bytes(instructions):
    pattern = (
        r"(act|bias_act|glu|norm|cross_entropy|embedding)_(fwd|bwd)_kernel|"
        r"(step|adam_8bit|grad_norm|dropout|mse_loss_bwd|rope)_kernel"
    )
    kernels = {n: b for n, b in instructions.items() if re.match(pattern, n)}
    # The activation is an argument. Steps: dtypes of parameter and state, Adam's with extras and without, and SGD's; of
    # 8 bits those of the parameter. Norms: dtypes, lengths of rows, both ways. Losses: likewise, and capped.
    assert len(kernels) == 36 + 7 * 3 + 3 + 4 * 4 * 2 + 4 * 3 * 2 * 2 + 4 * 2 + 4
    for name, body in kernels.items():
        assert any(i.startswith("LDG") and "128" in i for i in body), name
        if not name.startswith(("cross_entropy_fwd", "grad_norm")):  # which write two numbers a row, one a block
            assert any(i.startswith("STG") and "128" in i for i in body), name


# --- the module -------------------------------------------------------------------------------------------------------
def test_module_brings_its_runtime_and_shows_none_of_it(module):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", module))
    assert not [n for n in needed if "cuda" in n or "torch" in n or "nvrtc" in n], needed
    exported = run("nm", "-D", "--defined-only", module).split()
    assert "PyInit__cuda" in exported
    assert not [s for s in exported if re.match(r"(cu[A-Z]|cuda[A-Z]|__cuda)", s)]


def test_module_imports_and_says_whether_it_can_run(module):
    code = """
import _cuda
assert _cuda.runtime_version() >= 12000
problem = _cuda.driver_problem()
if _cuda.driver_version() == 0:
    assert problem == "no CUDA driver is installed on this machine", problem
else:
    assert (problem is None) == (_cuda.driver_version() // 1000 >= _cuda.runtime_version() // 1000), problem
"""
    run(sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": str(module.parent)})


# --- where it cannot be built -----------------------------------------------------------------------------------------
def report(folder: Path) -> str:
    return dict(line.split(": ", 1) for line in (folder / "build_report.txt").read_text().splitlines())["cuda"]


def test_switched_off(tmp_path):
    assert configure(tmp_path, "OFF").returncode == 0
    assert report(tmp_path) == "switched off by FASTLM_CUDA=OFF"


@pytest.mark.parametrize("broken", ["missing", "failing", "too old", "without headers"])
def test_no_usable_compiler_costs_only_cuda(tmp_path, broken):
    nvcc = tmp_path / "bin" / "nvcc"
    expected = "no working CUDA compiler"
    if broken != "missing":
        nvcc.parent.mkdir()
        if broken == "failing":
            nvcc.write_text("#!/bin/sh\nexit 1\n")
        elif broken == "too old":
            nvcc.write_text(
                f'#!/bin/sh\n[ "$*" = --version ] && echo "release 11.8, V11.8.89" && exit\nexec {find_nvcc()} "$@"\n'
            )
            expected = "CUDA 12.0 or newer is needed to build it"
        else:
            error = "fatal error: nv/target: No such file or directory"
            nvcc.write_text(
                f'#!/bin/sh\ncase "$*" in *probe.cu*) echo "{error}" >&2; exit 1;; esac\nexec {find_nvcc()} "$@"\n'
            )
            expected = f"{nvcc} cannot compile it ({error})"
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    auto = configure(tmp_path / "auto", "AUTO", CUDACXX=str(nvcc))
    assert auto.returncode == 0, auto.stdout
    assert expected in report(tmp_path / "auto")
    on = configure(tmp_path / "on", "ON", CUDACXX=str(nvcc))
    assert on.returncode != 0 and f"FASTLM_CUDA=ON, but {expected.split()[0]}" in " ".join(on.stdout.split())
