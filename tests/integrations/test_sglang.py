"""SGLang cannot be installed beside this torch: the hooks that it asks are written down here, as 0.5.23 publishes them.

github.com/sgl-project/sglang, release 0.5.23 on PyPI, under python/sglang/multimodal_gen/runtime: Platform and
PlatformEnum (platforms/interface.py), NPUPlatformBase (platforms/npu.py), build_torch_compile_kwargs
(utils/torch_compile.py), get_global_server_args (server_args/server_args.py), get_forward_context
(managers/forward_context.py).
"""

from __future__ import annotations

import enum
import inspect
import sys
import types
from pkgutil import resolve_name

import pytest
import torch
from sparse.sparse_cases import small_wan, wan_inputs

import sgl_npu
from sgl_npu.compiler.options import OptionsError
from sgl_npu.integrations.sglang import activate

ROOT = "sglang.multimodal_gen.runtime"
SDPA = f"{ROOT}.layers.attention.backends.sdpa.SDPABackend"
GRID = (4, 16, 16)


class PlatformEnum(enum.Enum):
    NPU = enum.auto()
    OOT = enum.auto()


class Platform:
    """The published signatures, without most of their bodies."""

    _enum = None

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "inductor"

    def get_compile_options(self, module: torch.nn.Module) -> dict[str, object] | None:
        return None

    def is_out_of_tree(self) -> bool:
        return self._enum == PlatformEnum.OOT

    @classmethod
    def get_attn_backend_cls_str(cls, selected_backend, head_size, dtype) -> str:
        return f"{ROOT}.layers.attention.backends.ascend_fa.AscendFABackend"


class NPUPlatformBase(Platform):
    _enum = PlatformEnum.NPU


@pytest.fixture
def server(monkeypatch):
    """The modules of SGLang that are imported, and its arguments, as on the command line."""
    args = types.SimpleNamespace(attention_backend=None, attention_backend_config={}, enable_torch_compile=True)
    step = types.SimpleNamespace(current_timestep=0)
    modules = {
        "platforms.interface": {"PlatformEnum": PlatformEnum, "Platform": Platform},
        "platforms.npu": {"NPUPlatformBase": NPUPlatformBase},
        "server_args": {"get_global_server_args": lambda: args},
        "managers.forward_context": {"get_forward_context": lambda: step},
        "models.dits.wanvideo": {},
    }
    for name, content in modules.items():
        parts = f"{ROOT}.{name}".split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        vars(sys.modules[f"{ROOT}.{name}"]).update(content)
    monkeypatch.delitem(sys.modules, "sgl_npu.integrations.sglang_platform", raising=False)
    monkeypatch.setenv("SGLANG_DIFFUSION_PLATFORM_OVERRIDE", "sgl_npu")
    args.step = step
    return args


def platform():
    return resolve_name(activate())()


def compile_kwargs(current_platform, module, mode="max-autotune-no-cudagraphs"):
    """What build_torch_compile_kwargs asks of a platform that is not built in."""
    assert current_platform.is_out_of_tree()
    kwargs = {"fullgraph": False, "dynamic": None, "backend": current_platform.get_compile_backend(mode)}
    options = current_platform.get_compile_options(module)
    return kwargs if options is None else {**kwargs, "options": options}


def diffusion_transformer():
    """A Wan, of a class that stands where SGLang's diffusion transformers do."""
    model = small_wan(layers=1)
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"__module__": f"{ROOT}.models.dits.wanvideo"})
    return model


def test_being_installed_selects_no_platform_and_being_named_does(server, monkeypatch):
    assert activate() == "sgl_npu.integrations.sglang_platform.NpuPlatform"
    for other in ("", "npu", "another"):
        monkeypatch.setenv("SGLANG_DIFFUSION_PLATFORM_OVERRIDE", other)
        assert activate() is None
    monkeypatch.delenv("SGLANG_DIFFUSION_PLATFORM_OVERRIDE")
    assert activate() is None


def test_the_hooks_take_what_the_published_ones_take(server):
    ours = platform()
    for name in ("get_compile_backend", "get_compile_options", "get_attn_backend_cls_str"):
        found, published = (list(inspect.signature(getattr(x, name)).parameters) for x in (ours, Platform()))
        assert found == published, name


