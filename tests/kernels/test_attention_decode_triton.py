"""The Triton decode kernels against the reference in float64, and beside that in the same dtype."""

import math

import pytest
import torch
from attention_cases import DECODE, decode_case
from triton_testing import DEVICE, HALVES, assert_close, compile_for_gpu

from fastlm.kernels.triton import attention_decode as kernels
from fastlm.ops.attention_decode import attention_decode_reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_values(case, dtype):
    arguments, o, lse = decode_case(case, dtype, DEVICE)
    plain, _ = attention_decode_reference(*arguments)
    got_o, got_lse = kernels.attention_decode(*arguments)
    assert (got_o.dtype, got_lse.dtype) == (dtype, torch.float32)
    assert torch.equal(got_lse.cpu() == -math.inf, lse == -math.inf)
    assert_close(got_o, o, stock=plain)
    assert_close(got_lse.nan_to_num(neginf=0), lse.nan_to_num(neginf=0), ulps=16)


def test_hidden_values_do_not_count():
    """A window hides keys of some queries, whose values are no numbers."""
    arguments, _, _ = decode_case((2, 1, 3, 40, 16, 16, 0, [40], {"window_left": 10}), torch.float32, DEVICE)
    clean = kernels.attention_decode(*arguments)
    arguments[2][:, :, 27] = math.nan  # seen by the first query alone
    o, lse = kernels.attention_decode(*arguments)
    assert o[:, :, 0].isnan().all()
    torch.testing.assert_close(o[:, :, 1:], clean[0][:, :, 1:])
    torch.testing.assert_close(lse, clean[1])


def test_nothing():
    q = torch.zeros(2, 2, 1, 16, device=DEVICE)
    cache, lens = q.new_empty(2, 2, 0, 16), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    o, lse = kernels.attention_decode(q, cache, cache, lens, None, None, None, -1, 0, 0.1, 0.0)
    assert not o.any() and (lse == -math.inf).all()
    o, lse = kernels.attention_decode(q[:0], cache[:0], cache[:0], lens[:0], None, None, None, -1, 0, 0.1, 0.0)
    assert o.shape == (0, 2, 1, 16) and lse.shape == (0, 2, 1)


CODE = """
from fastlm.kernels.triton import attention_decode as kernels
sizes = [(64, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16), (64, torch.float32), (128, torch.float32)]
for D, dtype in sizes:
    q, cache = torch.empty(2, 8, 1, D, dtype=dtype), torch.empty(9, 2, 64, D, dtype=dtype)
    lens, pages, heads = torch.tensor([5, 9]), torch.tensor([[1, 2], [3, 4]]), torch.ones(8)
    kernels.attention_decode(q, cache[:2], cache[:2], lens, None, None, None, -1, 0, 0.1, 0.0)
    kernels.attention_decode(q, cache, cache, lens, pages, heads, heads, 5, 0, 0.1, 2.0)
"""


def test_compiles_for_gpus():
    compiled = compile_for_gpu(CODE)
    assert {c["kernel"] for c in compiled} == {"attention_decode_kernel", "attention_decode_merge_kernel"}
    for c in compiled:
        what = c["kernel"], c["dtype"], c["constants"], c["architecture"]
        assert c["spilled"] == 0, what
        assert c["shared"] <= 99 * 1024, what
        if c["kernel"] == "attention_decode_kernel":
            assert ("mma" in c["ptx"]) == (c["dtype"] != "fp32") and "tf32" not in c["ptx"], what
