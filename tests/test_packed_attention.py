"""ops.attention against its formula, under opcheck, with symbolic sizes, and what it refuses."""

import numpy
import pytest
import torch
from packed_cases import formula, packed, paged

import sgl_npu
from sgl_npu import ops
from sgl_npu.runtime.packed_attention import packed_attention

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BATCHES = {
    "prefill": [(5, 5), (9, 9), (1, 1)],
    "decode": [(1, 7), (1, 130), (1, 1)],
    "drafts": [(4, 9), (4, 4), (4, 33)],
    "longest drafts": [(16, 40), (16, 16)],
    "mixture": [(1, 20), (7, 7), (3, 12), (1, 1)],
    "an empty sequence": [(2, 5), (0, 3), (1, 4)],
    "rows without a key": [(2, 0), (3, 2), (1, 4)],
}
SETTINGS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 0)},
    "window to both sides": {"window_size": (2, 1)},
    "softcap, sinks and scale": {"causal": True, "softcap": 3.0, "sinks": True, "scale": 0.3},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def arguments(lengths, form, block=16, **sizes):
    query, key, value, ends, kv_ends = packed(lengths, **sizes)
    table = None
    given = key, value
    if form == "paged":
        *given, table, kv_ends = paged(key, value, kv_ends, block)
    lists = {"actual_seq_lengths": ends, "actual_seq_lengths_kv": kv_ends, "block_table": table}
    return (query, *given), lists, (query, key, value)


