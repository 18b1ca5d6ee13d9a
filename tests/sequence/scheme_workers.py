"""Real processes that run the cases of one world size, and what each case came to."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from scheme_cases import BUGS, CASES, Case
from sequence.ranks import start_method

from sgl_npu.lowering.kernel import AttentionCall
from sgl_npu.lowering.sequence import SCHEMES, gathered_attention
from sgl_npu.lowering.sequence.block_layout import block_layout, block_ranks
from sgl_npu.lowering.sequence.kv_gather import kv_gather
from sgl_npu.runtime.attention import reference_attention
from sgl_npu.runtime.sequence import Axis, SequenceLayout, SequenceMesh

PADDING = 50.0
# Seconds for all cases of a world size: ranks that wait for each other may never end.
DEADLINE = 150
ENDED = multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException


def run_world(world: int) -> dict[str, str | None]:
    """The error of each case of that world size, None for those that are right."""
    with tempfile.TemporaryDirectory() as folder:
        method = start_method().get_start_method()
        context = multiprocessing.start_processes(_worker, (world, folder), world, join=False, start_method=method)
        end = time.monotonic() + DEADLINE
        with contextlib.suppress(*ENDED):  # the cases that were not run say so
            while not context.join(timeout=1) and time.monotonic() < end:
                pass
        for process in context.processes:
            process.kill()
        results = [torch.load(path) for path in Path(folder).glob("result*")]
    results += [{}] * (world - len(results))
    merged: dict[str, str | None] = {}
    for name in {name for result in results for name in result}:
        merged[name] = next((result.get(name, "not run") for result in results if result.get(name, "not run")), None)
    return merged


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
    groups = Groups(rank, world)
    results: dict[str, str | None] = {}
    for name, case in {**BUGS, **CASES}.items():
        if case.world == world:
            try:
                run_case(case, groups)
                results[name] = None
            except AssertionError as error:
                results[name] = f"rank {rank}: {error}"
            except Exception:
                results[name] = f"rank {rank}: {traceback.format_exc()}"
                break  # the others wait for this rank until it is gone
    torch.save(results, f"{folder}/{rank}")
    Path(f"{folder}/{rank}").rename(f"{folder}/result{rank}")
    dist.destroy_process_group()


class Groups:
    """Process groups by their ranks, made by all ranks in the same order."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._names: dict[tuple[int, ...], str] = {}

    def _axis(self, every: list[list[int]]) -> Axis:
        for ranks in every:
            if tuple(ranks) not in self._names:
                group = dist.new_group(ranks)
                self._names[tuple(ranks)] = group.group_name if self.rank in ranks else "of others"
        own = next(ranks for ranks in every if self.rank in ranks)
        return Axis(len(own), self._names[tuple(own)])

    def mesh(self, blocks: int, ulysses: int) -> tuple[SequenceMesh, torch.Tensor]:
        size = blocks * ulysses
        starts = range(0, self.world, size)
        whole = self._axis([list(range(start, start + size)) for start in starts])
        columns = [[start + r * ulysses + u for r in range(blocks)] for start in starts for u in range(ulysses)]
        rows = [[start + r * ulysses + u for u in range(ulysses)] for start in starts for r in range(blocks)]
        mesh = SequenceMesh(self._axis(columns), self._axis(rows), whole)
        return mesh, torch.tensor(divmod(self.rank % size, ulysses))


