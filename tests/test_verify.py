"""Verification: lossless rules keep the target's distribution, relaxed ones replace rejections, or pay a price."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.drafters import Round, _TreeDrafter
from slipstream.decode.tree import TreeShape, make_tree
from slipstream.decode.verify import Spent, Verifier, decide, verify

V = 6


class TableDrafter(_TreeDrafter):
    """Drafts from a table of logits by the last token; no model, no cache."""

    def __init__(self, table):
        self.table = table
        self.vocabulary, self.vocab_size, self.layers = torch.arange(len(table)), len(table), 0
        self.begin(1)

    def _extend(self, round):
        return self.table[round.roots], torch.zeros(len(round.ids), 0)

    def _step(self, tokens, state, depth, round, seen):
        return self.table[tokens], state


def _draw(rule, shape, draws, *, seed=0, target=None):
    """The first three tokens after token 0 of a Markov target, [draws, 3], by rounds of drafting and verifying."""
    torch.manual_seed(seed)
    draft = torch.randn(V, V)
    generator = torch.Generator().manual_seed(seed + 1)
    drafter, spent = TableDrafter(draft), [Spent() for _ in range(draws)]
    ids, lengths = torch.zeros(draws, 1, dtype=torch.long), [1] * draws
    out, done = torch.full((draws, 16), -1), torch.zeros(draws, dtype=torch.long)
    rows = torch.arange(draws)
    while int(done.min()) < 3:
        tree = drafter.propose(Round(ids, ids.numpy(), lengths, ids, lengths, shape, 1.0, [generator]))
        logits = target[tree.tokens]
        decision = decide(rule, tree, logits, logits, [generator], spent)
        for j in range(decision.tokens.shape[1]):
            going = j < decision.counts
            out[rows[going], done[going]] = decision.tokens[going, j]
            done += going
        ids = out[rows, done - 1][:, None]
        done = done.clamp(max=8)
    return out[:, :3]


def _pvalue(rule, shape, draws):
    torch.manual_seed(5)
    target = torch.randn(V, V) * 1.5
    target[:, 3] = -torch.inf  # a token that a processor forbids
    p = torch.softmax(target, -1)
    joint = p[0][:, None, None] * p[:, :, None] * p[None]
    got = _draw(rule, shape, draws, target=target)
    assert not (got == 3).any()
    counts = torch.bincount((got * torch.tensor([V * V, V, 1])).sum(1), minlength=V**3).double()
    want = joint.flatten().double() * draws
    kept = want > 5
    return chisquare(counts[kept], want[kept] * counts[kept].sum() / want[kept].sum()).pvalue


CHAIN, FIXED, DYNAMIC = TreeShape.chain(3), TreeShape.fixed((3, 2)), TreeShape(3, 3, 8)
DRAWN = TreeShape.fixed((3, 2, 1), sampled=True)
LOSSLESS = [
    (Verifier(), CHAIN),
    (Verifier(), FIXED),
    (Verifier(), DYNAMIC),
    (Verifier(), TreeShape.chain(3, sampled=True)),
    (Verifier(), DRAWN),
    (Verifier(), TreeShape(paths=((0,), (1,), (2,), (0, 0), (1, 0), (1, 1)), sampled=True)),
    (Verifier("block"), TreeShape.chain(3, sampled=True)),
    (Verifier("block"), TreeShape.chain(1, sampled=True)),
    (Verifier("mars", "ratio", 1.0), DYNAMIC),
    (Verifier("mars", "margin", 0.0), DYNAMIC),
    (Verifier("mars", "odds", 1.0), DYNAMIC),
    (Verifier("mars", "margin", 5.0, price=1e9), DYNAMIC),
    (Verifier("mars", "margin", 5.0, lam=0.0), DYNAMIC),
    (Verifier("mars", "margin", 5.0, per_request=0), DYNAMIC),
    (Verifier("lenience", leniency=1.0), FIXED),
    (Verifier("typical", epsilon=1.0, delta=1e9), FIXED),
    (Verifier("top_n", top_n=0), FIXED),
]


@pytest.mark.parametrize(("rule", "shape"), LOSSLESS, ids=lambda x: getattr(x, "label", None) or f"{x.nodes} nodes")
def test_the_joint_distribution_of_three_tokens_is_the_targets(rule, shape):
    assert _pvalue(rule, shape, 200_000) > 0.01


LOSSY = [
    Verifier("mars", "margin", 1.0),
    Verifier("mars", "odds", 0.2, rank=3),
    Verifier("mars", "margin", 2.0, price=1.0),
    Verifier("lenience", leniency=0.5),
    Verifier("typical"),
    Verifier("top_n", delta=0.3),
]


@pytest.mark.parametrize("rule", LOSSY, ids=lambda rule: rule.label)
def test_the_same_test_tells_a_relaxed_rule_from_a_lossless_one(rule):
    assert not rule.lossless
    assert _pvalue(rule, FIXED, 50_000) < 1e-6


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_released_code_is_lossy_even_with_its_relaxation_off(lam):
    rule = Verifier("released", threshold=0.9, lam=lam)
    assert not rule.lossless
    assert _pvalue(rule, FIXED, 3_000) < 1e-6


def test_relaxation_at_a_node_changes_no_more_than_the_rejections_it_replaces():
    """TV(output, p) at a node is at most P(rejected and fired)."""
    torch.manual_seed(0)
    draws = 200_000
    z = torch.tensor([2.0, 1.8, 0.5, -1.0])
    p = torch.softmax(z, -1)
    tree = make_tree(torch.tensor([[0, 1]]), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2), 1)
    many = make_tree(*(x.expand(draws, -1) for x in (tree.tokens, tree.parents, tree.scores)), 1)
    logits = z.expand(draws, 2, 4)
    generator = [torch.Generator().manual_seed(0)]
    for lam in (1.0, 0.25):
        out = decide(Verifier("mars", "margin", 1.0, lam=lam), many, logits, logits, generator, [Spent()] * draws)
        law = torch.bincount(out.tokens[:, 0], minlength=4) / draws
        rejected = 1 - p[1]
        assert float((law - p).abs().sum() / 2) == pytest.approx(float(lam * rejected), abs=0.005)
        assert float((out.tags[:, 0] == 1).float().mean()) == pytest.approx(float(lam * rejected), abs=0.005)


SIBLINGS = torch.tensor([0.8, 1.0, 0.9, 0.8, 0.8, 0.8])  # at the root: two children that any rule lets pass
BELOW = torch.tensor([2.0, 1.5, 0.0, 0.0, 0.9, 0.9])  # at both of them: a child that only lenience lets pass


def _below_siblings(rule, first, second, draws=100_000):
    """Decisions on a root with two children, tokens `first` and `second`, that have a child each: tokens 4 and 5."""
    tokens, parents = torch.tensor([0, first, second, 4, 5]), torch.tensor([0, 0, 0, 1, 2])
    tree = make_tree(tokens.expand(draws, -1), parents.expand(draws, -1), torch.zeros(draws, 5), levels=2)
    logits = torch.stack([SIBLINGS, *[BELOW] * 4]).expand(draws, -1, -1)
    generator = torch.Generator().manual_seed(3)
    return decide(rule, tree, logits, logits, [generator], [Spent()] * draws)


def _law(tokens, law):
    """How well tokens [R] follow a law [V]."""
    counts = torch.bincount(tokens, minlength=V).double()
    return chisquare(counts, law.double() * counts.sum() / law.double().sum()).pvalue


@pytest.mark.parametrize(
    "rule",
    [
        Verifier("mars", "margin", 1.0),
        Verifier("mars", "odds", 0.5),
        Verifier("typical", epsilon=0.3, delta=0.9),
        Verifier("top_n"),
        Verifier("lenience", leniency=0.25),
    ],
    ids=lambda rule: rule.label,
)
def test_which_relaxed_sibling_passes_tells_nothing_of_what_comes_below_it(rule):
    """Each has a child; if the longer path won, the next token would be that child too often."""
    out = _below_siblings(rule, 1, 2)
    first, then = out.tokens[:, 0], out.tokens[:, 1]
    relaxed = out.tags[:, 0] == 1
    taken = relaxed & (first == 1)
    p = torch.softmax(BELOW, -1)
    law = p.clone()
    if rule.rule == "lenience":  # at that node too: token 4 with probability min(1, p / l), the others in proportion
        law = p * (1 - p[4] / rule.leniency) / (1 - p[4])
        law[4] = p[4] / rule.leniency
    else:
        assert first[relaxed].unique().tolist() == [1]  # of the two the likelier
    assert int(taken.sum()) > 20_000
    assert _law(then[taken], law) > 0.01
    at_root = torch.softmax(SIBLINGS, -1)
    change = (torch.bincount(first, minlength=V) / len(first) - at_root).abs().sum() / 2
    assert float(change) <= float(relaxed.float().mean()) + 0.005  # TV is at most P(rejected and fired)


def test_twins_do_not_draw_twice():
    """Two children with one token, which a drafter of one's own may propose: one of them stands for both."""
    for rule in (Verifier(), Verifier("top_n")):
        out = _below_siblings(rule, 1, 1)
        taken = out.tokens[:, 0] == 1
        assert _law(out.tokens[taken, 1], torch.softmax(BELOW, -1)) > 0.01


