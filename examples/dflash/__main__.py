"""Speculative decoding with a block-diffusion draft model, compiled, against the target alone.

python -m examples.dflash
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Annotated

import torch
import typer

from examples.dflash.compare import GRAPHS, Outcome, compare, timed
from examples.dflash.draft import Draft
from examples.dflash.language import VOCABULARY, Language
from examples.dflash.model import Config, Target
from examples.dflash.train import train_draft, train_target


def main(
    platform: Annotated[str, typer.Option(help="whose kernels: cpu, or npu, emulated on CPU tensors")] = "cpu",
    inner: Annotated[str, typer.Option(help="who compiles the rewritten graphs: auto, inductor or eager")] = "auto",
    prompts: Annotated[int, typer.Option(min=1, help="how many")] = 100,
    tokens: Annotated[int, typer.Option(min=2, help="new tokens after each prompt")] = 32,
    trained: Annotated[bool, typer.Option(help="train the pair first, or leave its random weights")] = True,
) -> None:
    """Exits with 1 if a token differs or more graphs were compiled than there are kinds of passes."""
    torch.manual_seed(0)
    language = Language()
    config = Config(vocab=VOCABULARY + 1)
    target, draft = Target(config), Draft(config)
    if trained:
        for name, train, models in (("target", train_target, (target,)), ("draft", train_draft, (draft, target))):
            loss, seconds = timed(train, *models, language)
            print(f"trained      {name}: loss {loss:.2f} after {seconds:.0f} s")
    texts = [language.sentences(1, 4 + number % 13) for number in range(prompts)]
    outcome = compare(target, draft, texts, tokens, {"platform": platform, "inner": inner})
    show(outcome)
    sys.exit(bool(outcome.different) or outcome.graphs != GRAPHS)


def show(outcome: Outcome) -> None:
    alone, speculative = outcome.alone, outcome.speculative
    for report in speculative.reports:
        print(report)
    print(f"graphs       {outcome.graphs}, compiled in {alone.compile_seconds + speculative.compile_seconds:.0f} s")
    print(
        f"identical    {len(alone.decoded) - len(outcome.different)} of {len(alone.decoded)} prompts, token for token"
    )
    print(f"acceptance   {outcome.acceptance_length:.2f} tokens per pass of the target over a block")
    print(f"             {dict(sorted(Counter(outcome.accepted).items()))} passes by tokens")
    print(
        f"wall clock   {alone.seconds:.2f} s alone, {speculative.seconds:.2f} s with drafts: {outcome.speed_up:.2f} x"
    )


if __name__ == "__main__":
    typer.run(main)
