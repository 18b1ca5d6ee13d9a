# ruff: noqa: E501
"""Split, norm and rotary embedding of query, key and value become one op, however they are written."""

from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F
from rotary_cases import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, NORMS, ROTATIONS, Layer, angles, halves, neighbours
from torch import nn

import sgl_npu

OPTIONS = {"platform": "npu", "inner": "eager", "strict": True}
OP = "sgl_npu.split_qkv_rmsnorm_rope"
LEFT = ("aten.rsqrt", "aten.view_as_complex", "aten.roll", "aten.slice_scatter", "aten.sqrt")


def inputs(batch=2, length=9, dtype=torch.float32):
    return torch.randn(batch, length, HIDDEN, dtype=dtype), torch.arange(length)


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="sgl_npu", options=OPTIONS, **options)


def reported(model, *arguments, tolerance=1e-5):
    """The report of a model whose answer is eager's."""
    model = model.eval()
    before = len(sgl_npu.reports())
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(*arguments), model(*arguments), rtol=tolerance, atol=tolerance)
    (report,) = sgl_npu.reports()[before:]
    return report


def check(model, *arguments, tolerance=1e-5):
    """One fused op for each attention, and eager's answer; returns the report."""
    report = reported(model.to(arguments[0].dtype), *arguments, tolerance=tolerance)
    assert report.graph.count(f"= {OP}(") == len(report.sites) > 0, [site.rotary for site in report.sites]
    assert not [op for op in LEFT if op in report.graph]
    return report


def refusal(model, *arguments):
    """The reason why nothing is fused, where the answer is eager's."""
    report = reported(model, *arguments)
    assert OP not in report.graph
    (site,) = report.sites
    assert site.rotary.startswith("not fused: ")
    return site.rotary.removeprefix("not fused: ")


@pytest.mark.parametrize("heads_first", [True, False], ids=["heads first", "rows first"])
@pytest.mark.parametrize("rotated", [HEAD_DIM, 8], ids=["whole", "partial"])
@pytest.mark.parametrize("name", ROTATIONS)
def test_every_spelling(name, rotated, heads_first):
    report = check(Layer(ROTATIONS[name], rotated=rotated, heads_first=heads_first), *inputs())
    assert name.partition("_")[0] in report.sites[0].rotary


@pytest.mark.parametrize("rotate", [halves, neighbours])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_of_heads(norm, rotate):
    report = check(Layer(rotate, norm), *inputs())
    assert ("RMS norm" in report.sites[0].rotary) == (norm != "none")


@pytest.mark.parametrize("first", [True, False], ids=["heads first", "rows first"])
def test_what_comes_before_a_rotation_stays_before_it(first):
    """A layer norm here, and a scale."""

    def rotate(x, angle):
        return halves(F.layer_norm(x, (HEAD_DIM,)) * 0.5, angle)

    report = check(Layer(rotate, heads_first=first), *inputs())
    assert report.graph.count("aten.native_layer_norm") == 2


@pytest.mark.parametrize("first", [True, False], ids=["heads first", "rows first"])
def test_heads_that_were_written_to_in_place_are_heads(first):
    """As OLMo clips them: autograd's functionalization views them anew wherever they are read."""

    def rotate(x, angle):
        return halves(x.clamp_(-1.0, 1.0), angle)

    check(Layer(rotate, heads_first=first), *inputs())


def test_a_scale_behind_a_rotation_stays_behind_it():
    def rotate(x, angle):
        return halves(x, angle) * 0.5

    check(Layer(rotate, heads_first=False), *inputs())


def test_the_report_says_what_is_fused_and_what_is_not():
    with torch.no_grad():
        texts = [
            str(sgl_npu.explain(model.eval(), *inputs(), options=OPTIONS))
            for model in (Layer(rotated=8), REFUSED["turned back"][0], REFUSED["nothing"][0])
        ]
    assert "split, rotary embedding (halves) of 8 of 16 channels" in texts[0]
    assert "not fused: query and key are rotated differently" in texts[1]
    assert "before the attention" not in texts[2]


