"""Our operators around sgl-kernel-npu: what they compute, what they refuse, and that graphs take them."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from package_op_cases import TENSORS, arguments, call, lengths, outputs
from torch._subclasses.fake_tensor import FakeTensorMode

from sgl_npu.runtime.npu import package_ops
from sgl_npu.runtime.npu.kernel_package import KERNELS, KernelUnavailable
from sgl_npu.runtime.npu.package_ops import PACKAGE_OPS, ensure_package_ops
from sgl_npu.runtime.npu.sparse_blocks import removed_positions

ensure_package_ops()
OPS = torch.ops.sgl_npu
NAMES = pytest.mark.parametrize("name", PACKAGE_OPS)


def sdpa(query, key, value, scale, allowed=None):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query.float(), key, value, allowed, scale=scale)


# ---------------------------------------------------------------- what torch sees


@NAMES
def test_opcheck(name):
    op = getattr(OPS, name).default
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, call(name, lengths(name)[0]), test_utils=kinds)


@NAMES
def test_the_schema_is_functional_and_lists_are_of_ints(name):
    schema = getattr(OPS, name).default._schema
    assert not schema.is_mutable
    assert "Tensor[]" not in str(schema)
    assert all(result.alias_info is None for result in schema.returns)


@NAMES
def test_fake_and_kernel_agree_on_shapes_strides_and_dtypes(name):
    given = call(name, lengths(name)[0])
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given]
        fake = outputs(getattr(OPS, name)(*faked))
    real = outputs(getattr(OPS, name)(*given))
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in real]


@NAMES
def test_one_dynamic_graph_serves_every_length(name):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def run(*tensors):
        return getattr(OPS, name)(*arguments(name, tensors))

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for length in lengths(name):
        tensors = TENSORS[name](length)
        pairs = zip(outputs(compiled(*tensors)), outputs(run(*tensors)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert len(graphs) == 1
    torch._dynamo.reset()


@NAMES
def test_a_backward_raises_instead_of_losing_the_gradient(name):
    first, *others = call(name, lengths(name)[0])
    results = outputs(getattr(OPS, name)(first.requires_grad_(), *others))
    floats = [x for x in results if x.is_floating_point()]
    if not floats:
        assert not any(x.requires_grad for x in results)
        return
    with pytest.raises(RuntimeError, match=f"sgl_npu::{name}: the kernel is for inference and has no backward"):
        floats[0].sum().backward()


@pytest.mark.parametrize("name", [name for name in PACKAGE_OPS if name != "split_qkv_rmsnorm_rope"])
def test_the_npu_kernel_without_the_package_says_what_to_install(name):
    with pytest.raises(KernelUnavailable, match=f"{name}: none of .* is there; .*build.sh -a"):
        PACKAGE_OPS[name].npu(*call(name, lengths(name)[0]))


def test_without_the_package_the_split_of_a_rotary_embedding_is_its_formula():
    op, given = PACKAGE_OPS["split_qkv_rmsnorm_rope"], call("split_qkv_rmsnorm_rope", 300)
    assert all(torch.equal(one, other) for one, other in zip(op.npu(*given), op.cpu(*given), strict=True))


@NAMES
def test_every_kernel_of_an_operator_takes_the_same_arguments(name):
    names = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    assert list(inspect.signature(PACKAGE_OPS[name].cpu).parameters) == names
    assert list(inspect.signature(PACKAGE_OPS[name].npu).parameters) == names


# ---------------------------------------------------------------- how sgl-kernel-npu is called


class Recorded(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("laser_attention", {"head_num": 4, "pre_tokens": 5, "scale_value": 0.1, "input_layout": "BNSD"}),
        ("sparse_block_estimate", {"num_heads": 4, "num_key_value_heads": 2, "scale_value": 0.125 / 8}),
        ("block_sparse_attention", {"num_heads": 4, "num_key_value_heads": 2, "causal": True, "inner_precise": 1}),
        ("rain_fusion_attention", {"head_num": 2, "q_input_layout": "TND", "actual_seq_qlen": [300, 300]}),
        ("split_qkv_rmsnorm_rope", {"q_hidden_size": 64, "kv_hidden_size": 32, "is_neox_style": True}),
    ],
)
def test_the_npu_kernel_fits_the_newest_schema(monkeypatch, name, expected):
    module = inspect.getmodule(PACKAGE_OPS[name].npu)
    signature = KERNELS[name][0].signature

    def kernel(**arguments):
        assert expected.items() <= arguments.items()
        if "->" in signature:
            library = torch.library.Library("sgl_npu_test", "FRAGMENT")
            library.define(f"{name}{signature}")
            library.impl(name, lambda *_, **__: (_ for _ in ()).throw(Recorded), "CPU")
            getattr(torch.ops.sgl_npu_test, name)(**arguments)
        assert arguments.keys() == set(signature.strip("()").split(", "))
        raise Recorded

    monkeypatch.setattr(module, "require", lambda _: kernel)
    monkeypatch.setattr(module, "resolve", lambda _: kernel, raising=False)
    with pytest.raises(Recorded):
        PACKAGE_OPS[name].npu(*call(name, lengths(name)[0]))


def test_the_results_of_the_laser_kernel_change_places(monkeypatch):
    module = inspect.getmodule(PACKAGE_OPS["laser_attention"].npu)
    monkeypatch.setattr(module, "require", lambda _: lambda **__: ("lse", "out"))
    assert PACKAGE_OPS["laser_attention"].npu(*call("laser_attention", 256)) == ("out", "lse")


@pytest.mark.parametrize(("padding", "pre_tokens"), [(0, 2147483647), (255, 255)])
def test_without_padding_the_laser_kernel_gets_its_default_window(monkeypatch, padding, pre_tokens):
    module = inspect.getmodule(PACKAGE_OPS["laser_attention"].npu)
    monkeypatch.setattr(module, "require", lambda _: lambda **given: (None, given["pre_tokens"]))
    assert PACKAGE_OPS["laser_attention"].npu(*call("laser_attention", 256)[:4], padding)[0] == pre_tokens


# ---------------------------------------------------------------- what they compute


@pytest.mark.parametrize("padding", [0, 1, 200])
def test_laser_attention_is_attention_without_the_padding(padding):
    query, key, value = call("laser_attention", 512)[:3]
    out, lse = OPS.laser_attention(query, key, value, 0.1, padding)
    kept = slice(None, key.shape[2] - padding)
    torch.testing.assert_close(out, sdpa(query, key[:, :, kept], value[:, :, kept], 0.1), rtol=1e-5, atol=1e-5)
    scores = query.float() @ key.float().repeat_interleave(2, 1)[:, :, kept].transpose(2, 3) * 0.1
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert out.dtype == lse.dtype == torch.float32


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [128, 300])
def test_block_sparse_attention_is_attention_under_the_block_mask(length, causal):
    query, key, value, mask, count, scale, _ = call("block_sparse_attention", length)
    out = OPS.block_sparse_attention(query, key, value, mask, count, scale, causal)
    rows = torch.arange(length)
    allowed = mask.bool()[:, :, rows[:, None] // 128, rows // 128]
    if causal:
        allowed = allowed & (rows <= rows[:, None])
    torch.testing.assert_close(out.float(), sdpa(query, key, value, scale, allowed), rtol=1e-2, atol=1e-2)


def test_a_query_block_that_selects_nothing_gives_zero():
    query, key, value, mask, _, scale, causal = call("block_sparse_attention", 300)
    mask[:, :, 1] = 0
    out = OPS.block_sparse_attention(query, key, value, mask, mask.sum(-1, dtype=torch.int32), scale, causal)
    assert not out[:, :, 128:256].any() and out[:, :, :128].any(-1).all()


@pytest.mark.parametrize("layout", ["TND", "BNSD"])
def test_rain_fusion_attention_is_attention_under_the_listed_blocks(layout):
    packed = call("rain_fusion_attention", 100)
    query, key, value = (x.unflatten(0, (2, 100)).transpose(1, 2) for x in packed[:3])
    tensors = packed[:3] if layout == "TND" else (query, key, value)
    out = OPS.rain_fusion_attention(*tensors, *packed[3:], layout)
    out = out.unflatten(0, (2, 100)).transpose(1, 2) if layout == "TND" else out
    keys = torch.arange(100)
    allowed = ((keys // 32 == 0) | (keys // 32 == 3)).expand(100, 100)
    torch.testing.assert_close(out.float(), sdpa(query, key, value, 0.125, allowed), rtol=2e-3, atol=2e-3)


def test_sequences_of_rain_fusion_attention_have_their_own_lengths_and_lists():
    query = torch.randn(6, 2, 16).half()
    key, value = torch.randn(2, 9, 1, 16).half()
    listed = torch.tensor([[0, -1], [1, -1], [0, -1]])[:, None].expand(3, 2, 2).contiguous()
    out = OPS.rain_fusion_attention(
        query, key, value, listed, (listed >= 0).sum(-1), [4, 2], [6, 3], 0.25, [2, 4], "TND"
    )
    expected = []
    for rows, keys in ((slice(0, 2), slice(0, 4)), (slice(2, 4), slice(4, 6)), (slice(4, 6), slice(6, 9))):
        parts = (x.transpose(0, 1)[None] for x in (query[rows], key[keys], value[keys]))
        expected.append(sdpa(*parts, 0.25)[0].transpose(0, 1))
    torch.testing.assert_close(out.float(), torch.cat(expected), rtol=2e-3, atol=2e-3)


def naive_split(qkv, sin, cos, heads, kv_heads, dim, eps, weights, biases, neox):
    """Head by head and channel pair by channel pair."""
    size, outs = sin.shape[-1], []
    for first, count, index in ((0, heads, 0), (heads, kv_heads, 1)):
        for head in range(first, first + count):
            x = qkv[:, head * dim : (head + 1) * dim].double()
            if eps is not None:
                x = x / (x.pow(2).mean(1, keepdim=True) + eps).sqrt() * weights[index].double()
                x = x + biases[index].double() if biases[index] is not None else x
            y = x.clone()
            for pair in range(size // 2):
                a, b = (pair, pair + size // 2) if neox else (2 * pair, 2 * pair + 1)
                angles = (a, b) if neox else (pair, pair)
                y[:, a] = x[:, a] * cos[:, angles[0]] - x[:, b] * sin[:, angles[0]]
                y[:, b] = x[:, b] * cos[:, angles[1]] + x[:, a] * sin[:, angles[1]]
            outs.append(y)
    return torch.cat(outs[:heads], 1), torch.cat(outs[heads:], 1)


@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize("rope", [8, 4])
@pytest.mark.parametrize("norm", ["norm and bias", "norm", "none"])
def test_split_qkv_rmsnorm_rope_is_the_formula(neox, rope, norm):
    qkv, sin, cos = torch.randn(5, 64), torch.randn(5, 1, 1, rope), torch.randn(5, 1, 1, rope)
    eps = None if norm == "none" else 1e-3
    weights = torch.randn(2, 8).unbind() if norm != "none" else (None, None)
    biases = torch.randn(2, 8).unbind() if norm == "norm and bias" else (None, None)
    query, key, value = OPS.split_qkv_rmsnorm_rope(qkv, sin, cos, 32, 16, 8, eps, *weights, *biases, neox)
    expected = naive_split(qkv, sin.view(5, -1), cos.view(5, -1), 4, 2, 8, eps, weights, biases, neox)
    torch.testing.assert_close(query.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(key.double(), expected[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(value, qkv[:, 48:]) and value.data_ptr() != qkv[:, 48:].data_ptr()


# ---------------------------------------------------------------- which blocks are kept


def planted(blocks, chosen):
    """Query and key whose weights lie in the `chosen` key blocks, the same for every query block."""
    key = torch.zeros(1, 1, blocks * 128, 16)
    for block in chosen:
        key[:, :, block * 128 : (block + 1) * 128, 0] = 1.0
    query = torch.zeros_like(key)
    query[..., 0] = 16.0
    return query.bfloat16(), key.bfloat16()


@pytest.mark.parametrize("chosen", [(3,), (2, 5)])
def test_the_heaviest_blocks_and_both_ends_are_kept(chosen):
    mask, count = OPS.sparse_block_estimate(*planted(8, chosen), 1.0, False, 0.9)
    kept = sorted({0, 7, *chosen})
    assert mask.shape == (1, 1, 8, 32) and mask[0, 0, :, :].any(-1).all()
    assert [row.nonzero().flatten().tolist() for row in mask[0, 0]] == [kept] * 8
    assert (count == len(kept)).all() and count.dtype == torch.int32


def test_a_causal_row_keeps_its_diagonal_and_nothing_above_it():
    mask, _ = OPS.sparse_block_estimate(*planted(8, (2,)), 1.0, True, 0.9)
    rows = [row.nonzero().flatten().tolist() for row in mask[0, 0]]
    # Block 2 is the diagonal of row 2: the ranking has only block 1 left.
    assert rows == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 2, 4], [0, 2, 5], [0, 2, 6], [0, 2, 7]]


def test_threshold_one_keeps_all():
    mask, count = OPS.sparse_block_estimate(*planted(4, (2,)), 1.0, False)
    assert mask[..., :4].all() and not mask[..., 4:].any() and (count == 4).all()


@pytest.mark.parametrize("causal", [True, False])
def test_row_sparse_limits_rows_of_ten_blocks_and_more(causal):
    query, key = torch.randn(2, 1, 1, 12 * 128, 16).bfloat16().unbind()
    _, count = OPS.sparse_block_estimate(query, key, 1.0, causal, 1.0, 0.25)
    full, cut = (count[0, 0, :9].tolist(), count[0, 0, 9:]) if causal else ([], count)
    assert full == list(range(1, len(full) + 1))
    # A quarter of 10, 11 and 12 blocks is 2, 2 and 3, and the two ends come on top.
    assert ((cut >= 4) & (cut <= 5)).all()


@pytest.mark.parametrize(("shift", "blocks"), [(7, [0, 2]), (6, [0, 1, 2])], ids=["on the antidiagonal", "beside it"])
def test_samples_lie_on_antidiagonals(shift, blocks):
    query, key = torch.zeros(2, 1, 1, 512, 16).unbind()
    # In each square of 8 x 8 row i meets key 7 - i, so rows 0 meet keys 7.
    query[:, :, ::8, 0] = 16.0
    key[:, :, 256 + shift : 384 : 8, 0] = 16.0
    mask, _ = OPS.sparse_block_estimate(query.bfloat16(), key.bfloat16(), 1.0, False, 0.6, 1.0, False, False)
    # Weight in one block is found at once; evenly spread it takes two of the three ranked blocks.
    assert mask[0, 0, 0, :4].nonzero().flatten().tolist() == [*blocks, 3]


def naive_estimate(query, key, scale, causal, threshold, row_sparse):
    """Kept blocks per query block, sample by sample and block by block; both ends are kept."""
    length, stride = query.shape[0], 8
    rows, keys, count = -(-length // stride), length // stride, -(-length // 128)
    weight = torch.zeros(count, count, dtype=torch.double)
    query = F.pad(query.double(), (0, 0, 0, rows * stride - length))
    for i in range(rows):
        # A tile of 128 samples sees the keys up to its own end.
        seen = min((i // 128 + 1) * 1024, length) // stride if causal else keys
        sampled = query[i * stride : (i + 1) * stride].flip(0).flatten()
        scores = key.double()[: seen * stride].reshape(seen, -1) @ sampled * scale / stride
        for j, share in enumerate(scores.softmax(0)):
            weight[i // 16, j // 16] += share
    kept = []
    for row in range(count):
        last = row if causal else count - 1
        order = sorted(range(1, last), key=lambda block: -weight[row, block])
        total, held, taken = weight[row, 1:last].sum(), 0.0, 0
        while taken < len(order) and (taken == 0 or held < threshold * total):
            held += weight[row, order[taken]]
            taken += 1
        if last + 1 >= 10 and taken - 1 > (last + 1) * row_sparse:
            taken = int((last + 1) * row_sparse)
        # Blocks that weigh as much as the last one taken are not told apart from it.
        chosen = {block for block in order if weight[row, block] > weight[row, order[taken - 1]] - 1e-5}
        kept.append(sorted({0, last, *chosen}) if not causal or row > 1 else list(range(row + 1)))
    return kept


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("threshold", "row_sparse"), [(0.7, 1.0), (0.9, 0.3)])
@pytest.mark.parametrize("length", [1000, 2000])
def test_the_estimate_is_the_formula(causal, threshold, row_sparse, length):
    generator = torch.Generator().manual_seed(length)
    query, key = torch.randn(2, 1, 2, length, 16, generator=generator).bfloat16().unbind()
    # Blocks that differ: without this all weights are close to each other.
    key = key * (1 + torch.arange(length) // 128 % 5)[:, None].bfloat16()
    mask, _ = OPS.sparse_block_estimate(query, key[:, :1], 16.0, causal, threshold, row_sparse)
    for head in range(2):
        expected = naive_estimate(query[0, head], key[0, 0], 16.0, causal, threshold, row_sparse)
        assert [row.nonzero().flatten().tolist() for row in mask[0, head]] == expected


# ---------------------------------------------------------------- what they refuse


def replaced(name, changes):
    """The valid call with some arguments changed, by name."""
    names = list(inspect.signature(PACKAGE_OPS[name].cpu).parameters)
    given = dict(zip(names, call(name, 256 if name == "laser_attention" else 300), strict=False))
    return given | {key: value(given) for key, value in changes.items()}


def cast(name, dtype):
    return {name: lambda given: given[name].to(dtype)}


def cut(name, *index):
    return {name: lambda given: given[name][index]}


def put(name, value):
    return {name: lambda _: value}


ALL = slice(None)
LASER, ESTIMATE, SPARSE, RAIN, SPLIT = TENSORS


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        (LASER, cut("query", 0), "query has 3 axes; it must be (B, N, S, D)"),
        (LASER, {k: v for n in ("query", "key", "value") for k, v in cast(n, torch.bfloat16).items()},
         "query is bfloat16; the kernel reads every input as float16"),
        (LASER, cast("key", torch.float32), "the tensors are float16, float32, float16; they must have one dtype"),
        (LASER, {k: v for n in ("query", "key", "value") for k, v in cut(n, ..., slice(64)).items()},
         "D = 64; the kernel takes 128"),
        (LASER, cut("query", ALL, ALL, slice(255)), "S = 255 is not a multiple of 256"),
        (LASER, put("kv_padding", 256), "kv_padding = 256 is not in 0..255"),
        (LASER, cut("value", ALL, slice(1)), "value is (1, 1, 256, 128) and key is (1, 2, 256, 128)"),
        (LASER, cut("query", ALL, slice(3)), "N = 3 is not a multiple of Nk = 2"),
        (ESTIMATE, put("threshold", 0.0), "threshold = 0.0 is not in (0, 1]"),
        (ESTIMATE, put("row_sparse", 1.5), "row_sparse = 1.5 is not in (0, 1]"),
        (ESTIMATE, put("stride", 7), "stride = 7 does not divide sparse_size = 128"),
        (ESTIMATE, put("sparse_size", 256), "sparse_size = 256; block_sparse_attention takes 128"),
        (ESTIMATE, cut("key", ALL, ALL, slice(200)), "causal = True with S = 300 and Skv = 200"),
        (ESTIMATE, {"key": lambda given: given["key"].repeat(1, 1, 14, 1)}, "need different numbers of mask columns"),
        (SPARSE, put("sparse_size", 256), "sparse_size = 256; the kernel takes 128"),
        (SPARSE, cast("sparse_mask", torch.bool), "sparse_mask is bool; it must be int8"),
        (SPARSE, cut("sparse_mask", ..., slice(3)), "sparse_mask is (2, 4, 3, 3); it must be (2, 4, 3, 32)"),
        (SPARSE, cast("sparse_count", torch.int64), "sparse_count is int64; it must be int32"),
        (SPARSE, {"sparse_count": lambda given: given["sparse_count"] + 1}, "sparse_count must be sparse_mask.sum(-1)"),
        (RAIN, put("input_layout", "BSH"), "input_layout = BSH; the kernel takes TND and BNSD"),
        (RAIN, put("block_shape", [32]), "block_shape = [32]; it must be two sizes of 1 and more"),
        (RAIN, cast("select_idx", torch.int32), "select_idx is int32; it must be int64"),
        (RAIN, {k: v for n in ("query", "key", "value") for k, v in cast(n, torch.bfloat16).items()}
         | put("inner_precise", 1), "inner_precise = 1; bfloat16 takes 0"),
        (RAIN, put("actual_seq_qlen", [300, 600]), "actual_seq_qlen = [300, 600] adds up to 900, not to T = 600"),
        (RAIN, put("actual_seq_kvlen", [600]), "actual_seq_qlen has 2 entries and actual_seq_kvlen 1"),
        (RAIN, cut("select_num_idx", slice(5)), "select_num_idx is (5, 4); it must be (20, 4)"),
        (RAIN, {"select_idx": lambda given: given["select_idx"] + 10}, "select_idx names blocks outside 0..9"),
        (SPLIT, put("head_dim", 24), "head_dim = 24 is not a power of two"),
        (SPLIT, put("kv_hidden_size", 40), "kv_hidden_size = 40 is not a multiple of head_dim = 16"),
        (SPLIT, cut("qkv", ALL, slice(100)), "q_hidden_size + 2 * kv_hidden_size = 128"),
        (SPLIT, cut("sin", slice(9)), "they must have one shape"),
        (SPLIT, cut("sin", slice(9)) | cut("cos", slice(9)), "sin has 9 rows, but qkv has T = 300"),
        (SPLIT, put("eps", None), "eps, q_weight and k_weight must be given together"),
        (SPLIT, put("q_bias", None), "q_bias and k_bias must be given together"),
        (SPLIT, cut("q_weight", slice(4)), "a weight is (4,); it must be (head_dim = 16,)"),
    ],
)  # fmt: skip
def test_a_call_the_hardware_gets_wrong_is_refused(name, changes, sentence):
    with pytest.raises(RuntimeError) as error:
        getattr(OPS, name)(**replaced(name, changes))
    assert str(error.value).startswith(f"{name}: ") and sentence in str(error.value)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda mask: mask[..., 1, 2].fill_(1), "causal = True, but sparse_mask selects blocks above the diagonal"),
        (lambda mask: mask[..., 1, 3].fill_(1), "selects columns past the 3 key blocks"),
        (lambda mask: mask[..., 0, 0].fill_(2), "sparse_mask holds [0, 1, 2]; it may hold 0 and 1"),
    ],
)
def test_values_of_a_block_mask_are_checked_where_the_hardware_does_not_look(write, sentence):
    query, key, value, mask, _, scale, causal = call("block_sparse_attention", 300)
    write(mask)
    with pytest.raises(RuntimeError) as error:
        OPS.block_sparse_attention(query, key, value, mask, mask.sum(-1, dtype=torch.int32), scale, causal)
    assert sentence in str(error.value)


def test_row_sparse_must_keep_a_block():
    query, key = torch.randn(2, 1, 1, 12 * 128, 16).bfloat16().unbind()
    with pytest.raises(RuntimeError, match=r"row_sparse = 0\.05 keeps none of 12 key blocks"):
        OPS.sparse_block_estimate(query, key, 1.0, False, 1.0, 0.05)


def test_positions_of_a_mask_follow_its_blocks():
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]], dtype=torch.int8)
    assert (~removed_positions(mask, 3, 4, 2, causal=False)).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1] * 4]
    assert (~removed_positions(mask, 3, 4, 2, causal=True)).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_defining_again_changes_nothing():
    library = package_ops._library
    ensure_package_ops()
    assert package_ops._library is library
