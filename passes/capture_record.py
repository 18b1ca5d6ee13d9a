"""What capture notes while AOTAutograd traces: which sites a Dynamo graph has, and what became of each."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from sgl_npu.passes.site import SiteRecord, new_record


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


def note_outcome(site: int, refusal: str | None) -> None:
    """Note how a site was traced; AOTAutograd traces more than once and the last time counts."""
    record = _current.get().records[site]
    record.refusals = [] if refusal is None else [("capture", refusal)]
