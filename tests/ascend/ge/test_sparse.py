"""Sparse attention converts to the operators that GE has for it, for symbolic lengths where these are no attribute."""

import pytest
import torch
import torchair
from sparse_models import CASES, check_wan, check_widths, installed_package
from stand_in import ge
from torchair.configs.compiler_config import CompilerConfig

from sgl_npu.compiler.ge_converters import CONVERTERS, register

EAGER = {"debug.run_eagerly": True}
NAMES = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def operators(monkeypatch):
    """GE operators that this machine has."""
    import torchair.ge.ge_custom as ge_custom

    plain = {"SplitV", "ConcatD", "Reshape", "RmsNorm", "RotaryMul", "Mul", "Add", "Neg"}  # those of rotary embeddings
    present = {row.ir for row in CONVERTERS.values()} | plain
    # What CANN would answer (private, seen in torch_npu 2.13.0).
    known = lambda name: ("SUCCESS" if name in present else "ERROR", [], [], [])  # noqa: E731
    monkeypatch.setattr(ge_custom._torchair, "get_registered_ir_def", known, raising=False)
    torch._dynamo.reset()
    with installed_package(monkeypatch):
        yield present


@NAMES
def test_a_video_transformer_converts(name):
    with ge.converted() as graphs:
        check_wan(CASES[name], "torchair", EAGER)
    found = ge.ops(graphs[0])
    assert found[CASES[name].ge] == found["FusedInferAttentionScore"] == 1


@pytest.mark.parametrize("name", [name for name in CASES if name != "laser"])
def test_one_graph_serves_videos_of_every_width(name):
    with ge.converted() as graphs:
        report = check_widths(CASES[name], "torchair", EAGER)
    assert report.sites[0].op == CASES[name].op
    assert ge.ops(graphs[0])[CASES[name].ge] == 1


def test_laser_attention_of_a_symbolic_length_stays_dense():
    """Its padding is an attribute in GE, which is a constant."""
    site = check_widths(CASES["laser"], "torchair", EAGER).sites[0]
    assert site.op == "npu.npu_fused_infer_attention_score"
    ((kernel, clause),) = site.refusals
    assert kernel == "laser_attn" and clause.startswith("GE takes a constant for the padding, which follows the length")
    assert clause.endswith("inner = 'npugraph_ex' can")


# ---------------------------------------------------------------- npu_block_sparse_attention by itself


def call(query, key, mask, **more):
    layouts = {"q_input_layout": "BNSD", "kv_input_layout": "BNSD"}
    given = {"num_key_value_heads": 2, "scale_value": 0.125, "inner_precise": 0, **layouts, **more}
    return torch.ops.npu.npu_block_sparse_attention(query, key, key, mask, [128, 128], **given)[0]


def tensors():
    query, key = (torch.randn(2, heads, 300, 64).half().to("npu") for heads in (4, 2))
    return query, key, torch.ones(2, 4, 3, 3, dtype=torch.int8, device="npu")


def convert(function):
    register()
    config = CompilerConfig()
    config.debug.run_eagerly = True
    run = torch.compile(function, backend=torchair.get_npu_backend(compiler_config=config), fullgraph=True)
    with torch.no_grad(), ge.converted() as graphs:
        run(*tensors())
    return graphs[0].graph


def test_attributes_and_inputs_are_those_of_the_operator():
    graph = convert(call)
    (node,) = (op for op in graph.op if op.type == "BlockSparseAttention")
    found = {name: getattr(x, x.WhichOneof("value")) for name, x in node.attr.items() if not name.startswith("_")}
    expected = {
        **{"qInputLayout": b"BNSD", "kvInputLayout": b"BNSD", "numKeyValueHeads": 2, "maskType": 0},
        **{"scaleValue": 0.125, "innerPrecise": 0, "blockSize": 0, "softmaxLseFlag": 0},
        **{"preTokens": 2147483647, "nextTokens": 2147483647},
    }
    assert {name: found[name] for name in expected} == expected
    connected = [desc.name for desc, source in zip(node.input_desc, node.input, strict=True) if source]
    assert connected == ["query", "key", "value", "blockSparseMask", "blockShape"]
    assert [desc.name for desc in node.output_desc] == ["attentionOut", "softmaxLse"]


def test_lists_of_lengths_are_connected():
    graph = convert(lambda q, k, m: call(q, k, m, actual_seq_lengths=[300, 20], actual_seq_lengths_kv=[300, 40]))
    (node,) = (op for op in graph.op if op.type == "BlockSparseAttention")
    connected = {desc.name for desc, source in zip(node.input_desc, node.input, strict=True) if source}
    assert {"actualSeqLengths", "actualSeqLengthsKv"} <= connected


def test_without_the_operator_the_error_names_the_other_compiler(operators):
    operators.discard("BlockSparseAttention")
    with pytest.raises(
        Exception, match="GE: no operator BlockSparseAttention; install a CANN with ops-transformer, or"
    ):
        convert(call)


def test_the_lse_is_refused():
    with pytest.raises(Exception, match="softmax_lse_flag of npu::npu_block_sparse_attention is set"):
        convert(lambda q, k, m: call(q, k, m, softmax_lse_flag=1))
