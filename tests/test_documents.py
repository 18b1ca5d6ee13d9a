"""Packed batches that a model knows by ids alone, of positions or documents: TND, with the ends read before a call."""

import re
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from compiled_report import compile_for, only_site
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import sgl_npu
from sgl_npu.compiler import pipeline
from sgl_npu.passes import document_reader, documents
from sgl_npu.passes.document_reader import MOST_DOCUMENTS
from sgl_npu.runtime.document_ends import document_ends

BF16 = torch.bfloat16
HEADS, KV_HEADS, DIM = 4, 2, 64
LENGTHS = [(5, 9, 2), (16,), (1,) * 16, (3, 13)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ids_of(lengths, first=3):
    """(S,): ids that are all different, in no order."""
    names = (torch.randperm(len(lengths)) * 7 + first).tolist()
    return torch.cat([torch.full((n,), name) for n, name in zip(lengths, names, strict=True)])


def positions_of(lengths):
    return torch.cat([torch.arange(n) for n in lengths])


def qkv(batch, tokens, dtype=BF16):
    return [torch.randn(batch, heads, tokens, DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def by_ids(query, key, value, ids):
    rows = torch.arange(query.size(2))
    mask = (ids[:, :, None] == ids[:, None, :]) & (rows[None, :] <= rows[:, None])
    return F.scaled_dot_product_attention(query * 2, key, value, mask[:, None], enable_gqa=True)


def by_positions(query, key, value, position_ids, window=None):
    """As transformers writes it: a document ends where positions do not go on."""
    first = position_ids[:, :1] - 1
    ids = (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)
    row, column = position_ids[:, :, None], position_ids[:, None, :]
    mask = (ids[:, :, None] == ids[:, None, :]) & (column <= row)
    if window is not None:
        mask = mask & (row - column < window)
    return F.scaled_dot_product_attention(query * 2, key, value, mask[:, None], enable_gqa=True)


def check(function, run, *args):
    with torch.no_grad():
        torch.testing.assert_close(run(*args), function(*args), atol=2e-2, rtol=2e-2)


def graph_and_site():
    report = sgl_npu.reports()[-1]
    return report.graphs[0].text, only_site([report])


def assert_packed(mask):
    text, site = graph_and_site()
    assert (site.kernel, site.mask) == ("ascend_packed", mask), site.refusals
    assert "input_layout=TND" in text and re.search(r"actual_seq_lengths=\[input\d+, input\d+, ", text)


def ran_packed(compiled, *args):
    """Whether a call runs the form with packed sequences: what reads the ends has found some."""
    found = []

    def read(*args):
        found.append(document_ends(*args))
        return found[-1]

    with mock.patch("sgl_npu.passes.document_reader.document_ends", read), torch.no_grad():
        compiled(*args)
    assert len(found) == 1
    return found != [None]


@pytest.mark.parametrize("window, mask", [(None, "causal & documents"), (4, "window(3, 0) & documents")])
def test_positions_that_start_again(window, mask):
    def run(*args):
        return by_positions(*args, window=window)

    compiled = compile_for(run)
    for lengths in LENGTHS:
        check(run, compiled, *qkv(1, 16), positions_of(lengths)[None])
    assert_packed(mask)


@pytest.mark.parametrize("batch", [1, 3])
def test_ids_of_documents(batch):
    """In a batch each row has its own."""
    compiled = compile_for(by_ids)
    for n in range(3):
        ids = torch.stack([ids_of(LENGTHS[(n + row) % 4]) for row in range(batch)])
        check(by_ids, compiled, *qkv(batch, 16), ids)
        assert ran_packed(compiled, *qkv(batch, 16), ids)
    assert_packed("causal & documents")


def test_documents_that_attend_to_everything_in_them():
    def run(query, key, value, ids):
        return F.scaled_dot_product_attention(query, key, value, (ids[:, :, None] == ids[:, None, :])[:, None])

    query = qkv(1, 16)[0]
    for lengths in LENGTHS:
        check(run, compile_for(run), query, query, query, ids_of(lengths)[None])
    assert_packed("documents")
    assert "sparse_mode" not in graph_and_site()[0]


def test_one_graph_serves_every_length_and_number_of_documents():
    compiled, before = compile_for(by_positions, dynamic=True), len(sgl_npu.reports())
    for lengths in ((5, 9, 2), (30,), (1, 2, 3, 4, 5), (7, 70)):
        check(by_positions, compiled, *qkv(1, sum(lengths)), positions_of(lengths)[None])
    assert len(sgl_npu.reports()) - before == 1
    assert_packed("causal & documents")


RECURRING = torch.tensor([4] * 6 + [5] * 4 + [4] * 6)  # tokens of document 4 stand on both sides of 5


@pytest.mark.parametrize(
    "ids", [RECURRING, torch.arange(2 * MOST_DOCUMENTS)], ids=["recurring ids", "too many documents"]
)
def test_ids_that_are_no_few_runs_take_the_mask(ids):
    compiled, args = compile_for(by_ids, dynamic=True), (*qkv(1, len(ids)), ids[None])
    check(by_ids, compiled, *args)
    assert not ran_packed(compiled, *args)
    assert ran_packed(compiled, *qkv(1, 16), ids_of((5, 9, 2))[None])


@pytest.mark.parametrize("positions", [[0, 1, 2, 4, 5, 7], [5, 4, 3, 2, 1, 0], [3, 3, 3, 0, 0, 1]])
def test_positions_that_jump_inside_of_a_document_take_the_mask(positions):
    def run(query, key, value, ids, position_ids):
        mask = (ids[:, :, None] == ids[:, None, :]) & (position_ids[:, None, :] <= position_ids[:, :, None])
        return F.scaled_dot_product_attention(query, key, value, mask[:, None], enable_gqa=True)

    ids, compiled = torch.tensor([[1, 1, 1, 2, 2, 2]]), compile_for(run)
    check(run, compiled, *qkv(1, 6), ids, torch.tensor([positions]))
    assert not ran_packed(compiled, *qkv(1, 6), ids, torch.tensor([positions]))
    assert ran_packed(compiled, *qkv(1, 6), ids, torch.tensor([[5, 6, 7, 0, 1, 2]]))
    check(run, compiled, *qkv(1, 6), ids, torch.tensor([[5, 6, 7, 0, 1, 2]]))


def padded(q, k, v, ids):
    mask = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :]
    return F.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True)


def by_place(q, k, v, ids):
    """A position itself is compared, not a distance: documents' first tokens may start anywhere."""
    mask = (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] >= 2)
    return F.scaled_dot_product_attention(q, k, v, mask[:, None] | torch.eye(16, dtype=torch.bool), enable_gqa=True)


