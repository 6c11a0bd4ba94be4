"""P = the damped inverse of the Fisher matrix, in a Kronecker-factored eigenbasis (EK-FAC) or on its diagonal."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tikmix_fast.arguments import require_choice, require_int
from tikmix_fast.influence.capture.captured_pass import captured_pass
from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.loss.sampled_labels import sampled_labels
from tikmix_fast.influence.loss.watched_losses import WatchedLosses, targets_and_weight, watch_losses
from tikmix_fast.influence.preconditioners.curvature import Basis, EigenvalueSink, FactorSink, Sides, add_sides
from tikmix_fast.influence.preconditioners.fisher_files import read_fisher, write_fisher
from tikmix_fast.influence.preconditioners.optimizer_state import canonical_name, listed
from tikmix_fast.influence.torch_private import tree_leaves

__all__ = ["EKFAC", "DiagonalFisher"]

Stage = Literal["factors", "eigenvalues"]


class EKFAC:
    """P = (F + damping)^-1, with each layer's Fisher matrix F diagonal in a Kronecker-factored eigenbasis.

    F is the Fisher matrix of the model's own distribution per target token: labels are sampled from the logits. Two
    streaming passes over some batches fit it (`InfluenceEngine.fisher`, or `fit`). "factors" sums x x^T over the inputs
    x of every linear layer, and d d^T over the gradients d of its outputs; the eigenvectors of both are the basis.
    "eigenvalues" sums the squares of the layer's gradients in that basis. This is the correction of George et al. 2018
    (arXiv 1806.03884), with the damping of Grosse et al. 2023 (arXiv 2308.03296).

    The eigenvalues are second moments of *per-sequence* gradients if you pass ``sequences``, else of the whole batch's
    gradient. Both are unbiased: sampled labels of different tokens are independent, and their gradients have mean zero.
    An eigenvalue's relative standard error is about sqrt(2 / number of sequences, or batches). The whole batch's
    gradient also serves the weights of several products in one forward (tied or looped layers), where the uses add up,
    and biases, norms and embeddings, whose basis is the identity (diagonal Fisher). A bias is preconditioned apart from
    its weight.

    P applies to task gradients, one parameter at a time, never to domain gradients. Factors outlive
    ``engine.refresh()``; `reset` and fit again when the curvature has changed. Factors belong to one process: under
    DistributedDataParallel, fit in one process, `save`, and `load` in all.

    Parameters
    ----------
    damping : float
        Added to the eigenvalues of every parameter, as a multiple of their mean.
    absolute_damping : float, optional
        Added instead, the same for all parameters, in units of F.
    max_side : int
        Longer sides of a weight keep the identity as their basis (the vocabulary side of a head). Memory: 4 bytes times
        the parameter and the squares of its sides; twice that and one gradient while fitting (`factor_memory`). Time:
        one ``eigh`` per side.
    seed : int
        Seeds the sampled labels.

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
        self.damping, self.absolute_damping = damping, absolute_damping
        self.max_side, self.seed = require_int("max_side", max_side, 0), require_int("seed", seed, 0)
        self.reset()

    def reset(self) -> None:
        """Forget the fit."""
        self._factors: dict[str, Sides] = {}
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
        """Fit to one batch: run forward and backward inside; see `InfluenceEngine.fisher`."""
        self._check_stage(stage)
        for argument, value in (("sequences", sequences), ("tokens", tokens)):
            if value is not None:
                require_int(argument, value, 1)
        sink: FactorSink | EigenvalueSink
        if stage == "factors":
            sink = FactorSink(RowLabels(0, 1, batch_dim), self.max_side)
        else:
            self._decompose()
            ids = 0 if sequences is None else torch.arange(sequences, device="cpu")
            sink = EigenvalueSink(RowLabels(ids, sequences or 1, batch_dim), self._bases or {})
        # Either the labels of the losses are sampled here, or the user sampled them, and the losses are only watched.
        sampling = sampled_labels(self._generator) if tokens is None else nullcontext()
        watching = watch_losses() if tokens is not None else nullcontext()
        with sampling as sampled, watching as watched:
            # A fused pass lets the sink make the weight gradient: "factors" skips it, and needs none.
            with captured_pass(model, parameters, sink, fused=stage == "factors") as (capture, pass_gradients):
                yield
                gradients = pass_gradients.taken()
                capture.streams.join(gradients.values())
            if not gradients:
                raise RuntimeError("no gradient reached a parameter: run loss.backward() inside fisher(...)")
            if sampled is not None and not sampled.calls:
                raise RuntimeError(
                    "no call of F.cross_entropy or F.nll_loss was seen, so no labels were sampled: sample them "
                    "yourself, run the backward of the sum of the token losses, and pass tokens=, their number"
                )
            if watched is not None:
                _check_watched(tokens or 0, watched)
            count = tokens if sampled is None else sampled.tokens()
            if not count:
                raise ValueError(
                    "the batch has no target token: all labels are ignored, or the loss is multiplied by 0"
                )
            if isinstance(sink, FactorSink):
                self._add_factors(sink)
            else:
                self._add_squares(sink, gradients, count)

    def fit(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        parameters: Mapping[str, Tensor] | None = None,
        batch_dim: int | None = 0,
    ) -> EKFAC:
        """Run both passes over the batches, and return this object.

        Parameters
        ----------
        model : nn.Module
            In the mode of the measurement (``model.eval()`` switches dropout off).
        batches : iterable
            A list or a DataLoader without shuffling, not a generator: every stage iterates over it. The first dimension
            of a batch's first tensor counts its sequences.
        loss : callable (model, batch) -> Tensor
            Calls the model and F.cross_entropy or F.nll_loss. The divisor of the loss does not matter.
        parameters : mapping of str to Tensor, optional
            Default: all trainable ones.
        batch_dim : 0, 1 or None
            As in `InfluenceEngine`.

        Raises
        ------
        TypeError
            If the batches are an iterator, and the second stage would find it empty.
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
            If a parameter was not fitted or had another shape then, or if its damped Fisher matrix is singular.
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
                f"the Fisher matrix of {listed(missing)} is missing: it was fitted on another model, or no gradient "
                "reached them. Fit anew, or leave them out with exclude="
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
        """Return (F + damping)^-1 times the gradients ``[q, *shape]``, in their dtype."""
        basis = (self._bases or {}).get(name, Basis())
        return basis.back(basis.into(gradients).div_(self._damped(name).to(gradients)))

    def eigenvalues(self, name: str) -> Tensor:
        """Return the undamped eigenvalues of F per target token for one parameter, in its shape."""
        return self._squares[name] / self.tokens

    def factor_memory(self, parameters: Mapping[str, Tensor]) -> int:
        """Return the bytes of the fit, if every matrix is the weight of products.

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
        """Write the fit to a safetensors file, atomically.

        Raises
        ------
        RuntimeError
            If nothing was fitted.
        """
        if not self.tokens:
            raise RuntimeError(f"there is nothing to save: preconditioner {self.name!r} has not been fitted")
        write_fisher(path, self.name, self._squares, self._bases or {}, self.tokens)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", **settings: Any) -> EKFAC:
        """Return the saved preconditioner, bit for bit, with new ``settings`` (damping).

        Raises
        ------
        ValueError
            If `save` of this class did not write the file, or the file is damaged.
        """
        squares, bases, tokens = read_fisher(path, cls.name, cls.__name__, device)
        loaded = cls(**settings)
        loaded._squares, loaded._bases, loaded.tokens = squares, bases, tokens
        return loaded

    def _damped(self, name: str) -> Tensor:
        values = self.eigenvalues(name)
        return values.add_(values.mean() * self.damping if self.absolute_damping is None else self.absolute_damping)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def _check_stage(self, stage: Stage) -> None:
        require_choice("stage", stage, self.stages)
        if stage == "factors" and self._bases is not None:
            raise RuntimeError("eigenvalues were begun with the factors so far: call reset() to fit anew")
        if stage == "eigenvalues" and self._bases is None and not self._factors:
            raise RuntimeError("factors come first: run fisher('factors') over some batches before 'eigenvalues'")

    def _decompose(self) -> None:
        """Replace the factors by their eigenvectors; only the first call does anything."""
        if self._bases is None:
            self._bases = {
                name: Basis(*(None if each is None else _eigenvectors(each) for each in sides))
                for name, sides in self._factors.items()
            }
            self._factors = {}

    def _add_factors(self, sink: FactorSink) -> None:
        _require_finite(each for sides in sink.factors.values() for each in sides if each is not None)
        for name, sides in sink.factors.items():
            add_sides(self._factors, name, sides)

    def _add_squares(self, sink: EigenvalueSink, gradients: Mapping[str, Tensor], tokens: int) -> None:
        bases = self._bases or {}
        without = [name for name in sink.products if name not in bases] if "factors" in self.stages else []
        if without:
            raise ValueError(
                f"{', '.join(map(repr, without))} had no part in fisher('factors'): run both stages over batches that "
                "reach the same layers (reset() to fit anew), or leave it out with exclude="
            )
        squares = dict(sink.squares)
        for name, gradient in gradients.items():
            if sink.products[name] != 1 or name in sink.elsewhere:
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                wide = torch.promote_types(dense.dtype, torch.float32)
                squares[name] = bases.get(name, Basis()).into(dense.to(wide)).square()
        _require_finite(squares.values())
        for name, more in squares.items():
            self._squares[name] = self._squares[name].add_(more) if name in self._squares else more
        self.tokens += tokens


