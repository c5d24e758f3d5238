"""`torch.ops.attnres_fx.depth_attention_general`: reads in the forms that no kernel has, as `read_form` defines them.

One node in every graph, as `depth_attention` is, and composite: a compiler meets the aten operations.

Source: arXiv 2603.15031, the ablations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from attnres_fx.errors import OperatorError
from attnres_fx.ops.dispatch import runs_in_plain_eager
from attnres_fx.ops.dtypes import result_dtype
from attnres_fx.ops.operator import DEPTH_ATTENTION, check_device, check_sources, library
from attnres_fx.ops.read_form import GeneralRead, ReadForm
from attnres_fx.ops.read_style import ReadStyle, check_style
from attnres_fx.ops.recompute import recomputed


def depth_attention_general(
    sources: Sequence[Tensor],
    query: Tensor | None = None,
    key_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    gain: float = 1.0,
    bias: Tensor | None = None,
    scale: float = 1.0,
    value_norm: bool = False,
    key_norm: bool = True,
    heads: int = 1,
    sigmoid: bool = False,
) -> Tensor:
    """Depth attention in any form; where `depth_attention` can say the same, it is the faster one.

    Args:
        sources: S >= 1 floating tensors [..., D] of one shape and device; dtypes are promoted as `+` would.
        query: [D]; [D, D] for a query of each token, made from the newest (last) source; None where the bias alone is
            the logits.
        key_weight: [D], or None for keys without a gain.
        eps: added to the mean square of a source.
        gain: multiplies the mixture.
        bias: [S], added to the logits.
        scale: multiplies the products of query and keys.
        value_norm: whether sources are divided by their root mean square when they are mixed.
        key_norm: whether keys are.
        heads: H, into how many parts of D / H elements the width is cut, each with weights of its own.
        sigmoid: whether a source weighs the sigmoid of its logit; else weights are the softmax over the sources.

    Returns:
        [..., D] in the promoted dtype; arithmetic is float32, float64 for float64 sources, but for the projection of a
        [D, D] query, which is in the promoted dtype.

    Raises:
        OperatorError: as `depth_attention` does; heads do not divide D; there is no query, and no bias alone.

    Source: arXiv 2603.15031, the ablations.
    """
    if isinstance(sources, Tensor):
        raise OperatorError("depth_attention_general: sources is one tensor; it must be a list of them, one a source.")
    sources, style, form = list(sources), ReadStyle(bias, scale, value_norm), ReadForm(key_norm, heads, sigmoid)
    if not any(isinstance(t, Proxy) for t in (*sources, query, key_weight, bias)):
        _check(sources, GeneralRead(query, key_weight, eps, style, form))
    mixed: Tensor = torch.ops.attnres_fx.depth_attention_general.default(
        sources, query, key_weight, float(eps), float(gain), *general_arguments(style, form)
    )
    return mixed


def general_arguments(style: ReadStyle[Any], form: ReadForm) -> tuple[Any, ...]:
    """What the registered operator takes behind sources, query, key gain, eps and gain."""
    options = bool(form.key_norm), int(form.heads), bool(form.sigmoid)
    return style.bias, float(style.scale), bool(style.value_norm), *options


def read_from_arguments(
    query: Tensor | None, key_weight: Tensor | None, eps: float, gain: float, *options: Any
) -> tuple[GeneralRead, float]:
    """A read, and its gain, from what a registered operator takes behind the sources: this one, or `depth_attention`.

    The options of `depth_attention` are the first three of this one's.
    """
    style: ReadStyle[Tensor] = ReadStyle.from_arguments(*options[:3])
    return GeneralRead(query, key_weight, eps, style, ReadForm(*options[3:])), gain


def _check(sources: Sequence[Tensor], read: GeneralRead) -> None:
    name, form, style = "depth_attention_general", read.form, read.style
    check_sources(sources, read.eps)
    check_style(name, sources, style)
    width = sources[0].shape[-1]
    if form.heads < 1 or width % form.heads:
        raise OperatorError(f"{name}: the width {width} cannot be cut into {form.heads} equal heads.")
    if read.query is None:
        plain = form.key_norm and form.heads == 1 and not form.sigmoid
        if style.bias is None or read.key_weight is not None or not plain:
            raise OperatorError(
                f"{name}: without a query the weights are the softmax of a bias [S], which must be given, and "
                f"key_weight, key_norm, heads and sigmoid mean nothing."
            )
        return
    if not isinstance(read.query, Tensor) or tuple(read.query.shape) not in ((width,), (width, width)):
        raise OperatorError(f"{name}: query is {_kind(read.query)}; it must be ({width},) or ({width}, {width}).")
    if read.key_weight is not None and tuple(read.key_weight.shape) != (width,):
        raise OperatorError(f"{name}: key_weight is {_kind(read.key_weight)}; it must be ({width},).")
    for what, weight in (("query", read.query), ("key_weight", read.key_weight)):
        if weight is not None and not weight.is_floating_point():
            raise OperatorError(f"{name}: {what} is {_kind(weight)}; it must be floating point.")
        if weight is not None:
            check_device(what, weight, sources[0])


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _general(
    sources: list[Tensor],
    query: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    gain: float,
    bias: Tensor | None,
    *options: Any,
) -> Tensor:
    read, gain = read_from_arguments(query, key_weight, eps, gain, bias, *options)
    _check(sources, read)
    if not runs_in_plain_eager([t for t in (*sources, query, key_weight, bias) if t is not None]):
        return read.mixture(sources, gain).to(result_dtype(sources))

    def again(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        query, key_weight, bias, *sources = tensors
        own, _ = read_from_arguments(query, key_weight, eps, gain, bias, *options)
        given = [s for s in sources if s is not None]
        return [own.mixture(given, gain).to(result_dtype(given))]

    (mixed,) = recomputed(again, [query, key_weight, bias, *sources])
    return mixed


library.define(
    "depth_attention_general(Tensor[] sources, Tensor? query, Tensor? key_weight, float eps, float gain, Tensor? bias, "
    "float scale, bool value_norm, bool key_norm, int heads, bool sigmoid) -> Tensor"
)
for _key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
    library.impl("depth_attention_general", _general, _key)

#: What stands in a graph, with all arguments by position.
DEPTH_ATTENTION_GENERAL = torch.ops.attnres_fx.depth_attention_general.default

#: The operators that a rewrite puts in the place of a read.
READ_OPERATORS = (DEPTH_ATTENTION, DEPTH_ATTENTION_GENERAL)
