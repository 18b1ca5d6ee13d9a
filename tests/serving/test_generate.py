"""`generate()` of transformers with a compiled model: the tokens of eager, from a bounded number of graphs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig

import sgl_npu
from benchmarks.serving.families import build, families
from benchmarks.serving.generation import CACHES, compare, difference, generate, padded_prompts
from sgl_npu.integrations.generation import mark_lengths

BOUND = 2  # a prompt and a step of decoding
OPTIONS = {"inner": "eager", "strict": True}
STATIC, DYNAMIC = "static", "dynamic"

FAST = (("llama", STATIC), ("llama", DYNAMIC), ("gpt2", STATIC), ("qwen3_moe", STATIC))
# What has no layers with a window, and is not split by Dynamo, as ctrl is, and mpt with a static cache.
WHOLE = (
    "biogpt", "codegen", "cohere", "deepseek_v2", "deepseek_v3", "diffllama", "falcon", "gemma", "gpt2",
    "gpt_bigcode", "gpt_neox", "granite", "hunyuan_v1_dense", "llama", "nemotron", "olmo2", "olmoe", "opt",
    "phi", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "xglm",
)  # fmt: skip


def check(family, cache, graphs=BOUND, **options):
    found = compare(build(family), cache, **options)
    assert not found.differ
    assert found.graphs <= graphs, found.recompiled + found.breaks
    assert found.attentions, "no attention was seen: nothing was compiled"


@pytest.mark.parametrize(("family", "cache"), FAST)
def test_the_tokens_of_eager_from_two_graphs(family, cache):
    check(family, cache)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(WHOLE) - {family for family, cache in FAST if cache == STATIC}))
def test_every_family_with_a_static_cache(family):
    check(family, STATIC)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["falcon", "gpt2", "olmo2", "deepseek_v3"])
def test_families_with_a_dynamic_cache(family):
    check(family, DYNAMIC)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_window_costs_a_graph_for_when_it_is_full(family):
    check(family, STATIC, graphs=BOUND + 1)


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
def test_under_inductor(cache):
    check("llama", cache, inner="inductor")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cache"), [("llama", DYNAMIC), ("qwen3", STATIC)])
def test_the_graphs_of_an_npu(family, cache):
    check(family, cache, platform="npu")


def graphs_of(model, lengths, **options):
    """How many graphs each pair of (prompt, new tokens) needs that the ones before did not."""
    torch._dynamo.reset()
    counts = []
    for prompt, steps in lengths:
        tokens = torch.randint(5, 100, (4, prompt))
        seen = len(sgl_npu.reports())
        model.generate(tokens, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0, **options)
        counts.append(len(sgl_npu.reports()) - seen)
    return counts


LENGTHS = ((9, 5), (12, 3), (6, 8))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": STATIC, "max_cache_len": 32}], ids=[DYNAMIC, STATIC])
def test_two_graphs_serve_prompts_of_any_length(options):
    model = build("gpt2")
    model.forward = torch.compile(model.forward, backend="sgl_npu", options=OPTIONS)
    mark_lengths(model)
    assert graphs_of(model, LENGTHS, **options) == [2, 0, 0]


def test_marks_can_be_taken_back():
    model = build("gpt2")
    model.forward = torch.compile(model.forward, backend="sgl_npu", options=OPTIONS)
    mark_lengths(model).remove()
    assert graphs_of(model, LENGTHS[:1]) == [3]


def test_transformers_own_compilation_is_one_graph_for_decoding():
    model = build("gpt2")
    config = CompileConfig(backend="sgl_npu", mode=None, options=OPTIONS)
    config._compile_all_devices = True
    chosen = {"cache_implementation": STATIC, "max_cache_len": 32, "compile_config": config}
    assert graphs_of(model, LENGTHS, **chosen) == [1, 0, 0]
    inputs = padded_prompts()
    found, expected = generate(model, inputs, **chosen), generate(build("gpt2"), inputs, **CACHES[STATIC])
    assert not difference(found, expected)


def test_generate_of_a_wrapped_model_compiles_nothing():
    """The trap that docs/serving.md warns of."""
    assert graphs_of(torch.compile(build("gpt2"), backend="sgl_npu", options=OPTIONS), LENGTHS[:1]) == [0]


def test_a_difference_says_where_and_how_close():
    logits = [torch.tensor([[0.0, 1.0, 0.75], [1.0, 0.0, 0.5]])] * 12
    tokens = torch.zeros(2, 15, dtype=torch.long)
    expected = SimpleNamespace(sequences=tokens, logits=logits)
    assert difference(expected, expected) == ""
    other = tokens.clone()
    other[1, 7:] = 2
    found = SimpleNamespace(sequences=other, logits=[x + 0.125 for x in logits])
    assert difference(found, expected) == "row 1, step 4: the two best are 5.0e-01 apart, the error is 1.2e-01"


def test_families_are_decoders_with_attention():
    assert len(families()) > 100
    assert not {"bert", "mamba", "rwkv", "vit"} & set(families())
