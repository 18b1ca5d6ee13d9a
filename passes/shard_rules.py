"""How an op of a sharded graph runs on one rank: what it needs of its operands and what its results are then.

DTensor has the rules of most ops (`shard_dtensor`). The rules here are those that take sizes or offsets, which DTensor
knows for numbers only, and those of sequences that a model has joined from several (`cat` and `slice` stay local).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sgl_npu.passes.fx_ops import aten, permuted_order
from sgl_npu.passes.shard_dtensor import parallel_dims
from sgl_npu.passes.shard_spec import Layouts, Sharding, same, through_view
from sgl_npu.runtime.sequence import SequenceLayout
from sgl_npu.runtime.sizes import Size, known

Given = Sequence[Sharding | None]
Localise = Callable[[tuple, dict], tuple[tuple, dict]]


@dataclass(frozen=True)
class Step:
    """An op on one rank: the sharding each operand must have (None: whole), that of each result, and its arguments.

    `sizes` are arguments of the local op: {(position,) or (position, index): value}.
    """

    needed: list[Sharding | None]
    outputs: list[Sharding | None]
    sizes: dict[tuple[int, ...], Size]


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of a node in order, once for every place they stand in."""
    leaves = pytree.tree_leaves((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
    return [x for x in leaves if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor)]


def forward(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    """The step of a node whose operands are sharded as given, without communication; None if there is none."""
    if not _is_pure(node):
        return None
    if node.target in _FORWARD:
        return _FORWARD[node.target](node, given, layouts)
    return _dtensor(node, given)


def backward(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    """The step of a node with whole operands that gives the wanted results; operands are sliced, which is free."""
    if not _is_pure(node):
        return None
    if node.target in _BACKWARD:
        return _BACKWARD[node.target](node, wanted, layouts)
    position, want = next((i, x) for i, x in enumerate(wanted) if x is not None)
    out = _outputs(node)[position]
    sources = operands(node)
    for number, source in enumerate(sources):
        shape = source.meta["val"].shape
        dims = [dim for dim in range(len(shape)) if known(shape[dim] == out.shape[want.dim])]
        for dim in sorted(dims, key=lambda dim: (len(shape) - dim) != (len(out.shape) - want.dim)):
            given = [want.at(dim) if other == number else None for other in range(len(sources))]
            step = forward(node, given, layouts)
            if step and all(x is None or same(x, y) for x, y in zip(wanted, step.outputs, strict=True)):
                return step
    return None


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def _outputs(node: fx.Node) -> list[Any]:
    value = node.meta["val"]
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _dtensor(node: fx.Node, given: Given) -> Step | None:
    target: Any = node.target
    if target not in _SIZES_OF_OTHER_DIMS and any("SymInt" in str(x.type) for x in target._schema.arguments):
        return None
    example = next(x for x in given if x is not None)
    if any(x is not None and x.layout is not example.layout for x in given):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: x.meta["val"])
    found = parallel_dims(target, args, kwargs, [None if x is None else x.dim for x in given])
    if found is None:
        return None
    needed = [x if x is not None or dim is None else example.at(dim) for x, dim in zip(given, found[0], strict=True)]
    outputs = [None if dim is None else example.at(dim) for dim in found[1]]
    results = _outputs(node)
    if len(outputs) != len(results):
        outputs = outputs * len(results) if len(outputs) == 1 else outputs + [None] * (len(results) - len(outputs))
    pairs = [
        *zip((x.meta["val"] for x in operands(node)), needed, strict=True),
        *zip(results, outputs, strict=True),
    ]
    if not all(x is None or _fits(value, x, example) for value, x in pairs):
        return None
    return Step(needed, outputs, {})


def _fits(value: Any, sharding: Sharding, example: Sharding) -> bool:
    """The dimension has the size of the sequence, merged as in the example."""
    factors = known(sharding.outer == example.outer) and known(sharding.inner == example.inner)
    return factors and isinstance(value, Tensor) and known(value.shape[sharding.dim] == sharding.size)


# Ops with arguments that are sizes or indices of dimensions which are never the sharded one where DTensor has a rule.
_SIZES_OF_OTHER_DIMS = (
    aten.native_layer_norm.default,
    aten._fused_rms_norm.default,
    aten.topk.default,
    aten.embedding.default,
)


def _only(given: Given) -> Sharding:
    return next(x for x in given if x is not None)


def _shape(node: fx.Node) -> Any:
    return node.meta["val"].shape


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


# Views: the sequence may be merged with its neighbours and taken apart again, never split itself.


def _view(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    s = _only(given)
    return _view_step(node, s, through_view(_shape(_source(node)), _shape(node), s))


def _view_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    want = _only(wanted)
    return _view_step(node, through_view(_shape(node), _shape(_source(node)), want), want)


def _view_step(node: fx.Node, source: Sharding | None, result: Sharding | None) -> Step | None:
    if source is None or result is None:
        return None
    takes_sizes = node.target in _SIZED_VIEWS
    return Step([source], [result], {(1, result.dim): result.local_size} if takes_sizes else {})


_SIZED_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def _permute(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    s = _only(given)
    return Step([s], [s.at(permuted_order(node).index(s.dim))], {})


def _permute_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    want = _only(wanted)
    return Step([want.at(permuted_order(node)[want.dim])], [want], {})


def _expand(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    s = _only(given)
    result = s.at(s.dim + len(_shape(node)) - len(_shape(_source(node))))
    return Step([s], [result], {(1, result.dim): result.local_size})


def _expand_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    want = _only(wanted)
    shape = _shape(_source(node))
    dim = want.dim - len(_shape(node)) + len(shape)
    is_expanded = dim < 0 or known(shape[dim] == 1)
    return Step([None if is_expanded else want.at(dim)], [want], {(1, want.dim): want.local_size})


def _select(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    s, dim = _only(given), _dim_argument(node, 1)
    return None if s.dim == dim else Step([s], [s.at(s.dim - (s.dim > dim))], {})


def _select_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    want, dim = _only(wanted), _dim_argument(node, 1)
    return Step([want.at(want.dim + (want.dim >= dim))], [want], {})


def _last_dim_view(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    """view_as_complex and view_as_real take away, or add, a last dimension of size 2."""
    s = _only(given)
    return None if s.dim >= min(len(_shape(node)), len(_shape(_source(node)))) else Step([s], [s], {})


# Cutting and joining.


def _dim_argument(node: fx.Node, position: int, name: str = "dim") -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get(name, 0)
    assert isinstance(dim, int)
    return dim % len(_shape(_source(node)))


def _slice(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    s, dim = _only(given), _dim_argument(node, 1)
    if s.dim != dim or known(_shape(node)[dim] == s.size):
        return Step([s], [s], {} if s.dim != dim else {(2,): 0, (3,): s.local_size})
    return _segment(node, s, layouts)


def _slice_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    want, dim = _only(wanted), _dim_argument(node, 1)
    size = _shape(_source(node))[dim]
    if want.dim != dim or known(size == want.size):
        return _slice(node, [want], layouts)
    joint = layouts.of_length(size)
    step = None if joint is None else _segment(node, Sharding(dim, joint), layouts)
    return step if step and same(step.outputs[0], want) else None


def _segment(node: fx.Node, s: Sharding, layouts: Layouts) -> Step | None:
    """A slice that takes whole segments of a joined sequence."""
    arguments: tuple[Any, ...] = (*node.args[2:], *(None, None, 1)[len(node.args) - 2 :])
    step = arguments[2]
    if step != 1 or not known(s.outer * s.inner == 1):
        return None
    start, end = (x.meta["val"] if isinstance(x, fx.Node) else x for x in arguments[:2])
    edges, local = _edges(s.layout)
    first = _index(edges, 0 if start is None else start)
    is_open = end is None or (isinstance(end, int) and end >= _NO_END) or known(end >= edges[-1])
    last = len(edges) - 1 if is_open else _index(edges, end)
    if first is None or last is None:
        return None
    layout = layouts.of(s.layout.segments[first:last])
    if layout is None:
        return None
    return Step([s], [Sharding(s.dim, layout)], {(2,): local[first], (3,): local[last]})


_NO_END = sys.maxsize


def _edges(layout: SequenceLayout) -> tuple[list[Size], list[Size]]:
    """Where the segments of a sequence begin and end: in the sequence, and in the rows of one rank."""
    edges: list[Size] = [0]
    local: list[Size] = [0]
    for number, length in enumerate(layout.segments):
        edges.append(edges[-1] + length)
        local.append(local[-1] + layout.local(number))
    return edges, local


def _index(edges: Sequence[Size], value: Size) -> int | None:
    if known(value < 0):
        value = edges[-1] + value
    return next((number for number, edge in enumerate(edges) if known(edge == value)), None)


def _split(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    s = _only(given)
    dim = _dim_argument(node, 2)
    results = _outputs(node)
    if s.dim != dim:
        return Step([s], [s] * len(results), {})
    if node.target is not aten.split_with_sizes.default or not known(s.outer * s.inner == 1):
        return None
    parts = [layouts.of((result.shape[dim],)) for result in results]
    if layouts.of([result.shape[dim] for result in results]) is not s.layout or any(x is None for x in parts):
        return None
    outputs = [Sharding(dim, part) for part in parts if part is not None]
    return Step([s], list(outputs), {(1, number): s.layout.local(number) for number in range(len(parts))})


def _split_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    want, dim = _only(wanted), _dim_argument(node, 2)
    if want.dim == dim:
        joint = layouts.of_length(_shape(_source(node))[dim])
        step = None if joint is None else _split(node, [Sharding(dim, joint)], layouts)
    else:
        step = _split(node, [want], layouts)
    fits = step is not None and all(x is None or same(x, y) for x, y in zip(wanted, step.outputs, strict=True))
    return step if fits else None


def _unbind(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    s, dim = _only(given), _dim_argument(node, 1)
    return None if s.dim == dim else Step([s], [s.at(s.dim - (s.dim > dim))] * len(_outputs(node)), {})


def _unbind_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    want, dim = _only(wanted), _dim_argument(node, 1)
    return _unbind(node, [want.at(want.dim + (want.dim >= dim))], layouts)


def _joined_dim(node: fx.Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(_shape(node))


def _cat(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    s = _only(given)
    empty = [len(_shape(part)) != len(_shape(node)) for part in operands(node)]  # (0,) is dropped by cat
    if s.dim != _joined_dim(node):
        agrees = all(x is None or same(x, s) for x in given)
        return Step([None if skip else s for skip in empty], [s], {}) if agrees else None
    joint = layouts.of_length(_shape(node)[s.dim])
    return None if joint is None else _joined(node, Sharding(s.dim, joint), given, layouts)


def _cat_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    want, whole = _only(wanted), [None] * len(operands(node))
    if want.dim != _joined_dim(node):
        return _cat(node, [*whole[1:], want], layouts)
    return _joined(node, want, whole, layouts)


def _joined(node: fx.Node, want: Sharding, given: Given, layouts: Layouts) -> Step | None:
    """Every operand is one segment, or several, of the joined sequence: then each rank joins its own rows."""
    if not known(want.outer * want.inner == 1):
        return None
    needed: list[Sharding | None] = []
    start = 0
    for part, has in zip(operands(node), given, strict=True):
        if len(_shape(part)) != len(_shape(node)) or known(_shape(part)[want.dim] == 0):
            needed.append(None)
            continue
        size, end = _shape(part)[want.dim], start + 1
        while end < len(want.layout.segments) and not known(sum(want.layout.segments[start:end]) == size):
            end += 1
        layout = layouts.of(want.layout.segments[start:end])
        found = None if layout is None else Sharding(want.dim, layout)
        if found is None or not known(found.size == size) or not (has is None or same(has, found)):
            return None
        needed.append(found)
        start = end
    return Step(needed, [want], {}) if start == len(want.layout.segments) else None


def _scatter(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    """slice_scatter: writes into a part of another dimension."""
    s, dim = _only(given), _dim_argument(node, 2)
    agrees = s.dim != dim and all(x is None or same(x, s) for x in given)
    return Step([s, s], [s], {}) if agrees else None


def _copy(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    """copy: the second operand in the shape of the first."""
    s = given[0]
    if s is None:
        source = _only(given)
        s = source.at(source.dim + len(_shape(node)) - len(_shape(operands(node)[1])))
    shape = _shape(operands(node)[1])
    dim = s.dim - len(_shape(node)) + len(shape)
    expanded = dim < 0 or known(shape[dim] == 1)
    needed = None if expanded else s.at(dim)
    fits = known(_shape(node)[s.dim] == s.size) and (given[1] is None or same(given[1], needed))
    return Step([s, needed], [s], {}) if fits else None


def _copy_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    return _copy(node, [_only(wanted), None], layouts)


def _scatter_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    return _scatter(node, [_only(wanted), None], layouts)


def _stack(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    s = _only(given)
    if not all(x is None or same(x, s) for x in given):
        return None
    return Step([s] * len(given), [s.at(s.dim + (s.dim >= _joined_dim(node)))], {})


def _stack_back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
    want, dim = _only(wanted), _joined_dim(node)
    if want.dim == dim:
        return None
    return _stack(node, [want.at(want.dim - (want.dim > dim))] * len(operands(node)), layouts)


# Ops that make tensors, and what tensor parallelism has put into the graph.


def _filled_back(position: int) -> Callable[[fx.Node, Given, Layouts], Step | None]:
    """full, zeros, ones and their like: `position` is that of the list of sizes."""

    def back(node: fx.Node, wanted: Given, layouts: Layouts) -> Step | None:
        want = _only(wanted)
        return Step([None] * len(operands(node)), [want], {(position, want.dim): want.local_size})

    return back


def _unchanged(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    return Step([_only(given)], [_only(given)], {})


_Rule = Callable[[fx.Node, Given, Layouts], Step | None]
_PAIRS: list[tuple[tuple[Any, ...], _Rule | None, _Rule]] = [
    (_SIZED_VIEWS, _view, _view_back),
    ((aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), _view, _view_back),
    ((aten.permute.default, aten.transpose.int, aten.t.default), _permute, _permute_back),
    ((aten.expand.default,), _expand, _expand_back),
    ((aten.select.int,), _select, _select_back),
    ((aten.slice.Tensor,), _slice, _slice_back),
    ((aten.split.Tensor, aten.split_with_sizes.default), _split, _split_back),
    ((aten.unbind.int,), _unbind, _unbind_back),
    ((aten.cat.default,), _cat, _cat_back),
    ((aten.stack.default,), _stack, _stack_back),
    ((aten.slice_scatter.default,), _scatter, _scatter_back),
    ((aten.copy.default,), _copy, _copy_back),
    ((aten.view_as_complex.default, aten.view_as_real.default), _last_dim_view, _last_dim_view),
    ((aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format), None, _filled_back(0)),
    ((aten.new_full.default, aten.new_zeros.default, aten.new_ones.default), None, _filled_back(1)),
]
if torch.distributed.is_available():
    _c10d = torch.ops._c10d_functional
    _PAIRS.append(((_c10d.all_reduce.default, _c10d.wait_tensor.default), _unchanged, _unchanged))


def _never(node: fx.Node, given: Given, layouts: Layouts) -> Step | None:
    return None


_FORWARD = {op: ahead or _never for ops, ahead, _ in _PAIRS for op in ops}
_BACKWARD = {op: back for ops, _, back in _PAIRS for op in ops}
