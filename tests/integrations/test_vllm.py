"""vLLM cannot be installed beside this torch: what it does with a backend is written down here, as 0.33.0 publishes it.

github.com/vllm-project/vllm, release 0.33.0 on PyPI: CompilationConfig.init_backend (vllm/config/compilation.py),
TorchCompileWithNoGuardsWrapper (vllm/compilation/wrapper.py), make_compiler (vllm/compilation/backends.py),
CompilerInterface (vllm/compilation/compiler_interface.py), Platform.get_compile_backend (vllm/platforms/interface.py).
"""

from __future__ import annotations

import inspect
import sys
import types
from pkgutil import resolve_name

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.registry import list_backends
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.split_module import split_module

import sgl_npu
from sgl_npu.compiler.options import OptionsError

BACKEND = "sgl_npu.integrations.vllm.backend"
COMPILER = "sgl_npu.integrations.vllm.compiler"


class CompilerInterface:
    """The published signatures, without their bodies."""

    name: str

    def initialize_cache(self, cache_dir: str, disable_cache: bool = False, prefix: str = ""):
        pass

    def compute_hash(self, vllm_config):
        return ""

    def compile(self, graph, example_inputs, compiler_config, compile_range, key=None):
        return None, None

    def load(self, handle, graph, example_inputs, graph_index, compile_range):
        raise NotImplementedError


@pytest.fixture
def published(monkeypatch):
    """`vllm.compilation.compiler_interface`, so far as a compiler imports it."""
    for name in ("vllm", "vllm.compilation", "vllm.compilation.compiler_interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm.compilation.compiler_interface"].CompilerInterface = CompilerInterface


@pytest.fixture
def on_npu(monkeypatch):
    monkeypatch.setenv("SGL_NPU_OPTIONS", '{"platform": "npu", "inner": "eager", "strict": true}')


class Causal(nn.Module):
    """Tokens of one sequence, as many as there are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(32, 192)

    def forward(self, x):
        query, key, value = self.project(x).unflatten(-1, (3, 2, 32)).permute(1, 2, 0, 3).unsqueeze(1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)[0].transpose(0, 1).flatten(1)


class Piece(nn.Module):
    """A compiled piece, where the piece was."""

    def __init__(self, run):
        super().__init__()
        self.forward = run


class Piecewise(torch.fx.Interpreter):
    """Goes through a split graph with fake tensors and gives each piece, with its inputs, to the compiler."""

    def __init__(self, split, compiler):
        super().__init__(split)
        self.compiler, self.compiled = compiler, {}

    def call_module(self, target, args, kwargs):
        self.compiled[target], handle = self.compiler.compile(getattr(self.module, target), list(args), {}, None)
        assert handle is None, "nothing is kept on disk"
        return super().call_module(target, args, kwargs)


def init_backend(name):
    """What modes 1 and 2 make of `CompilationConfig.backend`."""
    return name if name in list_backends(exclude_tags=()) else resolve_name(name)


def compiled_by_vllm(model, name, mode):
    """What the wrapper does, whose `dynamic=False` leaves symbols to sizes that are marked."""
    options = {} if mode == 1 else {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    return torch.compile(model, fullgraph=True, dynamic=False, backend=init_backend(name), options=options)


@torch.no_grad()
@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("name", [BACKEND, "sgl_npu"])
def test_a_graph_of_modes_1_and_2_serves_every_number_of_tokens(name, mode, on_npu):
    torch._dynamo.reset()
    model, before = Causal().bfloat16(), len(sgl_npu.reports())
    compiled = compiled_by_vllm(model, name, mode)
    for tokens in (40, 7, 2, 300, 2500):
        x = torch.randn(tokens, 32, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
    (report,) = sgl_npu.reports()[before:]
    sgl_npu.expect(report, fused="all")
    assert report.sites[0].mask == "causal"
    # A registered name has no options in these modes; the function reads them from the environment.
    assert report.platform == ("npu" if name == BACKEND else "cpu")


@torch.no_grad()
def test_one_token_is_a_graph_of_its_own_in_mode_1_and_an_error_in_mode_2(on_npu):
    """Dynamo takes 1 for no symbol; mode 2 drops the guard that says so, and the kernel refuses a call for more."""
    model, one = Causal().bfloat16(), torch.randn(1, 32, dtype=torch.bfloat16)
    for mode in (1, 2):
        torch._dynamo.reset()
        compiled = compiled_by_vllm(model, BACKEND, mode)
        x = torch.randn(40, 32, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
        if mode == 1:
            torch.testing.assert_close(compiled(one), model(one), rtol=2e-2, atol=2e-2)
        else:
            with pytest.raises(RuntimeError, match="at S1 = 1 it must be B = 1"):
                compiled(one)


@torch.no_grad()
def test_the_compiler_of_mode_3_compiles_pieces_from_fake_inputs(published, on_npu):
    """As a piecewise backend does: a graph of Dynamo is split, and each piece compiled with the inputs it was given."""
    torch._dynamo.reset()
    model, before = Causal().bfloat16(), len(sgl_npu.reports())
    made = resolve_name(COMPILER)()
    assert isinstance(made, CompilerInterface)

    def vllm_backend(gm, example_inputs):
        nodes = list(gm.graph.nodes)
        attention = next(at for at, node in enumerate(nodes) if "scaled_dot" in str(node.target))
        split = split_module(gm, None, lambda node: int(nodes.index(node) >= attention))
        pieces = Piecewise(split, made)
        fake = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
        with next(x.fake_mode for x in fake if isinstance(x, FakeTensor)):
            pieces.run(
                *(x if isinstance(x, FakeTensor) else given for x, given in zip(fake, example_inputs, strict=True))
            )
        for name, run in pieces.compiled.items():
            setattr(split, name, Piece(run))
        return split

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=vllm_backend)
    for tokens in (40, 300):
        x = torch.randn(tokens, 32, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
    reports = sgl_npu.reports()[before:]
    assert [len(report.sites) for report in reports] == [0, 1]


def test_the_compiler_takes_what_the_published_one_takes(published):
    made = resolve_name(COMPILER)()
    for name in ("initialize_cache", "compute_hash", "compile", "load"):
        ours, theirs = (
            list(inspect.signature(getattr(kind, name)).parameters) for kind in (type(made), CompilerInterface)
        )
        assert ours == theirs, name


def test_other_options_are_another_hash(published, monkeypatch):
    made = resolve_name(COMPILER)()
    before = made.compute_hash(None)
    monkeypatch.setenv("SGL_NPU_OPTIONS", '{"inner": "eager"}')
    assert before != made.compute_hash(None) and sgl_npu.__version__ in before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner=eager", r"SGL_NPU_OPTIONS = 'inner=eager': Expecting value.*expected JSON, as \{"),
        ('{"iner": "eager"}', r"SGL_NPU_OPTIONS: unknown option 'iner': did you mean 'inner'\?"),
        ('["eager"]', r"SGL_NPU_OPTIONS: options = \['eager'\]: expected a dict"),
    ],
)
def test_a_variable_that_says_no_options_is_an_error_that_names_it(text, message, monkeypatch):
    monkeypatch.setenv("SGL_NPU_OPTIONS", text)
    torch._dynamo.reset()
    with pytest.raises(OptionsError, match=message):
        compiled_by_vllm(Causal(), BACKEND, 1)(torch.randn(4, 32))


def test_importing_it_does_not_import_vllm():
    assert resolve_name(BACKEND) and "vllm" not in sys.modules
