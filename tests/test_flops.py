"""What torch.utils.flop_counter says of the ops."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm import _native


def counted(call, *inputs):
    leaves = [t.detach().requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as counter:
        call(*leaves).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backend", ["auto", "reference"] + ["native"] * (_native.cpu is not None))
def test_products_are_counted_as_torch_counts_its_own(backend):
    q, k, v = torch.randn(2, 6, 40, 16), torch.randn(2, 6, 50, 16), torch.randn(2, 6, 50, 16)
    x, weight, head = torch.randn(64, 48), torch.randn(80, 48), torch.arange(64)
    scores = 2 * 6 * 40 * 50 * 2  # of one of the two products
    with fastlm.use_backend(backend):
        assert counted(fastlm.attention, q, k, v) == scores * 16 * (2 + 5)
        assert counted(lambda x, w: fastlm.linear_act(x, w), x, weight) == counted(F.linear, x, weight)
        loss = counted(lambda x, w: fastlm.linear_cross_entropy(x, w, head), x, weight)
        assert loss == counted(lambda x, w: F.cross_entropy(F.linear(x, w), head), x, weight)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            fastlm.attention_decode(q, k, v, cache_seqlens=torch.tensor([50, 3]))
        assert counter.get_total_flops() == scores * 16 * 2


@pytest.mark.parametrize("order", ["fastlm, torch.utils.flop_counter", "torch.utils.flop_counter, fastlm"])
def test_whichever_is_imported_first(order):
    code = f"""if True:
        import torch
        import {order}
        x = torch.ones(2, 2, 3, 4)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            fastlm.attention(x, x, x)
        print(counter.get_total_flops())
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) == 2 * 2 * 2 * 3 * 3 * 8


def test_looking_for_it_is_not_importing_it():
    code = """if True:
        import importlib.util, sys, fastlm, torch
        assert importlib.util.find_spec("torch.utils.flop_counter") and "torch.utils.flop_counter" not in sys.modules
        import torch.utils.flop_counter
        print(torch.ops.fastlm.attention in torch.utils.flop_counter.flop_registry, len(sys.meta_path))
        print(importlib.util.find_spec("torch.distributed.tensor") is not None)
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split()[::2] == ["True", "True"]


def test_importing_fastlm_does_not_import_it():
    code = "import sys, fastlm; print('torch.utils.flop_counter' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
