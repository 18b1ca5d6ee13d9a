"""One call of the fused infer attention operator, described by sizes that may be symbolic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from sgl_npu.runtime.npu.layouts import AxisSizes, query_axes, read_sizes
from sgl_npu.runtime.sizes import Size, guard

INT_MAX = 2147483647
Shape = tuple[Size, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class FiaCall:
    """Arguments of npu_fused_infer_attention_score (`version` 1) or its _v2 (`version` 2), in v1 names.

    Shapes are tuples of int or SymInt. `contiguous` answers for query, key, value; None means unknown and is
    not held against the call. `other_inputs` names every further argument that was given a non-default value.
    The properties presuppose the gate rules: a known layout and fitting ranks.
    """

    layout: str
    query: Shape
    key: Shape
    value: Shape
    query_dtype: torch.dtype
    key_dtype: torch.dtype
    value_dtype: torch.dtype
    num_heads: int
    num_key_value_heads: int = 0
    version: int = 1
    contiguous: tuple[bool, bool, bool] | None = None
    atten_mask: Shape | None = None
    atten_mask_dtype: torch.dtype = torch.bool
    pse_shift: Shape | None = None
    pse_shift_dtype: torch.dtype | None = None
    sparse_mode: int = 0
    pre_tokens: int = INT_MAX
    next_tokens: int = INT_MAX
    inner_precise: int = 0
    softmax_lse_flag: bool = False
    actual_seq_lengths: Sequence[Size] | None = None
    actual_seq_lengths_kv: Sequence[Size] | None = None
    block_table: Shape | None = None
    block_table_dtype: torch.dtype = torch.int32
    block_size: int = 0
    learnable_sink: Shape | None = None
    learnable_sink_dtype: torch.dtype = torch.bfloat16
    other_inputs: frozenset[str] = frozenset()

    @property
    def axes(self) -> str:
        return query_axes(self.layout)

    @property
    def packed(self) -> bool:
        """Sequences lie one after the other along T, without a batch axis."""
        return "T" in self.axes

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads

    @cached_property
    def q(self) -> AxisSizes:
        return read_sizes(self.axes, self.query, self.num_heads)

    @cached_property
    def k(self) -> AxisSizes:
        return self._cache_sizes(self.key) if self.paged else read_sizes(self.axes, self.key, self.kv_heads)

    @cached_property
    def v(self) -> AxisSizes:
        return self._cache_sizes(self.value) if self.paged else read_sizes(self.axes, self.value, self.kv_heads)

    def _cache_sizes(self, cache: Shape) -> AxisSizes:
        # (blocks, block_size, Nk * D) or (blocks, Nk, block_size, D); the length is what the table can hold.
        assert self.block_table is not None
        heads, dim = (self.kv_heads, cache[2] // self.kv_heads) if len(cache) == 3 else (cache[1], cache[3])
        return AxisSizes(self.block_table[0], heads, self.block_table[1] * self.block_size, dim)

    @property
    def batch(self) -> Size:
        """Number of sequences."""
        if self.packed:
            return len(self.actual_seq_lengths) if self.actual_seq_lengths is not None else 1
        return self.q.batch

    @cached_property
    def decode(self) -> bool:
        """The call runs the incremental kernel family (one query row), whose rules differ."""
        return not self.packed and guard(self.q.length == 1)

    @cached_property
    def lengths(self) -> list[tuple[Size, Size]]:
        """(query rows, keys) of each sequence; a single pair where all sequences are alike."""
        if self.packed:
            rows = _differences(self.actual_seq_lengths or ())
            keys = self.actual_seq_lengths_kv or ()
            return list(zip(rows, keys if self.paged else _differences(keys), strict=False))
        rows = self._per_batch(None if self.decode else self.actual_seq_lengths, self.q.length)
        keys = self._per_batch(self.actual_seq_lengths_kv, self.k.length)
        count = max(len(rows), len(keys))
        rows = rows * count if len(rows) == 1 else rows
        keys = keys * count if len(keys) == 1 else keys
        return list(zip(rows, keys, strict=False))

    def _per_batch(self, given: Sequence[Size] | None, full: Size) -> list[Size]:
        if given is None:
            return [full]
        # A list may be longer than the batch; only its first B entries count.
        return list(given[: self.batch]) if isinstance(self.batch, int) else list(given)

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        atten_mask: torch.Tensor | None = None,
        pse_shift: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        learnable_sink: torch.Tensor | None = None,
        others: Mapping[str, object] | None = None,
        **settings: object,
    ) -> FiaCall:
        """The description of a call with these tensors. `settings` are the fields that are not tensors.

        `others` maps the remaining arguments to their values; those set to something count as given.
        """
        for name, tensor in (
            ("atten_mask", atten_mask),
            ("pse_shift", pse_shift),
            ("block_table", block_table),
            ("learnable_sink", learnable_sink),
        ):
            if tensor is not None:
                settings |= {name: tuple(tensor.shape), f"{name}_dtype": tensor.dtype}
        return cls(
            query=tuple(query.shape),
            key=tuple(key.shape),
            value=tuple(value.shape),
            query_dtype=query.dtype,
            key_dtype=key.dtype,
            value_dtype=value.dtype,
            contiguous=(query.is_contiguous(), key.is_contiguous(), value.is_contiguous()),
            other_inputs=frozenset(name for name, given in (others or {}).items() if is_given(given)),
            **settings,  # type: ignore[arg-type]
        )


def is_given(argument: object) -> bool:
    """Whether an optional argument was set: a tensor, or a value other than None and the default 0."""
    return isinstance(argument, torch.Tensor) or bool(argument)


def _differences(ends: Sequence[Size]) -> list[Size]:
    return [end - start for start, end in zip((0, *ends), ends, strict=False)]
