"""npu_attention_update without an NPU: its formula, its limits, and the merge that is made of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sgl_npu.lowering.sequence.ascend_merge import refuse_update, update
from sgl_npu.lowering.sequence.merge import Part, merge
from sgl_npu.runtime.npu import ensure_ops

ensure_ops()
OP = torch.ops.npu.npu_attention_update.default
B, H, S = 2, 3, 5


def tensors(count=2, rows=6, dim=8, dtype=torch.float32):
    return [torch.randn(rows) for _ in range(count)], [torch.randn(rows, dim).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 16])
def test_outs_are_weighted_by_their_share_of_the_exponentials(count, dtype):
    lse, outs = tensors(count, dtype=dtype)
    weights = torch.stack(lse).softmax(0).unsqueeze(-1)
    out, total = OP(lse, outs, 1)
    assert out.dtype == dtype and total.dtype == torch.float32
    expected = (weights * torch.stack(outs).float()).sum(0)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)
    torch.testing.assert_close(total, torch.stack(lse).logsumexp(0))


@pytest.mark.parametrize(
    "lse, outs, update_type, sentence",
    [
        (*tensors(17), 1, "17 parts; the kernel takes 1 to 16"),
        (tensors(2)[0], tensors(3)[1], 1, "2 tensors in lse but 3 in local_out"),
        ([x.half() for x in tensors()[0]], tensors()[1], 1, "lse is float16; the kernel takes float32"),
        (tensors()[0], [x.double() for x in tensors()[1]], 1, "local_out is float64"),
        (tensors()[0], [tensors()[1][0], tensors()[1][1].half()], 1, "float16 beside float32; they must agree"),
        ([x[None] for x in tensors()[0]], tensors()[1], 1, "lse has 2 axes, not 1"),
        (tensors(rows=5)[0], tensors()[1], 1, r"lse is \(5,\) where local_out is \(6, 8\)"),
        (*tensors(dim=12), 1, r"D = 12 is not a multiple of 8 in 8..512"),
        (*tensors(dim=520), 1, r"D = 520 is not a multiple of 8 in 8..512"),
        (*tensors(), 2, "update_type = 2 is neither 0 nor 1"),
        (tensors()[0], [torch.randn(8, 6).t() for _ in range(2)], 1, r"local_out\[0\], local_out\[1\]: not contiguous"),
    ],
)
def test_what_the_hardware_would_refuse_is_refused(lse, outs, update_type, sentence):
    with pytest.raises(RuntimeError, match=f"npu_attention_update: .*{sentence}"):
        OP(lse, outs, update_type)


def test_what_is_not_documented_is_not_a_number():
    lse, outs = tensors()
    lse[1][2] = -math.inf
    out, total = OP(lse, outs, 1)
    assert out.isnan().any(-1).tolist() == total.isnan().tolist() == [False, False, True, False, False, False]
    assert OP(*tensors(), 0)[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_and_kernel_agree(dtype):
    lse, outs = tensors(dtype=dtype)
    with FakeTensorMode() as mode:
        fake = OP([mode.from_tensor(x) for x in lse], [mode.from_tensor(x) for x in outs], 1)
    real = OP(lse, outs, 1)
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in real]
    torch.library.opcheck(OP, (lse, outs, 1), test_utils=("test_schema", "test_faketensor"))


# ---------------------------------------------------------------- the merge


def parts(count, dtype=torch.float32, heads_last=False, scale=1.0):
    """Parts as attention gives them: a row without a key has out 0 and lse -inf. Rows 0 of heads 0 have none at all."""
    found = []
    for number in range(count):
        out, lse = torch.randn(B, H, S, 8), torch.randn(B, H, S) * scale
        lse[:, number % H, number % S :: 3] = -math.inf
        lse[:, 0, 0] = -math.inf
        out = out.masked_fill((lse == -math.inf).unsqueeze(-1), 0.0).to(dtype)
        if heads_last:
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        found.append(Part(out, lse))
    return found


def same(found, expected):
    torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-5, atol=1e-5)
    assert found.out.dtype == found.lse.dtype == torch.float32


@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 16])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e37])
def test_the_op_merges_as_the_formula_does(count, dtype, heads_last, scale):
    given = parts(count, dtype, heads_last, scale)
    same(update(given), merge(given))
    same(update(given, has_strides=False), merge(given))


def test_a_row_without_any_key_is_exactly_zero_whatever_other_ranks_sent():
    first, second, third = parts(3)
    nowhere = torch.zeros(S, dtype=torch.bool)
    given = [first, Part(second.out + 5, second.lse).where(nowhere), Part(third.out + 5, third.lse).where(nowhere)]
    found = update(given)
    empty = first.lse == -math.inf
    assert empty.any() and (found.out[empty] == 0).all() and (found.lse[empty] == -math.inf).all()
    same(found, merge(given))
    again = [found, Part(torch.full_like(found.out, 7.0), torch.full_like(found.lse, -math.inf))]
    same(update(again), merge(again))


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e30, -3e30])
def test_a_row_of_finite_fills_is_no_empty_row(lowest):
    """As a mask that fills with finfo.min leaves one: an average of all keys, with an lse that is very low."""
    given = [Part(torch.randn(1, 1, 4, 8), torch.full((1, 1, 4), lowest)) for _ in range(2)]
    same(update(given), merge(given))
    torch.testing.assert_close(update(given).out, (given[0].out + given[1].out) / 2)


def test_the_formula_merges_what_the_op_cannot():
    def refusal(count, dim=8, dtype=torch.float16):
        return refuse_update([Part(torch.zeros(1, 2, 3, dim, dtype=dtype), torch.zeros(1, 2, 3)) for _ in range(count)])

    assert refusal(2) is None and refusal(16) is None
    assert refusal(17) == "17 parts; the kernel takes 1 to 16"
    assert refusal(2, dim=20) == "D = 20 is not a multiple of 8 in 8..512"
    assert refusal(2, dtype=torch.float64).startswith("local_out is float64")
