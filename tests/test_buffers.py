# ruff: noqa: E501
"""Masks kept as buffers are proved from their values, and a changed buffer never gives a wrong answer."""

import math
import warnings
import weakref

import compiled_report
import pytest
import torch
import torch.nn.functional as F
from compiled_report import assert_same, compiled, only_site
from expecttest import assert_expected_inline
from torch import nn

import sgl_npu
from sgl_npu.passes.buffer_forms import Band, Constant, Positions, recognise

compile_for = compiled_report.compile_for

WIDTH, HEADS, LONGEST = 32, 4, 64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Attention(nn.Module):
    """nanoGPT's attention, its mask in a buffer."""

    def __init__(self, mask):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", mask)

    def masked(self, scores, mask):
        return scores.masked_fill(mask == 0, float("-inf"))

    def attend(self, q, k, v):
        rows, keys = q.size(2), k.size(2)
        mask = self.bias[..., keys - rows : keys, :keys]
        return F.softmax(self.masked((q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1))), mask), dim=-1) @ v

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (y.view(batch, length, HEADS, -1).transpose(1, 2) for y in self.c_attn(x).split(width, dim=2))
        y = self.attend(q, k, v)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class Chosen(Attention):
    """GPT-2's: where on a bool mask."""

    def masked(self, scores, mask):
        return torch.where(mask.bool(), scores, torch.full([], torch.finfo(scores.dtype).min))


class Added(Attention):
    """Whisper's and CLIP's: 0 and -inf, added."""

    def masked(self, scores, mask):
        return scores + mask


class Sdpa(Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, self.bias[..., : q.size(2), : k.size(2)])


class Compared(Attention):
    """BERT's buffer: positions, compared."""

    def masked(self, scores, mask):
        positions = self.bias[:, : scores.size(-1)]
        return scores.masked_fill(positions[:, None, None, :] > positions[:, None, :, None], float("-inf"))


def tril(dtype=torch.float32, longest=LONGEST):
    return torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest).to(dtype)


def negative(longest=LONGEST):
    return torch.full((longest, longest), float("-inf")).triu(1)


def positions():
    return torch.arange(LONGEST).expand(1, -1)


def window():
    return tril().bool() & ~tril().bool().tril(-8)


def inputs(length=16):
    return torch.randn(2, length, WIDTH)


CASES = {
    "nanogpt": (Attention, tril, "causal"),
    "bool": (Attention, lambda: tril(torch.bool), "causal"),
    "bytes": (Attention, lambda: tril(torch.uint8), "causal"),
    "half": (Attention, lambda: tril(torch.float16), "causal"),
    "where": (Chosen, lambda: tril(torch.bool), "causal"),
    "window": (Chosen, window, "band(-7, 0)"),
    "all": (Chosen, lambda: torch.ones_like(tril(torch.bool)), "full"),
    "added": (Added, negative, "causal"),
    "sdpa": (Sdpa, lambda: tril(torch.bool), "causal"),
    "sdpa added": (Sdpa, negative, "causal"),
    "sdpa added 4-D": (Sdpa, lambda: negative().expand(1, HEADS, -1, -1), "causal"),
    "positions": (Compared, positions, "causal"),
}


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("case", CASES)
def test_a_mask_in_a_buffer_is_a_band_and_no_tensor_is_left(case, dynamic):
    module, mask, meaning = CASES[case]
    model, length = module(mask()).eval(), 16
    reports = compiled(model, inputs(length), dynamic=dynamic)
    site = only_site(reports)
    assert (site.mask, site.guards, site.fused) == (meaning, ["bias"], True)
    assert f"{length}, {length}]" not in reports[0].graph and "s27, s27]" not in reports[0].graph
    assert "aten.arange" not in reports[0].graph


