"""Kernels for the stand-in: what the CPU computes, on the stand-in's memory.

Every aten operator that torch_npu has a kernel of its own for gets the CPU's. Operators of torch_npu itself get
one only if they are listed here or given one with `give_kernel`; all others fail in torch_npu. Operators that
torch_npu has no kernel for either behave as on the hardware: they decompose, or torch_npu moves them to the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stand_in.memory import as_cpu, leaves, map_leaves, on_npu, to_npu

# These touch no element, or choose among other operators: what is to be tested is torch_npu's own code.
OWN = {
    "allocation": ("empty.memory_format", "empty_strided", "empty_like", "new_empty_strided", "_pin_memory",
                   "empty_with_swapped_memory", "_lazy_clone"),
    "the memory of a tensor": ("set_.source_Storage", "set_.source_Storage_storage_offset", "is_pinned", "is_set_to",
                               "record_stream"),
    "a copy of bytes": ("_local_scalar_dense", "_copy_from_and_resize"),
    "packing, which torch_npu pads": ("_pack_padded_sequence", "_pad_packed_sequence"),
    "choice": ("scaled_dot_product_attention", "_fused_sdp_choice"),
}  # fmt: skip

# Everywhere else, tensors of two devices in one call are the caller's mistake, which the hardware reports.
MAY_MIX_DEVICES = {
    "aten::copy_", "aten::_foreach_copy_", "aten::_copy_from",
    "aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index.Tensor",
}  # fmt: skip
# Arguments that are read on the host, by the names they have in torch_npu's schemas.
ON_HOST = ("actual_seq_qlen", "actual_seq_kvlen")

_PRIVATE = "PrivateUse1"
_BOTH = ("CPU", _PRIVATE)

# Registrations last as long as their library objects.
_libraries: list[torch.library.Library] = []


def install() -> None:
    """Give the stand-in its kernels: the CPU's for aten, the emulated ones of sgl_npu for fused attention."""
    if _libraries:
        return
    import torch_npu  # noqa: F401

    # The default of Atlas A2 and A3, which CANN tells torch_npu: kernels are compiled beforehand, and weights keep
    # their format when a module is moved.
    torch.npu.set_compile_mode(jit_compile=False)
    for op in _aten_ops():
        _register(op, _PRIVATE, _on_shared_memory(op, op))

    from stand_in import attention_kernels, cast_kernels, gradient_kernels, model_kernels

    for module in (gradient_kernels, cast_kernels, attention_kernels, model_kernels):
        for name, kernel in module.KERNELS.items():
            give_kernel(name, kernel)
    for name, kernel in model_kernels.NPU_KERNELS.items():
        _register(_find(name), _PRIVATE, _on_shared_memory(_find(name), kernel))
    for name, kernel in attention_kernels.OUT_KERNELS.items():
        for key in _BOTH:
            _register(_find(name), key, kernel)


def give_kernel(name: str, kernel: Callable[..., Any]) -> None:
    """Make `kernel`, a function on CPU tensors, what "namespace::op" or "namespace::op.overload" computes.

    It serves CPU tensors as well as those of the stand-in. Arguments that the schema marks as written may be
    written in place; results are copied to the device. A later call replaces an earlier one.
    """
    op = _find(name)
    _register(op, "CPU", kernel)
    _register(op, _PRIVATE, _on_shared_memory(op, kernel))


@contextlib.contextmanager
def given_kernel(name: str, kernel: Callable[..., Any]) -> Iterator[None]:
    """As `give_kernel`, until the end of the block."""
    first = len(_libraries)
    give_kernel(name, kernel)
    try:
        yield
    finally:
        del _libraries[first : first + len(_BOTH)]


def give_own_kernel(name: str, kernel: Callable[..., Any]) -> None:
    """Make `kernel`, which gets the operator and then its arguments on the stand-in, what "namespace::op" computes."""
    op = _find(name)
    _register(op, _PRIVATE, functools.partial(kernel, op))


def _find(name: str) -> torch._ops.OpOverload:
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    op = getattr(packet, overload or "default", None)
    if op is None:
        raise RuntimeError(f"stand-in NPU: there is no operator {name!r} to give a kernel to")
    return op


def _register(op: torch._ops.OpOverload, key: str, kernel: Callable[..., Any]) -> None:
    library = torch.library.Library(op.namespace, "IMPL")
    with warnings.catch_warnings():
        # That a kernel of torch_npu is replaced is the point, and torch says so once.
        warnings.simplefilter("ignore")
        library.impl(op.name().partition("::")[2], kernel, key, allow_override=True)
    _libraries.append(library)


