"""How each rule chooses among the drafted tokens of a round; everything stays on the device.

At a node the target decides on a token y: its argmax, or at T > 0 a draw from its distribution p. A child that is y is
accepted. For deterministic children this *is* the lossless tree rule (EAGLE accepts child x with probability p(x) and
renormalises otherwise): the accepted child has law p(x), and without one the correction has the law of p outside the
children. A relaxed rule only ever replaces a rejection: where no child is y, it may admit another one. So every rule for
such trees is a choice of admitted nodes, made for all nodes at once.

At T = 0 the longest path of admitted nodes is kept, among equals the one with fewer relaxed tokens, then with less regret.
Under a price of regret it is the most valuable one: its tokens, less the price of what they cost in nats; there a child may
also be passed over, though it is y, for a sibling with more below it. Of all choices of one path in each of some rounds, those
by one price get most tokens out of the regret they spend: a price is the Lagrange multiplier of a budget on mean regret.

At T > 0 a path's length tells what was drawn below its nodes, and whoever chose by it would prefer nodes whose draws hit a
draft: the token after them would have another law than p, though nothing was relaxed there. So where the rule would let
several children pass, it admits the one of the largest logit, whatever stands below them, and one path is left. At a node
the output then differs from p by no more than the probability that a rejection was replaced there.

Drafts that were drawn from the draft's own distribution q are judged with q (speculative sampling, its recursion over
siblings drawn without replacement, block verification), and only losslessly.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from slipstream.decode.draws import draw, uniforms
from slipstream.decode.signals import fires
from slipstream.decode.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.evidence import Evidence
    from slipstream.decode.tree import Tree
    from slipstream.decode.verify import Spent, Verifier


class Choice(NamedTuple):
    """What a rule settles: the last accepted node [B], the token after it [B], and which nodes passed relaxed [B, N]."""

    leaf: Tensor
    bonus: Tensor
    relaxed: Tensor


def admit(
    verifier: Verifier,
    tree: Tree,
    evidence: Evidence,
    processed: Evidence | None,
    decided: Tensor,
    generators: Sequence[torch.Generator],
    spent: Sequence[Spent],
    never_relax: Tensor | None,
) -> Choice:
    """The path of admitted nodes: children that are y (`decided`, [B, N]), or that the rule lets pass instead.

    `processed` is the evidence that y was drawn from; None where decoding is greedy, and the longest path wins.
    """
    above = decided.gather(1, tree.parents)  # y at each node's parent
    exact = tree.tokens == above
    exact[:, 0] = True
    relaxed = torch.zeros_like(exact)
    if not verifier.lossless and verifier.rule != "released":  # which at T = 0 matches the argmax
        relaxed = ~exact & _passes(verifier, tree, evidence, processed, generators)
        if processed is not None or not verifier.price:
            hits = torch.zeros_like(tree.parents).scatter_add(1, tree.parents[:, 1:], exact[:, 1:].long())
            relaxed &= (hits == 0).gather(1, tree.parents)
        if never_relax is not None and len(never_relax):
            relaxed &= ~_among(tree.tokens, never_relax) & ~_among(above, never_relax)
        # Rules look at raw logits, where a forbidden token may be the runner-up; greedily it would cost infinitely much.
        relaxed &= (evidence if processed is None else processed).own > -math.inf
        relaxed[:, 0] = False
    if processed is not None:
        alone = _one_each(tree.parents, exact | relaxed, evidence.own)
        exact, relaxed = exact & alone, relaxed & alone
    lines = tree.ancestors
    reached = ~(lines & ~(exact | relaxed)[:, None]).any(-1)
    depths = tree.depths.double()
    if not verifier.lossless:
        regrets = (evidence.top.gather(1, tree.parents) - evidence.own).double().masked_fill(~relaxed, 0.0)
        count, cost = (lines.double() @ torch.stack([relaxed.double(), regrets], -1)).unbind(-1)  # on the way there
        used = to_device([[s.relaxed, s.regret] for s in spent], lines.device, torch.float64)
        reached &= (count <= verifier.per_round) & (count + used[:, :1] <= verifier.per_request)
        reached &= (cost + used[:, 1:] <= verifier.regret) | (count == 0)
        worth = depths - verifier.price * cost if processed is None else depths
        for value in (worth, -count, -cost):
            value = value.masked_fill(~reached, -math.inf)
            reached = reached & (value == value.max(1, keepdim=True).values)
    else:
        depths = depths.masked_fill(~reached, -1.0)
        reached = reached & (depths == depths.max(1, keepdim=True).values)
    order = torch.arange(tree.nodes, 0, -1, device=reached.device)
    leaf = (reached * order).max(1).indices  # the first of those left
    return Choice(leaf, decided.gather(1, leaf[:, None])[:, 0], relaxed)


def _one_each(parents: Tensor, admitted: Tensor, value: Tensor) -> Tensor:
    """Of each parent's admitted children the one of the largest value, the first of equal ones; and the root, [B, N].

    Twins, which have one token, are such equals: each has a draw of its own below it, of which one must count.
    """
    mine, other = value[:, :, None], value[:, None]
    ahead = (other > mine) | (other == mine).tril(-1)  # [B, N, N]: whom each node stands behind
    rivals = (parents[:, :, None] == parents[:, None]) & admitted[:, None]
    rivals[:, :, 0] = False  # the root is nobody's sibling
    kept = admitted & ~(ahead & rivals).any(-1)
    kept[:, 0] = True
    return kept


def _among(tokens: Tensor, some: Tensor) -> Tensor:
    """Which tokens [B, N] are among some [S]; `torch.isin` waits for the card where there are many."""
    return (tokens[..., None] == some).any(-1)


def _passes(
    verifier: Verifier,
    tree: Tree,
    evidence: Evidence,
    processed: Evidence | None,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Nodes that the relaxed rule would accept in place of y, [B, N]; where y is a child is not looked at."""
    coins = None if processed is None else uniforms(generators, tree.tokens.shape, tree.tokens.device)
    if verifier.rule == "mars":
        price = 0.0 if processed is None else verifier.price
        passes = fires(verifier.signal, verifier.theta, verifier.rank, tree, evidence, processed, price)
        if coins is not None and verifier.lam < 1:
            passes &= coins.gather(1, tree.parents) < verifier.lam  # one coin per parent
        return passes
    z = evidence if processed is None else processed
    total = z.total.gather(1, tree.parents)
    mine, best = torch.exp(z.own - total), torch.exp(z.top.gather(1, tree.parents) - total)
    if verifier.rule == "lenience":
        if coins is None:
            return mine >= verifier.leniency * best
        # y was not among the children. What a child's own draw has left undone of min(1, p / l) is made up for here.
        owed = (mine / max(verifier.leniency, 1e-9)).clamp(max=1.0) - mine
        return coins < owed / (1 - mine).clamp(min=1e-9)
    if verifier.rule == "typical":
        entropy = z.entropy.gather(1, tree.parents)
        return mine > (verifier.delta * torch.exp(-entropy)).clamp(max=verifier.epsilon)
    if not verifier.top_n:
        return torch.zeros_like(mine, dtype=torch.bool)
    last = z.best(verifier.top_n)[..., -1].gather(1, tree.parents)
    return (z.own >= last) & (mine >= best - verifier.delta)


