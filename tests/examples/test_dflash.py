"""examples/dflash: the tokens of the target alone, in fewer passes of it, from one graph for each kind of pass."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sgl_npu
from examples.dflash import __main__ as command
from examples.dflash.compare import GRAPHS, Outcome, Side, compare
from examples.dflash.decode import Alone, Cache, Decoded, Speculative, _compact
from examples.dflash.draft import Draft
from examples.dflash.language import DIALECTS, VOCABULARY, WORDS, Language
from examples.dflash.model import Config, Target
from examples.dflash.train import train_draft, train_target
from sgl_npu.runtime.npu import fused_infer

ROOT = Path(__file__).parents[2]
# Random weights over few tokens: by luck a draft is right now and then.
SMALL = Config(vocab=6, channels=32, inner=32, layers=2, features=(0, 1), draft_layers=1, block=4)
STRICT = {"inner": "eager", "strict": True}
NONE = 2147483647


def pair(config=SMALL):
    torch.manual_seed(1)
    return Target(config), Draft(config)


def prompts(count, vocab=SMALL.vocab):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (1, 2 + number % 11), generator=draw) for number in range(count)]


@pytest.fixture(scope="module", params=["cpu", "npu"])
def outcome(request):
    return compare(*pair(), prompts(12), 24, {"platform": request.param, **STRICT})


def test_drafts_change_no_token(outcome):
    assert outcome.different == []
    assert {1, 2, 3, 4} <= set(outcome.accepted), "blocks of which nothing, a part and all is right"
    eager = Alone(pair()[0])
    assert [x.tokens for x in outcome.alone.decoded] == [eager.generate(x, 24).tokens for x in prompts(12)]


def test_a_graph_for_each_kind_of_pass_serves_every_length(outcome):
    assert outcome.graphs == GRAPHS == {"alone": 2, "speculative": 4}


def test_a_draft_attends_to_everything_and_a_verification_is_causal_from_the_bottom_right(outcome):
    prompt, draft, verification, compaction = outcome.speculative.reports
    assert compaction.sites == []
    for report, module, mask, queries, layers in (
        (prompt, "target.layers", "causal", "s", 2),
        (draft, "draft.layers", "full", "4", 1),
        (verification, "target.layers", "causal (bottom-right)", "4", 2),
    ):
        assert [site.mask for site in report.sites] == [mask] * layers
        for site in report.sites:
            assert site.fused and not site.tensor_mask and module in site.module
            assert site.query[2].startswith(queries) and site.key[2].startswith("s")


def test_explain_says_so_without_running_a_loop():
    target, draft = pair()
    features = torch.randn(1, 6, 2 * SMALL.channels)
    with torch.no_grad():
        past = draft.read(features, 0)
        report = sgl_npu.explain(draft, target, torch.tensor([[1]]), past, options={"platform": "npu"})
    sgl_npu.expect(report, fused="all")
    assert [(site.mask, site.tensor_mask) for site in report.sites] == [("full", "")]


def test_in_bfloat16_they_are_modes_0_and_3_of_the_fused_kernel(monkeypatch):
    calls = []
    compute = fused_infer.compute

    def record(call, tensors, scale):
        calls.append((call, tensors.atten_mask))
        return compute(call, tensors, scale)

    monkeypatch.setattr(fused_infer, "compute", record)
    target, draft = (model.to(torch.bfloat16) for model in pair())
    torch._dynamo.reset()
    way = Speculative(target, draft, lambda fn: torch.compile(fn, backend="sgl_npu", options={"platform": "npu"}))
    way.generate(prompts(6)[-1], 2)
    past, block = prompts(6)[-1].size(1), SMALL.block
    (draft_call, draft_mask), *verification = calls[2:]  # behind the two layers over the prompt
    assert (draft_call.sparse_mode, draft_call.pre_tokens, draft_call.next_tokens) == (0, NONE, NONE)
    assert draft_mask is None
    assert [call.sparse_mode for call, _ in verification] == [3, 3]
    for call, _ in calls[2:]:
        # Past tokens and the block, each once, and no list of lengths that would say otherwise.
        assert (call.q.length, call.k.length) == (block, past + block)
        assert call.actual_seq_lengths is call.actual_seq_lengths_kv is None


def test_every_token_of_a_block_reaches_every_other_and_so_do_the_features():
    target, draft = pair()
    draft.requires_grad_(False)
    features = torch.randn(1, 5, 2 * SMALL.channels, requires_grad=True)
    logits = draft(target, torch.tensor([[1]]), draft.read(features, 0))
    assert logits.shape == (1, SMALL.block - 1, SMALL.vocab)
    for position in range(SMALL.block - 1):
        (gradient,) = torch.autograd.grad(logits[0, position, 0], features, retain_graph=True)
        assert (gradient.abs().amax(-1) > 0).all()


class Oracle(torch.nn.Module):
    """Drafts what is right in `right` places and wrong behind them."""

    def __init__(self, tokens, right, config=SMALL):
        super().__init__()
        self.tokens, self.right, self.config = tokens, right, config

    def read(self, features, start):
        return features[:, :, None]

    def forward(self, target, first, past):
        places = past.size(1) + 1 + torch.arange(self.config.block - 1)
        tokens = self.tokens[places]
        tokens = torch.where(torch.arange(self.config.block - 1) < self.right, tokens, (tokens + 1) % self.config.vocab)
        return torch.nn.functional.one_hot(tokens, self.config.vocab)[None]


@pytest.mark.parametrize("right", range(SMALL.block))
def test_what_is_right_is_taken_and_one_more(right):
    target, _ = pair()
    prompt, count = prompts(4)[-1], 13
    longer = Alone(target).generate(prompt, count + SMALL.block)
    tokens = torch.tensor([*prompt[0].tolist(), *longer.tokens])
    found = Speculative(target, Oracle(tokens, right)).generate(prompt, count)
    assert found.tokens == longer.tokens[:count]
    steps, rest = divmod(count - 1, right + 1)
    assert found.accepted == [right + 1] * steps + [rest] * bool(rest)


def test_a_verification_gives_the_rows_of_a_whole_pass():
    way, tokens = Speculative(*pair()), prompts(9)[-1]
    assert tokens.size(1) == 10
    with torch.no_grad():
        whole = way._read(tokens, None)
        _, rows, _ = way._read(tokens[:, :6], None)
        found = way._read(tokens[:, 6:], rows)
    for x, y in zip(found, whole, strict=True):
        torch.testing.assert_close(x, y[:, 6:])


def test_rejected_rows_do_not_reach_a_cache():
    caches = [Cache(10), Cache(10)]
    for cache, first in zip(caches, (0.0, 100.0), strict=True):
        cache.keep(first + torch.arange(3.0)[None], 3)
        cache.whole()[:, 3:] = -1.0
    for new, stand in (([3.0, 8.0, 9.0], 1), ([4.0, 5.0, 6.0], 3), ([7.0, 8.0, 9.0], 1)):
        rows = torch.tensor([new])
        start = torch.tensor(caches[0].length)
        _compact(*(cache.whole() for cache in caches), rows, rows + 100, start, torch.tensor(stand))
        for cache in caches:
            cache.length += stand
    assert caches[0].whole().tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, -1, -1]]
    assert torch.equal(caches[1].past(), caches[0].past() + 100)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_tokens_as_were_asked_for(count):
    target, draft = pair()
    for prompt in prompts(5):
        found = Speculative(target, draft).generate(prompt, count)
        assert found.tokens == Alone(target).generate(prompt, count).tokens
        assert len(found.tokens) == count


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        (torch.zeros(1, 1, dtype=torch.long), 4, r"prompt of shape \(1, 1\): .* at least 2 tokens"),
        (torch.zeros(2, 5, dtype=torch.long), 4, r"prompt of shape \(2, 5\): should be one sequence"),
        (torch.zeros(1, 5, dtype=torch.long), 0, "count = 0: should be"),
    ],
)
def test_a_bad_call_is_one_error(prompt, count, message):
    target, draft = pair()
    for way in (Alone(target), Speculative(target, draft)):
        with pytest.raises(ValueError, match=message):
            way.generate(prompt, count)


def test_the_sums_of_an_outcome():
    alone, speculative = [Decoded([1] * 6, [1] * 5)] * 2, [Decoded([1] * 6, [4, 1]), Decoded([1] * 6, [5])]
    outcome = Outcome(Side([], 0.0, alone, 4.0), Side([], 0.0, speculative, 2.0))
    assert (outcome.different, outcome.accepted, outcome.speed_up) == ([], [4, 1, 5], 2.0)
    assert outcome.acceptance_length == 10 / 3


def test_a_difference_is_found():
    alone, speculative = ([Decoded([1, 2], [1]), Decoded([1, last], [1])] for last in (2, 3))
    assert Outcome(Side([], 0.0, alone, 4.0), Side([], 0.0, speculative, 2.0)).different == [1]


def test_sentences_follow_their_dialect():
    language = Language()
    for words in language.successors:
        word, seen = 0, []
        for _ in range(WORDS):
            seen.append(word)
            word = int(words[word])
        assert word == 0 and sorted(seen) == list(range(WORDS))
    tokens = language.sentences(200, 20)
    dialect = tokens[:, :1] - WORDS
    assert set(dialect.flatten().tolist()) == set(range(DIALECTS)) and tokens[:, 1:].max() < WORDS
    usual = language.successors[dialect, tokens[:, 1:-1]] == tokens[:, 2:]
    assert 0.85 < usual.float().mean() < 0.95


@pytest.mark.slow
def test_under_inductor():
    models = pair(replace(SMALL, layers=1, features=(0,)))
    outcome = compare(*models, prompts(12), 24, {"platform": "cpu", "inner": "inductor", "strict": True})
    assert outcome.different == []
    assert outcome.graphs == GRAPHS


@pytest.mark.slow
def test_the_command_trains_and_reports_100_prompts():
    line = [sys.executable, "-m", "examples.dflash", "--inner", "eager", "--tokens", "20"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [
        re.search(pattern, done.stdout)
        for pattern in (
            r"graphs +\{'alone': 2, 'speculative': 4\}, compiled in \d+ s",
            r"identical +100 of 100 prompts, token for token",
            r"acceptance +(\d\.\d\d) tokens per pass",
            r"wall clock +.* (\d+\.\d\d) x",
        )
    ]
    assert all(found), done.stdout
    # How fast that is depends on what else the machine does: only that it is said is tested.
    assert float(found[2][1]) > 3, done.stdout


def test_the_command_fails_where_a_token_differs(monkeypatch):
    wrong = Outcome(Side([], 0, [Decoded([1, 2], [1])], 1.0), Side([], 0, [Decoded([1, 3], [1])], 1.0))
    monkeypatch.setattr(command, "compare", lambda *args: wrong)
    with pytest.raises(SystemExit) as exit:
        command.main("cpu", "eager", prompts=1, tokens=2, trained=False)
    assert exit.value.code


@pytest.fixture(scope="module")
def trained():
    language = Language()
    target, draft = pair(Config(vocab=VOCABULARY + 1))
    train_target(target, language)
    train_draft(draft, target, language)
    return target, draft, [language.sentences(1, 4 + number % 13) for number in range(100)]


@pytest.mark.slow
def test_a_trained_pair_says_the_same_in_a_third_of_the_passes_on_an_emulated_npu(trained):
    outcome = compare(*trained, 32, {"platform": "npu", **STRICT})
    assert outcome.different == []
    assert outcome.graphs == GRAPHS
    assert outcome.acceptance_length > 3


class Unread(torch.nn.Module):
    """A draft model that is told nothing of the tokens behind."""

    def __init__(self, draft):
        super().__init__()
        self.draft, self.config = draft, draft.config

    def read(self, features, start):
        return self.draft.read(torch.zeros_like(features), start)

    def forward(self, *args):
        return self.draft(*args)


@pytest.mark.slow
def test_the_features_are_what_a_draft_is_made_from(trained):
    target, draft, texts = trained
    passes, tokens = [], []
    for model in (draft, Unread(draft)):
        found = [Speculative(target, model).generate(prompt, 32) for prompt in texts[:20]]
        tokens.append([x.tokens for x in found])
        passes.append(sum(len(x.accepted) for x in found))
    assert tokens[0] == tokens[1]
    assert passes[1] > 2 * passes[0]
