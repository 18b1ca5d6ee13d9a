"""npu_block_sparse_attention of torch_npu: what it computes, what it refuses, and what torch sees of it."""

import re
from dataclasses import replace

import pytest
import torch
from attention_formula import arrange, assert_near, formula, random_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sgl_npu.runtime.npu.npu_block_sparse_rules import NPU_BLOCK_SPARSE_RULES, NpuBlockSparseCall
from sgl_npu.runtime.npu.rule import broken_rules

OP = torch.ops.npu.npu_block_sparse_attention
BF16, FP16 = torch.bfloat16, torch.float16
SCALE = 0.2


def random_mask(batch, heads, rows, keys, block_shape=(128, 128)):
    """About half of the blocks, at least one in each row."""
    counts = [-(-length // block) for length, block in zip((rows, keys), block_shape, strict=True)]
    mask = torch.rand(batch, heads, *counts, generator=torch.Generator().manual_seed(7)) < 0.5
    mask[..., 0] |= ~mask.any(-1)
    return mask.to(torch.int8)


def positions(mask, rows, keys, block_shape=(128, 128)):
    """(B, N, rows, keys) bool, one block at a time."""
    keep = torch.zeros(*mask.shape[:2], rows, keys, dtype=torch.bool)
    for b, n, i, j in mask.nonzero().tolist():
        x, y = block_shape
        keep[b, n, i * x : (i + 1) * x, j * y : (j + 1) * y] = True
    return keep


def settings(layout="BNSD", kv_heads=2, **changes):
    layouts = {"q_input_layout": layout, "kv_input_layout": layout}
    return {**layouts, "num_key_value_heads": kv_heads, "scale_value": SCALE, "inner_precise": 0, **changes}


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("rows", "keys", "dim"), [(256, 256, 64), (300, 500, 128), (77, 130, 64)])
def test_each_sequence_and_head_has_blocks_of_its_own(rows, keys, dim, kv_heads, dtype):
    inputs = random_inputs(2, 4, kv_heads, rows, keys, dim=dim, dtype=dtype)
    mask = random_mask(2, 4, rows, keys)
    out, lse = OP(*inputs, mask, [128, 128], **settings(kv_heads=kv_heads), softmax_lse_flag=1)
    expected = formula(*inputs, keep=positions(mask, rows, keys), scale=SCALE)
    assert_near(out, expected[0])
    assert_near(lse, expected[1])
    assert out.dtype == dtype and lse.dtype == torch.float32


@pytest.mark.parametrize("block_shape", [(8, 128), (100, 256), (512, 128)])
def test_blocks_may_have_any_number_of_rows(block_shape):
    inputs = random_inputs(2, 4, 2, 300, 500, dim=64)
    mask = random_mask(2, 4, 300, 500, block_shape)
    out, _ = OP(*inputs, mask, list(block_shape), **settings())
    assert_near(out, formula(*inputs, keep=positions(mask, 300, 500, block_shape), scale=SCALE)[0])


def test_packed_sequences_have_lengths_that_are_not_cumulative():
    rows, keys = [200, 70], [130, 300]
    apart = [random_inputs(1, 4, 2, r, k, dim=64, seed=n) for n, (r, k) in enumerate(zip(rows, keys, strict=True))]
    q, k, v = (torch.cat([arrange(x, "TND") for x in xs]) for xs in zip(*apart, strict=True))
    mask = random_mask(2, 4, max(rows), max(keys))
    lists = {"actual_seq_lengths": rows, "actual_seq_lengths_kv": keys}
    out, lse = OP(q, k, v, mask, [128, 128], **settings("TND"), **lists, softmax_lse_flag=1)
    for n, inputs in enumerate(apart):
        keep = positions(mask[n : n + 1], max(rows), max(keys))[..., : rows[n], : keys[n]]
        expected = formula(*inputs, keep=keep, scale=SCALE)
        here = slice(sum(rows[:n]), sum(rows[: n + 1]))
        assert_near(out[here], arrange(expected[0], "TND"))
        assert_near(lse[here], arrange(expected[1], "TND"))


def test_lengths_shorten_sequences_of_a_padded_batch():
    inputs = random_inputs(2, 4, 2, 300, 300, dim=64)
    mask = random_mask(2, 4, 300, 300)
    lists = {"actual_seq_lengths": [300, 150], "actual_seq_lengths_kv": [300, 140]}
    out, _ = OP(*inputs, mask, [128, 128], **settings(), **lists)
    q, k, v = (x[1:] for x in inputs)
    short = formula(q[:, :, :150], k[:, :, :140], v[:, :, :140], positions(mask[1:], 300, 300)[..., :150, :140], SCALE)
    assert_near(out[1:, :, :150], short[0])
    assert (out[1, :, 150:] == 0).all()


def test_a_row_without_blocks_gives_zeros():
    inputs = random_inputs(1, 4, 2, 256, 256, dim=64)
    mask = random_mask(1, 4, 256, 256)
    mask[0, 1, 0] = 0
    out, lse = OP(*inputs, mask, [128, 128], **settings(), softmax_lse_flag=1)
    assert (out[0, 1, :128] == 0).all() and (lse[0, 1, :128] == -torch.inf).all()


def test_the_scale_is_what_the_call_says_also_where_it_says_nothing():
    """The default of 0 makes every score 0."""
    inputs = random_inputs(1, 4, 2, 128, 128, dim=64)
    mask = torch.ones(1, 4, 1, 1, dtype=torch.int8)
    given = {name: value for name, value in settings().items() if name != "scale_value"}
    out, _ = OP(*inputs, mask, [128, 128], **given)
    assert_near(out, formula(*inputs, scale=0.0)[0])


# ---------------------------------------------------------------- limits


def call(layout="BNSD", rows=300, keys=500, dim=64, **changes):
    query, key = (2, 4, rows, dim), (2, 2, keys, dim)
    if layout == "TND":
        query, key = (rows, 4, dim), (keys, 2, dim)
        lists = {"actual_seq_lengths": [rows // 2] * 2, "actual_seq_lengths_kv": [keys // 2] * 2}
        changes = {**lists, **changes}
        rows, keys = rows // 2, keys // 2
    given = NpuBlockSparseCall(
        query=query,
        key=key,
        value=key,
        dtypes=(BF16,) * 3,
        mask=(2, 4, -(-rows // 128), -(-keys // 128)),
        mask_dtype=torch.int8,
        block_shape=[128, 128],
        q_input_layout=layout,
        kv_input_layout=layout,
        num_key_value_heads=2,
        inner_precise=0,
    )
    return replace(given, **changes)


OBEYED = {
    "padded": call(),
    "packed": call("TND"),
    "wide heads": call(dim=128),
    "lengths": call(actual_seq_lengths=[300, 0], actual_seq_lengths_kv=[1, 500]),
    "float16": call(dtypes=(FP16,) * 3, inner_precise=1),
    "more block sizes": call(block_shape=[128, 128, 1]),
    "lse": call(softmax_lse_flag=1),
    "no flag": call(softmax_lse_flag=None),
}
BROKEN = [
    ("layouts", call(q_input_layout="BSND"), "q_input_layout = BSND; the kernel takes TND and BNSD"),
    ("layouts", call(kv_input_layout="TND"), "the query is BNSD, key and value TND; they must have one layout"),
    ("ranks", call(value=(2, 2, 500)), "value has 3 axes; layout BNSD has 4"),
    ("not_empty", call(query=(2, 4, 0, 64)), r"query is \(2, 4, 0, 64\); no size may be 0"),
    ("block_shape", call(block_shape=[128]), r"block_shape = \[128\]; it must be two sizes of 1 and more"),
    ("block_shape", call(block_shape=[0, 128]), r"block_shape = \[0, 128\]; it must be two sizes of 1 and more"),
    ("block_shape", call(block_shape=[128, 64]), r"= \[128, 64\]; blocks of keys must be a multiple of 128"),
    ("dtypes", call(dtypes=(BF16, FP16, BF16)), "are bfloat16, float16, bfloat16; all must be float16 or all bfloat16"),
    ("dtypes", call(dtypes=(torch.float32,) * 3), "float32, float32, float32; all must be float16 or all bfloat16"),
    ("precision", call(inner_precise=1), "inner_precise = 1; bfloat16 takes 0"),
    ("precision", call(inner_precise=4), r"inner_precise = 4 is not one of \(0, 1\)"),
    ("dims", call(dim=96), "D = 96 is not one of 64, 128"),
    ("heads", call(num_key_value_heads=1), "key has 2 heads but the call says 1"),
    ("heads", call(query=(2, 3, 300, 64), mask=(2, 3, 3, 4)), "N = 3 is not a multiple of Nk = 2"),
    ("shapes", call(value=(2, 2, 500, 128)), r"value is \(2, 2, 500, 128\) and key is .*; they must have one shape"),
    ("shapes", call(key=(3, 2, 500, 64), value=(3, 2, 500, 64)), "B is 2 in query and 3 in key; they must agree"),
    ("shapes", call(key=(2, 2, 500, 128), value=(2, 2, 500, 128)), "D is 64 in query and 128 in key"),
    ("lengths", call(actual_seq_lengths=[300, 300]), "actual_seq_lengths alone is given; both lists or none"),
    ("lengths", call(actual_seq_lengths_kv=[5, 5]), "actual_seq_lengths_kv alone is given; both lists or none"),
    (
        "lengths",
        call("TND", actual_seq_lengths=None, actual_seq_lengths_kv=None),
        "actual_seq_lengths is not given; layout TND needs both lists",
    ),
    (
        "lengths",
        call(actual_seq_lengths=[300], actual_seq_lengths_kv=[500]),
        "actual_seq_lengths has 1 entries, but B = 2",
    ),
    (
        "lengths",
        call(actual_seq_lengths=[300, 300], actual_seq_lengths_kv=[500, 501]),
        r"actual_seq_lengths_kv = \[500, 501\]; no length may exceed S = 500",
    ),
    (
        "lengths",
        call(actual_seq_lengths=[300, -1], actual_seq_lengths_kv=[500, 500]),
        r"actual_seq_lengths = \[300, -1\]; no length may be below 0",
    ),
    ("lengths", call("TND", actual_seq_lengths=[150, 300]), r"= \[150, 300\] adds up to 450, not to T = 300"),
    ("lengths", call("TND", actual_seq_lengths=[300]), "has 1 entries and actual_seq_lengths_kv 2; one per sequence"),
    ("mask", call(mask_dtype=torch.bool), "block_sparse_mask is bool; it must be int8"),
    ("mask", call(mask=(1, 4, 3, 4)), r"is \(1, 4, 3, 4\); it must be \(B, N, .*\) = \(2, 4, 3, 4\)"),
    ("mask", call("TND", mask=(2, 4, 3, 4)), r"is \(2, 4, 3, 4\); it must be \(B, N, .*\) = \(2, 4, 2, 2\)"),
    ("lse_flag", call(softmax_lse_flag=2), r"softmax_lse_flag = 2 is not one of \(0, 1\)"),
]


@pytest.mark.parametrize("name", OBEYED)
def test_a_call_that_obeys_breaks_no_rule(name):
    assert broken_rules(OBEYED[name], NPU_BLOCK_SPARSE_RULES) == []


@pytest.mark.parametrize(("name", "given", "sentence"), BROKEN)
def test_a_broken_rule_says_what_it_saw(name, given, sentence):
    ((rule, found),) = broken_rules(given, NPU_BLOCK_SPARSE_RULES)
    assert rule.name == name and re.search(sentence, found), found


def test_every_rule_is_broken_here_and_has_a_source():
    assert {rule.name for rule in NPU_BLOCK_SPARSE_RULES} == {name for name, _, _ in BROKEN}
    assert all(rule.source for rule in NPU_BLOCK_SPARSE_RULES)


def test_the_kernel_lists_everything_that_is_wrong():
    inputs = random_inputs(1, 3, 2, 128, 128, dim=32)
    message = "npu_block_sparse_attention: inner_precise = 1; bfloat16 takes 0; D = 32 .*; N = 3 .*; block_sparse_mask"
    with pytest.raises(RuntimeError, match=message):
        OP(*inputs, torch.ones(1, 3, 1, 1), [128, 128], **settings(inner_precise=1))


def test_symbolic_lengths_add_no_guard():
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment) as mode:
        x = mode.from_tensor(torch.empty(2, 2, 300, 64, dtype=BF16), static_shapes=False)
        blocks = (x.size(2) + 127) // 128
        mask = x.new_empty((x.size(0), x.size(1), blocks, blocks), dtype=torch.int8)
        given = NpuBlockSparseCall.of(
            x, x, x, mask, [128, 128], q_input_layout="BNSD", kv_input_layout="BNSD", num_key_value_heads=x.size(1),
            inner_precise=0,
        )  # fmt: skip
        assert broken_rules(given, NPU_BLOCK_SPARSE_RULES) == []
    assert not any("s2" in str(guard.expr) or str(x.size(2)) in str(guard.expr) for guard in environment.guards)


# ---------------------------------------------------------------- what torch sees


def valid(layout, lse=0):
    rows = {"actual_seq_lengths": [300, 300], "actual_seq_lengths_kv": [500, 500]} if layout == "TND" else {}
    inputs = [arrange(x, layout) for x in random_inputs(2, 4, 2, 300, 500, dim=64)]
    return (*inputs, random_mask(2, 4, 300, 500), [128, 128]), settings(layout, softmax_lse_flag=lse, **rows)


@pytest.mark.parametrize("lse", [0, 1])
@pytest.mark.parametrize("layout", ["BNSD", "TND"])
def test_opcheck(layout, lse):
    args, kwargs = valid(layout, lse)
    torch.library.opcheck(OP.default, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inner_precise": 1}, "inner_precise = 1; bfloat16 takes 0"),
        ({"block_shape": [128, 64]}, "blocks of keys must be a multiple of 128"),
        ({"query": torch.empty(5, 64, device="meta")}, "query has 2 axes"),
    ],
)
def test_the_fake_rejects_what_the_meta_kernel_rejects(changes, sentence):
    args, kwargs = valid("BNSD")
    names = ("query", "key", "value", "block_sparse_mask", "block_shape")
    tensors = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in args)
    with pytest.raises(RuntimeError, match=sentence):
        OP(**dict(zip(names, tensors, strict=True)) | kwargs | changes)


def test_one_graph_serves_every_length():
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def run(q, k, v, mask):
        return OP(q, k, v, mask, [128, 128], **settings(scale_value=0.125))[0] + 1

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for rows in (300, 421, 700):
        args = (*random_inputs(2, 4, 2, rows, rows, dim=64), random_mask(2, 4, rows, rows))
        assert torch.equal(compiled(*args), run(*args))
    assert len(frames) == 1
    torch._dynamo.reset()


def test_the_backward_raises():
    args, kwargs = valid("BNSD")
    with pytest.raises(RuntimeError, match="backward is not covered by the emulation"):
        OP(args[0].requires_grad_(), *args[1:], **kwargs)[0].sum().backward()
