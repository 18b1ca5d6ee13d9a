# ruff: noqa: E501
"""Masks kept as buffers are proved from their values, and a changed buffer never gives a wrong answer."""

import compiled_report
import pytest
import torch
import torch.nn.functional as F
from buffered_masks import (
    HEADS,
    LONGEST,
    Added,
    Attention,
    Chosen,
    Compared,
    Sdpa,
    inputs,
    negative,
    one_wrong,
    positions,
    tril,
    window,
)
from compiled_report import assert_same, compiled, only_site
from expecttest import assert_expected_inline
from torch import nn

import sgl_npu
from sgl_npu.passes.buffer_forms import Band, Constant, Positions, recognise

compile_for = compiled_report.compile_for


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
