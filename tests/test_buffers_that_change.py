"""A buffer that changes after compilation never gives a wrong answer, whoever shares it."""

import warnings
import weakref

import compiled_report
import pytest
import torch
from buffered_masks import LONGEST, Attention, inputs, one_wrong, tril
from compiled_report import assert_same, compiled, only_site
from torch import nn

import sgl_npu

compile_for = compiled_report.compile_for


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
