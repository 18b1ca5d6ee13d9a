"""Which Ascend call implements ops.attention, and that the emulated op agrees with the formula in float64."""

import pytest
import torch
from compiled_report import compile_for, only_site
from fused_calls import recorded
from packed_cases import formula, packed, paged

import sgl_npu
from sgl_npu import ops

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FIA = "npu.npu_fused_infer_attention_score"
TOLERANCES = {BF16: 2e-2, FP16: 4e-3, FP32: 2e-5}
BATCHES = {
    "decode": [(1, 7), (1, 130), (1, 1)],
    "drafts of 2": [(2, 9), (2, 140)],
    "drafts of 16": [(16, 40), (16, 16), (16, 200)],
    "prefill": [(5, 5), (130, 130)],
    "mixture": [(1, 20), (7, 7), (3, 150), (1, 1)],
}
MASKS = {
    "everything": ({}, (0, None, None)),
    "causal": ({"causal": True}, (3, None, None)),
    "window": ({"window_size": (5, 0)}, (4, 5, 0)),
    "window and causal": ({"window_size": (5, -1), "causal": True}, (4, 5, 0)),
    "window to both sides": ({"window_size": (4, 2)}, (4, 4, 2)),
    "left side alone": ({"window_size": (4, -1)}, (4, 4, None)),
    "right side alone": ({"window_size": (-1, 2)}, (4, None, 2)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    return recorded(monkeypatch)


def lowered(lengths, form="paged", block=128, dtype=BF16, lse=False, dynamic=False, compiled=None, **settings):
    """Compile one call for an NPU, hold it against float64, and return its site and the text of its graph."""
    sizes = {name: settings.pop(name) for name in ("heads", "kv_heads", "dim", "value_dim") if name in settings}
    query, key, value, ends, kv_lengths = packed(lengths, dtype=dtype, **sizes)
    given, table = (key, value), None
    if form == "paged":
        *given, table, kv_lengths = paged(key, value, kv_lengths, block)

    def run(query, key, value, table, ends, kv_lengths):
        lists = {"actual_seq_lengths": ends, "actual_seq_lengths_kv": kv_lengths, "block_table": table}
        return ops.attention(query, key, value, **lists, **settings, return_lse=lse)

    run = compiled or compile_for(run, "npu", "eager", dynamic)
    with torch.no_grad():
        found = run(query, *given, table, ends, kv_lengths)
    expected = formula(query, key, value, lengths, **settings)
    for x, y in zip(found if lse else (found,), expected, strict=False):
        torch.testing.assert_close(x.double(), y, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    report = sgl_npu.reports()[-1]
    return only_site([report]), report.graph


# ---------------------------------------------------------------- masks and lengths


@pytest.mark.parametrize("form", ["packed", "paged"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_mask_becomes_a_sparse_mode_and_lengths_go_to_the_op_as_they_are(batch, mask, form, calls):
    (settings, mode), lengths = MASKS[mask], BATCHES[batch]
    site, _ = lowered(lengths, form, **settings)
    assert (site.kernel, site.op, site.fused, site.refusals) == ("ascend_packed", FIA, True, [])
    ((call, tensors),) = calls
    sides = [None if side == 2147483647 else side for side in (call.pre_tokens, call.next_tokens)]
    assert (call.sparse_mode, *sides) == mode
    assert (tensors.atten_mask is None) == (mode[0] == 0)
    ends = torch.tensor(lengths).cumsum(0)
    keys = ends[:, 1].tolist() if form == "packed" else [keys for _, keys in lengths]
    assert (call.layout, list(call.actual_seq_lengths), list(call.actual_seq_lengths_kv)) == (
        "TND",
        ends[:, 0].tolist(),
        keys,
    )
    assert call.block_size == (128 if form == "paged" else 0) and call.paged == (form == "paged")


def test_each_draft_token_is_counted_once(calls):
    """A cache of 130 and of 6 tokens gets 4 drafts each: 134 and 10 keys, and no draft sees a later one."""
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    caches = [torch.randn(4, 128, 2, 64, dtype=BF16) for _ in range(2)]
    past = [130, 6]
    query, key, value = (torch.randn(8, heads, 64, dtype=BF16) for heads in (4, 2, 2))
    slots = [table[b, p // 128].item() * 128 + p % 128 for b in (0, 1) for p in range(past[b], past[b] + 4)]

    def step(query, key, value, key_cache, value_cache, slots, table, lengths):
        ops.update_kv_cache(key_cache, value_cache, key, value, slots)
        lists = {"actual_seq_lengths": [4, 8], "actual_seq_lengths_kv": lengths, "block_table": table}
        return ops.attention(query, key_cache, value_cache, **lists, causal=True)

    compiled = compile_for(step)
    with torch.no_grad():
        out = compiled(query, key, value, *caches, torch.tensor(slots), table, [134, 10])
    sequences = [[c[table[b].long()].flatten(0, 1)[: past[b] + 4] for c in caches] for b in (0, 1)]
    assert all(torch.equal(sequences[b][0][past[b] :], key[4 * b : 4 * b + 4]) for b in (0, 1))
    keys, values = (torch.cat([x[i] for x in sequences]) for i in (0, 1))
    expected, _ = formula(query, keys, values, [(4, 134), (4, 10)], causal=True)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    ((call, _),) = calls
    assert (call.sparse_mode, list(call.actual_seq_lengths), list(call.actual_seq_lengths_kv)) == (3, [4, 8], [134, 10])


@pytest.mark.parametrize("form", ["packed", "paged"])
def test_two_graphs_serve_every_step(form):
    def run(query, key, value, table, ends, kv_lengths):
        lists = {"actual_seq_lengths": ends, "actual_seq_lengths_kv": kv_lengths, "block_table": table}
        return ops.attention(query, key, value, **lists, causal=True)

    compiled, before = compile_for(run), len(sgl_npu.reports())
    for lengths in ([(3, 140), (5, 150)], [(4, 141), (7, 170)], [(9, 130), (2, 199)], [(1, 150), (1, 151)]):
        _, graph = lowered(lengths, form, compiled=compiled, causal=True)
    assert len(sgl_npu.reports()) - before == 2
    line = next(line for line in graph.splitlines() if f" = {FIA}" in line)
    assert "actual_seq_lengths=[input" in line and "actual_seq_lengths_kv=[input" in line
    assert "sym_size" not in graph and "aten.index" not in graph, "nothing is computed from lengths, no page is copied"


@pytest.mark.parametrize("form", ["packed", "paged"])
def test_the_lse_is_asked_for_where_it_is_used(form, calls):
    lowered(BATCHES["mixture"], form, lse=True, causal=True)
    lowered(BATCHES["mixture"], form, lse=False, causal=True)
    assert [call.softmax_lse_flag for call, _ in calls] == [True, False]


# ---------------------------------------------------------------- other rows


def test_sinks_go_to_version_2(calls):
    site, _ = lowered(BATCHES["mixture"], causal=True, sinks=torch.randn(4, dtype=BF16))
    assert (site.kernel, site.op) == ("ascend_packed_sink", f"{FIA}_v2")
    assert site.refusals == [("ascend_packed", "sinks: version 1 of the kernel has none")]
    ((call, _),) = calls
    assert (call.version, call.learnable_sink, call.sparse_mode) == (2, (4,), 3)


def test_head_sizes_of_vision_models_are_padded(calls):
    site, _ = lowered([(16, 16), (24, 24)], "packed", dim=80, kv_heads=4, lse=True)
    assert (site.kernel, site.fused) == ("ascend_packed_padded", True)
    (clause,) = (clause for name, clause in site.refusals if name == "ascend_packed")
    assert clause.startswith("(D, Dv) = (80, 80) in layout TND; the kernel takes")
    assert calls[0][0].query == (40, 4, 128)


BATCHED = [
    ("decode", {"causal": True}, 16, 0),
    ("decode", {}, 128, 0),
    ("drafts of 2", {"causal": True}, 128, 3),
    ("drafts of 16", {"window_size": (5, 0)}, 256, 4),
    ("drafts of 16", {}, 128, 0),
]


@pytest.mark.parametrize("batch, settings, block, mode", BATCHED)
@pytest.mark.parametrize("dtype, dim", [(FP16, 64), (BF16, 96)])
def test_as_many_queries_each_go_as_a_batch_where_the_packed_layout_refuses(
    batch, settings, block, mode, dtype, dim, calls
):
    site, _ = lowered(BATCHES[batch], block=block, dtype=dtype, dim=dim, lse=True, **settings)
    assert (site.kernel, site.fused) == ("ascend_paged_batched", True), site.refusals
    ((call, _),) = calls
    assert (call.layout, call.sparse_mode, call.actual_seq_lengths) == ("BSND", mode, None)
    assert list(call.actual_seq_lengths_kv) == [keys for _, keys in BATCHES[batch]]


REFUSED = [
    ("mixture", {"dtype": FP16, "causal": True}, "query is float16 in layout TND; the tiling takes bfloat16 only"),
    ("mixture", {"dtype": FP32}, "query is float32; the kernel takes float16 and bfloat16"),
    ("mixture", {"softcap": 20.0}, "softcap = 20.0: the kernel has no softcap"),
    ("mixture", {"block": 24}, "block_size = 24 is not a multiple of 16 in 16..1024"),
    ("mixture", {"dim": 80}, "(D, Dv) = (80, 80) in layout TND; the kernel takes (64, 64), (128, 128), "),
    ("decode", {"dtype": FP16, "window_size": (5, 0)}, "query is float16 in layout TND"),
    ("drafts of 2", {"dtype": FP16, "causal": True, "block": 16}, "query is float16 in layout TND"),
    ("mixture", {"heads": 65, "kv_heads": 1}, "N/Nk = 65 exceeds 64"),
]


@pytest.mark.parametrize("batch, settings, clause", REFUSED, ids=[clause for *_, clause in REFUSED])
def test_what_no_kernel_takes_is_decomposed_and_says_why(batch, settings, clause, calls):
    site, graph = lowered(BATCHES[batch], **settings)
    assert (site.kernel, site.op, site.fused) == ("packed_reference", "aten (decomposed)", False)
    assert dict(site.refusals)["ascend_packed"].startswith(clause)
    assert not calls and "packed_attention" not in graph


@pytest.mark.parametrize(
    "lengths, settings, clause",
    [
        ([(2, 0), (1, 5)], {}, "a sequence has 2 queries and no key; what the kernel gives for it is not documented"),
        ([(4, 3), (1, 5)], {"causal": True}, "4 query rows but 3 keys: its first rows attend to nothing"),
        ([(4, 3), (1, 5)], {"window_size": (2, 0)}, "4 query rows but 3 keys: its first rows attend to nothing"),
    ],
)
def test_rows_that_attend_to_nothing_do_not_reach_the_kernel(lengths, settings, clause):
    site, _ = lowered(lengths, lse=True, **settings)
    assert (site.fused, site.refusals[0]) == (False, ("ascend_packed", clause))


def test_a_cache_with_strides_is_not_copied():
    query, key, value, ends, kv_ends = packed([(1, 20), (1, 9)])
    *caches, table, counts = paged(key, value, kv_ends, 16)
    strided = [torch.stack([x, x], 3)[:, :, :, 0] for x in caches]
    lists = {"actual_seq_lengths": ends, "actual_seq_lengths_kv": counts, "block_table": table}
    compiled = compile_for(lambda q, k, v: ops.attention(q, k, v, **lists))
    with torch.no_grad():
        torch.testing.assert_close(compiled(query, *strided), ops.attention(query, *caches, **lists))
    clause = only_site(sgl_npu.reports()[-1:]).refusals[0][1]
    assert clause.endswith("making it contiguous would copy it at every call")
