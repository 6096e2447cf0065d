"""Which drafted tokens the target lets through: the lossless rules, and relaxed ones that say what they cost.

At a node the target decides on a token y: its argmax, or at T > 0 a draw from its distribution p. A child that is y is
accepted. For deterministic children this *is* the lossless tree rule (EAGLE accepts child x with probability p(x) and
renormalises otherwise): the accepted child has law p(x), and without one the correction has the law of p outside the
children. A relaxed rule only ever replaces a rejection: where no child is y, it may admit another one. So every rule for
such trees is a choice of admitted nodes, made for all nodes at once; the longest path of admitted nodes is kept, among
equals the one with fewer relaxed tokens, then with less regret.

Drafts that were drawn from the draft's own distribution q are judged with q (speculative sampling, its recursion over
siblings drawn without replacement, block verification), and only losslessly.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.suggest import near
from slipstream.decode.draws import draw, uniforms
from slipstream.decode.signals import fires

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.tree import Tree

RULES = ("exact", "block", "mars", "lenience", "typical", "top_n", "released")
SIGNALS = {"ratio": 0.9, "margin": 1.0, "odds": 0.4}
"""Signals of the relaxed rule and the threshold each has by default."""

_TAGS = ("exact", "relaxed", "bonus")


@dataclass(frozen=True)
class Verifier:
    """A verification rule and its guards.

    Attributes:
        rule: `exact` (lossless: greedy, sampling, or speculative sampling where drafts were drawn); `block` (lossless,
            drawn chains, arXiv 2403.10444); `mars` (arXiv 2601.15498); `lenience` (arXiv 2211.17192), `typical` (Medusa,
            arXiv 2401.10774) and `top_n` (TensorRT-LLM), for comparison; `released`, the behaviour of the code published
            with MARS, which differs from the paper and is lossy even with its relaxation off, for ablations only.
        signal: When `mars` lets a runner-up pass: `ratio` z2/z1 > threshold on raw logits (the paper's; never where
            z1 <= 0), `margin` z1 - z2 <= threshold nats on raw logits, `odds` p2/p1 >= threshold after the processors.
        threshold: Of the signal; None is the signal's default.
        rank: Lowest rank `mars` may admit, each judged by its own gap to the top; above 2 for `margin` and `odds` only.
        lam: Probability that a relaxation the rule allows is taken, at T > 0.
        leniency: l of `lenience`: greedy, p(x) >= l max p; at T > 0 acceptance with probability min(1, p(x) / l).
        epsilon: Of `typical`: p(x) > min(epsilon, delta exp(-entropy of p)).
        delta: Of `typical`; and of `top_n`: p(x) >= max p - delta.
        top_n: x must be among the n likeliest.
        per_round: Relaxed tokens allowed in one round.
        per_request: Relaxed tokens allowed in one request.
        regret: Cumulative regret allowed in one request, nats; a token's regret is log p(top) - log p(token).
    """

    rule: str = "exact"
    signal: str = "ratio"
    threshold: float | None = None
    rank: int = 2
    lam: float = 1.0
    leniency: float = 0.7
    epsilon: float = 0.09
    delta: float = 0.3
    top_n: int = 2
    per_round: float = math.inf
    per_request: float = math.inf
    regret: float = math.inf

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise SlipstreamError(f"unknown verification rule {self.rule!r}{near(self.rule, RULES)}")
        if self.signal not in SIGNALS:
            raise SlipstreamError(f"unknown signal {self.signal!r}{near(self.signal, SIGNALS)}")
        if self.threshold is None:
            object.__setattr__(self, "threshold", SIGNALS[self.signal])
        high = math.inf if self.signal == "margin" else 1.0
        if not 0 <= self.theta <= high:
            raise SlipstreamError(f"the threshold of {self.signal} must lie in [0, {high:g}], not {self.theta:g}")
        if self.rank < 2 or (self.rank > 2 and self.signal == "ratio"):
            raise SlipstreamError(f"rank must be 2, or more with the margin or odds signal, not {self.rank}")
        for name in ("lam", "leniency", "epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise SlipstreamError(f"{name} must lie in [0, 1], not {getattr(self, name):g}")
        for name in ("delta", "top_n", "per_round", "per_request", "regret"):
            if not getattr(self, name) >= 0:
                raise SlipstreamError(f"{name} must not be negative, but is {getattr(self, name):g}")

    @property
    def theta(self) -> float:
        """The threshold in force."""
        assert self.threshold is not None
        return self.threshold

    @property
    def lossless(self) -> bool:
        """Whether the output has the target's own distribution, whatever the draft."""
        budget = min(self.per_round, self.per_request, self.regret, self.lam)
        return self.rule in ("exact", "block") or (self.rule != "released" and budget == 0)

    @property
    def label(self) -> str:
        """A short name: `exact`, `mars ratio 0.9`, `lenience 0.7`."""
        settings = {
            "mars": f" {self.signal} {self.theta:g}",
            "lenience": f" {self.leniency:g}",
            "typical": f" {self.epsilon:g}, {self.delta:g}",
            "top_n": f" {self.top_n}, {self.delta:g}",
            "released": f" {self.theta:g}" if self.lam else " without relaxation",
        }
        return self.rule + settings.get(self.rule, "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: infinite budgets are null."""
        return {k: None if v == math.inf else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verifier:
        """The inverse of `to_dict`.

        Raises:
            SlipstreamError: On an unknown key.
        """
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise SlipstreamError(f"unknown key {key!r} in the verification rule{near(key, known)}")
        return cls(**{k: v for k, v in data.items() if v is not None})

    @classmethod
    def of(cls, verify: str | Verifier) -> Verifier:
        """A verifier from a rule's name, or the verifier itself."""
        return cls(rule=verify) if isinstance(verify, str) else verify


@dataclass
class Spent:
    """What one request has used of its budgets."""

    relaxed: int = 0
    regret: float = 0.0


class Token(NamedTuple):
    """One emitted token.

    Attributes:
        id: Token id.
        tag: `exact` or `relaxed` for an accepted draft, `bonus` for the target's own.
        margin: z1 - z2 of the target where it was decided, nats; None under a lossless rule, which does not look at it.
        regret: log p(top) - log p(token) under the unprocessed target, nats.
    """

    id: int
    tag: str
    margin: float | None = None
    regret: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """One round's outcome on the host, per row.

    Attributes:
        paths: The accepted nodes, root first.
        tokens: The tokens emitted, the bonus last.
    """

    paths: list[list[int]]
    tokens: list[list[Token]]


class Decision(NamedTuple):
    """One round's outcome on the device; entry j of a row is about its j-th emitted token, up to `counts` of them.

    Attributes:
        counts: Tokens emitted, accepted drafts and the bonus, [B].
        path: Node at which each token was decided, [B, D].
        tokens: Token ids, [B, D].
        tags: 0 exact, 1 relaxed, 2 bonus, [B, D].
        margins: z1 - z2 there, nats, [B, D]; 0 under a lossless rule.
        regrets: log p(top) - log p(token) there, nats, [B, D].
        top: The largest logit there, [B, D].
    """

    counts: Tensor
    path: Tensor
    tokens: Tensor
    tags: Tensor
    margins: Tensor
    regrets: Tensor
    top: Tensor

    def to_host(self, spent: Sequence[Spent], lossless: bool) -> Verdict:
        """Bring it over in one transfer, and add what was relaxed to `spent`.

        Raises:
            SlipstreamError: If a logit on the way is not finite.
        """
        counts = self.counts.double()[:, None].expand_as(self.margins)
        packed = torch.stack([x.double() for x in (counts, *self[1:])], -1).tolist()
        verdict = Verdict([], [])
        for row, mine in zip(packed, spent, strict=True):
            kept = row[: int(row[0][0])]
            bad = next((int(node) for _, node, *_, top in kept if not math.isfinite(top)), None)
            if bad is not None:
                raise SlipstreamError(
                    f"the target's logits at draft node {bad} are not finite; check its weights and dtype"
                )
            out = [Token(int(t), _TAGS[int(tag)], None if lossless else m, r) for _, _, t, tag, m, r, _ in kept]
            mine.relaxed += sum(token.tag == "relaxed" for token in out)
            mine.regret += sum(token.regret for token in out if token.tag == "relaxed")
            verdict.paths.append([int(node) for _, node, *_ in kept])
            verdict.tokens.append(out)
        return verdict


class _Choice(NamedTuple):
    """What a rule settles: the last accepted node [B], the token after it [B], and which nodes passed relaxed [B, N]."""

    leaf: Tensor
    bonus: Tensor
    relaxed: Tensor


def verify(
    verifier: Verifier,
    tree: Tree,
    logits: Tensor,
    *,
    processed: Tensor | None = None,
    generators: Sequence[torch.Generator] | None = None,
    spent: Sequence[Spent] | None = None,
    never_relax: Tensor | None = None,
) -> Verdict:
    """Go down each tree as far as the rule allows.

    Args:
        verifier: The rule.
        tree: N nodes per row.
        logits: The target's raw logits at the nodes, [B, N, V].
        processed: Logits after the processors, [B, N, V], to sample from; None decodes greedily from the raw ones.
        generators: For the draws: one per row, or one for all.
        spent: Budgets used so far, one per row; updated.
        never_relax: Tokens that only pass exactly (end of sequence, other special tokens), [S].

    Raises:
        SlipstreamError: If a logit on the way is not finite, or the rule cannot judge such trees.
    """
    spent = spent if spent is not None else [Spent() for _ in logits]
    decision = decide(verifier, tree, logits, processed, generators, spent, never_relax)
    return decision.to_host(spent, verifier.lossless)


def decide(
    verifier: Verifier,
    tree: Tree,
    logits: Tensor,
    processed: Tensor | None,
    generators: Sequence[torch.Generator] | None,
    spent: Sequence[Spent],
    never_relax: Tensor | None = None,
) -> Decision:
    """`verify`, with everything left on the device."""
    generators = generators or [torch.Generator(logits.device).manual_seed(0)]
    p = None if processed is None else torch.softmax(processed.float(), -1)
    if p is None:
        top, decided = logits.max(-1)  # on a CPU in bf16 ten times as fast as argmax
    else:
        top, decided = logits.max(-1).values, draw(p, generators)
    drawn = tree.drawn if p is not None else None
    if drawn is not None and not verifier.lossless:
        raise SlipstreamError(
            f"rule {verifier.rule!r} judges trees of the likeliest drafts; drawn ones need exact or block"
        )
    if verifier.rule == "block" and p is not None and (drawn is None or tree.nodes != tree.levels + 1):
        raise SlipstreamError("rule 'block' needs a drawn chain: TreeShape.chain(depth, sampled=True)")
    if p is not None and drawn is not None:
        choice = (_block if verifier.rule == "block" else _speculative_sampling)(tree, p, drawn, generators)
    elif p is not None and verifier.rule == "released":
        choice = _released(verifier, tree, processed, p, generators)
    else:
        choice = _admit(verifier, tree, logits, processed, p, decided, generators, spent, never_relax)
    return _decision(tree, logits, top, choice, verifier.lossless)


def _admit(
    verifier: Verifier,
    tree: Tree,
    logits: Tensor,
    processed: Tensor | None,
    p: Tensor | None,
    decided: Tensor,
    generators: Sequence[torch.Generator],
    spent: Sequence[Spent],
    never_relax: Tensor | None,
) -> _Choice:
    """The longest path of admitted nodes: children that are y, or that the rule lets pass in its place."""
    above = decided.gather(1, tree.parents)  # y at each node's parent
    exact = tree.tokens == above
    exact[:, 0] = True
    relaxed = torch.zeros_like(exact)
    if not verifier.lossless and verifier.rule != "released":  # which at T = 0 matches the argmax
        hits = torch.zeros_like(tree.parents).scatter_add(1, tree.parents[:, 1:], exact[:, 1:].long())
        relaxed = (hits == 0).gather(1, tree.parents) & _passes(verifier, tree, logits, processed, p, generators)
        if never_relax is not None and len(never_relax):
            relaxed &= ~torch.isin(tree.tokens, never_relax) & ~torch.isin(above, never_relax)
        relaxed[:, 0] = False
    lines = tree.ancestors
    reached = ~(lines & ~(exact | relaxed)[:, None]).any(-1)
    depths = tree.depths.double()
    if not verifier.lossless:
        regrets = _regrets(tree, logits).double().masked_fill(~relaxed, 0.0)
        count = (lines.double() @ relaxed.double()[:, :, None])[..., 0]
        cost = (lines.double() @ regrets[:, :, None])[..., 0]
        used = torch.tensor([[s.relaxed, s.regret] for s in spent], dtype=torch.float64, device=lines.device)
        reached &= (count <= verifier.per_round) & (count + used[:, :1] <= verifier.per_request)
        reached &= (cost + used[:, 1:] <= verifier.regret) | (count == 0)
        for value in (depths, -count, -cost):
            value = value.masked_fill(~reached, -math.inf)
            reached = reached & (value == value.max(1, keepdim=True).values)
    else:
        depths = depths.masked_fill(~reached, -1.0)
        reached = reached & (depths == depths.max(1, keepdim=True).values)
    order = torch.arange(tree.nodes, 0, -1, device=reached.device)
    leaf = (reached * order).max(1).indices  # the first of those left
    return _Choice(leaf, decided.gather(1, leaf[:, None])[:, 0], relaxed)


def _regrets(tree: Tree, logits: Tensor) -> Tensor:
    """log p(top) - log p(token) of each node's token under the unprocessed target at its parent, [B, N]."""
    top = logits.max(-1).values.gather(1, tree.parents)
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    return top.float() - logits[rows, tree.parents, tree.tokens].float()


def _passes(
    verifier: Verifier,
    tree: Tree,
    logits: Tensor,
    processed: Tensor | None,
    p: Tensor | None,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Nodes that the relaxed rule would accept in place of y, [B, N]; where y is a child is not looked at."""
    rows = torch.arange(len(logits), device=logits.device)[:, None]

    def of_child(x: Tensor) -> Tensor:
        return x[rows, tree.parents, tree.tokens].float()

    coins = uniforms(generators, (len(logits), tree.nodes), logits.device) if p is not None else None
    if verifier.rule == "mars":
        passes = fires(verifier.signal, verifier.theta, verifier.rank, tree, logits, processed)
        if coins is not None and verifier.lam < 1:
            passes &= coins.gather(1, tree.parents) < verifier.lam  # one coin per parent
        return passes
    p = p if p is not None else torch.softmax(logits.float(), -1)
    mine, best = of_child(p), p.max(-1).values.gather(1, tree.parents)
    if verifier.rule == "lenience":
        if coins is None:
            return mine >= verifier.leniency * best
        # y was not among the children. What a child's own draw has left undone of min(1, p / l) is made up for here.
        owed = (mine / max(verifier.leniency, 1e-9)).clamp(max=1.0) - mine
        return coins < owed / (1 - mine).clamp(min=1e-9)
    if verifier.rule == "typical":
        entropy = -(p * p.clamp(min=1e-9).log()).sum(-1).gather(1, tree.parents)
        return mine > (verifier.delta * torch.exp(-entropy)).clamp(max=verifier.epsilon)
    n = min(verifier.top_n, p.shape[-1])
    if not n:
        return torch.zeros_like(mine, dtype=torch.bool)
    last = p.topk(n).values[..., -1].gather(1, tree.parents)
    return (mine >= last) & (mine >= best - verifier.delta)


def _speculative_sampling(tree: Tree, p: Tensor, q: Tensor, generators: Sequence[torch.Generator]) -> _Choice:
    """Children drawn without replacement from q: accept with min(1, p/q), else p <- (p - q)+ and q without the child.

    A chain is the case of one child (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318); the recursion
    over siblings is SpecInfer's and RSD's (arXiv 2305.09781, 2402.14160).
    """
    children, rows = tree.children(), torch.arange(len(p), device=p.device)
    leaf, going = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    left = p[:, 0]  # what the next token is still to be drawn from
    for _ in range(tree.levels):
        here, mine = q[rows, leaf], children[rows, leaf]
        passed = torch.zeros_like(going)
        place = leaf
        coins = uniforms(generators, (len(p), mine.shape[1]), p.device)
        for rank in range(mine.shape[1]):
            child = mine[:, rank]
            trying = going & ~passed & (child >= 0)
            token = tree.tokens[rows, child.clamp(min=0)]
            chance = left[rows, token] / here[rows, token].clamp(min=1e-30)
            accept = trying & (coins[:, rank] <= chance)
            refuse = (trying & ~accept)[:, None]
            left = torch.where(refuse, _normalised((left - here).clamp(min=0), left), left)
            here = torch.where(refuse, _normalised(here.scatter(1, token[:, None], 0.0), here), here)
            place, passed = torch.where(accept, child, place), passed | accept
        leaf, going = place, going & passed
        left = torch.where(passed[:, None], p[rows, leaf], left)
        if not bool(going.any()):
            break
    return _Choice(leaf, draw(left[:, None], generators)[:, 0], torch.zeros_like(tree.tokens, dtype=torch.bool))


def _block(tree: Tree, p: Tensor, q: Tensor, generators: Sequence[torch.Generator]) -> _Choice:
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
    return _Choice(leaf, draw(rest[:, None], generators)[:, 0], torch.zeros_like(tree.tokens, dtype=torch.bool))


def _released(
    verifier: Verifier, tree: Tree, processed: Tensor | None, p: Tensor, generators: Sequence[torch.Generator]
) -> _Choice:
    """What the code published with MARS does at T > 0, for ablations; row by row, node by node.

    Where z2/z1 of the processed logits is above the threshold (no guard for their signs), the first child among the two
    likeliest passes, or else the token is drawn from the full p. Elsewhere child x passes with min(1, p(x)/q(x)), though
    children are the draft's likeliest and not drawn, and p(x) <- 0 on refusal. The ratio p/q makes it lossy on its own.
    """
    assert processed is not None
    children = tree.children().tolist()
    leaves, bonus, relaxed = [], [], torch.zeros_like(tree.tokens, dtype=torch.bool)
    for row in range(len(p)):
        node, generator = 0, generators[row % len(generators)]
        while True:
            left, below, found = p[row, node], [c for c in children[row][node] if c >= 0], None
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
    return _Choice(torch.tensor(leaves, device=p.device), torch.stack(bonus), relaxed)


def _normalised(x: Tensor, otherwise: Tensor) -> Tensor:
    """x [B, V] scaled to sum 1; rows without mass are `otherwise`."""
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, x / total.clamp(min=1e-30), otherwise)


def _decision(tree: Tree, logits: Tensor, top: Tensor, choice: _Choice, lossless: bool) -> Decision:
    """Read off the accepted path, the emitted tokens and what they cost."""
    rows = torch.arange(len(logits), device=logits.device)
    line = tree.ancestors[rows, choice.leaf]  # [B, N], the accepted nodes
    counts = line.sum(1)
    place = torch.where(line, line.cumsum(1) - 1, tree.levels + 1)
    nodes = torch.arange(tree.nodes, device=line.device).expand_as(place)
    path = torch.zeros(len(line), tree.levels + 2, dtype=torch.long, device=line.device).scatter(1, place, nodes)
    path = path[:, :-1]  # [B, levels + 1]; 0 behind the counts
    after = torch.cat([path[:, 1:], torch.zeros_like(path[:, :1])], 1)
    ends = torch.arange(path.shape[1], device=path.device) == counts[:, None] - 1
    tokens = torch.where(ends, choice.bonus[:, None], tree.tokens.gather(1, after))
    tags = torch.where(ends, 2, choice.relaxed.gather(1, after).long())
    best = top.gather(1, path).float()
    regrets = best - logits[rows[:, None], path, tokens].float()
    margins = torch.zeros_like(best)
    if not lossless:
        pair = logits[rows[:, None], path].topk(2).values.float()
        margins = pair[..., 0] - pair[..., 1]
    return Decision(counts, path, tokens, tags, margins, regrets, best)