@torch.no_grad()
def test_a_module_compiled_as_sglang_does_gives_the_same_answer(server, monkeypatch):
    monkeypatch.setenv("SGL_NPU_OPTIONS", '{"platform": "npu", "inner": "eager", "strict": true}')
    torch._dynamo.reset()
    model, before = diffusion_transformer(), len(sgl_npu.reports())
    inputs = wan_inputs(*GRID)
    expected = model(**inputs)[0]
    model.compile(**compile_kwargs(platform(), model))
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    (report,) = sgl_npu.reports()[before:]
    assert report.platform == "npu"
    sgl_npu.expect(report, fused="all")


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        (None, {}, {}),
        ("fa", {}, {"attention": "fa"}),
        ("torch_sdpa", {}, {"attention": "sdpa"}),
        (
            "laser_attn",
            {"skip_first_steps": 3},
            {"attention": "laser_attn", "attention_config": {"skip_first_steps": 3}},
        ),
        ("block_sparse_attn", {}, {"attention": "block_sparse_attn"}),
        (
            "rain_fusion_attn",
            {"sparsity": 0.8},
            {"attention": "rain_fusion_attn", "attention_config": {"sparsity": 0.8}},
        ),
    ],
)
def test_the_names_of_the_command_line_are_options(server, name, config, options):
    server.attention_backend, server.attention_backend_config = name, config
    assert platform().get_compile_options(diffusion_transformer()) == options


def test_sparse_attention_is_for_the_diffusion_transformer_and_not_for_the_vae(server):
    server.attention_backend, server.attention_backend_config = "rain_fusion_attn", {"sparsity": 0.8}
    assert platform().get_compile_options(torch.nn.Linear(2, 2)) == {}


def test_an_attention_in_the_variable_stands_above_the_command_line(server, monkeypatch):
    server.attention_backend, server.attention_backend_config = "rain_fusion_attn", {"sparsity": 0.8}
    monkeypatch.setenv("SGL_NPU_OPTIONS", '{"attention": "auto", "inner": "eager"}')
    assert platform().get_compile_options(diffusion_transformer()) == {"attention": "auto", "inner": "eager"}


def test_layers_call_sdpa_for_the_compiler_to_find_and_their_own_kernels_without_it(server):
    assert platform().get_attn_backend_cls_str("rain_fusion_attn", 64, torch.float16) == SDPA
    assert platform().get_attn_backend_cls_str(None, 64, torch.float16) == SDPA
    server.enable_torch_compile = False
    assert platform().get_attn_backend_cls_str("fa", 64, torch.float16).endswith("AscendFABackend")


def test_a_kernel_that_we_do_not_have_is_an_error_that_names_those_we_have(server):
    with pytest.raises(OptionsError, match=r"--attention-backend sage_attn: sgl_npu has fa, torch_sdpa, .*leave"):
        platform().get_attn_backend_cls_str("sage_attn", 64, torch.float16)
    server.attention_backend = "sage_attn"
    with pytest.raises(ValueError, match="sage_attn"):
        platform().get_compile_options(diffusion_transformer())


def test_a_setting_that_we_do_not_have_is_an_error_before_anything_is_compiled(server):
    server.attention_backend, server.attention_backend_config = "rain_fusion_attn", {"sparsty": 0.8}
    with pytest.raises(
        OptionsError, match=r"unknown option 'attention_config\.sparsty': did you mean 'attention_config.sparsity'"
    ):
        platform().get_compile_options(diffusion_transformer())


@torch.no_grad()
def test_the_step_of_sglangs_loop_says_when_a_model_turns_sparse(server, monkeypatch):
    monkeypatch.setenv("SGL_NPU_OPTIONS", '{"inner": "eager", "strict": true}')
    server.attention_backend = "rain_fusion_attn"
    server.attention_backend_config = {"sparsity": 0.8, "skip_first_steps": 2}
    torch._dynamo.reset()
    model, before = diffusion_transformer(), len(sgl_npu.reports())
    inputs = wan_inputs(*GRID)
    expected = model(**inputs)[0]
    token = sgl_npu.runtime.denoising._step.set(None)
    model.compile(**compile_kwargs(platform(), model))
    found = []
    for server.step.current_timestep in range(4):
        found.append(model(**inputs)[0])
    sgl_npu.runtime.denoising._step.reset(token)
    assert [torch.allclose(x, expected, atol=1e-5) for x in found] == [True, True, False, False]
    (report,) = sgl_npu.reports()[before:]
    assert [graph.kind for graph in report.graphs] == ["inference", "inference, dense"]


def test_importing_the_hooks_does_not_import_sglang():
    assert "sglang" not in sys.modules
