"""A language small enough to learn in seconds: a Markov chain over words, in dialects.

A sentence begins with the mark of its dialect. In each dialect every word has a favourite successor, and one word in
ten is any word. So what comes next, and what after that, follows from the last word and the mark.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS, DIALECTS = 32, 4
VOCABULARY = WORDS + DIALECTS
SURPRISE = 0.1


class Language:
    def __init__(self, seed: int = 0) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.successors = torch.stack([self._cycle() for _ in range(DIALECTS)])

    def _cycle(self) -> Tensor:
        """(WORDS,) the successor of each word: once through all of them in some order."""
        order = torch.randperm(WORDS, generator=self.draw)
        return torch.empty_like(order).scatter_(0, order, order.roll(-1))

    def sentences(self, count: int, length: int) -> Tensor:
        """(count, length) tokens, the mark of a dialect before words."""
        dialect = torch.randint(DIALECTS, (count,), generator=self.draw)
        found = [WORDS + dialect, torch.randint(WORDS, (count,), generator=self.draw)]
        for _ in range(length - 2):
            surprising = torch.rand(count, generator=self.draw) < SURPRISE
            word = torch.randint(WORDS, (count,), generator=self.draw)
            found.append(torch.where(surprising, word, self.successors[dialect, found[-1]]))
        return torch.stack(found, 1)