def shifted(q, k, v, ids):
    mask = ids[:, :, None] == ids.roll(1, -1)[:, None, :]
    return F.scaled_dot_product_attention(q, k, v, mask[:, None] | torch.eye(16, dtype=torch.bool), enable_gqa=True)


def of_heads(q, k, v, ids):
    ids = ids[:, None, :] // torch.arange(1, HEADS + 1)[None, :, None]
    return F.scaled_dot_product_attention(q, k, v, ids[..., :, None] == ids[..., None, :], enable_gqa=True)


def cached(q, k, v, ids):
    k, v = torch.cat([k, k], 2), torch.cat([v, v], 2)
    mask = ids[:, :, None] == torch.cat([ids, ids], 1)[:, None, :]
    return F.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True)


def with_bias(q, k, v, ids):
    mask = torch.where(ids[:, :, None] == ids[:, None, :], q[:, 0, :, :1], float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True)


def of_features(q, k, v, ids):
    """Ids that are computed from what the model computes cannot be read before it runs."""
    ids = ids + (q[:, 0, :, 0] > 0)
    return F.scaled_dot_product_attention(q, k, v, (ids[:, :, None] == ids[:, None, :])[:, None], enable_gqa=True)


@pytest.mark.parametrize("function", [padded, by_place, shifted, of_heads, cached, with_bias, of_features])
def test_masks_of_more_than_documents_stay_masks(function):
    args = (*qkv(2, 16), torch.stack([ids_of((5, 9, 2), first=0), ids_of((8, 8), first=0)]))
    check(function, compile_for(function), *args)
    assert len(sgl_npu.reports()[-1].graphs) == 1 and "TND" not in sgl_npu.reports()[-1].graph


