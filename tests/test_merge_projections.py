# ruff: noqa: E501
"""Query, key and value come from one product where their weights are a module's own, and nowhere else."""

from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F
import transformers
from rotary_cases import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, NORMS, Layer, angles, halves, neighbours
from torch import nn
from torch._subclasses import FakeTensorMode

import sgl_npu
from sgl_npu.compiler.backend import _mergeable

OPTIONS = {"platform": "npu", "inner": "eager", "strict": True, "merge_projections": True}
COLUMNS = (HEADS + 2 * KV_HEADS) * HEAD_DIM
PRODUCTS = ("aten.mm(", "aten.addmm(", "aten.bmm(", "aten.matmul(", "aten.linear(")


def inputs(batch=2, length=9, dtype=torch.float32):
    return torch.randn(batch, length, HIDDEN, dtype=dtype), torch.arange(length)


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="sgl_npu", options=OPTIONS | options.pop("more", {}), **options)


def check(model, *arguments, tolerance=1e-5, **more):
    """One product for each attention, no copy of what it gives, and eager's answer twice; returns the report."""
    model = model.eval().to(arguments[0].dtype)
    before = len(sgl_npu.reports())
    with torch.no_grad():
        run = compiled(model, more=more)
        for fresh in (arguments, (torch.randn_like(arguments[0]), *arguments[1:])):
            torch.testing.assert_close(run(*fresh), model(*fresh), rtol=tolerance, atol=tolerance)
    (report,) = sgl_npu.reports()[before:]
    assert [site.rotary.endswith(", projections merged") for site in report.sites] == [True] * len(report.sites)
    lines = report.graph.splitlines()
    assert sum(any(name in line for name in PRODUCTS) for line in lines) == len(report.sites)
    assert not [line for line in lines if "aten.cat(" in line and f", {COLUMNS}]" in line]
    return report


def refusal(model, *arguments):
    """Why projections are not merged, where the answer is eager's."""
    model = model.eval()
    before = len(sgl_npu.reports())
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(*arguments), model(*arguments), rtol=1e-5, atol=1e-5)
    (report,) = sgl_npu.reports()[before:]
    (site,) = report.sites
    assert "sgl_npu.split_qkv_rmsnorm_rope(" in report.graph
    return site.rotary.partition(", projections not merged: ")[2]


def without_bias(model, *places):
    for place in places:
        model.linears[place].bias = None
    return model


class Product(nn.Module):
    """x @ weight + bias, spelled by `form`."""

    def __init__(self, form, columns, weight=(1, 0)) -> None:
        super().__init__()
        size = (columns, HIDDEN) if weight == (1, 0) else (HIDDEN, columns)
        self.form, self.weight, self.bias = (
            form,
            nn.Parameter(torch.randn(size) / 8),
            nn.Parameter(torch.randn(columns)),
        )

    def forward(self, x):
        return self.form(x, self.weight, self.bias)


def spelled(form, places=range(3), transposed=True, model=None):
    model = model or Layer(norm="llama")
    for place in places:
        columns = model.linears[place].weight.shape[0]
        model.linears[place] = Product(form, columns, (1, 0) if transposed else (0, 1))
    return model


