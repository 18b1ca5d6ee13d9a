"""When a rank of a sequence sends and computes, as SVG: a model of a schedule, drawn at assumed speeds."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from sgl_npu.compiler.html.numbers import bytes_text, count_text, seconds_text, ticks
from sgl_npu.lowering.sequence.schedule import Schedule, Step

# What lengths are drawn by. They are assumptions, not measurements: a device and a link of the order of today's.
OPERATIONS_PER_SECOND = 200e12
BYTES_PER_SECOND = 50e9

_RANKS = 8
_WIDTH, _LEFT, _RIGHT, _LANE, _GAP, _TOP = 920, 62, 10, 17, 9, 22
_LETTER = 6.1  # pixels of a letter of a label


@dataclass(frozen=True)
class Span:
    """A step on the clock, in seconds."""

    step: Step
    start: float
    end: float


def spans(schedule: Schedule) -> list[Span]:
    """The steps on the clock: each starts when what it waits for is done and its lane is free."""
    found: list[Span] = []
    free = {"send": 0.0, "compute": 0.0}
    for step in schedule.steps:
        start = max([free[step.lane], *(found[number].end for number in step.after)])
        speed = BYTES_PER_SECOND if step.lane == "send" else OPERATIONS_PER_SECOND
        free[step.lane] = start + step.amount / speed
        found.append(Span(step, start, free[step.lane]))
    return found


def timeline(schedule: Schedule) -> Markup:
    """Two lanes for each rank, the first eight of them: above what it computes, below what it sends."""
    clock = spans(schedule)
    end = max((span.end for span in clock), default=0.0) or 1.0
    ranks = min(schedule.blocks * schedule.ulysses, _RANKS)
    height = _TOP + ranks * (2 * _LANE + _GAP)
    frame = Markup('<svg class="timeline" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    parts = [frame.format(_WIDTH, height, f"schedule of {schedule.scheme} on {ranks} ranks"), *_axis(end, height)]
    for rank in range(ranks):
        top = _TOP + rank * (2 * _LANE + _GAP)
        parts.append(Markup('<text class="rank" x="0" y="{}">rank {}</text>').format(top + _LANE + 4, rank))
        for lane, y in (("compute", top), ("send", top + _LANE)):
            parts.append(
                Markup('<rect class="lane" x="{}" y="{}" width="{}" height="{}"/>').format(
                    _LEFT, y, _WIDTH - _LEFT - _RIGHT, _LANE - 1
                )
            )
            parts += [_block(span, rank // schedule.ulysses, y, end) for span in clock if span.step.lane == lane]
    return Markup("").join(parts) + Markup("</svg>")


def _x(at: float, end: float) -> float:
    return _LEFT + at / end * (_WIDTH - _LEFT - _RIGHT)


def _axis(end: float, height: int) -> list[Markup]:
    parts = []
    for tick, text in enumerate(ticks(end, 4)):
        x = _x(tick * end / 4, end)
        parts.append(Markup('<path class="tick" d="M{:.1f} {}V{}"/>').format(x, _TOP - 6, height))
        anchor = "end" if tick == 4 else "middle" if tick else "start"
        parts.append(Markup('<text class="tick" x="{:.1f}" y="11" text-anchor="{}">{}</text>').format(x, anchor, text))
    return parts


def _block(span: Span, block: int, y: float, end: float) -> Markup:
    left, right, label = _x(span.start, end), _x(span.end, end), span.step.labels[block]
    width = max(1.0, right - left - 1)
    amount = (
        f"{bytes_text(span.step.amount)} sent" if span.step.lane == "send" else f"{count_text(span.step.amount)}FLOP"
    )
    kind = span.step.lane if label or span.step.lane == "send" else "unused"
    text = f"{span.step.text}: {amount}, {seconds_text(span.end - span.start)}"
    if kind == "unused":
        text += "; past the end of the sequence, left out of the result"
    found = Markup('<g class="{}"><title>{}</title><rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"/>').format(
        kind, text, left, y, width, _LANE - 1
    )
    if label and len(label) * _LETTER + 4 <= width:
        middle = left + width / 2
        found += Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(middle, y + _LANE - 5, label)
    return found + Markup("</g>")


def facts(schedule: Schedule) -> list[str]:
    """What there is to say beside the picture."""
    end = max((span.end for span in spans(schedule)), default=0.0)
    computing = schedule.total("compute") / OPERATIONS_PER_SECOND
    messages = sum(step.lane == "send" for step in schedule.steps)
    sent = f"{bytes_text(schedule.total('send'))} in {messages} message{'s' if messages > 1 else ''}"
    lines = [
        f"{schedule.scheme} on {schedule.blocks} x {schedule.ulysses} ranks (blocks x ulysses); a rank has "
        f"{schedule.rows} rows{', in zigzag' if schedule.zigzag else ''}",
        f"for one call a rank sends {sent if messages else 'nothing'} and computes "
        f"{count_text(schedule.total('compute'))}FLOP",
    ]
    if messages and end:
        exposed = (end - computing) / end
        text = f"{exposed:.0%} of the time drawn is communication that nothing hides"
        lines.append(text if exposed > 0.005 else "all communication is hidden behind what is computed")
    if (ranks := schedule.blocks * schedule.ulysses) > _RANKS:
        lines.append(f"the first {_RANKS} of {ranks} ranks are drawn; the others run the same steps")
    return lines
