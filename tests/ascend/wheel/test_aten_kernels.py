"""Every aten operator computes on the stand-in what it computes on the CPU, bit for bit, and stays on the device."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

NPU = torch.device("npu:0")


def numbers(*shape, dtype=torch.float32):
    return (torch.randn(shape) * 4).to(dtype)


def matrix(device):
    return numbers(4, 6).to(device)


def written(out, function):
    function(out)
    return out


def row_of(base, function):
    """What a change of one row does to the whole tensor."""
    function(base[1])
    return base


CASES = {
    # results of several kinds
    "a tuple": lambda x: x.sort(dim=1, descending=True),
    "top k": lambda x: x.topk(3, dim=0),
    "a list": lambda x: torch.unbind_copy(x),
    "a number": lambda x: x.sum().item(),
    "a truth value": lambda x: torch.equal(x, x + 0),
    "nothing selected": lambda x: x[x > 100],
    "no element": lambda x: x[:0] @ x.T,
    "reduction of no element": lambda x: x[:0].sum(0),
    "no axis": lambda x: x.mean() * 2,
    # arguments of several kinds
    "a list of tensors": lambda x: torch.cat([x, x[:0], x + 1], dim=0),
    "a number of the CPU": lambda x: x * torch.tensor(2.5),
    "absent indices": lambda x: x[:, [0, 2]] + x[None, :, [1, 3]],
    "a dtype": lambda x: x.to(torch.bfloat16).float().to(torch.int32),
    "a device": lambda x: torch.arange(5, device=x.device) + torch.full((5,), 2, device=x.device),
    "a device taken over": lambda x: torch.zeros_like(x) + x.new_ones(4, 6),
    # memory that is not in order
    "a transpose": lambda x: x.T.contiguous() + x.T,
    "every second column": lambda x: (x[:, ::2] * 2).clone(),
    "an expanded row": lambda x: x[:1].expand(4, 6).clone(),
    "strides that are kept": lambda x: x.T + 1,
    "conjugate": lambda x: torch.view_as_real((torch.complex(x, x + 1).conj() * 1j).resolve_conj()),
    "imaginary part of a conjugate": lambda x: torch.complex(x, x + 1).conj().imag + 0,
    # written arguments
    "in place": lambda x: written(x.clone(), lambda out: out.mul_(2).add_(x)),
    "in place through a view": lambda x: row_of(x.clone(), lambda row: row.fill_(7)),
    "in place through an expanded index": lambda x: row_of(x.clone(), lambda row: row.masked_fill_(row > 0, -1)),
    "index_put_ with absent indices": lambda x: torch.ops.aten.index_put_(
        x.clone(), (None, torch.tensor([1, 3], device=x.device)), x[:, :2].clone()
    ),
    "accumulated index_put_": lambda x: x.clone().index_put_(
        (torch.tensor([0, 0], device=x.device),), x[:2], accumulate=True
    ),
    "scatter_add_": lambda x: torch.zeros_like(x).scatter_add_(0, torch.zeros_like(x, dtype=torch.long), x),
    "out": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "out that is resized": lambda x: torch.mm(x, x.T, out=torch.empty(0, device=x.device)),
    "out that is an input": lambda x: written(x.clone(), lambda out: torch.sub(out, x[0], out=out)),
    "out that is a view": lambda x: row_of(x.clone(), lambda row: torch.exp(row, out=row)),
    "several outs": lambda x: torch.max(
        x, 1, out=(torch.empty(4, device=x.device), torch.empty(4, dtype=torch.long, device=x.device))
    ),
    "foreach": lambda x: torch._foreach_mul([x, x[0]], 3.0),
    "foreach in place": lambda x: written([x.clone(), x[0].clone()], lambda out: torch._foreach_add_(out, 1.0)),
    # products
    "linear": lambda x: F.linear(x, x + 1, x[:, 0]),
    "batched matmul": lambda x: torch.matmul(x.expand(2, 3, 4, 6), x.T),
    "grouped_mm": lambda x: torch._grouped_mm(
        x.bfloat16().repeat(4, 4)[:, :16],
        x.bfloat16().repeat(2, 4, 4)[:, :, :16].contiguous(),
        offs=torch.tensor([4, 16], dtype=torch.int32, device=x.device),
    ),
    "convolution": lambda x: F.conv2d(x.expand(1, 2, 4, 6), x[:2, :2].expand(3, 2, 2, 2), padding=1),
    "rms_norm": lambda x: F.rms_norm(x, (6,), x[0]),
    "layer_norm": lambda x: F.layer_norm(x, (6,), x[0], x[1]),
    "embedding": lambda x: F.embedding(torch.tensor([[1, 3]], device=x.device), x),
    # chance
    "randn": lambda x: torch.randn(3, device=x.device),
    "random in place": lambda x: x.clone().uniform_(-1, 1),
    "dropout": lambda x: F.dropout(x, 0.5),
    "multinomial": lambda x: torch.multinomial(x.abs(), 2),
    "randperm": lambda x: torch.randperm(9, device=x.device),
    # an operator that torch_npu itself moves to the CPU
    "fallback": lambda x: torch.empty(5, device=x.device).cauchy_(),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:CAUTION", "ignore:An output with one or more elements")
def test_it_equals_the_cpu(name):
    results = []
    for device in ("cpu", NPU):
        torch.manual_seed(3)
        results.append(CASES[name](matrix(device)))
    expected, actual = (list(result) if isinstance(result, (tuple, list)) else [result] for result in results)
    assert len(expected) == len(actual)
    for one, other in zip(expected, actual, strict=True):
        if isinstance(one, torch.Tensor):
            assert other.device == NPU
            assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
            assert torch.equal(one, other.cpu())
        else:
            assert one == other


GRADIENTS = {
    "vector times matrix": ((6,), (6, 4), torch.matmul),
    "matrix times vector": ((4, 6), (6,), torch.matmul),
    "matrices": ((4, 6), (6, 3), torch.matmul),
    "a matrix for a batch": ((2, 3, 4, 6), (6, 3), torch.matmul),
    "a batch times a batch": ((2, 4, 6), (2, 6, 3), torch.matmul),
    "linear of a batch": ((2, 4, 6), (3, 6), F.linear),
    "heads repeated": ((2, 3, 4, 6), (1,), lambda x, w: w * x.repeat_interleave(2, dim=1)),
    "an attention written out": ((2, 4, 6), (2, 4, 6), lambda q, k: (q @ k.mT).softmax(-1) @ k),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_its_gradients_equal_those_of_the_cpu(name):
    left, right, function = GRADIENTS[name]
    operands = [numbers(*left), numbers(*right)]
    gradients = []
    for device in ("cpu", NPU):
        inputs = [operand.detach().to(device).requires_grad_() for operand in operands]
        gradients.append([grad.cpu() for grad in torch.autograd.grad(function(*inputs).sin().sum(), inputs)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)


# torch_npu's own use of it.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_module_trains_as_on_the_cpu():
    model = torch.nn.Sequential(
        torch.nn.Conv1d(4, 8, 3),
        torch.nn.BatchNorm1d(8),
        torch.nn.Flatten(),
        torch.nn.GELU(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(64, 3),
    )
    x, y = numbers(5, 4, 10), torch.tensor([0, 2, 1, 1, 0])
    states = []
    for device in ("cpu", NPU):
        trained = copy.deepcopy(model).to(device)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(trained(x.to(device)), y.to(device)).backward()
            optimizer.step()
        states.append(trained.state_dict())
    for name, value in states[0].items():
        assert states[1][name].device == NPU
        assert torch.equal(value, states[1][name].cpu()), name


DEVICES = ("cpu", "npu:0", "npu:1")


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("source", DEVICES)
@pytest.mark.parametrize("order", ["contiguous", "transposed"])
def test_copies_between_devices_keep_the_numbers(source, target, order):
    x = numbers(3, 5) if order == "contiguous" else numbers(5, 3).T
    there = x.to(source).to(target)
    assert there.device == torch.device(target) and torch.equal(there.cpu(), x)
    into = torch.zeros(3, 5, device=target, dtype=torch.float64).copy_(x.to(source))
    assert into.device == torch.device(target) and torch.equal(into.cpu(), x.double())


def test_a_result_is_on_the_device_of_its_inputs():
    x = torch.ones(2, device="npu:1")
    assert {(x + 1).device, torch.cat([x, x]).device, x.sort().values.device} == {torch.device("npu:1")}


def test_views_share_memory():
    x = matrix(NPU)
    view = x.view(2, 12).T[3:5]
    view.zero_()
    assert (x == 0).sum() == 4 and view.data_ptr() != x.data_ptr()


def test_a_generator_gives_its_seed_s_numbers_and_moves_on():
    generator = torch.Generator(NPU)
    first, second = (torch.randn(3, device=NPU, generator=generator.manual_seed(7)) for _ in range(2))
    third = torch.randn(3, device=NPU, generator=generator)
    assert torch.equal(first, second) and not torch.equal(second, third)
    assert torch.equal(first.cpu(), torch.randn(3, generator=torch.Generator().manual_seed(7)))


def test_a_saved_tensor_comes_back():
    buffer = io.BytesIO()
    x = matrix(NPU)
    torch.save({"x": x}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)["x"]
    assert loaded.device == NPU and torch.equal(loaded.cpu(), x.cpu())


def test_packed_sequences_come_back():
    x = numbers(3, 2, 4)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x.to(NPU), torch.tensor([3, 2]))
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed)
    assert lengths.tolist() == [3, 2] and padded.device == NPU
    assert torch.equal(padded.cpu()[:, 0], x[:, 0]) and torch.equal(padded.cpu()[:2, 1], x[:2, 1])
