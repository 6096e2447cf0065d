"""Decoding: token-identical to `generate` when greedy, the target's distribution when sampling, honest when relaxed."""

import math

import pytest
import torch
from scipy.stats import chisquare
from tiny import ARCHITECTURES, VOCAB, OracleDrafter, greedy, tiny_head, tiny_target
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.drafters import HeadDrafter, NoDrafter
from slipstream.decode.engine import Decoder, process, warpers
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeBuilder, TreeShape, make_tree
from slipstream.decode.verify import Spent, Verifier, verify

SHAPES = [TreeShape(1, 2, 3), TreeShape(4, 1, 5), TreeShape(3, 3, 12), TreeShape(5, 4, 20)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("drafter", ["none", "head", "oracle"])
def test_greedy_output_is_that_of_generate(architecture, drafter):
    target = tiny_target(architecture)
    for i, shape in enumerate(SHAPES):
        prompt = torch.randint(3, VOCAB, (1, 3 + 4 * i), generator=torch.Generator().manual_seed(i))
        truth = greedy(target, prompt, 24)
        make = {
            "none": NoDrafter,
            "head": lambda: HeadDrafter(tiny_head(target), target),
            "oracle": lambda: OracleDrafter(truth[0], seed=i),  # noqa: B023 (called in this turn)
        }[drafter]
        out = Decoder(target, make(), Policy(tree=shape)).generate(prompt, max_new_tokens=24)
        assert out.sequences.tolist() == truth.tolist()
        assert sum(out.stats.accept_lengths) == out.stats.new_tokens - 1
        if drafter == "oracle" and out.stats.new_tokens > 8:
            assert out.stats.acceptance_length > 1


@pytest.mark.parametrize("limit", range(10))
def test_the_limit_is_exact_to_the_token(limit):
    target = tiny_target()
    prompt = torch.tensor([[5, 6, 7]])
    truth = greedy(target, prompt, 12)
    decoder = Decoder(target, OracleDrafter(truth[0]), Policy(tree=TreeShape(4, 3, 16)))
    out = decoder.generate(prompt, max_new_tokens=limit)
    assert out.sequences.tolist() == truth[:, : 3 + limit].tolist()


@pytest.mark.parametrize("at", range(1, 9))
def test_a_stop_token_in_the_middle_of_an_accepted_path_ends_the_output(at):
    target = tiny_target()
    prompt = torch.tensor([[5, 6, 7]])
    stop = int(greedy(target, prompt, 12)[0, 3 + at])
    target.model.generation_config.eos_token_id = stop
    truth = greedy(target, prompt, 12)
    out = Decoder(target, OracleDrafter(truth[0]), Policy(tree=TreeShape(5, 2, 12))).generate(prompt, max_new_tokens=12)
    assert out.sequences.tolist() == truth.tolist()
    assert out.sequences[0, -1] == stop


def test_output_ends_at_the_context():
    target = tiny_target(max_position_embeddings=16)
    prompt = torch.arange(3, 13)[None]
    out = Decoder(target, HeadDrafter(tiny_head(target), target)).generate(prompt, max_new_tokens=50)
    assert out.sequences.shape[1] == 16


@pytest.mark.parametrize("shape", [(0,), (1, 0), (2, 3)])
def test_anything_but_one_prompt_is_refused(shape):
    with pytest.raises(SlipstreamError, match="one prompt"):
        Decoder(tiny_target()).generate(torch.ones(shape, dtype=torch.long))


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(SlipstreamError, match="context of llama is 128"):
        Decoder(tiny_target()).generate(torch.ones(1, 128, dtype=torch.long))


def test_logits_that_are_not_finite_end_with_an_error():
    target = tiny_target()
    with torch.no_grad():
        target.model.lm_head.weight[7] = math.nan
    with pytest.raises(SlipstreamError, match="not finite"):
        Decoder(target).generate(torch.tensor([[5, 6]]), max_new_tokens=4)


def test_streamed_tokens_are_the_output():
    target, got = tiny_target(), []
    out = Decoder(target).generate(torch.tensor([[5, 6]]), max_new_tokens=6, on_tokens=got.extend)
    assert [t.id for t in got] == out.sequences[0, 2:].tolist()


def test_processors_see_each_nodes_own_prefix():
    torch.manual_seed(0)
    tree = make_tree(torch.tensor([4, 5, 6, 7]), torch.tensor([0, 0, 0, 1]), torch.zeros(4), levels=2)
    sequence, logits = torch.tensor([9, 8, 4]), torch.randn(4, 12)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    out = process(processors, sequence, tree, logits.clone())
    for node, prefix in enumerate([[9, 8, 4], [9, 8, 4, 5], [9, 8, 4, 6], [9, 8, 4, 5, 7]]):
        torch.testing.assert_close(out[node], processors(torch.tensor([prefix]), logits[node : node + 1])[0])


def _joint(target, prompt, temperature, top_k):
    """Exact distribution of the next two tokens, [V, V]."""
    warp = warpers(temperature, top_k, None)

    def p(ids):
        return torch.softmax(warp(None, target.forward(ids).logits[:, -1].float()), -1)

    first = p(prompt)[0]
    second = p(torch.cat([prompt.expand(len(first), -1), torch.arange(len(first))[:, None]], 1))
    return first[:, None] * second


@pytest.mark.parametrize(
    "rule",
    [
        Verifier(),
        Verifier("mars", "ratio", 1.0),
        Verifier("mars", "margin", 0.0),
        Verifier("mars", "odds", 1.0),
        Verifier("mars", "margin", 5.0, lam=0.0),
        Verifier("mars", "margin", 5.0, regret=0.0, per_round=0),
    ],
    ids=lambda rule: f"{rule.label} lam {rule.lam:g}",
)
def test_sampling_keeps_the_targets_distribution(rule):
    """Tokens 2 and 3 of the output, drawn by a tree round, against enumeration; one verify call per draw."""
    target = tiny_target(vocab_size=12, initializer_range=0.15)
    prompt = torch.tensor([[5, 6, 7]])
    joint = _joint(target, prompt, 0.8, 8)
    tree = make_tree(torch.tensor([7, 3, 4, 8, 5, 3]), torch.tensor([0, 0, 0, 1, 1, 2]), torch.zeros(6), levels=2)
    prefix = prompt[0, :2]
    paths = [tree.tokens[tree.ancestors[i]] for i in range(6)]
    logits = torch.stack([target.forward(torch.cat([prefix, path])[None]).logits[0, -1] for path in paths])
    processed = process(warpers(0.8, 8, None), prompt[0], tree, logits)
    generator = torch.Generator().manual_seed(0)
    counts, draws = torch.zeros(12, 12), 20_000
    for _ in range(draws):
        out = verify(rule, tree, logits, processed=processed, generator=generator).tokens
        if len(out) < 2:  # the round ended after one token: the next one comes from the target itself
            nxt = torch.cat([prompt, torch.tensor([[out[0].id]])], 1)
            row = torch.softmax(warpers(0.8, 8, None)(None, _cached(target, nxt)), -1)
            counts[out[0].id] += row[0]
        else:
            counts[out[0].id, out[1].id] += 1
    expected = joint.flatten() * draws
    kept = expected > 5
    got, want = counts.flatten()[kept], expected[kept]
    assert chisquare(got, want * got.sum() / want.sum()).pvalue > 0.01
    assert counts.flatten()[expected == 0].sum() == 0


_LOGITS = {}


def _cached(target, ids):
    key = tuple(ids[0].tolist())
    if key not in _LOGITS:
        _LOGITS[key] = target.forward(ids).logits[:, -1].float()
    return _LOGITS[key]


def _node(logits, child, rule, spent=None, never=()):
    """The verdict at a root with one child."""
    tree = make_tree(torch.tensor([0, child]), torch.tensor([0, 0]), torch.zeros(2), levels=1)
    z = torch.tensor([logits, [9.0, 0.0, 0.0, 0.0]])
    return verify(rule, tree, z, spent=spent, never_relax=never)


@pytest.mark.parametrize(
    ("logits", "child", "rule", "tag"),
    [
        ([10.0, 9.5, 1.0, 0.0], 0, Verifier("mars"), "exact"),
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("mars"), "relaxed"),  # .95 > .9
        ([10.0, 9.0, 1.0, 0.0], 1, Verifier("mars"), None),  # .9 is not above .9
        ([10.0, 9.5, 9.4, 0.0], 2, Verifier("mars"), None),  # rank 3 never passes
        ([-1.0, -1.05, -3.0, -4.0], 1, Verifier("mars"), None),  # both negative: the ratio means nothing
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("exact"), None),
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("mars", "margin", 0.5), "relaxed"),
        ([-1.0, -1.5, -3.0, -4.0], 1, Verifier("mars", "margin", 0.5), "relaxed"),  # shift-invariant
        ([10.0, 9.4, 1.0, 0.0], 1, Verifier("mars", "margin", 0.5), None),
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("mars", "odds", 0.6), "relaxed"),  # exp(-.5) = .607
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("mars", "odds", 0.61), None),
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("mars", per_round=0), None),
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("mars", regret=0.4), None),
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("mars", regret=0.5), "relaxed"),
    ],
)
def test_who_passes_at_a_node(logits, child, rule, tag):
    verdict = _node(logits, child, rule)
    if tag is None:
        assert [(t.id, t.tag) for t in verdict.tokens] == [(0, "bonus")]
        assert verdict.path == [0]
    else:
        assert (verdict.tokens[0].id, verdict.tokens[0].tag) == (child, tag)
        assert verdict.path == [0, 1]
        gap = logits[0] - logits[1] if tag == "relaxed" else 0.0
        assert verdict.tokens[0].regret == pytest.approx(gap)


