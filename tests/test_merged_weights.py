"""A merged weight is that of the weights as they are at each call: made again where one has changed, and only there."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from rotary_cases import HIDDEN, Layer
from torch import nn

import sgl_npu
from sgl_npu.runtime import merged_weights
from sgl_npu.runtime.merged_weights import Join, JoinedWeight, MergedWeight, noting

OPTIONS = {"platform": "npu", "inner": "eager", "strict": True, "merge_projections": True}


@pytest.fixture
def joins(monkeypatch):
    """The memory that every joined tensor was written to, in order."""
    made, join = [], Join.tensor

    def noted(self, weights, out=None):
        found = join(self, weights, out)
        if not isinstance(found, torch._subclasses.FakeTensor):
            made.append(found.data_ptr())
        return found

    monkeypatch.setattr(Join, "tensor", noted)
    return made


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="sgl_npu", options=OPTIONS)


def same(run, model):
    x, positions = torch.randn(2, 9, HIDDEN), torch.arange(9)
    with torch.no_grad():
        torch.testing.assert_close(run(x, positions), model(x, positions), rtol=1e-5, atol=1e-5)


def scaled(linear, name):
    with torch.no_grad():
        getattr(linear, name).mul_(3)


def scaled_in_inference_mode(linear, name):
    with torch.inference_mode():
        getattr(linear, name).mul_(3)


def loaded(linear, name):
    linear.load_state_dict({**linear.state_dict(), name: torch.randn_like(getattr(linear, name))})


def assigned(linear, name):
    linear.load_state_dict({**linear.state_dict(), name: torch.randn_like(getattr(linear, name))}, assign=True)


def replaced(linear, name):
    setattr(linear, name, nn.Parameter(torch.randn_like(getattr(linear, name))))


def frozen(linear, name):
    setattr(linear, name, nn.Parameter(torch.randn_like(getattr(linear, name)), requires_grad=False))


def other_data(linear, name):
    getattr(linear, name).data = torch.randn_like(getattr(linear, name))


def stepped(linear, name):
    parameter = getattr(linear, name)
    parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW([parameter], lr=0.5).step()
    parameter.grad = None


def stepped_as_one(linear, name):
    parameter = getattr(linear, name)
    parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW([parameter], lr=0.5, fused=True).step()
    parameter.grad = None


def there_and_back(linear, name):
    linear.double().float()
    scaled(linear, name)


IN_PLACE = [scaled, scaled_in_inference_mode, loaded, stepped, stepped_as_one]
CHANGES = [*IN_PLACE, assigned, replaced, frozen, other_data, there_and_back]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_no_answer_is_stale_and_nothing_is_compiled_again(change, name, joins):
    model = Layer(norm="llama").eval()
    run = compiled(model)
    before = len(sgl_npu.reports())
    same(run, model)
    (report,) = sgl_npu.reports()[before:]
    assert report.sites[0].rotary.endswith("projections merged")
    for place in range(3):
        count = len(joins)
        change(model.linears[place], name)
        same(run, model)
        assert len(joins) > count
        count = len(joins)
        same(run, model)
        assert len(joins) == count
    # A parameter that needs no gradient is another graph: of torch's, with or without what is merged.
    assert len(sgl_npu.reports()) - before == 1 or change is frozen


def test_the_change_that_is_made_matters():
    """So that the test before this one can fail."""
    for change in CHANGES:
        model = Layer(norm="llama").eval()
        x, positions = torch.randn(2, 9, HIDDEN), torch.arange(9)
        for place in range(3):
            with torch.no_grad():
                before = model(x, positions)
                change(model.linears[place], "weight")
                assert (model(x, positions) - before).abs().max() > 1e-2


@pytest.mark.parametrize("change", IN_PLACE, ids=lambda change: change.__name__)
def test_a_change_in_place_is_made_in_the_same_memory(change, joins):
    model = Layer(norm="llama").eval()
    run = compiled(model)
    same(run, model)
    change(model.linears[1], "weight")
    same(run, model)
    assert len(set(joins)) == 2 < len(joins)  # of the weight and of the bias


def test_what_is_written_through_data_is_noticed_once_it_is_told(joins):
    model = Layer(norm="llama").eval()
    run = compiled(model)
    same(run, model)
    model.linears[0].weight.data.mul_(3)
    torch.autograd.graph.increment_version(model.linears[0].weight)
    same(run, model)


def test_layers_that_share_a_graph_keep_weights_of_their_own(joins):
    layers = [Layer(norm="llama").eval() for _ in range(3)]
    torch._dynamo.reset()
    for layer in layers:
        layer.compile(backend="sgl_npu", options=OPTIONS)
    originals = [Layer(norm="llama").eval() for _ in layers]
    for layer, original in zip(layers, originals, strict=True):
        original.load_state_dict(layer.state_dict())
    before = len(sgl_npu.reports())
    for _ in range(2):
        for layer, original in zip(layers, originals, strict=True):
            same(layer, original)
    assert len(sgl_npu.reports()) == before + 1
    assert len(joins) == len(set(joins)) == 2 * len(layers)  # a weight and a bias each


def test_graphs_of_one_model_share_what_is_joined(joins):
    model = Layer(norm="llama").eval()
    run = compiled(model)
    before = len(sgl_npu.reports())
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for _ in range(2):
            for length in (9, 1, 4):
                x, positions = torch.randn(2, length, HIDDEN), torch.arange(length)
                with torch.no_grad():
                    torch.testing.assert_close(run(x, positions), model(x, positions), rtol=1e-5, atol=1e-5)
            scaled(model.linears[1], "weight")
    assert len(sgl_npu.reports()) == before + 3
    assert len(joins) == 3 and len(set(joins)) == 2  # the weight twice, in one place, and the bias


def test_a_model_in_another_dtype_is_joined_anew(joins):
    model = Layer(norm="llama").eval()
    run = compiled(model)
    x, positions = torch.randn(2, 9, HIDDEN), torch.arange(9)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float32, 1e-5)):
            model.to(dtype)
            found, expected = run(x.to(dtype), positions), model(x.to(dtype), positions)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_nothing_is_held_alive(monkeypatch):
    made, make = [], JoinedWeight.__init__

    def noted(self, *given):
        make(self, *given)
        made.append(weakref.ref(self.tensor))

    monkeypatch.setattr(JoinedWeight, "__init__", noted)
    model = Layer(norm="llama").eval()
    run = compiled(model.forward)
    same(run, model)
    weights = [weakref.ref(linear.weight) for linear in model.linears]
    model.linears[0].weight = nn.Parameter(torch.zeros_like(model.linears[0].weight))
    gc.collect()
    assert weights[0]() is None and made[0]() is None and made[1]() is not None
    same(run, model)
    assert len(made) == 3 and made[1]() is not None
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert [x() for x in (*weights, *made)] == [None] * 6


def test_a_joined_weight_goes_with_a_weight_or_with_the_last_graph_at_once():
    pair = [torch.randn(2, 3), torch.randn(1, 3)]
    graphs = [merged(*pair), merged(*pair)]
    found = weakref.ref(graphs[0](pair))
    assert graphs[1](pair) is found()
    gc.disable()
    try:
        graphs.pop()
        assert found() is not None
        graphs.pop()
        assert found() is None
        graphs = [merged(*pair), merged(*pair)]
        found = weakref.ref(graphs[0](pair))
        graphs[1](pair)
        pair.pop()
        assert found() is None and not graphs[0]._joined and not graphs[1]._joined
    finally:
        gc.enable()


def merged(*weights):
    return MergedWeight(Join(tuple(range(len(weights))), tuple(len(x) for x in weights), 0))


def test_the_number_of_joined_weights_has_a_limit(monkeypatch):
    monkeypatch.setattr(merged_weights, "MOST", 2)
    pairs = [(torch.randn(2, 3), torch.randn(1, 3)) for _ in range(4)]
    weight = merged(*pairs[0])
    for pair in (*pairs, *pairs):
        assert torch.equal(weight(pair), torch.cat(pair))
        assert len(weight._joined) <= 2


def test_weights_of_another_size_do_not_write_over_what_a_graph_reads():
    pair = (torch.randn(2, 3), torch.randn(1, 3))
    weight = merged(*pair)
    with noting() as noted:
        before = weight(pair)
    expected = before.clone()
    for tensor in pair:
        tensor.data = torch.randn(len(tensor), 5)
    assert torch.equal(weight(pair), torch.cat(pair))
    assert torch.equal(before, expected) and noted[0].tensor is before


def test_zeros_stand_for_what_is_missing():
    weight = MergedWeight(Join((None, 1, None), (2, 3, 1), 0))
    assert weight([torch.ones(9), torch.arange(1.0, 4)]).tolist() == [0, 0, 1, 2, 3, 0]


def test_weights_that_tell_of_no_write_are_joined_at_each_call(joins):
    with torch.inference_mode():
        pair = (torch.randn(2, 3), torch.randn(1, 3))
        weight = merged(*pair)
        for _ in range(2):
            assert torch.equal(weight(pair), torch.cat(pair))
            pair[0].mul_(2)
    assert len(joins) == 2 and not weight._joined


def test_weights_of_inference_mode_can_change_outside_of_it():
    pair = (torch.randn(2, 3), torch.randn(1, 3))
    weight = merged(*pair)
    for mode in (torch.inference_mode(), contextlib.nullcontext(), torch.inference_mode()):
        with mode:
            pair[0].add_(1)
            assert torch.equal(weight(pair), torch.cat(pair))


def test_a_graph_that_is_captured_joins_the_weights_itself(monkeypatch, joins):
    """A replay asks nobody, so whoever captures and refreshes nothing gets the copy into the graph."""
    pair = (torch.randn(2, 3), torch.randn(1, 3))
    weight = merged(*pair)
    kept = weight(pair).data_ptr()
    monkeypatch.setattr(merged_weights, "_is_capturing", lambda tensor: True)
    assert weight(pair).data_ptr() != kept
    with noting() as noted:
        assert weight(pair).data_ptr() == kept
    monkeypatch.undo()
    (joined,) = noted
    pair[1].mul_(2)
    joined.refresh()
    assert torch.equal(joined.tensor, torch.cat(pair)) and joined.tensor.data_ptr() == kept
    assert weight(pair).data_ptr() == kept
    del pair
    gc.collect()
    joined.refresh()


def test_what_was_never_joined_is_not_kept_from_a_capture(monkeypatch):
    pair = (torch.randn(2, 3), torch.randn(1, 3))
    weight = merged(*pair)
    monkeypatch.setattr(merged_weights, "_is_capturing", lambda tensor: True)
    with noting() as noted:
        assert torch.equal(weight(pair), torch.cat(pair))
    assert not noted and not weight._joined
