# ruff: noqa: E501
"""Rain fusion on an NPU by either kernel: sgl-kernel-npu's, which takes lists of blocks, or torch_npu's, which takes a mask."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from expecttest import assert_expected_inline
from sparse.sparse_cases import call_on, small_wan, wan_inputs

import sgl_npu
from sgl_npu.compiler.options import parse_options, sparse_setting
from sgl_npu.lowering.sparse import table
from sgl_npu.lowering.sparse.rain_fusion import emit_block_mask_npu, emit_rain_fusion, refuse_block_mask_npu
from sgl_npu.lowering.sparse.setting import SparseSetting
from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.runtime.npu.kernel_package import Absent

HALF = SparseSetting("rain_fusion_attn", sparsity=Fraction(1, 2))
LISTS, MASK = "rain_fusion_attention", "npu_block_sparse_attention"


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("grid", [TokenGrid(3, 9, 17), TokenGrid(2, 16, 16, 5, 9), TokenGrid(1, 20, 20)], ids=str)
def test_the_mask_of_blocks_gives_what_the_blocks_give_one_by_one(grid, kv_heads, dim):
    """Every sample and every head with blocks of its own, the last block short, heads padded."""
    call = call_on(grid, torch.bfloat16, batch=2, heads=4, kv_heads=kv_heads, dim=dim)
    assert refuse_block_mask_npu(call, HALF) is None
    found, expected = (emit(call, grid, HALF) for emit in (emit_block_mask_npu, emit_rain_fusion))
    assert found.shape == expected.shape and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_what_the_kernel_refuses_is_refused_with_its_clause():
    grid = TokenGrid(1, 16, 16)
    assert "float32, float32, float32; all must be float16 or all" in refuse_block_mask_npu(call_on(grid), HALF)
    narrow = call_on(grid, torch.bfloat16, heads=3, kv_heads=2)
    assert refuse_block_mask_npu(narrow, HALF) == "N = 3 is not a multiple of Nk = 2"


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "op"), [("auto", LISTS), (LISTS, LISTS), (MASK, MASK)])
def test_an_emulated_npu_has_the_kernel_that_is_asked_for(kernel, op):
    config = {"latent_shape": (2, 8, 16), "kernel": kernel}
    options = {"platform": "npu", "attention": "rain_fusion_attn", "attention_config": config, "strict": True}
    report = sgl_npu.explain(small_wan().bfloat16(), options=options, **wan_inputs(2, 8, 16, dtype=torch.bfloat16))
    assert [site.op.partition(".")[2] for site in report.sites][::2] == [op, op]


@torch.no_grad()
def test_the_graph_of_the_mask_kernel():
    torch._dynamo.reset()
    grid, before = TokenGrid(1, 16, 16), len(sgl_npu.reports())

    def run(x):
        query, key, value = (x @ x.new_ones(32, 32) for _ in range(3))
        heads = (y.unflatten(-1, (1, 32)).transpose(1, 2) for y in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads)

    config = {"latent_shape": (1, 16, 16), "kernel": MASK}
    options = {"attention": "rain_fusion_attn", "attention_config": config, "platform": "npu", "strict": True}
    torch.compile(run, backend="sgl_npu", options=options)(torch.randn(1, grid.length, 32, dtype=torch.bfloat16))
    text = sgl_npu.reports()[before].graph.splitlines()
    first = next(i for i, line in enumerate(text) if "scatter" in line)
    assert_expected_inline(
        "\n".join(text[first:]),
        """\
