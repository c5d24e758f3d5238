"""The operations that a stored program may call, by name.

A name from a file is looked up in tables that are made here, or among the operators that are registered with torch: it
is never followed from module to attribute, and nothing is imported for it.
"""

import builtins
import functools
import math
import operator
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._functorch.eager_transforms
import torch.nn.attention
import torch.nn.functional as F
import torch.utils.checkpoint
from torch._functorch import predispatch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from attnres_fx.capture import restore, transform_regions
from attnres_fx.errors import SaveError

#: Attributes of tensors, and of the tuples that operations return, that a program may read by `getattr`.
ATTRIBUTES = frozenset(
    "shape dtype device ndim layout requires_grad is_leaf is_cuda is_cpu is_meta is_sparse is_quantized itemsize "
    "nbytes T H mT mH real imag data grad values indices eigenvalues eigenvectors Q R U S V Vh L LU pivots info sign "
    "logabsdet solution residuals rank singular_values max min mantissa exponent hist bin_edges type index".split()
)

_READ_OR_WRITE_ELSEWHERE = frozenset(
    "from_file frombuffer from_numpy from_dlpack to_dlpack apply_ map_ map2_ module_load register_hook "
    "register_post_accumulate_grad_hook share_memory_ numpy storage untyped_storage typed_storage storage_type "
    "data_ptr const_data_ptr set_ record_stream backward pin_memory is_shared".split()
)

_OPERATORS = (
    "abs add and_ concat contains eq floordiv ge getitem gt iadd iand ifloordiv ilshift imatmul imod imul index inv "
    "invert ior ipow irshift is_ is_not isub itruediv ixor le lshift lt matmul mod mul ne neg not_ or_ pos pow rshift "
    "setitem sub truediv truth xor"
).split()

_TORCH = (
    "broadcast_shapes finfo iinfo is_grad_enabled is_inference_mode_enabled is_autocast_enabled get_autocast_dtype "
    "get_default_dtype get_autocast_gpu_dtype get_autocast_cpu_dtype is_tensor is_floating_point is_complex numel Size "
    "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sqrt sym_sum _assert _check _check_is_size _check_value "
    "_check_index _check_type _check_tensor_all _sym_sqrt sym_fresh_size typename"
).split()

_PRIVATE: dict[str, Any] = {
    "torch._C._set_grad_enabled": torch._C._set_grad_enabled,
    "torch._C._log_api_usage_once": torch._C._log_api_usage_once,
    "torch.amp.autocast_mode._enter_autocast": torch.amp.autocast_mode._enter_autocast,
    "torch.amp.autocast_mode._exit_autocast": torch.amp.autocast_mode._exit_autocast,
    "torch.autograd.grad_mode._enter_inference_mode": torch.autograd.grad_mode._enter_inference_mode,
    "torch.autograd.grad_mode._exit_inference_mode": torch.autograd.grad_mode._exit_inference_mode,
    "torch.utils.checkpoint.checkpoint": torch.utils.checkpoint.checkpoint,
    "attnres_fx.hooked": restore.hooked,
    "attnres_fx.run_region": transform_regions.run_region,
}

_FUNCTORCH = (
    "_add_batch_dim _remove_batch_dim _vmap_increment_nesting _vmap_decrement_nesting lazy_load_decompositions "
    "_jvp_increment_nesting _jvp_decrement_nesting _unwrap_for_grad _enter_dual_level _exit_dual_level _make_dual "
    "_unpack_dual _grad_increment_nesting _grad_decrement_nesting _wrap_for_grad _saved_tensors_hooks_disable "
    "_saved_tensors_hooks_enable _create_differentiable _autograd_grad _unwrap_all_tensors_from_functional "
    "_construct_standard_basis_for _assert_wrapped_functional _wrap_all_tensors_to_functional "
    "_set_tensor_requires_grad set_inplace_requires_grad_allowed get_inplace_requires_grad_allowed "
    "maybe_current_level"
).split()

_ATTENTION = "_backend_from_string _sdpa_kernel _cur_sdpa_kernel_backends".split()

_HIGHER_ORDER = frozenset(
    "cond while_loop scan associative_scan map_impl flex_attention wrap wrap_with_set_grad_enabled wrap_with_autocast "
    "invoke_subgraph tag_activation_checkpoint auto_functionalized auto_functionalized_v2 out_dtype strict_mode".split()
)

_BUILTINS = "abs bool divmod float int len max min pow round sum".split()
_OPERATOR_NAME = re.compile(r"([A-Za-z_]\w*)::(\w+)(?:\.(\w+))?", re.ASCII)


@functools.cache
def functions() -> dict[str, Any]:
    """Every plain function that a program may call, by name."""
    table: dict[str, Any] = {}
    overridable = torch.overrides.get_overridable_functions()
    native = torch._C._VariableFunctions  # type: ignore[attr-defined]
    names = [n for n in dir(native) if not n.startswith("__") and hasattr(torch, n)]
    table |= _taken("torch", torch, [*names, *_TORCH])
    for home in (torch, torch.functional, F, torch.linalg, torch.fft, torch.special):
        table |= _named(home, overridable.get(home, ()))
    table |= _taken("torch.nn.functional", F, _in_place_or_renamed(F))
    for home in (torch._C._nn, torch._C._linalg, torch._C._fft, torch._C._special):  # type: ignore[attr-defined]
        table |= _taken(home.__name__, home, [n for n in dir(home) if not n.startswith("__")])
    table |= _taken("torch.Tensor", torch.Tensor, methods())
    table |= _taken("operator", operator, _OPERATORS)
    table |= _taken("math", math, [n for n in dir(math) if callable(getattr(math, n)) and n[0] != "_"])
    table |= _taken("builtins", builtins, _BUILTINS)
    table |= _taken("torch.nn.attention", torch.nn.attention, _ATTENTION)
    for home in (predispatch, torch._C._functorch, torch._C._autograd, torch._functorch.eager_transforms):
        table |= _taken(home.__name__, home, _FUNCTORCH)
    table |= _PRIVATE
    return {n: f for n, f in table.items() if n.rpartition(".")[2] not in _READ_OR_WRITE_ELSEWHERE}