def mask_of(case: Case, rows: int, columns: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(1)
    match case.mask:
        case None:
            return None
        case "key padding":
            kept = torch.arange(columns) < torch.tensor([columns - 5, columns])[:, None]
            return kept[torch.arange(case.batch) % 2][:, None, None]
        case "first keys alone":
            return (torch.arange(columns) < 3)[None, None, None]
        case "documents":
            number = torch.arange(columns) // 11
            return (number[:rows, None] == number[None])[None, None]
        case "blind rows":
            mask = torch.rand(case.batch, 1, rows, columns, generator=generator) > 0.5
            mask[:, :, ::3] = False
            return mask
        case "per head":
            return torch.rand(1, case.heads, rows, columns, generator=generator) > 0.3
        case "square":
            return torch.rand(rows, columns, generator=generator) > 0.3
    raise AssertionError(case.mask)


def bias_of(case: Case, rows: int, columns: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(2)
    match case.bias:
        case None:
            return None
        case "per head":
            return torch.randn(1, case.heads, rows, columns, generator=generator)
        case "per key":
            return torch.randn(case.heads, 1, columns, generator=generator)
    raise AssertionError(case.bias)


def full_call(case: Case) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    rows, columns = sum(case.segments), sum(case.kv_segments or case.segments)

    def tensor(heads: int, length: int, size: int) -> torch.Tensor:
        return torch.randn(case.batch, heads, length, size, generator=generator).to(case.dtype)

    return AttentionCall(
        tensor(case.heads, rows, case.size),
        tensor(case.kv_heads, columns, case.size),
        tensor(case.kv_heads, columns, case.value_size),
        mask_of(case, rows, columns),
        bias_of(case, rows, columns),
        torch.randn(case.heads, generator=generator) if case.sinks else None,
        scale=0.5,
        softcap=case.softcap,
        lower=case.lower,
        upper=case.upper,
        needs_lse=True,
    )


def layouts_of(case: Case) -> tuple[SequenceLayout, SequenceLayout]:
    kv_zigzag = case.zigzag if case.kv_zigzag is None else case.kv_zigzag
    return (
        SequenceLayout(case.segments, *case.degrees, case.zigzag),
        SequenceLayout(case.kv_segments or case.segments, *case.degrees, kv_zigzag),
    )


def local_rows(x: torch.Tensor, layout: SequenceLayout, ranks: torch.Tensor, dense: bool) -> torch.Tensor:
    """One rank's rows, with padding that spoils whatever sees it."""
    rows = x.index_select(2, layout.positions(ranks))
    padding = layout.raw_positions(ranks) >= layout.ends(ranks.device)
    rows = rows.masked_fill(padding[:, None], PADDING)
    return rows if dense else rows.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)


def expected(case: Case, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = [call.query, call.key, call.value]
    tensors = [x.float() for x in tensors]
    options = {"scale": call.scale, "softcap": call.softcap, "lower": call.lower, "upper": call.upper}
    return reference_attention(*tensors, call.mask, call.bias, call.sinks, **options)


def run_case(case: Case, groups: Groups) -> None:
    call = full_call(case)
    mesh, ranks = groups.mesh(*case.degrees)
    layout, kv_layout = layouts_of(case)
    key, value = call.key, call.value
    if not case.replicated_keys:
        key, value = (local_rows(x, kv_layout, ranks, case.dense) for x in (key, value))
    local = replace(call, query=local_rows(call.query, layout, ranks, case.dense), key=key, value=value)
    rank = int(ranks[0]) if case.knows_rank else None
    if case.replicated_keys:
        out, lse = gathered_attention(local, layout, ranks, rank)
    elif case.knows_rank:
        blocks = block_layout(layout), block_layout(kv_layout)
        out, lse = kv_gather(local, *blocks, mesh, block_ranks(ranks), rank)
    else:
        scheme = SCHEMES[case.scheme]
        assert scheme.refuse(local, layout, kv_layout, mesh) is None
        out, lse = scheme.emit(local, layout, kv_layout, mesh, ranks)
    check(case, call, layout, ranks, out, lse)


def check(case: Case, call: AttentionCall, layout: SequenceLayout, ranks, out, lse) -> None:
    wanted = expected(case, call)
    raw = layout.raw_positions(ranks)
    real = raw < layout.ends(ranks.device)
    error = 1e-5 if case.dtype == torch.float32 else 2e-2
    assert out.dtype == call.query.dtype and lse.dtype == torch.float32
    assert out.shape == (*call.query.shape[:2], layout.local_length, call.value.size(3))
    for name, one, other in (("out", out.float(), wanted[0]), ("lse", lse, wanted[1])):
        assert not one.isnan().any(), f"{name} has NaN"
        mine, full = one[:, :, real], other[:, :, raw[real]]
        assert torch.equal(mine == -math.inf, full == -math.inf), f"{name} is -inf elsewhere"
        off = (mine - full).masked_fill(mine == full, 0.0).abs()
        assert off.numel() == 0 or off.max() <= error, f"{name} is off by {off.max()}"
