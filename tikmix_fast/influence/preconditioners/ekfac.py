"""P = the damped inverse of the Fisher matrix, in a Kronecker-factored eigenbasis (EK-FAC) or on its diagonal."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tikmix_fast.influence.capture.captured_pass import captured_pass
from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.loss.sampled_labels import sampled_labels
from tikmix_fast.influence.loss.watch import SeenLosses, targets_and_weight, watch_losses
from tikmix_fast.influence.preconditioners.curvature import Basis, EigenvalueRecorder, FactorRecorder
from tikmix_fast.influence.preconditioners.optimizer_state import canonical_name
from tikmix_fast.influence.torch_private import tree_leaves
from tikmix_fast.tensor_files import read_tensors, write_tensors

__all__ = ["EKFAC", "DiagonalFisher"]

_FORMAT = "tikmix_fast.fisher"
_VERSION = 1

Stage = Literal["factors", "eigenvalues"]


class EKFAC:
    """P = (F + damping)^-1 with the Fisher matrix F taken as diagonal in a Kronecker-factored eigenbasis, by layer.

    F is the Fisher matrix of the model's own distribution per target token: labels are sampled from the logits. It is
    fitted in two streaming passes over some batches (`InfluenceEngine.fisher`, or `fit`): "factors" sums x x^T over the
    inputs x of every linear layer and d d^T over the gradients d of its outputs, whose eigenvectors are the basis;
    "eigenvalues" sums the squares of the layer's gradients in it. The correction of George et al. 2018 (arXiv
    1806.03884), with damping as in Grosse et al. 2023 (arXiv 2308.03296).

    The eigenvalues are second moments of *per-sequence* gradients where ``sequences`` is told, else of the gradient of
    the whole batch. Both are unbiased, as the sampled labels of different tokens are independent and their gradients
    have mean zero; an eigenvalue's relative standard error is about sqrt(2 / number of sequences, or batches). The
    whole batch's gradient is used for the weight of several products in one forward (a tied or looped layer), because
    its uses add up there, and, with the identity as basis (diagonal Fisher), for whatever is not itself the weight of a
    product: biases, norms, embeddings. A bias is preconditioned apart from its weight.

    Only task gradients are preconditioned, one parameter at a time: never those of domains. Factors outlive
    ``engine.refresh()``; fit them anew (`reset`) when the curvature has changed. They are of this process only: under
    DistributedDataParallel fit in one, `save`, and `load` in all.

    Parameters
    ----------
    damping : float
        Added to the eigenvalues of every parameter, as a multiple of their mean.
    absolute_damping : float, optional
        Added instead, the same for all parameters, in units of F.
    max_side : int
        A side of a weight longer than this keeps the identity as its basis (the vocabulary side of a head). Memory:
        4 bytes times the parameter and the squares of its sides, twice that and one gradient while fitting
        (`factor_memory`); time: one ``eigh`` of every side.
    seed : int
        Of the sampled labels.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(8, 5)
    >>> x, y = torch.randn(64, 8), torch.randint(5, (64,))
    >>> ekfac = EKFAC().fit(model, [x], lambda model, x: nn.functional.cross_entropy(model(x), y))
    >>> ekfac.prepare(dict(model.named_parameters()), None)
    >>> ekfac.apply("weight", torch.ones(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    name = "ekfac"
    stages: ClassVar[tuple[Stage, ...]] = ("factors", "eigenvalues")

    def __init__(
        self,
        damping: float = 0.1,
        *,
        absolute_damping: float | None = None,
        max_side: int = 8192,
        seed: int = 0,
    ) -> None:
        for argument, value in (("damping", damping), ("absolute_damping", absolute_damping)):
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{argument} must be a finite number of at least 0; got {value!r}")
        for argument, count in (("max_side", max_side), ("seed", seed)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"{argument} must be an int of at least 0; got {count!r}")
        self.damping, self.absolute_damping = damping, absolute_damping
        self.max_side, self.seed = max_side, seed
        self.reset()

    def reset(self) -> None:
        """Forget what was fitted."""
        self._factors: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._bases: dict[str, Basis] | None = {} if "factors" not in self.stages else None
        self._squares: dict[str, Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        self.tokens = 0

    @contextmanager
    def observe(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        stage: Stage = "eigenvalues",
        *,
        sequences: int | None = None,
        tokens: int | None = None,
        batch_dim: int | None = None,
    ) -> Iterator[None]:
        """Learn from one batch: run forward and backward inside; see `InfluenceEngine.fisher`."""
        self._check_stage(stage)
        for argument, value in (("sequences", sequences), ("tokens", tokens)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{argument} must be a positive int or None; got {value!r}")
        recorder: FactorRecorder | EigenvalueRecorder
        if stage == "factors":
            recorder = FactorRecorder(RowLabels(0, 1, batch_dim), self.max_side)
        else:
            self._decompose()
            ids = 0 if sequences is None else torch.arange(sequences, device="cpu")
            recorder = EigenvalueRecorder(RowLabels(ids, sequences or 1, batch_dim), self._bases or {})
        losses = sampled_labels(self._generator) if tokens is None else nullcontext()
        watched = watch_losses() if tokens is not None else nullcontext()
        with losses as seen, watched as given:
            # Fused, the sink would make the weight gradient; factors need none.
            with captured_pass(model, parameters, recorder, fused=stage == "factors") as (capture, taken):
                yield
                gradients = taken.taken()
                capture.streams.join(gradients.values())
            if not gradients:
                raise RuntimeError("no gradient reached a parameter: run loss.backward() inside fisher(...)")
            if seen is not None and not seen.calls:
                raise RuntimeError(
                    "no call of F.cross_entropy or F.nll_loss was seen, so no labels were sampled: sample them "
                    "yourself, run the backward of the sum of the token losses, and pass tokens=, their number"
                )
            if given is not None:
                _check_given(tokens or 0, given)
            counted = tokens if seen is None else seen.tokens()
            if not counted:
                raise ValueError(
                    "the batch has no target token: all labels are ignored, or the loss is multiplied by 0"
                )
            if isinstance(recorder, FactorRecorder):
                self._add_factors(recorder)
            else:
                self._add_squares(recorder, gradients, counted or 0)

    def fit(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        parameters: Mapping[str, Tensor] | None = None,
        batch_dim: int | None = 0,
    ) -> EKFAC:
        """Run both passes over the batches, and return itself.

        Parameters
        ----------
        model : nn.Module
            In the mode to be measured in (``model.eval()`` to switch dropout off).
        batches : iterable
            Gone through once per stage, so a list or a DataLoader without shuffling, no generator. The first tensor
            found in a batch has one entry of its first dimension per sequence.
        loss : callable (model, batch) -> Tensor
            Calls the model and F.cross_entropy or F.nll_loss; what the loss is divided by does not matter.
        parameters : mapping of str to Tensor, optional
            Default: all that are trainable.
        batch_dim : 0, 1 or None
            As in `InfluenceEngine`.

        Raises
        ------
        TypeError
            If the batches can be gone through only once.
        """
        if len(self.stages) > 1 and iter(batches) is batches:
            raise TypeError(
                "batches must be a list or another iterable that can be gone through twice; got an iterator"
            )
        if parameters is None:
            parameters = {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        for stage in self.stages:
            for batch in batches:
                leaves = tree_leaves(batch)
                sequences = next((len(each) for each in leaves if isinstance(each, Tensor) and each.ndim), None)
                with self.observe(model, parameters, stage, sequences=sequences, batch_dim=batch_dim):
                    loss(model, batch).backward()
        return self

    def prepare(self, parameters: Mapping[str, Tensor], optimizer: Any) -> None:
        """Check that every parameter can be preconditioned.

        Raises
        ------
        RuntimeError
            If nothing was fitted.
        ValueError
            If a parameter is missing from what was fitted or has another shape there, or if its damped Fisher matrix is
            singular.
        """
        if not self.tokens:
            stages = " and ".join(f"engine.fisher({stage!r})" for stage in self.stages)
            raise RuntimeError(
                f"preconditioner {self.name!r} has not been fitted: run {stages} over some batches before the first "
                f"domains(...), or load it with {type(self).__name__}.load(path)"
            )
        missing = [name for name in parameters if name not in self._squares]
        if missing:
            raise ValueError(
                f"the Fisher matrix of {', '.join(map(repr, missing[:5]))}"
                + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
                + " is missing: it was fitted on another model, or no gradient reached them. Fit anew, or leave them "
                "out with exclude="
            )
        for name, parameter in parameters.items():
            if self._squares[name].shape != parameter.shape:
                raise ValueError(
                    f"the Fisher matrix of {name!r} is of a parameter of shape {tuple(self._squares[name].shape)}; "
                    f"this model's has {tuple(parameter.shape)}: it was fitted on another model"
                )
            if not float(self._damped(name).min()) > 0:
                raise ValueError(
                    f"the damped Fisher matrix of {name!r} is singular: "
                    + (
                        "an eigenvalue is 0 and so is the damping. Pass damping= (0.1 is usual) or absolute_damping="
                        if float(self._squares[name].max()) > 0
                        else "it is 0 everywhere, as where only zeros reach a layer. Leave it out with exclude=, or "
                        "pass absolute_damping="
                    )
                )

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Return (F + damping)^-1 of the gradients ``[q, *shape]``, computed in their dtype."""
        basis = (self._bases or {}).get(name, Basis())
        return basis.back(basis.into(gradients).div_(self._damped(name).to(gradients)))

    def eigenvalues(self, name: str) -> Tensor:
        """Return the eigenvalues of F of one parameter, of its shape, undamped: per target token."""
        return self._squares[name] / self.tokens

    def factor_memory(self, parameters: Mapping[str, Tensor]) -> int:
        """Return how many bytes what is fitted will take, if every matrix is the weight of products.

        Examples
        --------
        >>> EKFAC().factor_memory({"weight": torch.ones(10, 20)}) == 4 * (10 * 20 + 10**2 + 20**2)
        True
        """
        total = 0
        for p in parameters.values():
            sides = sum(side**2 for side in p.shape if side <= self.max_side) if p.ndim == 2 else 0
            total += (8 if p.dtype == torch.float64 else 4) * (p.numel() + sides)
        return total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was fitted to a safetensors file, atomically.

        Raises
        ------
        RuntimeError
            If nothing was fitted.
        """
        if not self.tokens:
            raise RuntimeError(f"there is nothing to save: preconditioner {self.name!r} has not been fitted")
        tensors = {f"squares/{name}": value.contiguous() for name, value in self._squares.items()}
        for name, basis in (self._bases or {}).items():
            for side, vectors in (("rows", basis.rows), ("columns", basis.columns)):
                if vectors is not None:
                    tensors[f"{side}/{name}"] = vectors.contiguous()
        write_tensors(path, _FORMAT, tensors, {"version": _VERSION, "kind": self.name, "tokens": self.tokens})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", **settings: Any) -> EKFAC:
        """Return the preconditioner that was saved, bit for bit; ``settings`` (damping) are given anew.

        Raises
        ------
        ValueError
            If the file is none that `save` of this class wrote, or is damaged.
        """
        try:
            tensors, about = read_tensors(path, _FORMAT, device=device)
        except ValueError as error:
            raise ValueError(f"{error} (it is no file that {cls.__name__}.save wrote)") from None
        wanted = {"version": _VERSION, "kind": cls.name}
        got = {key: about.get(key) for key in wanted} if isinstance(about, dict) else about
        if got != wanted or not isinstance(about["tokens"], int) or about["tokens"] < 1:
            raise ValueError(f"{os.fspath(path)!r} is no file that {cls.__name__}.save wrote: it says {about!r}")
        loaded = cls(**settings)
        parts: dict[str, dict[str, Tensor]] = {"squares": {}, "rows": {}, "columns": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            if part not in parts or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{os.fspath(path)!r} is damaged: {key!r} is unknown or not finite")
            parts[part][name] = value
        loaded._squares, loaded._bases = parts["squares"], {}
        for name in {**parts["rows"], **parts["columns"]}:
            basis = Basis(parts["rows"].get(name), parts["columns"].get(name))
            shape = loaded._squares[name].shape if name in loaded._squares else ()
            for axis, vectors in ((0, basis.rows), (1, basis.columns)):
                if vectors is not None and (len(shape) != 2 or vectors.shape != (shape[axis], shape[axis])):
                    raise ValueError(f"{os.fspath(path)!r} is damaged: the basis of {name!r} does not fit its shape")
            loaded._bases[name] = basis
        loaded.tokens = about["tokens"]
        return loaded

    def _damped(self, name: str) -> Tensor:
        values = self.eigenvalues(name)
        return values.add_(values.mean() * self.damping if self.absolute_damping is None else self.absolute_damping)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def _check_stage(self, stage: Stage) -> None:
        if stage not in self.stages:
            raise ValueError(f"stage must be one of {', '.join(map(repr, self.stages))}; got {stage!r}")
        if stage == "factors" and self._bases is not None:
            raise RuntimeError("eigenvalues were begun with the factors so far: call reset() to fit anew")
        if stage == "eigenvalues" and self._bases is None and not self._factors:
            raise RuntimeError("factors come first: run fisher('factors') over some batches before 'eigenvalues'")

    def _decompose(self) -> None:
        """Turn the factors, once, into their eigenvectors."""
        if self._bases is None:
            self._bases = {
                name: Basis(*(None if each is None else _eigenvectors(each) for each in sides))
                for name, sides in self._factors.items()
            }
            self._factors = {}

    def _add_factors(self, recorder: FactorRecorder) -> None:
        _require_finite(each for sides in recorder.factors.values() for each in sides if each is not None)
        for name, found in recorder.factors.items():
            before = self._factors.get(name, (None, None))
            rows, columns = (
                new if old is None or new is None else old.add_(new) for old, new in zip(before, found, strict=True)
            )
            self._factors[name] = rows, columns

    def _add_squares(self, recorder: EigenvalueRecorder, gradients: Mapping[str, Tensor], tokens: int) -> None:
        bases = self._bases or {}
        without = [name for name in recorder.products if name not in bases] if "factors" in self.stages else []
        if without:
            raise ValueError(
                f"{', '.join(map(repr, without))} had no part in fisher('factors'): run both stages over batches that "
                "reach the same layers (reset() to fit anew), or leave it out with exclude="
            )
        found = dict(recorder.squares)
        for name, gradient in gradients.items():
            if recorder.products[name] != 1 or name in recorder.elsewhere:
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                wide = torch.promote_types(dense.dtype, torch.float32)
                found[name] = bases.get(name, Basis()).into(dense.to(wide)).square()
        _require_finite(found.values())
        for name, squares in found.items():
            self._squares[name] = self._squares[name].add_(squares) if name in self._squares else squares
        self.tokens += tokens


class DiagonalFisher(EKFAC):
    """P = 1 / (diagonal of F + damping), with F as in `EKFAC`: one pass, the parameter's own memory, no factors.

    Fitted by ``engine.fisher("eigenvalues")`` alone. The estimate from a batch's gradient with sampled labels is that
    of Sophia (arXiv 2305.14342, Gauss-Newton-Bartlett).

    Parameters
    ----------
    damping, absolute_damping, seed
        As in `EKFAC`.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Linear(8, 5)
    >>> x, y = torch.randn(64, 8), torch.randint(5, (64,))
    >>> fisher = DiagonalFisher().fit(model, [x], lambda model, x: nn.functional.cross_entropy(model(x), y))
    >>> fisher.eigenvalues("weight").shape
    torch.Size([5, 8])
    """

    name = "diagonal_fisher"
    stages: ClassVar[tuple[Stage, ...]] = ("eigenvalues",)

    def __init__(self, damping: float = 0.1, *, absolute_damping: float | None = None, seed: int = 0) -> None:
        super().__init__(damping, absolute_damping=absolute_damping, max_side=0, seed=seed)


def _eigenvectors(factor: Tensor) -> Tensor:
    """Return the eigenvectors of a sum of outer products, in its dtype; what is above the diagonal is not read.

    Eigenvalues are measured afterwards in the basis found, so that vectors that mix directions of like curvature, as
    rounding makes them do, cost next to nothing; float64 takes twice the time and is there for what does not converge.
    """
    try:
        vectors: Tensor = torch.linalg.eigh(factor).eigenvectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        vectors = torch.linalg.eigh(factor.double()).eigenvectors
    # As they come back from a file, so that products with them are the same to the bit.
    return vectors.to(factor.dtype).contiguous()


def _check_given(tokens: int, watched: SeenLosses) -> None:
    """Compare what the user says of the loss with the cross-entropy, where there was one."""
    found = targets_and_weight([each.cpu() for each in watched.summaries()])
    if found is not None and (found[0] != tokens or abs(found[1] - 1) > 1e-2):
        raise ValueError(
            f"tokens={tokens} must be the number of targets of a loss that is their sum; the cross-entropy had "
            f"{found[0]} targets of weight {found[1]:.6g} each: use reduction='sum', unscaled, or leave tokens out to "
            "have labels sampled"
        )


def _require_finite(values: Iterable[Tensor]) -> None:
    if not all(bool(torch.isfinite(each).all()) for each in values):
        raise FloatingPointError("the batch gave second moments that are not finite; nothing of it was kept")
