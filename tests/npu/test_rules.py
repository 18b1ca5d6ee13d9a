"""Every rule of the constraint tables, broken once; and the tables asked with symbolic sizes."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sgl_npu.runtime.npu.rules import (
    FIA_RULES,
    FUSION_ATTENTION_RULES,
    FiaCall,
    FusionAttentionCall,
    first_violation,
    violations,
)

BF16 = torch.bfloat16
DTYPES = {"query_dtype": BF16, "key_dtype": BF16, "value_dtype": BF16}
TRIANGLE = (2048, 2048)


def batched(rows=16, keys=32, heads=8, kv_heads=2, dim=64, batch=2, layout="BNSD"):
    kv = (batch, kv_heads, keys, dim)
    return FiaCall(
        layout=layout,
        query=(batch, heads, rows, dim),
        key=kv,
        value=kv,
        num_heads=heads,
        num_key_value_heads=kv_heads,
        **DTYPES,
    )


def hidden(query=512, key=128, value=128):
    shapes = {"query": (2, 16, query), "key": (2, 32, key), "value": (2, 32, value)}
    return FiaCall(layout="BSH", num_heads=8, num_key_value_heads=2, **shapes, **DTYPES)


def packed(dim=128, value_dim=None, rows=(16, 32), keys=(32, 64), heads=4, kv_heads=4, layout="TND"):
    def shape(count, heads, dim):
        return (heads, count, dim) if layout.startswith("NTD") else (count, heads, dim)

    return FiaCall(
        layout=layout,
        query=shape(rows[-1], heads, dim),
        key=shape(keys[-1], kv_heads, dim),
        value=shape(keys[-1], kv_heads, value_dim or dim),
        num_heads=heads,
        num_key_value_heads=kv_heads,
        actual_seq_lengths=rows,
        actual_seq_lengths_kv=keys,
        **DTYPES,
    )


def paged(rows=16, block_size=128, cache=(9, 128, 128), layout="BNSD", heads=8, kv_heads=2):
    return replace(
        batched(rows=rows, heads=heads, kv_heads=kv_heads, layout=layout),
        key=cache,
        value=cache,
        block_table=(2, 3),
        block_size=block_size,
        actual_seq_lengths_kv=[100, 384],
    )


def sink(call, **changes):
    return replace(call, **({"version": 2, "learnable_sink": (4,)} | changes))


def masked(mask, call=None, mode=0, **changes):
    return replace(call or batched(), atten_mask=mask, sparse_mode=mode, **changes)


OBEYED = {
    "batched": batched(),
    "one row": batched(rows=1),
    "hidden": hidden(),
    "no keys": batched(keys=0),
    "no queries": batched(rows=0),
    "packed": packed(),
    "packed causal": masked(TRIANGLE, packed(), 3),
    "packed 192 to 128": packed(dim=192, value_dim=128, kv_heads=2),
    "sink": sink(packed()),
    "dense mask": masked((2, 1, 20, 40)),
    "dense mask without batch": masked((16, 32)),
    "one row, mask per batch": masked((2, 32), batched(rows=1)),
    "one row, causal": masked(TRIANGLE, batched(rows=1), 3),
    "one row, mask as long as the longest": masked((2, 20), batched(rows=1), actual_seq_lengths_kv=[20, 7]),
    "compressed mask": masked((1, 1, *TRIANGLE), mode=2),
    "band": masked(TRIANGLE, mode=4, pre_tokens=4, next_tokens=-1),
    "pse_shift": replace(batched(), pse_shift=(1, 8, 16, 32), pse_shift_dtype=BF16),
    "one length for all": replace(batched(), actual_seq_lengths_kv=[7]),
    "more lengths than batches": replace(batched(), actual_seq_lengths_kv=[7, 8, 99]),
    "paged": paged(),
    "paged heads first": paged(cache=(9, 2, 128, 64)),
    "paged, one row": paged(rows=1, block_size=16, cache=(9, 16, 128), layout="BNSD"),
}
OBEYED["paged, one row"] = replace(OBEYED["paged, one row"], actual_seq_lengths_kv=[48, 1])

BROKEN = [
    ("covered_inputs", replace(batched(), other_inputs={"query_rope"}), "query_rope given: not covered by"),
    (
        "float_dtype",
        replace(batched(), query_dtype=torch.float32),
        "query is float32; the kernel takes float16",
    ),
    (
        "float_dtype",
        replace(batched(), query_dtype=torch.int8),
        "quantised calls are not covered by the emul",
    ),
    ("same_dtypes", replace(batched(), key_dtype=torch.float16), "key is float16 but query is bfloat16"),
    ("contiguous", replace(batched(), contiguous=(True, False, True)), "key is not contiguous"),
    ("known_layout", batched(layout="DNSB"), "layout DNSB is not one of BSH"),
    ("positive_heads", batched(heads=0, kv_heads=0), "N = 0, Nk = 0; head counts must be positive"),
    ("query_rank", replace(batched(), query=(2, 16, 64)), "query has 3 axes; layout BNSD has 4"),
    ("key_value_rank", replace(batched(), value=(2, 16, 64)), "value has 3 axes but query has 4"),
    ("key_value_rank", paged(cache=(9, 2, 4, 128, 16)), "key has 5 axes; NZ caches are not covered"),
    ("key_value_rank", paged(cache=(9, 2)), "key has 2 axes; a paged cache has 3, 4 or 5"),
    ("table_rank", replace(paged(), block_table=(6,)), "block_table has 1 axes"),
    ("grouped_heads", batched(heads=512, kv_heads=8), "N = 512, Nk = 8 exceed 256"),
    ("grouped_heads", batched(heads=8, kv_heads=3), "N = 8 is not a multiple of Nk = 3"),
    ("grouped_heads", batched(heads=128, kv_heads=1), "N/Nk = 128 exceeds 64"),
    ("head_axes", replace(batched(), num_heads=4), "query has 8 heads but the call says 4"),
    ("head_axes", replace(batched(), num_key_value_heads=4), "key has 2 heads but the call says 4"),
    ("divisible_hidden", hidden(query=516), "query has H = 516, not a multiple of its 8 heads"),
    ("divisible_hidden", hidden(key=129), "key has H = 129, not a multiple of its 2 heads"),
    ("key_fits_query", replace(batched(), key=(2, 2, 32, 80)), "key has D = 80 but query has D = 64"),
    ("key_fits_query", replace(batched(), query=(3, 8, 16, 64)), "key has B = 2 but query has B = 3"),
    ("value_fits_key", replace(batched(), value=(2, 2, 32, 32)), "but value is (2, 2, 32, 32); they must"),
    ("value_fits_key", replace(packed(), value=(63, 4, 128)), "but value is (63, 4, 128); they must agree"),
    ("batch_limit", batched(batch=65537), "B = 65537 exceeds 65536"),
    ("dim_limit", batched(dim=40), "D = 40 is not a multiple of 16"),
    ("dim_limit", batched(dim=528), "D = 528 is not in 1..512"),
    ("length_limit", batched(keys=20_971_521), "S2 = 20971521 exceeds 20971520"),
    ("length_limit", batched(rows=1, keys=262_145), "S2 = 262145 exceeds 262144"),
    ("length_limit", packed(rows=(1_048_577,), keys=(8,)), "T1 = 1048577 exceeds 1048576"),
    ("packed_dims", packed(dim=96), "(D, Dv) = (96, 96) in layout TND; the kernel takes (64, 64)"),
    ("packed_dims", packed(dim=512), "D = 512 in layout TND is MLA; not covered by the emulation"),
    ("packed_wide_value", packed(dim=192, kv_heads=2), "Dv = 192 in layout TND needs N = Nk, seen 4 and 2"),
    ("packed_wide_value", packed(dim=192, layout="NTD_TND"), "Dv = 192 does not go with layout NTD_TND"),
    ("packed_dtype", replace(packed(), query_dtype=torch.float16), "query is float16 in layout TND"),
    ("packed_precision", replace(packed(), inner_precise=1), "inner_precise = 1 with bfloat16 in layout TND"),
    ("inner_precise", replace(batched(), inner_precise=4), "inner_precise = 4 is not in 0..3"),
    (
        "inner_precise",
        replace(batched(rows=1), inner_precise=2),
        "inner_precise = 2 is not in 0..1 at S1 = 1",
    ),
    ("transposing_rows", batched(rows=1, layout="BNSD_BSND"), "layout BNSD_BSND at S1 = 1"),
    ("transposing_rows", batched(rows=17, layout="BNSD_NBSD"), "S1 = 17 in layout BNSD_NBSD is not in 2..16"),
    ("lse_dim", replace(batched(dim=512), softmax_lse_flag=True), "softmax_lse_flag with D = 512"),
    ("sink", replace(packed(), learnable_sink=(4,)), "learnable_sink is an argument of version 2 only"),
    ("sink", sink(batched()), "learnable_sink in layout BNSD; it needs TND or NTD_TND"),
    ("sink", sink(packed(), learnable_sink_dtype=torch.float32), "learnable_sink is float32; it must be bf"),
    ("sink", sink(packed(), learnable_sink=(3,)), "learnable_sink is (3,); it must be (N,) = (4,)"),
    ("sink", sink(packed(dim=192)), "learnable_sink with Dv = 192, which exceeds 128"),
    ("sink_dims", sink(packed(dim=192, value_dim=128)), "learnable_sink with D = 192; the tiling takes 64"),
    ("sink", sink(packed(), pse_shift=(1, 4, 16, 32)), "learnable_sink does not go with pse_shift"),
    ("sink_lse", sink(packed(), softmax_lse_flag=True), "softmax_lse_flag with learnable_sink: not covered"),
    ("known_mode", masked(TRIANGLE, mode=5), "sparse_mode = 5 is not supported"),
    ("known_mode", masked((2, 16, 16), mode=9), "sparse_mode = 9 (tree): not covered by the emulation"),
    (
        "mask_dtype",
        masked((16, 32), atten_mask_dtype=torch.float16),
        "atten_mask is float16; the kernel takes",
    ),
    ("mask_given", masked(None, mode=3), "sparse_mode = 3 needs an atten_mask"),
    ("compressed_mask", masked((16, 32), mode=2), "atten_mask is (16, 32); sparse_mode = 2 takes a 2048 x"),
    ("decode_compressed_mask", masked((1, *TRIANGLE), batched(rows=1), 3), "at S1 = 1 sparse_mode = 3 takes"),
    ("dense_mask_rank", masked((32,)), "atten_mask has 1 axes; a dense mask has 2, 3 or 4"),
    ("dense_mask_heads", masked((2, 8, 16, 32)), "atten_mask has a head axis of 8; per-head masks are not"),
    ("dense_mask_batch", masked((3, 1, 16, 32)), "atten_mask has a batch axis of 3; it must be 1 or B = 2"),
    (
        "decode_mask_batch",
        masked((1, 1, 1, 32), batched(rows=1)),
        "first axis of 1; at S1 = 1 it must be B = 2",
    ),
    ("decode_mask_batch", masked(TRIANGLE, batched(rows=1), 2), "first axis of 2048; at S1 = 1 it must be B"),
    ("dense_mask_rows", masked((15, 32)), "atten_mask has 15 rows; S1 = 16 needs as many"),
    ("dense_mask_columns", masked((16, 31)), "atten_mask has 31 columns; 32 keys need as many"),
    ("dense_mask_columns", masked((16, 32), paged()), "atten_mask has 32 columns; 384 keys need as many"),
    ("packed_mode", masked(TRIANGLE, packed(), 2), "sparse_mode = 2 in layout TND; it takes 0, 3 and 4"),
    ("packed_mode", masked((32, 64), packed()), "atten_mask with sparse_mode = 0 in layout TND; it takes no"),
    ("packed_mode", masked(TRIANGLE, packed(dim=192), 4), "Dv = 192 with sparse_mode = 4 in layout TND"),
    (
        "packed_causal_lengths",
        masked(TRIANGLE, packed(rows=(16, 32), keys=(8, 64)), 3),
        "16 query rows but 8 keys with sparse_mode = 3",
    ),
    ("window_signs", masked((16, 32), pre_tokens=-1, next_tokens=-1), "the window is empty"),
    ("window_signs", masked((16, 32), pre_tokens=3, next_tokens=-4), "the window is empty"),
    ("window_signs", masked((16, 32), next_tokens=-16), "next_tokens = -16 is beyond the length 16"),
    ("window_signs", masked(TRIANGLE, mode=4, pre_tokens=-16), "pre_tokens = -16 is beyond the length 16"),
    (
        "decode_window",
        masked(TRIANGLE, batched(rows=1), 4, pre_tokens=8),
        "at S1 = 1 the window has no effect",
    ),
    ("decode_window", masked((2, 32), batched(rows=1), next_tokens=0), "at S1 = 1 the window has no effect"),
    ("pse_dtype", replace(batched(), pse_shift=(1, 8, 16, 32)), "pse_shift is None but query is bfloat16"),
    ("pse_shape", replace(OBEYED["pse_shift"], pse_shift=(1, 1, 16, 32)), "pse_shift is (1, 1, 16, 32); it"),
    ("pse_shape", replace(OBEYED["pse_shift"], pse_shift=(1, 8, 16, 31)), "pse_shift is (1, 8, 16, 31); it"),
    (
        "pse_shape",
        replace(packed(), pse_shift=(1, 4, 16, 32), pse_shift_dtype=BF16),
        "not go with layout TND",
    ),
    (
        "batched_list_sizes",
        replace(batched(batch=3), actual_seq_lengths=[1, 2]),
        "has 2 entries; it takes 1, or",
    ),
    (
        "batched_list_sizes",
        replace(batched(), actual_seq_lengths_kv=[]),
        "has 0 entries; it takes 1, or B = 2",
    ),
    ("batched_list_values", replace(batched(), actual_seq_lengths=[17]), "length 17, not in 0..S1 = 16"),
    ("batched_list_values", replace(batched(), actual_seq_lengths_kv=[-1]), "length -1, not in 0..S2 = 32"),
    ("packed_lists_given", replace(packed(), actual_seq_lengths=None), "TND needs actual_seq_lengths and"),
    (
        "packed_lists_given",
        replace(packed(), actual_seq_lengths=[32]),
        "has 1 entries but actual_seq_lengths_kv",
    ),
    ("packed_lists_given", packed(rows=(1,) * 4097, keys=(1,) * 4097), "4097 entries, not in 1..4096"),
    ("packed_ends", replace(packed(), actual_seq_lengths=[40, 32]), "goes down from 40 to 32"),
    ("packed_ends", replace(packed(), actual_seq_lengths_kv=[1, 2]), "_kv ends at 2, not at the 64 tokens"),
    (
        "paged_lengths",
        replace(paged(), actual_seq_lengths_kv=None),
        "block_table needs actual_seq_lengths_kv",
    ),
    ("paged_lengths", replace(paged(), actual_seq_lengths_kv=[1, 385]), "has 385 keys; the table holds 384"),
    ("table", replace(paged(), block_table_dtype=torch.int64), "block_table is int64; it must be int32"),
    ("table", replace(paged(), block_table=(3, 3)), "block_table has 3 rows; it must have B = 2"),
    ("block_size", paged(block_size=64), "block_size = 64 is not a multiple of 128 in 128..512"),
    ("block_size", paged(rows=1, block_size=24), "block_size = 24 is not a multiple of 16 in 16..512"),
    ("cache", paged(block_size=256), "its blocks must have block_size = 256 rows"),
    ("cache", paged(cache=(9, 128, 65536)), "Nk * D = 65536 of the cache exceeds 65535"),
    ("cache", paged(cache=(9, 2, 128, 64), layout="BSND"), "layout BSND takes (blocks, block_size, Nk * D)"),
    (
        "cache",
        replace(packed(), key=(9, 4, 16, 128), value=(9, 4, 16, 128), block_table=(2, 4), block_size=16),
        "with N = Nk layout TND takes (blocks, block_size, Nk * D)",
    ),
    ("decode_cache_limit", paged(rows=1, cache=(200_000, 128, 128)), "too many for int32"),
]


@pytest.mark.parametrize("call", OBEYED.values(), ids=OBEYED)
def test_a_call_within_the_limits_breaks_no_rule(call):
    assert violations(call) == []


@pytest.mark.parametrize("name, call, sentence", BROKEN, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BROKEN)])
def test_a_call_beyond_a_limit_breaks_its_rule(name, call, sentence):
    sentences = {rule.name: text for rule, text in violations(call)}
    assert sentence in sentences.get(name, f"{name} obeyed; broken: {sentences}")


def fusion(layout="BNSD", query=(2, 8, 16, 40), key=(2, 2, 32, 40), **changes):
    fields = {"layout": layout, "query": query, "key": key, "value": key, "head_num": 8, **DTYPES}
    return FusionAttentionCall(**(fields | changes))


FUSION_OBEYED = [
    fusion(),
    fusion("BSH", (2, 16, 320), (2, 32, 80)),
    fusion("SBH", (16, 2, 320), (32, 2, 80), value=(32, 2, 40)),
    fusion(atten_mask=(2, 8, 16, 32)),
    fusion(atten_mask=TRIANGLE, sparse_mode=4),
    fusion(sparse_mode=2),
    fusion(pse=(1, 8, 16, 32), pse_dtype=BF16),
]
FUSION_BROKEN = [
    ("covered_inputs", fusion(other_inputs={"sink"}), "sink given: not covered by the emulation"),
    ("no_dropout", fusion(keep_prob=0.9), "keep_prob = 0.9: dropout is not covered by the emulation"),
    ("dtypes", fusion(query_dtype=torch.float64), "query is float64; the kernel takes float16, bfloat16 and"),
    ("dtypes", fusion(value_dtype=torch.float16), "value is float16 but query is bfloat16; they must agree"),
    ("layout", fusion("TND"), "layout TND: not covered by the emulation"),
    ("layout", fusion("BDSN"), "layout BDSN is not one of BSH, SBH, BSND, BNSD, TND"),
    ("ranks", fusion("BSH"), "query has 4 axes; layout BSH has 3"),
    ("head_num", fusion(head_num=257), "head_num = 257 is not in 1..256"),
    (
        "head_num",
        fusion("BSH", (2, 16, 321), (2, 32, 80)),
        "query has H = 321, not a multiple of its 8 heads",
    ),
    ("head_num", fusion(head_num=4), "query has 8 heads but the call says 4"),
    ("dims", fusion(query=(2, 8, 16, 769)), "D = 769 is not in 1..768"),
    ("kv_heads", fusion(key=(2, 3, 32, 40)), "N = 8 is not a multiple of Nk = 3"),
    ("kv_heads", fusion("BSH", (2, 16, 320), (2, 32, 81)), "key has H = 81, not a multiple of D = 40"),
    ("key_value", fusion(key=(2, 2, 32, 41)), "key has D = 41 but query has D = 40"),
    ("key_value", fusion(key=(3, 2, 32, 40)), "key has B = 3 but query has B = 2"),
    ("key_value", fusion(value=(2, 2, 31, 40)), "but value is (2, 2, 31, 40); they may differ in D only"),
    (
        "key_value",
        fusion("BSH", (2, 16, 320), (2, 32, 80), value=(2, 32, 81)),
        "value has H = 81, not a mult",
    ),
    ("lengths", fusion(query=(2, 8, 1_048_577, 40)), "S1 = 1048577 exceeds 1048576"),
    ("mode", fusion(sparse_mode=6), "sparse_mode = 6: not covered by the emulation"),
    ("mode", fusion(sparse_mode=9), "sparse_mode = 9 is not supported"),
    (
        "mask",
        fusion(atten_mask=(2, 2, 16, 32)),
        "atten_mask is (2, 2, 16, 32); it must be (S1, S2), (1, 1, S1",
    ),
    ("mask", fusion(atten_mask=(16, 32), sparse_mode=3), "sparse_mode = 3 takes a 2048 x 2048 mask"),
    (
        "mask",
        fusion(atten_mask=(16, 32), atten_mask_dtype=torch.int8),
        "atten_mask is int8; the kernel takes",
    ),
    ("pse", fusion(pse=(1, 8, 16, 32), pse_dtype=torch.float32), "pse is float32 but query is bfloat16"),
    ("pse", fusion(pse=(2, 8, 16), pse_dtype=BF16), "pse is (2, 8, 16); the emulation covers (B, N, S1, S2)"),
]


@pytest.mark.parametrize("call", FUSION_OBEYED)
def test_a_fusion_call_within_the_limits_breaks_no_rule(call):
    assert violations(call) == []


@pytest.mark.parametrize("name, call, sentence", FUSION_BROKEN)
def test_a_fusion_call_beyond_a_limit_breaks_its_rule(name, call, sentence):
    sentences = {rule.name: text for rule, text in violations(call)}
    assert sentence in sentences.get(name, f"{name} obeyed; broken: {sentences}")


@pytest.mark.parametrize("table, cases", [(FIA_RULES, BROKEN), (FUSION_ATTENTION_RULES, FUSION_BROKEN)])
def test_every_rule_has_a_name_a_source_and_a_call_that_breaks_it(table, cases):
    names = [rule.name for rule in table]
    assert len(set(names)) == len(names) and all(rule.source for rule in table)
    assert set(names) == {name for name, *_ in cases}


def test_the_first_violation_is_the_first_of_the_table():
    call = replace(batched(dim=40), contiguous=(False, True, True), sparse_mode=5)
    assert first_violation(call) == "query is not contiguous" == violations(call)[0][1]
    assert first_violation(batched()) is None


class Symbolic:
    """Tensors with symbolic sizes and the guards added since."""

    def __init__(self):
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)

    def tensor(self, shape, dynamic, dtype=BF16):
        sizes = [DimDynamic.DYNAMIC if i in dynamic else DimDynamic.STATIC for i in range(len(shape))]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return self.mode.from_tensor(torch.empty(shape, dtype=dtype), symbolic_context=context)

    def guards(self):
        return sorted(str(guard.expr) for guard in self.env.guards)


@pytest.mark.parametrize("masked", [False, True])
def test_symbolic_batch_and_length_are_only_guarded_by_their_limits(masked):
    symbolic = Symbolic()
    q = symbolic.tensor((3, 8, 5, 64), dynamic=(0, 2))
    batch, rows = q.shape[0], q.shape[2]
    mask = (batch, 1, rows, rows) if masked else None
    call = replace(FiaCall.of(q, q, q, layout="BNSD", num_heads=8), atten_mask=mask)
    assert violations(call) == []
    assert symbolic.guards() == sorted([f"{batch} <= 65536", f"{rows} <= 20971520"])


def test_symbolic_sizes_are_named_in_the_sentence():
    symbolic = Symbolic()
    q = symbolic.tensor((3, 8, 5, 64), dynamic=(2,))
    rows = q.shape[2]
    call = replace(FiaCall.of(q, q, q, layout="BNSD", num_heads=8), atten_mask=(rows - 1, rows))
    assert first_violation(call) == f"atten_mask has {rows - 1} rows; S1 = {rows} needs as many"


def test_symbolic_token_counts_fit_their_lists():
    symbolic = Symbolic()
    q = symbolic.tensor((7, 4, 128), dynamic=(0,))
    tokens = q.shape[0]
    call = FiaCall.of(q, q, q, layout="TND", num_heads=4, actual_seq_lengths=[tokens], actual_seq_lengths_kv=[tokens])
    assert violations(call) == [] and symbolic.guards() == [f"{tokens} <= 1048576"]


def test_symbolic_fusion_calls_are_only_guarded_by_their_limits():
    symbolic = Symbolic()
    q = symbolic.tensor((3, 5, 8 * 40), dynamic=(0, 1))
    call = FusionAttentionCall.of(q, q, q, layout="BSH", head_num=8)
    assert violations(call) == [] and symbolic.guards() == [f"{q.shape[1]} <= 1048576"]
