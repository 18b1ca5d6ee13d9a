import pytest
import torch
from attention_formula import arrange, assert_near, formula, kept, random_inputs

CAUSAL_MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
SCALE = 0.2


def fusion(q, k, v, layout="BNSD", **kwargs):
    tensors = (arrange(t, layout) for t in (q, k, v))
    return torch.ops.npu.npu_fusion_attention_v3(*tensors, q.shape[1], layout, scale=SCALE, **kwargs)


def check(seen, expected, layout="BNSD"):
    out, lse = expected
    assert_near(seen[0], arrange(out, layout))
    maximum, total = seen[1:3]
    assert maximum.eq(maximum[..., :1]).all() and total.eq(total[..., :1]).all()
    blank = lse == torch.inf
    assert_near((maximum + total.log())[..., :1].masked_fill(blank, 0), lse.masked_fill(blank, 0))
    assert (total[..., :1] == 0).eq(blank).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND", "BNSD"])
def test_layouts_give_full_attention(layout, kv_heads, dtype):
    inputs = random_inputs(2, 4, kv_heads, 5, 7, dim=20, dtype=dtype)
    seen = fusion(*inputs, layout)
    check(seen, formula(*inputs, scale=SCALE), layout)
    assert seen[0].dtype == dtype and seen[3].numel() == 0


def test_float32_is_computed_in_float32():
    inputs = random_inputs(2, 4, 2, 5, 7, dtype=torch.float32)
    expected = formula(*inputs, scale=SCALE)[0].float()
    torch.testing.assert_close(fusion(*inputs)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows, keys", [(5, 5), (3, 8), (8, 3)])
@pytest.mark.parametrize("mode, window", [(2, ()), (3, ()), (4, (2, 0)), (4, (1, 2))])
def test_sparse_modes_keep_the_keys_they_say(mode, window, rows, keys):
    inputs = random_inputs(2, 4, 2, rows, keys)
    tokens = dict(zip(("pre_tockens", "next_tockens"), window, strict=False))
    seen = fusion(*inputs, atten_mask=CAUSAL_MASK, sparse_mode=mode, **tokens)
    check(seen, formula(*inputs, keep=kept(mode, rows, keys, *window), scale=SCALE))


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1, 5, 7), (2, 1, 5, 7), (2, 4, 5, 7)])
def test_dense_masks_remove_what_is_true(shape, mode):
    inputs = random_inputs(2, 4, 2, 5, 7)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[..., 2, :] = True
    seen = fusion(*inputs, atten_mask=mask, sparse_mode=mode, pre_tockens=3, next_tockens=2)
    check(seen, formula(*inputs, keep=~mask & kept(mode, 5, 7, 3, 2), scale=SCALE))


def test_the_sparse_mode_is_ignored_without_a_mask():
    inputs = random_inputs(2, 4, 2, 5, 7)
    check(fusion(*inputs, sparse_mode=3), formula(*inputs, scale=SCALE))


@pytest.mark.parametrize("batch", [1, 2])
def test_pse_is_added_after_the_scale(batch):
    inputs = random_inputs(2, 4, 2, 5, 7, dtype=torch.float16)
    pse = torch.randn(batch, 4, 5, 7).half()
    check(fusion(*inputs, pse=pse), formula(*inputs, scale=SCALE, bias=pse))


@pytest.mark.parametrize("rows, keys", [(0, 4), (4, 0)])
def test_empty_inputs_give_zeros(rows, keys):
    inputs = random_inputs(2, 4, 2, rows, keys)
    check(fusion(*inputs), formula(*inputs, scale=SCALE))


def test_the_kernel_lists_everything_that_is_wrong():
    q, k, v = random_inputs(1, 3, 2, 4, 4)
    message = "npu_fusion_attention_v3: keep_prob = 0.5: dropout is not covered.*; N = 3 is not a multiple"
    with pytest.raises(RuntimeError, match=message):
        fusion(q, k, v, keep_prob=0.5)


def test_a_compressed_mask_with_other_content_is_rejected():
    with pytest.raises(RuntimeError, match="must be ones"):
        fusion(*random_inputs(1, 2, 2, 4, 4), atten_mask=CAUSAL_MASK.T.contiguous(), sparse_mode=2)