def test_block_verification_keeps_no_fewer_drafts_than_token_by_token():
    torch.manual_seed(3)
    target, draft = torch.randn(V, V), torch.randn(V, V)
    generator = torch.Generator().manual_seed(0)
    draws = 100_000
    ids = torch.zeros(draws, 1, dtype=torch.long)
    shape = TreeShape.chain(4, sampled=True)
    tree = TableDrafter(draft).propose(Round(ids, ids.numpy(), [1] * draws, ids, [1] * draws, shape, 1.0, [generator]))
    logits = target[tree.tokens]
    mean = {
        rule: decide(Verifier(rule), tree, logits, logits, [generator], [Spent()] * draws).counts.double().mean()
        for rule in ("exact", "block")
    }
    assert mean["block"] > mean["exact"] * 1.01


def _node(logits, child, rule, spent=None, never=()):
    """The verdict at a root with one child."""
    tree = make_tree(torch.tensor([[0, child]]), torch.tensor([[0, 0]]), torch.zeros(1, 2), levels=1)
    z = torch.tensor([[logits, [9.0, 0.0, 0.0, 0.0]]])
    out = verify(rule, tree, z, spent=None if spent is None else [spent], never_relax=torch.tensor(never))
    return out.paths[0], out.tokens[0]


@pytest.mark.parametrize(
    ("logits", "child", "rule", "tag"),
    [
        ([10.0, 9.5, 9.4, 0.0], 2, Verifier("mars", "margin", 0.7, rank=3), "relaxed"),
        ([10.0, 9.5, 9.2, 0.0], 2, Verifier("mars", "margin", 0.7, rank=3), None),  # judged by its own gap
        ([10.0, 9.5, 9.4, 0.0], 3, Verifier("mars", "margin", 99.0, rank=3), None),
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("lenience", leniency=0.6), "relaxed"),  # p2/p1 = .607
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("lenience", leniency=0.62), None),
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("typical"), "relaxed"),
        ([10.0, 2.0, 1.0, 0.0], 1, Verifier("typical"), None),  # p = .0003
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("top_n", delta=0.25), "relaxed"),  # p1 - p2 = .245
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("top_n", delta=0.24), None),
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("top_n", delta=0.5, top_n=1), None),
        ([10.0, 9.5, 1.0, 0.0], 1, Verifier("released"), None),  # at T = 0 it matches the argmax
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
    path, tokens = _node(logits, child, rule)
    if tag is None:
        assert [(t.id, t.tag) for t in tokens] == [(0, "bonus")]
        assert path == [0]
    else:
        assert (tokens[0].id, tokens[0].tag) == (child, tag)
        assert path == [0, 1]
        gap = logits[0] - logits[child] if tag == "relaxed" else 0.0
        assert tokens[0].regret == pytest.approx(gap)


