"""Save and load Adam's second moments in a safetensors file, by parameter name."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from tikmix_fast.influence.preconditioners.optimizer_state import canonical_name, read_adam
from tikmix_fast.tensor_files import read_tensors, write_tensors

__all__ = ["load_adam", "save_adam"]

_FORMAT = "tikmix_fast.adam"


def save_adam(path: str | os.PathLike[str], optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Write what the preconditioner "adam" needs: v, step, lr, beta2 and eps of every parameter.

    Parameters
    ----------
    path : path
    optimizer : torch.optim.Adam or AdamW
        It must have state for every trainable parameter of the model.
    model : nn.Module
        The model that the optimizer trains.

    Raises
    ------
    TypeError, ValueError
        If the optimizer is of another kind, or lacks the state of a parameter.

    Examples
    --------
    >>> import tempfile
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adam(f"{folder}/adam.safetensors", optimizer, model)
    ...     sorted(load_adam(f"{folder}/adam.safetensors")["state"])
    ['bias', 'weight']
    """
    parameters = {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    moments = read_adam(optimizer, parameters)
    about = {
        name: {"step": each.step, "beta2": each.beta2, "eps": each.eps, "lr": float(each.lr)}
        for name, each in moments.items()
    }
    write_tensors(path, _FORMAT, {name: each.v for name, each in moments.items()}, about)


def load_adam(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_adam` wrote, as a state dict with names: the ``optimizer`` of an `InfluenceEngine`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If `save_adam` did not write it, or it is damaged; the message names the file.
    """
    wrong = f"{os.fspath(path)!r} is no file that tikmix_fast.checkpoints.adam_files.save_adam wrote"
    try:
        moments, settings = read_tensors(path, _FORMAT)
    except ValueError as error:
        raise ValueError(f"{wrong}: {error}") from None
    if not isinstance(settings, dict) or set(settings) != set(moments):
        raise ValueError(f"{wrong}: settings and moments name different parameters")
    for name, each in settings.items():
        numbers = [each.get(key) for key in ("step", "beta2", "eps", "lr")] if isinstance(each, dict) else [None]
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError(f"{wrong}: it lacks a setting of {name!r}")
        if not bool(torch.isfinite(moments[name]).all()) or bool((moments[name] < 0).any()):
            raise ValueError(f"{wrong}: the moment of {name!r} is negative or not finite")
    return {
        "state": {name: {"exp_avg_sq": moments[name], "step": each["step"]} for name, each in settings.items()},
        "param_groups": [
            {"params": [name], "lr": each["lr"], "betas": (0.0, each["beta2"]), "eps": each["eps"]}
            for name, each in settings.items()
        ],
    }
