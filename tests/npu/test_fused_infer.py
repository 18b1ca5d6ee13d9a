import pytest
import torch
from attention_formula import arrange, assert_near, formula, kept, random_inputs

BATCHED = ("BSH", "BSND", "BNSD", "BNSD_BSND", "BSH_BNSD", "BSND_BNSD", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD")
PACKED = ("TND", "NTD", "TND_NTD", "NTD_TND")
CAUSAL_MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
SCALE = 0.2


def fia(q, k, v, layout="BNSD", **kwargs):
    """Version 1 on (B, N, S, D) inputs, arranged for the layout, with the log-sum-exp."""
    axes = layout.partition("_")[0]
    kwargs = {"softmax_lse_flag": True, "scale": SCALE, "input_layout": layout} | kwargs
    return torch.ops.npu.npu_fused_infer_attention_score(
        *(arrange(t, axes) for t in (q, k, v)),
        num_heads=q.shape[1],
        num_key_value_heads=k.shape[1],
        **kwargs,
    )


def check(seen, expected, layout="BNSD"):
    out, lse = expected
    assert_near(seen[0], arrange(out, layout.rpartition("_")[2]))
    assert_near(seen[1], arrange(lse, "TND") if "T" in layout else lse)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("layout", BATCHED)
def test_batched_layouts_give_full_attention(layout, heads, kv_heads):
    inputs = random_inputs(2, heads, kv_heads, 5, 7)
    check(fia(*inputs, layout), formula(*inputs, scale=SCALE), layout)


def test_nsd_is_one_batch():
    q, k, v = random_inputs(1, 4, 2, 5, 7)
    out, lse = fia(q, k, v, "NSD")
    expected, expected_lse = formula(q, k, v, scale=SCALE)
    assert_near(out, expected[0])
    assert_near(lse, expected_lse)


def test_scale_defaults_to_one():
    q, k, v = random_inputs(1, 2, 2, 3, 3, dim=16)
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(q, k, v, num_heads=2, input_layout="BNSD")
    assert_near(out, formula(q, k, v)[0])


def test_heads_default_to_those_of_the_query_and_the_layout_to_bsh():
    q, k, v = random_inputs(2, 1, 1, 3, 3, dim=16)
    out, lse = torch.ops.npu.npu_fused_infer_attention_score(*(arrange(t, "BSH") for t in (q, k, v)))
    assert_near(out, arrange(formula(q, k, v)[0], "BSH"))
    assert lse.shape == (0,) and lse.dtype == torch.float32


@pytest.mark.parametrize("rows, keys", [(5, 5), (3, 8), (8, 3)])
@pytest.mark.parametrize("mode, window", [(2, ()), (3, ()), (4, (2, 0)), (4, (1, 2)), (4, (3, -1)), (4, (-1, 2))])
def test_sparse_modes_keep_the_keys_they_say(mode, window, rows, keys):
    inputs = random_inputs(2, 4, 2, rows, keys)
    tokens = dict(zip(("pre_tokens", "next_tokens"), window, strict=False))
    seen = fia(*inputs, atten_mask=CAUSAL_MASK, sparse_mode=mode, **tokens)
    check(seen, formula(*inputs, keep=kept(mode, rows, keys, *window), scale=SCALE))


def test_bottom_right_causal_uses_the_actual_lengths():
    inputs = random_inputs(2, 2, 2, 4, 6)
    lengths = ((4, 5), (2, 6))
    keep = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    for batch, (rows, keys) in enumerate(lengths):
        keep[batch, 0, :rows, :keys] = kept(3, rows, keys)
    rows, keys = zip(*lengths, strict=True)
    seen = fia(*inputs, atten_mask=CAUSAL_MASK, sparse_mode=3, actual_seq_lengths=rows, actual_seq_lengths_kv=keys)
    check(seen, formula(*inputs, keep=keep, scale=SCALE))


@pytest.mark.parametrize("shape", [(5, 7), (8, 9), (1, 5, 7), (2, 5, 7), (1, 1, 5, 7), (2, 1, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8])
@pytest.mark.parametrize("mode", [0, 1])
def test_dense_masks_remove_what_is_true(shape, dtype, mode):
    inputs = random_inputs(2, 4, 2, 5, 7)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[..., 0] = False
    keep = ~mask.view((1,) * (4 - mask.dim()) + shape if mask.dim() != 3 else (shape[0], 1, *shape[1:]))
    seen = fia(*inputs, atten_mask=mask.to(dtype), sparse_mode=mode)
    check(seen, formula(*inputs, keep=keep[..., :5, :7], scale=SCALE))


@pytest.mark.parametrize("mode", [0, 1])
def test_only_mode_0_adds_the_window_to_a_dense_mask(mode):
    inputs = random_inputs(1, 2, 2, 5, 6)
    mask = torch.zeros(5, 6, dtype=torch.bool)
    seen = fia(*inputs, atten_mask=mask, sparse_mode=mode, pre_tokens=1, next_tokens=2)
    check(seen, formula(*inputs, keep=kept(mode, 5, 6, 1, 2), scale=SCALE))


def test_the_window_is_ignored_without_a_mask():
    inputs = random_inputs(1, 2, 2, 5, 6)
    check(fia(*inputs, pre_tokens=0, next_tokens=0), formula(*inputs, scale=SCALE))


@pytest.mark.parametrize("rows, keys", [([3], [5]), ([3, 0], [0, 7]), ([5, 2, 9], [7, 1, 9]), (None, [4, 2])])
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
def test_rows_beyond_their_length_give_0_and_plus_infinity(layout, rows, keys):
    inputs = random_inputs(2, 4, 2, 5, 7)
    keep = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    for batch in range(2):
        row_count = 5 if rows is None else rows[batch % len(rows)]
        keep[batch, 0, :row_count, : keys[batch % len(keys)]] = True
    seen = fia(*inputs, layout, actual_seq_lengths=rows, actual_seq_lengths_kv=keys)
    check(seen, formula(*inputs, keep=keep, scale=SCALE), layout)


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("mode, window", [(0, ()), (3, ()), (4, (1, 1))])
def test_packed_layouts_keep_sequences_apart(layout, mode, window):
    lengths = ((3, 4), (0, 0), (2, 5))
    parts = [random_inputs(1, 4, 2, *pair, dim=64, seed=i) for i, pair in enumerate(lengths)]
    q, k, v = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    expected = [
        formula(*part, keep=kept(mode, *pair, *window), scale=SCALE) for part, pair in zip(parts, lengths, strict=True)
    ]
    settings = dict(zip(("pre_tokens", "next_tokens"), window, strict=False))
    if mode:
        settings |= {"atten_mask": CAUSAL_MASK, "sparse_mode": mode}
    seen = fia(q, k, v, layout, actual_seq_lengths=[3, 3, 5], actual_seq_lengths_kv=[4, 4, 9], **settings)
    check(seen, [torch.cat(tensors, dim=2) for tensors in zip(*expected, strict=True)], layout)


def test_packed_value_may_be_narrower_than_the_key():
    inputs = random_inputs(1, 2, 2, 3, 3, dim=192, value_dim=128)
    seen = fia(*inputs, "TND", actual_seq_lengths=[3], actual_seq_lengths_kv=[3])
    check(seen, formula(*inputs, scale=SCALE), "TND")


@pytest.mark.parametrize("rows, batch", [(4, 1), (4, 2), (1, 2)])
def test_pse_shift_is_added_after_the_scale(rows, batch):
    inputs = random_inputs(2, 4, 2, rows, 6, dtype=torch.float16)
    pse = torch.randn(batch, 4, rows + 1, 8).half()
    seen = fia(*inputs, pse_shift=pse)
    check(seen, formula(*inputs, scale=SCALE, bias=pse[..., :rows, :6]))


@pytest.mark.parametrize("inner_precise, out, lse", [(0, torch.nan, torch.nan), (2, 0, torch.inf)])
def test_a_row_blanked_by_a_dense_mask_is_defined_only_with_the_row_fix(inner_precise, out, lse):
    inputs = random_inputs(1, 2, 2, 4, 4)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2] = True
    seen_out, seen_lse = fia(*inputs, atten_mask=mask, inner_precise=inner_precise)
    expected_out, expected_lse = formula(*inputs, keep=~mask, scale=SCALE)
    expected_out[:, :, 2], expected_lse[:, :, 2] = out, lse
    check((seen_out, seen_lse), (expected_out, expected_lse))


def test_no_keys_give_0_and_plus_infinity():
    out, lse = fia(*random_inputs(2, 4, 2, 3, 0))
    assert out.shape == (2, 4, 3, 32) and not out.any()
    assert lse.eq(torch.inf).all()


def test_an_empty_mask_is_no_mask():
    inputs = random_inputs(1, 2, 2, 3, 5)
    check(fia(*inputs, atten_mask=torch.empty(0, dtype=torch.bool)), formula(*inputs, scale=SCALE))


@pytest.mark.parametrize("batch, rows", [(0, 3), (2, 0)])
def test_no_queries_give_an_empty_output(batch, rows):
    out, lse = fia(*random_inputs(batch, 4, 2, rows, 5), "BNSD_BSND")
    assert out.shape == (batch, rows, 4, 32) and lse.shape == (batch, 4, rows, 1)


@pytest.mark.parametrize("shape", [(3, 6), (3, 1, 6), (3, 1, 1, 6)])
def test_one_row_takes_a_mask_per_batch(shape):
    inputs = random_inputs(3, 4, 2, 1, 6)
    mask = torch.arange(6) >= torch.tensor([2, 6, 4])[:, None]
    seen = fia(*inputs, atten_mask=mask.view(shape))
    check(seen, formula(*inputs, keep=~mask[:, None, None], scale=SCALE))


@pytest.mark.parametrize("batch, mode", [(2, 3), (2, 4), (2048, 2)])
def test_the_sparse_mode_has_no_effect_on_one_row(batch, mode):
    inputs = random_inputs(batch, 1, 1, 1, 6, dim=16)
    check(fia(*inputs, atten_mask=CAUSAL_MASK, sparse_mode=mode), formula(*inputs, scale=SCALE))


def paged(tensor, lengths, block_size, four_axes):
    """Cache and table for (B, N, S, D) keys, with the blocks in reverse order."""
    batch, heads, _, dim = tensor.shape
    width = -(-max(lengths) // block_size)
    cache = torch.full((batch * width, heads, block_size, dim), torch.nan, dtype=tensor.dtype)
    table = torch.arange(batch * width, dtype=torch.int32).flip(0).view(batch, width)
    for b, length in enumerate(lengths):
        for position in range(length):
            block, row = divmod(position, block_size)
            cache[table[b, block], :, row] = tensor[b, :, position]
    return (cache if four_axes else cache.transpose(1, 2).flatten(2)).contiguous(), table


@pytest.mark.parametrize(
    "layout, rows, block_size, four_axes",
    [
        ("BNSD", 3, 128, True),
        ("BNSD", 1, 16, False),
        ("BSH", 1, 16, False),
        ("BSND", 3, 128, False),
        ("TND", 3, 16, True),
        ("NTD", 3, 16, False),
    ],
)
def test_paged_keys_are_found_through_the_table(layout, rows, block_size, four_axes):
    lengths = [20, 150]
    q, k, v = random_inputs(2, 4, 2, rows, 150, dim=64)
    keep = (torch.arange(150) < torch.tensor(lengths)[:, None])[:, None, None]
    (key, table), (value, _) = (paged(t, lengths, block_size, four_axes) for t in (k, v))
    packed = "T" in layout
    seen = torch.ops.npu.npu_fused_infer_attention_score(
        arrange(q, layout),
        key,
        value,
        block_table=table,
        block_size=block_size,
        num_heads=4,
        num_key_value_heads=2,
        input_layout=layout,
        scale=SCALE,
        softmax_lse_flag=True,
        actual_seq_lengths=[rows, 2 * rows] if packed else None,
        actual_seq_lengths_kv=lengths,
    )
    check(seen, formula(q, k, v, keep=keep, scale=SCALE), layout)


def call_v2(q, k, v, **kwargs):
    return torch.ops.npu.npu_fused_infer_attention_score_v2(
        q, k, v, num_query_heads=4, num_key_value_heads=2, softmax_scale=SCALE, **kwargs
    )


def test_version_2_is_version_1_under_other_names():
    q, k, v = random_inputs(2, 4, 2, 5, 7)
    one = fia(q, k, v, actual_seq_lengths=[4, 5], actual_seq_lengths_kv=[6, 7])
    two = call_v2(
        q, k, v, input_layout="BNSD", actual_seq_qlen=[4, 5], actual_seq_kvlen=[6, 7], return_softmax_lse=True
    )
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_a_learnable_sink_takes_its_share_of_the_softmax():
    q, k, v = random_inputs(1, 4, 2, 3, 3, dim=64)
    sink = torch.tensor([-1.0, 0.0, 2.0, 5.0], dtype=torch.bfloat16)
    out, _ = call_v2(
        *(arrange(t, "TND") for t in (q, k, v)),
        input_layout="TND",
        actual_seq_qlen=[3],
        actual_seq_kvlen=[3],
        learnable_sink=sink,
    )
    assert_near(out, arrange(formula(q, k, v, scale=SCALE, sink=sink)[0], "TND"))


def test_a_compressed_mask_with_other_content_is_rejected_even_after_it_was_right():
    inputs = random_inputs(1, 2, 2, 4, 4)
    mask = CAUSAL_MASK.clone()
    fia(*inputs, atten_mask=mask, sparse_mode=3)
    mask[0, 0] = True
    with pytest.raises(RuntimeError, match="must be ones"):
        fia(*inputs, atten_mask=mask, sparse_mode=3)


def test_the_kernel_lists_everything_that_is_wrong():
    q, k, v = random_inputs(1, 3, 2, 4, 4, dim=20)
    sentences = ("N = 3 is not a multiple of Nk = 2", "D = 20 is not a multiple of 16", "needs an atten_mask")
    with pytest.raises(RuntimeError, match="npu_fused_infer_attention_score: " + ".*; .*".join(sentences)):
        fia(q, k, v, sparse_mode=3)


def test_an_argument_outside_the_emulation_is_named():
    q, k, v = random_inputs(1, 2, 2, 4, 4)
    with pytest.raises(RuntimeError, match="query_rope given: not covered by the emulation"):
        fia(q, k, v, query_rope=q)
