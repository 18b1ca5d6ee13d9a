"""The constraint tables of the attention kernels, and the question whether a call obeys them.

The compiler asks before it emits a call, with symbolic sizes; the emulation asks again with the actual ones.
"""

from __future__ import annotations

from sgl_npu.runtime.npu.fia_call import FiaCall
from sgl_npu.runtime.npu.fia_length_rules import LENGTH_RULES
from sgl_npu.runtime.npu.fia_mask_rules import MASK_RULES
from sgl_npu.runtime.npu.fia_rules import TENSOR_RULES
from sgl_npu.runtime.npu.fusion_rules import FUSION_ATTENTION_RULES, FusionAttentionCall
from sgl_npu.runtime.npu.rule import Rule, broken_rules, reject

FIA_RULES: tuple[Rule[FiaCall], ...] = TENSOR_RULES + LENGTH_RULES + MASK_RULES

__all__ = [
    "FIA_RULES",
    "FUSION_ATTENTION_RULES",
    "FiaCall",
    "FusionAttentionCall",
    "Rule",
    "first_violation",
    "reject_violations",
    "violations",
]


def violations(call: FiaCall | FusionAttentionCall) -> list[tuple[Rule, str]]:
    """Every rule which the call breaks, with the sentence that says so. Empty if the kernel takes the call.

    Sizes may be symbolic: a rule may then add a guard, and is broken only if the sizes at hand break it.
    """
    return broken_rules(call, _rules(call))


def first_violation(call: FiaCall | FusionAttentionCall) -> str | None:
    """The sentence of the first broken rule, or None if the kernel takes the call."""
    return next((sentence for _, sentence in violations(call)), None)


def reject_violations(op: str, call: FiaCall | FusionAttentionCall) -> None:
    """Raises RuntimeError with the sentences of all rules which the call breaks."""
    reject(op, call, _rules(call))


def _rules(call: FiaCall | FusionAttentionCall) -> tuple[Rule, ...]:
    return FIA_RULES if isinstance(call, FiaCall) else FUSION_ATTENTION_RULES
