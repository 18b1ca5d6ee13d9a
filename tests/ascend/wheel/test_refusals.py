"""What has no kernel raises; nothing is made up."""

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

NPU = torch.device("npu:0")


def fails(program, **environment):
    """Run a program of its own, which has to fail, and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0, result.stdout
    return result.returncode, result.stdout + result.stderr


FUSED = {
    "an aclop": (lambda x: torch.ops.npu.npu_deep_norm(x, x, x[0], x[0]), "DeepNorm.*500000"),
    "an aclnn op": (lambda x: torch.ops.npu.npu_swiglu(x), "aclnnSwiGlu"),
    "an op of two tensors": (lambda x: torch.ops.npu.npu_add_rms_norm(x, x, x[0]), "AddRmsNorm"),
    "a gradient of fused attention": (
        lambda x: F.scaled_dot_product_attention(*[x.half()[None, None].requires_grad_()] * 3).sum().backward(),
        "aclnnFlashAttentionScoreGrad",
    ),
    "an aten operator only accelerators have": (lambda x: torch.batch_norm_stats(x, 1e-5), "aten::batch_norm_stats"),
}


@pytest.mark.parametrize("name", FUSED)
def test_an_operator_without_kernel_raises(name):
    call, message = FUSED[name]
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(4, 8, device=NPU))


MISTAKES = {
    "npu and cpu": (lambda x: x + torch.ones(8), "same device, but found cpu and npu:0"),
    "two npus": (lambda x: x @ torch.ones(8, 2, device="npu:1"), "same device, but found npu:0 and npu:1"),
    "cpu first": (lambda x: torch.cat([x.cpu(), x]), "same device, but found cpu and npu:0"),
    "a list": (lambda x: torch._foreach_add([x], [x.cpu()]), "same device, but found cpu and npu:0"),
    "an output": (lambda x: torch.exp(x, out=torch.empty(4, 8)), "same device, but found cpu and npu:0"),
    "weights": (lambda x: torch.nn.Linear(8, 2)(x), "same device, but found cpu and npu:0"),
    "a mask of fused attention": (
        lambda x: torch.ops.npu.npu_fused_infer_attention_score(
            *[x[None, None].half()] * 3, input_layout="BNSD", atten_mask=torch.zeros(4, 4, dtype=torch.bool)
        ),
        "same device, but found cpu and npu:0",
    ),
    "a generator": (
        lambda x: torch.randn(2, device=NPU, generator=torch.Generator()), "generator of device type npu, but found cpu"
    ),
    "shapes": (lambda x: x @ x, r"\(4x8 and 4x8\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_that_the_hardware_reports_is_reported(name):
    call, message = MISTAKES[name]
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(4, 8, device=NPU))


def test_without_installed_kernels_even_an_addition_raises():
    _, printed = fails(
        """
        import stand_in; stand_in.start()
        import torch
        x = torch.ones(2).to("npu")
        assert x.cpu().tolist() == [1, 1]
        x + x
        """
    )
    assert "aclopCompileAndExecute is not there, as no kernel is" in printed


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match="no such device"):
        torch.npu.set_device(2)


def test_a_c_function_without_body_fails_and_says_its_name():
    library = ctypes.CDLL(None)
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert library.aclmdlInitDump() == 500000
    assert library.aclGetRecentErrMsg() == b"stand-in NPU: aclmdlInitDump is not there, as no kernel is"


def test_a_method_of_the_graph_engine_ends_the_process():
    status, printed = fails(
        """
        import ctypes, stand_in
        stand_in.start()
        ctypes.CDLL(None)._ZN2ge10GEFinalizeEv()
        """
    )
    assert status < 0 and "_ZN2ge10GEFinalizeEv is not there" in printed


STARTS = {
    "after torch": (
        "import torch, stand_in; stand_in.start()",
        {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        "torch is already imported; call stand_in.start() before it",
    ),
    "without a compiler": (
        "from pathlib import Path; from stand_in import build; from stand_in.wheel import Wheel\n"
        "build.built(Wheel.installed(), Path('nowhere'))",
        {"PATH": ""},
        "gcc, nm, readelf not found; install gcc and binutils",
    ),
    "without a device": ("import stand_in; stand_in.start(0)", {}, "devices = 0: a stand-in has at least one NPU"),
    "with another number of devices": (
        "import stand_in; stand_in.start(2); stand_in.start(2); stand_in.start(3)",
        {},
        "started with 2 devices, now asked for 3",
    ),
    "without torch_npu": (
        "import importlib.util as u, stand_in\n"
        "find = u.find_spec; u.find_spec = lambda name: None if name == 'torch_npu' else find(name)\n"
        "stand_in.start()",
        {},
        "torch_npu is not installed; `make test-npu` makes an environment that has it",
    ),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_that_cannot_work_says_why(case):
    program, environment, message = STARTS[case]
    _, printed = fails(program, **environment)
    assert message in printed