SPELLINGS = {
    "linear": (F.linear, True),
    "product and bias": (lambda x, w, b: x @ w + b, False),
    "bias and product": (lambda x, w, b: b + torch.matmul(x, w.transpose(0, 1)), True),
    "no bias": (lambda x, w, b: x @ w, False),
    "permuted": (lambda x, w, b: F.linear(x, w.permute(1, 0), b), False),
    "turned twice": (lambda x, w, b: F.linear(x, w.t().t(), b), True),
    "Conv1D": (lambda x, w, b: torch.addmm(b, x.view(-1, HIDDEN), w).view(*x.shape[:-1], -1), False),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_product(spelling):
    form, transposed = SPELLINGS[spelling]
    check(spelled(form, transposed=transposed), *inputs())


@pytest.mark.parametrize("missing", [(), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_biases_are_those_that_there_are(missing):
    report = check(without_bias(Layer(norm="llama"), *missing), *inputs())
    assert ("aten.mm(" in report.graph) == (len(missing) == 3)


@pytest.mark.parametrize("rotate", [halves, neighbours])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm(norm, rotate):
    check(Layer(rotate, norm), *inputs())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_number_of_key_heads(kv_heads):
    model = Layer(kv_heads=kv_heads).eval()
    x, positions = inputs()
    with torch.no_grad():
        report = sgl_npu.explain(model, x, positions, options=OPTIONS)
        torch.testing.assert_close(compiled(model)(x, positions), model(x, positions), rtol=1e-5, atol=1e-5)
    assert report.sites[0].rotary == "split, rotary embedding (halves), projections merged"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype):
    check(Layer(norm="llama"), *inputs(dtype=dtype), tolerance=2e-2)


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("batch, length", [(1, 1), (1, 7), (3, 1)])
def test_sizes_of_one(batch, length, heads_first):
    check(Layer(norm="llama", heads_first=heads_first), *inputs(batch, length))


def test_two_projections_become_one():
    class Shared(Layer):
        def heads(self, x):
            query, both = self.linears[0](x), self.linears[1](x)
            parts = (query, *both.chunk(2, -1))
            return [part.unflatten(-1, (-1, HEAD_DIM)) for part in parts]

    model = Shared(norm="none")
    model.linears = nn.ModuleList([nn.Linear(HIDDEN, HEADS * HEAD_DIM), nn.Linear(HIDDEN, 2 * KV_HEADS * HEAD_DIM)])
    check(model, *inputs())


def test_weights_may_be_buffers():
    class Kept(nn.Module):
        def __init__(self, linear) -> None:
            super().__init__()
            self.register_buffer("weight", linear.weight.detach())
            self.register_buffer("bias", linear.bias.detach())

        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    model = Layer(norm="llama")
    model.linears = nn.ModuleList(map(Kept, model.linears))
    check(model, *inputs())


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_every_layer_of_a_model(inner):
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(norm="llama") for _ in range(3)])
            self.back = nn.ModuleList([nn.LayerNorm(HEADS * HEAD_DIM) for _ in range(3)])

        def forward(self, x, positions):
            for layer, back in zip(self.layers, self.back, strict=True):
                x = x + back(layer(x, positions))[..., :HIDDEN]
            return x

    assert len(check(Layers(), *inputs(), inner=inner).sites) == 3


@pytest.mark.parametrize("family, merged", [("Qwen3", True), ("Llama", True), ("Qwen2", True), ("Olmo2", False)])
def test_decoders_of_transformers(family, merged):
    """Norms of heads, none, biases; OLMo 2 has a norm of all heads between a projection and its heads."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=2, vocab_size=32, **sizes)
    model, ids = getattr(transformers, f"{family}Model")(config).eval(), torch.randint(0, 32, (2, 8))
    run = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            found, expected = (f(ids, use_cache=False).last_hidden_state for f in (run, model))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            model.load_state_dict({name: x * 0.9 for name, x in model.state_dict().items()})
    ends = [site.rotary.partition(", projections ")[2] for site in sgl_npu.reports()[-1].sites]
    assert ends == [("merged" if merged else "not merged: query: its projection is no plain product")] * 2


def test_the_dense_steps_of_a_sparse_attention_read_merged_weights():
    class Video(Layer):
        def forward(self, x, positions):
            query, key, value = (part.transpose(1, 2) for part in self.heads(x))
            angle = angles(positions, self.head_dim)
            return F.scaled_dot_product_attention(halves(query, angle), halves(key, angle), value)

    model = Video(head_dim=64, rotated=64, kv_heads=HEADS).eval().bfloat16()
    config = {"sparsity": 0.8, "latent_shape": (4, 16, 16), "skip_first_steps": 1}
    run = compiled(model, more={"attention": "rain_fusion_attn", "attention_config": config})
    x, positions = inputs(1, 1024, torch.bfloat16)
    with torch.no_grad():
        for _ in range(2):
            with sgl_npu.denoising_step(0):
                torch.testing.assert_close(run(x, positions), model(x, positions), rtol=2e-2, atol=2e-2)
            with sgl_npu.denoising_step(1):
                assert not torch.allclose(run(x, positions), model(x, positions), rtol=2e-2, atol=2e-2)
            model.linears[0].weight.mul_(3)
    sparse, dense = sgl_npu.reports()[-1].graphs
    assert [graph.text.count("aten.addmm(") for graph in (sparse, dense)] == [3, 1]


def test_nothing_needs_data_to_be_explained():
    with FakeTensorMode(), torch.no_grad():
        report = sgl_npu.explain(Layer(norm="llama").eval(), *inputs(), options=OPTIONS)
    assert report.sites[0].rotary.endswith("projections merged")


def test_one_graph_for_every_length_and_batch():
    model = Layer(norm="llama").eval()
    function = compiled(model, dynamic=True)
    before = len(sgl_npu.reports())
    with torch.no_grad():
        for batch, length in ((2, 9), (3, 16), (5, 40)):
            x, positions = inputs(batch, length)
            torch.testing.assert_close(function(x, positions), model(x, positions), rtol=1e-5, atol=1e-5)
    (report,) = sgl_npu.reports()[before:]
    assert report.sites[0].rotary.endswith("projections merged")


class TestGolden(expecttest.TestCase):
    def test_the_graph_up_to_the_fused_op(self):
        torch.manual_seed(0)
        model = without_bias(Layer(norm="llama", heads_first=False), 1).eval()
        with torch.no_grad():
            report = sgl_npu.explain(model, *inputs(1), options=OPTIONS)
        lines = report.graph.splitlines()
        kept = [x for x in lines if x.startswith("input") or "= aten.t(" in x or "mm:" in x or "= sgl_npu.split" in x]
        self.assertExpectedInline(
            "\n".join(kept),
            """\
