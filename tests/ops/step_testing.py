"""What the tests of adam_ and sgd_ share: backends, awkward layouts, and what every step refuses.

A step is a dict of the function's arguments by their names.
"""

import ast
import traceback
from pathlib import Path

import pytest
import torch
from op_testing import ISAS

import fastlm

CPU_BACKENDS = [*(f"native-{isa}" for isa in ISAS), "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
SIZES = [(0,), (), (1,), (63,), (64,), (65,), (3, 0, 2), (17, 33), (257,)]
LAYOUTS = {
    "contiguous": lambda n: torch.zeros(4, 6, 10, n),
    "transposed": lambda n: torch.zeros(n, 10, 6, 4).permute(3, 2, 1, 0),
    "channels_last": lambda n: torch.zeros(4, 6, 10, n).to(memory_format=torch.channels_last),
    "sliced": lambda n: torch.zeros(4, 12, 10, n + 5)[:, ::2, :, 2 : n + 2],
    "column": lambda n: torch.zeros(4, 6, 10, n, 3)[..., 1],
    "misaligned": lambda n: torch.zeros(4 * 6 * 10 * n + 1)[1:].view(4, 6, 10, n),
}


def with_layout(layout, n, values):
    shape = layout(n)
    storage = torch.full((shape.untyped_storage().nbytes() // 4,), 9.0).to(values.dtype)
    return storage.as_strided(shape.shape, shape.stride(), shape.storage_offset()).copy_(values)


def outside(x):
    """The elements of x's memory that are not x's."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).clone()
    storage.as_strided(x.shape, x.stride(), x.storage_offset()).zero_()
    return storage


def assert_bits_equal(got, want):
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def copied(step, dtype=None):
    """The same step on copies, all but the counts in `dtype` where that is given."""
    return {
        name: [t.clone() if dtype is None or name == "steps" else t.to(dtype, copy=True) for t in value]
        if isinstance(value, list)
        else value
        for name, value in step.items()
    }


def tensors_of(step):
    return [value for value in step.values() if isinstance(value, list)]


def take(op, step):
    op(**step)
    return step


def exactly(op, step):
    """The step in float64 by the reference; where there are masters, as that of these."""
    step = copied(step, torch.float64)
    if step.get("masters"):
        step["params"], step["masters"] = step["masters"], []
    with fastlm.use_backend("reference"):
        return take(op, step)


def assert_as_exact_as_the_reference(op, step, states):
    """Against float64: at most twice the error of the reference in the step's dtypes, and a few last digits.

    Takes the step. `states`: the names of its lists of states.
    """
    exact, plain = exactly(op, step), copied(step)
    with fastlm.use_backend("reference"):
        op(**plain)
    op(**step)
    assert_bits_equal([step["grads"]], [plain["grads"]])
    for name in ("params", *states, "emas", "masters"):
        of = "params" if name == "masters" else name
        for a, e, t in zip(step.get(name, ()), exact[of] if step.get(name) else (), plain.get(name, ()), strict=True):
            error = (t.double() - e).abs()
            allowed = 2 * torch.where(error.isfinite(), error, 0) + 4 * torch.finfo(a.dtype).eps * (1 + e.abs())
            assert a.dtype == t.dtype and ((a.double() - e).abs() <= allowed).all(), name
    if step.get("masters"):
        assert_bits_equal([step["params"]], [[m.to(p.dtype) for m, p in zip(step["masters"], step["params"])]])  # noqa: B905
    assert_bits_equal([step["steps"]], [plain["steps"]])


# --- what every step refuses ------------------------------------------------------------------------------------------
def change(name, i, tensor):
    def changed(step):
        step[name] = [*step[name]]
        step[name][i] = tensor

    return changed


def give(**values):
    return lambda step: step.update(values)


def drop(name):
    return lambda step: step.update({name: step[name][:-1]})


def repeat(step):
    step["params"][1] = step["params"][0]


def _halves(step):
    for name in ("params", "grads"):
        step[name] = [t.half() for t in step[name]]


def _states_of_half_in_bfloat16(step):
    _halves(step)
    for name in step["states"]:
        step[name] = [t.bfloat16() for t in step[name]]


def _on_meta(step):
    for name, tensors in step.items():
        if isinstance(tensors, list) and name not in ("steps", "states"):
            step[name] = [t.to("meta") for t in tensors]
    step["found_inf"] = torch.zeros((), device="meta")


def _masters_missing(step):
    _halves(step)
    step["masters"] = [torch.zeros(3)]


# (change, kind of error, its sentence) for two parameters of (3,); STATE stands for the first state's name.
BAD_STEPS = [
    (drop("grads"), ValueError, "grads must hold one tensor per parameter, 2, got 1"),
    (_masters_missing, ValueError, "masters must hold one tensor per parameter, 2, or none, got 1"),
    (give(emas=[torch.zeros(3)]), ValueError, "emas must hold one tensor per parameter, 2, or none, got 1"),
    (repeat, ValueError, "each parameter must be in params once, got one of them twice"),
    (change("grads", 0, torch.zeros(4)), ValueError, "grads[0] must have the sizes of params[0], (3,), got (4,)"),
    (
        change("params", 0, torch.zeros(3, dtype=torch.complex64)),
        TypeError,
        "params[0] must be floating point, got torch.complex64",
    ),
    (
        _states_of_half_in_bfloat16,
        TypeError,
        "STATE[0] must be of torch.float16 or torch.float32 or torch.uint8 for params[0] of torch.float16, got "
        "torch.bfloat16",
    ),
    (
        change("grads", 0, torch.zeros(3).to_sparse()),
        TypeError,
        "grads[0] must be a dense tensor, got layout torch.sparse_coo",
    ),
    (
        change("grads", 1, torch.zeros(3, dtype=torch.float64)),
        TypeError,
        "grads[1] must be of the dtype of params[1], torch.float32, got torch.float64",
    ),
    (
        give(emas=[torch.zeros(3), torch.zeros(3, dtype=torch.float16)]),
        TypeError,
        "emas[1] must be of what the step computes in, torch.float32, got torch.float16",
    ),
    (
        change("grads", 1, torch.zeros(3, device="meta")),
        ValueError,
        "grads[1] must be on the device of params[0], cpu, got meta",
    ),
    (
        change("params", 1, torch.zeros(3, device="meta")),
        ValueError,
        "params[1] must be on the device of params[0], cpu, got meta",
    ),
    (
        change("params", 1, torch.zeros(1).expand(3)),
        ValueError,
        "params[1] is written, so no two of its elements may share memory, got sizes (3,) with strides (0,)",
    ),
    (
        give(masters=[torch.zeros(3), torch.zeros(3)]),
        TypeError,
        "masters are for 16-bit parameters, got params[0] of torch.float32",
    ),
    (
        change("steps", 0, torch.tensor(1)),
        TypeError,
        "steps[0] must be one float32 or float64, got torch.int64 ()",
    ),
    (
        change("steps", 1, torch.zeros(2)),
        TypeError,
        "steps[1] must be one float32 or float64, got torch.float32 (2,)",
    ),
    (
        change("steps", 1, torch.zeros((), device="meta")),
        ValueError,
        "steps must all be on the CPU or all on the device of params[0], cpu, got steps[1] on meta and steps[0] on cpu",
    ),
    (
        give(scale=torch.ones(2)),
        ValueError,
        "scale must be one floating-point number on the device of params[0], cpu, got torch.float32 (2,) on cpu",
    ),
    (
        give(lr=torch.tensor(1)),
        ValueError,
        "lr must be one floating-point number on the device of params[0], cpu, got torch.int64 () on cpu",
    ),
    (
        give(found_inf=torch.zeros((), device="meta")),
        ValueError,
        "found_inf must be one floating-point number on the device of params[0], cpu, got torch.float32 () on meta",
    ),
    (_on_meta, ValueError, "found_inf can be on meta only where the steps are, got them on cpu"),
]


def bad_steps(*more):
    """For pytest.mark.parametrize."""
    cases = [*BAD_STEPS, *more]
    return pytest.mark.parametrize(
        ("changed", "kind", "message"), cases, ids=[message.split(", got")[0] for _, _, message in cases]
    )


def assert_refused(op, step, states, changed, kind, message):
    """And nothing was changed."""
    tensors = [t for of in tensors_of(step) for t in of]
    before = [t.clone() for t in tensors]
    step["states"] = states
    changed(step)
    del step["states"]
    with pytest.raises(kind) as error:
        op(**step)
    assert str(error.value) == f"fastlm.{op.__name__}: {message.replace('STATE', states[0])}"
    assert_bits_equal([tensors], [before])
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    return last.filename, last.lineno


def raises_in(*modules):
    """Where the sources say `raise`, for comparison with what was raised: (file, lines) and the statement."""
    for module in modules:
        path = Path(fastlm.__file__).parent / module
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                yield str(path), range(node.lineno, node.end_lineno + 1), ast.unparse(node)
