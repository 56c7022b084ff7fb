"""Random calls of every CUDA kernel against its definition in float64, the same ones in every run.

FASTLM_FUZZ_CASES says how many of each op (10 emulated and 50 on a GPU, if not given), FASTLM_FUZZ_SEED which. A
failure names the cases by their parameters; tensors follow from shapes and seeds.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import test_kernels
import torch
from attention_cases import OPTIONS, draw, option_case, scattered
from cuda_testing import Kernels
from test_kernels import (
    ELEMENTWISE,
    FLOATS,
    NOTHING_MORE,
    STEP_DTYPES,
    TOLERANCE,
    adam_lists,
    assert_close,
    assert_no_worse,
    check_adam,
    check_adam_8bit,
    check_cross_entropy,
    check_decode,
    check_elementwise,
    check_embedding,
    check_glu,
    check_linear_act,
    check_linear_cross_entropy,
    check_norm,
    check_rope,
    check_sgd,
    counted,
    extras_of,
    laid_out,
)
from torch import Tensor

from fastlm._activations import ACTIVATIONS
from fastlm.ops.attention import attention_backward_reference, attention_reference
from fastlm.ops.dropout import dropout_reference

SEED = os.environ.get("FASTLM_FUZZ_SEED", "0")
LAYOUTS = ["plain", "plain", "bthd", "bthd", "misaligned", "columns"]


def fuzz(
    kernels: Kernels, name: str, plan: Callable[[random.Random, int], Any], check: Callable[[Any], object]
) -> None:
    """check(plan(...)) of every case; what the failing ones were."""
    count = int(os.environ.get("FASTLM_FUZZ_CASES") or (10 if kernels.emulated else 50))
    longest = 130 if kernels.emulated else 400  # of lengths: products on the CPU take their time
    failures = []
    for i in range(count):
        planned = plan(random.Random(f"{name} {i} {SEED}"), longest)
        try:
            check(planned)
        except Exception as error:  # the next cases tell whether it is one of a kind
            failures.append(f"case {i}: {planned}\n    {type(error).__name__}: {str(error).splitlines()[0]}")
    assert not failures, f"{len(failures)} of {count} cases of {name} fail:\n" + "\n".join(failures[:10])


def length(rng: random.Random, longest: int) -> int:
    """Most likely where tiles begin and end."""
    edge = rng.choice([16, 64, 128, 256]) + rng.choice([-1, 0, 1])
    return min(longest, rng.choice([0, 1, rng.randint(1, 8), edge, edge, *(rng.randint(1, longest) for _ in range(5))]))


def head_dim(rng: random.Random) -> int:
    return rng.choice([1, 8, 32, 64, 64, 96, 128, 128, 192, 256, *(rng.randint(1, 256) for _ in range(5))])


def ends(rng: random.Random, total: int, sequences: int) -> list[int]:
    return [0, *sorted(rng.randint(0, total) for _ in range(sequences - 1)), total]


# --- attention --------------------------------------------------------------------------------------------------------
class Strided:
    """The kernels, which get their inputs in memory layouts that a case names for each of q, k, v and do."""

    def __init__(self, kernels: Kernels, layouts: list[str]):
        self.kernels, self.device = kernels, kernels.device
        self.layouts = layouts

    def __getitem__(self, op: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            args = list(args)
            for i, layout in zip([2, 3, 4, 0] if op == "attention_backward" else [0, 1, 2], self.layouts, strict=False):
                args[i] = laid_out(args[i], layout, self.device)
            return self.kernels[op](*args)

        return run


def plan_attention(rng: random.Random, longest: int, plain: float) -> dict[str, Any]:
    """plain: how often a call has no more options than a mask by positions, and packed sequences."""
    heads_k, batch = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 1, 2, 2, 3])
    heads = heads_k * rng.choice([1, 1, 2, 4])
    q_len, k_len = length(rng, longest), length(rng, longest)
    if rng.random() < 0.5:  # the diagonal beside a tile's corner
        k_len = min(max(q_len + rng.choice([-64, 0, 0, 64]) + rng.choice([-2, -1, 0, 0, 1, 2]), 0), longest)
    if batch * heads * q_len * k_len > 2**19:
        batch, heads, heads_k = 1, max(1, heads // heads_k), 1
    if rng.random() < 0.03:
        batch = 0
    width = head_dim(rng)
    planned = {
        "dtype": rng.choice(list(TOLERANCE)),
        "width": width,
        "width_v": width if rng.random() < 0.7 else head_dim(rng),
        "layouts": [rng.choice(LAYOUTS) for _ in range(4)],
        "causal": rng.choice([0, 1, 1, 2]),
        "deterministic": rng.random() < 0.7,
    }
    if rng.random() < 0.4:
        planned["window"] = tuple(rng.choice([-1, 0, length(rng, longest)]) for _ in range(2))
    if rng.random() < 0.25:
        batch, sequences = 1, rng.randint(1, 6)
        planned["cu_seqlens_q"], planned["cu_seqlens_k"] = ends(rng, q_len, sequences), ends(rng, k_len, sequences)
    planned["sizes"] = batch, heads, heads_k, q_len, k_len
    if rng.random() < plain:
        return planned
    scores = (batch, heads, q_len, k_len)
    chosen = {name for name in ("mask", "bias", "alibi_slopes", "sinks", "softcap", "dropout_p") if rng.random() < 0.35}
    for name in chosen & {"mask", "bias"}:  # each dimension, or one for all of it; or none of the first ones
        shape = tuple(n if rng.random() < 0.7 else 1 for n in scores)
        planned[name] = shape[rng.choice([0, 0, 1, 2]) :]
    if "bias" in chosen:
        planned["bias_kind"] = rng.choice(["float32", "float16", "bfloat16", "hides"])
    if "alibi_slopes" in chosen:
        planned["alibi_slopes"] = rng.choice([(heads,), (batch, heads)])
    if "sinks" in chosen:
        planned["sinks"] = (heads,)
    if "softcap" in chosen:
        planned["softcap"] = rng.choice([0.5, 2.0, 30.0])
    if "dropout_p" in chosen:
        planned["dropout_p"], planned["seed"] = rng.choice([0.1, 0.5]), rng.randint(-(2**63), 2**63 - 1)
    return planned


def for_hopper(rng: random.Random, planned: dict[str, Any]) -> dict[str, Any]:
    """Mostly what its kernels take."""
    if rng.random() < 0.1:
        return planned
    planned["dtype"] = rng.choice([torch.float16, torch.bfloat16])
    planned["width"], planned["width_v"] = (
        8 * rng.choice([1, 5, 8, 8, 12, 16, 16, rng.randint(1, 16)]) for _ in range(2)
    )
    planned["layouts"] = [rng.choice(["plain", "bthd", "columns"]) for _ in range(4)]
    planned["deterministic"] = rng.random() < 0.5
    return planned


def check_planned_attention(kernels: Kernels, planned: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    given = dict(planned)
    dtype, width, width_v = given.pop("dtype"), given.pop("width"), given.pop("width_v")
    layouts, kind, deterministic = given.pop("layouts"), given.pop("bias_kind", None), given.pop("deterministic")
    if "mask" in given:
        given["mask"] = scattered(*given["mask"])
    if "bias" in given:
        bias = draw(*given["bias"], seed=1)
        hidden = torch.where(scattered(*given["bias"]), bias, -torch.inf)
        given["bias"] = hidden if kind == "hides" else bias.to(getattr(torch, kind))
    if "alibi_slopes" in given:
        given["alibi_slopes"] = draw(*given["alibi_slopes"]).abs() / 8
    if "sinks" in given:
        given["sinks"] = draw(*given["sinks"])
    if "seed" in given:
        given["seed"] = torch.tensor(given["seed"])
    patch.setitem(OPTIONS, "fuzz", given)
    case, strided = option_case("fuzz", dtype, width, width_v, kernels.device), Strided(kernels, layouts)
    chosen = (*case.options[:-1], deterministic)
    plain_o, plain_lse = attention_reference(*case.qkv, *chosen)
    saved = (case.do, case.dlse, *case.qkv)
    plain = attention_backward_reference(*saved, plain_o, plain_lse, *chosen, case.wanted)

    def run() -> tuple[Tensor, ...]:
        o, lse = strided["attention"](*case.qkv, *chosen)
        return o, lse, *strided["attention_backward"](*saved, o, lse, *chosen, case.wanted)

    o, lse, *gradients = first = run()
    assert torch.equal(lse.cpu() == -torch.inf, case.lse == -torch.inf), "other rows without a key"
    assert_no_worse(o, case.o, plain_o, TOLERANCE[dtype])
    assert_no_worse(*(x.nan_to_num(neginf=0) for x in (lse, case.lse, plain_lse)), 1e-5, least=1.0)
    for i, (a, b, c) in enumerate(zip(gradients, case.gradients, plain, strict=True)):
        assert_no_worse(a, b, c, (2 if i < 3 else 4) * max(TOLERANCE[dtype], TOLERANCE[a.dtype]))
    again = run() if deterministic else run()[:2]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=False)), "another result in the second run"


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_attention_fuzz(kernels, monkeypatch, family):
    if family == "sm90" and not kernels.emulated and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("FASTLM_CUDA_FAMILY", family)
    monkeypatch.setenv("EMULATED_COMPUTE_CAPABILITY", family.removeprefix("sm"))
    forward, backward = kernels.module.attention_forward, kernels.module.attention_backward
    taken = {"forward": [], "backward": [], "in any order": []}

    def heard_forward(*args: Any) -> Any:
        taken["forward"].append(forward(*args))
        return taken["forward"][-1]

    def heard_backward(*args: Any) -> Any:
        took, dq_sums = backward(*args), args[12]
        if isinstance(took, str):  # else it was only asked
            taken["in any order" if dq_sums is not None else "backward"].append(took)
        return took

    monkeypatch.setattr(kernels.module, "attention_forward", heard_forward)
    monkeypatch.setattr(kernels.module, "attention_backward", heard_backward)

    def plan(rng: random.Random, longest: int) -> dict[str, Any]:
        if family == "sm90":
            return for_hopper(rng, plan_attention(rng, longest, 1.0))
        return plan_attention(rng, longest, 0.35)

    fuzz(kernels, f"attention {family}", plan, lambda planned: check_planned_attention(kernels, planned, monkeypatch))
    calls = len(taken["forward"])
    for name, least in {"forward": 0.6, "backward": 0.2, "in any order": 0.1}.items():
        if family == "sm90":
            assert taken[name].count("sm90") >= least * calls, f"{taken[name]} of {calls} calls"
        else:
            assert "sm90" not in taken[name]


def plan_decode(rng: random.Random, longest: int) -> tuple[torch.dtype, list[str], tuple]:
    """What a case of DECODE is, its dtype and the layouts of q and the cache."""
    heads_k, queries = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 1, 2, 5, 17])
    page = rng.choice([0, 0, 1, 7, 16, 64])
    capacity = max(1, 4 * length(rng, longest))
    capacity = -(-capacity // page) * page if page else capacity
    filled = [rng.choice([0, 1, capacity, rng.randint(0, capacity)]) for _ in range(rng.randint(1, 4))]
    given: dict[str, Any] = {}
    if rng.random() < 0.3:
        given["window_left"] = rng.randint(0, capacity)
    if rng.random() < 0.3:
        given["window_right"] = rng.choice([-1, 1, 3])
    if rng.random() < 0.3:
        given["softcap"] = rng.choice([1.5, 30.0])
    given |= {name: True for name in ("alibi_slopes", "sinks") if rng.random() < 0.3}
    width = head_dim(rng)
    widths = (width, width if rng.random() < 0.7 else head_dim(rng))
    case = (heads_k * rng.choice([1, 1, 2, 4, 8]), heads_k, queries, capacity, *widths, page, filled, given)
    return rng.choice(list(TOLERANCE)), [rng.choice(LAYOUTS) for _ in range(3)], case


def test_attention_decode_fuzz(kernels):
    def check(planned: tuple[torch.dtype, list[str], tuple]) -> None:
        dtype, layouts, case = planned
        check_decode(Strided(kernels, layouts), dtype, case)

    fuzz(kernels, "attention_decode", plan_decode, check)


# --- the others -------------------------------------------------------------------------------------------------------
def laid(kernels: Kernels, layout: str, dtype: torch.dtype, rows: int, cols: int, seed: int) -> Tensor:
    x = draw(rows, 2 * cols + 1, dtype=dtype, seed=seed).to(kernels.device)
    return {
        "plain": lambda: x, "mT": lambda: x.mT, "slice": lambda: x[:, 1::2], "expanded": lambda: x[:1].expand_as(x),
        "offset": lambda: x.flatten()[1:],
    }[layout]()  # fmt: skip


def plan_activation(rng: random.Random, longest: int) -> tuple:
    sizes = tuple(rng.choice([1, rng.randint(1, longest)]) for _ in range(2))
    layout = rng.choice(["plain", "mT", "slice", "expanded", "offset"])
    return rng.choice(list(ELEMENTWISE)), rng.choice(FLOATS), sizes, layout


def test_activation_fuzz(kernels):
    def check(planned: tuple) -> None:
        act, dtype, sizes, layout = planned
        check_elementwise(kernels, act, *(laid(kernels, layout, dtype, *sizes, seed) for seed in range(2)))

    fuzz(kernels, "activation", plan_activation, check)


def plan_glu(rng: random.Random, longest: int) -> tuple:
    sizes = (
        rng.choice([0, 1, rng.randint(1, longest)]),
        rng.choice([0, 1, rng.randint(1, 2 * longest), 8 * rng.randint(1, 99)]),
    )
    return rng.choice(list(ACTIVATIONS)), rng.choice(FLOATS), sizes, rng.choice(["plain", "halves", "mT", "misaligned"])


def test_glu_fuzz(kernels):
    def check(planned: tuple) -> None:
        act, dtype, (rows, cols), layout = planned
        both = draw(rows, 2 * cols + 1, dtype=dtype).to(kernels.device)
        dy = draw(rows, cols, dtype=dtype, seed=1).to(kernels.device)
        gate, up = both[:, :cols], both[:, cols : 2 * cols]
        if layout == "halves":
            gate, up = both[:, : 2 * cols].contiguous().chunk(2, -1)
        elif layout == "plain":
            gate, up = gate.contiguous(), up.contiguous()
        elif layout == "mT":
            gate, up, dy = gate.mT, up.mT, dy.mT
        check_glu(kernels, act, gate, up, dy)

    fuzz(kernels, "glu", plan_glu, check)


def plan_dropout(rng: random.Random, longest: int) -> tuple[torch.dtype, int, float, int]:
    n, p = rng.choice([rng.randint(0, 9), rng.randint(0, 90 * longest)]), rng.choice([0.1, 0.5, rng.random()])
    return rng.choice(FLOATS), n, p, rng.randint(-(2**63), 2**63 - 1)


def test_dropout_fuzz(kernels):
    def check(planned: tuple[torch.dtype, int, float, int]) -> None:
        dtype, n, p, seed = planned
        x = draw(n + n % 2, dtype=dtype).to(kernels.device)[n % 2 :]  # every other one misaligned
        y = kernels["dropout"](x, p, torch.tensor(seed, device=kernels.device))
        want = dropout_reference(x.cpu().double(), p, torch.tensor(seed))
        assert_close(y, want)

    fuzz(kernels, "dropout", plan_dropout, check)


def plan_bias_act(rng: random.Random, longest: int) -> tuple[str, torch.dtype, tuple[int, ...]]:
    rows = tuple(rng.choice([0, 1, 2, rng.randint(1, 60), rng.randint(1, 60)]) for _ in range(rng.randint(0, 2)))
    return rng.choice(list(ACTIVATIONS)), rng.choice(FLOATS), (*rows, rng.randint(4, 2 * longest))


def test_bias_act_fuzz(kernels):
    fuzz(kernels, "bias_act", plan_bias_act, lambda planned: test_kernels.test_bias_act(kernels, *planned))


def plan_linear_act(rng: random.Random, longest: int) -> tuple:
    sizes = tuple(rng.choice([1, rng.randint(1, longest), 8 * rng.randint(1, 16)]) for _ in range(3))
    bias, keep = rng.random() < 0.5, rng.random() < 0.8
    return rng.choice(list(ACTIVATIONS)), rng.choice(FLOATS), sizes, bias, keep, [rng.random() < 0.7 for _ in range(3)]


def test_linear_act_fuzz(kernels):
    fuzz(kernels, "linear_act", plan_linear_act, lambda planned: check_linear_act(kernels, *planned))


def plan_embedding(rng: random.Random, longest: int) -> tuple:
    """What check_embedding takes: few rows that many places name, and many rows of which few are named."""
    V, N = rng.choice([1, 2, rng.randint(1, 40), 1000]), rng.choice([1, 8, rng.randint(1, 5 * longest), 1000])
    count = rng.choice([0, 1, 32, 64, rng.randint(1, 99), rng.randint(1, 5 * longest)])
    padding = rng.choice([-1, 0, rng.randrange(V)])
    return rng.choice(FLOATS), V, N, count, rng.choice([1, 3, 9]), padding, rng.choice([0, 0, 1, 8])


def test_embedding_fuzz(kernels):
    fuzz(kernels, "embedding", plan_embedding, lambda planned: check_embedding(kernels, *planned))


def plan_norm(rng: random.Random, longest: int) -> tuple:
    """What check_norm takes after the dtype's place: sizes beside those where another kernel begins."""
    edge = rng.choice([256, 512, 1024, 2048, 4096, 8192]) + rng.randint(-9, 9)
    cols = rng.choice([rng.randint(0, 40), rng.randint(1, 700), edge])
    rows = rng.choice([0, 1, rng.randint(1, 40), rng.randint(1, 5 * longest)])
    rows = min(rows, 2**17 // max(cols, 1))
    return (
        rng.choice(FLOATS), rows, cols, *(rng.random() < 0.5 for _ in range(3)), rng.choice([0, 0, 1, 8]),
        rng.random() < 0.5,
    )  # fmt: skip


def test_norm_fuzz(kernels):
    fuzz(kernels, "norm", plan_norm, lambda planned: check_norm(kernels, *planned))


def plan_rope(rng: random.Random, longest: int) -> tuple:
    half = rng.choice([1, 4, 16, 32, 64, rng.randint(1, 100)])
    dim = 2 * half + rng.choice([0, 0, 1, 16, rng.randint(0, 60)])
    n, t, heads = (rng.choice([1, 1, rng.randint(0, 5), rng.randint(1, 20)]) for _ in range(3))
    return rng.choice(FLOATS), n, t, heads, dim, half, rng.random() < 0.5, rng.choice([0, 0, 1, 8])


def test_rope_fuzz(kernels):
    fuzz(kernels, "rope", plan_rope, lambda planned: check_rope(kernels, *planned))


def plan_cross_entropy(rng: random.Random, longest: int) -> tuple:
    classes = rng.choice([rng.randint(1, 70), rng.randint(1, 1100), rng.randint(1000, 60 * longest)])
    rows = min(rng.choice([0, 1, rng.randint(1, 9), rng.randint(1, 200)]), 1 + 2**16 // classes)
    return (
        rng.choice(FLOATS),
        rows,
        classes,
        rng.choice([0.0, 0.1, 1.0]),
        rng.choice([0.0, 3.0, 30.0]),
        rng.random() < 0.5,
    )


def test_cross_entropy_fuzz(kernels):
    fuzz(kernels, "cross_entropy", plan_cross_entropy, lambda planned: check_cross_entropy(kernels, *planned))


def plan_linear_cross_entropy(rng: random.Random, longest: int) -> tuple:
    """What check_linear_cross_entropy takes: some of the rows at a time, or all."""
    rows, cols = rng.choice([1, rng.randint(1, 400), rng.randint(1, 400)]), rng.choice([1, 8, rng.randint(1, longest)])
    classes = rng.choice([rng.randint(2, 70), rng.randint(2, 1100), 64 * rng.randint(1, 20)])
    options = (
        rng.choice([-100, 1]), rng.choice([0.0, 0.1, 1.0]), rng.choice([0.0, 1e-2]), rng.choice([0.0, 3.0, 30.0]),
        rng.random() < 0.5,
    )  # fmt: skip
    return rng.choice(FLOATS), (rows, cols, classes), rng.random() < 0.5, options, rng.choice([1, 1, 1 << 29])


def test_linear_cross_entropy_fuzz(kernels):
    fuzz(
        kernels,
        "linear_cross_entropy",
        plan_linear_cross_entropy,
        lambda planned: check_linear_cross_entropy(kernels, *planned),
    )


def plan_sizes(rng: random.Random, longest: int) -> list[int]:
    return [rng.choice([0, 1, rng.randint(1, 9), rng.randint(1, 20 * longest)]) for _ in range(rng.randint(1, 9))]


def plan_extras(rng: random.Random) -> set[str]:
    found = rng.choice([set(), set(), {"found_inf"}, {"skipped"}])
    return found | {name for name in ("l1", "masters", "emas") if rng.random() < 0.25}


def plan_adam(rng: random.Random, longest: int) -> dict[str, Any]:
    """given: lr, both betas, eps, weight_decay, decoupled, amsgrad, maximize."""
    numbers = [
        rng.choice([1e-4, 0.1]), rng.choice([0.0, 0.9]), rng.choice([0.0, 0.9, 0.999]), rng.choice([1e-8, 1e-6]),
        rng.choice([0.0, 0.1]),
    ]  # fmt: skip
    if numbers[2] == 0.0:  # divided by this gradient alone, which may be what two terms left of each other
        numbers[3] = 0.1
    dtype = rng.choice(FLOATS)
    return {
        "dtype": dtype,
        "state_dtype": rng.choice([state for of, state in STEP_DTYPES if of == dtype]),
        "sizes": plan_sizes(rng, longest),
        "given": (*numbers, *(rng.random() < 0.5 for _ in range(3))),
        "scale": rng.choice([None, 0.5]),
        "counted_on_device": rng.random() < 0.5,
        "extras": plan_extras(rng),
    }


def test_adam_fuzz(kernels):
    def check(planned: dict[str, Any]) -> None:
        lists = adam_lists(planned["dtype"], planned["sizes"], planned["given"][6])
        lists[2:5] = [[t.to(planned["state_dtype"]) for t in tensors] for tensors in lists[2:5]]
        more = extras_of(lists[0], planned["extras"], kernels.device)
        if planned["counted_on_device"] or more["found_inf"] is not None:
            lists[5] = counted(lists, kernels.device)
        scale = None if planned["scale"] is None else torch.tensor(planned["scale"], device=kernels.device)
        check_adam(kernels, lists, planned["given"], (scale, *NOTHING_MORE[1:5], *more.values(), [], []))

    fuzz(kernels, "adam", plan_adam, check)


def plan_adam_8bit(rng: random.Random, longest: int) -> dict[str, Any]:
    planned = plan_adam(rng, longest)
    *given, _, maximize = planned["given"]
    return {
        "dtype": rng.choice(FLOATS[:3]),
        "sizes": planned["sizes"],
        "options": (*given, False, maximize),
        "extras": planned["extras"],
        "scale": planned["scale"],
        "steps": rng.choice(["host", "device"]),
        "seed": rng.randint(0, 2**40),
    }


def test_adam_8bit_fuzz(kernels):
    fuzz(kernels, "adam in 8 bits", plan_adam_8bit, lambda planned: check_adam_8bit(kernels, **planned))


def plan_sgd(rng: random.Random, longest: int) -> tuple[torch.dtype, list[int], dict[str, Any]]:
    dtype, extras, momentum = rng.choice(FLOATS), plan_extras(rng), rng.choice([0.0, 0.5, 0.9])
    counts = [
        "device",
        *(["none"] if momentum == 0 else []),
        *(["host"] if not extras & {"found_inf", "skipped"} else []),
    ]
    options = {
        "state_dtype": rng.choice([state for of, state in STEP_DTYPES if of == dtype]),
        "momentum": momentum,
        "dampening": rng.choice([0.0, 0.5]),
        "weight_decay": rng.choice([0.0, 0.1]),
        "nesterov": rng.random() < 0.5,
        "maximize": rng.random() < 0.5,
        "scale": rng.choice([None, 0.5]),
        "steps": rng.choice(counts),
        "extras": extras,
    }
    return dtype, plan_sizes(rng, longest), options


def test_sgd_fuzz(kernels):
    fuzz(kernels, "sgd", plan_sgd, lambda planned: check_sgd(kernels, *planned[:2], **planned[2]))