input: f32[1, 9, 48]
input1: f32[64, 48]
input2: f32[64]
input3: f32[32, 48]
input4: f32[32, 48]
input5: f32[32]
input6: f32[16]
input7: f32[16]
input8: i64[9]
input9: f32[128, 48]
input10: f32[128]
t: f32[48, 128] = aten.t(input9)
addmm: f32[9, 128] = aten.addmm(input10, view, t)
split_qkv_rmsnorm_rope: tuple = sgl_npu.split_qkv_rmsnorm_rope(addmm, view4, view2, 64, 32, 16, 1e-05, input6, input7)""",
        )


# What must not be merged


class WithArgument(Layer):
    """The weight of the key is an input."""

    def forward(self, x, positions, weight):
        self.key = weight
        return super().forward(x, positions)

    def heads(self, x):
        parts = [self.linears[0](x), F.linear(x, self.key), self.linears[2](x)]
        return [part.unflatten(-1, (-1, HEAD_DIM)) for part in parts]


class Gated(Layer):
    """The query's projection holds a gate for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.linears[0] = nn.Linear(HIDDEN, 2 * HEADS * HEAD_DIM)

    def heads(self, x):
        query, _ = self.linears[0](x).unflatten(-1, (HEADS, 2 * HEAD_DIM)).chunk(2, -1)
        return [query, *(f(x).unflatten(-1, (-1, HEAD_DIM)) for f in self.linears[1:])]


class Apart(Layer):
    """Keys and values of another tensor of as many rows."""

    def heads(self, x):
        parts = [self.linears[0](x), self.linears[1](x.flip(1)), self.linears[2](x.flip(1))]
        return [part.unflatten(-1, (-1, HEAD_DIM)) for part in parts]


class Tied(Layer):
    def forward(self, x, positions):
        return super().forward(x, positions) @ self.linears[0].weight


class Written(Layer):
    def forward(self, x, positions):
        out = super().forward(x, positions)
        with torch.no_grad():
            self.linears[1].weight.add_(0)
        return out


class LowRank(nn.Module):
    def __init__(self, linear) -> None:
        super().__init__()
        self.linear, self.down, self.up = linear, nn.Linear(HIDDEN, 4), nn.Linear(4, linear.weight.shape[0])

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def low_rank():
    model = Layer(norm="llama")
    model.linears[2] = LowRank(model.linears[2])
    return model


def quantised(x, w, b):
    return F.linear(x, (w * 64).round().to(torch.int8).to(x.dtype) / 64, b)


def parametrised():
    model = Layer(norm="llama")
    nn.utils.parametrizations.weight_norm(model.linears[0])
    return model


def one_bias():
    model = Layer(norm="llama")
    model.linears[1] = Product(lambda x, w, b: x @ w.t() + b, KV_HEADS * HEAD_DIM)
    model.linears[1].bias = nn.Parameter(torch.randn(1))
    return model


def half_turned():
    return spelled(lambda x, w, b: x @ w, [1], transposed=False, model=without_bias(Layer(), 0, 2))


