"""The trainable parameters of a model, and those that the influence covers."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import Tensor, nn

from tikmix_fast.influence.parallel.fully_sharded import check_sharding, reshard
from tikmix_fast.influence.passes.coverage import Coverage
from tikmix_fast.influence.preconditioners.optimizer_state import canonical_name
from tikmix_fast.influence.torch_private import steps_in_backward, uncompiled

__all__ = ["CoveredParameters"]


class CoveredParameters:
    """List the parameters of a model by their names in the innermost model, without those of wrappers.

    Parameters
    ----------
    model : nn.Module
    exclude : tuple of str
        Patterns (``fnmatch``) of names to leave out.

    Raises
    ------
    ValueError
        If a pattern matches nothing, or no parameter is left.
    TypeError
        If a parameter is complex.
    """

    def __init__(self, model: nn.Module, exclude: tuple[str, ...]) -> None:
        self._model, self._exclude = model, exclude
        reshard(model)
        trainable = self.trainable()
        for pattern in exclude:
            if not any(fnmatchcase(name, pattern) for name in trainable):
                raise ValueError(
                    f"exclude pattern {pattern!r} matches no trainable parameter; there are: "
                    f"{', '.join(trainable) or 'none'}"
                )
        for name, parameter in self.parameters().items():
            if parameter.is_complex():
                raise TypeError(f"{name!r} is complex, which influence is not defined for: leave it out with exclude=")
        if not self.parameters():
            raise ValueError("model must have a trainable parameter that is not excluded")

    def trainable(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name."""
        model = self._model
        while isinstance(model, nn.parallel.DistributedDataParallel) or uncompiled(model) is not model:
            model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else uncompiled(model)
        return {canonical_name(name): each for name, each in model.named_parameters() if each.requires_grad}

    def parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters that are not excluded, by name."""
        return {name: value for name, value in self.trainable().items() if not self._is_excluded(name)}

    def excluded(self) -> list[str]:
        """Return the names of the trainable parameters that are excluded."""
        return [name for name in self.trainable() if self._is_excluded(name)]

    def begin_pass(self) -> dict[str, Tensor]:
        """Return `parameters` for a new pass; sharded ones become parts again, as optimizers know them.

        Raises
        ------
        RuntimeError
            If an optimizer steps inside the backward.
        TypeError
            If a parameter is sharded by anything but ``fully_shard``.
        """
        reshard(self._model)
        parameters = self.parameters()
        check_sharding(self._model, parameters)
        for name, parameter in parameters.items():
            if steps_in_backward(parameter):
                raise RuntimeError(
                    f"{name!r} has a post-accumulate-grad hook: an optimizer that steps inside the backward is not "
                    "supported; remove the hook while measuring"
                )
        return parameters

    def coverage(self, captured: Collection[str]) -> Coverage:
        """Return the coverage, given the names of the captured parameters."""
        parts: tuple[dict[str, int], ...] = ({}, {}, {})
        for name, parameter in self.trainable().items():
            part = 1 if self._is_excluded(name) else 0 if name in captured else 2
            parts[part][name] = parameter.numel()
        return Coverage(*parts)

    def _is_excluded(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._exclude)
