"""Graphs of Ascend NPUs (ACL graphs), with host lists that every replay brings up to date.

Written from torch_npu 2.13, `torch_npu/npu/graphs.py` and `torch_npu/npu/_npugraph_handlers/`:

* With `auto_dispatch_capture=True` every operator that has a handler is captured as a task that waits for an event of
  its own and resets it (`_GraphDispatchMode.__torch_dispatch__`). `NPUGraph.update` runs the operator again with new
  values and records the event (`update_capture_record`). So a graph that was captured this way needs an update before
  each replay, or it waits for ever; and an update before the last replay has ended would change that one.
* `update` writes the values it is given for an operator over those it recorded, whatever these were, and says nothing
  of a name that no operator has (`NpuGraphOpHandler.update_args`). So recorded values are compared with the inputs
  here, and each operator is given the lists that it got.
* `torch.npu.graph.__exit__` leaves its dispatch mode and its stream behind when the end of a capture fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sgl_npu.runtime.capture.captured_graph import CapturedGraph, HostList, NotCapturable
from sgl_npu.runtime.capture.side_stream import SideStream


class NpuDriver:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._npu: Any = torch.npu  # type: ignore[attr-defined]
        self._side = SideStream(self._npu, device)
        self.update_keys = _update_keys()

    def capture(self, run: Callable[[], Any], warmup: int, lists: Sequence[HostList]) -> CapturedGraph:
        graph = self._npu.NPUGraph()
        recording = partial(self._npu.graph, graph, auto_dispatch_capture=bool(lists))
        try:
            outputs = self._side.capture(run, warmup, graph, recording)
        except BaseException:
            mode: Any = _get_current_dispatch_mode()
            if mode is graph.graph_dispatch_mode:
                mode.__exit__(None, None, None)
            raise
        free = partial(self._side.free, graph)
        if not lists:
            return CapturedGraph(outputs, graph.replay, free)
        try:
            readers = _readers(graph.graph_dispatch_mode.graph_dispatch_records, lists)
        except NotCapturable:
            free()
            raise
        replayed = self._npu.Event()

        def replay() -> None:
            graph.replay()
            replayed.record()

        def update(values: list[list[int]]) -> None:
            replayed.synchronize()
            graph.update(cpu_update_input=[{key: values[at] for key, at in reader.items()} for reader in readers])

        return CapturedGraph(outputs, replay, free, update)

    def pool_bytes(self) -> int:
        return self._side.pool_bytes()


def _handlers() -> Mapping[str, Any]:
    """torch_npu's own table of operators whose host arguments a replay can change."""
    from torch_npu.npu._npugraph_handlers.npugraph_handler import _NPU_GRAPH_OP_HANDLERS

    return _NPU_GRAPH_OP_HANDLERS


def _update_keys() -> frozenset[str]:
    specs = (spec for handler in _handlers().values() for spec in handler.UPDATE_SPECS.values())
    return frozenset(key for rows in specs for _, _, key in rows)


def _readers(records: list[Any], lists: Sequence[HostList]) -> list[dict[str, int]]:
    """For every operator that was recorded, which list each of its arguments is: by what it got in the capture.

    Raises NotCapturable for an argument that is no list or more than one, and for a list that is no argument.
    """
    readers: list[dict[str, int]] = []
    for record in records:
        readers.append({})
        for key in dict.fromkeys(host_list.key for host_list in lists):
            value = _recorded(record, key)
            if value is None:
                continue
            same = [at for at, (name, values) in enumerate(lists) if name == key and values == list(value)]
            given = " and ".join(str(values) for name, values in lists if name == key)
            if not same:
                raise NotCapturable(
                    f"an operator got {key} = {list(value)}, but the input is {given}, and replays write the input "
                    "there: compute the list before the call and pass it as the input"
                )
            if len(same) > 1:
                raise NotCapturable(
                    f"an operator got {key} = {list(value)}, which {len(same)} inputs are, so it cannot be told which "
                    "of them it reads: let the call that is captured have different ones"
                )
            readers[-1][key] = same[0]
    for at, (key, values) in enumerate(lists):
        if at not in (index for reader in readers for index in reader.values()):
            raise NotCapturable(
                f"no operator of the captured run takes the list {key} = {values}, so replays would keep its values: "
                "pass a tensor, or name the operator's argument in `lengths`"
            )
    return readers


def _recorded(record: Any, key: str) -> Any:
    """What an operator got for that argument when it was captured; None for nothing."""
    if key in record.kwargs:
        return record.kwargs[key]
    name = record.op_cache_entry.__name__
    for place, where, update_key in _handlers()[name].get_update_specs(name):
        if update_key == key and place == "arg":
            return record.args[where] if where < len(record.args) else None
        if update_key == key:
            return record.kwargs.get(where)
    return None