def test_the_ratio_depends_on_a_shift_of_the_logits_and_the_margin_does_not():
    shifted = [20.0, 19.0, 1.0, 0.0]
    assert _node([10.0, 9.0, 1.0, 0.0], 1, Verifier("mars")).path == [0]
    assert _node(shifted, 1, Verifier("mars")).path == [0, 1]
    for logits in ([10.0, 9.0, 1.0, 0.0], shifted):
        assert _node(logits, 1, Verifier("mars", "margin", 1.0)).path == [0, 1]


def test_an_exact_child_comes_before_a_relaxed_one():
    tree = make_tree(torch.tensor([3, 1, 0]), torch.tensor([0, 0, 0]), torch.zeros(3), levels=1)
    z = torch.tensor([[10.0, 9.9, 0.0, 0.0]] * 3)
    assert verify(Verifier("mars"), tree, z).path == [0, 2]


def test_special_tokens_and_spent_budgets_are_never_relaxed():
    logits = [10.0, 9.5, 1.0, 0.0]
    assert _node(logits, 1, Verifier("mars"), never=[1]).path == [0]
    assert _node(logits, 1, Verifier("mars"), never=[0]).path == [0]  # nor is a special token overruled
    assert _node(logits, 1, Verifier("mars", per_request=2), spent=Spent(relaxed=2)).path == [0]
    spent = Spent(regret=0.3)
    assert _node(logits, 1, Verifier("mars", regret=0.7), spent=spent).path == [0]
    assert _node(logits, 1, Verifier("mars", regret=0.9), spent=spent).path == [0, 1]
    assert (spent.relaxed, spent.regret) == (1, pytest.approx(0.8))


