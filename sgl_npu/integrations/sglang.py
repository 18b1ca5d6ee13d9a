"""SGLang diffusion: the hooks of a platform that compiles its models with sgl_npu. `sglang_platform` has one for NPUs.

A platform of SGLang that is not built in names the backend of torch.compile and its options for every module. The names
of `--attention-backend` become the option `attention`, `--attention-backend-config` becomes `attention_config`;
`SGL_NPU_OPTIONS` says the rest, and these two as well where it has an `attention`. The models call
scaled_dot_product_attention then, for the compiler to find. Without `--enable-torch-compile` everything is left to the
platform below.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from sgl_npu.compiler.options import OptionsError, parse_options
from sgl_npu.integrations.environment import environment_options
from sgl_npu.lowering.sparse.setting import METHODS
from sgl_npu.runtime.denoising import announce_step

__all__ = ["ATTENTION", "CompileHooks", "activate", "attention_options"]

OVERRIDE = "SGLANG_DIFFUSION_PLATFORM_OVERRIDE"

# What --attention-backend is called there, and here.
ATTENTION = {"fa": "fa", "torch_sdpa": "sdpa", **{name: name for name in METHODS}}
SDPA = "sglang.multimodal_gen.runtime.layers.attention.backends.sdpa.SDPABackend"


def activate() -> str | None:
    """The entry point in `sglang.multimodal_gen.platforms`: being installed changes nothing, being named does."""
    named = os.environ.get(OVERRIDE, "").strip() == "sgl_npu"
    return "sgl_npu.integrations.sglang_platform.NpuPlatform" if named else None


def attention_options(name: str | None, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Options for a name of `--attention-backend` and its settings. Raises OptionsError for names of other kernels."""
    if name is None:
        return {}
    if name.lower() not in ATTENTION:
        raise OptionsError(
            f"--attention-backend {name}: sgl_npu has {', '.join(ATTENTION)}; name one of these, or leave "
            "--enable-torch-compile out"
        )
    attention = ATTENTION[name.lower()]
    return {"attention": attention, **({"attention_config": dict(config)} if config and attention in METHODS else {})}


class CompileHooks:
    """Stands before a platform class of SGLang among the bases of one that is not built in, whose `_enum` is OOT."""

    def get_compile_backend(self, mode: str | None = None) -> str:
        """Every mode is Inductor's, so none changes the name."""
        return "sgl_npu"

    def get_compile_options(self, module: nn.Module) -> dict[str, object] | None:
        """Options of torch.compile for `module`; a sparse attention for the diffusion transformer alone.

        Raises OptionsError for what the command line or SGL_NPU_OPTIONS says wrong.
        """
        options = environment_options()
        if "attention" not in options:
            args = _server_args()
            options |= attention_options(args.attention_backend, args.attention_backend_config)
        if options.get("attention") in METHODS:
            if "dits" not in type(module).__module__.split("."):
                del options["attention"]
                options.pop("attention_config", None)
            elif options.get("attention_config", {}).get("skip_first_steps"):
                module.register_forward_pre_hook(_announce)
        parse_options(options)
        return options

    @classmethod
    def get_attn_backend_cls_str(cls, selected_backend: Any, head_size: int, dtype: torch.dtype) -> str:
        """SGLang's layer around scaled_dot_product_attention, whatever the kernel will be."""
        if not _server_args().enable_torch_compile:
            return super().get_attn_backend_cls_str(selected_backend, head_size, dtype)  # type: ignore[misc]
        attention_options(None if selected_backend is None else str(selected_backend))
        return SDPA


@torch.compiler.disable
def _announce(module: nn.Module, args: tuple) -> None:
    from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context

    announce_step(int(get_forward_context().current_timestep))


def _server_args() -> Any:
    from sglang.multimodal_gen.runtime.server_args import get_global_server_args

    return get_global_server_args()
