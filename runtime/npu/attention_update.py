"""npu_attention_update without an NPU: its limits, shapes for tracing, numbers on the CPU.

It merges attention over disjoint sets of keys: lse = log(sum of exp(lse_p)), out = sum of exp(lse_p - lse) * out_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from sgl_npu.runtime.npu.fia_call import Shape
from sgl_npu.runtime.npu.fia_rules import dtype_name, shapes_differ
from sgl_npu.runtime.npu.rule import Rule, reject
from sgl_npu.runtime.npu.sources import DOCS_UPDATE, KERNEL_UPDATE
from sgl_npu.runtime.sizes import guard

OP = "npu_attention_update"
MAX_PARTS = 16
DIM_MULTIPLE, MAX_DIM = 8, 512
OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UPDATE_TYPES = (0, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionUpdateCall:
    """Arguments of npu_attention_update. Shapes are tuples of int or SymInt.

    `strided` names the tensors that are not contiguous. Sizes are read only once the gate rules hold.
    """

    lses: tuple[Shape, ...]
    outs: tuple[Shape, ...]
    lse_dtypes: tuple[torch.dtype, ...]
    out_dtypes: tuple[torch.dtype, ...]
    update_type: int = 1
    strided: tuple[str, ...] = ()


def _parts(call: AttentionUpdateCall) -> str | None:
    if len(call.lses) != len(call.outs):
        return f"{len(call.lses)} tensors in lse but {len(call.outs)} in local_out"
    if not 1 <= len(call.lses) <= MAX_PARTS:
        return f"{len(call.lses)} parts; the kernel takes 1 to {MAX_PARTS}"
    return None


def _dtypes(call: AttentionUpdateCall) -> str | None:
    for dtype in call.lse_dtypes:
        if dtype != torch.float32:
            return f"lse is {dtype_name(dtype)}; the kernel takes float32"
    for dtype in call.out_dtypes:
        if dtype not in OUT_DTYPES:
            return f"local_out is {dtype_name(dtype)}; the kernel takes float32, float16 and bfloat16"
        if dtype != call.out_dtypes[0]:
            return f"local_out has {dtype_name(dtype)} beside {dtype_name(call.out_dtypes[0])}; they must agree"
    return None


def _ranks(call: AttentionUpdateCall) -> str | None:
    for name, shapes, rank in (("lse", call.lses, 1), ("local_out", call.outs, 2)):
        for shape in shapes:
            if len(shape) != rank:
                return f"{name} has {len(shape)} axes, not {rank}"
    return None


def _shapes(call: AttentionUpdateCall) -> str | None:
    for lse, out in zip(call.lses, call.outs, strict=True):
        if shapes_differ(lse, out[:1]):
            return f"lse is {tuple(lse)} where local_out is {tuple(out)}"
        if shapes_differ(out, call.outs[0]):
            return f"local_out has {tuple(out)} beside {tuple(call.outs[0])}; they must agree"
    return None


def _dim(call: AttentionUpdateCall) -> str | None:
    dim = call.outs[0][1]
    if guard(dim % DIM_MULTIPLE != 0) or guard(dim < DIM_MULTIPLE) or guard(dim > MAX_DIM):
        return f"D = {dim} is not a multiple of {DIM_MULTIPLE} in {DIM_MULTIPLE}..{MAX_DIM}"
    return None


def _update_type(call: AttentionUpdateCall) -> str | None:
    return None if call.update_type in UPDATE_TYPES else f"update_type = {call.update_type} is neither 0 nor 1"


def _contiguous(call: AttentionUpdateCall) -> str | None:
    return f"{', '.join(call.strided)}: not contiguous" if call.strided else None


ATTENTION_UPDATE_RULES: tuple[Rule[AttentionUpdateCall], ...] = (
    Rule("parts", DOCS_UPDATE, _parts, gate=True),
    Rule("dtypes", DOCS_UPDATE, _dtypes),
    Rule("ranks", DOCS_UPDATE, _ranks, gate=True),
    Rule("shapes", DOCS_UPDATE, _shapes),
    Rule("dim", DOCS_UPDATE, _dim),
    Rule("update_type", DOCS_UPDATE, _update_type),
    Rule("contiguous", KERNEL_UPDATE, _contiguous),
)


def describe(lse: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], update_type: int = 1) -> AttentionUpdateCall:
    """The call with these tensors, without a word about their strides: those are the caller's to choose."""
    return AttentionUpdateCall(
        lses=tuple(tuple(x.shape) for x in lse),
        outs=tuple(tuple(x.shape) for x in outs),
        lse_dtypes=tuple(x.dtype for x in lse),
        out_dtypes=tuple(x.dtype for x in outs),
        update_type=update_type,
    )


@torch.no_grad()
def attention_update(
    lse: Sequence[torch.Tensor], local_out: Sequence[torch.Tensor], update_type: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """CPU kernel: out (N, D) in the dtype of `local_out` and lse (N,), computed in float32.

    What infinite values of lse give on the hardware is not documented: they make the row NaN here, so that nothing can
    rely on it. So does update_type 0 with the lse, which is not there then. Raises RuntimeError with every rule of
    `ATTENTION_UPDATE_RULES` that is broken.
    """
    named = chain(
        ((f"lse[{n}]", x) for n, x in enumerate(lse)), ((f"local_out[{n}]", x) for n, x in enumerate(local_out))
    )
    strided = tuple(name for name, x in named if not x.is_contiguous())
    call = describe(lse, local_out, update_type)
    reject(OP, AttentionUpdateCall(**{**vars(call), "strided": strided}), ATTENTION_UPDATE_RULES)
    each = torch.stack(list(lse))
    total = each.logsumexp(0).masked_fill(each.isinf().any(0), torch.nan)
    shares = (each - total).exp().unsqueeze(-1)
    out = (shares * torch.stack([x.float() for x in local_out])).sum(0)
    return out.to(local_out[0].dtype), total if update_type == 1 else torch.full_like(total, torch.nan)


def attention_update_fake(
    lse: Sequence[torch.Tensor], local_out: Sequence[torch.Tensor], update_type: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised outputs of the right shapes and dtypes. Like that of torch_npu 2.13.0 it checks nothing."""
    return local_out[0].new_empty(local_out[0].shape), lse[0].new_empty(lse[0].shape)
