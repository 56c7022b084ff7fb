"""Adam and AdamW, drop-in for torch.optim's: the same arguments, param_groups and state_dict, one fused step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastlm.ops.adam import adam_, grad_norm


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980), all parameters of a device in one fused pass.

    A drop-in for ``torch.optim.Adam``; a ``state_dict`` of either loads into the other. 16-bit dtypes are computed in
    float32 and rounded when stored. Parameters of any strides are updated in place.

    Args:
        params: parameters, named parameters, or dicts that define groups; real and floating point.
        lr: learning rate, a float or a tensor of one element (on a GPU, reading it waits for the GPU at every step,
            unless capturable).
        betas: decay rates, in [0, 1), of the running averages of the gradient and of its square: floats, or tensors of
            one element, which are read at every step.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient; with decoupled_weight_decay it shrinks the parameter instead.
        amsgrad: divide by the largest average of squares so far (https://openreview.net/forum?id=ryQu7f-RZ).
        foreach, fused: which of torch's implementations to use. There is one here, fused; both are kept in the groups,
            for the sake of code and state written for torch, and change nothing.
        maximize: step along the gradient, not against it.
        capturable: count steps on the parameters' device, so that a CUDA graph can hold a step: it goes on counting
            with every replay, and reads an lr that is a tensor there anew. Anything else is as it was at the capture.
            The first step has to come before, since it makes the state.
        differentiable: not supported.
        decoupled_weight_decay: AdamW's weight decay.
        max_norm: clip the gradients of all groups together to this 2-norm as they are read, by the formula of
            ``torch.nn.utils.clip_grad_norm_``, in one more pass over them; they themselves stay as they are. Infinity
            measures the norm only. ``optimizer.grad_norm`` is then the norm before clipping at the last step, a 0-d
            tensor; reading its number is what waits for a GPU.
        state_dtype: of the running averages, float32 or bfloat16; their parameter's where not given, as in torch. The
            average of squares in a bfloat16 that was asked for is rounded up or down at random, without which it could
            not decay. float16 and float64 parameters keep a state of their own dtype.
        stochastic_rounding: store bfloat16 parameters rounded up or down at random, in the mean exactly: rounded to
            nearest, an update below half the last digit of a parameter, 1/512 of it, is lost.
        seed: of all random rounding; the numbers follow from it, the step, and an element's place among the parameters.

    Raises:
        ValueError: a value outside its range.
        TypeError: a parameter that is not floating point.
        NotImplementedError: differentiable, or a complex parameter.
        RuntimeError: foreach and fused both True.

    ``torch.amp.GradScaler`` unscales the gradients and skips steps itself; the step has no part in it.
    """

    _step_supports_amp_scaling = False  # read by GradScaler

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ):
        name = f"fastlm.optim.{type(self).__name__}"
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"{name}: max_norm must be above 0, got {max_norm}")
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"{name}: state_dtype must be torch.float32, torch.bfloat16 or None, got {state_dtype}")
        self.max_norm, self.state_dtype = max_norm, state_dtype
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        self.grad_norm: Tensor | None = None
        defaults = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        name = f"fastlm.optim.{type(self).__name__}"
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(
                f"{name}: lr must be a number or a tensor of one element, got {group['lr'].numel()} elements"
            )
        for key in ("lr", "eps", "weight_decay"):
            if not group[key] >= 0:
                raise ValueError(f"{name}: {key} must be at least 0, got {group[key]}")
        betas = group["betas"] if isinstance(group["betas"], (tuple, list)) else (group["betas"],)
        single = all(not isinstance(beta, Tensor) or beta.numel() == 1 for beta in betas)
        if len(betas) != 2 or not single or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{name}: betas must be two numbers in [0, 1), got {betas}")
        if group["foreach"] and group["fused"]:
            raise RuntimeError(f"{name}: foreach and fused cannot both be True")
        self._refuse_unsupported(group)

    def _refuse_unsupported(self, group: dict[str, Any]) -> None:
        if group["differentiable"]:
            name = f"fastlm.optim.{type(self).__name__}"
            raise NotImplementedError(f"{name}: differentiable=True is not supported: the step is done in place")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        name = f"fastlm.optim.{type(self).__name__}"
        try:
            group = self.param_groups[-1]
            self._check_group(group)
            for i, p in enumerate(group["params"]):
                if p.is_complex():
                    raise NotImplementedError(
                        f"{name}: complex parameters are not supported, got {p.dtype} at {i}; hold them as "
                        "torch.view_as_real"
                    )
                if not p.is_floating_point():
                    raise TypeError(f"{name}: parameters must be floating point, got {p.dtype} at {i}")
        except Exception:
            del self.param_groups[-1]
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Reached by load_state_dict and by unpickling. Groups and states of older torch versions lack the newer keys.
        for group in state["param_groups"]:
            for key, value in (
                ("amsgrad", False),
                ("maximize", False),
                ("foreach", None),
                ("capturable", False),
                ("differentiable", False),
                ("fused", None),
                ("decoupled_weight_decay", False),
            ):
                group.setdefault(key, value)
            self._check_group(group)
        super().__setstate__(state)
        capturable = {p for group in self.param_groups if group["capturable"] for p in group["params"]}
        for p, p_state in self.state.items():
            for key in (
                "exp_avg",
                "exp_avg_sq",
                "max_exp_avg_sq",
            ):  # load_state_dict gives them their parameter's dtype
                if key in p_state:
                    p_state[key] = p_state[key].to(self._dtype_of_state(p))
            if "step" in p_state:  # a plain number in older states, on the device where torch's was fused
                device = p.device if p in capturable else "cpu"
                p_state["step"] = torch.as_tensor(p_state["step"], dtype=_step_dtype(), device=device)

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_norm", "state_dtype", "stochastic_rounding", "seed", "grad_norm")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}

    def _dtype_of_state(self, p: Tensor) -> torch.dtype:
        narrow = p.dtype in (torch.float32, torch.bfloat16)
        return self.state_dtype if self.state_dtype is not None and narrow else p.dtype

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            if _capturing():
                raise RuntimeError(
                    f"fastlm.optim.{type(self).__name__}: a parameter of sizes {tuple(p.shape)} has no state yet, "
                    "which a CUDA graph would set to 0 at every replay; take the first step before the capture"
                )
            device = p.device if group["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=_step_dtype(), device=device)
            dtype = self._dtype_of_state(p)
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
        elif group["capturable"] and state["step"].device != p.device:  # made capturable since
            if _capturing():
                raise RuntimeError(
                    f"fastlm.optim.{type(self).__name__}: a group was made capturable after the last step, whose count "
                    "is still on the host; take a step before the capture"
                )
            state["step"] = state["step"].to(p.device)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            raise RuntimeError(
                f"fastlm.optim.{type(self).__name__}: amsgrad was switched on after the first step of a parameter of "
                f"sizes {tuple(p.shape)}, whose state has no max_exp_avg_sq"
            )
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient.

        Args:
            closure: evaluates the model anew, calls backward and returns the loss, which step returns.

        Raises:
            RuntimeError: a sparse gradient, amsgrad switched on late, or a CUDA graph being captured without
                capturable or before the first step.
            ValueError, TypeError: a state whose sizes, dtypes or devices do not fit the parameter's.
            NotImplementedError: a group that was made differentiable.
        """
        name = f"fastlm.optim.{type(self).__name__}"
        if _capturing() and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                f"{name}.step counts steps on the host, which a CUDA graph would not do again; capturable=True counts "
                "them on the GPU"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grouped = []
        for group in self.param_groups:
            self._refuse_unsupported(group)  # a group may have been changed since
            by_device: dict[torch.device, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{name} does not support sparse gradients, got {p.grad.layout}; see torch.optim.SparseAdam"
                    )
                by_device.setdefault(p.device, []).append(p)
            grouped.append(by_device)
        scale = self._scale(grouped)
        calls = 0  # each with random numbers of its own
        for group, by_device in zip(self.param_groups, grouped, strict=True):
            beta1, beta2 = group["betas"]
            for device, params in by_device.items():
                states = [self._state_of(p, group) for p in params]
                lr = group["lr"]
                stays = isinstance(lr, Tensor) and group["capturable"] and lr.device == device
                adam_(
                    params,
                    [p.grad for p in params],
                    [s["exp_avg"] for s in states],
                    [s["exp_avg_sq"] for s in states],
                    [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [],
                    [s["step"] for s in states],
                    lr=lr if stays else float(lr),
                    beta1=float(beta1),
                    beta2=float(beta2),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    decoupled=group["decoupled_weight_decay"],
                    amsgrad=group["amsgrad"],
                    maximize=group["maximize"],
                    scale=scale if scale is None else scale.to(device),
                    stochastic=self.state_dtype == torch.bfloat16,
                    stochastic_params=self.stochastic_rounding,
                    seed=self.seed + calls * 0x9E3779B1,
                )
                calls += 1
        return loss

    def _scale(self, grouped: list[dict[torch.device, list[Tensor]]]) -> Tensor | None:
        """What to multiply all gradients by, after setting grad_norm; None without max_norm."""
        if self.max_norm is None:
            return None
        grads: dict[torch.device, list[Tensor]] = {}
        for by_device in grouped:
            for device, params in by_device.items():
                grads.setdefault(device, []).extend(p.grad for p in params)
        norms = [grad_norm(g) for g in grads.values()]
        if not norms:
            self.grad_norm = torch.zeros(())
            return None
        if len(norms) == 1:
            self.grad_norm = norms[0]
        else:
            self.grad_norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        # A norm that is not finite makes the parameters so too, as after clip_grad_norm_.
        return (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101).

    A drop-in for ``torch.optim.AdamW``. Arguments, limits and errors as in ``Adam``, with weight_decay 0.01.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            max_norm=max_norm,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # a state of Adam, or of a torch that did not write the key


def _capturing() -> bool:
    # torch.compile cannot trace the last of these, which would initialise CUDA if it stood first.
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def _step_dtype() -> torch.dtype:
    """As torch's: float32 counts exactly up to 2^24 steps."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