@pytest.mark.parametrize("name", ["ids", "position_ids"])
@pytest.mark.parametrize("batch, tokens", [(3, 16), (2, 20)], ids=["more rows", "longer rows"])
def test_ids_and_positions_of_more_tokens_than_attend_stay_masks(name, batch, tokens):
    def run(query, key, value, ids, position_ids):
        ids, position_ids = (x[: query.size(0), : query.size(2)] for x in (ids, position_ids))
        mask = (ids[:, :, None] == ids[:, None, :]) & (position_ids[:, None, :] <= position_ids[:, :, None])
        return F.scaled_dot_product_attention(query, key, value, mask[:, None], enable_gqa=True)

    def same(batch, tokens):
        return {"ids": torch.ones(batch, tokens).long(), "position_ids": torch.arange(tokens).repeat(batch, 1)}

    given = {**same(2, 16), name: same(batch, tokens)[name]}
    check(run, compile_for(run), *qkv(2, 16), *given.values())
    assert len(sgl_npu.reports()[-1].graphs) == 1


def test_what_the_kernel_does_not_take_stays_a_mask():
    args = (*qkv(1, 16, torch.float32), ids_of((5, 9, 2))[None])
    check(by_ids, compile_for(by_ids), *args)
    assert len(sgl_npu.reports()[-1].graphs) == 1


def test_gradients_keep_the_mask():
    args = [x.requires_grad_() for x in qkv(1, 16)]
    out = compile_for(by_ids)(*args, ids_of((5, 9, 2))[None])
    assert out.requires_grad and "TND" not in sgl_npu.reports()[-1].graph


def test_a_program_keeps_the_mask():
    """Nobody reads the ends for it."""

    class Model(torch.nn.Module):
        def forward(self, *args):
            return by_ids(*args)

    args = (*qkv(1, 16), ids_of((5, 9, 2))[None])
    with torch.no_grad():
        program = torch.export.export(Model(), args)
        check(by_ids, sgl_npu.rewrite(program, {"platform": "npu", "strict": True}).module(), *args)
    assert "TND" not in graph_and_site()[0]


class Projected(torch.nn.Module):
    """Query, key and value are projected by weights of their own and rotated."""

    def __init__(self):
        super().__init__()
        self.projections = torch.nn.ModuleList(torch.nn.Linear(64, 2 * DIM, bias=False, dtype=BF16) for _ in range(3))

    def forward(self, x, ids, cos, sin):
        query, key, value = (p(x).unflatten(-1, (2, DIM)).transpose(1, 2) for p in self.projections)
        query, key = (x * cos + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin for x in (query, key))
        return F.scaled_dot_product_attention(query, key, value, (ids[:, :, None] == ids[:, None, :])[:, None])


def test_merged_weights_are_inputs_beside_the_ends():
    model, others = Projected().eval(), [torch.randn(16, DIM, dtype=BF16) for _ in range(2)]
    options = {"platform": "npu", "inner": "eager", "strict": True, "merge_projections": True}
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="sgl_npu", options=options)
    for ids in (ids_of((5, 9, 2)), RECURRING):
        check(model, compiled, torch.randn(1, 16, 64, dtype=BF16), ids[None], *others)
    assert graph_and_site()[1].rotary.endswith("projections merged")
    assert_packed("documents")


def test_ids_that_a_pass_compares_anew_keep_the_mask(monkeypatch):
    """No other form of the graph was kept, as nothing was compared for equality then."""

    def respell(gm, context):
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.ge.Tensor):
            node.target = torch.ops.aten.eq.Tensor

    def run(query, key, value, ids):
        return F.scaled_dot_product_attention(query, key, value, (ids[:, :, None] >= ids[:, None, :])[:, None])

    monkeypatch.setattr(pipeline, "PASSES", (pipeline.Pass("respell", respell), *pipeline.PASSES))
    query, ids = qkv(1, 16)[0], ids_of((5, 9, 2))[None]
    with torch.no_grad():
        got = compile_for(run)(query, query, query, ids)
        mask = (ids[:, :, None] == ids[:, None, :])[:, None]
        torch.testing.assert_close(got, F.scaled_dot_product_attention(query, query, query, mask), atol=2e-2, rtol=2e-2)


