"""What a serving engine calls, in a compiled model or outside of one: attention over packed and paged sequences."""

from sgl_npu.runtime.serving import attention, update_kv_cache

__all__ = ["attention", "update_kv_cache"]
