"""What `explain` keeps for the page: sizes, masks, graphs and bytes, of that call alone."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from html_models import SIZES, Layers, inputs
from torch import fx
from torch._subclasses import FakeTensorMode

import sgl_npu
from sgl_npu.compiler.html import page
from sgl_npu.compiler.html.costs import squares
from sgl_npu.compiler.report import merge
from sgl_npu.compiler.trace_raster import of_condition, of_tensor
from sgl_npu.passes.band import KEY, ROW

sdpa = torch.nn.functional.scaled_dot_product_attention


def explained_call(function, *args, **options):
    with torch.no_grad():
        return sgl_npu.explain(function, *args, options={"platform": "npu", **options})


def test_sizes_and_bands_are_those_of_the_call(explained):
    padded, _, window = (explained.trace.sites[number] for number in range(3))
    assert padded.query == (2, 4, 24, 16) and padded.key == (2, 2, 24, 16)
    assert (padded.lower, padded.upper, window.lower, window.upper) == (None, 0, -5, 0)


def test_a_mask_is_kept_as_it_was_and_as_what_is_left(explained):
    padded, window = explained.trace.sites[0], explained.trace.sites[2]
    assert padded.mask_given == "b8[2, 1, 24, 24]" and padded.mask_kept == "b8[2, 1, 1, 24]"
    assert padded.mask_bytes == (2 * 24 * 24, 2 * 24)
    assert (window.mask_given, window.mask_kept) == ("b8[1, 1, 24, 24]", "") and window.mask_bytes == (24 * 24, 0)


def test_a_mask_that_the_kernel_wants_whole_is_noted(explained):
    found = [explained.trace.sites[number] for number in range(3)]
    # A band and a mask of keys are one mask with rows for FIA, and the window needs none.
    assert [x.kernel_mask for x in found] == ["b8[2, 1, 24, 24]"] * 2 + [""]
    assert [x.kernel_mask_bytes for x in found] == [2 * 24 * 24] * 2 + [0]
    assert all(text in explained.graph for text in ("atten_mask=expand,", "aten.expand(bitwise_not, [2, 1, 24, 24])"))


@pytest.mark.parametrize(
    ("shape", "platform", "expected"),
    [
        ((2, 1, 1, 24), "npu", ["b8[2, 1, 24, 24]"] * 2),  # no kernel of Ascend broadcasts rows
        ((2, 1, 1, 24), "cpu", ["", ""]),  # this one does
        ((2, 1, 24, 24), "npu", ["", ""]),  # the model has it whole already
    ],
)
def test_a_mask_of_two_attentions_is_made_once(shape, platform, expected):
    def attend(q, keep):
        return sdpa(sdpa(q, q, q, attn_mask=keep), q, q, attn_mask=keep)

    q, keep = torch.randn(2, 2, 24, 16, dtype=torch.bfloat16), torch.ones(shape, dtype=torch.bool)
    found = explained_call(attend, q, keep, platform=platform).trace.sites.values()
    assert [x.kernel_mask for x in found] == expected
    assert {x.kernel_mask_sites for x in found} == ({2} if any(expected) else {0})


def test_what_data_decided_is_seen(explained):
    assert [raster.lines for raster in explained.trace.sites[0].seen] == ["4" * 24, "0" * 5 + "4" * 19]
    assert explained.trace.sites[2].seen == []


def test_the_graph_around_a_site_shows_the_softmax_before_and_the_kernel_after(explained):
    for site in explained.trace.sites.values():
        assert "aten._softmax(" in site.before and "npu_fused" not in site.before
        assert "npu.npu_fused_infer_attention_score(" in site.after and "softmax" not in site.after.replace(
            "softmax_lse", ""
        )


def test_layers_that_are_alike_have_one_text(explained):
    one, other, _ = explained.trace.sites.values()
    assert one.before is other.before


def test_scores_are_counted_before_and_are_gone_after(explained):
    before, size_before, after, size_after = squares(explained.trace)
    assert before >= 3 * 5 and size_before > 3 * 2 * 4 * 24 * 24 * 2
    # The mask that the kernel takes beside padding has rows and keys; each of these layers views the padding anew.
    assert after <= 6 and size_after < size_before / 4


def test_activations_are_no_scores_however_long_the_sequence():
    width = SIZES["heads"] * SIZES["size"]
    x = torch.randn(1, width, width, dtype=torch.bfloat16)
    found = explained_call(Layers().eval().bfloat16(), x, torch.ones(1, width, dtype=torch.bool))
    before, _, after, _ = squares(found.trace)
    layers = explained_call(Layers().eval().bfloat16(), x[:, :24], torch.ones(1, 24, dtype=torch.bool))
    assert (before, after) == (squares(layers.trace)[0], squares(layers.trace)[2])


def test_bytes_are_counted_by_layer(explained):
    trace = explained.trace
    assert list(trace.before)[:1] == list(trace.after)[:1]
    layers = [name for name in trace.before if name.startswith("layers.")]
    assert layers == ["layers.0", "layers.1", "layers.2"]
    # Not the window's: in its layer stands the triangle that the kernel takes for every length.
    assert all(trace.after[name].bytes < trace.before[name].bytes for name in layers[:2])


def test_steps_say_what_passes_did(explained):
    steps = explained.trace.sites[0].steps
    assert steps["repeat_kv"].startswith("repeated heads") and steps["layout"] == "already in (B, S, N, D)"


def test_symbols_have_the_values_of_the_call():
    def causal(q, k, v):
        return sdpa(q, k, v, is_causal=True)

    tensors = [torch.randn(1, 2, 40, 16, dtype=torch.bfloat16) for _ in range(3)]
    for x in tensors:
        torch._dynamo.mark_dynamic(x, 2)
    found = explained_call(causal, *tensors)
    assert not found.sites[0].query[2].isdigit()
    assert found.trace.sites[0].query == (1, 2, 40, 16) and found.trace.sites[0].upper == 0


def test_a_condition_on_positions_is_drawn_without_data():
    def chunks(q, k, v):
        i = torch.arange(q.size(2))
        return sdpa(q, k, v, attn_mask=(i // 8)[:, None] == (i // 8)[None])

    q = torch.randn(1, 2, 32, 16, dtype=torch.bfloat16)
    with FakeTensorMode() as mode, torch.no_grad():
        found = explained_call(chunks, *(mode.from_tensor(q) for _ in range(3)))
    site = found.trace.sites[0]
    assert found.sites[0].mask == "chunks" and site.seen == []
    rows = [(row // 8 * 8, row // 8 * 8 + 8) for row in range(32)]
    assert site.raster.lines == "\n".join("0" * start + "4" * 8 + "0" * (32 - end) for start, end in rows)


def test_documents_are_seen_in_the_call():
    def documents(q, k, v, ids):
        return sdpa(q, k, v, attn_mask=(ids[:, None, :, None] == ids[:, None, None, :]))

    q = torch.randn(1, 2, 6, 16, dtype=torch.bfloat16)
    found = explained_call(documents, q, q, q, torch.tensor([[0, 0, 1, 1, 1, 2]]))
    assert found.sites[0].mask == "documents" and found.trace.sites[0].raster is None
    assert found.trace.sites[0].seen[0].lines == "440000\n440000\n004440\n004440\n004440\n000004"


def test_a_long_mask_is_a_coarse_picture():
    causal = torch.ones(1000, 1000, dtype=torch.bool).tril()
    lines = of_tensor(causal, "").lines.split("\n")
    assert len(lines) == len(lines[0]) == 96
    assert lines[50][:50] == "4" * 50 and lines[50][51:] == "0" * 45
    found = of_condition(KEY <= ROW, {}, 1000, 1000)
    assert found is not None and found.lines == "\n".join(lines)


def test_values_are_not_changed_by_looking():
    model, given = Layers().eval().bfloat16(), inputs()
    kept = [x.clone() for x in given]
    explained_call(model, *given)
    assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True))


def test_a_compilation_keeps_nothing():
    def call(x):
        return sdpa(x, x, x)

    with torch.no_grad():
        torch.compile(call, backend="sgl_npu", options={"platform": "npu"})(torch.randn(1, 2, 8, 16))
    assert sgl_npu.reports()[-1].trace is None


def test_no_graph_outlives_the_call(monkeypatch):
    graphs: list[weakref.ref] = []
    original = fx.Graph.__init__

    def noted(self, *args, **kwargs):
        original(self, *args, **kwargs)
        graphs.append(weakref.ref(self))

    monkeypatch.setattr(fx.Graph, "__init__", noted)
    found = explained_call(Layers().eval().bfloat16(), *inputs())
    torch._dynamo.reset()
    gc.collect()
    assert graphs and found.trace.sites
    held = [x for x in gc.get_referrers(*[g() for g in graphs if g() is not None] or [None]) if x is found.trace]
    assert held == []
    assert all(isinstance(site.before, str) and isinstance(site.steps, dict) for site in found.trace.sites.values())


def test_json_has_no_trace(explained):
    found = json.loads(json.dumps(explained.to_dict()))
    assert "trace" not in found and "measures" not in found


def test_merged_reports_number_their_traces_through(explained):
    whole = merge([explained, explained])
    assert sorted(whole.trace.sites) == list(range(6))
    assert whole.trace.before["layers.0"].bytes == 2 * explained.trace.before["layers.0"].bytes


@pytest.mark.parametrize("part", ["tracer.around", "trace_values.of_tensor"])
def test_what_cannot_be_noted_is_a_warning_and_no_error(monkeypatch, part):
    def broken(*args):
        raise ValueError("no text today")

    monkeypatch.setattr(f"sgl_npu.compiler.{part}", broken)
    with pytest.warns(UserWarning, match="the report will lack a part.*no text today"):
        found = explained_call(Layers().eval().bfloat16(), *inputs())
    assert found.fused == 3


@pytest.mark.parametrize("paged", [False, True])
def test_packed_sequences_are_seen_in_the_call(paged):
    lengths = [(2, 2), (3, 5)]
    ends, keys = torch.tensor([2, 5], dtype=torch.int32), torch.tensor([2, 5 if paged else 7], dtype=torch.int32)
    q = torch.randn(5, 2, 128, dtype=torch.bfloat16)
    k = torch.randn(*((4, 128, 2, 128) if paged else (7, 2, 128)), dtype=torch.bfloat16)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32) if paged else None

    def call(q, k, table):
        given = {"actual_seq_lengths": ends.tolist(), "actual_seq_lengths_kv": keys.tolist(), "block_table": table}
        return sgl_npu.ops.attention(q, k, k, causal=True, **given)

    found = explained_call(call, q, k, table)
    site = found.trace.sites[0]
    assert site.sequences == tuple(lengths)
    assert site.seen[0].lines == "4000000\n4400000\n0044400\n0044440\n0044444"
    assert "2 sequences end to end" in page(found) and "query, key and value, read" in page(found)


def test_a_length_that_is_known_at_run_time_alone_is_not_made_up():
    def call(q, count):
        n = count.item()
        torch._check(n >= 2)
        torch._check(n <= q.size(2))
        return sdpa(q, q[:, :, :n], q[:, :, :n])

    q = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16)
    with torch._dynamo.config.patch(capture_scalar_outputs=True), torch.no_grad():
        found = sgl_npu.explain(call, q, torch.tensor(4), options={"platform": "cpu"})
    assert found.trace.sites[0].query == () and "sizes of this attention are not known" in page(found)


def test_a_graph_with_merged_weights_is_seen_too():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(num_hidden_layers=1, vocab_size=16, attn_implementation="eager", **sizes)
    tokens, keep = torch.zeros(1, 8, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    options = {"platform": "npu", "merge_projections": True, "strict": True}
    with torch.no_grad():
        model = transformers.LlamaForCausalLM(config).eval().bfloat16()
        found = sgl_npu.explain(model, tokens, attention_mask=keep, use_cache=False, options=options)
    assert found.sites[0].rotary.endswith("projections merged")
    assert found.trace.sites[0].seen[0].lines == "00444444"
