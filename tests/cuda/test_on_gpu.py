"""Every row of the CUDA table, whole models and sparse attention, computed on a GPU. Skipped where there is none."""

from fractions import Fraction

import pytest
import torch
from random_attention import Call, check_call, random_call
from sparse.sparse_cases import positions

import sgl_npu
from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sparse.selection import estimated_blocks, pooled_blocks
from sgl_npu.lowering.sparse.setting import BLOCK_SPARSE, LASER, RAIN_FUSION
from sgl_npu.lowering.sparse.tile_order import row_major_order, tiled_order
from sgl_npu.lowering.sparse.token_grid import TokenGrid

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; GPU kernels are judged on fake tensors"),
]
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_gpu(call):
    return Call([x if x is None else x.cuda() for x in call.tensors], call.settings)


def checked(call, lse_used=False, dynamic=False, inner="inductor"):
    """The kernel that a call went to, after its values were held against float64."""
    check_call(on_gpu(call), "cuda", lse_used, dynamic, inner)
    (site,) = sgl_npu.reports()[-1].sites
    return site.kernel


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("part", range(8))
def test_random_calls_are_what_the_formula_says(part):
    """Run op by op: SDPA as torch has it on a GPU, and the reference."""
    for number in range(25):
        checked(random_call(1000 * part + number), lse_used=number % 3 == 0, inner="eager")


def tensors(rows=300, keys=300, heads=4, kv_heads=2, dim=64, dtype=BF16, batch=2):
    shapes = ((rows, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, dim))
    return [torch.randn((batch, *shape), dtype=dtype).transpose(1, 2) for shape in shapes]