def _aten_ops() -> list[torch._ops.OpOverload]:
    """The aten operators that torch_npu has kernels for, except views, resizes and those of OWN."""
    own = {name for names in OWN.values() for name in names}
    found = []
    # Public torch has no list of registrations (seen in 2.13). It also names operators that aten does not have.
    for name in torch._C._dispatch_get_registrations_for_dispatch_key(_PRIVATE):
        namespace, _, rest = name.partition("::")
        if namespace != "aten" or rest in own:
            continue
        base, _, overload = rest.partition(".")
        op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if op is not None and not _is_view(op):
            found.append(op)
    return found


def _is_view(op: torch._ops.OpOverload) -> bool:
    """Whether it makes or changes the shape of a tensor, not its elements."""
    returned = [value.alias_info for value in op._schema.returns]
    return torch.Tag.inplace_view in op.tags or any(alias and not alias.is_write for alias in returned)


def _on_shared_memory(op: torch._ops.OpOverload, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on CPU tensors as a kernel of `op` for tensors of the stand-in."""
    arguments, returns = op._schema.arguments, op._schema.returns
    written = {argument.name: argument for argument in arguments if _writes(argument)}
    outs = {name for name, argument in written.items() if argument.is_out}
    mixes = op.name() in MAY_MIX_DEVICES
    returned = [_written_argument(value, written) for value in returns]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        if not mixes:
            _require_one_device(op, given)
        device = _device(given)
        # An output may have any size and may be an input too: it is computed apart, then resized and filled.
        on_cpu = {
            name: map_leaves(_fresh if name in outs else _argument_on_cpu, value) for name, value in given.items()
        }
        positional = [on_cpu[argument.name] for argument, _ in zip(arguments, args, strict=False)]
        results = function(*positional, **{name: on_cpu[name] for name in kwargs})
        for name in written.keys() & given.keys():
            _write_back(op, leaves(given[name]), leaves(on_cpu[name]), name in outs)
        if not returns:
            return None
        results = [results] if len(returns) == 1 else results
        final = [
            given[name] if name is not None else _on_device(device, result)
            for name, result in zip(returned, results, strict=True)
        ]
        return final[0] if len(returns) == 1 else tuple(final)

    return run


def _writes(argument: torch._C.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _written_argument(value: torch._C.Argument, written: dict[str, torch._C.Argument]) -> str | None:
    """Name of the argument that a return value is, if it is one."""
    if value.alias_info is None:
        return None
    return next(
        name for name, argument in written.items() if argument.alias_info.before_set & value.alias_info.before_set
    )


def _require_one_device(op: torch._ops.OpOverload, given: dict[str, Any]) -> None:
    """Raises RuntimeError as torch does. A number may be on the CPU."""
    values = leaves([value for name, value in given.items() if name not in ON_HOST])
    devices = {
        str(value.device) for value in values if isinstance(value, torch.Tensor) and (value.dim() or on_npu(value))
    }
    if len(devices) > 1:
        raise RuntimeError(
            f"{op}: expected all tensors to be on the same device, but found {' and '.join(sorted(devices))}"
        )


def _device(given: dict[str, Any]) -> torch.device:
    """Where results go: where the caller asks for, else where the first tensor of the stand-in is."""
    asked = given.get("device")
    if asked is not None:
        return torch.device(asked)
    first = next((value for value in leaves(list(given.values())) if on_npu(value)), None)
    return torch.device("npu") if first is None else first.device


def _argument_on_cpu(value: Any) -> Any:
    if on_npu(value):
        return as_cpu(value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.Generator):
        if value.device.type != "npu":
            raise RuntimeError(f"expected a generator of device type npu, but found {value.device.type}")
        return _cpu_generator(value)
    return value


def _cpu_generator(generator: torch.Generator) -> torch.Generator:
    """A generator for one call: the seed's own on the first call, others as the offset moves on.

    Calls without a generator draw from the CPU's default one, so they equal those of the CPU.
    """
    result = torch.Generator()
    result.manual_seed((generator.initial_seed() + 0x9E3779B9 * generator.get_offset()) % 2**63)
    generator.set_offset(generator.get_offset() + 4)
    return result


def _fresh(value: Any) -> Any:
    return torch.empty(0, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def _write_back(op: torch._ops.OpOverload, given: list[Any], on_cpu: list[Any], is_out: bool) -> None:
    """Fill the outputs; arguments that are written in place share their memory and are complete already."""
    for target, source in zip(given, on_cpu, strict=True):
        if not isinstance(target, torch.Tensor):
            continue
        if is_out:
            if target.shape != source.shape:
                target.resize_(source.shape)
            as_cpu(target).copy_(source)
        elif target.shape != source.shape:
            raise RuntimeError(f"stand-in NPU: {op} changed the size of an argument, which only out= arguments may")


def _on_device(device: torch.device, result: Any) -> Any:
    if device.type != "npu":
        return result
    return map_leaves(lambda value: to_npu(value, device) if isinstance(value, torch.Tensor) else value, result)
