"""Attention that its user names through a matcher: used when it is consistent, refused with a reason when it is not."""

import operator
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compiled_report import TOLERANCES, assert_same, compile_for, compiled, count, only_site
from page_code import code_blocks

import sgl_npu
from sgl_npu import AttentionPattern, register_matcher

B, S, H, D = 2, 16, 4, 32
PLATFORMS = {"cpu": torch.float32, "npu": torch.bfloat16}
DOCUMENT = Path(__file__).parent.parent / "docs" / "matchers.md"


@torch.library.custom_op("sgl_npu_tests::flash", mutates_args=())
def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offset: int, layout: str) -> torch.Tensor:
    """Causal from the bottom right, `offset` keys later."""
    q, k, v = (x if layout == "BNSD" else x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(offset)
    out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    out = out if layout == "BNSD" else out.transpose(1, 2)
    return (out.flatten(2) if layout == "BSH" else out).contiguous()


@flash.register_fake
def _(q, k, v, offset, layout):
    return q.new_empty(*q.shape[:2], q.size(2) * q.size(3)) if layout == "BSH" else q.new_empty(q.shape)


@torch.library.custom_op("sgl_npu_tests::flash_lse", mutates_args=())
def flash_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return F.scaled_dot_product_attention(q, k, v), q.new_zeros(q.shape[:-1])


@flash_lse.register_fake
def _(q, k, v):
    return torch.empty_like(q), q.new_empty(q.shape[:-1])


FLASH, FLASH_LSE = torch.ops.sgl_npu_tests.flash.default, torch.ops.sgl_npu_tests.flash_lse.default


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensors(layout="BNSD", rows=S, keys=S, kv_heads=H, dtype=torch.float32):
    shapes = ((B, rows, H, D), (B, keys, kv_heads, D), (B, keys, kv_heads, D))
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [x.transpose(1, 2).contiguous() for x in made] if layout == "BNSD" else made


def known_flash(node):
    if node.target is FLASH:
        q, k, v, offset, layout = node.args
        operands = "BNSD" if layout == "BNSD" else "BSND"
        return AttentionPattern(q, k, v, upper=offset, layout=operands, output=layout)
    return None


def matched(matcher, function, *args, **options):
    with register_matcher(matcher):
        return compiled(function, *args, **options)[-1]


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("layout", ("BNSD", "BSND", "BSH"))
@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_op_of_a_library_is_a_site_in_every_layout(platform, layout, dynamic):
    def attend(*args):
        q, k, v = (x.unflatten(-1, (H, D)) for x in args)
        q, k, v = (x.transpose(1, 2).contiguous() if layout == "BNSD" else x for x in (q, k, v))
        return FLASH(q, k, v, 0, layout) * 2

    args = [x.flatten(2) for x in tensors("BSND", dtype=PLATFORMS[platform])]
    report = matched(known_flash, attend, *args, platform=platform, dynamic=dynamic)
    site = only_site([report])
    assert (site.mask, site.fused, site.spelling) == ("causal", True, "matcher known_flash")
    assert site.source.startswith("test_user_match.py") and count(report, "sgl_npu_tests.flash") == 0


def test_layouts_are_absorbed():
    def attend(q, k, v):
        return FLASH(q, k, v, 0, "BSND")

    report = matched(known_flash, attend, *tensors("BSND", dtype=torch.bfloat16))
    assert [count(report, f"aten.{op}") for op in ("transpose", "permute", "clone")] == [0, 0, 0]
    assert "input_layout=BSND" in report.graph


def test_grouped_heads_and_a_band_from_sizes():
    def attend(q, k, v):
        q, k, v = (x.unflatten(-1, (heads, D)) for x, heads in ((q, H), (k, 2), (v, 2)))
        return FLASH(q, k, v, k.size(1) - q.size(1), "BSND")

    args = [x.flatten(2) for x in tensors("BSND", rows=5, keys=20, kv_heads=2)]
    site = only_site([matched(known_flash, attend, *args, dynamic=True)])
    assert site.fused and site.key[1] == "2" and site.mask == "causal (bottom-right)"


def test_masks_biases_scales_softcaps_and_sinks_are_used():
    def attend(q, k, v, mask, bias, sinks):
        out, _ = FLASH_LSE(q, k, v)
        return out + 0 * (mask.sum() + bias.sum() + sinks.sum())

    def named(node):
        if node.target is not operator.getitem or node.args[0].target is not FLASH_LSE or node.args[1] != 0:
            return None
        mask, bias, sinks = (
            x for x in node.graph.find_nodes(op="placeholder") if x.meta["val"].shape != q.shape
        )  # fmt: skip
        return AttentionPattern(*node.args[0].args, mask=mask, bias=bias, sinks=sinks, scale=0.3, softcap=5.0)

    q, k, v = tensors()
    extra = torch.rand(S, S) > 0.3, torch.randn(H, S, S), torch.randn(H)
    with register_matcher(named), torch.no_grad():
        got = compile_for(attend, "cpu")(q, k, v, *extra)
        expected, _ = torch.ops.sgl_npu.attention(q, k, v, *extra, scale=0.3, softcap=5.0)
    torch.testing.assert_close(got, expected, atol=TOLERANCES[got.dtype], rtol=TOLERANCES[got.dtype])


def test_the_mask_of_a_pattern_is_proved():
    def attend(q, k, v):
        positions = torch.arange(q.size(2))
        keep = positions[None] <= positions[:, None]
        return torch.where(keep[0, 0], FLASH(q, k, v, 0, "BNSD"), 0)

    def named(node):
        if node.target is not FLASH:
            return None
        (keep,) = (x for x in node.graph.nodes if x.target is torch.ops.aten.le.Tensor)
        return AttentionPattern(*node.args[:3], mask=keep)

    assert only_site([matched(named, attend, *tensors())]).mask == "causal"


def test_without_a_matcher_the_op_stays():
    def attend(q, k, v):
        return FLASH(q, k, v, 0, "BNSD")

    with register_matcher(known_flash) as handle:
        handle.remove()
        handle.remove()
        report = compiled(attend, *tensors())[-1]
    assert report.sites == [] and count(report, "sgl_npu_tests.flash") == 1


def test_the_first_matcher_that_answers_counts():
    def second(node):
        raise AssertionError if node.target is FLASH else None

    def attend(q, k, v):
        return FLASH(q, k, v, 0, "BNSD")

    with register_matcher(known_flash):
        assert matched(lambda node: None, attend, *tensors()).sites[0].spelling == "matcher known_flash"


def test_training_keeps_the_op():
    def attend(q, k, v):
        return F.relu(FLASH_LSE(q, k, v)[0] @ weight)

    weight = torch.randn(D, D, requires_grad=True)
    with register_matcher(lambda node: pytest.fail("asked")):
        compile_for(attend)(*tensors())


# ---------------------------------------------------------------- refusals


def pattern(**changes):
    """A matcher that says of FLASH what it is, but for `changes`, functions of its node."""

    def matcher(node):
        if node.target is not FLASH:
            return None
        fields = {"query": node.args[0], "key": node.args[1], "value": node.args[2], "upper": 0}
        return AttentionPattern(**{**fields, **{name: change(node) for name, change in changes.items()}})

    return matcher


def other(shape, **like):
    """A node of another shape, which the model computes beforehand."""
    return lambda node: next(x for x in node.graph.nodes if getattr(x.meta["val"], "shape", None) == shape)


REFUSALS = {
    "rank": ({"query": other((7,))}, "query has 1 dimensions, not the four of BNSD"),
    "D": ({"key": other((B, H, S, 3))}, "D of query and key: 32 and 3 are not known to be equal"),
    "heads": ({"key": other((B, 3, S, D)), "value": other((B, 3, S, D))}, "4 query heads are no multiple of 3 key"),
    "mask dtype": ({"mask": other((S, S))}, "mask is torch.float32: should be torch.bool"),
    "bias shape": ({"bias": other((7,))}, "bias (7) does not broadcast to (2, 4, 16, 16)"),
    "sinks": ({"sinks": other((7,))}, "sinks (7) is not one number for each of 4 heads"),
    "output": ({"output": lambda _: "BSH"}, "the attention's output is (2, 16, 128)"),
    "order": ({"query": lambda node: node.next}, "does not come before"),
    "size": ({"upper": lambda node: node.args[0]}, "is no size"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_pattern_that_cannot_be_is_refused_with_its_reason(case):
    changes, reason = REFUSALS[case]

    def attend(q, k, v):
        extra = q[0, 0, :7, 0].sin().sum() + (
            q[..., :3].sin().sum() + q[:, :3].sin().sum() + q[0, 0, :, :S].sin().sum()
        )
        return FLASH(q, k, v, 0, "BNSD").sin() + extra

    report = matched(pattern(**changes), attend, *tensors())
    site = only_site([report])
    assert count(report, "sgl_npu_tests.flash") == 1 and not site.fused
    assert site.refusals[0][0] == "user_match" and reason in site.refusals[0][1]


@pytest.mark.parametrize(
    "fields, error",
    (
        ({"query": 3}, "query = 3 should be a node"),
        ({"scale": "x"}, "scale = 'x' should be a number"),
        ({"upper": 0.5}, "upper = 0.5 should be an int or a node"),
        ({"layout": "SBH"}, "layout = 'SBH'"),
        ({"output": "BHD"}, "output = 'BHD'"),
    ),
)
def test_a_pattern_checks_its_fields(fields, error):
    node = torch.fx.Graph().placeholder("x")
    with pytest.raises((TypeError, ValueError), match=error):
        AttentionPattern(**{"query": node, "key": node, "value": node, **fields})


def attend_plainly(q, k, v):
    return FLASH(q, k, v, 0, "BNSD")


def failing(node):
    raise KeyError("on purpose")


def test_a_matcher_that_raises_breaks_nothing():
    args, calls = tensors(), []

    def counting(node):
        calls.append(node)
        return failing(node)

    torch._dynamo.reset()
    with register_matcher(counting), torch.no_grad(), pytest.warns(UserWarning, match="matcher 'counting' failed on"):
        got = torch.compile(lambda q, k, v: attend_plainly(q, k, v).sin(), backend="sgl_npu")(*args)
    assert_same(got, attend_plainly(*args).sin())
    assert len(calls) == 1


def test_a_matcher_that_raises_is_an_error_where_strict():
    with register_matcher(failing), torch.no_grad(), pytest.raises(Exception, match="on purpose"):
        compile_for(attend_plainly)(*tensors())


@pytest.mark.parametrize("strict", (False, True))
def test_another_return_type_is_an_error(strict):
    torch._dynamo.reset()
    with register_matcher(lambda node: node.args), torch.no_grad():
        run = torch.compile(attend_plainly, backend="sgl_npu", options={"strict": strict})
        with pytest.raises(TypeError, match=r"it should return a sgl_npu\.AttentionPattern, or None"):
            run(*tensors())


def test_only_functions_are_registered():
    with pytest.raises(TypeError, match="register_matcher: 3 cannot be called"):
        register_matcher(3)


# ---------------------------------------------------------------- elsewhere


def test_programs_of_torch_export_are_asked_too():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attend_plainly(q, k, v)

    args = tensors(dtype=torch.bfloat16)
    with register_matcher(known_flash):
        result = sgl_npu.rewrite(torch.export.export(Model(), tuple(args)), {"platform": "npu", "strict": True})
    assert sgl_npu.reports()[-1].sites[0].mask == "causal"
    assert_same(result.module()(*args), attend_plainly(*args))


def test_the_document_runs():
    blocks = code_blocks(DOCUMENT)
    names = {}
    q, k, v = tensors("BSND", dtype=torch.bfloat16)
    try:
        exec(blocks[0], names)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            got = names["compiled"](q, k, v)
        site = only_site(sgl_npu.reports()[-1:])
        assert (site.op, site.mask) == ("npu.npu_fused_infer_attention_score", "causal")
        assert_same(got, names["attend"](q, k, v))
        exec(blocks[1], names)
    finally:
        names["match_flash_attn"].remove()
