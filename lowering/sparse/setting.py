"""What the user asks of sparse attention, checked by `sgl_npu.Options`."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from sgl_npu.lowering.sparse.token_grid import GridSetting

LASER, BLOCK_SPARSE, RAIN_FUSION = "laser_attn", "block_sparse_attn", "rain_fusion_attn"
METHODS = (LASER, BLOCK_SPARSE, RAIN_FUSION)


@dataclass(frozen=True)
class SparseSetting:
    """`method`: SGLang's name of it. `sparsity`: the share of key blocks that a block of queries leaves out.

    `layers`: globs on module paths, of which one must match. Steps before `skip_first_steps` are dense. `kernel`: what
    computes it on an NPU, a name of `sgl_npu.lowering.sparse.table.NPU_KERNELS`; "" for the first.
    """

    method: str
    sparsity: Fraction = Fraction(0)
    skip_first_steps: int = 0
    layers: tuple[str, ...] = ("*",)
    grid: GridSetting = field(default_factory=GridSetting)
    kernel: str = ""

    @property
    def needs_grid(self) -> bool:
        return self.method != LASER