class DiagonalFisher(EKFAC):
    """P = 1 / (diagonal of F + damping), with F as in `EKFAC`, without factors: one pass, the parameter's own memory.

    ``engine.fisher("eigenvalues")`` alone fits it. Sophia (arXiv 2305.14342, Gauss-Newton-Bartlett) estimates the
    diagonal in the same way, from a batch's gradient with sampled labels.

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
    """Return the eigenvectors of a sum of outer products, in its dtype, without reading above the diagonal.

    The eigenvalues are measured later in this basis. So it costs next to nothing if rounding mixes directions of
    similar curvature. float64 takes twice the time, and serves factors whose float32 ``eigh`` does not converge.
    """
    try:
        vectors: Tensor = torch.linalg.eigh(factor).eigenvectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        vectors = torch.linalg.eigh(factor.double()).eigenvectors
    # Contiguous, as when read from a file: products with them are then the same to the bit.
    return vectors.to(factor.dtype).contiguous()


def _check_watched(tokens: int, losses: WatchedLosses) -> None:
    """Compare the user's ``tokens`` with the cross-entropy, if one was called."""
    targets, weight = targets_and_weight([each.cpu() for each in losses.summaries()]) or (tokens, 1.0)
    if targets != tokens or abs(weight - 1) > 1e-2:
        raise ValueError(
            f"tokens={tokens} must be the number of targets of a loss that is their sum; the cross-entropy had "
            f"{targets} targets of weight {weight:.6g} each: use reduction='sum', unscaled, or leave tokens out to "
            "have labels sampled"
        )


def _require_finite(values: Iterable[Tensor]) -> None:
    if not all(bool(torch.isfinite(each).all()) for each in values):
        raise FloatingPointError("the batch gave second moments that are not finite; nothing of it was kept")
