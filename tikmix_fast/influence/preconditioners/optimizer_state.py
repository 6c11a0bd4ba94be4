"""Read Adam's second moments by parameter name, from a live optimizer or a saved state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tikmix_fast.influence.parallel.fully_sharded import whole

__all__ = ["AdamMoment", "canonical_name", "listed", "read_adam"]


@dataclass(frozen=True)
class AdamMoment:
    """Adam's state of one parameter: v [*shape], the step count t, and the settings of its group."""

    v: Tensor
    step: float
    beta2: float
    eps: float
    lr: float

    def denominator(self, floor: float = 0.0) -> Tensor:
        """Return sqrt(v / (1 - beta2^t)) + eps [*shape], float32 or wider.

        Each root is at least ``floor`` times the median of the roots that are not zero. All ranks must call this if v
        is sharded, because its parts are gathered.
        """
        v = whole(self.v)
        corrected: Tensor = (v if v.dtype == torch.float64 else v.float()) / (1.0 - self.beta2**self.step)
        roots = corrected.sqrt_()
        if floor and bool((roots > 0).any()):
            roots.clamp_min_(floor * float(roots[roots > 0].median()))
        return roots.add_(self.eps)


def canonical_name(name: str) -> str:
    """Return a parameter's name in the innermost model, without the parts that wrappers add.

    Examples
    --------
    >>> canonical_name("_orig_mod.blocks.0._checkpoint_wrapped_module.weight")
    'blocks.0.weight'
    """
    wrappers = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


# The settings of a parameter group, and the name and state of each parameter; the name is "" for other models' ones.
_Group = tuple[Mapping[str, Any], list[tuple[str, Mapping[str, Any]]]]


def read_adam(optimizer: Any, parameters: Mapping[str, Tensor]) -> dict[str, AdamMoment]:
    """Return the second moment of every parameter, by name.

    Parameters
    ----------
    optimizer : torch.optim.Adam, torch.optim.AdamW, or mapping
        A live optimizer's parameters are matched by identity. A mapping is a state dict with names: either the keys of
        ``state`` are names, or its groups have ``param_names``, as those of an optimizer made from
        ``model.named_parameters()``.
    parameters : mapping of str to Tensor

    Raises
    ------
    TypeError
        If ``optimizer`` is anything else.
    ValueError
        If a parameter has no state (take a step first), the state belongs to another model or has indices instead of
        names, or the optimizer maximises.
    """
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        by_identity = {id(parameter): name for name, parameter in parameters.items()}
        groups: list[_Group] = [
            (group, [(by_identity.get(id(each), ""), optimizer.state.get(each, {})) for each in group["params"]])
            for group in optimizer.param_groups
        ]
    elif isinstance(optimizer, Mapping):
        groups = list(_saved_groups(optimizer))
    else:
        raise TypeError(
            "optimizer must be a torch.optim.Adam or AdamW, or a state dict of one with parameter names; got "
            f"{type(optimizer).__name__}. For other optimizers pass a Preconditioner of your own, or "
            "preconditioner='identity'"
        )
    moments: dict[str, AdamMoment] = {}
    for group, members in groups:
        for name, state in members:
            if name in parameters:
                moments[name] = _moment(name, group, state, parameters[name])
    missing = [name for name in parameters if name not in moments]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {listed(missing)}: it was made for another model or for a part of this one. "
            "Leave such parameters out with exclude=, or pass the optimizer that trains them"
        )
    return moments


def _saved_groups(saved: Mapping[str, Any]) -> Iterator[_Group]:
    if "state" not in saved or "param_groups" not in saved:
        raise ValueError(
            f"an optimizer's state dict must have 'state' and 'param_groups'; got {sorted(map(str, saved))}"
        )
    for group in saved["param_groups"]:
        keys = list(group["params"])
        names = group.get("param_names") or keys
        if not all(isinstance(name, str) for name in names):
            raise ValueError(
                "the optimizer state is keyed by index and carries no names, so it cannot be matched to parameters "
                "safely. Make the optimizer from model.named_parameters() before saving, or pass the live optimizer"
            )
        yield (
            group,
            [(canonical_name(name), saved["state"].get(key, {})) for key, name in zip(keys, names, strict=True)],
        )


def _moment(name: str, group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> AdamMoment:
    if group.get("maximize"):
        raise ValueError(
            f"the optimizer maximises (group of {name!r}): influence is defined for a loss that is minimised"
        )
    key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    if key not in state or "step" not in state:
        raise ValueError(
            f"the optimizer has no {key!r} for {name!r}: take at least one optimizer step before measuring, load "
            "the optimizer's checkpoint, or use preconditioner='identity'"
        )
    v, step = state[key], float(state["step"])
    if v.shape != parameter.shape:
        raise ValueError(
            f"the optimizer's {key!r} for {name!r} has shape {tuple(v.shape)}, the parameter "
            f"{tuple(parameter.shape)}: this state belongs to another model"
        )
    if step < 1:
        raise ValueError(f"the optimizer has taken no step for {name!r}: take one before measuring")
    return AdamMoment(v.detach(), step, float(group["betas"][1]), float(group["eps"]), float(group["lr"]))


def listed(names: list[str], most: int = 5) -> str:
    """Return the first names for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