def test_the_ratio_depends_on_a_shift_of_the_logits_and_the_margin_does_not():
    shifted = [20.0, 19.0, 1.0, 0.0]
    assert _node([10.0, 9.0, 1.0, 0.0], 1, Verifier("mars"))[0] == [0]
    assert _node(shifted, 1, Verifier("mars"))[0] == [0, 1]
    for logits in ([10.0, 9.0, 1.0, 0.0], shifted):
        assert _node(logits, 1, Verifier("mars", "margin", 1.0))[0] == [0, 1]


def test_an_exact_child_comes_before_a_relaxed_one():
    tree = make_tree(torch.tensor([[3, 1, 0]]), torch.tensor([[0, 0, 0]]), torch.zeros(1, 3), levels=1)
    z = torch.tensor([[[10.0, 9.9, 0.0, 0.0]] * 3])
    assert verify(Verifier("mars"), tree, z).paths == [[0, 2]]


def test_among_relaxed_children_the_longer_path_wins_then_fewer_relaxed_tokens_then_less_regret():
    rule, spent = Verifier("mars", "margin", 2.0, rank=3), Spent()
    z = torch.tensor([[[0.0, 5.0, 4.5, 4.0]] * 5])  # the target wants token 1 everywhere
    # Under the root 2 (regret .5) and 3 (regret 1); only under 3 there is a grandchild, and it is exact.
    tree = make_tree(torch.tensor([[0, 2, 3, 1]]), torch.tensor([[0, 0, 0, 2]]), torch.zeros(1, 4), levels=2)
    assert verify(rule, tree, z[:, :4], spent=[spent]).paths == [[0, 2, 3]]
    assert (spent.relaxed, spent.regret) == (1, pytest.approx(1.0))
    # A relaxed grandchild under 2 and an exact one under 3: two relaxed tokens against one.
    tree = make_tree(torch.tensor([[0, 2, 3, 3, 1]]), torch.tensor([[0, 0, 0, 1, 2]]), torch.zeros(1, 5), levels=2)
    assert verify(rule, tree, z).paths == [[0, 2, 4]]
    # Both childless: the smaller regret.
    tree = make_tree(torch.tensor([[0, 3, 2]]), torch.tensor([[0, 0, 0]]), torch.zeros(1, 3), levels=1)
    assert verify(rule, tree, z[:, :3]).paths == [[0, 2]]


