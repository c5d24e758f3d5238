"""The table of operations: what each one does, and how the dialects write it.

Three dialects spell one graph: `torch.fx.symbolic_trace` writes `operator.add` and `call_module`, Dynamo writes
torch functions and methods, `torch.export` writes aten overloads. An operation has one canonical name: aten's, with
the trailing underscore of in-place forms. A new operation is one more line below.
"""

import enum
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class Trait(enum.Flag):
    """What an operation does, as far as a pass asks; pointwise arithmetic is known by aten's own tag.

    CAST, IDENTITY, RESHAPE (rows stay in their order), TOKEN_MOVE (rows are moved or picked): data movement.
    LIGHT: no more than elementwise. SAME_AT_SAME_SHAPE: changes nothing where the shape stays. SHAPED_AS: takes only
    the shape or dtype of its second argument. METADATA: looks at no value. MAYBE_COPIES: a view where the strides
    allow one. VIEW: a view, although its schema calls it a copy. RESHAPE_IN_PLACE: another shape for the same
    tensor. NO_WRITE: an underscore, yet no write. MIXES: contracts over copies of a stream. WIDENS: may change the
    last dimension. CHANNELS_FIRST: channels are in dimension 1. SWITCHES_MODE, ASKS_MODE: autocast or gradients, for
    the calls that follow. MODE_REGION: a body that runs in another mode. CHECK: states something of a value and has
    none. SAVES_INPUTS: backward needs what it takes in. RANDOM: draws random numbers, although no tag of aten's may
    say so. SHAPE: looks at the shape or the dtype and at nothing else. PASSES_ON: hands on values and gradients as
    they are, the strides aside. WEIGHT_STEP: models make the weight of a norm with it, `1 + weight` or a cast.
    STOPS_GRADIENT: hands on values as they are, and no gradient. SPLITS: the parts of one tensor, as a list.
    JOINS: several tensors in one. SOFTMAX: weights that sum to one. REPEATS: the same rows several times.
    MORE_ROWS: more of them in memory than it is given. GATED_CELL: a cell of a recurrent network, `(input, state)`.
    PICKS: rows by an index tensor, which is more than elementwise.
    """

    CAST = enum.auto()
    IDENTITY = enum.auto()
    RESHAPE = enum.auto()
    TOKEN_MOVE = enum.auto()
    LIGHT = enum.auto()
    SAME_AT_SAME_SHAPE = enum.auto()
    SHAPED_AS = enum.auto()
    METADATA = enum.auto()
    MAYBE_COPIES = enum.auto()
    VIEW = enum.auto()
    RESHAPE_IN_PLACE = enum.auto()
    NO_WRITE = enum.auto()
    DROPOUT = enum.auto()
    NORM = enum.auto()
    REDUCTION = enum.auto()
    MIXES = enum.auto()
    WIDENS = enum.auto()
    CHANNELS_FIRST = enum.auto()
    SWITCHES_MODE = enum.auto()
    ASKS_MODE = enum.auto()
    MODE_REGION = enum.auto()
    CHECK = enum.auto()
    SAVES_INPUTS = enum.auto()
    RANDOM = enum.auto()
    SHAPE = enum.auto()
    PASSES_ON = enum.auto()
    WEIGHT_STEP = enum.auto()
    STOPS_GRADIENT = enum.auto()
    SPLITS = enum.auto()
    JOINS = enum.auto()
    SOFTMAX = enum.auto()
    REPEATS = enum.auto()
    MORE_ROWS = enum.auto()
    GATED_CELL = enum.auto()
    PICKS = enum.auto()


NONE = Trait(0)


@dataclass(frozen=True)
class FusedAddition:
    """An operation that is `beta * input + alpha * product(left, right)`.

    Args:
        product: Canonical name of the operation between the two factors.
        left, right: The keywords of the factors.
        alpha: The keyword of the product's scale.
        beta: The keyword of the addend's scale; empty where it has none.
        addend: Where the addend stands among the three.
        only_compiled: Whether tracers write it for compilers, so that it is split wherever it stands.
    """

    product: str
    left: str
    right: str
    alpha: str = ""
    beta: str = ""
    addend: int = 0
    only_compiled: bool = False