REFUSED = {
    "computed": (
        lambda: spelled(lambda x, w, b: F.linear(x, w * 2, b), [1]),
        "key: its weight is computed in the graph",
    ),
    "half of a weight": (
        lambda: spelled(lambda x, w, b: F.linear(x, w[:, : HIDDEN // 2].repeat(1, 2), b), [0]),
        "query: its weight is computed in the graph",
    ),
    "quantised": (lambda: spelled(quantised, [2]), "value: its weight is computed in the graph"),
    "parametrised": (parametrised, "query: its weight is computed in the graph"),
    "one bias for all columns": (
        one_bias,
        "key: its projection is no plain product",
    ),
    "a number as bias": (
        lambda: spelled(lambda x, w, b: x @ w.t() + 1.0, [0]),
        "query: its projection is no plain product",
    ),
    "a computed bias": (
        lambda: spelled(lambda x, w, b: F.linear(x, w, b * 2), [1]),
        "key: its bias is computed in the graph",
    ),
    "low rank": (low_rank, "value: its projection is no plain product"),
    "a norm of all heads": (lambda: Layer(norm="llama", whole_norm=True), "query: its projection is no plain product"),
    "a gate": (Gated, "heads of query, key and value would not stand side by side"),
    "alternating": (lambda: Layer(projection="alternating", kv_heads=HEADS), ""),
    "packed": (lambda: Layer(projection="packed"), ""),
    "other rows": (Apart, "query, key and value are projected from different tensors"),
    "tied": (Tied, "a weight is used elsewhere too"),
    "written": (Written, "key: its weight is written to in the graph"),
    "turned weights": (half_turned, "their weights lie in different orders"),
    "biases added apart": (
        lambda: spelled(lambda x, w, b: F.linear(x, w) + b, [1]),
        "their biases are added in different ways",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_joined(case):
    make, reason = REFUSED[case]
    assert refusal(make(), *inputs()) == reason


def test_a_weight_that_is_passed_stays_joined():
    weight = torch.randn(KV_HEADS * HEAD_DIM, HIDDEN)
    reason = refusal(WithArgument(), *inputs(), weight)
    assert reason == "key: its weight is no parameter or buffer of a module"


def test_a_projection_that_is_used_elsewhere_stays_joined():
    class Returned(Layer):
        def heads(self, x):
            self.parts = [linear(x) for linear in self.linears]
            return [part.unflatten(-1, (-1, HEAD_DIM)) for part in self.parts]

        def forward(self, x, positions):
            return super().forward(x, positions), self.parts[2]

    assert refusal(Returned(), *inputs()) == "a projection is used elsewhere too"


def test_weights_that_autocast_narrows_stay_joined():
    model, (x, positions) = Layer().eval(), inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        report = sgl_npu.explain(model, x, positions, options=OPTIONS)
        torch.testing.assert_close(compiled(model)(x, positions), model(x, positions), rtol=2e-2, atol=2e-2)
    assert report.sites[0].rotary.endswith("projections not merged: query: its weight is computed in the graph")


def test_nothing_is_merged_unasked_and_nothing_said():
    with torch.no_grad():
        report = sgl_npu.explain(Layer().eval(), *inputs(), options=OPTIONS | {"merge_projections": False})
    assert report.sites[0].rotary == "split, rotary embedding (halves)"
    assert report.graph.count("aten.addmm(") == 3


def test_a_graph_that_is_differentiated_is_left_alone():
    model, (x, positions) = Layer(norm="llama"), inputs()
    expected = torch.autograd.grad(model(x, positions).sum(), model.linears[0].weight)[0]
    result = torch.autograd.grad(compiled(model)(x, positions).sum(), model.linears[0].weight)[0]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_a_program_keeps_its_parameters():
    model, (x, positions) = Layer(norm="llama").eval(), inputs()
    with torch.no_grad():
        program = torch.export.export(model, (x, positions))
        result = sgl_npu.rewrite(program, {"platform": "npu", "merge_projections": True})
        torch.testing.assert_close(result.module()(x, positions), model(x, positions), rtol=1e-5, atol=1e-5)
    rotary = sgl_npu.reports()[-1].sites[0].rotary
    assert rotary.endswith("projections not merged: a program keeps its parameters as they are")
    assert result.state_dict.keys() == program.state_dict.keys()


def test_ranks_that_share_a_sequence_merge_nothing():
    options = sgl_npu.Options(merge_projections=True, parallel={"ulysses": 2})
    assert _mergeable(options, None, []).reason == "ranks share the sequence"


def test_attentions_in_nested_graphs_stay_joined():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(norm="llama")

        def forward(self, x, positions):
            return torch.cond(
                x.sum() > 0, lambda a, b: self.layer(a, b), lambda a, b: self.layer(a, b) * 2, (x, positions)
            )

    model, (x, positions) = Branches().eval(), inputs()
    run = compiled(model)
    with torch.no_grad():
        for given in (x.abs(), -x.abs()):
            torch.testing.assert_close(run(given, positions), model(given, positions), rtol=1e-5, atol=1e-5)
    texts = [site.rotary.partition(", projections not merged: ")[2] for site in sgl_npu.reports()[-1].sites]
    assert texts == ["query: its weight is no parameter or buffer of a module"] * 2