def test_a_norm_of_all_heads_stays_before_it():
    report = reported(Layer(norm="llama", whole_norm=True), *inputs())
    assert report.sites[0].rotary == "split, rotary embedding (halves)"
    assert report.graph.count("aten.rsqrt") == 2


@pytest.mark.parametrize("norm", ["none", "llama"])
@pytest.mark.parametrize("projection", ["separate", "packed", "alternating"])
def test_every_layout_of_the_projection(projection, norm):
    kv_heads = HEADS if projection == "alternating" else KV_HEADS
    report = check(Layer(norm=norm, projection=projection, kv_heads=kv_heads), *inputs())
    joined = [line for line in report.graph.splitlines() if "aten.cat" in line and f", {3 * HEADS * HEAD_DIM}]" in line]
    assert projection != "packed" or not joined


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("norm", ["none", "llama"])
def test_every_number_of_key_heads(kv_heads, norm):
    check(Layer(norm=norm, kv_heads=kv_heads), *inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype):
    check(Layer(norm="llama"), *inputs(dtype=dtype), tolerance=2e-2)


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 7), (3, 1)])
def test_sizes_of_one(batch, length):
    check(Layer(norm="llama"), *inputs(batch, length))


@pytest.mark.parametrize("name", ["halves", "neighbours", "neighbours_complex"])
def test_positions_of_each_sample(name):
    x, positions = inputs()
    check(Layer(ROTATIONS[name]), x, torch.stack([positions, positions + 5]))


@pytest.mark.parametrize("name", ["halves", "neighbours_complex"])
def test_one_graph_for_every_length_and_batch(name):
    model = Layer(ROTATIONS[name], "llama").eval()
    function = compiled(model, dynamic=True)
    before = len(sgl_npu.reports())
    with torch.no_grad():
        for batch, length in ((2, 9), (3, 16), (5, 40)):
            x, positions = inputs(batch, length)
            torch.testing.assert_close(function(x, positions), model(x, positions), rtol=1e-5, atol=1e-5)
    (report,) = sgl_npu.reports()[before:]
    assert report.sites[0].rotary.startswith("split, RMS norm, rotary embedding")


def test_an_eps_that_changes_is_compiled_again():
    """dynamic=True makes an input of it, and the kernel wants a number."""
    model, (x, positions) = Layer(norm="llama").eval(), inputs()
    function = compiled(model, dynamic=True)
    with torch.no_grad():
        for eps in (1e-5, 0.5):
            model.norms[0].eps = model.norms[1].eps = eps
            torch.testing.assert_close(function(x, positions), model(x, positions), rtol=1e-5, atol=1e-5)


class Layers(nn.Module):
    """Every layer computes its cosines and sines anew."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(norm="llama") for _ in range(count)])
        self.back = nn.ModuleList([nn.Linear(HEADS * HEAD_DIM, HIDDEN) for _ in range(count)])

    def forward(self, x, positions):
        for layer, back in zip(self.layers, self.back, strict=True):
            x = x + back(layer(x, positions))
        return x


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_tables_are_computed_once_for_all_layers(dynamic):
    model, (x, positions) = Layers(3).eval(), inputs()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(positions, 0)
    report = check(model, x, positions)
    assert [report.graph.count(f"aten.{op}(") for op in ("cos", "sin")] == [1, 1]
    calls = [line.partition(f"{OP}(")[2].split(", ") for line in report.graph.splitlines() if f"= {OP}(" in line]
    assert len({(call[1], call[2]) for call in calls}) == 1


class Decoder(nn.Module):
    """One token behind those of a cache."""

    def __init__(self, static: bool) -> None:
        super().__init__()
        self.layer, self.static = Layer(norm="llama"), static

    def forward(self, x, positions, keys, values):
        query, key, value = self.layer.heads(x)
        query, key = (norm(part) for norm, part in zip(self.layer.norms, (query, key), strict=True))
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        angle = angles(positions, HEAD_DIM)
        query, key = halves(query, angle), halves(key, angle)
        if self.static:
            keys, values = keys.index_copy(2, positions, key), values.index_copy(2, positions, value)
            mask = torch.arange(keys.shape[2]) <= positions[:, None]
        else:
            keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
            mask = None
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        return out, keys, values


@pytest.mark.parametrize("static", [True, False], ids=["static cache", "growing cache"])
def test_keys_are_found_behind_a_cache(static):
    cache = [torch.randn(2, KV_HEADS, 12, HEAD_DIM) for _ in range(2)]
    check(Decoder(static), torch.randn(2, 1, HIDDEN), torch.tensor([7]), *cache)


class TestGolden(expecttest.TestCase):
    def test_a_packed_projection(self):
        torch.manual_seed(0)
        model = Layer(norm="llama", projection="packed").eval()
        with torch.no_grad():
            report = sgl_npu.explain(model, *inputs(), options=OPTIONS)
        self.assertExpectedInline(
            report.graph,
            """\
