"""How an op becomes a torch op: the only file that knows torch.library.

``define_op`` puts one contract (schema, reference, fake, gradient) into four torch.ops namespaces:

=====================  ================================================================================
``fastlm``             the one users call: the best installed kernel that can do the arguments
``fastlm_native``      C++ on the CPU, CUDA C++ on the GPU
``fastlm_triton``      Triton
``fastlm_reference``   the definition, in plain torch
=====================  ================================================================================

Choosing a backend is choosing a namespace. Kernels register themselves with ``kernel`` when their module is imported,
which happens at the op's first call on a device: importing fastlm loads no Triton and initialises no CUDA.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastlm._checks import autocast_on, check_floating_point

NAMESPACES = {"auto": "fastlm", "native": "fastlm_native", "triton": "fastlm_triton", "reference": "fastlm_reference"}
_KERNEL_BACKENDS = ("native", "triton")  # in order of preference; the reference always comes last
_DEVICES = ("cpu", "cuda")
_libraries = {backend: torch.library.Library(namespace, "DEF") for backend, namespace in NAMESPACES.items()}
_ops: dict[str, Op] = {}
# What a backward formula calls: _entries[backend].relu_backward(...)
_entries = {backend: SimpleNamespace() for backend in NAMESPACES}

# (backend, op family, device) -> imports the kernels; its ImportError says why there are none. Set by
# fastlm/__init__.py, which alone sees ops and kernels.
load_kernels: Callable[[str, str, str], object] | None = None


# --- the choice of backend --------------------------------------------------------------------------------------------
def _checked_backend(name: str, origin: str) -> str:
    if not isinstance(name, str) or name not in NAMESPACES:
        raise ValueError(f"{origin} must be one of {', '.join(NAMESPACES)}, got {name!r}")
    return name


_default_backend = _checked_backend(os.environ.get("FASTLM_BACKEND") or "auto", "FASTLM_BACKEND")


class _State(threading.local):
    """Per thread: __init__ runs in each. Attributes of the instance, since torch.compile guards on those."""

    def __init__(self) -> None:
        self.backend = _default_backend
        self.outer: list[str] = []  # the backends that the use_backend blocks around this one put aside


_state = _State()


class use_backend:
    """``with fastlm.use_backend("triton"):`` runs this thread's fastlm ops on one backend.

    Args:
        name: ``auto`` (the best that can), ``native``, ``triton`` or ``reference``. The last three refuse what they
            cannot do with NotImplementedError instead of going to another.

    The backward of an op runs on the backend that ran its forward. Under torch.func transforms, in forward-mode AD and
    on meta tensors it is the reference that runs, whatever the name.
    """

    def __init__(self, name: str):
        self.name = _checked_backend(name, "fastlm.use_backend: name")

    def __enter__(self) -> None:
        _state.outer.append(_state.backend)
        _state.backend = self.name

    def __exit__(self, *exc: object) -> None:
        _state.backend = _state.outer.pop()


def backend_is_free() -> bool:
    """Whether a call too small to be worth an op's own cost may be left to plain torch: no backend was asked for."""
    return _small_calls_to_torch and _state.backend == "auto"


_small_calls_to_torch = True  # but in tests of the kernels


def small(elements: int, in_16_bits: int) -> dict[torch.dtype, int]:
    """Bounds for `left_to_torch`."""
    return dict.fromkeys((torch.float32, torch.float64), elements) | dict.fromkeys(
        (torch.bfloat16, torch.float16), in_16_bits
    )


@functools.cache
def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's products of a 16-bit dtype use instructions of this CPU. Else they take up to a hundred times as
    long as in float32."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):
        return False


def small_product(multiplications: int, in_16_bits: int) -> dict[torch.dtype, int]:
    """Bounds for `left_to_torch` of ops that are mostly a product."""
    slow = [dtype for dtype in (torch.bfloat16, torch.float16) if not torch_multiplies(dtype)]
    return small(multiplications, in_16_bits) | dict.fromkeys(slow, 1 << 18)


