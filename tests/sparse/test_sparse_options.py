"""What may be asked of sparse attention: one error for each mistake, with the value, the rule and the remedy."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from sparse.sparse_cases import small_wan, wan_inputs

import sgl_npu
from sgl_npu.compiler.options import parse_options, sparse_setting
from sgl_npu.lowering.sparse.token_grid import GridSetting

GRID = (2, 8, 16)

LAYERS = (
    "input should be a glob on module paths, as 'blocks.*.attn1', or a list of one or more; leave layers out for every "
    "module"
)
BAD = [
    (
        "auto",
        {"sparsity": 0.5},
        "sparsity = 0.5: attention = 'auto' has no settings; leave it out, or set attention to",
    ),
    ("sdpa", {"layers": "x"}, "layers = ('x',): attention = 'sdpa' has no settings"),
    ("rain_fusion_attn", {"topk": 1}, "unknown option 'attention_config.topk': known are sparsity, skip_first_steps, "),
    (
        "rain_fusion_attn",
        {"sparsty": 0.5},
        "unknown option 'attention_config.sparsty': did you mean 'attention_config.sparsity'?",
    ),
    ("rain_fusion_attn", {"sparsity": 1.0}, "attention_config.sparsity = 1.0: input should be less than 1"),
    ("block_sparse_attn", {"sparsity": 1}, "attention_config.sparsity = 1: input should be less than 1"),
    (
        "block_sparse_attn",
        {"sparsity": -0.1},
        "attention_config.sparsity = -0.1: input should be greater than or equal to 0",
    ),
    ("block_sparse_attn", {"sparsity": "half"}, "attention_config.sparsity = 'half': input should be a valid number"),
    ("rain_fusion_attn", {"sparsity": True}, "attention_config.sparsity = True: input should be a valid number"),
    ("rain_fusion_attn", {"sparsity": float("nan")}, "attention_config.sparsity = nan: input should be"),
    ("rain_fusion_attn", {"skip_first_steps": -1}, "skip_first_steps = -1: input should be greater than or equal to 0"),
    ("rain_fusion_attn", {"skip_first_steps": 1.5}, "skip_first_steps = 1.5: input should be a valid integer"),
    ("rain_fusion_attn", {"latent_shape": (21, 30)}, "latent_shape.2"),
    (
        "rain_fusion_attn",
        {"latent_shape": (21, 0, 52)},
        "latent_shape.1 = 0: input should be greater than or equal to 1",
    ),
    (
        "rain_fusion_attn",
        {"latent_shape": (21, 30, 52), "patch_size": (1, 2, 2)},
        "latent_shape is in tokens, patch_size is for the latent input; give one",
    ),
    ("rain_fusion_attn", {"text_len": 5, "prefix": 6}, "prefix = 6 of text_len = 5: the prefix is a part of the text"),
    (
        "laser_attn",
        {"text_len": 5},
        "text_len = 5: laser attention takes any sequence and no grid; leave it out, or set",
    ),
    ("rain_fusion_attn", {"layers": []}, f"attention_config.layers = []: {LAYERS}"),
    ("rain_fusion_attn", {"layers": 5}, f"attention_config.layers = 5: {LAYERS}"),
    ("rain_fusion_attn", {"layers": [5]}, f"attention_config.layers = [5]: {LAYERS}"),
    ("rain_fusion_attn", {"sparsity": np.bool_(False)}, "sparsity = np.False_: input should be a valid number"),
    ("rain_fusion_attn", {"skip_first_steps": True}, "skip_first_steps = True: input should be a valid integer"),
    ("rain_fusion_attn", {"skip_first_steps": np.bool_(True)}, "= np.True_: input should be a valid integer"),
    ("rain_fusion_attn", {"text_len": np.float32(5)}, "text_len = np.float32(5.0): input should be a valid integer"),
    ("rain_fusion_attn", {"latent_shape": (True, 2, 3)}, "latent_shape.0 = True: input should be a valid integer"),
    ("laser_attn", {"sparsity": 0.5}, "sparsity = 0.5: laser attention is dense; leave sparsity out, or set attention"),
]


@pytest.mark.parametrize(("attention", "config", "message"), BAD, ids=[str(case[:2]) for case in BAD])
def test_a_mistake_is_one_error(attention, config, message):
    with pytest.raises(sgl_npu.OptionsError) as caught:
        parse_options({"attention": attention, "attention_config": config})
    assert str(caught.value).count(message) == 1


def test_numbers_of_numpy_are_numbers():
    config = {
        "sparsity": np.float32(0.25),
        "skip_first_steps": np.int64(3),
        "latent_shape": np.array([2, 8, 16]),
        "text_len": np.uint8(5),
        "prefix": np.int16(2),
    }
    setting = sparse_setting(parse_options({"attention": "rain_fusion_attn", "attention_config": config}), "cpu")
    assert (setting.sparsity, setting.skip_first_steps) == (Fraction(1, 4), 3)
    assert setting.grid == GridSetting((2, 8, 16), None, 5, 2)
    assert all(type(size) is int for size in (*setting.grid.latent_shape, setting.skip_first_steps))
    parallel = parse_options({"parallel": {"ulysses": np.int64(2), "max_gather": np.float32(2)}}).parallel
    assert (parallel.ulysses, parallel.max_gather) == (2, 2.0)
    for wrong in ({"ulysses": True}, {"max_gather": True}, {"max_gather": "2"}):
        with pytest.raises(sgl_npu.OptionsError, match="input should be a valid"):
            parse_options({"parallel": wrong})


WRONG = [
    ({"text_len": 7}, "attention_config: text_len = 7, but 0 tokens are no video: (2, 8, 16) after 0"),
    ({"text_len": 7, "prefix": 3}, "attention_config: text_len = 7, but 0 tokens are no video: (2, 8, 16) after 0"),
]


@torch.no_grad()
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("config", "message"), WRONG, ids=str)
def test_text_that_the_graph_does_not_have_is_an_error(config, message, strict):
    torch._dynamo.reset()
    options = {"attention": "rain_fusion_attn", "attention_config": config, "strict": strict, "inner": "eager"}
    with pytest.raises(sgl_npu.OptionsError) as caught:
        torch.compile(small_wan(), backend="sgl_npu", options=options)(**wan_inputs(*GRID))
    assert message in str(caught.value) and "leave text_len and prefix out" in str(caught.value)


def test_sparse_attention_is_for_one_rank():
    options = {"attention": "rain_fusion_attn", "parallel": sgl_npu.Parallel(ulysses=2)}
    with pytest.raises(sgl_npu.OptionsError, match=r"with parallel: a sparse kernel chooses its blocks from the whole"):
        parse_options(options)


def test_sparsity_0_warns_and_suggests_laser():
    with pytest.warns(
        UserWarning, match=r"sparsity = 0.0 leaves nothing out; attention = 'laser_attn' computes the same"
    ):
        parse_options({"attention": "block_sparse_attn", "attention_config": {"sparsity": 0.0}})


def test_settings_have_defaults():
    setting = sparse_setting(parse_options({"attention": "rain_fusion_attn"}), "cpu")
    assert (float(setting.sparsity), setting.skip_first_steps, setting.layers) == (0.5, 0, ("*",))
    assert sparse_setting(parse_options({"attention": "fa"}), "cpu") is None


@pytest.mark.parametrize("attention", ["laser_attn", "block_sparse_attn", "rain_fusion_attn"])
def test_an_absent_kernel_is_an_error_that_says_what_to_install(attention):
    with pytest.raises(sgl_npu.OptionsError, match=r"build the wheel from github.com/sgl-project/sgl-kernel-npu"):
        sparse_setting(parse_options({"attention": attention}), "npu")


@torch.no_grad()
@pytest.mark.parametrize(
    "layers, sparse",
    [("*", 2), ("blocks.1.*", 1), (("blocks.0.attn1", "blocks.1.attn1"), 2), (["*.attn2"], 0), ("nothing", 0)],
    ids=str,
)
def test_layers_are_chosen_by_module_path(layers, sparse):
    config = {"latent_shape": GRID, "layers": layers}
    options = {"attention": "rain_fusion_attn", "attention_config": config, "strict": True}
    report = sgl_npu.explain(small_wan(), options=options, **wan_inputs(*GRID))
    assert sum(site.kernel == "rain_fusion_attn" for site in report.sites) == sparse
    if layers == "nothing":
        clause = "its module 'blocks.0.attn1' matches none of layers = nothing"
        assert ("rain_fusion_attn", clause) in report.sites[0].refusals


@pytest.mark.parametrize(
    "sparsity, fraction", [(1 - 0.7, (3, 10)), (0.99999, (9999, 10000)), (1e-18, (0, 1)), (1 / 3, (1, 3))]
)
def test_block_counts_times_a_sparsity_stay_small(sparsity, fraction):
    """1 - 0.7 is 0.30000000000000004, whose own fraction has 17 digits."""
    options = parse_options({"attention": "rain_fusion_attn", "attention_config": {"sparsity": sparsity}})
    assert sparse_setting(options, "cpu").sparsity.as_integer_ratio() == fraction
