"""The operators as torch sees them: schemas, fake kernels, symbolic sizes."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from attention_formula import arrange, random_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from sgl_npu.runtime.npu import FAKES, KERNELS, ensure_ops, is_emulated
from sgl_npu.runtime.npu.layouts import FIA_LAYOUTS
from sgl_npu.runtime.npu.schemas import SCHEMAS

V1, V2 = torch.ops.npu.npu_fused_infer_attention_score, torch.ops.npu.npu_fused_infer_attention_score_v2
FUSION = torch.ops.npu.npu_fusion_attention_v3


def fia_call(layout, lse, rows=3, dtype=torch.bfloat16):
    batch = 1 if layout == "NSD" else 2
    q, k, v = random_inputs(batch, 4, 2, rows, 5, dim=64, dtype=dtype)
    lengths = {}
    if "T" in layout:
        lengths = {"actual_seq_lengths": [rows, 2 * rows], "actual_seq_lengths_kv": [5, 10]}
    args = tuple(arrange(t, layout.partition("_")[0]) for t in (q, k, v))
    return args, {
        "num_heads": 4,
        "num_key_value_heads": 2,
        "input_layout": layout,
        "softmax_lse_flag": lse,
        **lengths,
    }


def describe(outputs):
    return [(t.shape, t.stride(), t.dtype, t.device) for t in outputs]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_the_one_of_torch_npu(name):
    assert str(getattr(torch.ops.npu, name).default._schema) == f"npu::{SCHEMAS[name]}"
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.npu, name).default.tags
    assert name in KERNELS and name in FAKES


def test_defining_again_from_many_threads_changes_nothing():
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ensure_ops())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["emulated"] * 8 and is_emulated()


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("layout", FIA_LAYOUTS)
def test_fake_and_kernel_agree_on_shapes_strides_and_dtypes(layout, lse):
    args, kwargs = fia_call(layout, lse)
    with FakeTensorMode() as mode:
        fake = V1(*map(mode.from_tensor, args), **kwargs)
    real = V1(*args, **kwargs)
    assert [d[:3] for d in describe(fake)] == [d[:3] for d in describe(real)]
    assert all(t.is_contiguous() for t in real)


@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND", "BNSD"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fusion_fake_and_kernel_agree_on_shapes_strides_and_dtypes(layout, dtype):
    args = tuple(arrange(t, layout) for t in random_inputs(2, 4, 2, 3, 5, dtype=dtype, value_dim=16))
    with FakeTensorMode() as mode:
        fake = FUSION(*map(mode.from_tensor, args), 4, layout)
    assert describe(fake) == describe(FUSION(*args, 4, layout))


@pytest.mark.parametrize(
    "kwargs, sentence",
    [
        ({"num_heads": 0}, "num_heads must be greater than 0"),
        ({"input_layout": "DNSB"}, "layout DNSB is not supported"),
        ({"input_layout": "BSH"}, "query has 4 axes; layout BSH has 3"),
        ({"block_table": torch.zeros(1, 1)}, "value has 6 axes"),
    ],
)
def test_the_fake_rejects_what_the_meta_kernel_rejects(kwargs, sentence):
    q, k, v = (t.to("meta") for t in random_inputs(2, 4, 2, 3, 5))
    value = v[None, None] if "block_table" in kwargs else v
    with pytest.raises(RuntimeError, match=sentence):
        V1(q, k, value, **({"num_heads": 4, "input_layout": "BNSD"} | kwargs))


@pytest.mark.parametrize(
    "layout", ["BNSD", "BSND", "BSH", "BNSD_BSND", "BSH_BNSD", "BNSD_NBSD", "TND", "NTD", "TND_NTD"]
)
def test_symbolic_sizes_stay_symbolic(layout):
    packed = "T" in layout

    def attend(q, k, v, kwargs):
        if packed:
            axis = layout.index("T")
            kwargs = kwargs | {
                "actual_seq_lengths": [q.shape[axis]],
                "actual_seq_lengths_kv": [k.shape[axis]],
            }
        out, lse = V1(q, k, v, **kwargs)
        return out + 0, lse

    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    axis = layout.partition("_")[0].replace("T", "S").index("S")
    for rows in (3, 6, 7):
        args, kwargs = fia_call(layout, True, rows)
        for tensor in args:
            torch._dynamo.mark_dynamic(tensor, axis)
        for seen, expected in zip(compiled(*args, kwargs), attend(*args, kwargs), strict=True):
            assert torch.equal(seen, expected) and seen.stride() == expected.stride()
        assert len(frames) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["BNSD", "SBH"])
def test_fusion_sizes_stay_symbolic(layout):
    compiled = torch.compile(
        lambda q, k, v: FUSION(q, k, v, 4, layout)[:3], backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (3, 6):
        args = [arrange(t, layout) for t in random_inputs(2, 4, 2, rows, 5)]
        for seen, expected in zip(compiled(*args), FUSION(*args, 4, layout)[:3], strict=True):
            assert torch.equal(seen, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("op, layout", [(V1, "BNSD"), (V1, "TND"), (V2, "BSH"), (FUSION, "BNSD")])
def test_opcheck(op, layout):
    args, kwargs = fia_call(layout, True)
    if op is V2:
        kwargs = {"num_query_heads": 4, "num_key_value_heads": 2, "return_softmax_lse": True}
    elif op is FUSION:
        args, kwargs = (*args, 4, layout), {}
    torch.library.opcheck(op.default, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_the_backward_of_fusion_attention_raises():
    q, k, v = random_inputs(2, 4, 2, 3, 5, dtype=torch.float32)
    out = FUSION(q.requires_grad_(), k, v, 4, "BNSD")[0]
    with pytest.raises(RuntimeError, match="backward is not covered by the emulation"):
        out.sum().backward()


@pytest.mark.parametrize("installed", (True, False), ids=("with torch_npu", "without"))
def test_importing_defines_operators_only_where_torch_npu_cannot(installed, tmp_path):
    if installed:
        (tmp_path / "torch_npu.py").write_text("")
    script = """if True:
        import torch, sgl_npu.runtime.npu as npu
        print(npu.is_emulated(), *(hasattr(torch.ops.npu, name) for name in npu.KERNELS))
    """
    path = {**os.environ, "PYTHONPATH": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=path)
    assert answer.stdout.split() == ["False" if installed else "True"] * (1 + len(KERNELS))