def test_where_the_selection_fails_the_ends_are_read_all_the_same(monkeypatch):
    def fail(gm, context):
        raise RuntimeError("halfway")

    steps = [pipeline.Pass("select", fail) if step.name == "select" else step for step in pipeline.PASSES]
    monkeypatch.setattr(pipeline, "PASSES", tuple(steps))
    for module in (documents, document_reader):  # each is an attention of its own where it is decomposed
        monkeypatch.setattr(module, "MOST_DOCUMENTS", 4)
    torch._dynamo.reset()
    compiled = torch.compile(by_ids, backend="sgl_npu", options={"platform": "npu", "inner": "eager"})
    args = (*qkv(1, 16), ids_of((5, 9, 2))[None])
    with pytest.warns(UserWarning, match="'select' failed.*halfway"):
        check(by_ids, compiled, *args)
    assert ran_packed(compiled, *args)
    assert graph_and_site()[1].op == "aten (decomposed)"


MODELS = {
    "Llama": (LlamaConfig, {}, "causal & documents"),
    "Mistral, a window": (MistralConfig, {"sliding_window": 4}, "window(3, 0) & documents"),
}


@pytest.mark.parametrize("config, options, mask", MODELS.values(), ids=MODELS)
def test_models_of_transformers_that_are_given_position_ids(config, options, mask):
    sizes = dict(vocab_size=64, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = (
        AutoModelForCausalLM.from_config(config(**sizes, num_key_value_heads=2, **options), attn_implementation="sdpa")
        .to(BF16)
        .eval()
    )

    def run(input_ids, position_ids):
        return model(input_ids, position_ids=position_ids, use_cache=False).logits

    compiled = compile_for(run)
    for lengths in LENGTHS[:3]:
        check(run, compiled, torch.randint(0, 64, (1, 16)), positions_of(lengths)[None])
    report = sgl_npu.reports()[-1]
    assert {(site.kernel, site.mask) for site in report.sites} == {("ascend_packed", mask)}


def test_the_ends_that_are_read():
    ids = torch.stack([ids_of((5, 9, 2)), ids_of((16,))])
    assert document_ends(ids, None, 6) == [5, 14, 16, 32, 32, 32]
    assert document_ends(ids, None, 4) == [5, 14, 16, 32]
    assert document_ends(ids, None, 3) is None
    assert document_ends(ids[:, :0], None, 2) == [0, 0]
    assert document_ends(RECURRING, None, 8) is None
    assert document_ends(torch.tensor([1, 1]), torch.tensor([2**63 - 1, -(2**63)]), 8) is None
    assert document_ends(ids, torch.arange(16), 4) == [5, 14, 16, 32]
    assert document_ends(ids, torch.arange(16) * 2, 4) is None


def test_a_graph_that_is_captured_has_the_mask():
    """What reads the ends waits for the device, which ends a capture."""
    compiled, args = compile_for(by_ids), (*qkv(1, 16), ids_of((5, 9, 2))[None])
    assert ran_packed(compiled, *args)
    with mock.patch("torch.cpu.is_current_stream_capturing", lambda: True, create=True):
        check(by_ids, compiled, *args)
        assert not ran_packed(compiled, *args)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 12))
def test_ends_and_ids_say_the_same_mask(ids, most):
    ends = document_ends(torch.tensor(ids), None, most)
    same = torch.tensor(ids)[:, None] == torch.tensor(ids)
    if ends is None:
        runs = 1 + sum(a != b for a, b in pairwise(ids))
        assert runs > most or runs > len(set(ids))
        return
    document = torch.searchsorted(torch.tensor(ends), torch.arange(len(ids)), right=True)
    assert torch.equal(same, document[:, None] == document) and len(ends) == most


def test_ids_that_do_not_differ_are_equal():
    def function(query, key, value, ids):
        same = ~(ids[:, :, None] != ids[:, None, :])
        return F.scaled_dot_product_attention(query, key, value, same[:, None], enable_gqa=True)

    run = compile_for(function, dynamic=True)
    for lengths in LENGTHS[:2]:
        check(function, run, *qkv(1, 16), ids_of(lengths)[None])
        assert_packed("documents")
