"""`generate()` of transformers with the model compiled and not: the same tokens, and how many graphs it takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sgl_npu
from sgl_npu.integrations.generation import mark_lengths

BATCH, PROMPT, STEPS = 8, 12, 12
# What a user gives to generate() for each cache.
CACHES: dict[str, dict[str, Any]] = {"static": {"cache_implementation": "static"}, "dynamic": {}}


class EagerFails(Exception):
    """The model itself cannot do it."""


@dataclass(frozen=True)
class Outcome:
    """Of one family and cache: how the tokens differ, "" if they do not, and the graphs that were compiled.

    `recompiled` says why Dynamo compiled again, once for each time; `breaks` where it split a graph.
    """

    differ: str
    graphs: int
    attentions: int
    recompiled: list[str] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)


@torch.no_grad()
def compare(model: nn.Module, cache: str, **options: Any) -> Outcome:
    """Greedy decoding of a batch of prompts with padding to the left, twice with the model compiled.

    `options` are those of the backend; op by op and strict where they do not say. Raises EagerFails, and what else the
    compiled model raises.
    """
    inputs = padded_prompts()
    try:
        expected = generate(model, inputs, **CACHES[cache])
    except Exception as error:
        raise EagerFails(f"eager too: {type(error).__name__}: {error}") from error
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen = len(sgl_npu.reports())
    options = {"inner": "eager", "strict": True, **options}
    with recompilations() as reasons, compiled_forward(model, backend="sgl_npu", options=options):
        found = generate(model, inputs, **CACHES[cache])
        again = generate(model, inputs, **CACHES[cache])
    reports = sgl_npu.reports()[seen:]
    return Outcome(
        differ=difference(found, expected) or difference(again, expected),
        graphs=len(reports),
        attentions=sum(len(report.sites) for report in reports),
        recompiled=reasons,
        breaks=[first_line(reason) for reason in torch._dynamo.utils.counters["graph_break"]],
    )


def padded_prompts() -> dict[str, Tensor]:
    """Random prompts of PROMPT tokens; the first has no padding, each of the others one token more."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 100, (BATCH, PROMPT), generator=generator)
    mask = (torch.arange(PROMPT) >= torch.arange(BATCH)[:, None]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def generate(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    """STEPS greedy tokens of every prompt, and their logits."""
    return model.generate(
        **inputs,
        do_sample=False,
        use_cache=True,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def plain_graphs(model: nn.Module, cache: str) -> int:
    """How many graphs torch makes of the same by itself: Dynamo, AOTAutograd, and every op as it is."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with compiled_forward(model, backend="aot_eager"):
        generate(model, padded_prompts(), **CACHES[cache])
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def compiled_forward(model: nn.Module, **chosen: Any) -> Iterator[None]:
    """What a user does, and undone afterwards."""
    model.forward = torch.compile(model.forward, **chosen)
    hook = mark_lengths(model)
    try:
        yield
    finally:
        hook.remove()
        del model.forward


def difference(found: Any, expected: Any) -> str:
    """ "" if the tokens are the same, else where they part, how close the two best were there, and the error."""
    parted = (found.sequences != expected.sequences)[:, -STEPS:]
    if not parted.any():
        return ""
    row = int(parted.any(1).nonzero()[0])
    step = int(parted[row].nonzero()[0])
    best = expected.logits[step][row].topk(2).values
    error = (found.logits[step][row] - expected.logits[step][row]).abs().max()
    return f"row {row}, step {step}: the two best are {best[0] - best[1]:.1e} apart, the error is {error:.1e}"


@contextmanager
def recompilations() -> Iterator[list[str]]:
    """Why Dynamo compiled again, one line for each time."""
    reasons: list[str] = []
    torch._logging.set_logs(recompiles=True)
    log = logging.getLogger("torch._dynamo.guards.__recompiles")
    log.handlers = [_Take(reasons)]  # instead of the one that prints; the next set_logs replaces it
    log.propagate = False
    try:
        yield reasons
    finally:
        torch._logging.set_logs()


class _Take(logging.Handler):
    def __init__(self, reasons: list[str]) -> None:
        super().__init__()
        self.reasons = reasons

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.append(_reason(record.getMessage()))


def _reason(text: str) -> str:
    """The guard that failed against the newest graph, which Dynamo lists first."""
    failures = [line.strip() for line in text.splitlines() if line.strip().startswith("- ")]
    return failures[0].removeprefix("- ").split("  #")[0].strip() if failures else first_line(text)


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
