"""The emulated operators and torch_npu's own say the same: schemas, and what a call returns or that it is refused.

Shapes are compared with torch_npu's kernels for fake tensors, sizes fixed and symbolic, over every combination of the
tables below; what the emulation computes is compared with them too.
"""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

from sgl_npu import lowering
from sgl_npu.lowering.platforms import PLATFORMS
from sgl_npu.lowering.sparse.table import NPU_KERNELS
from sgl_npu.runtime.npu import FAKES, KERNELS
from sgl_npu.runtime.npu.layouts import FIA_LAYOUTS, query_axes
from sgl_npu.runtime.npu.schemas import NAMESPACE, SCHEMAS

V1, V2, V3 = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2", "npu_fusion_attention_v3"
ATTENTION = (V1, V2, V3)
UPDATE = "npu_attention_update"
SPARSE = "npu_block_sparse_attention"
SCATTER = "npu_scatter_nd_update"
BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
NAMES = {  # argument names of version 2, where they differ
    "num_heads": "num_query_heads",
    "softmax_lse_flag": "return_softmax_lse",
    "scale": "softmax_scale",
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
}


def theirs(name):
    return getattr(torch.ops.npu, name).default


def emitted():
    """The operators of torch_npu that the lowering calls, by overload."""
    found = set()
    for path in Path(next(iter(lowering.__path__))).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (text := ast.unparse(node)).startswith("torch.ops.npu."):
                found.add(text.removeprefix("torch.ops.npu."))
    return {text for text in found if not any(other.startswith(f"{text}.") for other in found)}