def test_budget_zero_is_exact_token_for_token():
    target = tiny_target()
    prompt = torch.tensor([[5, 6, 7]])
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target), Policy(tree=TreeShape(3, 3, 12)))
    rule = Verifier("mars", "margin", 50.0, per_request=0)
    assert rule.lossless
    assert (
        decoder.generate(prompt, verify=rule, max_new_tokens=20).sequences.tolist()
        == greedy(target, prompt, 20).tolist()
    )


class RunnerUpDrafter(NoDrafter):
    """Always proposes the target's second choice."""

    def __init__(self, target):
        self.target = target

    def propose(self, sequence, features, shape):
        second = self.target.forward(sequence[None]).logits[0, -1].topk(2).indices[1]
        return make_tree(torch.stack([sequence[-1], second]), torch.tensor([0, 0]), torch.zeros(2), levels=1)


def test_relaxed_tokens_stay_within_the_threshold_and_their_regret_adds_up():
    target = tiny_target(initializer_range=0.1)
    decoder = Decoder(target, RunnerUpDrafter(target))
    out = decoder.generate(torch.tensor([[5, 6, 7]]), verify=Verifier("mars", "margin", 0.5), max_new_tokens=60)
    relaxed = [t for t in out.tokens if t.tag == "relaxed"]
    assert 0 < len(relaxed) == out.stats.relaxed
    assert all(0 <= t.margin <= 0.5 for t in relaxed)
    assert any(t.tag == "bonus" and t.margin > 0.5 for t in out.tokens)
    assert out.stats.regret == pytest.approx(sum(t.regret for t in relaxed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "exakt"}, "did you mean 'exact'"),
        ({"signal": "ration"}, "did you mean 'ratio'"),
        ({"threshold": 1.5}, "ratio must lie in"),
        ({"lam": 2}, "lam must lie in"),
        ({"per_round": -1}, "per_round must not be negative"),
    ],
)
def test_a_rule_out_of_range_is_refused(settings, message):
    with pytest.raises(SlipstreamError, match=message):
        Verifier(**settings)


