"""linear_act over forty shapes, forward and backward: none may be slower than torch's. Without torch.compile."""

from __future__ import annotations

from fastlm.benchmarks.cases._common import DTYPES
from fastlm.benchmarks.cases.linear_act import SWEEP, SWEEP_ROWS, layer_case
from fastlm.benchmarks.harness import Case


def cases(device: str, quick: bool) -> list[Case]:
    shapes = [(M, K, N) for K, N in SWEEP for M in SWEEP_ROWS][:: 20 if quick else 1]
    # Said to be quick, which leaves the compiler out.
    return [layer_case("linear_sweep", *shape, dtype, device, True, False) for dtype in DTYPES for shape in shapes]
