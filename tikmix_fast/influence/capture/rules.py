"""What each torch function does with a parameter: the operations that influence can be captured through.

A rule takes the capture, the function, and the function's own arguments, among them at least one `ParameterView`. It
returns what the function returns, as ordinary tensors, with the reading of gradients attached. An operation without a
rule is refused, not guessed, unless it only reshapes, casts or combines parameters before they meet the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tikmix_fast.influence.capture.gathered_rows import refuse_gathered_rows
from tikmix_fast.influence.capture.taps import fused_product, spread, tap
from tikmix_fast.influence.capture.views import Lookup, ParameterView, Source, UncapturedParameterError, plain

if TYPE_CHECKING:
    from tikmix_fast.influence.capture.capture import Capture
    from tikmix_fast.influence.capture.rows import RowLabels

__all__ = ["apply_rule"]


def apply_rule(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` with at least one view among its arguments, and attach what its influence needs.

    Raises
    ------
    UncapturedParameterError
        If the operation mixes a parameter with the data in a way that no rule covers.
    """
    rule = _RULES.get(func)
    if rule in _TAKES_ROWS and not _takes_data(capture, func, args, kwargs):
        return _derive(capture, func, args, kwargs)
    if rule is not None:
        return rule(capture, func, *args, **kwargs)
    if func in _ELEMENTWISE:
        return _elementwise(capture, func, args, kwargs)
    return _other(capture, func, args, kwargs)


