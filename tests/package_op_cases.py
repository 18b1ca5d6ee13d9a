"""Valid calls of our operators around sgl-kernel-npu, at any sequence length."""

import torch


def _qkv(length, dim, dtype, batch=2):
    generator = torch.Generator().manual_seed(length)
    shapes = ((batch, heads, length, dim) for heads in (4, 2, 2))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _laser(length):
    return _qkv(length, 128, torch.float16, batch=1)


def _estimate(length):
    return _qkv(length, 64, torch.bfloat16)[:2]


def _block_sparse(length):
    """Each query block attends the first key block and its own."""
    count = -(-length // 128)
    mask = torch.zeros(2, 4, count, -(-count // 32) * 32, dtype=torch.int8)
    mask[..., :count] = torch.eye(count, dtype=torch.int8)
    mask[..., 0] = 1
    return *_qkv(length, 64, torch.bfloat16), mask, mask.sum(-1, dtype=torch.int32)


def _rain_fusion(length):
    """Two sequences end to end; each query block attends the first and the last key block of its own one."""
    count = -(-length // 32)
    listed = torch.tensor([0, count - 1, -1]).expand(2 * count, 4, 3).contiguous()
    packed = (x.transpose(1, 2).flatten(0, 1) for x in _qkv(length, 64, torch.float16))
    return *packed, listed, (listed >= 0).sum(-1)


def _split(length):
    generator = torch.Generator().manual_seed(length)
    sizes = ((length, 4 * 16 + 2 * 2 * 16), (length, 8), (length, 8), (4, 16))
    *inputs, weights = (torch.randn(size, generator=generator).bfloat16() for size in sizes)
    return *inputs, *weights.unbind()


TENSORS = {
    "laser_attention": _laser,
    "sparse_block_estimate": _estimate,
    "block_sparse_attention": _block_sparse,
    "rain_fusion_attention": _rain_fusion,
    "split_qkv_rmsnorm_rope": _split,
}


def arguments(name, tensors):
    """The arguments of a call with these tensors, whose sizes may be symbolic."""
    if name == "laser_attention":
        return *tensors, 0.1, 5
    if name == "sparse_block_estimate":
        return *tensors, 0.125, True, 0.8
    if name == "block_sparse_attention":
        return *tensors, 0.125, True
    if name == "rain_fusion_attention":
        lengths = [tensors[0].shape[0] // 2, tensors[0].shape[0] // 2]
        return *tensors, lengths, lengths, 0.125, [32, 32]
    inputs, weights = tensors[:3], tensors[3:]
    return *inputs, 64, 32, 16, 1e-6, *weights, True


def call(name, length):
    return arguments(name, TENSORS[name](length))


def lengths(name):
    """Of one graph: different block counts, none equal to another size."""
    return (768, 1280, 1536) if name == "laser_attention" else (300, 420, 530)


def outputs(result):
    return result if isinstance(result, tuple) else (result,)
