"""`Report.sparse_quality`: what a sparse attention computes, how good that is, and its pictures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sgl_npu
from sgl_npu.compiler.block_picture import GLYPHS, picture, svg
from sgl_npu.compiler.report import merge
from sgl_npu.compiler.report_table import grouped
from sgl_npu.compiler.sparse_calls import READERS, sparse_sequences
from sgl_npu.compiler.sparse_quality import SAMPLED_ROWS, measured, quality
from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sparse.selection import BLOCK, pooled_blocks
from sgl_npu.lowering.sparse.tile_order import tiled_order
from sgl_npu.lowering.sparse.token_grid import TokenGrid
from sgl_npu.passes.site import SiteRecord
from sgl_npu.runtime.block_attention import block_attention
from sgl_npu.runtime.npu.package_ops import ensure_package_ops

GRID = (4, 16, 16)  # 8 blocks, of which 2 are the first frame
HEAD = 32
METHODS = ("rain_fusion_attn", "block_sparse_attn")


class Attention(nn.Module):
    """Self-attention whose queries and keys are its input."""

    def __init__(self, heads=2, kv_heads=2) -> None:
        super().__init__()
        width, self.kv_heads = heads * HEAD, kv_heads
        self.query, self.key, self.value = (nn.Linear(width, n * HEAD) for n in (heads, kv_heads, kv_heads))
        for project in (self.query, self.key):
            nn.init.eye_(project.weight)
            nn.init.zeros_(project.bias)

    def forward(self, x):
        query, key, value = (p(x).unflatten(2, (-1, HEAD)).transpose(1, 2) for p in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=query.size(1) != self.kv_heads)
        return out.transpose(1, 2).flatten(2)


class Layers(nn.Module):
    def __init__(self, count=2, **shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(**shape) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def near(grid=GRID, batch=1, heads=2, seed=0, gain=2.0):
    """(B, S, heads x 32): tokens that are the more alike the nearer they are, as random waves of the position."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in grid))
    waves = torch.randn(batch, heads, 3, HEAD // 2, generator=generator) * torch.tensor([0.5, 0.25, 0.25])[:, None]
    angles = place @ waves
    return (torch.cat((angles.cos(), angles.sin()), -1) * gain).transpose(1, 2).flatten(2)


def explained(model, x, attention="rain_fusion_attn", sparsity=0.5, grid=GRID, **options):
    config = {"sparsity": sparsity, "latent_shape": grid, **options.pop("config", {})}
    options = {"attention": attention, "attention_config": config, "strict": True, **options}
    if options.get("platform") == "npu":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.no_grad():
        return sgl_npu.explain(model, x, options=options)


def only(report):
    (found,) = report.sparse_quality()
    return found


# ---------------------------------------------------------------- what the numbers are


@pytest.mark.filterwarnings("ignore:.*sparsity = 0.0 leaves nothing out")
@pytest.mark.parametrize("attention", METHODS)
def test_without_sparsity_all_is_computed_and_nothing_lost(attention):
    found = only(explained(Attention(), near(), attention, 0.0))
    assert found.density == 1.0 and found.blocks.all()
    assert found.recall == pytest.approx(1.0, abs=1e-5) and found.worst_recall > 1 - 1e-5
    assert found.error < 1e-5 and found.error_l2 < 1e-5


@pytest.mark.parametrize("attention", METHODS)
def test_recall_and_density_grow_as_sparsity_falls(attention):
    found = [only(explained(Attention(), near(), attention, sparsity)) for sparsity in (0.9, 0.6, 0.3)]
    for name in ("density", "recall"):
        values = [getattr(x, name) for x in found]
        assert values == sorted(values) and len(set(values)) == 3
    assert found[0].error_l2 > found[2].error_l2
    assert all(x.worst_recall <= x.recall for x in found)


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_rain_fusion_finds_more_than_a_random_choice_of_as_many_blocks(sparsity):
    grid = TokenGrid(4, 24, 24)
    order = tiled_order(grid, torch.device("cpu"))
    tokens = near((4, 24, 24), heads=2)[:, order].unflatten(2, (2, HEAD)).transpose(1, 2)
    call = AttentionCall(tokens, tokens, torch.randn_like(tokens), scale=HEAD**-0.5)
    chosen = pooled_blocks(call, grid, Fraction(str(sparsity)))
    shuffled = torch.stack([row[torch.randperm(row.numel())] for row in chosen.flatten(0, 2)]).view_as(chosen)
    good, random = (measure_blocks(call, mask) for mask in (chosen, shuffled))
    assert good.density == pytest.approx(random.density, abs=0.02)
    assert good.recall > random.recall + 0.1 and good.error_l2 < random.error_l2


def measure_blocks(call, mask, rows=SAMPLED_ROWS):
    arguments = call.query, call.key, call.value, mask, call.scale
    out = block_attention(*arguments)
    found = measured(sparse_sequences(torch.ops.sgl_npu.block_attention.default, arguments, {}, out))
    return quality(SiteRecord(0, ""), found, rows, 0)


@pytest.mark.parametrize(("length", "kv_heads"), [(200, 4), (256, 4), (130, 2)])
def test_the_numbers_are_the_formula(length, kv_heads):
    query, key, value = (torch.randn(2, n, length, HEAD) for n in (4, kv_heads, kv_heads))
    mask = torch.rand(2, 4, 2, 2) < 0.5
    mask[..., 0] = True
    call = AttentionCall(query, key, value, scale=0.5)
    found = measure_blocks(call, mask)
    place = torch.arange(length) // BLOCK
    allowed = mask[:, :, place[:, None], place]
    key, value = (x.repeat_interleave(4 // kv_heads, 1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * 0.5).softmax(-1)
    dense, sparse = weights @ value, F.scaled_dot_product_attention(query, key, value, allowed, scale=0.5)
    recall = (weights * allowed).sum(-1)
    torch.testing.assert_close(found.density_per_head, allowed.float().mean((2, 3)))
    assert found.density == pytest.approx(allowed.float().mean().item())
    assert found.rows == found.tokens == length
    torch.testing.assert_close(found.recall_per_head, recall.mean(2))
    assert found.recall == pytest.approx(recall.mean().item(), abs=1e-5)
    assert found.worst_recall == pytest.approx(recall.min().item(), abs=1e-5)
    assert found.error == pytest.approx(((sparse - dense).abs().max() / dense.abs().max()).item(), abs=1e-5)
    assert found.error_l2 == pytest.approx(((sparse - dense).norm() / dense.norm()).item(), abs=1e-5)


def test_a_sample_is_near_the_whole_and_depends_on_the_seed():
    report = explained(Attention(), near())
    whole, some, other = (report.sparse_quality(n, seed)[0] for n, seed in ((SAMPLED_ROWS, 0), (64, 0), (64, 1)))
    assert (whole.rows, some.rows, whole.tokens) == (256, 64, 1024)
    assert some.recall != other.recall and some.density == whole.density
    assert some.recall == pytest.approx(whole.recall, abs=0.1)
    assert report.sparse_quality(64, 1)[0].recall == other.recall


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "1", None])
def test_a_seed_that_cannot_be_is_one_clear_error(seed):
    with pytest.raises(ValueError, match=r"seed = .*: should be an integer from 0 to 2\*\*63 - 1; give any, as 0"):
        sgl_npu.Report().sparse_quality(seed=seed)


def test_numbers_of_numpy_are_taken():
    report = explained(Attention(), near())
    assert report.sparse_quality(np.int32(64), np.int64(1))[0].recall == report.sparse_quality(64, 1)[0].recall
    assert report.sparse_quality(seed=2**63 - 1)


@pytest.mark.parametrize("sample", [0, SAMPLED_ROWS + 1, 1.5, True])
def test_a_sample_that_cannot_be_is_refused(sample):
    with pytest.raises(ValueError, match="should be a number of queries from 1 to 256"):
        sgl_npu.Report().sparse_quality(sample)


# ---------------------------------------------------------------- shapes


def test_every_sample_of_a_batch_has_blocks_of_its_own():
    found = only(explained(Attention(), near(batch=3)))
    assert found.blocks.shape == (3, 2, 8, 8) and found.recall_per_head.shape == (3, 2)
    assert not torch.equal(found.blocks[0], found.blocks[1]) and not torch.equal(found.blocks[1], found.blocks[2])
    alone = only(explained(Attention(), near(batch=3)[1:2]))
    assert torch.equal(alone.blocks[0], found.blocks[1])


@pytest.mark.parametrize("attention", METHODS)
def test_heads_that_share_keys_and_lengths_between_blocks(attention):
    grid = (3, 10, 14)
    model = Attention(heads=4, kv_heads=2)
    found = only(explained(model, near(grid, heads=4), attention, grid=grid))
    assert found.blocks.shape == (1, 4, 4, 4)  # 420 tokens
    assert found.density_per_head.shape == found.recall_per_head.shape == (1, 4)
    assert 0 < found.recall <= 1 and found.error > 0


def test_the_npu_s_rain_fusion_computes_the_same_blocks():
    model, x = Attention().bfloat16(), near().bfloat16()
    cpu, npu = (only(explained(model, x, platform=platform)) for platform in ("cpu", "npu"))
    assert (cpu.op, npu.op) == ("sgl_npu.block_attention", "sgl_npu.rain_fusion_attention")
    assert torch.equal(cpu.blocks, npu.blocks) and cpu.density == npu.density
    assert npu.recall == pytest.approx(cpu.recall, abs=1e-3)


def test_the_npu_s_block_sparse_attention_is_measured():
    grid = (5, 16, 16)  # 10 blocks: the kernel leaves out none of fewer
    found = only(explained(Attention(), near(grid), "block_sparse_attn", grid=grid, platform="npu"))
    assert found.op == "sgl_npu.block_sparse_attention"
    assert found.blocks.shape == (1, 2, 10, 10)  # of 32 columns of the kernel's mask
    assert 0.5 < found.density < 1 and found.recall > found.density


def test_sequences_of_several_lengths_are_read_from_lists_and_from_masks():
    ensure_package_ops()
    lengths, keys = [100, 40], [70, 30]
    query, key = torch.randn(140, 2, 16).half(), torch.randn(100, 1, 16).half()
    listed = torch.tensor([[0, 2], [1, -1], [0, -1]])[:, None].expand(3, 2, 2).contiguous()
    arguments = query, key, key, listed, (listed >= 0).sum(-1), lengths, keys, 0.25, [64, 32], "TND"
    op = torch.ops.sgl_npu.rain_fusion_attention.default
    # 100 queries: 2 blocks, of 64 and 36. 70 keys: 3 blocks, of 32, 32 and 6.
    found = quality(SiteRecord(0, ""), measured(sparse_sequences(op, arguments, {}, op(*arguments))), 256, 0)
    assert found.blocks[:, 0].tolist() == [[[1, 0, 1], [0, 1, 0]], [[1, 0, 0], [0, 0, 0]]]
    assert found.density == pytest.approx((64 * 38 + 36 * 32 + 40 * 30) / (100 * 70 + 40 * 30))
    assert found.recall_per_head[1].tolist() == pytest.approx([1.0, 1.0])
    assert found.block_shape == (64, 32)


def test_the_mask_of_the_npu_s_own_op_is_read():
    library = torch.library.Library("sgl_npu_quality_test", "FRAGMENT")
    library.define(
        "npu_block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor block_sparse_mask,"
        " int[] block_shape, *, str q_input_layout='TND', str kv_input_layout='TND', int num_key_value_heads=1,"
        " float scale_value=0.0, int inner_precise=1, int[]? actual_seq_lengths=None,"
        " int[]? actual_seq_lengths_kv=None, int? softmax_lse_flag=0) -> (Tensor, Tensor)"
    )
    op = torch.ops.sgl_npu_quality_test.npu_block_sparse_attention.default
    x = torch.randn(1, 2, 300, 32)
    mask = torch.tensor([[1, 0, 1]]).expand(1, 2, 3, 3).to(torch.int8)
    given = {x.name: x.default_value for x in op._schema.arguments} | {
        "query": x, "key": x, "value": x, "block_sparse_mask": mask, "block_shape": [128, 128],
        "q_input_layout": "BNSD", "scale_value": 0.2,
    }  # fmt: skip
    found = READERS["npu.npu_block_sparse_attention"](given)
    assert [x.tolist() for x in found.masks] == [mask[0].bool().tolist()]
    assert (found.lengths, found.layout, found.scale, found.block_shape) == (([300], [300]), "BNSD", 0.2, (128, 128))


# ---------------------------------------------------------------- which sites


def test_sites_are_in_graph_order():
    found = explained(Layers(), near()).sparse_quality()
    assert [(x.site, x.module, x.runs) for x in found] == [(0, "layers.0", 1), (1, "layers.1", 1)]


def test_of_several_runs_the_last_one_counts():
    model, x = Attention(), near()

    @torch.compiler.disable(recursive=False)
    def twice(x):
        model(x * 0.1)
        return model(x)

    last, both = only(explained(model, x)), only(explained(twice, x))
    assert (last.runs, both.runs) == (1, 2)
    assert both.recall == last.recall and torch.equal(both.blocks, last.blocks)


def test_the_layers_that_stay_dense_are_not_listed():
    report = explained(Layers(), near(), config={"layers": "layers.1"})
    assert [x.site for x in report.sparse_quality()] == [1]


def test_where_nothing_is_sparse_the_list_is_empty():
    with torch.no_grad():
        assert sgl_npu.explain(Attention(), near()).sparse_quality() == []
    assert explained(Attention(), near(), grid=(4, 16, 17)).sparse_quality() == []
    assert sgl_npu.Report().sparse_quality() == []


def test_what_only_was_compiled_is_not_known():
    torch._dynamo.reset()
    options = {"attention": "rain_fusion_attn", "attention_config": {"latent_shape": GRID}, "inner": "eager"}
    with torch.no_grad():
        torch.compile(Attention(), backend="sgl_npu", options=options)(near())
    with pytest.raises(RuntimeError, match="this report is of a compilation"):
        sgl_npu.reports()[-1].sparse_quality()


@pytest.mark.slow
def test_under_inductor_blocks_cannot_be_seen():
    report = explained(Attention(heads=1, kv_heads=1), near((2, 8, 16), heads=1), inner="inductor", grid=(2, 8, 16))
    with pytest.raises(RuntimeError, match="inner = 'inductor', whose choice of blocks cannot be seen"):
        report.sparse_quality()
    assert "sparsity 0.5" in str(report)


def test_dense_steps_and_fake_tensors_measure_nothing():
    with pytest.warns(UserWarning, match="no step was announced"):
        report = explained(Attention(), near(), config={"skip_first_steps": 1})
    with pytest.raises(RuntimeError, match="no sparse attention ran with data"):
        report.sparse_quality()
    with FakeTensorMode():
        report = explained(Attention(), torch.empty(1, 1024, 64))
    with pytest.raises(RuntimeError, match="inputs are fake tensors"):
        report.sparse_quality()
    assert report.to_dict()["sparse_quality"] == []


# ---------------------------------------------------------------- reports and pictures


def test_the_report_shows_a_row_for_the_layers_and_is_small_as_data():
    report = explained(Layers(), near())
    (line,) = [line for line in str(report).splitlines() if "sparsity 0.5 over 4 x 16 x 16" in line]
    low, high = sorted(x.recall for x in report.sparse_quality())
    assert line.split()[0] == "0-1" and f"{low:.3f} to {high:.3f}" in line
    assert len(grouped(report.sites)) == 1
    data = report.to_dict()
    text = json.dumps(data)
    assert len(text) < 20_000 + len(report.graph) and "measures" not in data
    assert [x["site"] for x in data["sparse_quality"]] == [0, 1]
    assert data["sparse_quality"][0]["recall"] == report.sparse_quality()[0].recall


def test_merged_reports_number_the_measures_as_the_sites():
    parts = [explained(Layers(), near(seed=seed)) for seed in (0, 1)]
    whole = merge(parts).sparse_quality()
    assert [x.site for x in whole] == [0, 1, 2, 3]
    assert [x.recall for x in whole] == [x.recall for part in parts for x in part.sparse_quality()]


def test_a_picture_shows_each_block():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    assert picture(mask).splitlines() == ["┌────┐", "│█▀▄ │", "│   ▀│", "└────┘"]


def test_a_large_picture_fits_a_terminal_and_is_fuller_where_more_is_computed():
    mask = torch.zeros(512, 512).bool()
    mask[:, ::2] = True
    mask[:, :256] = True
    lines = picture(mask).splitlines()
    assert len(lines) == 34 and {len(line) for line in lines} == {66}
    assert {line[1:-1] for line in lines[1:-1]} == {"█" * 32 + "▒" * 32}
    assert list(GLYPHS)[4:] == ["░", "▒", "▓"]


def test_a_site_draws_its_heads(tmp_path):
    found = only(explained(Layers(1), near()))
    text = found.picture(head=1).splitlines()
    assert text[0] == "layers.0, batch 0: 8 x 8 blocks of 128 x 128"
    assert text[1].startswith("head 1: density 0.")
    assert len(text) == 2 + 4 + 2
    with pytest.raises(IndexError, match="head = 2: should be from 0 to 1"):
        found.picture(head=2)
    found.to_svg(tmp_path / "all.svg")
    found.to_svg(tmp_path / "one.svg", heads=[1])
    assert [covered(tmp_path / name) for name in ("all.svg", "one.svg")] == [
        found.blocks[0].sum((1, 2)).tolist(),
        [found.blocks[0, 1].sum().item()],
    ]


SVG = "{http://www.w3.org/2000/svg}"


def covered(path):
    """Blocks that each picture of a file shows, by the lengths of its strokes."""
    paths = ElementTree.parse(path).getroot().iter(f"{SVG}path")
    return [sum(int(run.split("m")[0].split("M")[0]) for run in x.get("d").split("h")[1:]) for x in paths]


def test_a_long_video_with_many_heads_makes_a_small_file():
    place = torch.arange(256)
    masks = [(torch.rand(256, 256) < 0.5) | ((place[:, None] - place).abs() < 8 * head) for head in range(12)]
    text = svg([(mask, f"head {head}") for head, mask in enumerate(masks)], "a < b & c")
    assert len(text) < 1_200_000
    assert "a &lt; b &amp; c" in text
    ElementTree.fromstring(text)