input: f32[2, 9, 48]
input1: f32[128, 48]
input2: f32[128]
input3: f32[16]
input4: f32[16]
input5: i64[9]
view: f32[18, 48] = aten.view(input, [18, 48])
t: f32[48, 128] = aten.t(input1)
addmm: f32[18, 128] = aten.addmm(input2, view, t)
arange: f32[8] = aten.arange.start_step(0, 16, 2, dtype=float32, device=cpu, pin_memory=False)
div: f32[8] = aten.div.Tensor(arange, 16)
pow: f32[8] = aten.pow.Scalar(100, div)
reciprocal: f32[8] = aten.reciprocal(pow)
mul: f32[8] = aten.mul.Tensor(reciprocal, 1)
to_copy: f32[9] = aten._to_copy(input5, dtype=float32)
unsqueeze: f32[9, 1] = aten.unsqueeze(to_copy, 1)
mul1: f32[9, 8] = aten.mul.Tensor(unsqueeze, mul)
unsqueeze1: f32[1, 9, 8] = aten.unsqueeze(mul1, -3)
cat: f32[1, 9, 16] = aten.cat([unsqueeze1, unsqueeze1], -1)
cos: f32[1, 9, 16] = aten.cos(cat)
squeeze: f32[9, 16] = aten.squeeze.dim(cos, -3)
unsqueeze2: f32[9, 1, 16] = aten.unsqueeze(squeeze, -2)
sin: f32[1, 9, 16] = aten.sin(cat)
squeeze1: f32[9, 16] = aten.squeeze.dim(sin, -3)
unsqueeze3: f32[9, 1, 16] = aten.unsqueeze(squeeze1, -2)
view1: f32[1, 9, 16] = aten.view(unsqueeze2, [1, 9, -1])
expand: f32[2, 9, 16] = aten.expand(view1, [2, 9, 16])
clone: f32[2, 9, 16] = aten.clone(expand, memory_format=contiguous_format)
unsafe_view: f32[18, 16] = aten._unsafe_view(clone, [18, 16])
view2: f32[1, 9, 16] = aten.view(unsqueeze3, [1, 9, -1])
expand1: f32[2, 9, 16] = aten.expand(view2, [2, 9, 16])
clone1: f32[2, 9, 16] = aten.clone(expand1, memory_format=contiguous_format)
unsafe_view1: f32[18, 16] = aten._unsafe_view(clone1, [18, 16])
split_qkv_rmsnorm_rope: tuple = sgl_npu.split_qkv_rmsnorm_rope(addmm, unsafe_view1, unsafe_view, 64, 32, 16, 1e-05, input3, input4)
getitem: f32[18, 64] = getitem(split_qkv_rmsnorm_rope, 0)
getitem1: f32[18, 32] = getitem(split_qkv_rmsnorm_rope, 1)
getitem2: f32[18, 32] = getitem(split_qkv_rmsnorm_rope, 2)
view3: f32[2, 9, 4, 16] = aten.view(getitem, [2, 9, 4, 16])
view4: f32[2, 9, 2, 16] = aten.view(getitem1, [2, 9, 2, 16])
view5: f32[2, 9, 2, 16] = aten.view(getitem2, [2, 9, 2, 16])
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fusion_attention_v3: tuple = npu.npu_fusion_attention_v3(view3, view4, view5, 4, BSND, None, None, triu, 0.25, 1, 2147483647, 2147483647, 0, None, None, None, 2)
getitem3: f32[2, 9, 4, 16] = getitem(npu_fusion_attention_v3, 0)
view6: f32[2, 9, 64] = aten.view(getitem3, [2, 9, 64])
return [view6]""",
        )


# What must not be rewritten


def with_rotation(rotate_query, rotate_key=None):
    class Other(Layer):
        def forward(self, x, positions):
            query, key, value = (part.transpose(1, 2) for part in self.heads(x))
            angle = angles(positions, HEAD_DIM)
            query, key = rotate_query(query, angle), (rotate_key or rotate_query)(key, angle)
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return Other()


def mirrored(x, angle):
    """Channels c and D - 1 - c."""
    cos, sin = torch.cat((angle, angle.flip(-1)), -1).cos(), torch.cat((-angle, angle.flip(-1)), -1).sin()
    return x * cos + x.flip(-1) * sin


def deinterleaved(x, angle):
    x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return halves(x, angle)


def of_the_end(x, angle):
    return torch.cat((x[..., :8], halves(x[..., 8:], angle[..., :4])), -1)


REFUSED = {
    "pairs from both ends": (with_rotation(mirrored), "neither half a head apart nor neighbours"),
    "permuted channels": (with_rotation(deinterleaved), "its channels are permuted"),
    "the last channels": (with_rotation(of_the_end), "not rotated in pairs from the first on"),
    "scaled channels": (
        with_rotation(lambda x, a: halves(x * torch.arange(1.0, HEAD_DIM + 1), a)),
        "scaled where they are used",
    ),
    "turned back": (with_rotation(halves, lambda x, a: halves(x, -a)), "query and key are rotated differently"),
    "halves and neighbours": (with_rotation(halves, neighbours), "query and key are rotated differently"),
    "keys as they are": (with_rotation(halves, lambda x, a: x), "key: it is not rotated"),
    "nothing": (with_rotation(lambda x, a: x), "query: it is not rotated"),
    "a norm afterwards": (
        with_rotation(lambda x, a: F.rms_norm(halves(x, a), (HEAD_DIM,), eps=1e-5)),
        "it is normalised after it is rotated",
    ),
    "a norm of half the channels": (
        with_rotation(lambda x, a: halves(torch.cat([F.rms_norm(x[..., :8], (8,), eps=1e-5), x[..., 8:]], -1), a)),
        "several projections",
    ),
    "other eps": (
        with_rotation(
            lambda x, a: halves(F.rms_norm(x, (HEAD_DIM,), eps=0.5), a),
            lambda x, a: halves(F.rms_norm(x, (HEAD_DIM,), eps=0.25), a),
        ),
        "eps = 0.5 and 0.25",
    ),
    "a product of rotations": (
        with_rotation(lambda x, a: halves(halves(x, a), a)),
        "its channels are not those of one head",
    ),
    "an angle for each head": (
        with_rotation(lambda x, a: halves(x, a * torch.arange(1, x.shape[1] + 1)[:, None, None])),
        "it is not rotated",
    ),
    "heads of an odd size": (Layer(head_dim=24, rotated=24), "head_dim = 24 is not a power of two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_alone(case):
    model, reason = REFUSED[case]
    assert reason in refusal(model, *inputs())


def test_other_platforms_leave_it_to_their_compiler():
    with torch.no_grad():
        report = sgl_npu.explain(Layer(), *inputs(), options={"platform": "cpu", "inner": "eager"})
    assert OP not in report.graph and report.sites[0].rotary == ""


def test_a_graph_that_is_differentiated_is_left_alone():
    model, (x, positions) = Layer(norm="llama"), inputs()
    expected = torch.autograd.grad(model(x, positions).sum(), model.linears[0].weight)[0]
    result = torch.autograd.grad(compiled(model)(x, positions).sum(), model.linears[0].weight)[0]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
