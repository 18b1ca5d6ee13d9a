"""Where the sequence is sharded, without any rank: plans and graphs of small functions."""

from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F
from sequence.collective_counts import collective_counts
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_npu.compiler.graph_text import graph_text
from sgl_npu.passes.parallel import ParallelSetting, SchemeError, parallelise
from sgl_npu.passes.shard_dtensor import parallel_dims
from sgl_npu.passes.shard_spec import Sharding, through_view
from sgl_npu.runtime.attention import attention
from sgl_npu.runtime.sequence import Axis, SequenceLayout, SequenceMesh

aten = torch.ops.aten


def setting(ulysses=1, ring=1, schemes=("ulysses",), **options):
    whole = Axis(ulysses * ring, "all")
    return ParallelSetting(
        SequenceMesh(Axis(ring, "blocks"), Axis(ulysses, "ulysses"), whole), (0, 0), schemes, **options
    )


def sharded(function, *inputs, **options):
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    report = parallelise(gm, setting(**(options or {"ulysses": 2})), {}, {})
    return gm, report


def heads(x, weight):
    """(B, S, C) as (B, 4, S, C / 4)."""
    return F.linear(x, weight).unflatten(2, (4, weight.size(0) // 4)).transpose(1, 2)


def block(x, weight):
    return attend(x, weight, 0)


def attend(x, weight, upper):
    q, k, v = (heads(x, weight) for _ in range(3))
    return x + attention(q, k, v, upper=upper)[0].transpose(1, 2).flatten(2)


def targets(gm):
    return [str(node.target) for node in gm.graph.nodes]


def inputs(length=16, channels=8):
    return torch.randn(1, length, channels), torch.randn(channels, channels)


@pytest.mark.parametrize(
    "before, after, dim, expected",
    [
        ((2, 6, 8), (12, 8), 1, (0, 2, 1)),
        ((2, 6, 8), (2, 6, 2, 4), 1, (1, 1, 1)),
        ((2, 6, 8), (2, 48), 1, (1, 1, 8)),
        ((2, 6, 8), (1, 2, 6, 8), 1, (2, 1, 1)),
        ((2, 6, 8), (2, 2, 3, 8), 1, None),
        ((2, 6, 8), (4, 3, 8), 1, None),
    ],
)
def test_a_view_merges_the_sequence_with_its_neighbours_and_never_splits_it(before, after, dim, expected):
    layout = SequenceLayout((6,), 1, 2)
    found = through_view(before, after, Sharding(dim, layout))
    assert (found and (found.dim, found.outer, found.inner)) == expected
    if found is not None:
        assert through_view(after, before, found) == Sharding(dim, layout)


@pytest.mark.parametrize(
    "target, args, given, expected",
    [
        (aten.mm.default, ((6, 8), (8, 4)), (0, None), ([0, None], [0])),
        (aten.add.Tensor, ((2, 6, 8), (6, 8)), (1, None), ([1, 0], [1])),
        (aten.cumsum.default, ((2, 6), 1), (1,), None),
        (aten.sum.dim_IntList, ((2, 6), [1]), (1,), None),
    ],
)
def test_dtensor_says_what_needs_no_communication(target, args, given, expected):
    tensors = [torch.empty(x, device="meta") if isinstance(x, tuple) else x for x in args]
    assert parallel_dims(target, tuple(tensors), {}, given) == expected


def test_the_input_is_sliced_and_the_output_gathered_once():
    gm, report = sharded(block, *inputs())
    assert report.refused == "" and report.gathers == []
    assert targets(gm).count("_c10d_functional.all_gather_into_tensor.default") == 1
    assert targets(gm).count("_c10d_functional.all_to_all_single.default") == 2
    sliced = [node for node in gm.graph.nodes if node.target is aten.index_select.default]
    assert [node.args[0].name for node in sliced] == ["x_1"]
    assert all(
        node.meta["val"].shape[0] != 16 for node in gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    )


@pytest.mark.parametrize(
    "degrees, exchanged",
    [
        ({"ulysses": 2}, {"all_to_all_single": 2}),
        ({"ring": 4, "schemes": ("ring",)}, {"ring_shift": 3}),
        ({"ring": 2, "schemes": ("kv_gather",)}, {"all_gather_into_tensor": 1}),
        ({"ring": 2, "ulysses": 2, "schemes": ("ring",)}, {"all_to_all_single": 2, "ring_shift": 1}),
    ],
    ids=str,
)
def test_every_collective_is_counted_in_the_text_of_a_graph(degrees, exchanged):
    gm, _ = sharded(block, *inputs(), **degrees)
    outputs = {"all_gather_into_tensor": 1 + exchanged.get("all_gather_into_tensor", 0)}
    assert collective_counts(graph_text(gm)) == exchanged | outputs


DEGREE = {"ring": 4, "schemes": ("ulysses", "ring", "kv_gather")}


def grouped(x, weight):
    """Four query heads share one of keys, so that rings and gathers send less than ulysses."""
    query, key, value = (heads(x, weight) for _ in range(3))
    return x + attention(query, key[:, :1], value[:, :1], upper=0)[0].transpose(1, 2).flatten(2)


def cached(x, weight):
    """Keys and values are wanted whole, and so are computed by every rank."""
    query, key, value = (heads(x, weight) for _ in range(3))
    return x + attention(query, key, value, upper=0)[0].transpose(1, 2).flatten(2), key, value


@pytest.mark.parametrize(
    "function, settings, exchanged, in_order",
    [
        (block, {}, {"all_to_all_single": 2, "all_gather_into_tensor": 1}, True),
        (block, {"placement": "zigzag"}, {"ring_shift": 3, "all_gather_into_tensor": 1}, False),
        (grouped, {}, {"ring_shift": 3, "all_gather_into_tensor": 1}, False),
        (cached, {}, {"all_gather_into_tensor": 1}, False),
    ],
)
def test_degree_leaves_causal_rows_in_order_where_ulysses_sends_less(function, settings, exchanged, in_order):
    gm, _ = sharded(function, *inputs(), **DEGREE, **settings)
    assert collective_counts(graph_text(gm)) == exchanged
    cuts = [node for node in gm.graph.nodes if node.target is aten.index_select.default]
    assert ("cat" not in str(cuts[0].args[2])) == in_order  # a rank in zigzag has two runs of rows


def test_an_op_without_a_rule_gets_its_input_whole_and_what_follows_is_sharded_again():
    def function(x, weight):
        return block(block(x, weight).cumsum(1), weight)

    gm, report = sharded(function, *inputs())
    assert [op.split(" ")[0] for op, _, _ in report.gathers] == ["aten.cumsum"]
    assert targets(gm).count("_c10d_functional.all_gather_into_tensor.default") == 2
    assert targets(gm).count("_c10d_functional.all_to_all_single.default") == 4


def test_too_many_gathers_are_refused_with_the_ops():
    def function(x, weight):
        return block(x, weight).cumsum(1)

    gm, report = sharded(function, *inputs(), ulysses=2, max_gather=0.1)
    assert "aten.cumsum" in report.refused and "max_gather = 0.1" in report.refused
    assert not any("c10d" in target for target in targets(gm))


def test_what_needs_the_whole_sequence_before_the_first_attention_is_computed_by_every_rank():
    def function(x, weight):
        return block(x.cumsum(1), weight)

    _, report = sharded(function, *inputs())
    assert report.gathers == []


def test_decoding_one_row_is_left_to_every_rank():
    gm, report = sharded(lambda x, weight: attend(x, weight, None), *inputs(1))
    assert report.refused == "no attention has more than one query row, and a batch"
    assert not any("c10d" in target for target in targets(gm))


def test_cross_attention_to_a_prompt_is_local():
    def function(x, prompt, weight):
        q, k, v = heads(x, weight), heads(prompt, weight), heads(prompt, weight)
        return attend(x, weight, None) + attention(q, k, v)[0].transpose(1, 2).flatten(2)

    x, weight = inputs()
    gm, _ = sharded(function, x, torch.randn(1, 3, 8), weight)
    assert targets(gm).count("_c10d_functional.all_to_all_single.default") == 2
    local = gm.graph.find_nodes(op="call_function", target=attention)[-1]
    assert [node.meta["val"].shape[2] for node in local.args[:3]] == [8, 3, 3]


def test_joined_sequences_are_spread_each_on_its_own():
    def function(image, text, weight):
        q, k, v = (torch.cat([heads(text, weight), heads(image, weight)], 2) for _ in range(3))
        out = attention(q, k, v)[0].transpose(1, 2).flatten(2)
        return image + out[:, 4:], text + out[:, :4]

    x, weight = inputs()
    gm, report = sharded(function, x, torch.randn(1, 4, 8), weight)
    assert report.gathers == []
    # Both outputs in one message.
    assert targets(gm).count("_c10d_functional.all_gather_into_tensor.default") == 1


def test_windows_cut_out_of_the_sequence_are_cut_out_of_all_rows():
    def function(x, weight):
        windows = block(x, weight).view(3, 8, 8)
        return block(windows, weight)

    gm, report = sharded(function, *inputs(24))
    assert [op.split(" ")[0] for op, _, _ in report.gathers] == ["aten.view"]
    assert targets(gm).count("_c10d_functional.all_gather_into_tensor.default") == 2


def test_random_numbers_are_drawn_for_the_whole_sequence():
    def function(x, weight):
        y = block(x, weight)
        return y + torch.rand_like(y)

    _, report = sharded(function, *inputs())
    assert [op.split(" ")[0] for op, _, _ in report.gathers] == ["aten.rand_like"]


def test_more_ranks_than_heads_are_refused_by_name():
    with pytest.raises(SchemeError, match="ulysses = 8 is more than the 4 query heads"):
        sharded(block, *inputs(), ulysses=8)


def test_a_table_of_positions_in_the_model_has_no_meaning_for_inputs_that_are_shards():
    table = torch.randn(64, 8)
    with pytest.raises(SchemeError, match="has no known meaning for the whole sequence"):
        sharded(
            lambda x, weight, table: block(x + table[: x.size(1)], weight), *inputs(), table, ulysses=2, shard="inputs"
        )


def test_positions_are_those_of_the_whole_sequence_for_inputs_that_are_shards():
    def function(x, weight):
        return block(x * torch.arange(x.size(1)).unsqueeze(1), weight)

    gm, _ = sharded(function, *inputs(), ulysses=2, shard="inputs")
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)[:1] or [None]
    ranks = gm.graph.find_nodes(op="placeholder")[-1]
    ancestors, queue = set(), [product]
    while queue:
        queue += [node for node in queue.pop().all_input_nodes if node not in ancestors and not ancestors.add(node)]
    assert ranks in ancestors


class TestGolden(expecttest.TestCase):
    maxDiff = None

    def test_a_ring_starts_its_shift_before_it_attends(self):
        def function(x):
            q = x.unflatten(2, (2, 4)).transpose(1, 2)
            return x + attention(q, q, q)[0].transpose(1, 2).flatten(2)

        gm, _ = sharded(function, torch.randn(1, 16, 8), ring=2, schemes=("ring",))
        self.assertExpectedInline(
            graph_text(gm, {"blocks": "ring", "all": "sequence"}),
            """\
input: f32[1, 16, 8]
input1: i64[2]
arange: i64[8] = aten.arange(8, device=cpu, pin_memory=False)
slice: i64[1] = aten.slice.Tensor(input1, 0, 0, 1)
slice1: i64[1] = aten.slice.Tensor(input1, 0, 1, 2)
mul: i64[1] = aten.mul.Tensor(slice, 1)
add: i64[1] = aten.add.Tensor(mul, slice1)
mul1: i64[1] = aten.mul.Tensor(add, 8)
add1: i64[8] = aten.add.Tensor(mul1, arange)
add2: i64[8] = aten.add.Tensor(add1, 0)
index_select: f32[1, 8, 8] = aten.index_select(input, 1, add2)
view: f32[1, 8, 2, 4] = aten.view(index_select, [1, 8, 2, 4])
transpose: f32[1, 2, 8, 4] = aten.transpose.int(view, 1, 2)
clone: f32[1, 2, 8, 4] = aten.clone(transpose, memory_format=contiguous_format)
unsafe_view: f32[64] = aten._unsafe_view(clone, [64])
cat: f32[128] = aten.cat([unsafe_view, unsafe_view])
split_with_sizes: tuple = aten.split_with_sizes(cat, [64, 64])
getitem: f32[64] = getitem(split_with_sizes, 0)
getitem1: f32[64] = getitem(split_with_sizes, 1)
view1: f32[1, 2, 8, 4] = aten.view(getitem, [1, 2, 8, 4])
view2: f32[1, 2, 8, 4] = aten.view(getitem1, [1, 2, 8, 4])
ring_shift: f32[128] = sgl_npu.ring_shift(cat, 2, ring)
attention: tuple = sgl_npu.attention(transpose, view1, view2)
getitem2: f32[1, 2, 8, 4] = getitem(attention, 0)
getitem3: f32[1, 2, 8] = getitem(attention, 1)
wait_tensor: f32[128] = _c10d_functional.wait_tensor(ring_shift)
split_with_sizes1: tuple = aten.split_with_sizes(wait_tensor, [64, 64])
getitem4: f32[64] = getitem(split_with_sizes1, 0)
getitem5: f32[64] = getitem(split_with_sizes1, 1)
view3: f32[1, 2, 8, 4] = aten.view(getitem4, [1, 2, 8, 4])
view4: f32[1, 2, 8, 4] = aten.view(getitem5, [1, 2, 8, 4])
attention1: tuple = sgl_npu.attention(transpose, view3, view4)
getitem6: f32[1, 2, 8, 4] = getitem(attention1, 0)
getitem7: f32[1, 2, 8] = getitem(attention1, 1)
maximum: f32[1, 2, 8] = aten.maximum(getitem3, getitem7)
eq: b8[1, 2, 8] = aten.eq.Scalar(maximum, -inf)
scalar_tensor: f32[] = aten.scalar_tensor(0, dtype=float32, layout=strided, device=cpu)
where: f32[1, 2, 8] = aten.where.self(eq, scalar_tensor, maximum)
eq1: b8[1, 2, 8] = aten.eq.Tensor(getitem3, where)
sub: f32[1, 2, 8] = aten.sub.Tensor(getitem3, where)
where1: f32[1, 2, 8] = aten.where.self(eq1, scalar_tensor, sub)
exp: f32[1, 2, 8] = aten.exp(where1)
eq2: b8[1, 2, 8] = aten.eq.Tensor(getitem7, where)
sub1: f32[1, 2, 8] = aten.sub.Tensor(getitem7, where)
where2: f32[1, 2, 8] = aten.where.self(eq2, scalar_tensor, sub1)
exp1: f32[1, 2, 8] = aten.exp(where2)
add3: f32[1, 2, 8] = aten.add.Tensor(exp, exp1)
eq3: b8[1, 2, 8] = aten.eq.Scalar(add3, 0)
scalar_tensor1: f32[] = aten.scalar_tensor(1, dtype=float32, layout=strided, device=cpu)
where3: f32[1, 2, 8] = aten.where.self(eq3, scalar_tensor1, add3)
div: f32[1, 2, 8] = aten.div.Tensor(exp, where3)
div1: f32[1, 2, 8] = aten.div.Tensor(exp1, where3)
unsqueeze: f32[1, 2, 8, 1] = aten.unsqueeze(div, -1)
mul2: f32[1, 2, 8, 4] = aten.mul.Tensor(getitem2, unsqueeze)
unsqueeze1: f32[1, 2, 8, 1] = aten.unsqueeze(div1, -1)
mul3: f32[1, 2, 8, 4] = aten.mul.Tensor(getitem6, unsqueeze1)
add4: f32[1, 2, 8, 4] = aten.add.Tensor(mul2, mul3)
transpose1: f32[1, 8, 2, 4] = aten.transpose.int(add4, 1, 2)
view5: f32[1, 8, 8] = aten.view(transpose1, [1, 8, 8])
add5: f32[1, 8, 8] = aten.add.Tensor(index_select, view5)
permute: f32[8, 1, 8] = aten.permute(add5, [1, 0, 2])
all_gather_into_tensor: f32[16, 1, 8] = _c10d_functional.all_gather_into_tensor(permute, 2, sequence)
wait_tensor1: f32[16, 1, 8] = _c10d_functional.wait_tensor(all_gather_into_tensor)
permute1: f32[1, 16, 8] = aten.permute(wait_tensor1, [1, 0, 2])
return permute1""",
        )