def speculative_sampling(tree: Tree, p: Tensor, q: Tensor, generators: Sequence[torch.Generator]) -> Choice:
    """Children drawn without replacement from q: accept with min(1, p/q), else p <- (p - q)+ and q without the child.

    A chain is the case of one child (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318); the recursion
    over siblings is SpecInfer's and RSD's (arXiv 2305.09781, 2402.14160).
    """
    children, rows = tree.children(), torch.arange(len(p), device=p.device)
    leaf, going = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    left = p[:, 0]  # what the next token is still to be drawn from
    # Drawn for all levels: what a row's generator gives afterwards does not depend on how far other rows come.
    coins = uniforms(generators, (len(p), tree.levels, children.shape[2]), p.device)
    for level in range(tree.levels):
        here, mine = q[rows, leaf], children[rows, leaf]
        passed = torch.zeros_like(going)
        place = leaf
        for rank in range(mine.shape[1]):
            child = mine[:, rank]
            trying = going & ~passed & (child >= 0)
            token = tree.tokens[rows, child.clamp(min=0)]
            chance = left[rows, token] / here[rows, token].clamp(min=1e-30)
            accept = trying & (coins[:, level, rank] <= chance)
            refuse = (trying & ~accept)[:, None]
            left = torch.where(refuse, _normalised((left - here).clamp(min=0), left), left)
            here = torch.where(refuse, _normalised(here.scatter(1, token[:, None], 0.0), here), here)
            place, passed = torch.where(accept, child, place), passed | accept
        leaf, going = place, going & passed
        left = torch.where(passed[:, None], p[rows, leaf], left)
        if p.is_cpu and not bool(going.any()):  # a card would be waited for
            break
    return Choice(leaf, draw(left[:, None], generators)[:, 0], torch.zeros_like(tree.tokens, dtype=torch.bool))


