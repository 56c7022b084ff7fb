"""A first use of an installed fastlm, from a folder that is not the project's: smoke.py native|reference.

The argument is the backend that must do the work on the CPU.
"""

import sys
import warnings
from pathlib import Path

import torch

expected = sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastlm
    import fastlm._native

assert Path(fastlm.__file__).is_relative_to(sys.prefix), f"fastlm comes from {fastlm.__file__}, not from {sys.prefix}"
said = [str(w.message) for w in caught if "fastlm" in str(w.message)]
assert len(said) == (expected == "reference"), said
for op, statuses in fastlm.backends().items():
    best = next(s.backend for s in statuses if s.usable)
    assert best == expected, f"{op} runs on {best}, not on {expected}: {statuses}"

x = torch.randn(5, 33, requires_grad=True)
fastlm.relu(x).sum().backward()
assert torch.equal(x.grad, (x > 0).float())

q, k, v = (torch.randn(2, 4, 17, 24) for _ in range(3))
ours = fastlm.attention(q, k, v, causal=True)
torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))

weights = [torch.nn.Parameter(torch.ones(7, 9)) for _ in range(2)]
for weight, make in zip(weights, (fastlm.optim.AdamW, torch.optim.AdamW), strict=True):
    optimizer = make([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
torch.testing.assert_close(*weights)
print(f"fastlm {fastlm.__version__} on torch {torch.__version__}: all ops on {expected}", *said, sep="\n")
