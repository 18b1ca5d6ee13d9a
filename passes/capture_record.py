"""What capture notes while AOTAutograd traces: which sites a Dynamo graph has, and what became of each."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, fx
from torch._dynamo.exc import TorchDynamoException

from sgl_npu.passes.site import Refusal, SiteRecord, new_record

Result = TypeVar("Result")


@dataclass
class Capture:
    """The sites of one Dynamo graph by id, and the setting their capture depends on."""

    platform: str
    device: str = "cpu"
    strict: bool = False
    records: dict[int, SiteRecord] = field(default_factory=dict)

    def new_record(self, node: fx.Node, spelling: str) -> SiteRecord:
        return new_record(node, spelling, self.records)


_current: contextvars.ContextVar[Capture] = contextvars.ContextVar("sgl_npu_capture")


@contextlib.contextmanager
def capturing(capture: Capture) -> Iterator[None]:
    """Context in which AOTAutograd must trace a graph that `capture_attention` has rewritten."""
    token = _current.set(capture)
    try:
        yield
    finally:
        _current.reset(token)


def current_capture() -> Capture:
    return _current.get()


def other_device(query: Tensor) -> str | None:
    """Why a call is left alone that is on another device than its graph is compiled for."""
    device = current_capture().device
    if query.device.type in ("meta", device):
        return None
    return f"query is on {query.device.type}, in a graph compiled for {device}"


def note_outcome(site: int, refusal: str | None) -> None:
    """Note how a site was traced; AOTAutograd traces more than once and the last time counts."""
    record = _current.get().records[site]
    record.refusals = [] if refusal is None else [("capture", refusal)]


def attempt(site: int, reason: str | None, rewritten: Callable[[], Result | Refusal]) -> Result | None:
    """What replaces a call, and None where there is a reason against it, or it fails: torch's own call is kept then."""
    found: Any = None
    if reason is None:
        try:
            found = rewritten()
        except TorchDynamoException:
            raise
        except Exception as error:
            if current_capture().strict:
                raise
            reason = f"capture failed: {error}"
            warnings.warn(f"sgl_npu: {reason}; torch's own attention is used", stacklevel=3)
    if isinstance(found, Refusal):
        found, reason = None, found.reason
    note_outcome(site, reason)
    return found
