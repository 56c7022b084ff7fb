"""SGD, drop-in for torch.optim's: the same arguments, param_groups and state_dict, one fused step."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastlm.ops.sgd import sgd_
from fastlm.optim._fused import Call, Fused, step_dtype


class SGD(Fused):
    """Stochastic gradient descent with momentum, all parameters of a device in one fused pass.

    A drop-in for ``torch.optim.SGD``; a ``state_dict`` of either loads into the other (here states with momentum also
    count their steps). 16-bit dtypes are computed in float32 and rounded when stored. Nothing waits for a GPU, and a
    CUDA graph can hold a step once the first has made the state; it reads an lr that is a tensor on the GPU anew.

    Args:
        params: parameters, named parameters, or dicts that define groups; floating point or complex.
        lr: learning rate, a float or a tensor of one element.
        momentum: decay rate of the sum of gradients, which takes the gradient's place where it is not 0.
        dampening: what new gradients lack in that sum, but for the first.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: step along the gradient as it will be after the next step of momentum.
        maximize: step along the gradient, not against it.
        foreach, fused: kept in the groups for the sake of code and state written for torch, and change nothing: the
            step is fused.
        differentiable: not supported.
        l1, max_norm, skip_nonfinite, master_weights, ema_decay, stochastic_rounding, seed: as in ``Adam``. With
            master_weights momentum is float32.

    Raises:
        ValueError: a value outside its range, or options that exclude each other.
        TypeError: a parameter that is neither floating point nor complex.
        NotImplementedError: differentiable, or a parameter of FSDP1.
        RuntimeError: foreach and fused both True.

    Sparse gradients are stepped by torch, where lr and maximize are all that is asked for.
    """

    GROUP_DEFAULTS: ClassVar[dict[str, Any]] = {
        "nesterov": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
        "l1": 0.0,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        l1: float = 0.0,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = False,
        ema_decay: float | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "l1": l1,
        }
        super().__init__(
            params,
            defaults,
            max_norm=max_norm,
            skip_nonfinite=skip_nonfinite,
            master_weights=master_weights,
            ema_decay=ema_decay,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_common(group, ("lr", "momentum", "weight_decay", "l1"))
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"{self._name}: nesterov goes with a momentum above 0 and without dampening, got {group['momentum']} "
                f"and {group['dampening']}"
            )

    # --- state --------------------------------------------------------------------------------------------------------
    def _new_state(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        if group["momentum"] == 0 or "momentum_buffer" in state:
            return {}
        # Where momentum was switched on since, its first step is this one.
        step = torch.zeros((), dtype=step_dtype(), device=p.device)
        return {"momentum_buffer": torch.zeros_like(p, dtype=self._dtype_of_state(p)), "step": step}

    def _dtype_of_state(self, p: Tensor) -> torch.dtype:
        return torch.float32 if self._has_master(p) else p.dtype

    def _loaded_state(self, p: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        buffer = saved.get("momentum_buffer")  # None before the first step in some versions of torch
        if buffer is None:
            return {}
        return {"momentum_buffer": buffer.to(device=p.device, dtype=self._dtype_of_state(p))}

    def _counts(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0 or self.stochastic_rounding

    def _last_entry(self, group: dict[str, Any]) -> str:
        return "momentum_buffer" if group["momentum"] != 0 else "step"

    def _counts_on_device(self, device: torch.device, group: dict[str, Any], skips: bool) -> bool:
        return True

    # --- the step -----------------------------------------------------------------------------------------------------
    def _gradient(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        if p.grad.layout is not torch.sparse_coo:
            return super()._gradient(p, group)
        more = ("momentum", "weight_decay", "l1")
        asked = [key for key in more if group[key] != 0]
        asked += [key for key in self._OPTIONS if getattr(self, key) not in (None, False)]
        asked += [key for key in ("grad_scale", "found_inf") if getattr(self, key, None) is not None]
        if asked:
            raise RuntimeError(f"{self._name} does not support sparse gradients with {', '.join(asked)}")
        return p.grad

    def _run(self, call: Call, scale: Tensor | None, found_inf: Tensor | None, seed: int) -> None:
        group, lr = call.group, call.group["lr"]
        if call.grads[0].layout is torch.sparse_coo:
            for p, grad in zip(call.params, call.grads, strict=True):
                p.add_(grad, alpha=float(lr) * (1 if group["maximize"] else -1))
            return
        momentum, counts = group["momentum"], self._counts(group)
        stays = isinstance(lr, Tensor) and lr.device == call.device and lr.device.type != "cpu"
        sgd_(
            call.local(call.params),
            call.local(call.grads),
            call.state("momentum_buffer") if momentum != 0 else [],
            call.state("step") if counts else [],
            lr=lr if stays else float(lr),
            momentum=momentum,
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            l1=group["l1"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            scale=scale,
            found_inf=found_inf,
            masters=call.state("master_param"),
            emas=call.state("ema") if self.ema_decay is not None else [],
            ema_decay=self.ema_decay or 0.0,
            stochastic_params=self.stochastic_rounding,
            seed=seed,
        )