def test_the_operators_tested_here_are_those_that_the_lowering_calls():
    tested = {f"{name}.default" for name in (*ATTENTION, UPDATE, SPARSE, SCATTER)}
    assert emitted() == {f"{name}.default" for name in SCHEMAS} == tested
    rows = (*PLATFORMS["npu"].forward, *PLATFORMS["npu"].packed)
    named = {kernel.op.removeprefix("npu.") for kernel in rows if kernel.op.startswith("npu.")}
    sparse = {kernel.op for kernels in NPU_KERNELS.values() for kernel in kernels.values() if kernel.op}
    assert {f"{op}.default" for op in named | sparse} == emitted() - {f"{UPDATE}.default", f"{SCATTER}.default"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_torch_npu_s_to_the_letter(name):
    assert f"{NAMESPACE}::{SCHEMAS[name]}" == str(theirs(name)._schema)


# ---------------------------------------------------------------- fake kernels

HEADS = 4
DIMS = ((16, 16), (16, 32), (128, 64))  # (D, Dv)
KV_HEADS = (0, 2)
WRONG_LAYOUTS = ("BNDS", "SBH", "bsnd", "", "BSND_TND")
RANKS = (2, 3, 4, 5)


def shape(axes, batch, heads, length, dim):
    sizes = {"B": batch, "N": heads, "S": length, "T": length, "D": dim, "H": heads * dim}
    return tuple(sizes[axis] for axis in axes)


def sizes(symbolic, mode):
    """(B, Sq, Skv): numbers, or symbols of which nothing is known."""
    if not symbolic:
        return 3, 5, 7
    return mode.from_tensor(torch.empty(3, 5, 7), static_shapes=False).shape


def outcome(function, *args, **kwargs):
    """Shape, strides, dtype and device of every result, or that there is none."""
    try:
        results = function(*args, **kwargs)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return "refused"
    return [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in results]


def agree(one, other):
    if "refused" in (one, other):
        return one == other
    return len(one) == len(other) and all(
        a[2:] == b[2:]
        and all(
            len(x) == len(y) and all(statically_known_true(i == j) for i, j in zip(x, y, strict=True))
            for x, y in zip(a[:2], b[:2], strict=True)
        )
        for a, b in zip(one, other, strict=True)
    )


def fake_calls(name, symbolic):
    """(description, args, kwargs) of every call, inside the fake mode."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    batch, rows, keys = sizes(symbolic, mode)
    with mode:
        yield from TABLES[name](batch, rows, keys)


def fia_calls(name, batch, rows, keys):
    grid = itertools.product(FIA_LAYOUTS, (BF16, INT8), DIMS, KV_HEADS, (False, True))
    for layout, dtype, (dim, value_dim), kv_heads, lse in grid:
        axes, heads = query_axes(layout), kv_heads or HEADS
        tensors = [
            torch.empty(shape(axes, batch, n, length, d), dtype=dtype)
            for n, length, d in ((HEADS, rows, dim), (heads, keys, dim), (heads, keys, value_dim))
        ]
        yield tensors, settings(name, layout, kv_heads, lse)
    for layout, kv_heads, rank in itertools.product(FIA_LAYOUTS, (1, 4), RANKS):  # paged
        query = torch.empty(shape(query_axes(layout), batch, HEADS, rows, 64), dtype=FP16)
        cache = {2: (9, 128), 3: (9, 128, kv_heads * 64), 4: (9, kv_heads, 128, 64), 5: (9, kv_heads, 4, 128, 16)}[rank]
        table = torch.empty(batch, 3, dtype=torch.int32)
        paged = {"block_table": table, "block_size": 128}
        yield [query, *(torch.empty(cache, dtype=FP16) for _ in "kv")], settings(name, layout, kv_heads, True) | paged
    for layout, rank, other in itertools.product((*FIA_LAYOUTS, *WRONG_LAYOUTS), RANKS, (3, 4)):
        query, value = (torch.empty((batch, 4, 8, 16, 2)[:n], dtype=FP16) for n in (rank, other))
        yield [query, value, value], settings(name, layout, 0, False)
    query = torch.empty(batch, HEADS, rows, 16, dtype=BF16)
    for heads in (0, -1):
        yield [query] * 3, settings(name, "BNSD", 0, False) | {named(name, "num_heads"): heads}
    for empty in (0, 16):
        value = torch.empty(batch, HEADS, keys, empty, dtype=BF16)
        yield [query, value, value], settings(name, "BNSD", 0, True)
    scale = torch.empty(1)
    yield [query] * 3, settings(name, "BNSD", 0, True) | {"quant_scale2" if name == V1 else "quant_scale_out": scale}
    rope = {"query_rope": torch.empty(batch, HEADS, rows, 64, dtype=BF16)}
    yield [query.to(INT8)] * 3, settings(name, "BNSD", 0, True) | rope


def named(name, argument):
    return NAMES.get(argument, argument) if name == V2 else argument


def settings(name, layout, kv_heads, lse):
    given = {"num_heads": HEADS, "input_layout": layout, "num_key_value_heads": kv_heads, "softmax_lse_flag": lse}
    return {named(name, argument): value for argument, value in given.items()}


def fusion_calls(batch, rows, keys):
    grid = itertools.product(("BSH", "SBH", "BSND", "BNSD", "TND"), (BF16, FP32), DIMS, (1, 2, 4))
    for layout, dtype, (dim, value_dim), kv_heads in grid:
        tensors = [
            torch.empty(shape(layout, batch, n, length, d), dtype=dtype)
            for n, length, d in ((HEADS, rows, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim))
        ]
        yield [*tensors, HEADS, layout], {}


def update_calls(batch, rows, keys):
    grid = itertools.product(range(1, 17), (8, 128), (FP32, FP16, BF16), (0, 1))
    for count, dim, dtype, update_type in grid:
        lse = [torch.empty(batch * rows) for _ in range(count)]
        yield (lse, [torch.empty(batch * rows, dim, dtype=dtype) for _ in range(count)], update_type), {}


def sparse_calls(batch, rows, keys):
    """Query axes, block sizes and precision are all that is checked, shapes follow the query and the value."""
    grid = itertools.product(RANKS, (3, 4), (BF16, FP16), DIMS, ((128, 128), (7, 256), (128, 64)), (0, 1), (None, 0, 1))
    for rank, value_rank, dtype, (dim, value_dim), blocks, precise, flag in grid:
        query, key, value = (
            torch.empty((batch, HEADS, length, size, 2)[:axes], dtype=dtype)
            for axes, length, size in ((rank, rows, dim), (value_rank, keys, dim), (value_rank, keys, value_dim))
        )
        mask = torch.empty(batch, HEADS, 1, 1, dtype=INT8)
        layout = {"q_input_layout": "BNSD", "kv_input_layout": "BNSD"} if rank == 4 else {}
        yield [query, key, value, mask, list(blocks)], layout | {"inner_precise": precise, "softmax_lse_flag": flag}
    yield [query[..., 0], key, value, mask, [128]], {"inner_precise": 0}


TABLES: dict[str, Any] = {
    V1: lambda *sizes: fia_calls(V1, *sizes),
    V2: lambda *sizes: fia_calls(V2, *sizes),
    V3: fusion_calls,
    UPDATE: update_calls,
    SPARSE: sparse_calls,
}


@pytest.mark.parametrize("symbolic", [False, True], ids=["numbers", "symbols"])
@pytest.mark.parametrize("name", TABLES)
def test_every_call_has_the_results_of_torch_npu_or_is_refused_as_there(name, symbolic):
    counts = {True: 0, False: 0}
    for args, kwargs in fake_calls(name, symbolic):
        wanted, found = outcome(theirs(name), *args, **kwargs), outcome(FAKES[name], *args, **kwargs)
        shapes = [tuple(x.shape) for x in torch.utils._pytree.tree_leaves(args[:3]) if isinstance(x, torch.Tensor)]
        assert agree(found, wanted), (shapes, args[3:], kwargs, found, wanted)
        counts[wanted == "refused"] += 1
    assert counts[False] > 80 and (counts[True] > 80 or name in (V3, UPDATE))


# ---------------------------------------------------------------- kernels

TRIANGLE, DENSE = (torch.ones(n, m, dtype=torch.bool).triu(1) for n, m in ((2048, 2048), (5, 7)))
MODES = {"no mask": (None, 0), "dense": (DENSE, 0), "2": (TRIANGLE, 2), "3": (TRIANGLE, 3), "4": (TRIANGLE, 4)}
ENDS = [3, 5], [4, 7]  # of two sequences, in packed layouts


def sparse_kernel_calls():
    for layout, dim, kv_heads, lse, dtype in itertools.product(
        ("BNSD", "TND"), (64, 128), (2, 4), (0, 1), (BF16, FP16)
    ):
        counts = ((HEADS, 300), (kv_heads, 500), (kv_heads, 500))
        tensors = [torch.randn(shape(layout, 2, heads, length, dim)).to(dtype) for heads, length in counts]
        mask = torch.ones(2, HEADS, 3, 4, dtype=INT8)
        mask[:, :, 1, 2] = 0
        given = {"q_input_layout": layout, "kv_input_layout": layout, "num_key_value_heads": kv_heads}
        given |= {"scale_value": 0.1, "inner_precise": 0, "softmax_lse_flag": lse}
        if layout == "TND":
            given |= {"actual_seq_lengths": [10, 290], "actual_seq_lengths_kv": [40, 460]}
        yield layout, [*tensors, mask, [128, 128]], given


def kernel_calls(name):
    if name == SPARSE:
        yield from sparse_kernel_calls()
        return
    layouts = ("BSH", "SBH", "BSND", "BNSD") if name == V3 else FIA_LAYOUTS
    for layout, kv_heads, mode, lse in itertools.product(layouts, (2, 4), MODES, (False, True)):
        axes, (mask, sparse_mode) = query_axes(layout), MODES[mode]
        given: dict[str, Any] = {"sparse_mode": sparse_mode}
        if mask is not None:
            given["atten_mask"] = mask
        tensors = [
            torch.randn(shape(axes, 2, n, length, 64)).to(BF16)
            for n, length in ((HEADS, 5), (kv_heads, 7), (kv_heads, 7))
        ]
        if name == V3:
            yield layout, [*tensors, HEADS, layout], given
            continue
        if "T" in axes:
            lists = zip(("actual_seq_lengths", "actual_seq_lengths_kv"), ENDS, strict=True)
            given |= {named(name, argument): ends for argument, ends in lists}
        yield layout, tensors, given | settings(name, layout, kv_heads, lse)


@pytest.mark.parametrize("name", [*ATTENTION, SPARSE])
def test_what_the_emulation_computes_has_the_form_that_torch_npu_promises(name):
    accepted = set()
    mode = FakeTensorMode()
    for layout, args, kwargs in kernel_calls(name):
        found = outcome(KERNELS[name], *args, **kwargs)
        if found == "refused":  # limits of the hardware, which fake kernels do not check
            continue
        accepted.add((layout, kwargs.get("sparse_mode")))
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        with mode:
            wanted = outcome(theirs(name), *fakes[0], **fakes[1])
        assert found == wanted, (layout, kwargs, found, wanted)
    if name == SPARSE:
        assert accepted == {("BNSD", None), ("TND", None)}
        return
    modes = {layout: {n for other, n in accepted if other == layout} for layout, _ in accepted}
    assert {"BSH", "BSND", "BNSD"} <= modes.keys() and modes["BNSD"] == {0, 2, 3, 4}
    assert name == V3 or {"TND", "BNSD_BSND", "BSND_BNSD"} <= modes.keys()


@pytest.mark.parametrize("name", [*ATTENTION, SPARSE])
def test_tensors_of_the_device_get_the_same_results(name):
    """What a rewritten graph runs: torch_npu's operator, on the stand-in."""
    torch.manual_seed(0)
    _, args, kwargs = next(call for call in kernel_calls(name) if call[0] == "BNSD")
    moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("npu"), (args, kwargs))
    found = theirs(name)(*moved[0], **moved[1])
    for x, y in zip(found[:3], KERNELS[name](*args, **kwargs)[:3], strict=True):
        assert x.device.type == "npu"
        torch.testing.assert_close(x.cpu(), y)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_parts_on_the_device_are_merged_as_promised(dtype):
    args = [torch.randn(6) for _ in range(3)], [torch.randn(6, 16).to(dtype) for _ in range(3)], 1
    found = theirs(UPDATE)(*torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("npu"), args))
    expected = KERNELS[UPDATE](*args)
    with FakeTensorMode() as mode:
        promised = theirs(UPDATE)(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
    for x, y, fake in zip(found, expected, promised, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (fake.shape, fake.stride(), fake.dtype)
        assert x.device.type == "npu" and torch.equal(x.cpu(), y)


@pytest.mark.parametrize("places", [[[0, 1], [2, 3]], [[0], [2]]], ids=["rows", "blocks"])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_rows_are_scattered_as_promised(places, dtype):
    places = torch.tensor(places)
    args = torch.randn(3, 4, 2, 8).to(dtype), places, torch.randn(2, *(4, 2, 8)[places.size(1) - 1 :]).to(dtype)
    before = args[0].clone()
    found = theirs(SCATTER)(*(x.to("npu") for x in args))
    expected = KERNELS[SCATTER](*args)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in args]
        promised, ours = theirs(SCATTER)(*fakes), FAKES[SCATTER](*fakes)
    forms = [(x.shape, x.stride(), x.dtype) for x in (found, expected, promised, ours)]
    assert len(set(forms)) == 1 and found.device.type == "npu"
    assert torch.equal(found.cpu(), expected) and torch.equal(args[0], before) and not torch.equal(expected, before)
