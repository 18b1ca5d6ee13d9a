"""Every bad option raises one OptionsError when the first graph is compiled; the message says what to do."""

import pytest
import torch

import sgl_npu
from sgl_npu.compiler import inner, inner_ascend
from sgl_npu.compiler.inner import resolve_inner
from sgl_npu.compiler.options import ASCEND_INNERS

X = torch.ones(2)

BAD = [
    ({"atention": "fa"}, "unknown option 'atention': did you mean 'attention'?"),
    ({"zzz": 1}, "unknown option 'zzz': known are platform, attention, "),
    ({"parallel": {"ulyses": 2}}, "unknown option 'parallel.ulyses': did you mean 'parallel.ulysses'?"),
    ({"strict": "yes"}, "strict = 'yes': input should be a valid boolean"),
    ({"merge_projections": 1}, "merge_projections = 1: input should be a valid boolean"),
    ({"merge_projection": True}, "unknown option 'merge_projection': did you mean 'merge_projections'?"),
    (
        {"merge_projections": True, "platform": "cpu"},
        "merge_projections = True is for an op of NPUs, but platform = 'cpu'; leave merge_projections out, or set",
    ),
    ({"platform": "tpu"}, "platform = 'tpu': input should be 'auto', 'npu', 'cuda' or 'cpu'"),
    ({"attention": "flash"}, "attention = 'flash': input should be 'auto', 'fa', 'sdpa'"),
    ({"inner": "xla"}, "inner = 'xla': input should be 'auto', 'inductor', 'eager'"),
    ({"parallel": 2}, "parallel = 2: input should be a valid dictionary or instance of Parallel"),
    ({"parallel": {"ulysses": 0}}, "parallel.ulysses = 0: input should be greater than or equal to 1"),
    ({"parallel": {"ring": -1}}, "parallel.ring = -1: input should be greater than or equal to 1"),
    ({"parallel": {"kv_gather": "2"}}, "parallel.kv_gather = '2': input should be a valid integer"),
    ({"parallel": {"zzz": 2}}, "unknown option 'parallel.zzz': known are ulysses, ring, kv_gather, degree, "),
    ({"parallel": {"shard": "outputs"}}, "parallel.shard = 'outputs': input should be 'auto', 'inputs' or 'none'"),
    ({"parallel": {"placement": "head"}}, "input should be 'auto', 'contiguous' or 'zigzag'"),
    ({"parallel": {"max_gather": 0}}, "parallel.max_gather = 0: input should be greater than 0"),
    ({"parallel": {"mesh": (2, 2)}}, "parallel.mesh = (2, 2): input should be an instance of DeviceMesh"),
    ({"parallel": {"degree": 4, "ring": 2}}, "ring = 2, degree = 4: degree leaves the schemes to us; give it alone"),
    (
        {"parallel": {"ring": 2, "kv_gather": 2}},
        "a sequence is shared by a ring or by a gather; leave one of them at 1",
    ),
    (
        {"parallel": {"ulysses": 2, "placement": "zigzag"}},
        "placement = 'zigzag' with ulysses = 2: ulysses computes whole sequences and needs no zigzag; leave placement",
    ),
    ({"parallel": {"ulysses": 2}}, "ulysses = 2 needs a process group, and there is none; start the program with"),
    ({"parallel": sgl_npu.Parallel(ring=2, ulysses=2)}, "ring = 2, ulysses = 2 needs a process group"),
    (
        {"inner": "torchair", "platform": "cpu"},
        "inner = 'torchair' compiles for NPUs, but platform = 'cpu'; leave",
    ),
    (
        {"inner": "npugraph_ex", "platform": "cuda"},
        "inner = 'npugraph_ex' compiles for NPUs, but platform = 'cuda'; leave",
    ),
    (
        {"inner": "torchair"},
        "inner = 'torchair' compiles for NPUs, but the platform is 'cpu'; leave inner at 'auto', or move the model",
    ),
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
    ({"inner": "eager", "mode": "max-autotune"}, "mode = 'max-autotune': modes are Inductor's, and inner is 'eager'"),
    ({"mode": "fast"}, "mode = 'fast': should be one of default, reduce-overhead, max-autotune"),
    (sgl_npu.Options(mode="fast"), "mode = 'fast': should be one of default, reduce-overhead, max-autotune"),
    ({1: 2}, "an option name is not a string (keywords must be strings); known are platform, "),
    (5, "options = 5: expected a dict or sgl_npu.Options, got int"),
    ("fa", "options = 'fa': expected a dict or sgl_npu.Options, got str"),
]


