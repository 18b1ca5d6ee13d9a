"""Where the limits of the kernels were read."""

from __future__ import annotations

DOCS_V1 = "op-plugin docs: npu_fused_infer_attention_score.md (2026-08)"
DOCS_V2 = "op-plugin docs: npu_fused_infer_attention_score_v2.md (2026-08)"
DOCS_FUSION = "op-plugin docs: npu_fusion_attention_v3.md (2026-08)"
DOCS_UPDATE = "op-plugin docs: npu_attention_update.md (2026-08)"
KERNEL_UPDATE = "CANN ops-transformer docs: aclnnAttentionUpdate.md"
DOCS_NPU_BLOCK_SPARSE = "op-plugin docs: npu_block_sparse_attention.md (2026-08), as in the torch_npu 2.13.0 wheel"
META = "torch_npu 2.13.0 meta kernel"
TILING = "CANN ops-transformer tiling (2025-11)"
TILING_NPU_BLOCK_SPARSE = "CANN ops-transformer attention/block_sparse_attention tiling (2026)"
# Older than the docs and stricter than they are, so newer CANN may have lifted the limit.
TILING_ONLY = f"{TILING}; may be rejected on CANN <= 8.5"
# Not a limit of the hardware: the CPU kernels do not reproduce the feature.
EMULATION = "the emulation's scope"
