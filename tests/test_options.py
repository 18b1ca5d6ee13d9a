"""Every bad option raises one OptionsError when the first graph is compiled; the message says what to do."""

import pytest
import torch

import sgl_npu

X = torch.ones(2)

BAD = [
    ({"atention": "fa"}, "unknown option 'atention': did you mean 'attention'?"),
    ({"zzz": 1}, "unknown option 'zzz': known are platform, attention, "),
    ({"parallel": {"ulyses": 2}}, "unknown option 'parallel.ulyses': did you mean 'ulysses'?"),
    ({"strict": "yes"}, "strict = 'yes': input should be a valid boolean"),
    ({"platform": "tpu"}, "platform = 'tpu': input should be 'auto', 'npu', 'cuda' or 'cpu'"),
    ({"attention": "flash"}, "attention = 'flash': input should be 'auto', 'fa', 'sdpa'"),
    ({"inner": "xla"}, "inner = 'xla': input should be 'auto', 'inductor', 'eager'"),
    ({"parallel": 2}, "parallel = 2: input should be a valid dictionary or instance of Parallel"),
    ({"parallel": {"ulysses": 0}}, "parallel.ulysses = 0: input should be greater than or equal to 1"),
    ({"parallel": {"ring": -1}}, "parallel.ring = -1: input should be greater than or equal to 1"),
    ({"parallel": {"kv_gather": "2"}}, "parallel.kv_gather = '2': input should be a valid integer"),
    (
        {"parallel": {"ulysses": 2}},
        "Parallel(ulysses=2, ring=1, kv_gather=1): sequence parallelism is not part of",
    ),
    ({"parallel": sgl_npu.Parallel(ring=2)}, "leave every degree at 1"),
    (
        {"inner": "torchair", "platform": "cpu"},
        "inner = 'torchair' compiles for NPUs, but platform = 'cpu'; leave",
    ),
    (
        {"inner": "npugraph_ex", "platform": "npu"},
        "inner = 'npugraph_ex': this version does not hand graphs to",
    ),
    ({"inner": "torchair", "platform": "npu"}, "use inner = 'eager'"),
    (
        {"platform": "cuda"},
        "platform = 'cuda', but the inputs are on 'cpu'; move the model and its inputs to 'cuda'",
    ),
    ({"inner_options": 3}, "inner_options = 3: input should be a valid dictionary"),
    ({"inner_options": {"epilogue_fusio": True}}, "did you mean 'epilogue_fusion'?"),
    ({"inner_options": {"zzz": True}}, "'zzz' is not a setting of torch._inductor.config; leave it out"),
    (
        {"inner_options": {"max_autotune": "x"}},
        "max_autotune = 'x': torch._inductor.config wants bool, got str",
    ),
    (
        {"inner_options": {"max_autotune": True}, "inner": "eager"},
        "inner 'eager' has no options; leave them out",
    ),
    (
        {"attention_config": {"topk": 1}},
        "attention_config = {'topk': 1}: only sparse attention has settings; leave it out",
    ),
    (
        {"attention": "laser_attn"},
        "attention = 'laser_attn': sparse attention is not part of this version; use 'auto'",
    ),
    ({"attention": "block_sparse_attn"}, "sparse attention is not part of this version"),
    (
        {"attention": "rain_fusion_attn", "attention_config": {"a": 1}},
        "sparse attention is not part of this version",
    ),
    ({"inner": "eager", "mode": "max-autotune"}, "mode = 'max-autotune': modes are Inductor's, and inner is 'eager'"),
    ({"mode": "fast"}, "mode = 'fast': should be one of default, reduce-overhead, max-autotune"),
    (sgl_npu.Options(mode="fast"), "mode = 'fast': should be one of default, reduce-overhead, max-autotune"),
    ({1: 2}, "an option name is not a string (keywords must be strings); known are platform, "),
    (5, "options = 5: expected a dict or sgl_npu.Options, got int"),
    ("fa", "options = 'fa': expected a dict or sgl_npu.Options, got str"),
]


def error_of(model=torch.sin, **compile_arguments):
    torch._dynamo.reset()
    before = len(sgl_npu.reports())
    with pytest.raises(sgl_npu.OptionsError) as caught:
        torch.compile(model, backend="sgl_npu", **compile_arguments)(X)
    assert len(sgl_npu.reports()) == before
    return str(caught.value)


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_a_bad_option_reaches_the_user_unwrapped_and_once(options, message):
    assert error_of(options=options).count(message) == 1


def test_an_unknown_mode_of_torch_compile_names_the_known_ones():
    assert "mode = 'fast': should be one of default, reduce-overhead" in error_of(mode="fast")


def test_every_mistake_is_named_at_once():
    text = error_of(options={"platform": "tpu", "atention": "fa"})
    assert "platform = 'tpu'" in text and "unknown option 'atention'" in text


def test_a_bad_option_raises_in_a_model_with_graph_breaks_too():
    def model(x):
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()

    assert "platform = 'tpu'" in error_of(model, options={"platform": "tpu"})


def test_an_options_error_is_a_value_error():
    with pytest.raises(ValueError, match="did you mean 'attention'"):
        torch.compile(torch.sin, backend="sgl_npu", options={"atention": "fa"})(X)


GOOD = [
    {},
    {"platform": "cpu", "inner": "eager"},
    {"platform": "npu"},
    {"attention": "fa", "strict": True, "inner": "eager"},
    {"parallel": {"ulysses": 1}, "inner": "eager"},
    {"parallel": sgl_npu.Parallel(), "inner": "eager"},
    {"inner": "inductor", "mode": "max-autotune-no-cudagraphs"},
    {"inner_options": {"epilogue-fusion": False, "triton.cudagraphs": False}},
    sgl_npu.Options(inner="eager"),
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_a_good_option_is_taken(options):
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(torch.sin, backend="sgl_npu", options=options)(X), X.sin())