@dataclass(frozen=True)
class Region:
    """A higher-order operation that runs one body once, so that its nodes may stand in its place.

    Args:
        body: Position of the body among the arguments.
        operands: Position of the first argument that the body is called with.
        recomputes: Whether backward runs the body again.
    """

    body: int
    operands: int
    recomputes: bool = False


@dataclass(frozen=True)
class Operation:
    """One operation.

    Args:
        name: Its canonical name.
        traits: What it does.
        also: Its other names, of functions, methods and aten.
        operators: Python operators that mean it.
        modules: Module classes that do nothing else.
        functional: The operator without the write, of one in place.
        aten, function: How a pass writes it, as an aten overload and as a torch function.
        switch: How a pass writes it, of one that switches a mode or asks for it: every dialect writes the same.
        fused: The product and the scales, of an addition that is fused with a product.
        region: Where its body and operands stand, of one whose body may be inlined.
    """

    name: str
    traits: Trait = NONE
    also: tuple[str, ...] = ()
    operators: tuple[Callable[..., Any], ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    functional: Callable[..., Any] | None = None
    aten: str = ""
    function: Callable[..., Any] | None = None
    switch: Callable[..., Any] | None = None
    fused: FusedAddition | None = None
    region: Region | None = None


#: Attributes that are views of their tensor, and attributes that tell no more than its shape, dtype or device.
VIEW_ATTRIBUTES = frozenset(["T", "mT", "H", "mH", "real", "imag", "data"])
SHAPE_ATTRIBUTES = frozenset(["dtype", "shape", "device", "ndim"])

CAST, IDENTITY, RESHAPE, MOVE, LIGHT = Trait.CAST, Trait.IDENTITY, Trait.RESHAPE, Trait.TOKEN_MOVE, Trait.LIGHT
SAME, AS, COPIES = Trait.SAME_AT_SAME_SHAPE, Trait.SHAPED_AS, Trait.MAYBE_COPIES
DROPOUT = Trait.DROPOUT | Trait.LIGHT | Trait.RANDOM
CHANNELS, NORM = Trait.CHANNELS_FIRST, Trait.NORM | Trait.CHANNELS_FIRST
SAVES = Trait.SAVES_INPUTS
STEP = Trait.WEIGHT_STEP
STOPS, PASSES = Trait.STOPS_GRADIENT, Trait.PASSES_ON
JOINS = Trait.JOINS | Trait.MORE_ROWS
METADATA, SHAPE = Trait.METADATA, Trait.METADATA | Trait.SHAPE

OPERATIONS = (
    # Arithmetic
    Operation("add", STEP, aten="add.Tensor", function=torch.add),
    Operation("sub", also=("subtract",), aten="sub.Tensor", function=torch.sub),
    Operation("mul", SAVES, also=("multiply",), aten="mul.Tensor", function=torch.mul),
    Operation("div", SAVES, ("divide", "true_divide"), (operator.truediv,), aten="div.Tensor", function=torch.div),
    *(Operation(n, SAVES) for n in ("pow", "exp")),
    Operation("rsub", aten="rsub.Scalar", function=torch.rsub),
    Operation("neg", also=("negative",)),
    Operation("bitwise_and", operators=(operator.and_,)),
    Operation("bitwise_or", operators=(operator.or_,)),
    Operation("logical_not", operators=(operator.not_,)),
    Operation("is", operators=(operator.is_,)),
    # Python's operators in place
    Operation("add_", operators=(operator.iadd,), functional=operator.add),
    Operation("sub_", operators=(operator.isub,), functional=operator.sub),
    Operation("mul_", operators=(operator.imul,), functional=operator.mul),
    Operation("div_", operators=(operator.itruediv,), functional=operator.truediv),
    Operation("floor_divide_", operators=(operator.ifloordiv,), functional=operator.floordiv),
    Operation("remainder_", operators=(operator.imod,), functional=operator.mod),
    Operation("pow_", operators=(operator.ipow,), functional=operator.pow),
    Operation("matmul_", operators=(operator.imatmul,), functional=operator.matmul),
    Operation("bitwise_or_", operators=(operator.ior,), functional=operator.or_),
    Operation("bitwise_and_", operators=(operator.iand,), functional=operator.and_),
    Operation("bitwise_xor_", operators=(operator.ixor,), functional=operator.xor),
    Operation("copy_", aten="copy_.default", function=torch.Tensor.copy_),
    Operation("set_", aten="set_.source_Tensor", function=torch.Tensor.set_),
    # Casts
    Operation("to", CAST | STEP, aten="to.dtype", function=torch.Tensor.to),
    Operation("type_as", CAST | AS | STEP),
    *(Operation(n, CAST | STEP) for n in ("_to_copy", "float")),
    *(Operation(n, CAST) for n in ("double", "half", "bfloat16", "type")),
    *(Operation(n, CAST) for n in ("_autocast_to_full_precision", "_autocast_to_reduced_precision")),
    # Values as they are
    Operation("contiguous", IDENTITY | COPIES | PASSES, aten="contiguous.default", function=torch.Tensor.contiguous),
    Operation("alias", IDENTITY | Trait.PASSES_ON),
    Operation("clone", IDENTITY, aten="clone.default", function=torch.clone),
    Operation("detach", STOPS, also=("_get_data_attr",), aten="detach.default", function=torch.detach),
    Operation("identity", IDENTITY, modules=(nn.Identity,)),
    *(Operation(n, IDENTITY) for n in ("lift_fresh", "lift_fresh_copy", "wait_tensor")),
    # Rows in their order, in another shape
    Operation("view", RESHAPE),
    Operation("reshape", RESHAPE | COPIES, also=("_unsafe_view",)),
    Operation("flatten", RESHAPE | COPIES, modules=(nn.Flatten,)),
    Operation("unflatten", RESHAPE, modules=(nn.Unflatten,)),
    Operation("unsqueeze", RESHAPE),
    Operation("squeeze", RESHAPE),
    Operation("view_as", RESHAPE | AS),
    Operation("reshape_as", RESHAPE | COPIES | AS, aten="reshape_as.default", function=torch.Tensor.reshape_as),
    Operation("ravel", COPIES),
    # Rows moved or picked
    Operation("permute", MOVE, aten="permute.default", function=torch.permute),
    Operation("transpose", MOVE, also=("swapaxes", "swapdims")),
    Operation("movedim", MOVE, also=("moveaxis",)),
    *(Operation(n, MOVE) for n in ("t", "mT")),
    Operation("slice", MOVE | SAME),
    Operation("narrow", MOVE | SAME),
    Operation("getitem", MOVE | SAME),
    Operation("expand", MOVE | SAME | Trait.REPEATS),
    Operation("expand_as", MOVE | SAME | AS | Trait.REPEATS, aten="expand_as.default", function=torch.Tensor.expand_as),
    Operation("broadcast_to", MOVE | SAME | Trait.REPEATS),
    Operation("select", MOVE, aten="select.int", function=torch.select),
    *(Operation(n, MOVE) for n in ("index_select", "roll", "flip")),
    Operation("index", Trait.PICKS),
    # Tensors joined, split, repeated
    Operation("cat", LIGHT | Trait.WIDENS | JOINS, aten="cat.default", function=torch.cat),
    *(Operation(n, LIGHT | Trait.WIDENS | JOINS) for n in ("concat", "concatenate")),
    Operation("pad", LIGHT | Trait.WIDENS | Trait.MORE_ROWS, also=("constant_pad_nd",)),
    Operation("stack", LIGHT | Trait.JOINS, aten="stack.default", function=torch.stack),
    *(Operation(n, LIGHT | Trait.JOINS) for n in ("hstack", "vstack")),
    *(Operation(n, LIGHT | Trait.SPLITS) for n in ("split", "chunk", "unbind", "split_with_sizes", "tensor_split")),
    Operation("slice_scatter", LIGHT, aten="slice_scatter.default", function=torch.slice_scatter),
    Operation("select_scatter", LIGHT, aten="select_scatter.default", function=torch.select_scatter),
    Operation("index_put", aten="index_put.default", function=torch.index_put),
    *(Operation(n, LIGHT | Trait.REPEATS | Trait.MORE_ROWS) for n in ("repeat", "repeat_interleave", "tile")),
    *(Operation(n, Trait.VIEW | Trait.SPLITS) for n in ("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes")),
    # Shapes changed in place; underscores that write nothing
    *(Operation(n, Trait.RESHAPE_IN_PLACE) for n in ("unsqueeze_", "squeeze_", "transpose_", "t_")),
    *(Operation(n, Trait.RESHAPE_IN_PLACE) for n in ("swapaxes_", "swapdims_")),
    *(Operation(n, Trait.NO_WRITE) for n in ("requires_grad_", "retain_grad_", "share_memory_")),
    # Elementwise, although aten's tag does not say so of each form
    Operation("dropout", DROPOUT, modules=(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)),
    *(Operation(n, DROPOUT) for n in ("native_dropout", "feature_dropout", "alpha_dropout")),
    *(Operation(n, Trait.RANDOM) for n in ("dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout")),
    *(Operation(n, Trait.RANDOM) for n in ("dropout_", "feature_dropout_", "alpha_dropout_", "feature_alpha_dropout_")),
    Operation("_fused_dropout", Trait.RANDOM),
    *(Operation(n, LIGHT | SAVES) for n in ("gelu", "silu", "relu", "tanh", "sigmoid", "softplus")),
    *(Operation(n, LIGHT) for n in ("glu", "leaky_relu", "elu", "mish", "hardswish", "hardtanh", "hardsigmoid")),
    Operation("softmax", SAVES | Trait.SOFTMAX, also=("_softmax", "_safe_softmax")),
    *(Operation(n, LIGHT) for n in ("masked_fill", "where", "pos", "to_copy")),
    # Tensors made
    Operation("zeros_like", LIGHT, aten="zeros_like.default", function=torch.zeros_like),
    *(Operation(n, LIGHT) for n in ("full_like", "ones_like", "empty_like")),
    *(Operation(n, LIGHT) for n in ("new_zeros", "new_ones", "new_empty", "new_full")),
    # Norms and reductions
    Operation("layer_norm", Trait.NORM, also=("native_layer_norm",), modules=(nn.LayerNorm,)),
    Operation("rms_norm", Trait.NORM, also=("_fused_rms_norm",), modules=(nn.RMSNorm,)),
    Operation("normalize", Trait.NORM),
    Operation("group_norm", NORM, modules=(nn.GroupNorm,)),
    Operation("batch_norm", NORM, modules=(*(getattr(nn, f"BatchNorm{n}d") for n in (1, 2, 3)), nn.SyncBatchNorm)),
    Operation("instance_norm", NORM, modules=tuple(getattr(nn, f"InstanceNorm{n}d") for n in (1, 2, 3))),
    *(Operation(n, NORM) for n in ("native_group_norm", "native_batch_norm", "cudnn_batch_norm")),
    *(Operation(n, NORM) for n in ("_native_batch_norm_legit", "_native_batch_norm_legit_no_training")),
    *(Operation(n, Trait.REDUCTION) for n in ("mean", "sum", "var", "std", "var_mean", "std_mean")),
    *(Operation(n, Trait.REDUCTION) for n in ("norm", "linalg_vector_norm", "linalg_norm", "amax")),
    # Contractions
    Operation("mm", Trait.MIXES | SAVES, aten="mm.default", function=torch.mm),
    Operation("bmm", Trait.MIXES | SAVES, aten="bmm.default", function=torch.bmm),
    *(Operation(n, Trait.MIXES | SAVES) for n in ("einsum", "matmul")),
    Operation("tensordot", Trait.MIXES),
    Operation("linear", SAVES, modules=(nn.Linear,)),
    Operation("dot", SAVES),
    Operation("embedding", modules=(nn.Embedding,)),
    Operation("addmm", SAVES, fused=FusedAddition("mm", "mat1", "mat2", "alpha", "beta")),
    Operation("baddbmm", SAVES, fused=FusedAddition("bmm", "batch1", "batch2", "alpha", "beta")),
    Operation("addcmul", fused=FusedAddition("mul", "tensor1", "tensor2", "value")),
    Operation("addcdiv", fused=FusedAddition("div", "tensor1", "tensor2", "value")),
    Operation("fma", LIGHT, fused=FusedAddition("mul", "a", "b", addend=2, only_compiled=True)),
    Operation("gru_cell", Trait.GATED_CELL, modules=(nn.GRUCell,)),
    Operation("lstm_cell", Trait.GATED_CELL, modules=(nn.LSTMCell,)),
    *(
        Operation(
            name,
            traits,
            also=(*also, *(f"{name}{n}d" for n in (1, 2, 3))),
            modules=tuple(getattr(nn, f"{module}{n}d") for n in (1, 2, 3)),
        )
        for name, module, traits, also in (
            ("conv", "Conv", CHANNELS | SAVES, ("convolution", "_convolution")),
            ("conv_transpose", "ConvTranspose", CHANNELS, ()),
        )
    ),
    # Windows that move along the dimensions after the channels
    *(Operation(f"max_pool{n}d", CHANNELS, modules=(getattr(nn, f"MaxPool{n}d"),)) for n in (1, 2, 3)),
    *(Operation(f"avg_pool{n}d", CHANNELS, modules=(getattr(nn, f"AvgPool{n}d"),)) for n in (1, 2, 3)),
    Operation("interpolate", CHANNELS, modules=(nn.Upsample,)),
    *(Operation(n, CHANNELS) for n in ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")),
    *(Operation(n, CHANNELS) for n in ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d")),
    Operation("sdpa", SAVES, also=("scaled_dot_product_attention",)),
    # Shapes, dtypes and checks
    *(Operation(n, SHAPE) for n in ("sym_size", "size", "dim", "ndim", "numel", "is_floating_point")),
    *(Operation(n, METADATA) for n in ("sym_numel", "sym_stride", "sym_storage_offset", "stride", "storage_offset")),
    Operation("getattr", METADATA | STEP),
    *(Operation(n, METADATA | Trait.CHECK) for n in ("_assert_tensor_metadata", "_assert_scalar")),
    *(Operation(n, Trait.CHECK) for n in ("_assert_async", "sym_constrain_range")),
    # Modes
    Operation("_set_grad_enabled", Trait.SWITCHES_MODE, switch=torch._C._set_grad_enabled),
    Operation("_enter_autocast", Trait.SWITCHES_MODE, switch=torch.amp.autocast_mode._enter_autocast),
    Operation("_exit_autocast", Trait.SWITCHES_MODE, switch=torch.amp.autocast_mode._exit_autocast),
    Operation("is_grad_enabled", Trait.ASKS_MODE, switch=torch.is_grad_enabled),
    # Bodies
    Operation("higher_order::wrap_with_set_grad_enabled", Trait.MODE_REGION, region=Region(1, operands=2)),
    Operation("higher_order::wrap_with_autocast", Trait.MODE_REGION, region=Region(4, operands=5)),
    Operation("higher_order::invoke_subgraph", region=Region(0, operands=2)),
    Operation("higher_order::tag_activation_checkpoint", region=Region(0, operands=1, recomputes=True)),
    Operation("higher_order::wrap", region=Region(0, operands=1)),
)

BY_NAME = {o.name: o for o in OPERATIONS}
ALIASES = {other: o.name for o in OPERATIONS for other in o.also}
BY_OPERATOR = {f: o for o in OPERATIONS for f in o.operators}
BY_MODULE: dict[type, Operation] = {m: o for o in OPERATIONS for m in o.modules}