def _most_valuable(tree, z, rule, spent, never):
    """What a price asks for, node by node: the node of the most valuable path, and what the path costs."""
    order = []
    for node in range(tree.nodes):
        at, relaxed, regret, passes = node, 0, 0.0, True
        while at:
            above = int(tree.parents[0, at])
            token, logits = int(tree.tokens[0, at]), z[0, above].tolist()
            top = max(range(len(logits)), key=logits.__getitem__)
            if token != top:
                gap = logits[top] - logits[token]
                placed = sum(value > logits[token] for value in logits) < rule.rank
                passes &= placed and gap <= rule.theta and token not in never and top not in never
                relaxed, regret = relaxed + 1, regret + gap
            at = above
        within = relaxed <= rule.per_round and (not relaxed or spent.regret + regret <= rule.regret)
        if passes and within:
            order.append((int(tree.depths[0, node]) - rule.price * regret, -relaxed, -regret, -node))
    _, relaxed, regret, node = max(order)
    return -node, -relaxed, -regret


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.25, 1.0, 3.0]), st.sampled_from([math.inf, 1]))
@settings(max_examples=150, deadline=None)
def test_a_price_takes_the_most_valuable_path(seed, price, per_round):
    generator = torch.Generator().manual_seed(seed)
    nodes, size = 12, 5
    parents = torch.cat(
        [torch.zeros(1, dtype=torch.long), *(torch.randint(i, (1,), generator=generator) for i in range(1, nodes))]
    )
    tokens = torch.randint(size, (1, nodes), generator=generator)
    tree = make_tree(tokens, parents[None], torch.zeros(1, nodes), levels=nodes - 1)
    z = (
        torch.randint(8, (1, nodes, size), generator=generator) / 4 + torch.arange(size) / 1024
    )  # no ties of the top two
    rule = Verifier("mars", "margin", 1.0, rank=3, price=price, per_round=per_round, regret=4.0)
    spent = Spent(regret=2.5)
    verdict = verify(rule, tree, z, spent=[spent], never_relax=torch.tensor([4]))
    assert spent.regret <= 4
    if price:
        node, relaxed, regret = _most_valuable(tree, z, rule, Spent(regret=2.5), [4])
        assert verdict.paths[0][-1] == node
        assert (spent.relaxed, spent.regret - 2.5) == (relaxed, pytest.approx(regret))


