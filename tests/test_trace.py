"""Traces: what they hold, and that a replayed round gives what a real one gives."""

import copy
import dataclasses
from importlib import util
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tiny import VOCAB, tiny_head, tiny_target

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.drafters import HeadDrafter, ModelDrafter, NoDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.recorder import record
from slipstream.decode.replay import replay
from slipstream.decode.speculation import Speculation
from slipstream.decode.trace import KEY, Trace, join
from slipstream.decode.tree import TreeShape, make_tree
from slipstream.decode.verify import Spent, Verifier, verify
from slipstream.distill.target import Target

LARGE = TreeShape(5, 5, 64)
SMALLER = [
    TreeShape(1, 5, 6),
    TreeShape(1, 2, 3),
    TreeShape(2, 3, 8),
    TreeShape(3, 1, 4),
    TreeShape(5, 1, 6),
    TreeShape(5, 2, 12),
    TreeShape(4, 4, 16),
    TreeShape(5, 5, 20),
]
GREEDY = [
    Verifier(),
    Verifier("block"),
    Verifier("mars", "ratio", 0.9),
    Verifier("mars", "ratio", 0.6),
    Verifier("mars", "margin", 0.5),
    Verifier("mars", "margin", 2.0, rank=3),
    Verifier("mars", "margin", 2.0, rank=4, per_round=1),
    Verifier("mars", "odds", 0.4),
    Verifier("mars", "odds", 0.1, rank=3),
    Verifier("mars", "margin", 2.0, rank=4, price=1.5),
    Verifier("mars", "margin", 2.0, per_request=0),
    Verifier("lenience", leniency=0.3),
    Verifier("typical"),
    Verifier("top_n", top_n=3, delta=0.2),
    Verifier("released"),
]
PROMPTS, NEW = 64, 50


class Keeper:
    """An observer that keeps everything as it is."""

    def __init__(self):
        self.rounds = []

    def begin(self, rows, verifier, never_relax, config, processors):
        self.spent, self.never_relax = [Spent() for _ in range(rows)], never_relax

    def round(self, places, tree, logits, verdict, seconds):
        for row, place in enumerate(places):
            spent = self.spent[place]
            self.rounds.append((place, row, tree, logits, verdict, seconds, dataclasses.replace(spent)))
            spent.add(verdict.tokens[row])


class Both:
    """Two observers."""

    def __init__(self, *observers):
        self.observers = observers

    def begin(self, *given):
        for observer in self.observers:
            observer.begin(*given)

    def round(self, *given):
        for observer in self.observers:
            observer.round(*given)