def _taken(prefix: str, home: Any, names: Iterable[str]) -> dict[str, Any]:
    return {f"{prefix}.{n}": getattr(home, n) for n in names if hasattr(home, n)}


def _named(home: Any, members: Iterable[Any]) -> dict[str, Any]:
    names = {id(value): name for name, value in vars(home).items() if callable(value)}
    return {f"{home.__name__}.{names[id(f)]}": f for f in members if id(f) in names}


def _in_place_or_renamed(home: types.ModuleType) -> list[str]:
    """Functions of `torch.nn.functional` that cannot be overridden: `relu_`, `sigmoid`, `grouped_mm`."""
    helpers = ("boolean_dispatch", "assert_", "handle_torch_function", "has_torch_function")
    kinds = (types.FunctionType, types.BuiltinFunctionType)
    public = [n for n, v in vars(home).items() if not n.startswith("_") and isinstance(v, kinds)]
    return [n for n in public if not n.startswith(helpers)]


@functools.cache
def _names_of_functions() -> dict[int, str]:
    names: dict[int, str] = {}
    for name, function in functions().items():
        names.setdefault(id(function), name)
    return names


@functools.cache
def methods() -> frozenset[str]:
    """Every method of a tensor that a program may call."""
    arithmetic = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
    special = [f"__{prefix}{n}__" for n in arithmetic for prefix in ("", "r", "i")]
    special += [f"__{n}__" for n in "eq ne lt le gt ge neg pos invert abs getitem setitem len bool int float".split()]
    public = [n for n in dir(torch.Tensor) if not n.startswith("_") and callable(getattr(torch.Tensor, n))]
    return frozenset([*public, *special]) - _READ_OR_WRITE_ELSEWHERE


def name_of(target: Any) -> str:
    """The name by which a stored program calls a function.

    Raises:
        SaveError: It is none that a file may name.
    """
    if isinstance(target, OpOverload):
        return _checked(f"overload {target._schema.name}.{target._overloadname}")
    if isinstance(target, OpOverloadPacket):
        return _checked(f"operator {target._qualified_op_name}")
    if isinstance(target, HigherOrderOperator) and target._name in _HIGHER_ORDER:
        return f"higher order {target._name}"
    if target is getattr:
        return "getattr"
    name = _names_of_functions().get(id(target), "")
    if not name:
        raise SaveError(
            f"it calls {_described(target)}, which is no function that a file can name (functions of torch, registered "
            f"operators): register it as an operator (torch.library.custom_op), or keep the model's code and save an "
            f"adapter (save_adapter)"
        )
    return name


def _checked(name: str) -> str:
    function_named(name)
    return name


def _described(target: Any) -> str:
    module, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", "") or str(target)
    return f"{module}.{name}" if module else str(name)


def function_named(name: Any) -> Callable[..., Any]:
    """The function that a stored program calls by this name.

    Raises:
        SaveError: No program may call it, or its operator is not registered in this process.
    """
    if name == "getattr":
        return getattr
    found: Callable[..., Any] | None = None
    if isinstance(name, str):
        kind, _, rest = name.partition(" ")
        if kind in ("operator", "overload"):
            found = _registered(rest, overload=kind == "overload")
        elif name.startswith("higher order ") and (short := name.removeprefix("higher order ")) in _HIGHER_ORDER:
            found = torch._ops._higher_order_ops.get(short)
        else:
            found = functions().get(name)
        if found is not None:
            return found
    raise SaveError(f"it calls {name!r:.80}, which is no function that a file may name")


def _registered(name: str, *, overload: bool) -> Any:
    """An operator that is registered with torch; nothing is loaded for it."""
    match = _OPERATOR_NAME.fullmatch(name)
    if match is None or (match[3] is not None) != overload:
        raise SaveError(f"it calls {name!r:.80}, which is no name of an operator")
    namespace, short, which = match.groups()
    schemas = torch._C._jit_get_schemas_for_operator(f"{namespace}::{short}")
    schemas = [s for s in schemas if not overload or (s.overload_name or "default") == which]
    schemas = [s for s in schemas if _is_dispatched(s)]
    if not schemas:
        raise SaveError(
            f"it calls the operator {name}, which is not registered in this process: import the library that "
            f"registers it first"
        )
    if short in _READ_OR_WRITE_ELSEWHERE or any(_takes_text(s) for s in schemas if namespace != "aten"):
        raise SaveError(f"it calls the operator {name}, which takes text or memory of its own: no file may name it")
    packet = getattr(getattr(torch.ops, namespace), short)
    return getattr(packet, which) if overload else packet


def _is_dispatched(schema: Any) -> bool:
    """Whether it is an operator on tensors; those of TorchScript alone read and write files, for one."""
    name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    return bool(torch._C._dispatch_has_kernel(name))


def _takes_text(schema: Any) -> bool:
    return any("str" in str(argument.type) for argument in schema.arguments)
