"""Runs every CUDA kernel once or twice on small tensors: the program that `make gpu-sanitize` watches.

Inputs are drawn on the CPU and only copied, so that what the sanitizer sees is fastlm's own.
"""

import itertools

import pytest
import torch
from attention_cases import DECODE, OPTIONS, draw, options
from cuda_testing import Kernels
from test_kernels import (
    ELEMENTWISE,
    EXTRAS,
    ROPE,
    STEP_DTYPES,
    adam_lists,
    check_adam_8bit,
    check_attention,
    check_cross_entropy,
    check_decode,
    check_embedding,
    check_linear_act,
    check_linear_cross_entropy,
    check_norm,
    check_options,
    check_rope,
    counted,
    extras_of,
    on,
    sgd_args,
)

from fastlm._activations import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADAM = (0.1, 0.9, 0.99, 1e-6, 0.1, True, True, False)


def check_steps(kernels: Kernels, dtype: torch.dtype) -> None:
    """Dense and strided, plain and with all that a step may do, with states of each dtype."""
    device, sizes = kernels.device, [1, 63, 4099]
    for state_dtype in [state for of, state in STEP_DTYPES if of == dtype]:
        for extras, steps in ((set(), "host"), (EXTRAS[-1], "device")):
            lists = adam_lists(dtype, sizes, True)
            lists[2:5] = [[t.to(state_dtype) for t in tensors] for tensors in lists[2:5]]
            more = extras_of(lists[0], extras, device)
            if steps == "device":
                lists[5] = counted(lists, device)
            scale, random = torch.ones((), device=device), not more["masters"]
            more = (scale, True, None, random, 1, *more.values(), [], [])
            for given in (lists, [apart(tensors) for tensors in lists]):
                kernels["adam_"](*on(device, given), *ADAM, *on(device, more))
            of_sgd = sgd_args(dtype, sizes, device, state_dtype=state_dtype, steps=steps, extras=extras)
            for given in (of_sgd, [apart(x) for x in of_sgd]):
                kernels["sgd_"](*on(device, given))
    if dtype != torch.float64:
        for extras in (set(), EXTRAS[-1]):
            check_adam_8bit(kernels, dtype, sizes, (*ADAM[:6], False, False), extras)
    kernels["grad_norm"](on(device, lists[1]))


def apart(x):
    """Tensors with gaps between their elements."""
    return [torch.stack([t, t], 1)[:, 0] if t.dim() > 0 else t for t in x] if isinstance(x, list) else x


def run_every_kernel(kernels: Kernels) -> None:
    device = kernels.device
    for dtype in (*DTYPES, torch.float64):
        for n, offset in ((1, 0), (4099, 0), (4099, 1)):
            x, dy = (draw(n + offset, dtype=dtype, seed=i).to(device)[offset:] for i in range(2))
            for op, more in ELEMENTWISE.values():
                kernels[f"{op}_backward"](dy, kernels[op](x, *more), *more)
            kernels["dropout"](x, 0.3, torch.tensor(7, device=device))
            kernels["mse_loss_backward"](kernels["mse_loss"](x, dy), x, dy)
        for rows, cols in ((130, 72), (130, 71)):
            x, dy, bias = (draw(*size, dtype=dtype).to(device) for size in ((rows, cols), (rows, cols), (cols,)))
            for act in ACTIVATIONS:
                kernels["bias_act"](x, bias, act, 0.0, None)
                kernels["bias_act_backward"](dy, x, bias, act)
                gate, up = x[:, : cols // 2], x[:, cols // 2 :][:, : cols // 2]  # rows of a product's halves
                kernels["glu"](gate, up, act)
                kernels["glu_backward"](dy[:, 1 : 1 + cols // 2], gate, up, act)
        for rows, cols, offset in ((20, 72, 0), (5, 1000, 1), (3, 3000, 0), (2, 9001, 0)):
            check_norm(kernels, dtype, rows, cols, True, True, True, offset)
        for case in ROPE:
            check_rope(kernels, dtype, *case)
        for rows, classes in ((20, 65), (3, 2001)):
            check_cross_entropy(kernels, dtype, rows, classes, 0.1, 5.0, True)
        check_linear_cross_entropy(kernels, dtype, (150, 16, 65))
        check_linear_act(kernels, "gelu", dtype, (40, 16, 65))
        for case in ((3, 72, 100, 1, -1, 0), (50, 71, 40, 3, 0, 1)):
            check_embedding(kernels, dtype, *case)
        check_steps(kernels, dtype)
    for dtype in DTYPES:
        for width in (64, 96, 111, 192, 256):
            q, do = (draw(1, 2, 70, width, dtype=dtype, seed=i).to(device) for i in range(2))
            k, v = (draw(1, 1, 90, width, dtype=dtype, seed=i).to(device) for i in range(2, 4))
            dlse = draw(1, 2, 70).to(device)
            for causal, window in ((1, (-1, -1)), (0, (20, 20))):
                chosen = options(causal, window, 0.1)
                o, lse = kernels["attention"](q, k, v, *chosen)
                kernels["attention_backward"](do, dlse, q, k, v, o, lse, *chosen, [True] * 3 + [False] * 3)
            v[:, :, 80] = torch.inf  # the slow path around hidden values
            o, lse = kernels["attention"](q, k, v, *options(1, scale=0.1))
        for name in OPTIONS:
            check_options(kernels, dtype, 40, 64, name)
        check_options(kernels, dtype, 128, 128, "all")
        for case in DECODE:
            check_decode(kernels, dtype, case)


def run_hoppers_kernels(kernels: Kernels) -> None:
    """Where they can run; elsewhere the others once more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLM_CUDA_FAMILY", "sm90")
        for dtype, width in itertools.product(DTYPES[1:], (40, 128)):
            for deterministic in (True, False):
                case = (1, 2, 1, 150, 200, width, width, 1, (-1, -1), "plain")
                check_attention(kernels, dtype, case, deterministic=deterministic)
                check_options(kernels, dtype, width, width, "packed", deterministic)


if __name__ == "__main__":
    for run in (run_every_kernel, run_hoppers_kernels):
        run(Kernels("gpu"))
        torch.cuda.synchronize()
        print(f"{run.__name__} did", flush=True)