def block(tree: Tree, p: Tensor, q: Tensor, generators: Sequence[torch.Generator]) -> Choice:
    """Block verification of a drawn chain (arXiv 2403.10444, algorithm 2): the whole prefix is judged at once."""
    rows = torch.arange(len(p), device=p.device)
    weight, chosen = torch.ones_like(p[:, 0, 0]), torch.ones_like(p[:, 0, 0])
    leaf, last = torch.zeros_like(rows), tree.nodes - 1
    coins = uniforms(generators, (len(p), tree.nodes), p.device)
    for node in range(1, tree.nodes):
        token = tree.tokens[:, node]
        weight = (weight * p[rows, node - 1, token] / q[rows, node - 1, token].clamp(min=1e-30)).clamp(max=1.0)
        chance = weight
        if node < last:
            over = (weight[:, None] * p[:, node] - q[:, node]).clamp(min=0).sum(-1)
            chance = over / (over + 1 - weight).clamp(min=1e-30)
        accept = coins[:, node] <= chance
        leaf, chosen = torch.where(accept, node, leaf), torch.where(accept, weight, chosen)
    residual = (chosen[:, None] * p[rows, leaf] - q[rows, leaf]).clamp(min=0)
    whole = (leaf == last)[:, None]
    rest = torch.where(whole, p[rows, leaf], _normalised(residual, p[rows, leaf]))
    return Choice(leaf, draw(rest[:, None], generators)[:, 0], torch.zeros_like(tree.tokens, dtype=torch.bool))


def released(
    verifier: Verifier, tree: Tree, processed: Tensor, p: Tensor, generators: Sequence[torch.Generator]
) -> Choice:
    """What the code published with MARS does at T > 0, for ablations; row by row, node by node.

    Where z2/z1 of the processed logits is above the threshold (no guard for their signs), the first child among the two
    likeliest passes, or else the token is drawn from the full p. Elsewhere child x passes with min(1, p(x)/q(x)), though
    children are the draft's likeliest and not drawn, and p(x) <- 0 on refusal. The ratio p/q makes it lossy on its own.
    """
    children = tree.children().tolist()
    leaves, bonus, relaxed = [], [], torch.zeros_like(tree.tokens, dtype=torch.bool)
    for row in range(len(p)):
        node, generator = 0, generators[row % len(generators)]
        while True:
            drafts = [c for c in children[row][node] if c >= 0 and math.isfinite(tree.scores[row, c])]  # no copies
            left, below, found = p[row, node], drafts, None
            (first, second), two = processed[row, node].float().topk(2)
            if verifier.lam and float(second / first) > verifier.theta:
                found = next((c for c in below if tree.tokens[row, c] in two), None)
                if found is not None:
                    relaxed[row, found] = True
            else:
                for child in below:
                    token = tree.tokens[row, child]
                    draft = (tree.scores[row, child] - tree.scores[row, node]).exp()
                    if float(torch.rand((), generator=generator, device=p.device)) <= float(left[token] / draft):
                        found = child
                        break
                    left = _normalised(left.scatter(0, token, 0.0)[None], left[None])[0]
            if found is None:
                break
            node = found
        leaves.append(node)
        bonus.append(draw(left[None, None], [generator])[0, 0])
    return Choice(torch.tensor(leaves, device=p.device), torch.stack(bonus), relaxed)


def _normalised(x: Tensor, otherwise: Tensor) -> Tensor:
    """x [B, V] scaled to sum 1; rows without mass are `otherwise`."""
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, x / total.clamp(min=1e-30), otherwise)
