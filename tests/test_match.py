"""Attention written by hand becomes one fused site, with the values, dtypes and strides of eager."""

import compiled_report
import handwritten
import pytest
import torch
from compiled_report import count, only_site
from handwritten import BIASED, CAUSAL, GROUPED, PLAIN, D, inputs

import sgl_npu

compiled = compiled_report.compiled
compile_for = compiled_report.compile_for

PLATFORMS = {"cpu": torch.float32, "npu": torch.bfloat16}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def matched(function, *args, platform="cpu", dynamic=None):
    """The one site of a function that has one: it is canonical, whichever kernel takes it, and no softmax is left."""
    reports = compiled(function, *args, platform=platform, dynamic=dynamic)
    site = only_site(reports)
    assert site.kernel, site.refusals
    assert count(reports[-1], "aten._softmax") == 0
    return site


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("spelling", (*PLAIN, *BIASED), ids=lambda f: f.__name__)
def test_every_spelling_is_one_site(spelling, platform):
    site = matched(spelling, *inputs(dtype=PLATFORMS[platform]), platform=platform)
    assert site.spelling == "softmax between two matmuls" and "handwritten.py" in site.source


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("spelling", GROUPED, ids=lambda f: f.__name__)
def test_repeated_heads_are_taken_away(spelling, platform):
    site = matched(spelling, *inputs(kv_heads=2, dtype=PLATFORMS[platform]), platform=platform)
    assert (site.query[1], site.key[1]) == ("4", "2")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("spelling", CAUSAL, ids=lambda f: f.__name__)
def test_a_mask_spelled_in_the_graph_is_known_to_be_causal(spelling, platform):
    site = matched(spelling, *inputs(dtype=PLATFORMS[platform]), platform=platform)
    assert site.mask == "causal"


@pytest.mark.parametrize("spelling", CAUSAL, ids=lambda f: f.__name__)
def test_bottom_right_causal_is_not_confused_with_top_left(spelling):
    site = matched(spelling, *inputs(rows=6, keys=20))
    assert site.mask == "band(-inf, 14)" or site.mask == "causal (bottom-right)"


def test_a_bias_and_a_mask_that_were_added_up_are_told_apart():
    assert matched(handwritten.added_to_bias, *inputs()).mask == "causal + bias"


def test_padding_stays_a_tensor_beside_the_band():
    def padded(q, k, v, padding):
        keep = handwritten.causal(q.shape[2], k.shape[2]) & padding[:, None, None, :]
        scores = q @ k.transpose(-2, -1) * 0.25
        return scores.masked_fill(~keep, handwritten.MIN).softmax(-1) @ v

    padding = torch.ones(handwritten.B, handwritten.S, dtype=torch.bool)
    padding[1, -5:] = False
    assert matched(padded, *inputs(), padding).mask == "causal & tensor"


