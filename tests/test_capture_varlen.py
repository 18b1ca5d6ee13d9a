"""torch.nn.attention.varlen: captured before AOTAutograd, right on platforms that torch has no kernel for."""

import pytest
import torch
from compiled_report import compile_for, only_site
from packed_cases import formula, packed

import sgl_npu

varlen = pytest.importorskip("torch.nn.attention.varlen")

BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCES = {BF16: 2e-2, FP32: 2e-5}
SELF = [(5, 5), (9, 9), (1, 1), (20, 20)]
CROSS = [(5, 9), (3, 3), (1, 12)]
WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "window": (3, 0), "both sides": (2, 1), "left side": (4, -1)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def starts(ends):
    return torch.tensor([0, *ends], dtype=torch.int32)


def run_of(window, same):
    def run(query, key, value, cu_q, cu_k):
        lengths = (cu_q, cu_q) if same else (cu_q, cu_k)
        out, lse = varlen.varlen_attn(
            query + 1, key, value, *lengths, 64, 64, window_size=window, enable_gqa=True,
            return_aux=varlen.AuxRequest(lse=True),
        )  # fmt: skip
        return out * 2, lse

    return run


def check(compiled, lengths, window, dtype, padding=0):
    query, key, value, ends, kv_ends = packed(lengths, dtype=dtype)
    query, key, value = (torch.cat([x, torch.randn(padding, *x.shape[1:], dtype=dtype)]) for x in (query, key, value))
    with torch.no_grad():
        out, lse = compiled(query, key, value, starts(ends), starts(kv_ends))
    expected, expected_lse = formula(query + 1, key, value, lengths, window_size=window)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out[: ends[-1]].double(), 2 * expected, atol=2 * tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.T[: ends[-1]].double(), expected_lse, atol=tolerance, rtol=tolerance)
    assert out.is_contiguous()
    return out[ends[-1] :]


@pytest.mark.parametrize("platform, dtype", [("npu", BF16), ("cpu", FP32)])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("same", [True, False], ids=["self", "cross"])
def test_documents_are_kept_apart(same, window, platform, dtype):
    lengths = SELF if same else CROSS
    compiled = compile_for(run_of(WINDOWS[window], same), platform)
    check(compiled, lengths, WINDOWS[window], dtype)
    site = only_site(sgl_npu.reports()[-1:])
    assert (site.spelling, site.fused) == ("varlen_attn", True), site.refusals
    assert (site.kernel == "ascend_packed") == (same and platform == "npu")
    assert ("causal" in site.mask) == (same and window == "causal")


def test_one_graph_serves_all_lengths_of_as_many_documents():
    compiled, before = compile_for(run_of((-1, 0), True), dynamic=True), len(sgl_npu.reports())
    for lengths in (SELF, [(4, 4), (30, 30), (2, 2), (7, 7)], [(1, 1), (2, 2), (3, 3), (4, 4)]):
        check(compiled, lengths, (-1, 0), BF16)
    assert len(sgl_npu.reports()) - before == 1


@pytest.mark.parametrize("platform, dtype", [("npu", BF16), ("npu", FP32), ("cpu", FP32)])
def test_tokens_behind_the_last_document_are_in_none(platform, dtype):
    """torch leaves their rows undefined; where the documents are a mask they are 0."""
    rest = check(compile_for(run_of((-1, 0), True), platform), SELF, (-1, 0), dtype, padding=6)
    assert rest.isfinite().all() and (dtype == BF16 or not rest.any())


def test_the_lengths_go_to_the_op_as_a_list():
    check(compile_for(run_of((-1, 0), True)), SELF, (-1, 0), BF16)
    graph = sgl_npu.reports()[-1].graph
    assert graph.count("sgl_npu.length_at(") == len(SELF)
    assert "actual_seq_lengths=[length_at, length_at1, length_at2, length_at3, 35]" in graph
    assert "input_layout=TND" in graph and "sparse_mode=3" in graph and "[35, 35]" not in graph


def test_lengths_that_the_model_computes_are_a_mask():
    """Only what comes from outside can be read before a captured graph runs."""

    def run(query, key, value, cu_q, cu_k):
        return run_of((-1, 0), True)(query, key, value, cu_q + 0, cu_k)

    check(compile_for(run), SELF, (-1, 0), BF16)
    site = only_site(sgl_npu.reports()[-1:])
    assert site.kernel == "ascend_fa" and site.mask.startswith("causal & ")


def test_training_goes_through_the_mask_and_has_gradients():
    query, key, value, ends, _ = packed(SELF, dtype=FP32)
    given = [x.requires_grad_() for x in (query, key, value)]
    out, _ = compile_for(run_of((-1, 0), True))(*given, starts(ends), starts(ends))
    found = torch.autograd.grad(out.square().sum(), given)
    expected = torch.autograd.grad((2 * formula(query + 1, key, value, SELF, causal=True)[0]).square().sum(), given)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


def test_what_is_paged_by_tensors_is_left_to_torch_and_says_what_to_use():
    """torch has no kernel for it here, and says so."""

    def run(query, cache, cu, used, table):
        return varlen.varlen_attn(query, cache, cache, cu, None, 1, 64, seqused_k=used, block_table=table)

    query, cache = torch.randn(2, 2, 64, dtype=BF16), torch.randn(3, 16, 2, 64, dtype=BF16)
    table, used = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError), torch.no_grad():
        compile_for(run)(query, cache, starts([1, 2]), used, table)
    site = only_site(sgl_npu.reports()[-1:])
    assert site.refusals[0][1].endswith("sgl_npu.ops.attention takes lists of lengths")
