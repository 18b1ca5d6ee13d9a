"""attn_implementation="sgl_npu" gives the logits of attn_implementation="eager", also compiled."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache  # noqa: E402
from transformers import masking_utils as masking  # noqa: E402

import sgl_npu  # noqa: E402
from sgl_npu.integrations import transformers as hook  # noqa: E402

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "head_dim": 8,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 5}
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Mistral": WINDOW,
    "Qwen2Moe": {
        "use_sliding_window": True, "max_window_layers": 0, **WINDOW, "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "Gemma2": {**WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "GptOss": {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip
LENGTH = 12


def build(name: str, **changes):
    """The same weights twice: (eager, sgl_npu)."""
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name}ForCausalLM")
    pair = []
    for implementation in ("eager", "sgl_npu"):
        torch.manual_seed(0)
        config = config_class(**{**SMALL, **MODELS[name], **changes})
        pair.append(model_class._from_config(config, attn_implementation=implementation).eval())
    pair[1].load_state_dict(pair[0].state_dict())
    for parameter_name, parameter in pair[0].named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
            pair[1].get_parameter(parameter_name).data.copy_(parameter.data)
    return pair


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, 40, (2, length), generator=torch.Generator().manual_seed(1))


def left_padding() -> torch.Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    return mask


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def assert_same(found, expected, mask=None):
    """Logits agree wherever a token is real; the rows of padding are garbage by contract."""
    difference = (found - expected).abs().amax(-1)
    if mask is not None:
        difference = difference.where(mask.bool(), 0)
    assert difference.max() < 1e-5


@pytest.mark.parametrize("mask", [None, left_padding()], ids=["plain", "left-padded"])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_equals_eager(name, mask):
    eager, ours = build(name)
    expected = eager(tokens(), attention_mask=mask).logits
    assert_same(ours(tokens(), attention_mask=mask).logits, expected, mask)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_in_chunks_then_decode_equals_one_forward(name, cache):
    eager, ours = build(name)
    expected = eager(tokens()).logits
    held = DynamicCache(config=ours.config) if cache == "dynamic" else StaticCache(ours.config, max_cache_len=16)
    start = 0
    for size in (4, 3, 1, 1, 3):
        part = ours(tokens()[:, start : start + size], past_key_values=held).logits
        assert_same(part, expected[:, start : start + size])
        start += size


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_prefill_and_decode_equal_eager(name):
    eager, ours = build(name)
    compiled = torch.compile(ours, backend="sgl_npu", options={"inner": "eager", "strict": True})
    expected = eager(tokens()).logits
    held = DynamicCache(config=ours.config)
    assert_same(compiled(tokens()[:, :9], past_key_values=held).logits, expected[:, :9])
    for position in range(9, LENGTH):
        token = tokens()[:, position : position + 1]
        assert_same(compiled(token, past_key_values=held).logits, expected[:, position : position + 1])
    assert_same(compiled(tokens(), attention_mask=left_padding()).logits,
                eager(tokens(), attention_mask=left_padding()).logits, left_padding())  # fmt: skip


@pytest.mark.slow
def test_compiled_decode_with_a_static_cache_equals_eager():
    eager, ours = build("Llama")
    compiled = torch.compile(ours, backend="sgl_npu", options={"inner": "eager", "strict": True})
    held = StaticCache(ours.config, max_cache_len=16)
    expected = eager(tokens()).logits
    for start in range(0, LENGTH, 4):
        part = compiled(tokens()[:, start : start + 4], past_key_values=held).logits
        assert_same(part, expected[:, start : start + 4])


@pytest.mark.slow
def test_generate_gives_the_tokens_of_eager():
    eager, ours = build("Mistral")
    settings = {"attention_mask": left_padding(), "max_new_tokens": 8, "do_sample": False}
    prompt = tokens() * left_padding()
    assert torch.equal(ours.generate(prompt, **settings), eager.generate(prompt, **settings))


@pytest.mark.slow
def test_dynamic_shapes_equal_eager():
    eager, ours = build("Mistral")
    compiled = torch.compile(ours, backend="sgl_npu", options={"inner": "eager"}, dynamic=True)
    for length in (8, 11):
        assert_same(compiled(tokens(length)).logits, eager(tokens(length)).logits)


def test_gradients_equal_eager():
    with torch.enable_grad():
        for model in (pair := build("Llama")):
            model(tokens()).logits.square().mean().backward()
    for expected, found in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)


MASKS = {
    "Llama": ["causal", "causal"],
    "Mistral": ["band(-4, 0)", "band(-4, 0)"],
    "GptOss": ["band(-4, 0)", "causal"],
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_without_padding_is_a_band_in_the_report(name):
    report = sgl_npu.explain(build(name)[1], tokens())
    assert [site.mask for site in report.sites] == MASKS[name]
    assert all(site.fused for site in report.sites)


def test_a_padded_mask_stays_a_tensor_in_the_report():
    report = sgl_npu.explain(build("Llama")[1], tokens(), attention_mask=left_padding())
    assert all("tensor" in site.mask for site in report.sites)


def test_a_long_prompt_behind_a_dynamic_cache_is_bottom_right_causal():
    held = DynamicCache()
    _, ours = build("Llama")
    ours(tokens()[:, :5], past_key_values=held)
    report = sgl_npu.explain(ours, tokens()[:, 5:], past_key_values=held)
    assert [site.mask for site in report.sites] == ["causal (bottom-right)"] * 2
    assert held.get_seq_length() == 5


def _library_mask(rows: int, columns: int, window: int) -> torch.Tensor:
    return masking.sdpa_mask(
        1, rows, columns, columns - rows, mask_function=masking.sliding_window_causal_mask_function(window),
        allow_is_causal_skip=False,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "window"), [(6, 6, 3), (3, 9, 4), (1, 9, 4), (6, 6, 1), (6, 6, 6)])
def test_the_window_is_the_library_s_own_to_the_key(rows, columns, window):
    class Config:
        sliding_window = window

    mask = hook.attention_mask(
        1, rows, columns, columns - rows, local_size=window, config=Config(),
        mask_function=masking.sliding_window_causal_mask_function(window),
    )  # fmt: skip
    kept, lower, upper = hook._band(mask, rows, columns, causal=True)
    assert kept is None
    band = hook.band_mask(rows, columns, lower, upper, torch.device("cpu"))
    found = torch.ones(rows, columns, dtype=torch.bool) if band is None else band
    assert torch.equal(found, _library_mask(rows, columns, window)[0, 0])


class _Chunked:
    attention_chunk_size, sliding_window = 4, None


class _Window:
    sliding_window = 4


NOT_A_BAND = {
    "chunked attention": {"config": _Chunked(), "local_size": 4},
    "another local size": {"config": _Window(), "local_size": 5},
    "a mask function of its own": {"mask_function": lambda b, h, q, kv: kv <= q + 1},
    "the library says no": {"allow_is_causal_skip": False},
    "padding": {"attention_mask": torch.tensor([[False] + [True] * 7])},
    "a static cache": {"q_offset": torch.tensor(0)},
    "keys beyond the last query": {"q_offset": 0, "kv_length": 16, "attention_mask": torch.ones(1, 9).bool()},
}


@pytest.mark.parametrize("case", NOT_A_BAND)
def test_a_mask_in_doubt_is_built(case):
    settings = {"batch_size": 1, "q_length": 8, "kv_length": 8, "q_offset": 0, **NOT_A_BAND[case]}
    if case == "a static cache":
        settings["kv_length"] = 16
        settings["attention_mask"] = torch.ones(1, 12).bool()
    mask = hook.attention_mask(**settings)
    assert mask.shape == (1, 1, 8, settings["kv_length"])


def test_dropout_is_left_to_the_library_s_sdpa():
    _, ours = build("Mistral", attention_dropout=0.5)
    ours.train()
    torch.manual_seed(0)
    found = ours(tokens()).logits
    ours.config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    assert_same(found, ours(tokens()).logits)


@pytest.mark.parametrize(("name", "setting"), [("Gemma2", "softcap"), ("GptOss", "sinks")])
def test_dropout_with_what_sdpa_lacks_names_the_remedy(name, setting):
    _, ours = build(name, attention_dropout=0.5)
    with pytest.raises(ValueError, match=rf"dropout = 0.5 together with {setting}.*attention_dropout"):
        ours.train()(tokens())


def test_autocast_lowers_the_inputs_as_sdpa_does():
    eager, ours = build("Llama")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(tokens()).logits, eager(tokens()).logits
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found.float() - expected.float()).abs().max() < 2e-2


DOCUMENTS = (4, 5, 3)


def packed(name: str, shared: bool):
    """A model in bfloat16, its inputs as for the library's flash attention, and the logits of each document alone."""
    _, model = build(name, head_dim=64)
    model, ids = model.bfloat16(), tokens()[:1]
    ends = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0)], dtype=torch.int32)
    inputs = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends if shared else ends.clone(), "use_cache": False}
    with torch.no_grad():
        alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(DOCUMENTS, 1)], 1)
    return model, ids, inputs, alone


