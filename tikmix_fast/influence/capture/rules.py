"""Rules: how influence is captured for each torch function that uses a parameter.

A rule gets the open capture, the function, and the function's arguments, at least one of which is a `ParameterView`. It
returns the function's result as ordinary tensors, and attaches the reading of gradients. Operations without a rule may
only reshape, cast or combine parameters before they meet the data; other uses raise an error. `register_rule` adds a
rule for your own operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tikmix_fast.influence.capture.derive import (
    ELEMENTWISE,
    apply_elementwise,
    apply_other,
    derive,
    first_view,
    meets_data,
    named,
    refusal,
    settle,
    spread_view,
)
from tikmix_fast.influence.capture.gathered_rows import refuse_gathered_rows
from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.capture.sink import OpenCapture
from tikmix_fast.influence.capture.taps import fused_product, tap
from tikmix_fast.influence.capture.views import Lookup, ParameterView, Source, plain

__all__ = ["apply_rule", "product_rows", "register_rule"]

Run = TypeVar("Run", bound=Callable[..., Any])


class _Rule(NamedTuple):
    run: Callable[..., Any]
    data: tuple[int, str] | None = None  # the argument that must be rows of the batch for the rule to apply
    is_product: bool = False


_RULES: dict[Any, _Rule] = {}


def register_rule(function: Callable[..., Any], rule: Run | None = None, *, data: tuple[int, str] | None = None) -> Any:
    """Add a rule for your own operation; works as a decorator or as a call.

    Parameters
    ----------
    function : callable
        A function that dispatches on ``__torch_function__``: one of torch's, ``torch.ops.LIBRARY.NAME``, or your own
        that calls ``torch.overrides.handle_torch_function``. ``autograd.Function.apply`` does not dispatch.
    rule : callable (capture, function, ...)
        Gets the arguments of the call too. It runs the operation on ``plain(...)`` of them, and gives rows and
        gradients to a method of ``capture.sink`` (see `Sink`): ``product`` for a matrix, ``features`` for one value per
        feature, ``spread`` for anything broadcast, ``lookup`` for a table. `tap` calls a function with the gradient of
        an output.
    data : (int, str), optional
        Position and name of the argument that holds the batch. If it is a parameter or a constant in a call, the result
        counts as derived from parameters, and the rule does not run.

    Returns
    -------
    callable
        The rule.

    Raises
    ------
    TypeError
        If ``function`` or ``rule`` is not callable, or ``data`` is no (int, str).
    ValueError
        If the function has a rule already.

    Examples
    --------
    A product with a scale, ``scale * x @ weight.T``:

    >>> from tikmix_fast.influence.capture.rules import plain, register_rule, tap
    >>> def scaled_linear(x, weight, scale):
    ...     if torch.overrides.has_torch_function((x, weight)):
    ...         return torch.overrides.handle_torch_function(scaled_linear, (x, weight), x, weight, scale)
    ...     return scale * x @ weight.T
    >>> @register_rule(scaled_linear, data=(0, "x"))
    ... def _(capture, function, x, weight, scale):
    ...     def read(gradient, rows):
    ...         capture.sink.product(weight, rows, scale * gradient, in_out=False)
    ...     return tap(function(x, plain(weight), scale), read, x.detach())
    """
    if not callable(function):
        raise TypeError(f"function must be callable; got {type(function).__name__}")
    if data is not None and not (isinstance(data, tuple) and tuple(map(type, data)) == (int, str)):
        raise TypeError(f"data must be the position and the name of an argument, such as (0, 'input'); got {data!r}")
    if function in _RULES or function in ELEMENTWISE:
        raise ValueError(f"function must have no rule yet; {getattr(function, '__name__', function)!r} has one")

    def register(rule: Run) -> Run:
        if not callable(rule):
            raise TypeError(f"rule must be callable; got {type(rule).__name__}")
        _RULES[function] = _Rule(rule, data)
        return rule

    return register if rule is None else register(rule)


def apply_rule(capture: OpenCapture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func``, which has at least one view among its arguments, and attach the reading of gradients.

    Raises
    ------
    UncapturedParameterError
        If the operation mixes a parameter with the data in a way that no rule covers.
    """
    rule = _RULES.get(func)
    if rule is None:
        return (apply_elementwise if func in ELEMENTWISE else apply_other)(capture, func, args, kwargs)
    if rule.data is not None and not _takes_data(capture, rule.data, args, kwargs):
        return derive(capture, func, args, kwargs)
    return rule.run(capture, func, *args, **kwargs)


