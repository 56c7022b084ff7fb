"""What the scripts at the root refuse, and where they work."""

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