@pytest.mark.parametrize("shared", [True, False], ids=["the same ends", "equal ends"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@torch.no_grad()
def test_documents_that_are_told_by_their_ends_do_not_see_each_other(name, shared):
    model, ids, inputs, alone = packed(name, shared)
    torch.testing.assert_close(model(ids, **inputs).logits, alone, atol=2e-2, rtol=2e-2)
    torch._dynamo.reset()
    before = len(sgl_npu.reports())
    compiled = torch.compile(model, backend="sgl_npu", options={"platform": "npu", "inner": "eager"})
    torch.testing.assert_close(compiled(ids, **inputs).logits, alone, atol=2e-2, rtol=2e-2)
    sites = [site for report in sgl_npu.reports()[before:] for site in report.sites]
    assert {site.kernel for site in sites} == {"ascend_packed" if shared else "ascend_fa"}


@torch.no_grad()
def test_ends_count_the_tokens_of_all_rows():
    query, key, value = (torch.randn(2, heads, 6, 16) for heads in (4, 2, 2))
    ends, module = torch.tensor([0, 6, 8, 12], dtype=torch.int32), torch.nn.Module()
    found, _ = hook.attention_forward(module, query, key, value, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    for row, parts in enumerate(((6,), (2, 4))):
        pieces = zip(*(x[row : row + 1].split(parts, 2) for x in (query, key, value)), strict=True)
        expected = torch.cat([hook.attention_forward(module, *piece, None)[0] for piece in pieces], 1)
        torch.testing.assert_close(found[row : row + 1], expected)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"all 2 rows end to end, but there is a mask.*pack the documents into one row"
    ):
        hook.attention_forward(module, query, key, value, mask, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_documents_may_have_more_keys_than_queries(causal, window):
    """As flash attention has it, each document's last query sees its last key."""
    torch.manual_seed(0)
    counts, key_counts = (2, 1, 3), (5, 1, 4)
    query, key, value = (torch.randn(1, 2, sum(n), 16) for n in (counts, key_counts, key_counts))
    ends, key_ends = (torch.tensor([0, *torch.tensor(n).cumsum(0)]) for n in (counts, key_counts))
    mask = torch.empty(1, 1, window, 0, dtype=torch.bool) if causal else None
    given = {"is_causal": causal}
    module = torch.nn.Module()
    found, _ = hook.attention_forward(
        module, query, key, value, mask, cu_seq_lens_q=ends, cu_seq_lens_k=key_ends, **given
    )
    parts = zip(query.split(counts, 2), key.split(key_counts, 2), value.split(key_counts, 2), strict=True)
    expected = torch.cat([hook.attention_forward(module, *part, mask, **given)[0] for part in parts], 1)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_dropout_keeps_documents_apart():
    """What is left to the library's sdpa gets band and documents in one mask."""
    query, key, value = torch.randn(3, 1, 2, 7, 16)
    value[:, :, :4] = 0.0
    ends, module = torch.tensor([0, 4, 7], dtype=torch.int32), torch.nn.Module()
    module.train()
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    found, _ = hook.attention_forward(module, query, key, value, None, dropout=0.1, **given)
    assert found[:, :4].eq(0).all() and found[:, 4:].ne(0).any()
    value[:, :, 4:] = 0.0
    value[:, :, :4] = 1.0
    found, _ = hook.attention_forward(module, query, key, value, None, dropout=0.1, **given)
    assert found[:, 4:].eq(0).all() and found[:, :4].ne(0).any()