def _takes_data(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the input of a layer is rows of the batch; positions and constants that go through it first are not."""
    place, name = (1, "mat1") if func in _ADDMM else (0, "query" if func is F.scaled_dot_product_attention else "input")
    data = args[place] if len(args) > place else kwargs.get(name)
    if not isinstance(data, Tensor) or _with_data(args, kwargs):
        return True
    return not isinstance(data, ParameterView) and capture.recorder.labels.are_features(data.shape[:-1])


def _linear(capture: Capture, func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    return _product(capture, func, input, weight, bias, in_out=False, ordinary=lambda x, w, b: F.linear(x, w, b))


def _matmul(capture: Capture, func: Any, input: Any, other: Any = None, *, mat2: Any = None) -> Any:
    weight = mat2 if other is None else other
    if not isinstance(weight, ParameterView):
        return func(capture.settle(input, func), weight)
    return _product(capture, func, input, weight, None, in_out=True, ordinary=lambda x, w, b: func(x, w))


def _rmatmul(capture: Capture, func: Any, other: Any, input: Any) -> Any:
    return _matmul(capture, torch.matmul, input, other)


def _addmm(capture: Capture, func: Any, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    views = [each for each in (input, mat1, mat2) if isinstance(each, ParameterView)]
    if beta != 1 or alpha != 1 or not isinstance(mat2, ParameterView):
        raise _refusal(views[0], func, "only a parameter as the second factor with beta = alpha = 1 is captured")
    return _product(capture, func, mat1, mat2, input, in_out=True, ordinary=lambda x, w, b: func(b, x, w))


def _product(
    capture: Capture, func: Any, input: Any, weight: Any, bias: Any, *, in_out: bool, ordinary: Callable[..., Tensor]
) -> Any:
    """Rows times a weight, plus a bias: what nearly all parameters of a language model do."""
    if plain(weight).ndim != 2:
        raise _refusal(_first_view(input, weight, bias), func, "the weight of a product must be two-dimensional")
    rows = capture.settle(input, func)
    recorder = capture.recorder
    refuse_gathered_rows(rows, recorder.labels)
    # Where dtypes do not fit together, torch's own product says so.
    fits = rows.dtype == plain(weight).dtype or torch.is_autocast_enabled(rows.device.type)
    one_bias = bias is None or plain(bias).ndim == 1
    fused = isinstance(weight, ParameterView) and weight.is_parameter and capture.fused and fits and one_bias
    if isinstance(weight, ParameterView) and recorder.is_projected(weight):
        fused = False  # measured apart from the ordinary product

    def read(gradient: Tensor, saved: Tensor, total: Tensor | None = None) -> Tensor | None:
        if isinstance(weight, ParameterView):
            recorder.product(weight, saved, gradient, in_out, total)
        if isinstance(bias, ParameterView):
            if one_bias:
                return recorder.features(bias, gradient)
            recorder.spread(bias, gradient)
        return None

    if fused:
        return fused_product(rows, weight.plain, plain(bias), in_out, read)
    return tap(ordinary(rows, plain(weight), plain(bias)), read, rows.detach())


def _embedding(
    capture: Capture,
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
        raise _refusal(weight, func, "max_norm and scale_grad_by_freq change what a lookup's gradient means")
    if not weight.is_parameter:
        raise _refusal(weight, func, "the table must be a parameter itself")
    found = F.embedding(input, weight.plain, padding_idx, sparse=sparse)
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + len(weight.plain)
    recorder = capture.recorder
    labels = recorder.labels
    if labels.are_rows(input.shape):
        _refuse_relative_positions(weight, func, input, labels)
        return tap(found, lambda gradient: recorder.lookup(weight, input, padding, gradient))
    # Positions looked up once for all sequences, [S] or [1, S]: wait for the operation where they meet the batch.
    source = Source(weight.sources[0].name, found.detach(), Lookup(input, padding))
    return ParameterView.make(found, capture, (source,))


def _embedding_bag(capture: Capture, func: Any, *args: Any, **kwargs: Any) -> Any:
    raise _refusal(_first_view(*args, *kwargs.values()), func, "no rule covers this operation")


def _attention(
    capture: Capture, func: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **more: Any
) -> Any:
    """A learnt bias of the scores meets the batch here."""
    query, key, value = (capture.settle(each, func) for each in (query, key, value))
    if isinstance(attn_mask, ParameterView):
        attn_mask = capture.spread(attn_mask, torch.Size((*query.shape[:-1], key.shape[-2])))
    return func(query, key, value, attn_mask, *rest, **more)


def _refuse_relative_positions(weight: ParameterView, func: Any, ids: Tensor, labels: RowLabels) -> None:
    """A table of relative positions looked up at [S, S] looks like tokens [B, S] where B = S; its ids give it away."""
    if labels.single is None and ids.ndim == 2 and ids.shape[0] == ids.shape[1] > 1:
        along_diagonals = bool((ids[1:, 1:] == ids[:-1, :-1]).all())
        if along_diagonals and bool((ids != ids[0, 0]).any()):
            raise _refusal(
                weight, func, "with as many sequences as positions its ids cannot be told from relative positions"
            )


def _layer_norm(
    capture: Capture,
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
    return _norm(capture, func, input, shape, weight, bias, rest, more, lambda x: F.layer_norm(x, shape, eps=eps))


def _rms_norm(
    capture: Capture, func: Any, input: Any, normalized_shape: Any, weight: Any = None, *rest: Any, **more: Any
) -> Any:
    shape = tuple(normalized_shape)
    eps = rest[0] if rest else more.get("eps")
    rows = capture.settle(input, func)
    eps = torch.finfo(rows.dtype).eps if eps is None else eps
    return _norm(capture, func, rows, shape, weight, None, rest, more, lambda x: F.rms_norm(x, shape, eps=eps))


def _norm(
    capture: Capture,
    func: Any,
    input: Any,
    shape: tuple[int, ...],
    weight: Any,
    bias: Any,
    rest: tuple[Any, ...],
    more: dict[str, Any],
    normalise: Callable[[Tensor], Tensor],
) -> Any:
    rows = capture.settle(input, func)
    recorder = capture.recorder
    refuse_gathered_rows(rows, recorder.labels)
    affine = (plain(weight),) if func in _RMS_NORMS else (plain(weight), plain(bias))

    def read(gradient: Tensor, saved: Tensor) -> None:
        leading = gradient.shape[: gradient.ndim - len(shape)]
        gradient = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
        if isinstance(weight, ParameterView):
            per_row = normalise(saved.to(gradient.dtype)).mul_(gradient)
            recorder.features(weight, per_row.reshape(*leading, -1))
        if isinstance(bias, ParameterView):
            recorder.features(bias, gradient.reshape(*leading, -1))

    return tap(func(rows, shape, *affine, *rest, **more), read, rows.detach())


def _dropout(
    capture: Capture, func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or p == 0:
        return input
    raise _refusal(input, func, "dropout of a parameter before it meets the batch draws one mask for all sequences")


def _elementwise(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Broadcasting arithmetic: a norm's weight, a bias, a gate, a position embedding."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    views = [each for each in tensors if isinstance(each, ParameterView)]
    others = [each for each in tensors if not isinstance(each, ParameterView)]
    shape = torch.broadcast_shapes(*(plain(each).shape for each in tensors))
    labels = capture.recorder.labels
    # A vector (a norm's weight, a bias) that meets frozen activations [B, S, ...] meets data; anything else without
    # gradient is a constant that a parameter may be combined with on its way.
    frozen = all(view.plain.ndim < 2 for view in views) and labels.length is not None
    if not _with_data(args, kwargs) and not (
        frozen and any(each.shape == shape and labels.are_rows(each.shape[:-1]) for each in others)
    ):
        return _derive(capture, func, args, kwargs)
    if func.__name__.endswith("_") and isinstance(args[0], ParameterView):
        raise _refusal(args[0], func, "a parameter must not be changed in place")

    for each in others:
        if each.shape == shape:
            refuse_gathered_rows(each, labels)

    def meet(value: Any) -> Any:
        return capture.spread(value, shape) if isinstance(value, ParameterView) else value

    return func(*map(meet, args), **{name: meet(value) for name, value in kwargs.items()})


def _other(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any operation without a rule: fine while no data takes part, or where the view is rows of the batch already."""
    if not _with_data(args, kwargs):
        return _derive(capture, func, args, kwargs)
    views = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, ParameterView)]
    for view in views:
        if not view.in_rows:
            raise _refusal(view, func, "no rule covers this operation")
    settled = torch.utils._pytree.tree_map(lambda each: capture.settle(each, func), (args, kwargs))
    return func(*settled[0], **settled[1])