def left_to_torch(x: Tensor, bounds: dict[torch.dtype, int], work: int = 1) -> bool:
    """The same for a call on x, which has so few elements, times `work`, that torch is as fast, forward and backward.

    Not while compiling, where Inductor sees the op as it is, nor under autocast, where torch's may have another rule.
    The bounds are measured with AVX-512 (bench/LOG.md). What torch then refuses, the op is to refuse in its own words.
    """
    kind = type(x)
    return (
        _small_calls_to_torch
        and (kind is Tensor or kind is Parameter)
        and not _is_compiling()
        and x.numel() * work < bounds.get(x.dtype, 0)
        and x.is_cpu
        and _state.backend == "auto"
        and not _is_any_autocast_enabled()
    )


# --- kernels ----------------------------------------------------------------------------------------------------------
class Kernel(NamedTuple):
    run: Callable[..., Any]
    supports: Callable[..., str | None] | None  # the schema's arguments -> None, or why not
    checks: bool = False  # refuses by itself, before it writes, whatever the op's check refuses

    def refusal(self, args: Sequence[Any]) -> str | None:
        return self.supports(*args) if self.supports is not None else None


class BackendStatus(NamedTuple):
    """One line of ``fastlm.backends``: whether `backend` can run the op, and where not, why."""

    backend: str
    usable: bool
    reason: str


class FallbackWarning(UserWarning):
    """A call runs on the reference, in plain torch, since no installed kernel does this combination of arguments."""


_warned: set[tuple[str, str, str]] = set()
_kernels: dict[tuple[str, str, str], Kernel] = {}
_lock = threading.RLock()


def kernel(
    op: str, *, backend: str, device: str, supports: Callable[..., str | None] | None = None, checks: bool = False
):
    """Register the decorated function as the kernel of `op` for a backend ("native", "triton") and a device type.

    It gets the schema's arguments, positionally, and returns what the schema says, freshly allocated. `supports` gets
    the same arguments and returns None or the reason why the kernel cannot do them; it looks at static properties only
    (dtypes, sizes, flags), so that the choice holds under torch.compile. `checks`: it refuses by itself, before it
    writes anything, whatever the op's check refuses.
    """

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        _kernels[op, backend, device] = Kernel(run, supports, checks)
        return run

    return register


