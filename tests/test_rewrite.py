"""Programs of torch.export go through the same passes and come out as programs."""

import io
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from compiled_report import assert_same
from torch import nn
from torch.export import Dim, export

import sgl_npu
from sgl_npu.compiler import pipeline

WIDTH, HEADS, KV_HEADS, LONGEST = 64, 4, 2, 64
SIZE = WIDTH // HEADS
PLATFORMS = {"cpu": torch.float32, "npu": torch.bfloat16}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Attention(nn.Module):
    """Llama's: grouped heads; by F.sdpa, or written out with a mask made of positions."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v, self.o = (
            nn.Linear(WIDTH, n * SIZE, bias=False) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        )

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, SIZE).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
            positions = torch.arange(length)
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(SIZE)
            scores = scores.masked_fill(positions[:, None] < positions[None], float("-inf"))
            out = scores.float().softmax(-1).to(q.dtype) @ v
        return self.o(out.transpose(1, 2).reshape(batch, length, -1))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, WIDTH)
        self.layers = nn.ModuleList((Attention(fused=True), Attention(fused=False)))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, tokens):
        self.calls += 1
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return x


def tokens(batch=2, length=16):
    return torch.randint(100, (batch, length))


def exported(model, *args, dynamic=False, **shapes):
    if dynamic:
        shapes = {"dynamic_shapes": ({0: Dim("batch", min=1, max=8), 1: Dim("length", min=2, max=LONGEST)},)}
    with torch.no_grad():
        return export(model.eval(), args, **shapes)


def rewritten(program, platform="npu", **options):
    return sgl_npu.rewrite(program, {"platform": platform, "strict": True, **options})


def last_sites():
    return sgl_npu.reports()[-1].sites


def calls(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def round_trip(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("decomposed", (False, True), ids=("training IR", "inference IR"))
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_llama_keeps_its_answer_and_its_signature(platform, dynamic, decomposed):
    model = Llama().to(PLATFORMS[platform])
    program = exported(model, tokens(), dynamic=dynamic)
    program = program.run_decompositions({}) if decomposed else program
    code, result = program.graph_module.code, rewritten(program, platform)
    sites = last_sites()
    assert [(site.mask, site.fused) for site in sites] == [("causal", True)] * 2, sites
    assert [site.module for site in sites] == ["layers.0", "layers.1"]
    assert not any("softmax" in name or "sgl_npu" in name for name in calls(result))
    assert program.graph_module.code == code
    old, new = program.graph_signature, result.graph_signature
    assert [spec.target for spec in new.input_specs] == [spec.target for spec in old.input_specs]
    assert new.user_inputs == old.user_inputs and new.buffers_to_mutate
    assert result.state_dict.keys() == program.state_dict.keys()
    assert {str(x): str(y) for x, y in result.range_constraints.items()} == {
        str(x): str(y) for x, y in program.range_constraints.items()
    }
    for x in [tokens()] + [tokens(3, 7), tokens(1, 40)] * dynamic:
        with torch.no_grad():
            assert_same(result.module()(x), model(x))


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_saved_program_is_the_same_program(platform, dynamic):
    model = Llama().to(PLATFORMS[platform])
    result = rewritten(exported(model, tokens(), dynamic=dynamic), platform)
    loaded = round_trip(result)
    assert {*calls(loaded)} - {"<built-in function getitem>"} == {*calls(result)} - {"<built-in function getitem>"}
    x = tokens(3, 11) if dynamic else tokens()
    with torch.no_grad():
        assert_same(loaded.module()(x), model(x))
    with pytest.raises(AssertionError, match="Guard failed"):
        loaded.module()(tokens(2, LONGEST + 1))


@pytest.mark.slow
def test_a_program_runs_in_a_process_of_its_own(tmp_path):
    model, x = Llama().to(torch.bfloat16), tokens()
    result = rewritten(exported(model, x))
    torch.export.save(result, tmp_path / "llama.pt2")
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, sgl_npu; x, expected = torch.load(sys.argv[1] + '/expected.pt');"
        "program = torch.export.load(sys.argv[1] + '/llama.pt2');"
        "torch.testing.assert_close(program.module()(x), expected, atol=2e-2, rtol=2e-2)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_program_can_be_rewritten_again_and_compiled():
    model, x = Llama(), tokens()
    result = rewritten(rewritten(exported(model, x), "cpu"), "cpu")
    assert last_sites() == []
    with torch.no_grad():
        assert_same(torch.compile(result.module(), backend="aot_eager")(x), model(x))


def test_a_program_without_attention_stays_as_it_is():
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    result = rewritten(exported(model, x))
    assert (last_sites() == [] and calls(result) == ["aten.linear.default"]) or "aten.addmm.default" in calls(result)
    with torch.no_grad():
        assert_same(result.module()(x), model(x))


class Returned(nn.Module):
    """The attention itself is the output, and what surrounds it is a tree."""

    def forward(self, q, *, kv, mask=None):
        return {"out": [F.scaled_dot_product_attention(q, kv[0], kv[1], mask)], "q": q}


def test_outputs_and_keyword_inputs_keep_their_places():
    q, k, v = (torch.randn(2, HEADS, 8, 16, dtype=torch.bfloat16) for _ in range(3))
    program = export(Returned(), (q,), {"kv": (k, v)})
    result = round_trip(rewritten(program))
    assert last_sites()[0].op == "npu.npu_fused_infer_attention_score"
    assert_same(result.module()(q, kv=(k, v)), Returned()(q, kv=(k, v)))


class Constant(nn.Module):
    """A mask that is a plain attribute: torch.export makes it a constant."""

    def __init__(self, register):
        super().__init__()
        mask = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()
        if register:
            self.register_buffer("mask", mask)
        else:
            self.mask = mask

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, self.mask[: q.size(2), : k.size(2)])


@pytest.mark.parametrize("register, mask", ((False, "causal"), (True, "tensor")), ids=("constant", "buffer"))
def test_constants_are_proved_and_buffers_are_not(register, mask):
    q, k, v = (torch.randn(2, HEADS, 8, 16, dtype=torch.bfloat16) for _ in range(3))
    model = Constant(register)
    result = rewritten(export(model, (q, k, v)))
    (site,) = last_sites()
    assert (site.mask, site.guards) == (mask, [])
    assert_same(round_trip(result).module()(q, k, v), model(q, k, v))


def test_encoder_layers():
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, batch_first=True)
    x = torch.randn(2, 8, WIDTH)
    result = rewritten(exported(model, x), "cpu")
    (site,) = last_sites()
    assert site.fused and site.mask == "full"
    with torch.no_grad():
        assert_same(result.module()(x), model(x))


def test_what_capture_refuses_is_left_to_torch():
    def attend(q):
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    class Model(nn.Module):
        def forward(self, q):
            return attend(q)

    rewritten(export(Model(), (torch.randn(1, HEADS, 8, 16),)))
    (site,) = last_sites()
    assert not site.fused and "dropout_p = 0.5" in site.refusals[0][1]


def test_sdpa_leaves_calls_alone():
    q = torch.randn(1, HEADS, 8, 16)
    rewritten(export(Returned(), (q,), {"kv": (q, q)}), attention="sdpa")
    assert [site for site in last_sites() if site.fused] == []


def test_only_exported_programs_are_rewritten():
    with pytest.raises(TypeError, match=r"is not an ExportedProgram; pass torch.export.export\(model, args\)"):
        sgl_npu.rewrite(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "options, text",
    (
        ({"inner": "inductor"}, "inner = 'inductor': rewrite compiles nothing"),
        ({"mode": "max-autotune"}, "mode = 'max-autotune'"),
        ({"inner_options": {"max_autotune": True}}, "inner_options"),
        ({"platfrom": "npu"}, "did you mean 'platform'"),
    ),
)
def test_options_are_checked(options, text):
    with pytest.raises(sgl_npu.OptionsError, match=text):
        sgl_npu.rewrite(exported(nn.Linear(4, 4), torch.randn(2, 4)), options)


def test_a_failing_pass_is_undone_or_raises_where_strict(monkeypatch):
    def fail(gm, context):
        raise RuntimeError("on purpose")

    model, x = Llama(), tokens()
    program = exported(model, x)
    monkeypatch.setattr(pipeline, "PASSES", (pipeline.Pass("failing", fail), *pipeline.PASSES))
    with pytest.raises(RuntimeError, match="on purpose"):
        rewritten(program, "cpu")
    with pytest.warns(UserWarning, match="'failing' failed and was undone"):
        result = rewritten(program, "cpu", strict=False)
    with torch.no_grad():
        assert_same(result.module()(x), model(x))