scatter: b8[1, 1, 2, 2] = aten.scatter.value(zeros_like, -1, getitem1, True)
arange1: i64[2] = aten.arange(2, device=cpu, pin_memory=False)
mul7: i64[2] = aten.mul.Tensor(arange1, 128)
lt: b8[2] = aten.lt.Scalar(mul7, 0)
bitwise_or: b8[1, 1, 2, 2] = aten.bitwise_or.Tensor(scatter, lt)
unsqueeze: b8[2, 1] = aten.unsqueeze(lt, -1)
bitwise_or1: b8[1, 1, 2, 2] = aten.bitwise_or.Tensor(bitwise_or, unsqueeze)
constant_pad_nd: bf16[1, 1, 256, 64] = aten.constant_pad_nd(index_select, [0, 32], 0)
constant_pad_nd1: bf16[1, 1, 256, 64] = aten.constant_pad_nd(index_select1, [0, 32], 0)
constant_pad_nd2: bf16[1, 1, 256, 64] = aten.constant_pad_nd(index_select2, [0, 32], 0)
to_copy: int8[1, 1, 2, 2] = aten._to_copy(bitwise_or1, dtype=int8)
npu_block_sparse_attention: tuple = npu.npu_block_sparse_attention(constant_pad_nd, constant_pad_nd1, constant_pad_nd2, to_copy, [128, 128], q_input_layout=BNSD, kv_input_layout=BNSD, scale_value=0.176776695, inner_precise=0)
getitem2: bf16[1, 1, 256, 64] = getitem(npu_block_sparse_attention, 0)
slice: bf16[1, 1, 256, 32] = aten.slice.Tensor(getitem2, 3, 0, 32)
sort1: tuple = aten.sort(getitem)
getitem3: i64[256] = getitem(sort1, 1)
index_select3: bf16[1, 1, 256, 32] = aten.index_select(slice, 2, getitem3)
return [index_select3]""",
    )


# ---------------------------------------------------------------- which kernel an NPU gets


def chosen(monkeypatch, package: bool, torch_npu: bool, kernel: str = "auto") -> str:
    absent = Absent("rain_fusion_attention: none of it is there", "build the wheel")
    monkeypatch.setattr(table, "resolve", lambda name: object() if package else absent)
    monkeypatch.setattr(table, "is_emulated", lambda: not torch_npu)
    options = parse_options({"attention": "rain_fusion_attn", "attention_config": {"kernel": kernel}})
    return sparse_setting(options, "npu").kernel


def test_the_package_s_kernel_comes_first_then_torch_npu_s(monkeypatch):
    assert chosen(monkeypatch, package=True, torch_npu=True) == LISTS
    assert chosen(monkeypatch, package=False, torch_npu=True) == MASK
    assert chosen(monkeypatch, package=True, torch_npu=True, kernel=MASK) == MASK


def test_without_either_the_error_names_both_remedies(monkeypatch):
    with pytest.raises(sgl_npu.OptionsError) as error:
        chosen(monkeypatch, package=False, torch_npu=False)
    assert str(error.value) == (
        "attention = 'rain_fusion_attn': rain_fusion_attention: none of it is there; build the wheel; or "
        "npu_block_sparse_attention: torch_npu does not define it; pip install torch-npu 2.13.0 or newer"
    )


@pytest.mark.parametrize(
    ("kernel", "package", "torch_npu", "missing"),
    [(LISTS, False, True, "none of it is there"), (MASK, True, False, "torch_npu does not define it")],
)
def test_a_kernel_that_is_named_is_never_replaced(monkeypatch, kernel, package, torch_npu, missing):
    with pytest.raises(sgl_npu.OptionsError, match=missing) as error:
        chosen(monkeypatch, package, torch_npu, kernel)
    assert "; or " not in str(error.value)


MISTAKES = [
    (
        {"attention": "rain_fusion_attn", "attention_config": {"kernel": "laser"}},
        "attention_config.kernel = 'laser': input should be 'auto', 'rain_fusion_attention' or 'npu_block_sparse_attention'",
    ),
    (
        {"attention": "block_sparse_attn", "attention_config": {"kernel": MASK}},
        "kernel = 'npu_block_sparse_attention' computes rain fusion; leave kernel out, or set attention to",
    ),
    (
        {"attention": "rain_fusion_attn", "attention_config": {"kernel": MASK}, "platform": "cpu"},
        "kernel = 'npu_block_sparse_attention' is one of NPUs, but platform = 'cpu'; leave kernel out, or set platform",
    ),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=lambda x: x[:20] if isinstance(x, str) else "")
def test_a_mistake_is_one_error(options, message):
    with pytest.raises(sgl_npu.OptionsError) as error:
        parse_options(options)
    assert str(error.value).count(message) == 1, str(error.value)