def _backward(capture: Capture, func: Any, loss: ParameterView, *args: Any, **kwargs: Any) -> Any:
    """Refuse a loss that met no data: nothing it was looked up from was recognised as rows of the batch."""
    for source in loss.sources:
        if source.lookup is not None:
            capture.recorder.labels.layout(source.value.shape[:-1], torch.device("cpu"))
    raise _refusal(
        loss,
        func,
        "what it was looked up at, in one dimension, cannot be told from positions: pass a mask of shape [B, S], or "
        "look it up at [B, S] (or [B, 1])",
    )


def _with_data(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor that carries a gradient, and is not made from parameters alone, takes part."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    return any(
        isinstance(each, Tensor) and not isinstance(each, ParameterView) and each.requires_grad for each in leaves
    )


def _derive(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Parameters alone, and constants: remember how the result was made, so that queries can follow."""
    result = func(*plain(args), **plain(kwargs))
    if isinstance(result, (tuple, list)) and result and all(isinstance(each, Tensor) for each in result):
        parts = [_derived(capture, func, args, kwargs, part, index) for index, part in enumerate(result)]
        return type(result)(parts) if type(result) in (tuple, list) else tuple(parts)
    return _derived(capture, func, args, kwargs, result, None)


def _derived(
    capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, index: int | None
) -> Any:
    if not isinstance(result, Tensor) or not result.requires_grad:
        return result
    leaves, structure = torch.utils._pytree.tree_flatten((args, kwargs))
    views = [each for each in leaves if isinstance(each, ParameterView)]
    counts = [len(view.sources) for view in views]

    def build(*values: Tensor) -> Tensor:
        remaining = list(values)
        made = iter(
            _rebuild(view, [remaining.pop(0) for _ in range(count)]) for view, count in zip(views, counts, strict=True)
        )
        filled = [next(made) if isinstance(each, ParameterView) else each for each in leaves]
        again_args, again_kwargs = torch.utils._pytree.tree_unflatten(filled, structure)
        output = func(*again_args, **again_kwargs)
        part: Tensor = output if index is None else output[index]
        return part

    in_rows = func in _MAKES_ROWS or (func in _KEEPS_ROWS and any(view.in_rows for view in views))
    return ParameterView.make(result, capture, tuple(s for view in views for s in view.sources), build, in_rows)


def _rebuild(view: ParameterView, values: list[Tensor]) -> Tensor:
    return values[0] if view.build is None else view.build(*values)


def _first_view(*values: Any) -> ParameterView:
    return next(value for value in values if isinstance(value, ParameterView))


def _refusal(view: ParameterView, func: Any, why: str) -> UncapturedParameterError:
    sources = list(dict.fromkeys(source.name for source in view.sources))
    names = " and ".join(map(repr, sources[:3])) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
    return UncapturedParameterError(
        f"the influence of {names} cannot be captured: it enters {getattr(func, '__name__', func)!r}, and {why}. "
        f"Leave it out with exclude=[{view.sources[0].name!r}] (its influence then counts as zero)."
    )


def spread_view(capture: Capture, view: ParameterView, shape: torch.Size) -> Tensor:
    """Broadcast a view to the shape of the data it meets; one domain for the whole batch needs no copies told apart."""
    recorder = capture.recorder
    target = view.plain.shape if recorder.labels.single is not None else shape
    return spread(view.plain, target, lambda gradient: recorder.spread(view, gradient))


def settle_view(capture: Capture, view: ParameterView, func: Any) -> Tensor:
    """Take a view whose leading dimensions are rows of the batch as data."""
    if not view.in_rows or not capture.recorder.labels.are_features(view.plain.shape[:-1]):
        raise _refusal(view, func, "a parameter stands there in the place of the data")
    return spread_view(capture, view, view.plain.shape)


def _named(*names: str) -> frozenset[Any]:
    homes = (torch, torch.Tensor, F)
    return frozenset(getattr(home, name) for name in names for home in homes if hasattr(home, name))


_ELEMENTWISE = _named(
    *(
        "add",
        "sub",
        "mul",
        "div",
        "true_divide",
        "rsub",
        "pow",
        "addcmul",
        "addcdiv",
        "lerp",
        "where",
        "maximum",
        "minimum",
    ),
    *("add_", "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "lerp_"),
    *(f"__{side}{name}__" for side in ("", "r", "i") for name in ("add", "sub", "mul", "div", "truediv", "pow")),
)
_KEEPS_ROWS = _ELEMENTWISE | _named("to", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone")
_MAKES_ROWS = _named("expand", "expand_as", "repeat", "broadcast_to")
_RMS_NORMS = _named("rms_norm")
_ADDMM = _named("addmm")
_TAKES_ROWS = frozenset((_linear, _matmul, _rmatmul, _addmm, _layer_norm, _rms_norm, _attention))
_RULES: dict[Any, Callable[..., Any]] = {
    torch.Tensor.backward: _backward,
    **dict.fromkeys(_named("linear"), _linear),
    **dict.fromkeys(_named("matmul", "mm", "__matmul__"), _matmul),
    **dict.fromkeys(_named("__rmatmul__"), _rmatmul),
    **dict.fromkeys(_ADDMM, _addmm),
    **dict.fromkeys((F.embedding,), _embedding),
    **dict.fromkeys((F.embedding_bag,), _embedding_bag),
    **dict.fromkeys((F.scaled_dot_product_attention,), _attention),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys(_RMS_NORMS, _rms_norm),
    **dict.fromkeys((F.dropout,), _dropout),
}