def product_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the rows [..., I] that a product multiplies with its weight; None if ``func`` is no product."""
    rule = _RULES.get(func)
    if rule is None or rule.data is None or not rule.is_product:
        return None
    rows: Tensor | None = _argument(rule.data, args, kwargs)
    return rows


def _argument(place: tuple[int, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    index, name = place
    return args[index] if len(args) > index else kwargs.get(name)


def _takes_data(capture: OpenCapture, place: tuple[int, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a layer's input is rows of the batch; it may also be positions or constants."""
    data = _argument(place, args, kwargs)
    if not isinstance(data, Tensor) or meets_data(args, kwargs):
        return True
    return not isinstance(data, ParameterView) and capture.sink.labels.are_features(data.shape[:-1])


def _linear(capture: OpenCapture, func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    return _product(capture, func, input, weight, bias, in_out=False, ordinary=lambda x, w, b: F.linear(x, w, b))


def _matmul(capture: OpenCapture, func: Any, input: Any, other: Any = None, *, mat2: Any = None) -> Any:
    weight = mat2 if other is None else other
    if not isinstance(weight, ParameterView):
        return func(settle(capture, input, func), weight)
    return _product(capture, func, input, weight, None, in_out=True, ordinary=lambda x, w, b: func(x, w))


def _rmatmul(capture: OpenCapture, func: Any, other: Any, input: Any) -> Any:
    return _matmul(capture, torch.matmul, input, other)


def _addmm(
    capture: OpenCapture, func: Any, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1
) -> Any:
    if beta != 1 or alpha != 1 or not isinstance(mat2, ParameterView):
        why = "only a parameter as the second factor with beta = alpha = 1 is captured"
        raise refusal(first_view(input, mat1, mat2), func, why)
    return _product(capture, func, mat1, mat2, input, in_out=True, ordinary=lambda x, w, b: func(b, x, w))


def _product(
    capture: OpenCapture,
    func: Any,
    input: Any,
    weight: Any,
    bias: Any,
    *,
    in_out: bool,
    ordinary: Callable[..., Tensor],
) -> Any:
    """Run rows times a weight, plus a bias; nearly all parameters of a language model are used so."""
    if plain(weight).ndim != 2:
        raise refusal(first_view(input, weight, bias), func, "the weight of a product must be two-dimensional")
    rows = settle(capture, input, func)
    sink = capture.sink
    refuse_gathered_rows(rows, sink.labels)
    # If the dtypes do not match, torch's own product raises its error.
    fits = rows.dtype == plain(weight).dtype or torch.is_autocast_enabled(rows.device.type)
    one_bias = bias is None or plain(bias).ndim == 1
    fused = isinstance(weight, ParameterView) and weight.is_parameter and capture.fused and fits and one_bias
    if isinstance(weight, ParameterView) and sink.is_projected(weight):
        fused = False

    def read(gradient: Tensor, saved: Tensor, total: Tensor | None = None) -> Tensor | None:
        if isinstance(weight, ParameterView):
            sink.product(weight, saved, gradient, in_out, total)
        if isinstance(bias, ParameterView):
            if one_bias:
                return sink.features(bias, gradient)
            sink.spread(bias, gradient)
        return None

    if fused:
        return fused_product(rows, weight.plain, plain(bias), in_out, read)
    return tap(ordinary(rows, plain(weight), plain(bias)), read, rows.detach())


def _embedding(
    capture: OpenCapture,
    func: Any,
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq:
        raise refusal(weight, func, "max_norm and scale_grad_by_freq change what a lookup's gradient means")
    if not weight.is_parameter:
        raise refusal(weight, func, "the table must be a parameter itself")
    rows = F.embedding(input, weight.plain, padding_idx, sparse=sparse)
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + len(weight.plain)
    sink = capture.sink
    labels = sink.labels
    if labels.are_rows(input.shape):
        _refuse_relative_positions(weight, func, input, labels)
        return tap(rows, lambda gradient: sink.lookup(weight, input, padding, gradient))
    # Positions looked up once for all sequences, [S] or [1, S], are read at the operation where they meet the batch.
    source = Source(weight.sources[0].name, rows.detach(), Lookup(input, padding))
    return ParameterView.make(rows, capture, (source,))


def _embedding_bag(capture: OpenCapture, func: Any, *args: Any, **kwargs: Any) -> Any:
    raise refusal(first_view(*args, *kwargs.values()), func, "no rule covers this operation")


def _attention(
    capture: OpenCapture, func: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **more: Any
) -> Any:
    """Run attention, which broadcasts a learnt bias of the scores over the batch."""
    query, key, value = (settle(capture, each, func) for each in (query, key, value))
    if isinstance(attn_mask, ParameterView):
        attn_mask = spread_view(capture, attn_mask, torch.Size((*query.shape[:-1], key.shape[-2])))
    return func(query, key, value, attn_mask, *rest, **more)


def _refuse_relative_positions(weight: ParameterView, func: Any, ids: Tensor, labels: RowLabels) -> None:
    """Refuse a table of relative positions at [S, S], which looks like tokens [B, S] if B = S, by its ids."""
    if labels.single is None and ids.ndim == 2 and ids.shape[0] == ids.shape[1] > 1:
        along_diagonals = bool((ids[1:, 1:] == ids[:-1, :-1]).all())
        if along_diagonals and bool((ids != ids[0, 0]).any()):
            raise refusal(
                weight, func, "with as many sequences as positions its ids cannot be told from relative positions"
            )


def _layer_norm(
    capture: OpenCapture,
    func: Any,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    *rest: Any,
    **more: Any,
) -> Any:
    eps = rest[0] if rest else more.get("eps", 1e-5)
    shape = tuple(normalized_shape)
    ordinary = lambda x: func(x, shape, plain(weight), plain(bias), *rest, **more)  # noqa: E731
    return _norm(capture, func, input, shape, weight, bias, ordinary, lambda x: F.layer_norm(x, shape, eps=eps))


def _rms_norm(
    capture: OpenCapture, func: Any, input: Any, normalized_shape: Any, weight: Any = None, *rest: Any, **more: Any
) -> Any:
    shape = tuple(normalized_shape)
    eps = rest[0] if rest else more.get("eps")
    rows = settle(capture, input, func)
    eps = torch.finfo(rows.dtype).eps if eps is None else eps
    ordinary = lambda x: func(x, shape, plain(weight), *rest, **more)  # noqa: E731
    return _norm(capture, func, rows, shape, weight, None, ordinary, lambda x: F.rms_norm(x, shape, eps=eps))


def _norm(
    capture: OpenCapture,
    func: Any,
    input: Any,
    shape: tuple[int, ...],
    weight: Any,
    bias: Any,
    ordinary: Callable[[Tensor], Tensor],
    normalise: Callable[[Tensor], Tensor],
) -> Any:
    rows = settle(capture, input, func)
    sink = capture.sink
    refuse_gathered_rows(rows, sink.labels)

    def read(gradient: Tensor, saved: Tensor) -> None:
        leading = gradient.shape[: gradient.ndim - len(shape)]
        gradient = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
        if isinstance(weight, ParameterView):
            per_row = normalise(saved.to(gradient.dtype)).mul_(gradient)
            sink.features(weight, per_row.reshape(*leading, -1))
        if isinstance(bias, ParameterView):
            sink.features(bias, gradient.reshape(*leading, -1))

    return tap(ordinary(rows), read, rows.detach())


def _dropout(
    capture: OpenCapture, func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or p == 0:
        return input
    raise refusal(input, func, "dropout of a parameter before it meets the batch draws one mask for all sequences")


def _backward(capture: OpenCapture, func: Any, loss: ParameterView, *args: Any, **kwargs: Any) -> Any:
    """Refuse a loss that met no data: none of its look-ups was recognised as rows of the batch."""
    for source in loss.sources:
        if source.lookup is not None:
            capture.sink.labels.layout(source.value.shape[:-1], torch.device("cpu"))
    raise refusal(
        loss,
        func,
        "its ids have one dimension and cannot be told from positions: pass a mask of shape [B, S], or look it up at "
        "[B, S] (or [B, 1])",
    )


def _add(functions: Iterable[Any], run: Callable[..., Any], data: tuple[int, str] | None = None) -> None:
    is_product = run in (_linear, _matmul, _rmatmul, _addmm)
    _RULES.update(dict.fromkeys(functions, _Rule(run, data, is_product)))


_add(named("linear"), _linear, (0, "input"))
_add(named("matmul", "mm", "__matmul__"), _matmul, (0, "input"))
_add(named("__rmatmul__"), _rmatmul, (1, "other"))
_add(named("addmm"), _addmm, (1, "mat1"))
_add((F.embedding,), _embedding)
_add((F.embedding_bag,), _embedding_bag)
_add((F.scaled_dot_product_attention,), _attention, (0, "query"))
_add((F.layer_norm, torch.layer_norm), _layer_norm, (0, "input"))
_add(named("rms_norm"), _rms_norm, (0, "input"))
_add((F.dropout,), _dropout)
_add((torch.Tensor.backward,), _backward)
