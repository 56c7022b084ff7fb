"""The choice of backend, the front door, and what an op refuses."""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from every_op import differing, every_op_once
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm import _library, _native

needs_cpu_module = pytest.mark.skipif(_native.cpu is None, reason=_native.reasons.get("cpu", ""))


def run_python(code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_use_backend_chooses_the_namespace_and_comes_back():
    x = torch.randn(3)
    for name, namespace in _library.NAMESPACES.items():
        if name == "triton" or (name == "native" and _native.cpu is None):
            continue
        with Recorder() as recorder, fastlm.use_backend(name):
            fastlm.gelu(x)
        assert recorder.seen[0] == f"{namespace}.gelu.default"
    with pytest.raises(KeyError), fastlm.use_backend("reference"):
        raise KeyError
    with Recorder() as recorder:
        fastlm.gelu(x)
    expected = _library.NAMESPACES[os.environ.get("FASTLM_BACKEND") or "auto"]
    assert recorder.seen[0] == f"{expected}.gelu.default"


def test_backward_runs_where_the_forward_ran():
    x = torch.randn(3, requires_grad=True)
    with fastlm.use_backend("reference"):
        y = fastlm.relu(x)
    with Recorder() as recorder:
        y.sum().backward()
    assert "fastlm_reference.relu_backward.default" in recorder.seen


def test_use_backend_is_per_thread():
    seen = []

    def work():
        seen.append(_library._state.backend)

    with fastlm.use_backend("reference"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [os.environ.get("FASTLM_BACKEND") or "auto"]


def test_one_use_backend_may_be_entered_again():
    default, chosen = _library._state.backend, fastlm.use_backend("reference")
    with chosen:
        with chosen:
            pass
        assert _library._state.backend == "reference"
    assert _library._state.backend == default


def test_a_backend_chosen_first_inside_a_compiled_function_leaves_later_compiles_alone():
    code = """
import torch, fastlm

@torch.compile(fullgraph=True, backend="eager")
def inside(x):
    with fastlm.use_backend("reference"):
        return fastlm.relu(x)

x = torch.tensor([-1.0, 2.0])
for f in (inside, torch.compile(fastlm.relu, fullgraph=True, backend="eager")):
    assert f(x).tolist() == [0, 2]
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_autocast_rules_hold_under_compile_and_vmap():
    x, bias = torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(3)
    q = torch.randn(2, 1, 2, 4, 8)
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for transform in (lambda f: f, torch.compile(backend="eager", fullgraph=True), torch.func.vmap):
            assert transform(lambda x: fastlm.bias_act(x, bias))(x).dtype == torch.bfloat16
        assert torch.func.vmap(lambda q: fastlm.attention(q, q, q))(q).dtype == torch.bfloat16


def test_second_derivatives_are_not_autocast():
    q = torch.randn(1, 1, 8, 16, requires_grad=True)

    def second_derivative(autocast):
        (g,) = torch.autograd.grad(fastlm.attention(q, q, q).square().sum(), q, create_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(g.square().sum(), q)[0]

    torch.testing.assert_close(second_derivative(True), second_derivative(False))


def test_unknown_backends_get_a_sentence():
    with pytest.raises(ValueError) as caught:
        fastlm.use_backend("cudnn")
    assert str(caught.value) == ("fastlm.use_backend: name must be one of auto, native, triton, reference, got 'cudnn'")
    done = run_python("import fastlm", FASTLM_BACKEND="fast")
    assert done.returncode != 0
    assert "ValueError: FASTLM_BACKEND must be one of auto, native, triton, reference, got 'fast'" in done.stderr


@needs_cpu_module
def test_an_unknown_instruction_set_gets_a_sentence():
    done = run_python("import torch, fastlm; fastlm.gelu(torch.ones(3))", FASTLM_CPU_ISA="sse9")
    assert done.returncode != 0 and "FASTLM_CPU_ISA must be one of" in done.stderr and "got sse9" in done.stderr


@needs_cpu_module
@pytest.mark.parametrize("isa", _native.cpu.usable_isas() if _native.cpu else [])
def test_a_forced_instruction_set_is_the_one_that_runs(isa):
    done = run_python("from fastlm import _native; print(_native.cpu.active_isa())", FASTLM_CPU_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_backends_says_who_can_and_why_not():
    statuses = {name: (usable, reason) for name, usable, reason in fastlm.backends("relu")}
    assert list(statuses) == ["native", "triton", "reference"]
    assert statuses["reference"] == (True, "")
    assert statuses["native"][0] == (_native.cpu is not None)
    assert fastlm.backends().keys() == _library._ops.keys()
    with pytest.raises(ValueError, match=r"fastlm\.backends: op must be one of .*, got 'conv'"):
        fastlm.backends("conv")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"y": 1}, "fastlm.backends: relu: missing a required argument: 'x'"),
        ({"x": 1, "out": 2}, "fastlm.backends: relu: got an unexpected keyword argument 'out'"),
    ],
)
def test_backends_takes_the_arguments_of_the_op(arguments, text):
    with pytest.raises(TypeError) as caught:
        fastlm.backends("relu", **arguments)
    assert str(caught.value) == text


def test_backends_answers_for_tensors_of_other_devices():
    q = torch.empty(1, 2, 3, 4, device="meta")
    for op, arguments in (("attention", {"q": q, "k": q, "v": q}), ("bias_act", {"x": q, "bias": q[0, 0, 0]})):
        assert [s.backend for s in fastlm.backends(op, **arguments, dropout_p=0.1)] == ["reference"]


def test_asking_for_backends_draws_no_random_number():
    before = torch.get_rng_state()
    q = torch.randn(1, 1, 2, 4, generator=torch.Generator())
    fastlm.backends("attention", q=q, k=q, v=q, dropout_p=0.1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_broken_triton_costs_triton_alone(tmp_path):
    (tmp_path / "triton.py").write_text("raise AttributeError('half installed')")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch, fastlm
fastlm.relu(torch.ones(1))
with fastlm.use_backend("triton"):
    fastlm.relu(torch.ones(1))
"""
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.stderr.endswith(
        "NotImplementedError: fastlm.relu on cpu: triton does not load: AttributeError: half installed\n"
    ), done.stderr


def test_the_interpreter_of_triton_is_not_chosen_by_itself():
    q = torch.randn(1, 1, 3, 4)
    code = "import torch, fastlm, sys; q = torch.ones(1, 1, 3, 4); fastlm.attention(q, q, q, window=1); "
    done = run_python(code + "print('triton' in sys.modules)", TRITON_INTERPRET="1", FASTLM_BACKEND="auto")
    assert done.stdout.strip() == "False", done.stderr
    _, triton, _ = fastlm.backends("attention", q=q, k=q, v=q, window=1)
    assert triton.reason == "runs on GPUs (on the CPU where it is asked for, with TRITON_INTERPRET=1)"


@needs_cpu_module
def test_what_a_kernel_cannot_do_goes_to_the_next_visibly():
    q = torch.randn(1, 2, 5, 257)
    native, *_ = fastlm.backends("attention", q=q, k=q, v=q)
    why = "takes head dimensions from 1 to 256, not 257 and 257"
    assert native == ("native", False, why)
    with fastlm.use_backend("reference"):
        want = fastlm.attention(q, q, q)
    _library._warned.clear()
    with fastlm.use_backend("auto"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):  # it is said once
            torch.testing.assert_close(fastlm.attention(q, q, q), want)
    assert [str(w.message) for w in said] == [
        f"fastlm.attention on cpu runs on the reference, in plain torch: native {why}"
    ]
    assert said[0].category is fastlm.FallbackWarning and said[0].filename == __file__
    with fastlm.use_backend("native"), pytest.raises(NotImplementedError) as caught:
        fastlm.attention(q, q, q)
    assert str(caught.value) == f"fastlm.attention on cpu: native {why}"


def test_a_missing_kernel_is_an_error_only_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(_library, "load_kernels", _raise_import_error)
    op = _library._ops["relu"]
    monkeypatch.setattr(op, "_chosen", {})
    native, triton, reference = op.choices("auto", "cpu")[1]
    assert (native.reason, triton.usable, reference.reason) == ("no compiler", False, "")
    with pytest.raises(NotImplementedError, match=r"fastlm\.relu on cpu: native no compiler"):
        op._chooser("native", "cpu")(torch.ones(3))


def _raise_import_error(backend, family, device):
    raise ImportError("no compiler")


def test_in_place_ops_refuse_to_be_differentiated():
    p = torch.ones(3, requires_grad=True)
    states = [[torch.zeros(3)] for _ in range(2)]
    args = ([p], [torch.ones(3)], *states, [], [torch.tensor(0.0)], 0.1, 0.9, 0.99, 1e-8, 0.0, False, False, False)
    args += (None, False, None, False, 0, 0.0, None, [], [], 0.0, [], [])
    with pytest.raises(RuntimeError, match="changes its arguments in place"):
        torch.ops.fastlm.adam_(*args)


def test_torch_function_modes_and_subclasses_are_not_bypassed():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    seen = []
    y = fastlm.gelu(torch.randn(3).as_subclass(Loud))
    assert isinstance(y, Loud) and any("fastlm" in name and "gelu" in name for name in seen)

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(f"mode {func}")
            return func(*args, **(kwargs or {}))

    with Mode():
        fastlm.gelu(torch.randn(3))
    assert any(name.startswith("mode") and "fastlm" in name and "gelu" in name for name in seen)


def test_batched_gradients_are_not_taken_for_plain_tensors():
    """torch's old vmap, which is_grads_batched uses, shows its tensors to Python as CPU tensors without memory."""

    class Activate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return fastlm.gelu(dy) + fastlm.bias_act(dy, torch.ones(3), "gelu")

    x, dy = torch.randn(2, 3, requires_grad=True), torch.randn(4, 2, 3)
    (dx,) = torch.autograd.grad(Activate.apply(x), x, dy, is_grads_batched=True)
    torch.testing.assert_close(dx, F.gelu(dy) + F.gelu(dy + 1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_tracing_records_the_op():
    traced = torch.jit.trace(fastlm.gelu, torch.randn(3), check_trace=False)
    x = torch.tensor([-1.0, 2.0, -3.0])
    torch.testing.assert_close(traced(x), F.gelu(x))
    assert "fastlm" in str(traced.graph) and "::gelu(" in str(traced.graph)


@needs_cpu_module
def test_kernels_run_on_one_thread_in_a_forked_child():
    """As a DataLoader's worker: libgomp would wait for ever for the threads that the child does not have."""
    code = f"""
import sys, os, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fastlm import _native
from every_op import differing, every_op_once
want = every_op_once()  # starts the threads
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)  # torch's own threads are not to be had here either
    wrong = differing(want, every_op_once())
    print(wrong, flush=True)
    os._exit(0 if not _native.cpu.threads_usable() and not wrong else 3)
_, status = os.waitpid(pid, 0)
assert _native.cpu.threads_usable()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_cpu_module
def test_the_number_of_threads_may_change_and_changes_no_bit():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(every_op_once())
    finally:
        torch.set_num_threads(before)
    assert not differing(results[0], results[1]) and not differing(results[0], results[2])


def test_threads_at_once_agree_with_one():
    want, found = every_op_once(), []

    def work():
        for _ in range(3):
            found.append(every_op_once())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4 * 3  # none was lost to an exception
    assert not any(differing(want, results) for results in found)


@needs_cpu_module
@pytest.mark.parametrize("name", _library._ops)
def test_every_op_has_a_cpu_kernel_that_passes_its_self_check(name):
    """The check that decides on a GPU, and the samples that it takes."""
    op = _library._ops[name]
    backend, kernel = op.choices("auto", "cpu")[0][0]
    assert backend == "native"
    assert op.mismatch(kernel, "cpu") is None
    assert any(kernel.refusal(args) is None for args in op.samples("cpu"))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", _library._ops)
def test_every_op_passes_opcheck(name, backend):
    op = _library._ops[name]
    for args in op.samples("cpu"):
        torch.library.opcheck(op.overloads[backend], op.filled(args))
