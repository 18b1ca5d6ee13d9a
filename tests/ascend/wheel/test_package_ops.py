"""On the device our operators call sgl-kernel-npu: here operators of its schemas that compute what its kernels do."""

import sys
import types

import pytest
import torch
from package_op_cases import call, lengths, outputs
from stand_in import kernels

from sgl_npu.runtime.npu.fia_call import INT_MAX
from sgl_npu.runtime.npu.kernel_package import KERNELS, require
from sgl_npu.runtime.npu.package_ops import PACKAGE_OPS, ensure_package_ops

ensure_package_ops()
REFERENCE = {name: op.cpu for name, op in PACKAGE_OPS.items()}


def laser(query, key, value, scale_value, pre_tokens, **_):
    return REFERENCE["laser_attention"](query, key, value, scale_value, 0 if pre_tokens == INT_MAX else pre_tokens)[
        ::-1
    ]


def estimate(query, key, scale_value, causal, threshold, row_sparse, keep_sink, keep_recent, stride, **_):
    settings = (scale_value * stride, causal, threshold, row_sparse, keep_sink, keep_recent, stride)
    return REFERENCE["sparse_block_estimate"](query, key, *settings)


def block_sparse(query, key, value, sparse_mask, sparse_count_table, scale_value, causal, **_):
    return REFERENCE["block_sparse_attention"](query, key, value, sparse_mask, sparse_count_table, scale_value, causal)


def rain_fusion(
    query, key, value, select_idx, select_num_idx, blockshape, actual_seq_qlen, actual_seq_kvlen, scale, **_
):
    selection = (select_idx, select_num_idx, actual_seq_qlen, actual_seq_kvlen)
    out = REFERENCE["rain_fusion_attention"](query, key, value, *selection, scale, blockshape)
    return out, out.new_empty(out.shape[:3])


STAND_INS = {
    "laser_attention": laser,
    "sparse_block_estimate": estimate,
    "block_sparse_attention": block_sparse,
    "rain_fusion_attention": rain_fusion,
}
libraries = []


@pytest.fixture(scope="module", autouse=True)
def package():
    """The operators of a release up to 2026-08-21, and the function of the newest one."""
    for name, kernel in STAND_INS.items():
        form = next(form for form in KERNELS[name] if form.target.startswith("attentions::"))
        libraries.append(torch.library.Library("attentions", "FRAGMENT"))
        libraries[-1].define(form.target.partition("::")[2] + form.signature)
        kernels.give_kernel(form.target, named(form.target, kernel))
    names = ("sgl_kernel_npu", "sgl_kernel_npu.norm", "sgl_kernel_npu.norm.split_qkv_rmsnorm_rope")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[2]].split_qkv_rmsnorm_rope = split_qkv_rmsnorm_rope
    sys.modules.update(modules)
    yield
    for name in names:
        del sys.modules[name]


def named(target, kernel):
    """A kernel that gets every argument under its name: torch leaves out defaults and passes by position."""
    namespace, _, name = target.partition("::")

    def run(*args, **kwargs):
        schema = getattr(getattr(torch.ops, namespace), name).default._schema.arguments
        given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        return kernel(**given | dict(zip((x.name for x in schema), args, strict=False)) | kwargs)

    return run


def split_qkv_rmsnorm_rope(
    input,
    sin,
    cos,
    q_hidden_size,
    kv_hidden_size,
    head_dim,
    eps=None,
    q_weight=None,
    k_weight=None,
    q_bias=None,
    k_bias=None,
    is_neox_style=True,
):
    assert all(x.device.type == "npu" for x in (input, sin, cos, q_weight, k_weight, q_bias, k_bias))
    tensors = (x.cpu() for x in (input, sin, cos))
    optional = (x.cpu() for x in (q_weight, k_weight, q_bias, k_bias))
    sizes = (q_hidden_size, kv_hidden_size, head_dim, eps)
    results = REFERENCE["split_qkv_rmsnorm_rope"](*tensors, *sizes, *optional, is_neox_style)
    return tuple(x.to("npu") for x in results)


@pytest.mark.parametrize("name", PACKAGE_OPS)
def test_the_npu_kernel_equals_the_cpu_kernel(name):
    arguments = call(name, lengths(name)[0])
    on_npu = [x.to("npu") if isinstance(x, torch.Tensor) else x for x in arguments]
    op = getattr(torch.ops.sgl_npu, name)
    for one, other in zip(outputs(op(*on_npu)), outputs(op(*arguments)), strict=True):
        assert one.device == torch.device("npu:0")
        assert torch.equal(one.cpu(), other)
    assert require(name).form in KERNELS[name]


def test_the_npu_kernel_refuses_what_the_cpu_kernel_refuses():
    query, key, value = (x.to("npu") for x in call("laser_attention", 256)[:3])
    with pytest.raises(RuntimeError, match=r"laser_attention: S = 255 is not a multiple of 256"):
        torch.ops.sgl_npu.laser_attention(query[:, :, :255], key, value, 0.1)