def test_golden():
    model = Attention(tril()).eval().to(torch.bfloat16)
    report = compiled(model, inputs().bfloat16())[0]
    assert_expected_inline(
        report.graph,
        """\
input: bf16[2, 16, 32]
input1: bf16[96, 32]
input2: bf16[96]
input3: bf16[1, 1, 64, 64]
input4: bf16[32, 32]
input5: bf16[32]
view: bf16[32, 32] = aten.view(input, [32, 32])
t: bf16[32, 96] = aten.t(input1)
addmm: bf16[32, 96] = aten.addmm(input2, view, t)
view1: bf16[2, 16, 96] = aten.view(addmm, [2, 16, 96])
split: tuple = aten.split.Tensor(view1, 32, 2)
getitem: bf16[2, 16, 32] = getitem(split, 0)
getitem1: bf16[2, 16, 32] = getitem(split, 1)
getitem2: bf16[2, 16, 32] = getitem(split, 2)
view2: bf16[2, 16, 4, 8] = aten.view(getitem, [2, 16, 4, -1])
transpose: bf16[2, 4, 16, 8] = aten.transpose.int(view2, 1, 2)
view3: bf16[2, 16, 4, 8] = aten.view(getitem1, [2, 16, 4, -1])
transpose1: bf16[2, 4, 16, 8] = aten.transpose.int(view3, 1, 2)
view4: bf16[2, 16, 4, 8] = aten.view(getitem2, [2, 16, 4, -1])
transpose2: bf16[2, 4, 16, 8] = aten.transpose.int(view4, 1, 2)
constant_pad_nd: bf16[2, 4, 16, 16] = aten.constant_pad_nd(transpose, [0, 8], 0)
constant_pad_nd1: bf16[2, 4, 16, 16] = aten.constant_pad_nd(transpose1, [0, 8], 0)
constant_pad_nd2: bf16[2, 4, 16, 16] = aten.constant_pad_nd(transpose2, [0, 8], 0)
ones: b8[2048, 2048] = aten.ones([2048, 2048], dtype=bool, device=cpu, pin_memory=False)
triu: b8[2048, 2048] = aten.triu(ones, 1)
npu_fused_infer_attention_score: tuple = npu.npu_fused_infer_attention_score(constant_pad_nd, constant_pad_nd1, constant_pad_nd2, atten_mask=triu, num_heads=4, scale=0.353553391, input_layout=BNSD, num_key_value_heads=4, sparse_mode=2)
getitem3: bf16[2, 4, 16, 16] = getitem(npu_fused_infer_attention_score, 0)
slice: bf16[2, 4, 16, 8] = aten.slice.Tensor(getitem3, 3, 0, 8)
permute: bf16[2, 16, 4, 8] = aten.permute(slice, [0, 2, 1, 3])
clone: bf16[2, 16, 4, 8] = aten.clone(permute, memory_format=contiguous_format)
view5: bf16[32, 32] = aten.view(clone, [32, 32])
t1: bf16[32, 32] = aten.t(input4)
addmm1: bf16[32, 32] = aten.addmm(input5, view5, t1)
view6: bf16[2, 16, 32] = aten.view(addmm1, [2, 16, 32])
return [view6]""",
    )


def test_one_graph_serves_every_length():
    model = Attention(tril()).eval()
    fast = compile_for(model, dynamic=True)
    before = len(sgl_npu.reports())
    for length in (16, 3, 40):
        x = inputs(length)
        with torch.no_grad():
            assert_same(fast(x), model(x))
    assert len(sgl_npu.reports()) == before + 1


class Cached(Sdpa):
    """Queries at the end of the keys: rows are read at an offset."""

    def forward(self, q, k, v):
        rows, keys = q.size(2), k.size(2)
        return F.scaled_dot_product_attention(q, k, v, self.bias[:, :, keys - rows : keys, :keys])


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_rows_read_at_an_offset_are_bottom_right_causal(dynamic):
    q, k, v = (torch.randn(2, HEADS, length, 8) for length in (5, 20, 20))
    site = only_site(compiled(Cached(tril(torch.bool)).eval(), q, k, v, dynamic=dynamic))
    assert site.guards == ["bias"] and site.mask in ("band(-inf, 15)", "causal (bottom-right)")


