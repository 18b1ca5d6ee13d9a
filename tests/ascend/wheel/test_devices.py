"""The stand-in is an accelerator like another: devices, streams, events, memory."""

import pytest
import torch


def test_there_are_as_many_devices_as_asked_for():
    assert torch.npu.is_available() and torch.npu.device_count() == 2
    assert torch.accelerator.current_accelerator() == torch.device("npu")


def test_the_current_device_is_where_tensors_go():
    assert torch.ones(1, device="npu").device == torch.device("npu:0")
    with torch.npu.device(1):
        assert torch.ones(1, device="npu").device == torch.device("npu:1")
    assert torch.npu.current_device() == 0


def test_a_stream_waits_for_another():
    one, other = torch.npu.Stream(), torch.npu.Stream()
    with torch.npu.stream(one):
        x = torch.ones(8, device="npu") * 3
    other.wait_stream(one)
    with torch.npu.stream(other):
        y = x + 1
    torch.npu.synchronize()
    assert y.tolist() == [4] * 8 and one.query()


def test_an_event_measures_time():
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    end.record()
    end.synchronize()
    assert end.query() and start.elapsed_time(end) > 0


def test_memory_is_counted():
    before = torch.npu.memory_allocated()
    x = torch.empty(1 << 20, dtype=torch.uint8, device="npu")
    assert torch.npu.memory_allocated() - before >= x.numel()


def test_more_memory_than_there_is_is_refused():
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, dtype=torch.uint8, device="npu")