class Op:
    """One op in its four namespaces. Calling it runs it on the backend that is in use."""

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., Sequence[Any]] | None,
        backward: Callable[..., Sequence[Tensor | None] | None] | None,
        samples: Callable[[str], Iterable[tuple]],
        autocast: Callable[[torch.dtype, Sequence[Any]], Sequence[Any]] | None,
        arguments: Callable[..., tuple] | None,
        flops: Callable[..., int] | None,
        sharding: str | Callable[..., str | None] | None,
        check: Callable[..., None] | None,
    ):
        parsed = torch._C.parse_schema(f"fastlm::{schema}")
        self.name: str = parsed.name.split("::")[1]
        # relu and relu_backward are one family: their kernels stand in one file.
        self.family = reference.__module__.rpartition(".")[2]
        self.parameters = parsed.arguments
        self.arity = len(parsed.arguments)
        self.defaults = tuple(a.default_value for a in parsed.arguments)
        self.optional = any(a.has_default_value() for a in parsed.arguments)
        # torch.autograd.Function does not look into lists.
        self.differentiable = all(str(a.type) != "List[Tensor]" for a in parsed.arguments)
        self.mutated = [i for i, a in enumerate(parsed.arguments) if a.alias_info is not None and a.alias_info.is_write]
        self.reference = reference
        self.save = save
        self.backward = backward
        self.samples = samples
        self.autocast = autocast
        self.arguments = arguments
        self.flops = flops
        self.sharding = sharding
        self.check = check
        self.returns = len(parsed.returns)
        self._chosen: dict[tuple[str, str], tuple[list[tuple[str, Kernel]], list[BackendStatus]]] = {}
        self.overloads: dict[str, Any] = {}
        self.entries: dict[str, Callable[..., Any]] = {}
        self._on_cpu: dict[str, Callable[..., Any]] = {}  # the kernel for plain CPU tensors, by backend
        self._apply: dict[str, Callable[..., Any]] = {}  # the same with a graph; takes a dispatch key set first
        for backend, library in _libraries.items():
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            self._implement(backend, library, fake)
            self.overloads[backend] = getattr(getattr(torch.ops, NAMESPACES[backend]), self.name).default
            self.entries[backend] = self._entry(backend)
            setattr(_entries[backend], self.name, self.entries[backend])

    def __call__(self, *args: Any) -> Any:
        return self.entries[_state.backend](*args)

    def pointwise(self, *args: Any) -> Any:
        """The call for a pointwise op: while compiling, its reference, which Inductor fuses with its neighbours."""
        if _is_compiling() and _state.backend == "auto":
            return self.reference(*self._cast(args))
        return self.entries[_state.backend](*args)

    def unary(self) -> Callable[[Tensor], Tensor]:
        """The same, made for an op of one tensor and no autocast rule, where small tensors feel every Python call."""
        on_cpu, apply, state, pointwise = self._on_cpu, self._apply["auto"], _state, self.pointwise
        name = f"fastlm.{self.name}"

        def call(x: Tensor) -> Tensor:
            kind = type(x)
            if (
                (kind is Tensor or kind is Parameter)
                and not _is_compiling()
                and _undisturbed()
                and x.is_cpu
                and not x.is_neg()
                and _has_storage(x)
                and state.backend == "auto"
            ):
                if x.requires_grad and _is_grad_enabled():
                    return apply(None, x)
                try:
                    return on_cpu["auto"](x)
                except TypeError:  # asked now, since it costs as much as other parts of a small call
                    check_floating_point(name, "x", x)
                    raise
            check_floating_point(name, "x", x)
            return pointwise(x)

        return call

    def _entry(self, backend: str) -> Callable[..., Any]:
        """The front door: the CPU kernel by a plain call where the dispatcher has nothing to add, else the torch op."""
        overload, on_cpu, apply = self.overloads[backend], self._on_cpu, self._apply.get(backend)
        has_autocast_rule = self.autocast is not None
        check = self.check

        def call(*args: Any) -> Any:
            if (
                not _is_compiling()
                and _undisturbed()
                and not (has_autocast_rule and _is_any_autocast_enabled())
                and (wants_gradient := _plain_cpu(args)) is not None
            ):
                if not (wants_gradient and _is_grad_enabled()):
                    return on_cpu[backend](*args) if check is None else self._checked_on_cpu(backend, args)
                if apply is not None:
                    return apply(None, *args)
            if check is not None:
                check(*args)
            return overload(*args)

        return call

    def _checked_on_cpu(self, backend: str, args: Sequence[Any]) -> Any:
        """The CPU kernel where the op has a check: that of long lists may take longer than the kernel. So a kernel that
        checks everything itself goes first, and the check says in its words what was refused."""
        usable, _ = self.choices(backend, "cpu")
        trusted = bool(usable) and usable[0][1].checks
        if not trusted:
            self.check(*args)
            return self._on_cpu[backend](*args)
        try:
            return self._on_cpu[backend](*args)
        except Exception as error:
            refused = error
        self.check(*args)
        raise refused

    def refuse_early(self, *args: Any) -> None:
        """Raises what the call would for want of a kernel, for functions that change something before it."""
        if _state.backend != "auto" and not _is_compiling() and args[0].device.type in _DEVICES:
            usable, _ = self.choices(_state.backend, args[0].device.type)
            if all(candidate.refusal(args) is not None for _, candidate in usable):
                self(*args)

    def bind(self, example_args: dict[str, Any]) -> tuple:
        """The schema's arguments for those of the public function, given by name."""
        if self.arguments is None:
            parameters = [
                inspect.Parameter(
                    a.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
                )
                for a in self.parameters
            ]
            signature = inspect.Signature(parameters)
        else:
            signature = inspect.signature(self.arguments)
        try:
            given = signature.bind(**example_args).arguments
        except TypeError as error:
            raise TypeError(f"fastlm.backends: {self.name}: {error}") from None
        if self.arguments is None:
            return tuple(given.get(p.name, p.default) for p in signature.parameters.values())
        if "seed" in signature.parameters:
            device = next((t.device for t in _tensors(list(given.values()))), None)
            given.setdefault("seed", torch.zeros((), dtype=torch.int64, device=device))  # else it would be drawn
        return self.arguments(**given)

    # --- resolution ---------------------------------------------------------------------------------------------------
    def choices(self, backend: str, device: str) -> tuple[list[tuple[str, Kernel]], list[BackendStatus]]:
        """The installed kernels on a device, best first, and what became of each backend."""
        found = self._chosen.get((backend, device))
        if found is None:
            with _lock:
                found = self._chosen.get((backend, device)) or self._resolve(backend, device)
                self._chosen[backend, device] = found
        return found

    def _resolve(self, backend: str, device: str) -> tuple[list[tuple[str, Kernel]], list[BackendStatus]]:
        usable: list[tuple[str, Kernel]] = []
        statuses: list[BackendStatus] = []
        for candidate in _KERNEL_BACKENDS if backend == "auto" else (backend,):
            if candidate == "reference":
                continue
            if backend == "auto" and candidate == "triton" and device == "cpu":
                # Its interpreter is a thousand times slower than the reference, and importing it takes a second.
                problem: str | None = "runs on GPUs (on the CPU where it is asked for, with TRITON_INTERPRET=1)"
            else:
                problem = self._problem(candidate, device)
            if problem is None:
                usable.append((candidate, _kernels[self.name, candidate, device]))
            statuses.append(BackendStatus(candidate, problem is None, problem or ""))
        if backend in ("auto", "reference"):
            usable.append(("reference", Kernel(self._run_reference, None)))
            statuses.append(BackendStatus("reference", True, ""))
        return usable, statuses

    def _problem(self, backend: str, device: str) -> str | None:
        try:
            if load_kernels is not None:
                load_kernels(backend, self.family, device)
        except Exception as error:  # a broken Triton fails in many ways, and costs only itself
            return str(error) if isinstance(error, ImportError) else f"does not load: {type(error).__name__}: {error}"
        found = _kernels.get((self.name, backend, device))
        if found is None:
            return f"has no {self.name} kernel for {device}"
        # The CPU kernels run in every test; no GPU architecture can be taken for granted.
        return self._self_check(found, device) if device == "cuda" else None

    def _self_check(self, found: Kernel, device: str) -> str | None:
        """Compare the kernel with the reference on small inputs; the first use in this process pays for it."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"fastlm.{self.name}: its first call on a GPU compares kernels with the reference, which a CUDA graph "
                "cannot capture; call it once before capturing"
            )
        try:
            problem = self.mismatch(found, device)
        except torch.OutOfMemoryError:  # says nothing about the kernel
            raise
        except Exception as error:
            problem = str(error)
        return problem and f"failed its self-check on {torch.cuda.get_device_name()}: {problem}"

    def mismatch(self, found: Kernel, device: str) -> str | None:
        """Where a kernel's results on the op's samples differ from the reference's by more than rounding."""
        for args in self.samples(device):
            if found.refusal(args) is not None:
                continue
            ours = [args[i] for i in self.mutated]
            theirs_args = [_clone(a) for a in args]
            theirs = [theirs_args[i] for i in self.mutated]
            got, want = found.run(*args), self._run_reference(*theirs_args)
            for a, b in zip(_tensors([got, ours]), _tensors([want, theirs]), strict=True):
                if a.numel() == 0:
                    continue
                apart = torch.where(a == b, 0, a.double() - b.double())  # infinities may agree
                difference, largest = (x.abs().max().item() for x in (apart, torch.where(b.isinf(), 0, b).double()))
                # Sums in another order, and in 16 bits an operand of a product rounded once more. Codes of 8 bits are
                # rounded up or down at a border that the last bit of a float32 may cross.
                rounding = 8 if a.element_size() == 2 else 64
                allowed = rounding * torch.finfo(a.dtype).eps * largest if a.is_floating_point() else 1
                if not difference <= allowed:
                    return f"off by {difference:.3g}, where {allowed:.3g} would be rounding"
        return None

    # --- registration -------------------------------------------------------------------------------------------------
    def _implement(self, backend: str, library: torch.library.Library, fake: Callable) -> None:
        qualified = f"{NAMESPACES[backend]}::{self.name}"
        for device in _DEVICES:
            chooser = self._chooser(backend, device)
            library.impl(self.name, chooser, device.upper())
            if device == "cpu":
                self._on_cpu[backend] = chooser
        elsewhere = self._run_reference if backend in ("auto", "reference") else self._refuse_device(backend)
        library.impl(self.name, elsewhere, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, self._filled(fake), lib=library)
        library.impl(self.name, self._autograd_kernel(backend), "Autograd", with_keyset=True)
        if not self.mutated:
            # This key comes before Autocast's.
            library.impl(
                self.name, lambda *args: self._run_reference(*self._cast(self.filled(args))), "FuncTorchBatched"
            )
        if self.autocast is not None:
            for device in _DEVICES:
                library.impl(self.name, self._autocast_kernel(backend), f"Autocast{device.upper()}")

    def filled(self, args: Sequence[Any]) -> Sequence[Any]:
        # The dispatcher leaves out trailing arguments that equal their defaults.
        return args if len(args) == self.arity else (*args, *self.defaults[len(args) :])

    def _written(self, args: Sequence[Any]) -> list[Tensor]:
        found: list[Tensor] = []
        for value in (args[i] for i in self.mutated):
            found.extend(value if isinstance(value, (list, tuple)) else _tensors(value))
        return found

    def _filled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*self.filled(args))

    def _run_reference(self, *args: Any) -> Any:
        if _is_any_autocast_enabled():
            with _no_autocast():
                return self.reference(*self.filled(args))
        return self.reference(*self.filled(args))

    def _chooser(self, backend: str, device: str) -> Callable[..., Any]:
        candidates: list[tuple[str, Kernel]] = []  # of the last resolution
        only: Callable[..., Any] | None = None  # the first of them, where it takes everything as it comes

        def run_best(*args: Any) -> Any:
            nonlocal only
            if only is not None:
                return only(*args)
            if len(args) != self.arity:
                args = self.filled(args)
            for name, (run, supports, _) in candidates:
                if supports is None or supports(*args) is None:
                    if name == "reference" and name != candidates[0][0]:
                        self._warn_of_reference(device, candidates, args)
                    out = run(*args)
                    if self.mutated:
                        torch.autograd.graph.increment_version(self._written(args))
                    return out
            usable, statuses = self.choices(backend, device)
            if not candidates and usable:
                candidates.extend(usable)
                best = usable[0][1]
                if best.supports is None and not self.mutated and not self.optional:
                    only = best.run
                    if device == "cpu":
                        self._on_cpu[backend] = only
                return run_best(*args)
            refusals = [f"{name} {candidate.refusal(args)}" for name, candidate in usable]
            refusals += [f"{s.backend} {s.reason}" for s in statuses if not s.usable]
            raise NotImplementedError(f"fastlm.{self.name} on {device}: {'; '.join(refusals)}")

        def run_best_of_one(x: Any) -> Any:  # the same; a tuple of arguments less is felt on 64 elements
            return only(x) if only is not None else run_best(x)

        return run_best_of_one if self.arity == 1 else run_best

    def _warn_of_reference(self, device: str, candidates: list[tuple[str, Kernel]], args: Sequence[Any]) -> None:
        """Once for each reason."""
        why = "; ".join(f"{name} {kernel.refusal(args)}" for name, kernel in candidates[:-1])
        name = self.name.removesuffix("_backward")
        if (name, device, why) not in _warned:
            _warned.add((name, device, why))
            said = f"fastlm.{name} on {device} runs on the reference, in plain torch: {why}"
            warnings.warn(said, FallbackWarning, stacklevel=_callers_level())

    def _refuse_device(self, backend: str) -> Callable[..., Any]:
        def refuse(*args: Any) -> Any:
            device = next(t.device for t in _tensors(args))
            raise NotImplementedError(f"fastlm.{self.name} on {device.type}: {backend} has no kernel for this device")

        return refuse

    def _cast(self, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments as autocast wants them, where it is on and the op has a rule."""
        if self.autocast is not None:
            device = args[0].device
            if autocast_on(device):
                return self.autocast(torch.get_autocast_dtype(device.type), args)
        return args

    def _autocast_kernel(self, backend: str) -> Callable[..., Any]:
        def cast(*args: Any) -> Any:
            args = self._cast(self.filled(args))
            with _no_autocast():
                return self.overloads[backend](*args)

        return cast

    def _below_autograd(self, backend: str) -> Callable[..., Any]:
        """Go on with the dispatch after Autograd; to a CPU kernel by a plain call, since a boxed one costs 2 us."""
        after, on_cpu = torch._C._after_autograd_keyset, self._on_cpu

        def run(keyset: torch._C.DispatchKeySet | None, *args: Any) -> Any:  # None: the front door has looked
            if keyset is None or (_dispatch_modes() == 0 and _plain_cpu(args) is not None):
                return on_cpu[backend](*args)
            return self.overloads[backend].redispatch(keyset & after, *args)

        return run

    def _autograd_kernel(self, backend: str) -> Callable[..., Any]:
        below = self._below_autograd(backend)
        apply = None
        if not self.mutated and self.differentiable:
            apply = self._apply[backend] = self._function(backend, below).apply

        on_cpu = self._on_cpu

        def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            plain = _plain_cpu(args)
            wants_gradient = _any_requires_grad(args) if plain is None else plain
            needs_graph = wants_gradient and _is_grad_enabled()
            if apply is None:
                if needs_graph:
                    why = "changes its arguments in place" if self.mutated else "has no gradient"
                    raise RuntimeError(f"fastlm.{self.name} {why}: call it under torch.no_grad()")
            # torch's own ops know every transform; this is exact, only slower.
            elif forward_ad._current_level >= 0 or _transforms() is not None:
                return self._run_reference(*args)
            elif needs_graph:
                return apply(keyset, *args)
            if plain is not None and _dispatch_modes() == 0:
                return on_cpu[backend](*args)
            return below(keyset, *args)

        return autograd

    def _function(self, backend: str, below: Callable[..., Any]) -> type[torch.autograd.Function]:
        op, entries = self, _entries[backend]

        def forward(ctx, keyset, *args):
            out = below(keyset, *args)
            if len(args) != op.arity:
                args = op.filled(args)
            saved = args if op.save is None else op.save(args, out)
            ctx.plain = [None if isinstance(s, Tensor) else s for s in saved]
            ctx.save_for_backward(*[s if isinstance(s, Tensor) else None for s in saved])
            ctx.set_materialize_grads(False)
            return out

        def backward(ctx, *grads):
            needed = ctx.needs_input_grad
            if all(g is None for g in grads):
                return (None,) * len(needed)
            saved = [p if t is None else t for t, p in zip(ctx.saved_tensors, ctx.plain, strict=True)]
            given = len(needed) - 1
            wanted = (*needed[1:], *[False] * (op.arity - given))
            found = None
            if op.backward is not None:
                found = op.backward(entries, saved, wanted, *grads)
            if found is None:
                with _no_autocast():
                    found = _differentiate(op.reference, saved[: op.arity], wanted, grads)
            return (None, *found[:given], *[None] * (given - len(found)))

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        # Made by a call, since torch names the graph's nodes, and its errors about them, after the class as it is made.
        return type(torch.autograd.Function)(f"{op.name}_{backend}_", (torch.autograd.Function,), methods)


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    samples: Callable[[str], Iterable[tuple]],
    save: Callable[..., Sequence[Any]] | None = None,
    backward: Callable[..., Sequence[Tensor | None] | None] | None = None,
    autocast: Callable[[torch.dtype, Sequence[Any]], Sequence[Any]] | None = None,
    arguments: Callable[..., tuple] | None = None,
    flops: Callable[..., int] | None = None,
    sharding: str | Callable[..., str | None] | None = None,
    check: Callable[..., None] | None = None,
) -> Op:
    """Define one op in all four namespaces.

    Args:
        schema: as in torch.library, without a namespace. Arguments are positional; the public function has the names.
        reference: what the op means, in plain torch: differentiable, on any device, also in float64. Never returns its
            input.
        fake: outputs of the right sizes, strides and dtypes from fake tensors.
        samples: device -> a few small argument tuples, for the self-check of kernels on a GPU.
        save: (args, output) -> what the gradient needs, tensors or not; all arguments where not given.
        backward: (the backend's ops, saved, wanted, *output gradients) -> input gradients. Calls registered ops only.
            Not given, or where it returns None: the reference is differentiated, to every order; what was saved then
            begins with all arguments.
        autocast: (dtype, args) -> args under torch.autocast; not given: the arguments stay as they are.
        arguments: the public function's arguments -> the schema's, where they differ.
        flops: the schema's arguments -> the floating-point operations of its products, as torch.utils.flop_counter
            counts them: two for a multiplication and its addition, hidden scores included. Not given: none.
        sharding: which DTensors it takes as they are: a rule as in _sharding.py, or the schema's arguments -> a rule,
            None if they are to be replicated. Not given: torch refuses DTensors.
        check: the schema's arguments -> raises what the op refuses in its own words, before anything is done.
    """
    op = Op(schema, reference, fake, save, backward, samples, autocast, arguments, flops, sharding, check)
    _ops[op.name] = op
    return op


def all_ops() -> list[Op]:
    return list(_ops.values())


def backends(op: str | None = None, **example_args: Any) -> Any:
    """Which backends can run an op, best first: a list of ``BackendStatus(backend, usable, reason)``.

    Args:
        op: an op's name, such as "attention"; None gives a dict over all ops.
        example_args: the public function's arguments. With them the answer is for that call, on its tensors' device;
            without, for the default device (CUDA where there is one).

    Not told: a call on the CPU so small that plain torch is as fast goes there, where no backend was asked for.
    """
    if op is None:
        return {name: backends(name) for name in _ops}
    if op not in _ops:
        raise ValueError(f"fastlm.backends: op must be one of {', '.join(_ops)}, got {op!r}")
    found = _ops[op]
    args = found.bind(example_args) if example_args else None
    tensors = _tensors(args or ())
    device = tensors[0].device.type if tensors else ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in _DEVICES:
        return [BackendStatus("reference", True, "")]
    usable, statuses = found.choices("auto", device)
    refusals = {name: candidate.refusal(args) for name, candidate in usable} if args is not None else {}
    return [s._replace(usable=False, reason=refusals[s.backend]) if refusals.get(s.backend) else s for s in statuses]


# --- the front door ---------------------------------------------------------------------------------------------------
# Bound once: each is looked up on every call of a small op.
_is_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_transforms = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_has_storage = torch._C._has_storage


def _undisturbed() -> bool:
    """No mode, transform or trace of this thread wants to see the op. Autocast: see where an op has a rule."""
    return (
        _dispatch_modes() == 0
        and not _function_mode()
        and _transforms() is None
        and forward_ad._current_level < 0
        and not _is_tracing()
    )


_NO_TENSORS = frozenset({type(None), bool, int, float, str})  # asked first: most arguments are of these


def _plain_cpu(args: Sequence[Any]) -> bool | None:
    """None unless all tensors are ordinary CPU ones; then whether one of them requires a gradient."""
    requires_grad = False
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            # z.conj().imag is of a real dtype and yet marked as negated. (A conj mark needs a complex dtype, which no
            # kernel takes.) torch's old vmap, still used for batched gradients, shows its tensors as plain ones without
            # memory.
            if not a.is_cpu or a.is_neg() or not _has_storage(a):
                return None
            requires_grad = requires_grad or a.requires_grad
        elif kind in _NO_TENSORS:
            pass
        elif kind is list or kind is tuple:
            inner = _plain_cpu(a)
            if inner is None:
                return None
            requires_grad = requires_grad or inner
        elif isinstance(a, Tensor):
            return None
    return requires_grad


def readable_values(t: Tensor) -> Any:
    """The numbers of a tensor, or None where reading them would wait for a GPU or stand in the way of a trace."""
    plain = not _is_compiling() and _undisturbed() and _plain_cpu((t,)) is not None
    return t.tolist() if plain else None


_OURS = (os.path.dirname(__file__), os.path.dirname(torch.__file__))


def _callers_level() -> int:
    """The stack level, for a warning of the function that asks, of the first frame outside of fastlm and torch."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    return level


# --- helpers ----------------------------------------------------------------------------------------------------------
def _no_autocast():
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )
    return torch._C._ExcludeDispatchKeyGuard(keys)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [t for v in values for t in _tensors(v)]
    return []


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [_clone(v) for v in value] if isinstance(value, (list, tuple)) else value


def _any_requires_grad(args: Sequence[Any]) -> bool:
    for a in args:
        if isinstance(a, Tensor):
            if a.requires_grad:
                return True
        elif isinstance(a, (list, tuple)) and _any_requires_grad(a):
            return True
    return False


def _differentiate(
    reference: Callable[..., Any], args: Sequence[Any], wanted: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `reference` at `args`, differentiable again.

    Each tensor is seen through a fresh view: differentiating at the saved tensor itself would also follow the path by
    which one argument depends on another (wrong second derivative); at a detached copy, none (wrong third).
    """
    with torch.enable_grad():
        views = [a.view_as(a) if isinstance(a, Tensor) else a for a in args]
        outputs = reference(*views)
    pairs = [(o, g) for o, g in zip(_tensors([outputs]), grads, strict=True) if g is not None and o.requires_grad]
    at = [v for v, w in zip(views, wanted, strict=True) if w]
    if pairs:
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                at,
                [g for _, g in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
    else:
        found = iter([None] * len(at))
    return [next(found) if w else None for w in wanted]
