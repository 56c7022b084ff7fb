"""The ops' sharding rules, told to torch.distributed.tensor: which DTensors an op takes as they are.

A rule names the dimensions of each tensor of the schema, one letter each: ``mK, nK, n -> mn`` is a linear layer.

* Small letters may be sharded, all tensors that have the letter together; capitals never are.
* ``*`` stands for as many dimensions as the tensor has besides those named, sharded as small letters are.
* ``.`` is a dimension of size 1 that others are broadcast against. An empty name: the tensor is replicated.
* ``nk+m``: where m is sharded, each shard holds a part of the sum. A tensor that is to have neither is replicated.

What no rule allows is gathered first, as torch.distributed.tensor does. Groups of heads are sharded where the mesh's
ranks, all of its dimensions together, divide the key heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fastlm._library import Op, all_ops

_Dims = tuple[list[str], list[str]]  # a tensor's dimensions, and those that it is summed over


def _dims(name: str, leading: int) -> _Dims:
    def spell(letters: str) -> list[str]:
        return [d for c in letters for d in ([f"*{i}" for i in range(leading)] if c == "*" else [c])]

    kept, _, summed = name.strip().partition("+")
    return spell(kept), spell(summed)


def parse(rule: str, shapes: Sequence[Sequence[int] | None]) -> tuple[list[_Dims], list[_Dims]]:
    """Dimensions of the inputs, whose sizes these are (None: not given), and of the outputs."""
    left, right = (side.split(",") for side in rule.split("->"))
    leading = next(
        (len(s) - len(n.strip().partition("+")[0]) + 1 for n, s in zip(left, shapes, strict=True) if s and "*" in n), 0
    )
    return [_dims(n, leading) for n in left], [_dims(n, leading) for n in right]


def shardings(op: Op, args: Sequence[Any], ranks: int, placements: Any) -> list[tuple[list[Any], list[Any]]]:
    """Acceptable placements, (of the outputs, of the arguments), on a mesh of so many ranks.

    Args:
        args: the schema's, with anything that has a shape for a tensor.
        placements: the module with Shard, Partial and Replicate.
    """
    tensors = [i for i, p in enumerate(op.parameters) if "Tensor" in str(p.type)]
    shapes = [getattr(args[i], "shape", None) for i in tensors]

    def placed(inputs: list[Any], outputs: list[Any]) -> tuple[list[Any], list[Any]]:
        by_position = dict(zip(tensors, inputs, strict=True))
        return outputs, [None if args[i] is None else by_position.get(i) for i in range(op.arity)]

    replicate = placements.Replicate()
    found = [placed([replicate] * len(tensors), [replicate] * op.returns)]
    rule = op.sharding(*args) if callable(op.sharding) else op.sharding
    if rule is None:
        return found
    inputs, outputs = parse(rule, shapes)
    sizes: dict[str, set[int]] = {}
    for (kept, _), shape in zip(inputs, shapes, strict=True):
        if shape is not None and kept:
            for d, size in zip(kept, shape, strict=True):
                sizes.setdefault(d, set()).add(size)

    def place(dims: _Dims, d: str) -> Any:
        kept, summed = dims
        return placements.Shard(kept.index(d)) if d in kept else placements.Partial() if d in summed else replicate

    for d, size in sizes.items():
        # Groups of heads stay together where every size is cut evenly, whatever part of the mesh they are cut over.
        if (d[0] == "*" or d.islower()) and (len(size) == 1 or all(n % ranks == 0 for n in size)):
            found.append(placed([place(dims, d) for dims in inputs], [place(dims, d) for dims in outputs]))
    return found


def register(dtensor: ModuleType) -> None:
    try:
        _register(dtensor)
    except (ImportError, AttributeError, TypeError) as error:  # its interface is said to be experimental
        warnings.warn(f"fastlm's ops take no DTensors in this version of torch: {error}", RuntimeWarning, stacklevel=2)


def _register(dtensor: ModuleType) -> None:
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    schema_info = dtensor.DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for op in all_ops():
        if op.sharding is None:
            continue

        def rule(*args: Any, op: Op = op) -> list[tuple[list[Any], list[Any]]]:
            args = op.filled(args)
            mesh = next(a.mesh for a in args if hasattr(a, "mesh"))
            return shardings(op, args, mesh.size(), dtensor)

        overloads = list(op.overloads.values())
        register_sharding(overloads)(rule)
        # Where it looks for a choice that it has made before, it would have compared tensors and integers alone; rules
        # depend on flags too, and on which tensors are given.
        schema_info.update(dict.fromkeys(overloads, RuntimeSchemaInfo(0, needs_pytree=True)))
