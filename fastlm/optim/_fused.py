"""What fastlm's optimizers have in common: everything but the rule of the step."""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastlm.ops.adam import grad_norm

_PLAIN = (torch.nn.Parameter, Tensor)
_SEED = 0x9E3779B1  # between the random numbers of one call and those of the next


class Call:
    """Some parameters of a group, which one call of an op steps: on one device, and with the same kinds of state."""

    def __init__(self, group: dict[str, Any], number: int, device: torch.device):
        self.group, self.number, self.device = group, number, device
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.plain = True  # all of them are tensors as kernels take them

    def __str__(self) -> str:
        state = self.states[0]
        kinds = {"with masters": "master_param" in state, "with states of 8 bits": "exp_avg_codes" in state}
        kinds["with sparse gradients"] = self.grads[0].is_sparse
        kinds = ", ".join(kind for kind, there in kinds.items() if there)
        return f"{len(self.params)} of group {self.number} on {self.device}{kinds and f' ({kinds})'}"

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors if self.plain else [local(x) for x in tensors]

    def state(self, key: str) -> list[Tensor]:
        """Of each parameter, or none where there is none."""
        return self.local([s[key] for s in self.states]) if key in self.states[0] else []


class Fused(Optimizer):
    """Groups, states, clipping, scaling and skipping, and calls of a fused op; the subclasses know its rule.

    A subclass names in GROUP_DEFAULTS what groups of other versions may lack, and defines what the rule says.
    """

    # torch.amp.GradScaler then leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True
    GROUP_DEFAULTS: ClassVar[dict[str, Any]] = {}
    _OPTIONS = ("max_norm", "skip_nonfinite", "master_weights", "ema_decay", "stochastic_rounding")
    _OWN = (*_OPTIONS, "seed", "grad_norm", "skipped_steps")

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        max_norm: float | None,
        skip_nonfinite: bool,
        master_weights: bool,
        ema_decay: float | None,
        stochastic_rounding: bool,
        seed: int,
    ):
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"{self._name}: max_norm must be above 0, got {max_norm}")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"{self._name}: ema_decay must be in [0, 1), got {ema_decay}")
        if master_weights and stochastic_rounding:
            raise ValueError(
                f"{self._name}: master_weights and stochastic_rounding exclude each other: a parameter that has a "
                "float32 master is what that rounds to"
            )
        self.max_norm, self.skip_nonfinite = max_norm, skip_nonfinite
        self.master_weights, self.ema_decay = master_weights, ema_decay
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        self.grad_norm: Tensor | None = None
        self.skipped_steps = torch.zeros((), dtype=torch.int64)
        self._in_backward = self._averaged = False
        self._check_group(defaults)
        super().__init__(params, defaults)

    @property
    def _name(self) -> str:
        return f"fastlm.optim.{type(self).__name__}"

    # --- what the rule says -------------------------------------------------------------------------------------------
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises where an option of a group is not as it must be."""
        raise NotImplementedError

    def _new_state(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """What a step needs that the state does not hold yet."""
        raise NotImplementedError

    def _loaded_state(self, p: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """A state of torch's optimizer, or of one of these with other options, as this one keeps it."""
        raise NotImplementedError

    def _counts(self, group: dict[str, Any]) -> bool:
        """Whether a step needs its number."""
        raise NotImplementedError

    def _last_entry(self, group: dict[str, Any]) -> str:
        """Of a state: where it is there, so are all others that the rule needs."""
        return "step"

    def _counts_on_device(self, device: torch.device, group: dict[str, Any], skips: bool) -> bool:
        raise NotImplementedError

    def _check_call(self, call: Call) -> None:
        """Raises, before anything is written, where the rule cannot do a call."""

    def _run(self, call: Call, scale: Tensor | None, found_inf: Tensor | None, seed: int) -> None:
        raise NotImplementedError

    # --- groups -------------------------------------------------------------------------------------------------------
    def _check_common(self, group: dict[str, Any], not_negative: Iterable[str]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{self._name}: lr must be a number or a tensor of one element, got {lr.numel()} elements")
        for key in not_negative:
            if not group[key] >= 0:
                raise ValueError(f"{self._name}: {key} must be at least 0, got {group[key]}")
        if group["foreach"] and group["fused"]:
            raise RuntimeError(f"{self._name}: foreach and fused cannot both be True")
        self._refuse_unsupported(group)

    def _refuse_unsupported(self, group: dict[str, Any]) -> None:
        if group["differentiable"]:
            raise NotImplementedError(f"{self._name}: differentiable=True is not supported: the step is done in place")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check_group(group)
            for i, p in enumerate(group["params"]):
                if p.requires_grad and not (p.is_floating_point() or p.dtype in (torch.complex64, torch.complex128)):
                    raise TypeError(
                        f"{self._name}: parameters must be floating point, complex64 or complex128, got {p.dtype} "
                        f"at {i}"
                    )
                if getattr(p, "_is_flat_param", False):
                    raise NotImplementedError(
                        f"{self._name}: parameters of FullyShardedDataParallel, which do not say how they are sharded, "
                        "are not supported; torch.distributed.fsdp.fully_shard makes some that do"
                    )
            if self._in_backward:
                raise RuntimeError(f"{self._name}: add parameters before step_in_backward, not after")
        except Exception:
            del self.param_groups[-1]
            raise

    # --- state --------------------------------------------------------------------------------------------------------
    def __setstate__(self, state: dict[str, Any]) -> None:
        # Reached by load_state_dict and by unpickling. Groups and states of older torch versions lack the newer keys.
        for group in state["param_groups"]:
            for key, value in self.GROUP_DEFAULTS.items():
                group.setdefault(key, value)
            self._check_group(group)
        saved = state.get("state", {})
        if (given := self.__dict__.get("_given")) is not None:  # before torch gave every state its parameter's dtype
            numbers = itertools.chain.from_iterable(g["params"] for g in given["param_groups"])
            params = itertools.chain.from_iterable(g["params"] for g in state["param_groups"])
            saved = {p: given["state"][n] for n, p in zip(numbers, params, strict=True) if n in given["state"]}
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                if saved.get(p):
                    self.state[p] = self._restored(p, saved[p], group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Takes states of torch's optimizer of that name, and of this one with other options."""

        def keep(_: Optimizer, given: dict[str, Any]) -> None:  # the last hook sees what the others made of it
            self._given = given

        self._refuse_averaged("load_state_dict")
        before = self.state, self.param_groups
        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.state, self.param_groups = before
            raise
        finally:
            handle.remove()
            self.__dict__.pop("_given", None)

    def __getstate__(self) -> dict[str, Any]:
        if self._in_backward:
            raise RuntimeError(f"{self._name}: remove step_in_backward's handle before copying or pickling")
        return {
            **super().__getstate__(),
            **{key: getattr(self, key) for key in self._OWN},
            "_in_backward": False,
            "_averaged": False,
        }

    def _restored(self, p: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        state = self._loaded_state(p, saved, group)
        for key, dtype in self._copies(p).items():
            if saved.get(key) is not None:
                state[key] = saved[key].to(device=p.device, dtype=dtype)
        step = saved.get("step")
        if step is None and "momentum_buffer" in state:  # torch's SGD does not count, but there has been a step
            step = 1.0
        if step is None:
            return state
        device = p.device if self._counts_on_device(p.device, group, False) else "cpu"
        dtype = torch.float64 if isinstance(step, Tensor) and step.dtype == torch.float64 else step_dtype()
        return {"step": torch.as_tensor(step, dtype=dtype, device=device), **state}

    def _copies(self, p: Tensor) -> dict[str, torch.dtype]:
        """What the state holds that began as the parameter."""
        copies = {"master_param": torch.float32} if self._has_master(p) else {}
        return copies if self.ema_decay is None else {**copies, "ema": wide_dtype(p)}

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in (torch.bfloat16, torch.float16)

    def _state_of(
        self, p: Tensor, group: dict[str, Any], on_device: bool, captures: bool, made: list[tuple]
    ) -> dict[str, Any]:
        """Made or completed, where it is not as this step needs it."""
        state, counts, new = self.state.get(p, {}), self._counts(group), {}
        if counts and "step" not in state:
            new["step"] = torch.zeros((), dtype=step_dtype(), device=p.device if on_device else "cpu")
        elif counts and on_device and state["step"].device != p.device:
            self._refuse_capture(
                captures,
                "a group was made capturable after the last step, whose count is still on the host; take a step before "
                "the capture",
            )
            new["step"] = state["step"].to(p.device)
        new |= self._new_state(p, group, state)
        new |= {key: p.detach().to(dtype, copy=True) for key, dtype in self._copies(p).items() if key not in state}
        if new:
            self._refuse_capture(
                captures,
                f"a parameter of sizes {tuple(p.shape)} has no state yet, which a CUDA graph would set to 0 at every "
                "replay; take the first step before the capture",
            )
            made.append((p, state))
            self.state[p] = state = {**state, **new}
        return state

    def _refuse_capture(self, captures: bool, why: str) -> None:
        if captures:
            raise RuntimeError(f"{self._name}: {why}")

    # --- the step -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient.

        Args:
            closure: evaluates the model anew, calls backward and returns the loss, which step returns.

        Raises:
            RuntimeError: a sparse gradient, amsgrad switched on late, or a CUDA graph being captured without
                capturable or before the first step. A step that fails after it began to write, which it does by
                device, group and kind of state, says what was stepped and what perhaps in part; else all is as before.
            ValueError, TypeError: a state whose sizes, dtypes or devices do not fit the parameter's.
            NotImplementedError: a group that was made differentiable.
        """
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if self._in_backward and hasattr(self, "grad_scale"):
                raise RuntimeError(
                    f"{self._name}: step_in_backward does not go with torch.amp.GradScaler: the parameters were "
                    "stepped by gradients that were still scaled"
                )
            self._step([(group, group["params"]) for group in self.param_groups])
        except Exception:  # GradScaler takes these back after a step that ends well, and else multiplies them later
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return loss

    def _refuse_averaged(self, what: str) -> None:
        if self._averaged:
            raise RuntimeError(f"{self._name}: {what} within ema_weights would be lost with the averages at its end")

    def _step(self, chosen: list[tuple[dict[str, Any], list[Tensor]]], seed: int = 0) -> None:
        self._refuse_averaged("a step")
        made: list[tuple[Tensor, dict[str, Any]]] = []  # whose states this step made or completed, and what they were
        done, began = 0, 0
        calls: list[Call] = []
        try:
            grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            calls = self._calls(chosen, found_inf is not None or self.skip_nonfinite, made)
            scale, found_inf = self._scale(calls, grad_scale, found_inf)
            if not calls:
                return
            for call in calls:
                self._check_call(call)
            for call in calls:
                here = [None if x is None else x.to(call.device) for x in (scale, found_inf)]
                began += 1
                self._run(call, *here, self.seed + (seed + done) * _SEED)
                done += 1
                if not call.plain:  # of DTensors only the local tensors have been told
                    torch.autograd.graph.increment_version([p for p in call.params if is_distributed(p)])
        except Exception as error:
            if isinstance(error, (ValueError, TypeError, NotImplementedError)):  # a refusal, before it wrote
                began = done
            if began == 0:
                for p, state in made:
                    if state:
                        self.state[p] = state
                    else:
                        self.state.pop(p, None)
                raise
            parts = {"stepped": calls[:done], "perhaps in part": calls[done:began], "not": calls[began:]}
            said = [f"{how}: {', '.join(map(str, which))}" for how, which in parts.items() if which]
            raise RuntimeError(f"{self._name}: the step failed on the way. Parameters {'; '.join(said)}") from error
        if found_inf is not None:  # in place, so that a CUDA graph goes on counting
            self.skipped_steps = self.skipped_steps.to(found_inf.device).add_((found_inf != 0).reshape(()))

    def _calls(self, chosen: list[tuple[dict[str, Any], list[Tensor]]], skips: bool, made: list[tuple]) -> list[Call]:
        calls = []
        captures, copies = capturing(), self.master_weights or self.ema_decay is not None
        for number, (group, params) in enumerate(chosen):
            self._refuse_unsupported(group)  # a group may have been changed since
            counts, last = self._counts(group), self._last_entry(group)
            by_kind: dict[tuple, Call] = {}
            seen_device = None
            for p in params:
                grad, device = p.grad, p.device
                if grad is None:
                    continue
                plain = type(p) in _PLAIN and type(grad) is Tensor and not p.is_complex()
                if not plain or grad.layout is not torch.strided:
                    grad = self._gradient(p, group)
                if device != seen_device:
                    seen_device, on_device = device, self._counts_on_device(device, group, skips)
                    if counts and not on_device:
                        self._refuse_capture(
                            captures,
                            "it counts steps on the host, which a CUDA graph would not do again; capturable=True "
                            "counts them on the GPU",
                        )
                state = self.state.get(p, {}) if counts or copies else {}
                # Nearly always complete; thousands of small parameters then are not asked more.
                if copies or (counts and (last not in state or (on_device and state["step"].device != device))):
                    state = self._state_of(p, group, on_device, captures, made)
                counted_on = state["step"].device if counts else None
                kind = (device, grad.layout, "master_param" in state, "exp_avg_codes" in state, counted_on)
                call = by_kind.get(kind)
                if call is None:
                    call = by_kind[kind] = Call(group, number, device)
                call.params.append(p)
                call.grads.append(grad)
                call.states.append(state)
                call.plain = call.plain and plain
            calls += by_kind.values()
        return calls

    def _gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """A parameter's gradient, placed as the parameter is."""
        grad = p.grad
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{self._name} does not support sparse gradients, got {grad.layout}; see torch.optim.SparseAdam"
            )
        if p.is_conj():
            raise RuntimeError(f"{self._name}: a conjugated view cannot be stepped as pairs of real numbers")
        if is_distributed(p) and grad.placements != p.placements:
            grad = grad.redistribute(placements=p.placements)
        return grad.resolve_conj() if grad.is_complex() else grad

    def _scale(
        self, calls: list[Call], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What to multiply all gradients by, and whether to skip the step (not 0), after setting grad_norm."""
        shared = self._shared()
        if shared and found_inf is not None:  # GradScaler looked at what this rank has: nothing is the number 0
            device = next(iter(shared.values()))[0]
            found_inf = torch.as_tensor(
                local(found_inf) if isinstance(found_inf, Tensor) else 0.0, device=device
            ).clone()
            groups = {name: group for _, over in shared.values() for name, group in over.items()}
            for name in sorted(groups):
                torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, groups[name])
        found_inf = local(found_inf) if isinstance(found_inf, Tensor) else None
        scale = None if grad_scale is None else local(grad_scale).double().reciprocal()
        if self.max_norm is not None or self.skip_nonfinite:
            norm = self._norm(calls, shared)
            self.grad_norm = norm if scale is None else (norm * scale.to(norm.device)).to(norm.dtype)
            if self.skip_nonfinite:
                found = ~self.grad_norm.isfinite()
                found_inf = found.float() if found_inf is None else torch.maximum(found_inf, found.to(found_inf))
            if self.max_norm is not None and self.max_norm != math.inf:
                # A norm that is not finite makes the parameters so too, as after clip_grad_norm_.
                clip = (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
                scale = clip if scale is None else clip * scale.to(clip.device)
        return scale, found_inf

    def _shared(self) -> dict[tuple[str, ...], tuple[torch.device, dict[str, Any]]]:
        """For each set of process groups over which a parameter is cut, its names in order: the device, and the groups.

        Of all parameters that may have gradients, in an order that the names decide: ranks of which some have no
        gradient must take part in the same sums.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {}
        found = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and (over := sharded_over(p)):
                    found.setdefault(tuple(sorted(over)), (p.device, over))
        return dict(sorted(found.items()))

    def _norm(self, calls: list[Call], shared: dict[tuple[str, ...], tuple[torch.device, dict[str, Any]]]) -> Tensor:
        """Of the whole gradients, where ranks hold parts of them."""
        whole: dict[torch.device, list[Tensor]] = {}
        cut: dict[tuple[str, ...], list[Tensor]] = {names: [] for names in shared}
        for call in calls:
            for grad in call.grads:
                over = sharded_over(grad)
                (cut[tuple(sorted(over))] if over else whole.setdefault(call.device, [])).append(local(grad))
        norms = [grad_norm(grads) for grads in whole.values()]
        for names, (device, over) in shared.items():
            grads = cut[names]
            square = (
                grad_norm(grads).double().square() if grads else torch.zeros((), dtype=torch.float64, device=device)
            )
            for name in names:
                torch.distributed.all_reduce(square, group=over[name])
            wide = any(g.dtype == torch.float64 for g in grads)
            norms.append(square.sqrt().to(torch.float64 if wide else torch.float32))
        if not norms:
            return torch.zeros((), dtype=torch.float32)
        if len(norms) == 1:
            return norms[0]
        whole = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]))
        return whole.to(torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32)

    # --- more than steps ----------------------------------------------------------------------------------------------
    def step_in_backward(self) -> _Handle:
        """From now on backward itself steps each parameter as soon as its gradient is complete, and frees the gradient.

        So at no time more than a few gradients are in memory. ``step`` then finds nothing left to do, and every
        backward is a step: accumulation over several of them, ``max_norm``, ``skip_nonfinite`` and
        ``torch.amp.GradScaler``, which all need the gradients together, do not go with it, nor does reentrant
        checkpointing of a parameter that is used in several segments. It ends with the optimizer.

        Returns:
            a handle, whose ``remove()`` ends it.

        Raises:
            RuntimeError: with max_norm or skip_nonfinite, where it is so already, or with several processes unless the
                parameters are DTensors: DistributedDataParallel sums gradients only after a step would be taken.
        """
        self._refuse_in_backward()
        if self._in_backward:
            raise RuntimeError(f"{self._name}: step_in_backward is on already")
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size() > 1 and not all(map(is_distributed, trained)):
            raise RuntimeError(
                f"{self._name}: with several processes step_in_backward is for DTensors alone: of other parameters the "
                "gradients are summed only after it would step"
            )
        hooks = []
        number, optimizer = 0, weakref.ref(self)
        for at, group in enumerate(self.param_groups):
            for p in group["params"]:

                def hook(p: Tensor, at: int = at, number: int = number) -> None:
                    if (this := optimizer()) is None:
                        return
                    this._refuse_in_backward()  # options may have been changed since
                    with torch.no_grad():  # load_state_dict replaces the groups
                        this._step([(this.param_groups[at], [p])], seed=number)
                    p.grad = None

                number += 1
                if p.requires_grad:
                    hooks.append(p.register_post_accumulate_grad_hook(hook))
        self._in_backward = True
        return _Handle(self, hooks)

    def _refuse_in_backward(self) -> None:
        for name in ("max_norm", "skip_nonfinite"):
            if getattr(self, name):
                raise RuntimeError(
                    f"{self._name}: step_in_backward does not go with {name}, which needs all gradients before the "
                    "first parameter is stepped"
                )

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within, the parameters hold their averages (those that have been stepped); afterwards what they held before.

        Raises:
            RuntimeError: without ema_decay; and, within it, for a step, ``load_state_dict`` and a second of its kind.
        """
        self._refuse_averaged("ema_weights")
        if self.ema_decay is None:
            raise RuntimeError(f"{self._name}: there are no averages of weights without ema_decay")
        averaged = [p for group in self.param_groups for p in group["params"] if "ema" in self.state.get(p, {})]
        before = [p.detach().clone() for p in averaged]
        self._averaged = True
        try:
            with torch.no_grad():
                for p in averaged:
                    p.copy_(self.state[p]["ema"])
            yield
        finally:
            self._averaged = False
            with torch.no_grad():
                for p, x in zip(averaged, before, strict=True):
                    p.copy_(x)


class _Handle:
    """Ends step_in_backward."""

    def __init__(self, optimizer: Fused, hooks: list[RemovableHandle]):
        self._optimizer, self._hooks = optimizer, hooks

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._optimizer is not None:
            self._optimizer._in_backward = False
        self._optimizer = None  # another handle's from now on


# --- tensors of other kinds -------------------------------------------------------------------------------------------
def is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor, which a program that has none need not import."""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """What a kernel can take: of a DTensor the part that is here, and complex numbers as pairs of real ones."""
    if is_distributed(x):
        x = x.to_local()
    return torch.view_as_real(x) if x.is_complex() else x


def sharded_over(x: Tensor) -> dict[str, Any]:
    """The process groups, by name, over which a DTensor is cut into parts that are no copies of each other."""
    if not is_distributed(x):
        return {}
    # Of fully_shard over tensor parallelism some are strided shards, for which is_shard() is false.
    over = [i for i, placement in enumerate(x.placements) if not placement.is_replicate()]
    return {(group := x.device_mesh.get_group(i)).group_name: group for i in over}


def wide_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.element_size() == 2 else p.dtype


def capturing() -> bool:
    # torch.compile cannot trace the last of these, which would initialise CUDA if it stood first.
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def step_dtype() -> torch.dtype:
    """As torch's: float32 counts exactly up to 2^24 steps."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