def test_a_verifier_survives_json_and_names_unknown_keys():
    rule = Verifier("mars", "margin", 0.7, regret=3.0)
    assert Verifier.from_dict(rule.to_dict()) == rule
    with pytest.raises(SlipstreamError, match="did you mean 'threshold'"):
        Verifier.from_dict({"treshold": 1})


def test_the_tree_keeps_the_best_nodes_with_their_ancestors():
    builder = TreeBuilder(TreeShape(2, 2, 4))
    top = builder.add(torch.tensor([10, 11]), torch.tensor([-1, -1]), torch.tensor([-0.1, -3.0]))
    builder.add(torch.tensor([20, 21, 22, 23]), top.repeat_interleave(2), torch.tensor([-0.1, -0.5, -4.0, -5.0]))
    tree = builder.build(torch.tensor(9))
    assert tree.tokens.tolist() == [9, 10, 20, 21]  # 20 is certain given 10, and ties with it
    assert tree.parents.tolist() == [0, 0, 1, 1]
    assert tree.depths.tolist() == [0, 1, 2, 2]
    assert tree.ancestors.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_drafted_scores_are_those_of_running_each_path_through_the_head():
    target = tiny_target()
    head = tiny_head(target)
    sequence = torch.tensor([5, 6, 7, 8, 9])
    features = target.forward(sequence[None, :-1]).features[0]
    drafter = HeadDrafter(head, target)
    with torch.no_grad():
        tree = drafter.propose(sequence, features, TreeShape(3, 3, 13))
        for node in range(1, len(tree)):
            path = tree.tokens[tree.ancestors[node]][1:]
            score = 0.0
            chain = HeadDrafter(head, target)
            hidden = chain._extend(sequence, features)
            for depth, token in enumerate(path):
                logp = torch.log_softmax(head.logits(hidden)[0], -1)
                score += float(logp[(chain.vocabulary == token).nonzero()[0, 0]])
                position = torch.tensor([len(sequence) - 1 + depth])
                seen = torch.ones(1, chain.cache.written + 1, dtype=torch.bool)
                hidden = chain._step(token[None], hidden, position, seen)
            assert float(tree.scores[node]) == pytest.approx(score, abs=1e-3)