def test_a_price_passes_over_an_exact_child_for_a_longer_path_that_is_worth_it():
    z = torch.tensor([[[0.0, 5.0, 4.5, 4.0]] * 5])  # the target wants token 1 everywhere
    # Under the root 1 (exact, childless) and 2 (regret .5) with two exact tokens below it.
    tree = make_tree(torch.tensor([[0, 1, 2, 1, 1]]), torch.tensor([[0, 0, 0, 2, 3]]), torch.zeros(1, 5), levels=3)
    paths = {price: verify(Verifier("mars", "margin", 2.0, price=price), tree, z).paths[0] for price in (0, 3.9, 4.1)}
    assert paths == {0: [0, 1], 3.9: [0, 2, 3, 4], 4.1: [0, 1]}  # without a price rejections alone are replaced
    # At a temperature the length of a path is no reason: a token passes if it is worth its own price.
    draw = [torch.Generator().manual_seed(0)]
    for price, kept in ((1.9, [0, 1]), (2.1, [0])):  # half a nat for one token
        alone = make_tree(torch.tensor([[0, 2]]), torch.tensor([[0, 0]]), torch.zeros(1, 2), levels=1)
        cold = z[:, :2] * 100  # the draw is the top token
        assert verify(
            Verifier("mars", "margin", 2.0, price=price), alone, z[:, :2], processed=cold, generators=draw
        ).paths == [kept]


@pytest.mark.parametrize("signal", ["margin", "odds"])
def test_at_a_temperature_a_price_does_not_look_at_what_follows(signal):
    """A token at its very price passes, whether or not the draw below it hits a draft; its regret is of the raw logits."""
    z = torch.tensor([[[0.0, 5.0, 4.5, 4.0]] * 3])
    tree = make_tree(torch.tensor([[0, 2, 1]]), torch.tensor([[0, 0, 1]]), torch.zeros(1, 3), levels=2)
    theta = {"margin": 2.0, "odds": 0.1}[signal]
    for price, passes in ((2.0, True), (2.1, False)):
        for below in (0, 1):  # the draw after the relaxed token: no draft, or the one that stands there
            cold = torch.full((1, 3, 4), -1e9)
            cold[0, :, 2] = 0.0  # what odds look at: 2 is as likely as the draw of the root
            cold[0, 0, 1] = 1e-3
            cold[0, 1], cold[0, 1, below] = -1e9, 0.0
            rule, tags = Verifier("mars", signal, theta, price=price), set()
            for seed in range(8):
                generator = torch.Generator().manual_seed(seed)
                tags.add(verify(rule, tree, z, processed=cold, generators=[generator]).tokens[0][0].tag)
            assert tags == {"exact", "relaxed" if passes else "bonus"}  # exact where the draw at the root was 2 itself


