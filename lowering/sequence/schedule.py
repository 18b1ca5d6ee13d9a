"""What a scheme does in which order, in numbers: what a rank sends and computes, and what each step waits for.

The order is that of the scheme's own code; amounts are counted from the sizes at hand. Nothing is measured.

    send      bytes that one rank sends          compute   operations, two for each multiplication and addition

All ranks run the same steps. They differ in whose keys a step has, and a step whose keys are past an end of the
sequence is computed and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sgl_npu.lowering.kernel import AttentionCall, head_counts, open_band
from sgl_npu.lowering.sequence import ring, ulysses
from sgl_npu.lowering.sequence.block_layout import block_layout
from sgl_npu.lowering.sequence.positions import global_band, has_no_tensors, is_causal
from sgl_npu.runtime.attention import compute_dtype
from sgl_npu.runtime.sequence import SequenceLayout, SequenceMesh
from sgl_npu.runtime.sizes import Size, hint


@dataclass(frozen=True)
class Step:
    """`labels` has a word for every block of ranks, "" for a block that leaves the step out. `after` are the numbers
    of the steps that are done before."""

    lane: str
    text: str
    amount: int
    labels: tuple[str, ...]
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """The steps of one attention on `blocks` x `ulysses` ranks; `rows` and `keys` of the sequence that one rank has."""

    scheme: str
    blocks: int
    ulysses: int
    zigzag: bool
    rows: int
    keys: int
    steps: tuple[Step, ...]

    def total(self, lane: str) -> int:
        return sum(step.amount for step in self.steps if step.lane == lane)


class _Steps:
    """Steps in the order of the code. `heads` query heads of a rank share a batch's scores."""

    def __init__(self, call: AttentionCall, blocks: int, heads: int) -> None:
        self.blocks, self.found = blocks, list[Step]()
        self.per_pair = 2 * hint(call.query.size(0)) * heads * (hint(call.query.size(3)) + hint(call.value.size(3)))

    def send(self, text: str, size: int, after: Sequence[int] = (), label: str = "") -> int:
        return self._add(Step("send", text, size, (label,) * self.blocks, tuple(after)))

    def compute(self, text: str, pairs: int, after: Sequence[int], label: Callable[[int], str]) -> int:
        labels = tuple(label(block) for block in range(self.blocks))
        return self._add(Step("compute", text, pairs * self.per_pair, labels, tuple(after)))

    def _add(self, step: Step) -> int:
        self.found.append(step)
        return len(self.found) - 1


def schedule(
    name: str, call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, mesh: SequenceMesh
) -> Schedule:
    """The steps of a scheme of the table for a call on local tensors."""
    ranks, heads = mesh.ulysses.size, head_counts(call)
    shares = ulysses.head_shares(*heads, ranks) if ranks > 1 else ulysses.HeadShares(*heads, 1)
    steps = _Steps(call, mesh.blocks.size, shares.query)
    start = []
    if ranks > 1:
        sent = _heads_in(call, layout, kv_layout, shares, ranks)
        start = [steps.send("query, key and value: heads for rows", sent, (), "q, k, v")]
    blocks, kv_blocks = block_layout(layout), block_layout(kv_layout)
    key_bytes = _key_bytes(call, hint(kv_blocks.local_length), shares.key)
    if name == "ring":
        last = _ring(steps, call, blocks, kv_blocks, key_bytes, start)
    elif name == "kv_gather":
        gathered = steps.send("all keys and values", key_bytes * (mesh.blocks.size - 1), start, "gather")
        last = _gathered(steps, call, blocks, hint(kv_blocks.length), [gathered])
    else:
        call = open_band(global_band(call, layout, kv_layout))
        pairs = area(hint(layout.length), hint(kv_layout.length), call.lower, call.upper)
        last = steps.compute(
            "attention to the whole sequence, a share of the heads", pairs, start, lambda _: "all rows"
        )
    if ranks > 1:
        steps.send("the result: rows for heads", _heads_out(call, layout, shares, ranks), [last], "result")
    return Schedule(
        name,
        mesh.blocks.size,
        ranks,
        layout.zigzag,
        hint(layout.local_length),
        hint(kv_layout.local_length),
        tuple(steps.found),
    )