def test_an_additive_mask_made_of_numbers_stays_a_bias():
    def masked(q, k, v, padding):
        bias = (1.0 - padding[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
        return (q @ k.transpose(-2, -1) / 4 + bias).softmax(-1) @ v

    padding = torch.ones(handwritten.B, handwritten.S)
    padding[1, -5:] = 0
    assert matched(masked, *inputs(), padding).mask == "full + bias"


def test_windows_of_five_dimensions_become_batches():
    def windows(q, k, v, bias, mask):
        scores = (q * 0.25) @ k.transpose(-2, -1) + bias
        scores = scores.view(-1, 3, *scores.shape[1:]) + mask[:, None]
        return scores.view(-1, *scores.shape[2:]).softmax(-1) @ v

    bias, mask = torch.randn(1, 4, 24, 24), torch.randn(3, 24, 24)
    site = matched(windows, *inputs(batch=6), bias, mask)
    assert site.query == ("6", "4", "24", "16") and site.mask == "full + bias"


def test_value_and_query_may_have_different_sizes():
    site = matched(handwritten.divided, *inputs(value_dim=32, keys=7))
    assert (site.query[3], site.value[3]) == ("16", "32")


def test_upcast_operands_are_used_before_their_cast():
    def upcast(q, k, v):
        scores = q.float() @ k.float().transpose(-2, -1) * 0.25
        return scores.softmax(-1).to(v.dtype) @ v

    assert matched(upcast, *inputs(dtype=torch.bfloat16), platform="npu").dtype == "bfloat16"


def test_a_result_that_stays_in_float32_is_computed_in_float32():
    def upcast(q, k, v):
        return (q.float() @ k.float().transpose(-2, -1) * 0.25).softmax(-1) @ v.float()

    assert matched(upcast, *inputs(dtype=torch.bfloat16)).dtype == "float32"


def projected(x, w, scale):
    q, k, v = ((x @ w).view(*x.shape[:2], 3, -1, D)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~handwritten.causal(x.shape[1], x.shape[1]), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_one_graph_serves_several_lengths_and_a_scale_that_is_an_input(platform):
    dtype, weight = PLATFORMS[platform], torch.randn(8, 3 * 4 * D) / 3
    before = len(sgl_npu.reports())
    run = compile_for(projected, platform, dynamic=True)
    for batch, length, scale in ((2, 24, 0.25), (3, 40, 0.125), (2, 7, 0.5)):
        x = torch.randn(batch, length, 8, dtype=dtype)
        with torch.no_grad():
            got, wanted = run(x, weight.to(dtype), scale), projected(x, weight.to(dtype), scale)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    site = only_site(sgl_npu.reports()[before:])
    assert site.fused and site.mask == "causal", site


@pytest.mark.parametrize("spelling", (*PLAIN, *BIASED, *CAUSAL), ids=lambda f: f.__name__)
def test_every_spelling_is_matched_with_dynamic_sizes(spelling):
    tensors = inputs()
    for x in tensors:
        torch._dynamo.mark_static(x, [1, 3])
    matched(spelling, *tensors, dynamic=True)


def test_a_formula_becomes_the_graph_that_the_call_becomes():
    def called(x, w):
        q, k, v = ((x @ w).view(*x.shape[:2], 3, -1, D)).permute(2, 0, 3, 1, 4).unbind(0)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(*x.shape[:2], -1)

    x, w = torch.randn(2, 24, 8, dtype=torch.bfloat16), torch.randn(8, 3 * 4 * D, dtype=torch.bfloat16) / 3
    (formula,), (call,) = compiled(lambda x, w: projected(x, w, 0.25), x, w), compiled(called, x, w)
    counts = [
        {op: count(report, op) for op in ("aten.clone", "aten.bmm", "aten.permute")} for report in (formula, call)
    ]
    assert counts[0] == counts[1]


def test_masks_shared_by_layers_are_built_once():
    def layers(q, k, v):
        keep = handwritten.causal(q.shape[2], k.shape[2]) & (torch.arange(k.shape[2]) * 5 % 7 != 3)
        mask = torch.where(keep, 0.0, handwritten.MIN)
        for _ in range(3):
            q = (q @ k.transpose(-2, -1) * 0.25 + mask).softmax(-1) @ v
        return q

    (report,) = compiled(layers, *inputs(), platform="cpu")
    assert report.fused == 3 and count(report, "aten.logical_and") <= 2, report.graph


MODELS = ("llama", "gpt2", "t5", "bert")


def small_model(name):
    import transformers as hf

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    configs = {
        "llama": lambda: hf.LlamaConfig(vocab_size=99, num_key_value_heads=2, **sizes),
        "gpt2": lambda: hf.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
        "t5": lambda: hf.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4),
        "bert": lambda: hf.BertConfig(vocab_size=99, **sizes),
    }
    config = configs[name]()
    config._attn_implementation = "eager"
    classes = {"llama": hf.LlamaModel, "gpt2": hf.GPT2Model, "t5": hf.T5EncoderModel, "bert": hf.BertModel}
    return classes[name](config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("name", MODELS)
def test_every_attention_of_a_model_written_by_hand_is_fused(name, inner):
    pytest.importorskip("transformers")
    model, ids = small_model(name), torch.randint(3, 99, (2, 24))
    before = len(sgl_npu.reports())
    settings = {} if name == "t5" else {"use_cache": False}
    with torch.no_grad():
        expected = model(ids, **settings)[0]
        got = compile_for(model, "cpu", inner)(ids, **settings)[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    sites = [site for report in sgl_npu.reports()[before:] for site in report.sites]
    assert [site.fused for site in sites] == [True, True], sites
    assert {site.mask for site in sites} == {
        "llama": {"causal"}, "gpt2": {"causal"}, "t5": {"full + bias"}, "bert": {"full"},
    }[name]  # fmt: skip