@pytest.fixture(scope="module")
def decoder():
    """A target, and a draft model that mostly agrees with it."""
    target = tiny_target(initializer_range=0.45)
    model = copy.deepcopy(target.model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=draw)
    return Decoder(target, ModelDrafter(Target(model, None, name="noisy"), target), Policy(tree=LARGE))


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(3, VOCAB, (PROMPTS, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def recorded(decoder, prompts, tmp_path_factory):
    """A trace of exact rounds, all that was seen while it was recorded, and the output."""
    path, keeper = tmp_path_factory.mktemp("trace") / "trace.arrow", Keeper()
    with record(path, decoder) as recorder:
        out = decoder.generate(prompts, max_new_tokens=NEW, observer=Both(recorder, keeper))
    return Trace.open(path, decoder), keeper, out


def test_a_trace_holds_what_was_decoded(recorded, decoder, prompts):
    trace, keeper, out = recorded
    assert len(trace) == len(keeper.rounds) > 1000
    assert trace.header.tree == LARGE
    assert trace.header.verifier == Verifier()
    texts = [[] for _ in prompts]
    seconds, index = torch.zeros(3), 0
    for rounds in trace.rounds():
        for i in range(len(rounds.counts)):
            place, row, tree, logits, verdict, times, _ = keeper.rounds[index]
            count, n = int(rounds.counts[i]), tree.nodes
            tokens = rounds.emitted[i, :count].tolist()
            assert int(rounds.request[i]) == place
            assert rounds.path[i, :count].tolist() == verdict.paths[row]
            assert tokens == [token.id for token in verdict.tokens[row]]
            assert rounds.tree.tokens[i, :n].tolist() == tree.tokens[row].tolist()
            assert rounds.tree.scores[i, :n].tolist() == tree.scores[row].tolist()
            assert rounds.evidence.logits[i, :n].tolist() == logits[row].topk(4).values.tolist()
            regrets = rounds.evidence.top[i] - rounds.evidence.total[i]
            assert torch.allclose(regrets[:n], torch.log_softmax(logits[row], -1).max(-1).values, atol=1e-5)
            assert rounds.seconds[i].tolist() == pytest.approx(times, rel=1e-6)
            texts[place] += tokens
            index += 1
        seconds += rounds.seconds[rounds.request == 0].sum(0)
    for text, tokens in zip(texts, out.rows, strict=True):
        assert text[: len(tokens)] == [token.id for token in tokens]
    assert float(seconds[1]) > 0 and float(seconds[2]) > 0


@pytest.mark.parametrize("rule", GREEDY, ids=lambda rule: rule.label)
def test_a_replay_gives_what_the_rule_gives_on_all_logits(recorded, rule):
    trace, keeper, _ = recorded
    got = replay(trace, rule)
    assert got.whole.all()
    relaxed = 0
    for i, (_, row, tree, logits, _, _, spent) in enumerate(keeper.rounds):
        if row == 0:
            batch = len(tree.tokens)
            verdict = verify(rule, tree, logits, spent=[spent] * batch, never_relax=keeper.never_relax)
        count = int(got.decision.counts[i])
        assert got.decision.path[i, :count].tolist() == verdict.paths[row]
        assert got.decision.tokens[i, :count].tolist() == [token.id for token in verdict.tokens[row]]
        assert got.decision.regrets[i, :count].tolist() == [token.regret for token in verdict.tokens[row]]
        relaxed += sum(token.tag == "relaxed" for token in verdict.tokens[row])
    assert bool(relaxed) is not (rule.lossless or rule.rule == "released")


@pytest.mark.parametrize("rule", GREEDY, ids=lambda rule: rule.label)
def test_equal_logits_are_decided_as_they_were(decoder, tmp_path, rule):
    """Of whole numbers many are equal, as in bf16."""
    draw = torch.Generator().manual_seed(0)
    rows, nodes, vocab = 400, 12, 8
    parents = torch.stack([torch.randint(0, max(1, i), (rows,), generator=draw) for i in range(nodes)], 1)
    tokens = torch.randint(0, vocab, (rows, nodes), generator=draw)
    tree = make_tree(tokens, parents, -torch.rand(rows, nodes, generator=draw), nodes)
    logits = torch.randint(-2, 4, (rows, nodes, vocab), generator=draw).bfloat16()
    verdict = verify(rule, tree, logits, never_relax=torch.tensor([2]))
    with record(tmp_path / "trace.arrow", decoder) as recorder:
        decoder.generate(torch.arange(3, 9)[None], max_new_tokens=1, observer=recorder)
        recorder.round([0] * rows, tree, logits, verify(Verifier(), tree, logits), (0.1, 0.2, 0.3))
    got = replay(Trace.open(tmp_path / "trace.arrow"), rule).decision
    for i, path in enumerate(verdict.paths, 1):
        assert got.path[i, : int(got.counts[i])].tolist() == path
        assert got.tokens[i, : len(path)].tolist() == [token.id for token in verdict.tokens[i - 1]]


@pytest.mark.parametrize("rule", [Verifier(), Verifier("mars", "margin", 2.0, rank=3)])
@pytest.mark.parametrize("shape", SMALLER, ids=lambda s: f"{s.depth}-{s.top_k}-{s.nodes}")
def test_a_replayed_round_is_a_real_round_of_the_smaller_tree(recorded, decoder, prompts, shape, rule):
    """Each recorded context is decoded for one round by a decoder of the smaller tree."""
    trace, keeper, out = recorded
    got, done, contexts, places = replay(trace, rule, shape), [0] * PROMPTS, [], []
    for i, (place, row, tree, _, verdict, *_) in enumerate(keeper.rounds):
        if tree.levels == LARGE.depth and got.whole[i]:  # not cut short by the end
            contexts.append(torch.cat([prompts[place], out.sequences[place, 6 : 6 + done[place] - 1]]))
            places.append(i)
        done[place] += len(verdict.tokens[row])
    assert len(places) > len(keeper.rounds) // 2
    some = range(0, len(places), 4)
    width = max(len(contexts[j]) for j in some)
    ids = torch.stack([torch.nn.functional.pad(contexts[j], (width - len(contexts[j]), 0)) for j in some])
    mask = torch.stack([torch.arange(width) >= width - len(contexts[j]) for j in some]).long()
    real = Keeper()
    smaller = Decoder(decoder.target, decoder.drafter, Policy(tree=shape))
    smaller.generate(ids, attention_mask=mask, max_new_tokens=shape.depth + 2, verify=rule, observer=real)
    firsts = {
        place: verdict.tokens[row] for place, row, _, _, verdict, *_ in reversed(real.rounds[len(some) : 2 * len(some)])
    }
    for k, j in enumerate(some):
        count = int(got.decision.counts[places[j]])
        assert got.decision.tokens[places[j], :count].tolist() == [token.id for token in firsts[k]]


def test_budgets_of_a_request_replay_under_the_recorded_rule_only(decoder, prompts, tmp_path):
    rule = Verifier("mars", "margin", 2.0, regret=1.5, per_request=4)
    with record(tmp_path / "trace.arrow", decoder) as recorder:
        out = decoder.generate(prompts[:4], max_new_tokens=30, verify=rule, observer=recorder)
    trace = Trace.open(tmp_path / "trace.arrow")
    got, free = (
        replay(trace, rule).decision,
        replay(trace, dataclasses.replace(rule, regret=float("inf"), per_request=float("inf"))),
    )
    (rounds,) = trace.rounds()
    assert out.stats.relaxed > 0
    assert got.counts.tolist() == rounds.counts.tolist()
    assert (got.tags == 1).sum() == (rounds.tags == 1).sum() < (free.decision.tags == 1).sum()
    with pytest.raises(SlipstreamError, match="only the recorded rule"):
        replay(trace, Verifier("mars", "margin", 1.0, regret=1.5))


def test_what_a_trace_cannot_tell_is_refused(decoder, prompts, tmp_path, recorded):
    sampled = tmp_path / "sampled.arrow"
    with record(sampled, decoder) as recorder:
        decoder.generate(prompts[:1], max_new_tokens=4, temperature=1.0, observer=recorder)
    with pytest.raises(SlipstreamError, match="temperature 1 holds single draws"):
        replay(Trace.open(sampled), Verifier())
    trace = recorded[0]
    with pytest.raises(SlipstreamError, match="5 largest logits of a node, the trace holds 4"):
        replay(trace, Verifier("mars", "margin", 1.0, rank=5))
    with pytest.raises(SlipstreamError, match="recorded with depth 5; a tree of depth 6"):
        replay(trace, Verifier(), TreeShape(6, 2, 8))
    with pytest.raises(SlipstreamError, match="only trees given by depth, top_k and nodes"):
        replay(trace, Verifier(), TreeShape.fixed((2, 1)))
    changing = Decoder(decoder.target, decoder.drafter, Policy(speculation=Speculation("heuristic")))
    with record(tmp_path / "changing.arrow", changing) as recorder:
        changing.generate(prompts[:1], max_new_tokens=4, observer=recorder)
    with pytest.raises(SlipstreamError, match="under the fixed schedule"):
        replay(Trace.open(tmp_path / "changing.arrow"), Verifier(), TreeShape(2, 2, 4))


def test_a_trace_of_another_head_or_target_is_refused(recorded, decoder, tmp_path):
    trace, target = recorded[0], decoder.target
    head = HeadDrafter(tiny_head(target, seed=2), target)
    with pytest.raises(SlipstreamError, match=r"recorded with draft .* record it again"):
        Trace.open(trace.path, Decoder(target, head))
    mine = tmp_path / "mine.arrow"
    with record(mine, Decoder(target, head)) as recorder:
        Decoder(target, head).generate(torch.arange(3, 9)[None], max_new_tokens=4, observer=recorder)
    Trace.open(mine, Decoder(target, HeadDrafter(tiny_head(target, seed=2).bfloat16(), target)))  # the same head
    with pytest.raises(SlipstreamError, match="recorded with draft"):
        Trace.open(mine, Decoder(target, HeadDrafter(tiny_head(target, seed=1), target)))
    with pytest.raises(SlipstreamError, match="recorded with target llama, of other weights than qwen2 has"):
        Trace.open(mine, Decoder(tiny_target("qwen2"), head))


def _write_empty(path, metadata):
    """An Arrow file of one column and no rows."""
    schema = pa.schema([("a", pa.int8())], metadata=metadata)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema):
        pass


def test_unreadable_traces_and_mixed_ones_are_named(decoder, prompts, tmp_path):
    path = tmp_path / "trace.arrow"
    with pytest.raises(SlipstreamError, match="does not exist"):
        Trace.open(path)
    with pytest.raises(SlipstreamError, match="nothing was recorded"), record(path, decoder):
        pass
    path.write_text("no arrow")
    with pytest.raises(SlipstreamError, match="is not a trace, or not a whole one"):
        Trace.open(path)
    _write_empty(path, None)
    with pytest.raises(SlipstreamError, match="not a trace of slipstream"):
        Trace.open(path)
    _write_empty(path, {KEY: b'{"version": 1}'})
    with pytest.raises(SlipstreamError, match="is a trace of format 1, this version reads 3"):
        Trace.open(path)
    with record(tmp_path / "exact.arrow", decoder) as recorder:
        decoder.generate(prompts[:1], max_new_tokens=2, observer=recorder)
        with pytest.raises(SlipstreamError, match="it began with rule"):
            decoder.generate(prompts[:1], max_new_tokens=2, verify="mars", observer=recorder)
    with (
        pytest.raises(SlipstreamError, match=r"RepetitionPenalty.* cannot be recorded"),
        record(path, decoder) as recorder,
    ):
        decoder.generate(prompts[:1], max_new_tokens=2, repetition_penalty=1.2, observer=recorder)
    with pytest.raises(SlipstreamError, match="at least the 2 largest"), record(path, decoder, top=1):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"trace.arrow", "exact.arrow"}