BANDS = {
    "no mask": ({}, {}, "sdpa"),
    "causal": ({}, {"upper": 0}, "sdpa"),
    "bottom-right causal": ({"keys": 333}, {"upper": 33}, "sdpa_masked"),
    "window": ({}, {"lower": -70, "upper": 0}, "flex"),
    "window around": ({"rows": 257, "keys": 513}, {"lower": -5, "upper": 130}, "flex"),
    "softcap": ({}, {"softcap": 5.0}, "flex"),
    "softcap, causal, float32": ({"dtype": FP32}, {"softcap": 5.0, "upper": 0}, "flex"),
    "softcap of one query": ({"rows": 1}, {"softcap": 5.0}, "flex"),
    "window, heads of 72": ({"dim": 72, "dtype": FP16}, {"lower": -70, "upper": 0}, "flex"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", BANDS)
def test_a_band_under_inductor(case, dynamic):
    sizes, band, kernel = BANDS[case]
    given = tensors(**sizes)
    call = Call([*given, None, None, None], {"scale": given[0].size(-1) ** -0.5, **band})
    if dynamic and band.keys() & {"lower", "upper"}:
        # Numbers of the program are symbols then, and FlexAttention wants the sides of a band to be none.
        kernel = "reference" if "softcap" in band else "sdpa_masked"
    assert checked(call, dynamic=dynamic) == kernel


def test_masks_biases_and_sinks_under_inductor():
    mask = torch.rand(2, 1, 1, 300) > 0.3
    for extra in ([mask, None, None], [None, torch.randn(4, 300, 300).to(BF16), None], [mask, None, torch.randn(4)]):
        checked(Call([*tensors(), *extra], {"scale": 0.125, "upper": 0}), lse_used=extra[2] is not None)


# ---------------------------------------------------------------- programs


def by_hand(q, k, v):
    rows = torch.arange(q.shape[2], device=q.device)
    mask = torch.zeros(1, 1, *2 * [q.shape[2]], dtype=q.dtype, device=q.device)
    mask = mask.masked_fill(rows > rows[:, None], torch.finfo(q.dtype).min)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * 0.125 + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_one_graph_of_attention_by_hand_serves_every_length(dtype):
    torch._dynamo.reset()
    before = len(sgl_npu.reports())
    run = torch.compile(by_hand, backend="sgl_npu", dynamic=True, options={"strict": True})
    for length in (40, 41, 128, 300, 2048):
        given = [x.cuda() for x in tensors(rows=length, keys=length, dtype=dtype)]
        expected = by_hand(*(x.double() for x in given))
        tolerance = {FP16: 4e-3, BF16: 2e-2, FP32: 1e-5}[dtype]
        torch.testing.assert_close(run(*given).double(), expected, atol=tolerance, rtol=tolerance)
    (report,) = sgl_npu.reports()[before:]
    assert [site.kernel for site in report.sites] == ["sdpa"]


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_gradients(dtype):
    torch._dynamo.reset()
    run = torch.compile(by_hand, backend="sgl_npu", options={"strict": True})
    given = [x.cuda().requires_grad_() for x in tensors(dtype=dtype)]
    weight = torch.randn(300, device="cuda", dtype=dtype)[:, None]
    found = torch.autograd.grad((run(*given) * weight).sum(), given)
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = torch.autograd.grad((by_hand(*exact) * weight).sum(), exact)
    tolerance = 2e-2 if dtype == FP16 else 1e-4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_llama(attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, attn_implementation=attention)
    model = LlamaForCausalLM(config).eval().to("cuda", BF16)
    torch._dynamo.reset()
    run = torch.compile(model, backend="sgl_npu", dynamic=True, options={"strict": True})
    exact = LlamaForCausalLM(config).eval().to("cuda", FP32)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        for length in (40, 77, 200):
            tokens = torch.randint(0, 128, (2, length), device="cuda")
            out, wanted = run(tokens).logits.float(), exact(tokens).logits
            assert (out - wanted).abs().max() <= 2e-2 * max(1.0, wanted.abs().max().item())
    sites = sgl_npu.reports()[-1].sites
    assert [site.kernel for site in sites] == ["sdpa"] * 3, [(site.mask, site.refusals) for site in sites]


# ---------------------------------------------------------------- sparse attention


class SelfAttention(torch.nn.Module):
    def __init__(self, heads=4, kv_heads=2, dim=64):
        super().__init__()
        self.sizes = heads, kv_heads, dim
        self.project = torch.nn.Linear(64, (heads + 2 * kv_heads) * dim, bias=False)
        self.project.weight.data *= 4

    def heads(self, x):
        heads, kv_heads, dim = self.sizes
        return [y.unflatten(-1, (-1, dim)).transpose(1, 2) for y in self.project(x).split(
            (heads * dim, kv_heads * dim, kv_heads * dim), -1)]  # fmt: skip

    def forward(self, x):
        out = torch.nn.functional.scaled_dot_product_attention(*self.heads(x), enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def expected_of(method, module, x, grid, sparsity):
    """Dense attention in float64 to the positions of the blocks that the method selects."""
    query, key, value = (y.contiguous() for y in module.heads(x))
    order = torch.arange(grid.length, device=x.device)
    if method == RAIN_FUSION:
        order = tiled_order(grid, x.device)
    query, key, value = (y[:, :, order] for y in (query, key, value))
    call = AttentionCall(query, key, value, scale=module.sizes[2] ** -0.5)
    allowed = None
    if method != LASER:
        select = pooled_blocks if method == RAIN_FUSION else estimated_blocks
        allowed = positions(select(call, grid, sparsity), grid.length)
        assert not allowed.all()
    given = (y.double() for y in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(*given, allowed, scale=call.scale, enable_gqa=True)
    if method == RAIN_FUSION:
        out = out[:, :, row_major_order(order)]
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("grid", [(3, 30, 52), (5, 16, 32)])
@pytest.mark.parametrize("inner", ["inductor", "eager"])
@pytest.mark.parametrize("method", [LASER, BLOCK_SPARSE, RAIN_FUSION])
def test_sparse_attention_computes_its_blocks(method, inner, grid):
    module = SelfAttention().to("cuda", FP16)
    config = {"latent_shape": grid} | ({} if method == LASER else {"sparsity": 0.7})
    options = {"attention": method, "attention_config": config, "inner": inner, "strict": True}
    torch._dynamo.reset()
    run = torch.compile(module, backend="sgl_npu", options=options, dynamic=False)
    x = torch.randn(2, grid[0] * grid[1] * grid[2], 64, device="cuda", dtype=FP16)
    with torch.no_grad():
        out = run(x)
        wanted = expected_of(method, module, x, TokenGrid(*grid), Fraction(7, 10))
    close = ((out.double() - wanted).abs() <= 4e-3 * (1 + wanted.abs())).float().mean()
    # Scores that tie by rounding may choose another block.
    assert close > (0.999 if method == LASER else 0.97)
    site = sgl_npu.reports()[-1].sites[0]
    assert site.fused
