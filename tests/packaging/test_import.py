"""What `import fastlm` does, and what it does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm
from fastlm import _native

ROOT = Path(__file__).parents[2]


def python(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_brings_torch_and_nothing_else():
    code = "import sys, torch; before = set(sys.modules); import fastlm; print(*set(sys.modules) - before)"
    new = {name.partition(".")[0] for name in python(code)}
    assert "fastlm" in new
    assert new - set(sys.stdlib_module_names) - {"torch"} == {"fastlm"}


def test_import_initialises_no_cuda():
    assert python("import torch, fastlm; print(torch.cuda.is_initialized())") == ["False"]


def test_ops_work_without_the_extras():
    """The model and the optimizers too: an extra is needed for text, the command line and pictures only."""
    block = "import sys; sys.modules.update(dict.fromkeys(['numpy', 'tokenizers', 'safetensors', 'tyro', 'rich']))"
    run = "import torch, fastlm, fastlm.models; print(fastlm.relu(torch.ones(3)).sum().item())"
    assert python(f"{block}; {run}") == ["3.0"]


def test_version_stands_once():
    stated = re.findall(r'__version__ = "(.+)"', (ROOT / "fastlm" / "_version.py").read_text())
    assert stated == [fastlm.__version__]
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    for name in ("CMakeLists.txt", "pyproject.toml"):
        assert fastlm.__version__ not in re.sub(r"[>=]=\s*[\d.]+", "", (ROOT / name).read_text())


@pytest.mark.skipif(_native.cpu is None, reason="no compiled CPU module")
def test_an_instruction_set_that_is_not_there_is_an_error():
    """Found out in a kernel's first call, whichever that is; from inside a parallel region it would end the process."""
    code = """
import torch, fastlm
p = torch.nn.Parameter(torch.ones(1 << 20))
p.grad = torch.ones_like(p)
for call in (fastlm.optim.Adam([p]).step, lambda: fastlm.gelu(p.detach())):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "FASTLM_CPU_ISA": "mmx"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FASTLM_CPU_ISA must be one of") == done.stdout.count("got mmx") == 2


def test_missing_modules_have_reasons():
    for name in ("cpu", "cuda"):
        assert getattr(_native, name) is not None or _native.reasons[name].strip()


def test_build_report_is_lines_of_module_and_reason():
    report = Path(fastlm.__file__).with_name("build_report.txt")
    if not report.exists():
        pytest.skip("these sources are not built")
    for line in report.read_text().splitlines():
        assert re.fullmatch(r"(cpu|cuda): \S.*", line), line
    assert set(_native._build_report()) <= {"cpu", "cuda"}
