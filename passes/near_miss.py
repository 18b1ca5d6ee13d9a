"""Attention that is spelled by hand in Dynamo's graph: matmul → … → softmax → … → matmul.

The matcher finds it later, in the ATen graph. Here it only gets its place in the report, whatever becomes of it.
"""

from __future__ import annotations

from torch import fx

SPELLING = "softmax between two matmuls"
REASON = "written out by hand: matched in inference graphs with the option formulas=True alone"

_SOFTMAX = ("softmax", "_safe_softmax")
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "__matmul__")
# Between the scores and the softmax, and between the probabilities and the values.
_BEFORE = (
    "add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv", "itruediv", "masked_fill", "masked_fill_", "where",
    "to", "float", "half", "bfloat16", "type", "tanh", "view", "reshape", "cat", "clamp", "maximum", "max", "getitem",
    "unflatten", "flatten", "contiguous", "transpose", "permute", "unsqueeze", "squeeze",
)  # fmt: skip
_AFTER = (*_BEFORE, "dropout", "type_as", "nan_to_num", "expand", "clone", "movedim")
_LIMIT = 40


def is_hand_written_attention(node: fx.Node) -> bool:
    """Whether a node is a softmax whose input comes from a matrix product and whose output goes into one."""
    if node.op not in ("call_function", "call_method") or _name(node) not in _SOFTMAX:
        return False
    return _reaches(node, backward=True, through=_BEFORE) and _reaches(node, backward=False, through=_AFTER)


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
    return str(getattr(node.target, "__name__", node.target))
