"""Adam and AdamW, drop-in for torch.optim's: the same arguments, param_groups and state_dict, one fused step."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastlm._eight_bit import blocks_of, dequantized, quantized
from fastlm.ops.adam import adam_
from fastlm.optim._fused import Call, Fused, capturing, is_distributed

# Below it a state in 8 bits saves nothing that counts, and small parameters (norms, biases) are the sensitive ones.
_LEAST_IN_8_BITS = 4096
_AVERAGES = {"exp_avg": True, "exp_avg_sq": False}  # and whether they have a sign


class Adam(Fused):
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980), all parameters of a device in one fused pass.

    A drop-in for ``torch.optim.Adam``; a ``state_dict`` of either loads into the other, but for states of 8 bits, which
    load into this one alone. 16-bit dtypes are computed in
    float32 and rounded when stored. Parameters of any strides are updated in place; complex ones as pairs of real
    numbers, and DTensors (of ``fully_shard``, of tensor parallelism) each rank its part.

    Args:
        params: parameters, named parameters, or dicts that define groups; floating point or complex.
        lr: learning rate, a float or a tensor of one element (on a GPU, reading it waits for the GPU at every step,
            unless steps are counted there: with capturable, fused, skip_nonfinite or a GradScaler).
        betas: decay rates, in [0, 1), of the running averages of the gradient and of its square: floats, or tensors of
            one element, which are read at every step.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient; with decoupled_weight_decay it shrinks the parameter instead.
        amsgrad: divide by the largest average of squares so far (https://openreview.net/forum?id=ryQu7f-RZ).
        foreach: kept in the groups for the sake of code and state written for torch, and changes nothing: the step is
            fused. As in torch, tensors for lr and betas do not go with True.
        maximize: step along the gradient, not against it.
        capturable: count steps on the parameters' device, so that a CUDA graph can hold a step: it goes on counting
            with every replay, and reads an lr that is a tensor there anew. Anything else is as it was at the capture.
            The first step has to come before, since it makes the state.
        differentiable: not supported.
        fused: the step is fused anyway; True also counts steps on the parameters' device, as torch then does.
        decoupled_weight_decay: AdamW's weight decay.
        l1: weight of an L1 penalty, whose gradient, l1 * sign(parameter), is added to the gradient. An option of each
            group, as all before it.
        max_norm: clip the gradients of all groups together to this 2-norm as they are read, by the formula of
            ``torch.nn.utils.clip_grad_norm_``, in one more pass over them; they themselves stay as they are. Infinity
            measures the norm only. ``optimizer.grad_norm`` is then the norm before clipping at the last step, a 0-d
            tensor, across all ranks where gradients are DTensors; reading its number is what waits for a GPU.
        skip_nonfinite: skip steps whose gradients' norm is not finite: nothing changes but
            ``optimizer.skipped_steps``, a 0-d tensor, which counts them. ``grad_norm`` is set too.
        state_dtype: of the running averages, float32, bfloat16 or uint8; their parameter's where not given, as in
            torch, and float32 with master_weights. The average of squares in a bfloat16 that was asked for is rounded
            up or down at random, without which it could not decay. uint8 is for parameters of at least 4096 elements
            (smaller ones have float32): 8 bits and a float32 for each block of 256, 2.03 bytes a parameter for both
            averages (https://arxiv.org/abs/2110.02861; here logarithmic codes, rounded at random). float64 and complex
            parameters keep states of their own dtype, and for float16 ones bfloat16 is as if not given.
        master_weights: 16-bit parameters have a float32 master in the state: the steps are the master's, and the
            parameter is what it rounds to. So a parameter that is changed by other means goes back at the next step:
            load the optimizer's ``state_dict`` with the model's.
        ema_decay: keep in the state, in float32, an average of each parameter after its steps, which decays by this
            factor; ``with optimizer.ema_weights():`` the parameters hold their averages.
        stochastic_rounding: store bfloat16 parameters rounded up or down at random, in the mean exactly: rounded to
            nearest, an update below half the last digit of a parameter, 1/512 of it, is lost.
        seed: of all random rounding; the numbers follow from it, the step, and an element's place among the parameters.

    Raises:
        ValueError: a value outside its range, or options that exclude each other.
        TypeError: a parameter that is neither floating point nor complex.
        NotImplementedError: differentiable, amsgrad with states of 8 bits, or a parameter of FSDP1.
        RuntimeError: foreach and fused both True.

    ``torch.amp.GradScaler`` leaves unscaling and skipping to the step, which counts what it skips.
    """

    GROUP_DEFAULTS: ClassVar[dict[str, Any]] = {
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": False,
        "l1": 0.0,
    }
    _OWN = ("state_dtype", *Fused._OWN)

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
        l1: float = 0.0,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        ema_decay: float | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ):
        if state_dtype not in (None, torch.float32, torch.bfloat16, torch.uint8):
            raise ValueError(
                f"{self._name}: state_dtype must be torch.float32, torch.bfloat16, torch.uint8 or None, "
                f"got {state_dtype}"
            )
        self.state_dtype = state_dtype
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
        self._check_common(group, ("lr", "eps", "weight_decay", "l1"))
        betas = group["betas"] if isinstance(group["betas"], (tuple, list)) else (group["betas"],)
        single = all(not isinstance(beta, Tensor) or beta.numel() == 1 for beta in betas)
        if len(betas) != 2 or not single or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{self._name}: betas must be two numbers in [0, 1), got {betas}")
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError(f"{self._name}: betas must be two floats or two tensors, got {betas}")
        if (
            group["foreach"]
            and not group["capturable"]
            and (isinstance(group["lr"], Tensor) or isinstance(betas[0], Tensor))
        ):
            raise ValueError(
                f"{self._name}: lr and betas must be floats with foreach=True and capturable=False, got {group['lr']} "
                f"and {betas}"
            )

    def _refuse_unsupported(self, group: dict[str, Any]) -> None:
        super()._refuse_unsupported(group)
        if group["amsgrad"] and getattr(self, "state_dtype", None) == torch.uint8:
            raise NotImplementedError(f"{self._name}: amsgrad has no state of 8 bits")

    # --- state --------------------------------------------------------------------------------------------------------
    def _dtype_of_state(self, p: Tensor) -> torch.dtype:
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return p.dtype
        if self.state_dtype == torch.uint8:  # where it is too small
            return torch.float32
        if self.state_dtype is None or (self.state_dtype == torch.bfloat16 and p.dtype == torch.float16):
            return torch.float32 if self._has_master(p) else p.dtype
        return self.state_dtype

    def _in_8_bits(self, p: Tensor) -> bool:
        return (
            self.state_dtype == torch.uint8
            and p.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and p.numel() >= _LEAST_IN_8_BITS
            and torch.ops.aten.is_non_overlapping_and_dense(p)
        )

    def _refuse_sharded_codes(self, p: Tensor) -> None:
        if is_distributed(p):
            raise NotImplementedError(
                f"{self._name}: states of 8 bits are not for DTensors: where one is cut, its blocks would be others"
            )

    def _new_state(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        if state:
            return {}
        if self._in_8_bits(p):
            self._refuse_sharded_codes(p)
            new = {}
            for key in _AVERAGES:
                new[f"{key}_codes"] = torch.zeros_like(p, dtype=torch.uint8)
                new[f"{key}_scales"] = torch.zeros(blocks_of(p.numel()), dtype=torch.float32, device=p.device)
            return new
        keys = (*_AVERAGES, "max_exp_avg_sq") if group["amsgrad"] else _AVERAGES
        return {key: torch.zeros_like(p, dtype=self._dtype_of_state(p)) for key in keys}

    def _loaded_state(self, p: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        state = {}
        for key, signed in _AVERAGES.items():
            parts = [saved.get(name) for name in (f"{key}_codes", f"{key}_scales", key)]
            codes, scales, x = (t if t is None else t.to(p.device) for t in parts)
            if codes is not None:  # blocks are of memory, in which a dimension of size 1 has no place
                if any(a != b for a, b, size in zip(codes.stride(), p.stride(), p.shape, strict=True) if size != 1):
                    raise ValueError(
                        f"{self._name}: a state of 8 bits with strides {codes.stride()} does not fit a parameter with "
                        f"{p.stride()}"
                    )
                codes = codes.as_strided(p.shape, p.stride())
            if self._in_8_bits(p):
                self._refuse_sharded_codes(p)
                if codes is None and x is not None:
                    flat = torch.empty_like(p, dtype=torch.float32).copy_(x).as_strided((p.numel(),), (1,))
                    codes, scales = quantized(flat, signed)
                    codes = codes.as_strided(p.shape, p.stride())
                state |= {} if codes is None else {f"{key}_codes": codes.to(torch.uint8), f"{key}_scales": scales}
                continue
            if x is None and codes is not None:
                flat = dequantized(codes.as_strided((p.numel(),), (1,)), scales, signed)
                x = flat.as_strided(p.shape, p.stride())
            if x is not None:
                state[key] = x.to(self._dtype_of_state(p))
        if (top := saved.get("max_exp_avg_sq")) is not None:
            state["max_exp_avg_sq"] = top.to(device=p.device, dtype=self._dtype_of_state(p))
        return state

    def _counts(self, group: dict[str, Any]) -> bool:
        return True

    def _counts_on_device(self, device: torch.device, group: dict[str, Any], skips: bool) -> bool:
        return bool(group["capturable"] or (device.type != "cpu" and (group["fused"] or skips)))

    # --- the step -----------------------------------------------------------------------------------------------------
    def _check_call(self, call: Call) -> None:
        if call.group["amsgrad"] and not all("max_exp_avg_sq" in s for s in call.states):
            sizes = next(
                tuple(p.shape) for p, s in zip(call.params, call.states, strict=True) if "max_exp_avg_sq" not in s
            )
            raise RuntimeError(
                f"{self._name}: amsgrad was switched on after the first step of a parameter of sizes {sizes}, whose "
                "state has no max_exp_avg_sq"
            )
        if any(isinstance(beta, Tensor) and beta.is_cuda for beta in call.group["betas"]):
            self._refuse_capture(
                capturing(), "betas on a GPU are read by the host, which a CUDA graph would not do again"
            )

    def _run(self, call: Call, scale: Tensor | None, found_inf: Tensor | None, seed: int) -> None:
        group, lr = call.group, call.group["lr"]
        beta1, beta2 = group["betas"]
        kind = "_codes" if "exp_avg_codes" in call.states[0] else ""
        steps = call.state("step")
        stays = isinstance(lr, Tensor) and lr.device == call.device == steps[0].device
        adam_(
            call.local(call.params),
            call.local(call.grads),
            call.state(f"exp_avg{kind}"),
            call.state(f"exp_avg_sq{kind}"),
            call.state("max_exp_avg_sq") if group["amsgrad"] else [],
            steps,
            lr=lr if stays else float(lr),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            scale=scale,
            stochastic=self.state_dtype == torch.bfloat16,
            stochastic_params=self.stochastic_rounding,
            seed=seed,
            l1=group["l1"],
            found_inf=found_inf,
            masters=call.state("master_param"),
            emas=call.state("ema") if self.ema_decay is not None else [],
            ema_decay=self.ema_decay or 0.0,
            exp_avg_scales=call.state("exp_avg_scales"),
            exp_avg_sq_scales=call.state("exp_avg_sq_scales"),
        )


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
        l1: float = 0.0,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        ema_decay: float | None = None,
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
            l1=l1,
            max_norm=max_norm,
            skip_nonfinite=skip_nonfinite,
            state_dtype=state_dtype,
            master_weights=master_weights,
            ema_decay=ema_decay,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # a state of Adam, or of a torch that did not write the key