def test_a_damaged_trace_is_named(decoder, prompts, tmp_path):
    path = tmp_path / "trace.arrow"
    with record(path, decoder) as recorder:
        decoder.generate(prompts[:2], max_new_tokens=24, observer=recorder)
    whole, told = path.read_bytes(), []
    for place in range(0, len(whole), len(whole) // 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:  # what is damaged within a number is not noticed
            list(Trace.open(path).rounds())
        except SlipstreamError as error:
            told.append(str(error))
    assert told
    assert all(line.startswith(str(path)) for line in told)
    _write_empty(path, {KEY: b'["version"]'})
    with pytest.raises(SlipstreamError, match="is damaged: its header"):
        Trace.open(path)


def test_a_hundred_thousand_rounds_of_24_nodes_fit_in_200_megabytes(decoder, tmp_path):
    """Counted on 4,096 rounds of random numbers, which nothing can compress."""
    rows, nodes, vocab, calls = 1024, 24, 512, 4
    path = tmp_path / "trace.arrow"
    silent = Decoder(decoder.target, NoDrafter())
    with record(path, silent) as recorder:
        silent.generate(torch.arange(3, 9)[None], max_new_tokens=1, observer=recorder)
        parents = (torch.arange(nodes) - 1).clamp(min=0).div(2, rounding_mode="floor")
        for _ in range(calls):
            tokens = torch.randint(0, vocab, (rows, nodes))
            tree = make_tree(tokens, parents.expand(rows, -1), -torch.rand(rows, nodes), 5)
            logits = torch.randn(rows, nodes, vocab)
            recorder.round([0] * rows, tree, logits, verify(Verifier(), tree, logits), (0.1, 0.2, 0.3))
    bytes_per_round = path.stat().st_size / (rows * calls)
    assert len(Trace.open(path)) == rows * calls + 1
    assert bytes_per_round < 200e6 / 100_000


@pytest.mark.slow
def test_a_hundred_thousand_rounds_of_tunings_own_tree_fit_in_200_megabytes(tmp_path):
    """48 nodes over 49,152 tokens; drawn numbers, of which only what bf16 rounded away can be compressed."""
    script = Path(__file__).parents[1] / "benchmarks" / "traces.py"
    spec = util.spec_from_file_location("benchmarks_traces", script)
    traces = util.module_from_spec(spec)
    spec.loader.exec_module(traces)
    requests = traces.record_drawn(tmp_path / "trace.arrow", 512)
    trace = Trace.open(tmp_path / "trace.arrow")
    assert (trace.header.tree.nodes, len(trace)) == (48, 512)
    assert trace.path.stat().st_size / len(trace) < 200e6 / 100_000
    join(tmp_path / "twice.arrow", [(trace.path, range(i * requests, (i + 1) * requests)) for i in range(2)])
    once, twice = (
        replay(Trace.open(tmp_path / f"{name}.arrow"), traces.RELAXED, traces.SMALLER) for name in ("trace", "twice")
    )
    assert (once.decision.tags == 1).any()
    assert twice.decision.counts.tolist() == 2 * once.decision.counts.tolist()