@pytest.fixture
def without_torch_npu(monkeypatch):
    """Hides it where it is installed."""
    monkeypatch.setattr(inner_ascend, "is_installed", lambda name: False)


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


@pytest.mark.parametrize("inner", ASCEND_INNERS)
def test_without_torch_npu_the_error_says_what_to_install(inner, without_torch_npu):
    text = error_of(options={"inner": inner, "platform": "npu"})
    assert f"inner = {inner!r}: {inner} is part of torch_npu, which is not installed" in text
    assert "pip install torch-npu in the version of your torch, or use inner = 'eager'" in text


@pytest.mark.parametrize("inner", ASCEND_INNERS)
def test_ascends_compilers_have_no_mode(inner):
    text = error_of(options={"inner": inner, "platform": "npu", "mode": "max-autotune"})
    assert f"mode = 'max-autotune': modes are Inductor's, and inner is {inner!r}; leave mode out" in text


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


# ---------------------------------------------------------------- who compiles

BOTH = {"npugraph_ex", "torchair"}
# inner, platform, device of the inputs, installed: who compiles
INNER = [
    ("auto", "cpu", "cpu", set(), "inductor"),
    ("auto", "cuda", "cuda", set(), "inductor"),
    ("auto", "cpu", "cpu", BOTH, "inductor"),
    ("auto", "npu", "npu", BOTH, "npugraph_ex"),
    ("auto", "npu", "npu", {"npugraph_ex"}, "npugraph_ex"),
    ("auto", "npu", "npu", {"torchair"}, "torchair"),
    ("auto", "npu", "npu", set(), "eager"),
    ("auto", "npu", "cpu", BOTH, "eager"),
    ("auto", "npu", "cpu", set(), "eager"),
    ("eager", "npu", "npu", BOTH, "eager"),
    ("eager", "cuda", "cuda", set(), "eager"),
    ("torchair", "npu", "npu", BOTH, "torchair"),
    ("torchair", "npu", "cpu", BOTH, "torchair"),
    ("npugraph_ex", "npu", "npu", BOTH, "npugraph_ex"),
    ("npugraph_ex", "npu", "cpu", BOTH, "npugraph_ex"),
    ("inductor", "npu", "cpu", BOTH, "inductor"),
    ("inductor", "cpu", "cpu", BOTH, "inductor"),
]
REFUSED_INNER = [
    ("inductor", "npu", "npu", "Inductor does not compile for NPU tensors; leave inner at 'auto'"),
    ("torchair", "cpu", "cpu", "compiles for NPUs, but the platform is 'cpu'"),
    ("torchair", "cuda", "cuda", "compiles for NPUs, but the platform is 'cuda'"),
    ("npugraph_ex", "cpu", "cpu", "move the model and its inputs to 'npu'"),
    ("npugraph_ex", "cuda", "cuda", "leave inner at 'auto'"),
]


@pytest.mark.parametrize(("asked", "platform", "device", "installed", "expected"), INNER)
def test_the_inner_compiler_follows_from_the_platform_and_what_is_installed(
    asked, platform, device, installed, expected, monkeypatch
):
    monkeypatch.setattr(inner_ascend, "is_installed", installed.__contains__)
    assert resolve_inner(sgl_npu.Options(inner=asked), platform, device) == expected


@pytest.mark.parametrize(("asked", "platform", "device", "reason"), REFUSED_INNER)
def test_an_inner_compiler_that_cannot_drive_the_device_is_refused(asked, platform, device, reason):
    with pytest.raises(sgl_npu.OptionsError, match=f"inner = '{asked}'.*{reason}"):
        resolve_inner(sgl_npu.Options(inner=asked), platform, device)


@pytest.mark.parametrize(
    ("asked", "settings"), [("npugraph_ex", {}), ("torchair", {}), ("auto", {"force_eager": True})]
)
def test_where_there_is_an_npu_a_piece_without_npu_tensors_runs_op_by_op(asked, settings, monkeypatch):
    monkeypatch.setattr(inner, "_has_npu", lambda: True)
    assert resolve_inner(sgl_npu.Options(inner=asked, inner_options=settings), "cpu", "cpu") == "eager"


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
