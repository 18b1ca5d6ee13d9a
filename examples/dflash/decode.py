"""Greedy decoding of one sequence: by the target alone, and with blocks that the draft model proposes.

A pass returns the rows of its own tokens. The caches keep those of tokens that stand: rejected rows never reach them.
Everything that is computed is compiled; the loop only counts and hands on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from examples.dflash.draft import Draft
from examples.dflash.model import Target

Compile = Callable[[Any], Any]
SHORTEST = 2  # a graph for any length is not one for a length of 1


class Cache:
    """Rows (1, `capacity`, ...) of which the first `length` are in use."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.rows: Tensor | None = None

    def whole(self) -> Tensor:
        """All rows, to be written to; their number is a symbol to torch.compile."""
        assert self.rows is not None, "nothing was kept yet"
        torch._dynamo.mark_dynamic(self.rows, 1)
        return self.rows

    def past(self) -> Tensor:
        """The rows in use, their number a symbol to torch.compile: a graph serves every length."""
        assert self.rows is not None, "nothing was kept yet"
        past = self.rows[:, : self.length]
        torch._dynamo.mark_dynamic(past, 1)
        return past

    def keep(self, rows: Tensor, count: int) -> None:
        """Append the first `count` of a pass's rows."""
        if self.rows is None:
            self.rows = rows.new_empty(rows.size(0), self.capacity, *rows.shape[2:])
        self.rows[:, self.length : self.length + count] = rows[:, :count]
        self.length += count


@dataclass
class Decoded:
    """New tokens, and how many of them each pass of the target gave after that over the prompt."""

    tokens: list[int]
    accepted: list[int] = field(default_factory=list)


class Alone(nn.Module):
    """The target, token by token. Two graphs: a prompt of any length, and one token behind any number."""

    def __init__(self, target: Target, compile: Compile = lambda fn: fn) -> None:
        super().__init__()
        self.target = target
        self.step = compile(self._step)

    def _step(self, tokens: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """(1, S) tokens -> the token after each, and their rows."""
        logits, _, rows = self.target(tokens, past)
        return logits.argmax(-1), rows

    @torch.no_grad()
    def generate(self, prompt: Tensor, count: int) -> Decoded:
        """`count` tokens after a prompt (1, S) of at least two tokens."""
        cache = Cache(prompt.size(1) + count)
        following, rows = self.step(_prompt(prompt, count), None)
        cache.keep(rows, prompt.size(1))
        decoded = Decoded([int(following[0, -1])])
        while len(decoded.tokens) < count:
            following, rows = self.step(prompt.new_tensor([decoded.tokens[-1:]]), cache.past())
            cache.keep(rows, 1)
            decoded.tokens.append(int(following[0, 0]))
            decoded.accepted.append(1)
        return decoded


class Speculative(nn.Module):
    """A block from the draft model, then the target over the block.

    Four graphs: a prompt, a draft, a verification, and what it leaves in the caches.
    """

    def __init__(self, target: Target, draft: Draft, compile: Compile = lambda fn: fn) -> None:
        super().__init__()
        self.target, self.draft = target, draft
        self.read, self.propose, self.verify = (compile(fn) for fn in (self._read, self._propose, self._verify))
        self.compact = compile(_compact)

    def _read(self, tokens: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(1, S) tokens -> the target's token after each, and their rows for the target and for the draft model."""
        logits, features, rows = self.target(tokens, past)
        return logits.argmax(-1), rows, self.draft.read(features, 0 if past is None else past.size(1))

    def _verify(self, block: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `_read` says of a block, and how many of its tokens for what follows stand.

        Those are the drafted ones that the target puts in their place, up to the first that is not, and its own behind.
        """
        following, rows, draft_rows = self._read(block, past)
        right = (block[0, 1:] == following[0, :-1]).long().cumprod(0).sum()
        return following, rows, draft_rows, right + 1

    def _propose(self, first: Tensor, past: Tensor) -> Tensor:
        """The token (1, 1) that stands next -> a block (1, block) that begins with it."""
        return torch.cat((first, self.draft(self.target, first, past).argmax(-1)), 1)

    @torch.no_grad()
    def generate(self, prompt: Tensor, count: int) -> Decoded:
        """`count` tokens after a prompt (1, S) of at least two tokens: those of `Alone`."""
        capacity = prompt.size(1) + count + self.draft.config.block  # a block may begin at the last token
        target_cache, draft_cache = Cache(capacity), Cache(capacity)
        following, rows, draft_rows = self.read(_prompt(prompt, count), None)
        target_cache.keep(rows, prompt.size(1))
        draft_cache.keep(draft_rows, prompt.size(1))
        decoded = Decoded([int(following[0, -1])])
        while len(decoded.tokens) < count:
            block = self.propose(prompt.new_tensor([decoded.tokens[-1:]]), draft_cache.past())
            torch._dynamo.mark_static(block)  # or the prompt's length, a symbol, would make this one too
            following, rows, draft_rows, stand = self.verify(block, target_cache.past())
            start = torch.tensor(target_cache.length, device=prompt.device)
            self.compact(target_cache.whole(), draft_cache.whole(), rows, draft_rows, start, stand)
            taken = following[0, : int(stand)].tolist()[: count - len(decoded.tokens)]
            target_cache.length += len(taken)
            draft_cache.length += len(taken)
            decoded.tokens += taken
            decoded.accepted.append(len(taken))
        return decoded


def _compact(
    target_cache: Tensor, draft_cache: Tensor, rows: Tensor, draft_rows: Tensor, start: Tensor, stand: Tensor
) -> None:
    """Write the first `stand` rows of a block into both caches, from `start` on; the others leave them as they are."""
    number = torch.arange(rows.size(1), device=rows.device)
    places, stands = start + number, number < stand
    for cache, new in ((target_cache, rows), (draft_cache, draft_rows)):
        kept = stands.view(1, -1, *[1] * (new.dim() - 2))
        cache.index_copy_(1, places, torch.where(kept, new, cache.index_select(1, places)))


def _prompt(prompt: Tensor, count: int) -> Tensor:
    if prompt.dim() != 2 or prompt.size(0) != 1 or prompt.size(1) < SHORTEST:
        raise ValueError(
            f"prompt of shape {tuple(prompt.shape)}: should be one sequence of at least {SHORTEST} tokens, (1, S)"
        )
    if count < 1:
        raise ValueError(f"count = {count}: should be a number of tokens from 1 on")
    prompt = prompt.clone()  # the mark stays off the caller's tensor
    torch._dynamo.mark_dynamic(prompt, 1)
    return prompt
