"""From the query to the kernel in words: what each step found, did, or left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sgl_npu.compiler.trace import SiteTrace
from sgl_npu.passes.rotary import NOT_ROTATED
from sgl_npu.passes.site import SiteRecord

DONE, IDLE, REFUSED = "done", "idle", "refused"
_EMPTY_ROWS = {
    "never": "every query has a key",
    "possible": "data or sizes decide whether a query is left without any key",
    "some": "some queries are without any key, whatever the data",
}


@dataclass(frozen=True)
class Station:
    """`state` is done, idle (nothing to do here) or refused."""

    name: str
    state: str
    text: str


def route(site: SiteRecord, trace: SiteTrace | None) -> list[Station]:
    return [station for station in _stations(site, trace or SiteTrace()) if station.text]


def _stations(site: SiteRecord, trace: SiteTrace) -> Iterator[Station]:
    yield Station("found", DONE, f"as {site.spelling}")
    near_miss = [reason for name, reason in site.refusals if name in ("match", "capture")]
    if near_miss and not site.kernel:
        reached = f" The search got as far as {site.deepest}." if site.deepest else ""
        yield Station("matched", REFUSED, "; ".join(near_miss) + "." + reached)
        return
    yield _mask(site, trace)
    if site.empty_rows:
        kept = "; such a query gets the average of all values, as in the model" if site.averages_empty_rows else ""
        text = _EMPTY_ROWS.get(site.empty_rows, site.empty_rows) + (kept if site.empty_rows != "never" else "")
        yield Station("empty rows", DONE, text)
    yield _heads(site, trace)
    if site.guards:
        yield Station("buffers", DONE, f"compared at every call: {', '.join(site.guards)}")
    if site.scheme:
        yield Station("ranks", DONE, f"{site.scheme}: {messages(site, trace)}")
    if (layout := trace.steps.get("layout", "")) != "":
        is_done = layout.startswith(("computed", "already"))
        yield Station("layout", DONE if is_done else IDLE, layout)
    if site.rotary and not site.rotary.endswith(NOT_ROTATED.reason):
        yield Station("rotary", IDLE if site.rotary.startswith("not fused") else DONE, site.rotary)
    if site.sparse:
        yield Station("sparse", DONE, site.sparse)
    yield from (Station(name, REFUSED, reason) for name, reason in site.refusals)
    if site.backward:
        yield Station("backward", DONE, site.backward)
    if trace.kernel_mask:
        yield Station("mask for the kernel", DONE, kernel_mask(trace))
    if site.op:
        yield Station(site.kernel or "kernel", DONE if site.fused else IDLE, site.op)


def _mask(site: SiteRecord, trace: SiteTrace) -> Station:
    given = trace.mask_given
    if not given:
        return Station("mask", DONE, site.mask)
    left = f"; what stays a tensor: {trace.mask_kept}" if trace.mask_kept else "; no tensor is left"
    state = IDLE if given == trace.mask_kept else DONE
    return Station(
        "mask", state, f"{given} was proved to be {site.mask}{left}" if state is DONE else f"{site.mask}{left}"
    )


def kernel_mask(trace: SiteTrace) -> str:
    """What the kernel wants beyond what the proof has left, and how often it is made."""
    count = trace.kernel_mask_sites
    made = f"once for {count} attentions" if count > 1 else "for this attention alone"
    return f"{trace.kernel_mask}: the kernel wants it whole; made {made}, at every call"


def messages(site: SiteRecord, trace: SiteTrace | None) -> str:
    """What one rank sends for one call, in words."""
    if trace is None or trace.schedule is None:
        return site.collectives
    sent = [step.text for step in trace.schedule.steps if step.lane == "send"]
    shifts = [text for text in sent if "shift" in text]
    rest = [text for text in sent if "shift" not in text]
    words = [f"{len(shifts)} shift{'s' if len(shifts) > 1 else ''} of keys and values"] if shifts else []
    return "; ".join([*words, *rest]) or "nothing is sent" + site.collectives.removeprefix("none").replace(":", ";", 1)


def _heads(site: SiteRecord, trace: SiteTrace) -> Station:
    heads, kv_heads = (shape[1] if len(shape) == 4 else "" for shape in (site.query, site.key))
    if heads == kv_heads:
        return Station("heads", IDLE, "")
    taken = trace.steps.get("repeat_kv", "")
    taken = f"; {taken}" if taken.startswith("repeated") else ""
    return Station("heads", DONE, f"{heads} of the query share {kv_heads} of key and value{taken}")
