"""The order in memory of what an attention call of torch returns, where anybody could tell it from another."""

from __future__ import annotations

from torch import Tensor, fx

from sgl_npu.runtime.sizes import Size, known

# Users whose result is the same for every stride of their input, and users that hand the question on to their own user.
_STRIDE_BLIND = ("contiguous", "linear", "matmul")
_STRIDE_PASSING = ("transpose", "permute", "reshape", "flatten")
# Dimension orders, slowest first, in which torch's kernels write (B, H, S, D): their own, and that of the query.
_ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3))


def visible_order(node: fx.Node) -> tuple[int, ...] | None:
    """The dimension order of torch's own result, None where no user could tell it from another."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(value, Tensor):
        return None
    if _is_contiguous(value):
        return None if _strides_unseen(node) else tuple(range(value.dim()))
    orders = _ORDERS if value.dim() == 4 else ()
    return next((order for order in orders if _is_contiguous(value.permute(order))), None)


def _is_contiguous(value: Tensor) -> bool:
    """For every size it may have, and without asking for those that are known at run time alone."""
    expected: Size = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not known(size == 1) and not known(stride == expected):
            return False
        expected = expected * size
    return True


def _strides_unseen(node: fx.Node) -> bool:
    """Whether the result runs, used once at every step, into an op that does not care for its strides."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        if name not in _STRIDE_PASSING:
            return name in _STRIDE_BLIND
    return False


def in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """`x` with its memory in this dimension order, copied only if it is in another."""
    if order == tuple(range(x.dim())):
        return x if x.is_contiguous() else x.contiguous()
    x = x.permute(order)
    x = x if x.is_contiguous() else x.contiguous()
    return x.permute([order.index(dim) for dim in range(len(order))])
