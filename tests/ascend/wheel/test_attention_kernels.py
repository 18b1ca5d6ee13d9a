"""torch_npu's fused attention on the stand-in is sgl_npu's emulation of it, under every name it is called by."""

import pytest
import torch
import torch.nn.functional as F
from stand_in import kernels

from sgl_npu.runtime.npu import KERNELS, ensure_ops
from sgl_npu.runtime.npu.fused_infer import V1, V2
from sgl_npu.runtime.npu.fusion_attention import OP as V3
from sgl_npu.runtime.npu.npu_block_sparse_attention import OP as SPARSE

NPU = torch.device("npu:0")
MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
QKV = [(torch.randn(2, heads, 40, 64)).half() for heads in (4, 2, 2)]

CALLS = {
    "infer": (V1, (), {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.2, "input_layout": "BNSD"}),
    "infer with lse": (
        V1,
        (),
        {
            "num_heads": 4,
            "num_key_value_heads": 2,
            "input_layout": "BNSD",
            "softmax_lse_flag": True,
            "atten_mask": MASK,
            "sparse_mode": 3,
            "actual_seq_lengths_kv": [40, 7],
        },
    ),
    "infer, version 2, with lse": (
        V2,
        (),
        {
            "num_query_heads": 4,
            "num_key_value_heads": 2,
            "softmax_scale": 0.2,
            "input_layout": "BNSD_BSND",
            "return_softmax_lse": True,
        },
    ),
    "sparse": (
        SPARSE,
        (torch.ones(2, 4, 1, 1, dtype=torch.int8), [128, 128]),
        {
            "q_input_layout": "BNSD",
            "kv_input_layout": "BNSD",
            "num_key_value_heads": 2,
            "scale_value": 0.2,
            "softmax_lse_flag": 1,
        },
    ),
    "training": (V3, (4, "BNSD"), {"scale": 0.2, "atten_mask": MASK, "sparse_mode": 2}),
}


def on(device, value):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def call(op, case, device):
    _, args, kwargs = CALLS[case]
    return op(*[on(device, x) for x in (*QKV, *args)], **{name: on(device, value) for name, value in kwargs.items()})


def same(results, expected, device):
    for result, one in zip(results, expected, strict=True):
        assert result.device == device and result.dtype == one.dtype
        assert torch.equal(result.cpu(), one)


def test_the_operators_are_those_of_torch_npu():
    assert ensure_ops() == "torch_npu"


@pytest.mark.parametrize("device", [torch.device("cpu"), NPU], ids=str)
@pytest.mark.parametrize("case", CALLS)
def test_the_operator_computes_the_emulation(case, device):
    name = CALLS[case][0]
    same(call(getattr(torch.ops.npu, name), case, device), call(KERNELS[name], case, "cpu"), device)


@pytest.mark.parametrize("device", [torch.device("cpu"), NPU], ids=str)
@pytest.mark.parametrize("case", [case for case in CALLS if CALLS[case][0] in (V1, V2)])
def test_the_overload_with_outputs_writes_them(case, device):
    name = CALLS[case][0]
    expected = call(KERNELS[name], case, "cpu")
    out = [torch.full_like(one, 5, device=device) for one in expected]
    workspace = call(getattr(torch.ops.npu, f"_{name}_get_max_workspace"), case, device)
    assert workspace.device == device
    packet = getattr(torch.ops.npu, name)
    returned = call(lambda *a, **k: packet.out(*a, **k, workspace=workspace, out=out), case, device)
    same(out, expected, device)
    same(returned, expected, device)


def test_outputs_of_another_shape_are_refused():
    out = [torch.empty(3, dtype=torch.half, device=NPU), torch.empty(0, device=NPU)]
    with pytest.raises(RuntimeError, match=r"out is torch.float16 \(3,\), the result torch.float16 \(2, 4, 40, 64\)"):
        call(lambda *a, **k: torch.ops.npu.npu_fused_infer_attention_score.out(*a, **k, out=out), "infer", NPU)


def test_what_the_hardware_would_refuse_is_refused():
    q = torch.randn(1, 2, 8, 24, dtype=torch.half, device=NPU)
    with pytest.raises(RuntimeError, match="D = 24 is not a multiple of 16"):
        torch.ops.npu.npu_fused_infer_attention_score(q, q, q, num_heads=2, input_layout="BNSD")


def test_sdpa_takes_the_operator_that_torch_npu_chooses():
    layouts = []

    def recording(query, key, value, heads, layout, *args, **kwargs):
        layouts.append(layout)
        return KERNELS[V3](query, key, value, heads, layout, *args, **kwargs)

    q = torch.randn(1, 2, 8, 32, dtype=torch.half)
    with kernels.given_kernel(f"npu::{V3}", recording):
        out = F.scaled_dot_product_attention(*[q.to(NPU)] * 3)
    assert layouts == ["BNSD"]
    torch.testing.assert_close(out.cpu(), F.scaled_dot_product_attention(q, q, q), rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def own_namespace():
    library = torch.library.Library("stand_in_test", "DEF")
    library.define("halve(Tensor x) -> Tensor")
    library.define("halve_(Tensor(a!) x, *, Tensor[] others) -> Tensor(a!)")
    return library


def test_a_given_kernel_serves_both_devices(own_namespace):
    kernels.give_kernel("stand_in_test::halve", lambda x: x / 2)
    x = torch.randn(3)
    assert torch.equal(torch.ops.stand_in_test.halve(x), x / 2)
    assert torch.equal(torch.ops.stand_in_test.halve(x.to(NPU)).cpu(), x / 2)


def test_a_given_kernel_may_write_its_argument(own_namespace):
    kernels.give_kernel("stand_in_test::halve_", lambda x, others: x.div_(2).add_(others[0]))
    x = torch.ones(4, device=NPU)
    result = torch.ops.stand_in_test.halve_(x[1:3], others=[torch.ones(2, device=NPU)])
    assert x.tolist() == [1, 1.5, 1.5, 1] and result.data_ptr() == x[1:].data_ptr()


def test_an_operator_that_is_not_there_cannot_be_given_a_kernel():
    with pytest.raises(RuntimeError, match="there is no operator 'npu::npu_nothing' to give a kernel to"):
        kernels.give_kernel("npu::npu_nothing", lambda x: x)