def assert_near(found, expected):
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", ["packed", "paged"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_sequence_gives_the_formula(batch, settings, form):
    lengths, settings = BATCHES[batch], dict(SETTINGS[settings])
    tensors, lists, plain = arguments(lengths, form, dim=8, dtype=torch.float64)
    if settings.get("sinks"):
        settings["sinks"] = torch.randn(4, dtype=torch.float64)
    out, lse = ops.attention(*tensors, **lists, **settings, return_lse=True)
    for found, expected in zip((out, lse), formula(*plain, lengths, **settings), strict=True):
        assert_near(found, expected)
    assert torch.equal(out, ops.attention(*tensors, **lists, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, value_dim", [(4, 4, 8), (4, 1, 8), (6, 2, 24)])
def test_dtypes_groups_and_value_sizes(dtype, heads, kv_heads, value_dim):
    sizes = {"heads": heads, "kv_heads": kv_heads, "value_dim": value_dim}
    tensors, lists, plain = arguments(BATCHES["mixture"], "paged", dim=8, dtype=dtype, **sizes)
    out, lse = ops.attention(*tensors, **lists, causal=True, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.shape == (12, heads, value_dim)
    assert_near(out, formula(*plain, BATCHES["mixture"], causal=True)[0])


def test_scores_are_summed_in_float32():
    """In bfloat16 the sum of 4096 equal weights would stop growing at 256."""
    key = torch.zeros(4096, 1, 8, dtype=torch.bfloat16)
    value = torch.ones(4096, 1, 8, dtype=torch.bfloat16)
    out = ops.attention(key[:1], key, value, actual_seq_lengths=[1], actual_seq_lengths_kv=[4096])
    assert torch.equal(out, torch.ones(1, 1, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("form", ["packed", "paged"])
@pytest.mark.parametrize("options", [{}, {"after": 0}, {"before": 2, "after": 0, "softcap": 2.0, "scale": 0.5}])
def test_opcheck(form, options):
    tensors, lists, _ = arguments(BATCHES["mixture"], form, dim=8, value_dim=16)
    given = (*tensors, lists["actual_seq_lengths"], lists["actual_seq_lengths_kv"], lists["block_table"])
    torch.library.opcheck(packed_attention, given, options)


def test_strided_tensors_give_the_same():
    tensors, lists, _ = arguments(BATCHES["mixture"], "packed", dim=8)
    strided = [torch.stack([x, x], -1)[..., 0] for x in tensors]
    assert not strided[0].is_contiguous()
    assert torch.equal(ops.attention(*strided, **lists), ops.attention(*tensors, **lists))


def test_gradients_are_refused_and_not_cut_off():
    tensors, lists, _ = arguments([(2, 2)], "packed", dim=8, dtype=torch.float32)
    out = ops.attention(tensors[0].requires_grad_(), *tensors[1:], **lists)
    with pytest.raises(RuntimeError, match="it is for inference and has no backward"):
        out.sum().backward()


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("form", ["packed", "paged"])
def test_compiled_on_a_cpu_two_graphs_serve_every_batch_of_as_many_sequences(form, inner):
    def run(query, key, value, table, ends, kv_lengths):
        lists = {"actual_seq_lengths": ends, "actual_seq_lengths_kv": kv_lengths, "block_table": table}
        return ops.attention(query + 1, key, value, **lists, causal=True) * 2

    torch._dynamo.reset()
    before = len(sgl_npu.reports())
    compiled = torch.compile(run, backend="sgl_npu", options={"platform": "cpu", "inner": inner, "strict": True})
    for lengths in ([(5, 25), (9, 29)], [(2, 22), (10, 30)], [(4, 31), (3, 24)], [(1, 17), (1, 18)]):
        tensors, lists, _ = arguments(lengths, form, dim=8)
        given = (*tensors, lists["block_table"], lists["actual_seq_lengths"], lists["actual_seq_lengths_kv"])
        with torch.no_grad():
            torch.testing.assert_close(compiled(*given), run(*given))
    reports = sgl_npu.reports()[before:]
    assert len(reports) == 2, "lengths are numbers in the first graph and inputs in the second"
    (site,) = reports[-1].sites
    assert (site.op, site.fused, site.mask) == ("sgl_npu.packed_attention", False, "causal (bottom-right)")
    assert site.source.startswith("test_packed_attention.py:")


# ---------------------------------------------------------------- what does not fit

Q, K = torch.zeros(5, 4, 8), torch.zeros(9, 2, 8)
CACHE, TABLE = torch.zeros(6, 16, 2, 8), torch.zeros(2, 2, dtype=torch.int32)
PACKED = {"query": Q, "key": K, "value": K, "actual_seq_lengths": [2, 5], "actual_seq_lengths_kv": [4, 9]}
PAGED = PACKED | {"key": CACHE, "value": CACHE, "block_table": TABLE}

WRONG = [
    (
        PACKED | {"actual_seq_lengths": [2, 4]},
        "actual_seq_lengths ends at 4, not at the 5 query tokens; it lists where",
    ),
    (PACKED | {"actual_seq_lengths_kv": [4, 5]}, "actual_seq_lengths_kv ends at 5, not at the 9 key tokens"),
    (PACKED | {"actual_seq_lengths": [6, 5]}, "actual_seq_lengths goes down from 6 to 5"),
    (PACKED | {"actual_seq_lengths": [0, 2, 5]}, "must have an entry per sequence, got 3 and 2"),
    (PACKED | {"actual_seq_lengths": [], "actual_seq_lengths_kv": []}, "an entry per sequence, got 0 and 0"),
    (PAGED | {"actual_seq_lengths_kv": [4, 33]}, "has 33; beside a block_table it lists the number of keys"),
    (PAGED | {"actual_seq_lengths_kv": [-1, 3]}, "has -1; beside a block_table"),
    (PAGED | {"block_table": TABLE.long()}, "block_table must be int32 (sequences, blocks), got torch.int64 (2, 2)"),
    (PAGED | {"block_table": TABLE[0]}, "block_table must be int32 (sequences, blocks), got torch.int32 (2,)"),
    (PAGED | {"block_table": TABLE[:1]}, "block_table has 1 rows for 2 sequences"),
    (PAGED | {"block_size": 32}, "block_size = 32, but the cache has blocks of 16 rows: (6, 16, 2, 8)"),
    (PACKED | {"block_size": 32}, "block_size = 32 without a block_table; pass both, or neither"),
    (PAGED | {"key": K, "value": K}, "key and value (blocks, block_size, Hkv, D) beside a block_table; got query"),
    (PACKED | {"query": Q[0]}, "query must be (T, Hq, D), key and value (tokens, Hkv, D); got query (4, 8)"),
    (PACKED | {"query": Q[..., :4]}, "query and key head sizes differ"),
    (PACKED | {"query": Q[:, :3]}, "query heads must be a multiple of key heads: query (5, 3, 8)"),
    (PACKED | {"value": K[:8]}, "key and value differ"),
    (PACKED | {"query": Q.half()}, "must share a floating dtype, got torch.float16, torch.float32"),
    (PACKED | {"sinks": torch.zeros(3)}, "sinks must be (4,), one per query head, got (3,)"),
    (PACKED | {"softcap": -1.0}, "softcap must be 0 (none) or positive, got -1.0"),
    (PACKED | {"window_size": (-2, 0)}, "window_size = (-2, 0): a side is -1 (no limit) or at least 0"),
    (PACKED | {"window_size": 3}, "window_size = 3: give (left, right), -1 for no limit"),
    (
        PACKED | {"actual_seq_lengths": torch.tensor([2, 5])},
        "actual_seq_lengths is no list of Python ints but a Tensor: the kernel takes its lengths from the host; call",
    ),
    (
        PACKED | {"actual_seq_lengths_kv": [numpy.int64(4), 9]},
        "actual_seq_lengths_kv is no list of Python ints but a list of int, int64: the kernel",
    ),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[message for _, message in WRONG])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
def test_what_does_not_fit_is_one_clear_error(arguments, message, traced):
    torch._dynamo.reset()
    run = torch.compile(ops.attention, backend="sgl_npu", options={"inner": "eager"}) if traced else ops.attention
    with pytest.raises(Exception) as error, torch.no_grad():
        run(**arguments)
    assert traced or isinstance(error.value, ValueError)
    assert message in str(error.value)
