"""ops.update_kv_cache: which rows change, that padding changes nothing, in place, eager and compiled."""

import pytest
import torch

import sgl_npu
from sgl_npu import ops
from sgl_npu.runtime.cache_update import update_kv_cache

BLOCKS, BLOCK = 4, 8
SLOTS = {
    "no padding": [9, 8, 31, 0],
    "padding behind": [9, 8, -1, -1],
    "padding between": [-1, 17, -1, 3],
    "the first slot alone": [-1, 0, -1, -1],
    "nothing but padding": [-1, -7, -1, -1],
    "no token": [],
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensors(tokens, dtype=torch.float32, value_dim=4):
    caches = [torch.randn(BLOCKS, BLOCK, 2, dim, dtype=dtype) for dim in (8, value_dim)]
    return *caches, *(torch.randn(tokens, 2, dim, dtype=dtype) for dim in (8, value_dim))


def expected(cache, rows, slots):
    flat = cache.clone().flatten(0, 1)
    for slot, row in zip(slots, rows, strict=True):
        if slot >= 0:
            flat[slot] = row
    return flat.view_as(cache)


def check(update, slots, dtype=torch.int64, cache_dtype=torch.bfloat16):
    key_cache, value_cache, key, value = tensors(len(slots), cache_dtype)
    wanted = expected(key_cache, key, slots), expected(value_cache, value, slots)
    with torch.no_grad():
        assert update(key_cache, value_cache, key, value, torch.tensor(slots, dtype=dtype)) is None
    assert torch.equal(key_cache, wanted[0]) and torch.equal(value_cache, wanted[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("case", SLOTS)
def test_tokens_go_to_their_slots_and_padding_nowhere(case, dtype):
    check(ops.update_kv_cache, SLOTS[case], dtype)


@pytest.mark.parametrize("platform, inner", [("cpu", "inductor"), ("npu", "eager")])
def test_compiled_one_graph_serves_every_mixture_of_padding(platform, inner):
    torch._dynamo.reset()
    options = {"platform": platform, "inner": inner, "strict": True}
    compiled = torch.compile(ops.update_kv_cache, backend="sgl_npu", options=options, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for case in list(SLOTS)[:-1]:
            check(compiled, SLOTS[case])


@pytest.mark.parametrize("platform, inner", [("cpu", "inductor"), ("npu", "eager")])
def test_what_is_never_padded_takes_no_work_for_padding(platform, inner):
    torch._dynamo.reset()
    options = {"platform": platform, "inner": inner, "strict": True}

    def update(*arguments):
        return ops.update_kv_cache(*arguments, padded=False)

    check(torch.compile(update, backend="sgl_npu", options=options), SLOTS["no padding"])
    assert "aten.where" not in sgl_npu.reports()[-1].graph


def test_layers_share_what_follows_from_the_slots():
    """And of two results that the user sees, none becomes the other."""

    def layers(slots, *caches_and_rows):
        for i in range(0, len(caches_and_rows), 4):
            ops.update_kv_cache(*caches_and_rows[i : i + 4], slots)
        return slots >= 0, slots >= 0

    torch._dynamo.reset()
    layer_tensors = [tensors(4) for _ in range(3)]
    slots = SLOTS["padding between"]
    wanted = [(expected(k, key, slots), expected(v, value, slots)) for k, v, key, value in layer_tensors]
    compiled = torch.compile(layers, backend="sgl_npu", options={"platform": "npu", "strict": True})
    with torch.no_grad():
        one, other = compiled(torch.tensor(slots), *(x for layer in layer_tensors for x in layer))
    assert one.data_ptr() != other.data_ptr() and torch.equal(one, other)
    for (key_cache, value_cache, *_), (key, value) in zip(layer_tensors, wanted, strict=True):
        assert torch.equal(key_cache, key) and torch.equal(value_cache, value)
    graph = sgl_npu.reports()[-1].graph
    for op, count in {"aten.max.dim": 1, "aten.stack": 1, "aten.arange": 1, "npu.npu_scatter_nd_update": 6}.items():
        assert graph.count(f" = {op}(") == count, op


def test_values_that_are_not_numbers_stay_where_they_are():
    """A select by multiplication would spread the NaN of a padding token, or of the cache."""
    key_cache, value_cache, key, value = tensors(2)
    key[1], key_cache[0, 0] = torch.nan, torch.nan
    before = key_cache.clone()
    ops.update_kv_cache(key_cache, value_cache, key, value, torch.tensor([5, -1]))
    before[0, 5] = key[0]
    torch.testing.assert_close(key_cache, before, equal_nan=True, rtol=0, atol=0)


def test_opcheck():
    torch.library.opcheck(update_kv_cache, (*tensors(4), torch.tensor([3, -1, 30, 2])))


C, T = torch.zeros(BLOCKS, BLOCK, 2, 8), torch.zeros(3, 2, 8)
S = torch.zeros(3, dtype=torch.int64)
WRONG = [
    ((C, C, T, T, S[:2]), "key has 3 tokens but slot_mapping 2"),
    ((C, C, T, T[:2], S), "value has 2 tokens but slot_mapping 3"),
    ((C, C, T, T, S.float()), "slot_mapping must be int32 or int64 (tokens,), got torch.float32 (3,)"),
    ((C, C, T[..., :4], T, S), "key_cache and key differ in heads or head size: key_cache (4, 8, 2, 8), key (3, 2, 4)"),
    ((C, C, T, T.half(), S), "value_cache is torch.float32 and value torch.float16; they must agree"),
    ((C[0], C, T, T, S), "key_cache must be (blocks, block_size, Hkv, D) and key (tokens, Hkv, D); got key_cache"),
    ((C.transpose(0, 1), C, T, T, S), "key_cache has strides (16, 128, 8, 1); it must be contiguous"),
    ((C, C[:2], T, T, S), "key_cache and value_cache differ in blocks: (4, 8), (2, 8)"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_fit_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError) as error:
        ops.update_kv_cache(*arguments)
    assert message in str(error.value)