def test_what_is_forbidden_is_not_relaxed_to_and_spoils_nothing():
    z = torch.tensor([[[0.0, 5.0, 4.5, -math.inf]] * 3])
    tree = make_tree(torch.tensor([[0, 1, 3]]), torch.tensor([[0, 0, 0]]), torch.zeros(1, 3), levels=1)
    assert verify(Verifier("lenience", leniency=0.0), tree, z).paths == [[0, 1]]
    lone = make_tree(torch.tensor([[0, 3, 1]]), torch.tensor([[0, 0, 1]]), torch.zeros(1, 3), levels=2)
    assert verify(Verifier("mars", "odds", 0.0, rank=4), lone, z).paths == [[0]]


def test_special_tokens_and_spent_budgets_are_never_relaxed():
    logits = [10.0, 9.5, 1.0, 0.0]
    assert _node(logits, 1, Verifier("mars"), never=[1])[0] == [0]
    assert _node(logits, 1, Verifier("mars"), never=[0])[0] == [0]  # nor is a special token overruled
    assert _node(logits, 1, Verifier("mars", per_request=2), spent=Spent(relaxed=2))[0] == [0]
    spent = Spent(regret=0.3)
    assert _node(logits, 1, Verifier("mars", regret=0.7), spent=spent)[0] == [0]
    assert _node(logits, 1, Verifier("mars", regret=0.9), spent=spent)[0] == [0, 1]
    assert (spent.relaxed, spent.regret) == (1, pytest.approx(0.8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "exakt"}, "did you mean 'exact'"),
        ({"signal": "ration"}, "did you mean 'ratio'"),
        ({"threshold": 1.5}, "ratio must lie in"),
        ({"lam": 2}, "lam must lie in"),
        ({"per_round": -1}, "per_round must not be negative"),
        ({"rank": 3}, "rank must be 2, or more with the margin or odds signal"),
        ({"leniency": 1.5}, "leniency must lie in"),
        ({"top_n": -1}, "top_n must not be negative"),
        ({"rule": "mars", "price": -1}, "price must be finite, not negative"),
        ({"rule": "mars", "price": math.inf}, "price must be finite"),
        ({"rule": "typical", "price": 1}, "go with rule mars"),
    ],
)
def test_a_rule_out_of_range_is_refused(settings, message):
    with pytest.raises(SlipstreamError, match=message):
        Verifier(**settings)


def test_a_verifier_survives_json_and_names_unknown_keys():
    for rule in (Verifier("mars", "margin", 0.7, regret=3.0), Verifier("mars", "margin", 0.7, price=2.0)):
        assert Verifier.from_dict(rule.to_dict()) == rule
    assert "price" not in Verifier("mars").to_dict()  # what was written before there were prices stays what it is
    with pytest.raises(SlipstreamError, match="did you mean 'threshold'"):
        Verifier.from_dict({"treshold": 1})


@pytest.mark.parametrize(
    ("rule", "shape", "message"),
    [
        (Verifier("mars"), DRAWN, "drawn ones need exact or block"),
        (Verifier("block"), DRAWN, "needs a drawn chain"),
        (Verifier("block"), CHAIN, "needs a drawn chain"),
    ],
)
def test_a_rule_that_cannot_judge_such_drafts_says_so(rule, shape, message):
    with pytest.raises(SlipstreamError, match=message):
        _draw(rule, shape, 2, target=torch.randn(V, V))


def test_verifying_64_nodes_of_a_large_vocabulary_adds_little_to_the_argmax_pass():
    """Counted in bytes touched, not timed: beyond the pass over [N, V], greedy verification allocates no [N, V] tensor."""
    nodes, vocab = 64, 128_000
    tree = make_tree(
        torch.randint(0, vocab, (1, nodes)), (torch.arange(nodes) // 2)[None], torch.zeros(1, nodes), levels=7
    )
    logits = torch.randn(1, nodes, vocab)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        verify(Verifier(), tree, logits)
    assert max(event.cpu_memory_usage for event in record.events()) < logits.numel()