def whole_keys_schedule(
    name: str, call: AttentionCall, layout: SequenceLayout, ranks: int, sent: int = 0, keys: int | None = None
) -> Schedule:
    """Local queries to keys that every rank has: those of the call, or `keys` after one gather of `sent` bytes."""
    steps = _Steps(call, ranks, hint(call.query.size(1)))
    start = [steps.send("all keys and values", sent, (), "gather")] if sent else []
    keys = hint(call.key.size(2)) if keys is None else keys
    _gathered(steps, call, layout, keys, start)
    return Schedule(name, ranks, 1, layout.zigzag, hint(layout.local_length), keys, tuple(steps.found))


def area(rows: int, keys: int, lower: Size | None, upper: Size | None) -> int:
    """How many of the pairs of a query i and a key j have lower <= j - i <= upper."""
    below = _pairs(rows, keys, keys - 1 if upper is None else hint(upper))
    return below - (0 if lower is None else _pairs(rows, keys, hint(lower) - 1))


def _pairs(rows: int, keys: int, upper: int) -> int:
    """Pairs with j - i <= upper: row i has min(keys, i + upper + 1) of them, and no fewer than 0."""
    first = max(0, -upper)  # the first row with a key
    full = min(rows, max(first, keys - 1 - upper))  # the first row with all
    if first >= rows:
        return 0
    growing = full - first
    return growing * (first + upper + 1) + growing * (growing - 1) // 2 + (rows - full) * keys


def _heads_in(
    call: AttentionCall, layout: SequenceLayout, kv_layout: SequenceLayout, shares: ulysses.HeadShares, ranks: int
) -> int:
    size, value_size = hint(call.query.size(3)), hint(call.value.size(3))
    rows = hint(layout.local_length) * shares.query * size
    rows += hint(kv_layout.local_length) * shares.key * (size + value_size)
    return hint(call.query.size(0)) * rows * call.query.element_size() * (ranks - 1)


def _heads_out(call: AttentionCall, layout: SequenceLayout, shares: ulysses.HeadShares, ranks: int) -> int:
    per_row = hint(call.value.size(3)) * call.query.element_size()
    per_row += compute_dtype(call.query.dtype).itemsize if call.needs_lse else 0
    return hint(call.query.size(0)) * hint(layout.local_length) * shares.query * per_row * (ranks - 1)


def _key_bytes(call: AttentionCall, rows: int, heads: int) -> int:
    width = hint(call.key.size(3)) + hint(call.value.size(3))
    return hint(call.key.size(0)) * heads * rows * width * call.key.element_size()


def _ring(
    steps: _Steps,
    call: AttentionCall,
    layout: SequenceLayout,
    kv_layout: SequenceLayout,
    key_bytes: int,
    start: list[int],
) -> int:
    call = global_band(call, layout, kv_layout)
    rows, keys, count = hint(layout.local_length), hint(kv_layout.local_length), layout.blocks
    reach = ring.reach(call, layout, kv_layout)
    if reach is not None:
        return _window(steps, call, layout, key_bytes, start, reach)
    own, later = rows * keys, rows * keys
    if layout.zigzag and is_causal(call, layout, kv_layout):
        own, later = area(rows, keys, None, 0), rows // 2 * (keys // 2) * 2
    first = _first_shift(steps, key_bytes, start, count - 1, "")
    last = steps.compute("its own keys", own, start, lambda block: f"k{block}")
    passed = _Passed(first, [last])
    for hop in range(1, count):
        arrived = passed.next(steps, key_bytes, hop < count - 1)
        last = steps.compute(f"hop {hop}", later, [arrived, last], partial(_passed_on, hop, count))
        passed.computed.append(last)
    return last


