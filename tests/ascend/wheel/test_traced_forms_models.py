"""transformers' own eager attention is fused alike whether the model was traced on the CPU or on an NPU."""

import copy

import pytest
import torch
from both_devices import CPU, NPU, OPTIONS, default_device

import sgl_npu

hf = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 16,
}
GPT2 = {"vocab_size": 99, "n_embd": 64, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
MODELS = {
    "Llama": ("LlamaModel", {**SIZES, "num_key_value_heads": 2}, "causal"),
    "Qwen3": ("Qwen3Model", {**SIZES, "num_key_value_heads": 2}, "causal"),
    "GPT-2": ("GPT2Model", GPT2, "causal"),
    "BERT": ("BertModel", SIZES, "full"),
    "T5": ("T5EncoderModel", T5, "full + bias"),
}


def build(name):
    torch.manual_seed(0)
    model_class, settings, _ = MODELS[name]
    config_class = model_class.removesuffix("Model").removesuffix("Encoder") + "Config"
    config = getattr(hf, config_class)(**settings)
    config._attn_implementation = "eager"
    return getattr(hf, model_class)(config).eval().half()


def run_on(device, model, calls, dynamic):
    """The sites, and the results on the CPU, of one graph for all calls."""
    torch._dynamo.reset()
    before = len(sgl_npu.reports())
    moved = copy.deepcopy(model).to(device)
    run = torch.compile(moved, backend="sgl_npu", options=OPTIONS)
    results = []
    for ids in calls:
        given = ids.to(device, copy=True)
        if dynamic:
            torch._dynamo.mark_dynamic(given, 1)
        with torch.no_grad(), default_device(device):
            settings = {} if isinstance(model, hf.T5EncoderModel) else {"use_cache": False}
            results.append(run(given, **settings)[0].cpu())
    (report,) = sgl_npu.reports()[before:]
    return [(site.fused, site.mask, site.op, site.query, site.key) for site in report.sites], results


def fused_alike(name, lengths, dynamic):
    model = build(name)
    calls = [torch.randint(3, 99, (2, length)) for length in lengths]
    sites, results = run_on(NPU, model, calls, dynamic)
    (site,) = sites
    assert site[:3] == (True, MODELS[name][2], "npu.npu_fused_infer_attention_score")
    for ids, result in zip(calls, results, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(result.float(), model.float()(ids)[0], atol=5e-3, rtol=5e-3)
    return sites == run_on(CPU, build(name), calls, dynamic)[0]


@pytest.mark.parametrize("name", ["Llama"])
def test_the_attention_of_a_model_is_fused_alike_on_both(name):
    assert fused_alike(name, [24], dynamic=False)


@pytest.mark.parametrize("name", MODELS)
def test_the_attention_of_a_model_is_fused_in_one_graph_for_all_lengths(name):
    assert fused_alike(name, [24, 17], dynamic=True)
