"""Attention that is spelled by hand: matmul → … → softmax → … → matmul, in Dynamo's graph or in the ATen graph.

The matcher finds it later, in the ATen graph. Here it only gets its place in the report, whatever becomes of it.
"""

from __future__ import annotations

from torch import fx

from sgl_npu.passes.fx_ops import aten, is_float

SPELLING = "softmax between two matmuls"
REASON = (
    "written out by hand in a graph that is differentiated: matched in inference graphs alone, as under torch.no_grad()"
)

_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "__matmul__")
# Between the scores and the softmax, and between the probabilities and the values.
_BEFORE = (
    "add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv", "itruediv", "masked_fill", "masked_fill_", "where",
    "to", "float", "half", "bfloat16", "type", "tanh", "view", "reshape", "cat", "clamp", "maximum", "max", "getitem",
    "unflatten", "flatten", "contiguous", "transpose", "permute", "unsqueeze", "squeeze",
)  # fmt: skip
_AFTER = (*_BEFORE, "dropout", "type_as", "nan_to_num", "expand", "clone", "movedim")
_LIMIT = 40

_BATCHED_PRODUCTS = (aten.bmm.default, aten.baddbmm.default)
_ENDS = (
    aten.mm.default, aten.matmul.default, aten.addmm.default, aten._softmax.default, aten.convolution.default,
    aten.topk.default,
)  # fmt: skip


def is_hand_written_attention(node: fx.Node) -> bool:
    """Whether a node is a softmax whose input comes from a matrix product and whose output goes into one."""
    if node.op not in ("call_function", "call_method") or _name(node) not in _SOFTMAX:
        return False
    return _reaches(node, backward=True, through=_BEFORE) and _reaches(node, backward=False, through=_AFTER)


def looks_like_attention(scores: fx.Node, probabilities: fx.Node) -> bool:
    """Whether, in the ATen graph, scores come from a batched product and probabilities go into one, by any few ops."""
    return _is_near_product(scores, backward=True) and _is_near_product(probabilities, backward=False)


def _is_near_product(start: fx.Node, backward: bool) -> bool:
    seen, queue = {start}, [start]
    while queue and len(seen) < _LIMIT:
        node = queue.pop(0)
        if node.target in _BATCHED_PRODUCTS or _is_batched(node):
            return True
        near = node.all_input_nodes if backward else node.users
        queue += [x for x in near if x not in seen and (x.target not in _ENDS or _is_batched(x)) and is_float(x)]
        seen.update(near)
    return False


def _is_batched(node: fx.Node) -> bool:
    """matmul of two batches of matrices, which tracing on an NPU leaves whole."""
    return node.target is aten.matmul.default and all(x.meta["val"].dim() > 2 for x in node.args[:2])


def _reaches(start: fx.Node, backward: bool, through: tuple[str, ...]) -> bool:
    """Breadth first from `start` over nodes named in `through`, at most `_LIMIT` of them, to a matrix product."""
    seen, queue = {start}, [start]
    while queue and len(seen) < _LIMIT:
        node = queue.pop(0)
        for neighbour in node.all_input_nodes if backward else node.users:
            if _name(neighbour) in _PRODUCTS:
                return True
            if neighbour not in seen and _name(neighbour) in through:
                seen.add(neighbour)
                queue.append(neighbour)
    return False


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]
