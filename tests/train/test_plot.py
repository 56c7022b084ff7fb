"""loss.png: of any run, whatever its directory is called."""

import os
import warnings
from pathlib import Path

import pytest

from fastlm.train.metrics import Metrics
from fastlm.train.plot import plot_losses


@pytest.mark.parametrize("name", ["x$1^$", "$\\frac$", "損失", os.fsdecode(b"latin-\xe9"), "a_b^c{"])
def test_a_name_is_drawn_as_it_is(tmp_path, name):
    out = Path(tmp_path, name)
    try:
        out.mkdir()
    except OSError:
        pytest.skip("the file system refuses the name")
    with Metrics(out / "metrics.jsonl", keep_steps=0) as metrics:
        metrics.write(step=1, loss=2.0, bits_per_byte=2.5, learning_rate=1e-3)
        metrics.write(step=1, val_loss=2.0, val_bits_per_byte=2.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_losses(out, 2.4, 3.0).read_bytes().startswith(b"\x89PNG")