# ---------------------------------------------------------------- what is not proved


def one_wrong(mask):
    mask = mask.clone()
    mask[..., LONGEST - 1, 3] = 0
    return mask


WRONG = {
    "one wrong entry": (Attention, lambda: one_wrong(tril())),
    "three numbers": (Attention, lambda: tril() + torch.eye(LONGEST)),
    "not a number": (Added, lambda: negative() * 0),
    "other per head": (Attention, lambda: torch.cat((tril(), one_wrong(tril())), 1).repeat(1, HEADS // 2, 1, 1)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_buffer_that_is_nothing_exactly_stays_a_tensor(case):
    module, mask = WRONG[case]
    model = module(mask()).eval()
    report = compile_only(model, inputs(LONGEST))
    site = only_site([report])
    assert site.guards == [] and site.mask != "causal"


def compile_only(model, *args):
    """The report of a call whose answer may hold NaN."""
    with torch.no_grad():
        got, expected = compile_for(model)(*args), model(*args)
    torch.testing.assert_close(got, expected, equal_nan=True, atol=2e-5, rtol=2e-5)
    return sgl_npu.reports()[-1]


class Counting(Attention):
    """Writes to its mask at every call."""

    def forward(self, x):
        out = super().forward(x)
        self.bias[..., 0, 1] += 1
        return out


def test_a_buffer_that_the_graph_writes_to_is_never_read():
    model, twin = Counting(tril()).eval(), Counting(tril()).eval()
    twin.load_state_dict(model.state_dict())
    fast, x = compile_for(model), inputs()
    with torch.no_grad():
        for _ in range(3):
            assert_same(fast(x), twin(x))
    assert only_site(sgl_npu.reports()[-1:]).guards == []


def test_a_mask_that_is_passed_in_is_not_read():
    def attend(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask)

    q, k, v = (torch.randn(2, HEADS, LONGEST, 8) for _ in range(3))
    site = only_site(compiled(attend, q, k, v, tril(torch.bool)))
    assert (site.guards, site.mask) == ([], "tensor")


def test_buffers_made_in_inference_mode_are_not_read():
    with torch.inference_mode():
        model, x = Attention(tril()).eval(), inputs()
        assert_same(compile_for(model)(x), model(x))
    assert only_site(sgl_npu.reports()[-1:]).guards == []


def test_training_does_not_read_buffers():
    model, x = Sdpa(tril(torch.bool)), inputs()
    compile_for(model)(x).sum().backward()
    assert only_site(sgl_npu.reports()[-1:]).guards == []


# ---------------------------------------------------------------- buffers that change


def zero(model):
    model.bias.zero_()
    model.bias[..., 0] = 1


def write_under_no_grad(model):
    with torch.no_grad():
        model.bias.copy_(one_wrong(model.bias))


def write_in_inference_mode(model):
    with torch.inference_mode():
        model.bias.copy_(one_wrong(model.bias))


def write_through_a_view(model):
    model.bias[0, 0][LONGEST - 1, 3] = 0


def replace(model):
    model.bias = one_wrong(model.bias)


def replace_memory(model):
    model.bias.data = one_wrong(model.bias)


def load(model):
    model.load_state_dict({**model.state_dict(), "bias": one_wrong(model.bias)})


CHANGES = (zero, write_under_no_grad, write_in_inference_mode, write_through_a_view, replace, replace_memory, load)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_after_a_change_the_answer_is_that_of_the_new_values(change):
    model, x = Attention(tril()).eval(), inputs(LONGEST)
    fast = compile_for(model)
    with torch.no_grad():
        assert_same(fast(x), model(x))
        before = model(x)
        change(model)
        with pytest.warns(UserWarning, match="bias changed after"):
            assert_same(fast(x), model(x))
        assert not torch.allclose(before, model(x), atol=1e-4)
    assert only_site(sgl_npu.reports()[-1:]).guards == []


def test_after_a_change_every_length_is_served():
    model = Attention(tril()).eval()
    fast = compile_for(model, dynamic=True)
    with torch.no_grad():
        fast(inputs(LONGEST - 1))
        model.bias = one_wrong(tril())
        with pytest.warns(UserWarning, match="bias changed after"):
            for length in (LONGEST - 1, 3, 40):
                x = inputs(length)
                assert_same(fast(x), model(x))


def test_a_buffer_changed_back_is_proved_again():
    model, x = Attention(tril()).eval(), inputs()
    fast = compile_for(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast(x)
        zero(model)
        assert_same(fast(x), model(x))
        model.bias.copy_(tril())
        count = len(sgl_npu.reports())
        assert_same(fast(x), model(x))
    assert len(sgl_npu.reports()) == count


def test_loading_the_same_mask_changes_nothing():
    model, x = Attention(tril()).eval(), inputs()
    fast = compile_for(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x)
        count = len(sgl_npu.reports())
        model.load_state_dict(Attention(tril()).state_dict())
        assert_same(fast(x), model(x))
        model.bias = tril()
        assert_same(fast(x), model(x))
    assert len(sgl_npu.reports()) == count


def test_another_dtype_is_another_graph():
    model, x = Attention(tril()).eval(), inputs()
    fast = compile_for(model)
    with torch.no_grad():
        fast(x)
        model.to(torch.bfloat16)
        assert_same(fast(x.bfloat16()), model(x.bfloat16()))
    site = only_site(sgl_npu.reports()[-1:])
    assert (site.mask, site.guards, site.dtype) == ("causal", ["bias"], "bfloat16")


def test_a_compiled_model_does_not_keep_its_buffer():
    model, x = Attention(tril()).eval(), inputs()
    fast = compile_for(model)
    with torch.no_grad():
        fast(x)
    old = weakref.ref(model.bias)
    model.bias = tril()
    with torch.no_grad():
        fast(x)
    assert old() is None


# ---------------------------------------------------------------- more than one


class Layers(nn.Module):
    def __init__(self, *masks):
        super().__init__()
        self.layers = nn.ModuleList(Attention(mask) for mask in masks)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_layers_that_share_a_buffer_share_a_check():
    mask = tril()
    model, x = Layers(mask, mask).eval(), inputs(LONGEST)
    fast = compile_for(model)
    with torch.no_grad():
        assert_same(fast(x), model(x))
        sites = sgl_npu.reports()[-1].sites
        assert [site.mask for site in sites] == ["causal"] * 2
        assert sites[0].guards == sites[1].guards == ["layers.0.bias"]
        mask[..., LONGEST - 1, 3] = 0
        with pytest.warns(UserWarning, match="layers.0.bias changed"):
            assert_same(fast(x), model(x))


def test_layers_that_share_a_graph_have_a_buffer_each():
    model, x = Layers(*(tril() for _ in range(20))).eval(), inputs(LONGEST)
    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend="sgl_npu", options={"platform": "npu", "strict": True})
    before = len(sgl_npu.reports())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(x)
    assert len(sgl_npu.reports()) == before + 1
    with torch.no_grad(), pytest.warns(UserWarning, match="bias changed after"):
        write_under_no_grad(model.layers[3])
        twin = Layers(*(tril() for _ in range(20))).eval()
        twin.load_state_dict(model.state_dict())
        assert_same(model(x), twin(x))
        assert_same(model(x), twin(x))
    assert len(sgl_npu.reports()) == before + 2


def test_every_layer_names_its_own_buffer():
    model = Layers(tril(), one_wrong(tril()), tril(longest=LONGEST + 1)).eval()
    sites = compiled(model, inputs(LONGEST))[0].sites
    assert [site.guards for site in sites] == [["layers.0.bias"], [], ["layers.2.bias"]]
    assert [site.mask for site in sites] == ["causal", "tensor", "causal"]


def test_the_report_names_the_buffers():
    report = compiled(Attention(tril()).eval(), inputs())[0]
    assert "buffers  compared at every call: bias" in str(report)
    assert report.to_dict()["sites"][0]["guards"] == ["bias"]


def test_explain_reads_buffers_too():
    model, x = Attention(tril()).eval(), inputs()
    with torch.no_grad():
        report = sgl_npu.explain(model, x, options={"platform": "npu"})
    assert only_site([report]).guards == ["bias"]


@pytest.mark.slow
def test_inductor_runs_it_too():
    model, x = Attention(tril()).eval(), inputs(LONGEST)
    fast = compile_for(model, platform="cpu", inner="inductor")
    with torch.no_grad():
        assert_same(fast(x), model(x))
        assert only_site(sgl_npu.reports()[-1:]).guards == ["bias"]
        write_under_no_grad(model)
        with pytest.warns(UserWarning, match="bias changed after"):
            assert_same(fast(x), model(x))


@pytest.mark.parametrize(
    "tensor, form",
    (
        (torch.ones(3, 4), Constant(1.0)),
        (torch.tensor(-1e9), Constant(-1e9)),
        (torch.tensor(3), None),
        (torch.arange(5), Positions(0, 1, -1)),
        (torch.arange(9, 0, -3).view(1, 3, 1).expand(2, 3, 4), Positions(9, -3, -2)),
        (torch.ones(4, 6).tril(2), Band(1.0, 0.0, None, 2)),
        (torch.ones(4, 6).triu(-1), Band(0.0, 1.0, None, -2)),
        (torch.ones(4, 6).triu(-1).tril(2), Band(1.0, 0.0, -1, 2)),
        (torch.eye(5, dtype=torch.bool).expand(2, 3, 5, 5), Band(True, False, 0, 0)),
        (torch.tensor([[0, 1, 1]]).bool(), Band(False, True, None, 0)),
        (torch.tensor([[0, 1, 0, 1]]).bool(), None),
        (torch.arange(5) ** 2, None),
        (torch.arange(4.0), None),
        (torch.full((3,), float("nan")), None),
        (torch.ones(0, 3), None),
        (torch.ones(2, dtype=torch.complex64), None),
    ),
)
def test_forms(tensor, form):
    assert recognise(tensor) == form
    if form is not None:
        assert torch.equal(form.build(tensor), tensor) and form.build(tensor).dtype == tensor.dtype


GLOBAL = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()


class Elsewhere(nn.Module):
    """Masks that are no registered buffers, but no arguments either."""

    def __init__(self, place):
        super().__init__()
        self.place, self.plain, self.masks = place, GLOBAL.clone(), [GLOBAL.clone()]
        self.declared = nn.Buffer(GLOBAL.clone(), persistent=False)
        self.frozen = nn.Parameter(GLOBAL.float().clone(), requires_grad=False)

    def forward(self, q):
        places = {"global": lambda: GLOBAL, "list": lambda: self.masks[0]}
        mask = places.get(self.place, lambda: getattr(self, self.place))().bool()
        return F.scaled_dot_product_attention(q, q, q, mask[: q.size(2), : q.size(2)])


@pytest.mark.parametrize(
    "place, mask, name",
    (
        ("global", "causal", "G['GLOBAL']"),
        ("plain", "causal", "plain"),
        ("list", "causal", "masks.0"),
        ("declared", "causal", "declared"),
        ("frozen", "tensor", None),
    ),
)
def test_tensors_of_a_module_and_global_ones_count_as_buffers_and_parameters_do_not(place, mask, name):
    site = only_site(compiled(Elsewhere(place).eval(), torch.randn(1, HEADS, 16, 8)))
    assert (site.mask, site.guards) == (mask, [name] if name else [])
