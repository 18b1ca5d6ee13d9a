"""Train the pair, target first, in well under a minute of one CPU core."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dflash.draft import Draft
from examples.dflash.language import Language
from examples.dflash.model import Target

LENGTH, BATCH, RATE = 32, 32, 3e-3
TARGET_STEPS, DRAFT_STEPS = 200, 400
SENTENCES, PROMPT = 512, 8  # what the draft model learns from: the target's own continuations


def train_target(target: Target, language: Language, steps: int = TARGET_STEPS) -> float:
    """Next tokens of sentences. Returns the last loss."""

    def losses() -> Iterable[Tensor]:
        for _ in range(steps):
            tokens = language.sentences(BATCH, LENGTH)
            logits, _, _ = target(tokens[:, :-1])
            yield F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return descend(target, losses(), steps)


def train_draft(draft: Draft, target: Target, language: Language, steps: int = DRAFT_STEPS) -> float:
    """Blocks anywhere in what the target says by itself, from its features up to there. Returns the last loss.

    The target is frozen. As many sentences as `SENTENCES`, each continued greedily from `PROMPT` tokens.
    """
    target.requires_grad_(False)
    tokens = continued(target, language.sentences(SENTENCES, PROMPT), LENGTH)
    with torch.no_grad():
        _, features, _ = target(tokens)
    block = draft.config.block

    def losses() -> Iterable[Tensor]:
        for _ in range(steps):
            chosen = torch.randint(SENTENCES, (BATCH,), generator=language.draw)
            start = int(torch.randint(PROMPT - 1, LENGTH - block + 1, (), generator=language.draw))
            drafted = tokens[chosen, start : start + block]
            logits = draft(target, drafted[:, :1], draft.read(features[chosen, :start], 0))
            yield F.cross_entropy(logits.flatten(0, 1), drafted[:, 1:].flatten())

    return descend(draft, losses(), steps)


def descend(model: nn.Module, losses: Iterable[Tensor], steps: int) -> float:
    """Adam over `steps` losses, each of the model as it is by then, at a rate that falls to 0."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    last = float("nan")
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        last = loss.item()
    return last


@torch.no_grad()
def continued(target: Target, tokens: Tensor, length: int) -> Tensor:
    """(B, S) tokens -> (B, length), greedily."""
    while tokens.size(1) < length:
        tokens = torch.cat((tokens, target(tokens)[0][:, -1:].argmax(-1)), 1)
    return tokens