class _Passed:
    """Shifts of keys: each starts when the one before has arrived and the hop before that is computed."""

    def __init__(self, first: int | None, computed: list[int], side: str = "") -> None:
        self.pending, self.computed, self.side, self.number = first, computed, side, 1

    def next(self, steps: _Steps, size: int, more: bool) -> int:
        """The shift that arrives now; the next one starts."""
        arrived = self.pending
        assert arrived is not None
        if more:
            self.number += 1
            text, label = f"{self.side}shift {self.number} of keys and values", f"shift {self.number}"
            self.pending = steps.send(text, size, [arrived, self.computed[-1]], label)
        return arrived


def _first_shift(steps: _Steps, size: int, start: list[int], count: int, side: str) -> int | None:
    return steps.send(f"{side}shift 1 of keys and values", size, start, "shift 1") if count > 0 else None


def _window(
    steps: _Steps,
    call: AttentionCall,
    layout: SequenceLayout,
    key_bytes: int,
    start: list[int],
    reach: tuple[int, int],
) -> int:
    rows, chunk, blocks = hint(layout.local_length), hint(layout.chunk()), layout.blocks
    sides = [(-1, reach[0], "forward "), (1, reach[1], "backward ")]
    first = [_first_shift(steps, key_bytes, start, count, side) for _, count, side in sides]
    last = steps.compute("its own keys, within the window", area(rows, rows, call.lower, call.upper), start, _own)
    for pending, (sign, count, side) in zip(first, sides, strict=True):
        passed = _Passed(pending, [last], side)
        for far in range(1, count + 1):
            arrived, offset = passed.next(steps, key_bytes, far < count), sign * far
            bounds = (None if x is None else hint(x) - offset * chunk for x in (call.lower, call.upper))

            def label(block: int, offset: int = offset) -> str:
                return f"k{block + offset}" if 0 <= block + offset < blocks else ""

            text = f"keys of {far} {'rank' if far == 1 else 'ranks'} {'before' if sign < 0 else 'after'}"
            last = steps.compute(text, area(rows, rows, *bounds), [arrived, last], label)
            passed.computed.append(last)
    return last


def _passed_on(hop: int, blocks: int, block: int) -> str:
    return f"k{(block - hop) % blocks}"


def _own(block: int) -> str:
    return f"k{block}"


def _gathered(steps: _Steps, call: AttentionCall, layout: SequenceLayout, keys: int, start: list[int]) -> int:
    """Local queries on all keys: the parts of a causal triangle that a rank has, else every pair."""
    rows, chunk = hint(layout.local_length), hint(layout.chunk())
    causal = call.lower is None and call.upper is not None and hint(call.upper) == 0 and has_no_tensors(call)
    if not causal or keys != hint(layout.length):
        return steps.compute("all keys", rows * keys, start, lambda _: "all keys")
    if layout.zigzag and layout.ulysses == 1:
        return _balanced(steps, layout, start)
    last = -1
    for _ in range(rows // chunk):
        own = steps.compute("its own keys, causal", area(chunk, chunk, None, 0), start, _own)
        last = steps.compute("all keys before its own", chunk * keys, [own], lambda _: "all keys")
    return last


def _balanced(steps: _Steps, layout: SequenceLayout, start: list[int]) -> int:
    """The calls of a causal triangle in zigzag: full ones, but for that on the rank's own keys."""
    rows, chunk, others = hint(layout.local_length), hint(layout.chunk()), layout.blocks - 1
    if others:
        text = "its second half on the first halves of the others"
        start = [steps.compute(text, chunk * others * chunk, start, lambda _: "first halves")]
    own = steps.compute("its own keys, causal", area(rows, rows, None, 0), start, _own)
    if not others:
        return own
    return steps.compute("one pair with each other rank", others * chunk * chunk, [own], lambda _: "pairs")
