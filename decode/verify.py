"""Which drafted tokens the target lets through: the lossless rules, and relaxed ones that say what they cost.

The rules themselves are in `decode/rules.py`; here are their settings, and what comes of a round.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.suggest import near
from slipstream.decode.draws import draw
from slipstream.decode.evidence import LogitEvidence
from slipstream.decode.rules import Choice, admit, block, released, speculative_sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.evidence import Evidence
    from slipstream.decode.tree import Tree

RULES = ("exact", "block", "mars", "lenience", "typical", "top_n", "released")
SIGNALS = {"ratio": 0.9, "margin": 1.0, "odds": 0.4}
"""Signals of the relaxed rule and the threshold each has by default."""

TAGS = ("exact", "relaxed", "bonus")


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
        price: Of a nat of regret, in tokens, under `mars`. Greedily a path through the tree is worth its tokens less the price
            of its regret, and of the paths that signal and rank let pass the most valuable one is taken, though an exact
            child stand beside it. 0 is the paper's rule: where no child is exact, the longest path, whatever it costs. At
            T > 0, where a path's length is a matter of draws, every token must be worth its own price: a gap of 1 / price
            nats at most.
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
    price: float = 0.0
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
        if not (0 <= self.theta <= high and math.isfinite(self.theta)):
            raise SlipstreamError(f"the threshold of {self.signal} must lie in [0, {high:g}], not {self.theta:g}")
        if self.rank < 2 or (self.rank > 2 and self.signal == "ratio"):
            raise SlipstreamError(f"rank must be 2, or more with the margin or odds signal, not {self.rank}")
        if not 0 <= self.price < math.inf or (self.price and self.rule != "mars"):
            raise SlipstreamError(f"price must be finite, not negative, and go with rule mars, not {self.price:g}")
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
            "mars": f" {self.signal} {self.theta:g}" + (f", price {self.price:g}" if self.price else ""),
            "lenience": f" {self.leniency:g}",
            "typical": f" {self.epsilon:g}, {self.delta:g}",
            "top_n": f" {self.top_n}, {self.delta:g}",
            "released": f" {self.theta:g}" if self.lam else " without relaxation",
        }
        return self.rule + settings.get(self.rule, "")

    @property
    def guarded(self) -> str:
        """The rule with its rank and guards, in words."""
        guards = [f"rank {self.rank}"] if self.rank > 2 else []
        most = {"a round": self.per_round, "a request": self.per_request, "nats a request": self.regret}
        guards += [f"{value:g} {what}" for what, value in most.items() if value < math.inf]
        return ", ".join([self.label, *guards])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: infinite budgets are null, and a price of 0 is left out, as it was before there were prices."""
        return {k: None if v == math.inf else v for k, v in asdict(self).items() if k != "price" or v}

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
        """A verifier from a rule's name, or the verifier itself.

        A name may be followed by settings: `mars:margin=0.5,regret=10`, where a signal's name stands for signal and
        threshold.

        Raises:
            SlipstreamError: On an unknown rule or setting.
        """
        if not isinstance(verify, str):
            return verify
        rule, _, given = verify.partition(":")
        settings: dict[str, Any] = {"rule": rule}
        known = [*SIGNALS, *(f.name for f in fields(cls) if f.name not in ("rule", "signal", "threshold"))]
        for part in filter(None, given.split(",")):
            name, _, text = (word.strip() for word in part.partition("="))
            if name not in known:
                raise SlipstreamError(f"unknown setting {name!r} in rule {verify!r}{near(name, known)}")
            try:
                value = int(text) if name in ("rank", "top_n") else float(text)
            except ValueError as error:
                raise SlipstreamError(f"{name!r} in rule {verify!r} must be a number, not {text!r}") from error
            if name in SIGNALS and "signal" in settings:
                raise SlipstreamError(f"rule {verify!r} names two signals, {settings['signal']} and {name}; give one")
            settings |= {"signal": name, "threshold": value} if name in SIGNALS else {name: value}
        return cls(**settings)


@dataclass
class Spent:
    """What one request has used of its budgets."""

    relaxed: int = 0
    regret: float = 0.0

    def add(self, tokens: Sequence[Token]) -> None:
        """Count the relaxed ones."""
        self.relaxed += sum(token.tag == "relaxed" for token in tokens)
        self.regret += sum(token.regret for token in tokens if token.tag == "relaxed")


class Token(NamedTuple):
    """One emitted token.

    Attributes:
        id: Token id.
        tag: `exact` or `relaxed` for an accepted draft, `bonus` for the target's own.
        margin: z1 - z2 of the target where it was decided, nats; None under a lossless rule, which does not look at it.
        regret: log p(top) - log p(token) under the target, nats. Both are of the logits before any processor at T > 0,
            and behind the processors where decoding is greedy.
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


class NotFiniteError(SlipstreamError):
    """A token was to be decided by logits that are not finite.

    Attributes:
        row: Of the batch.
        path: The nodes down to the one whose logits they are, root first.
    """

    def __init__(self, row: int, path: list[int]) -> None:
        self.row, self.path = row, path
        super().__init__(f"the logits of row {row} at node {path[-1]} of its tree are not finite")


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
            NotFiniteError: If a logit on the way is not.
        """
        counts = self.counts.double()[:, None].expand_as(self.margins)
        packed = torch.stack([x.double() for x in (counts, *self[1:])], -1).tolist()
        verdict = Verdict([], [])
        for place, (row, mine) in enumerate(zip(packed, spent, strict=True)):
            kept = row[: int(row[0][0])]
            path = [int(node) for _, node, *_ in kept]
            bad = next((i for i, (*_, top) in enumerate(kept) if not math.isfinite(top)), None)
            if bad is not None:
                raise NotFiniteError(place, path[: bad + 1])
            out = [Token(int(t), TAGS[int(tag)], None if lossless else m, r) for _, _, t, tag, m, r, _ in kept]
            mine.add(out)
            verdict.paths.append(path)
            verdict.tokens.append(out)
        return verdict


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
    evidence = LogitEvidence(tree, logits)
    if processed is None:
        return decide_greedily(verifier, tree, evidence, spent, never_relax)
    generators = generators or [torch.Generator(logits.device).manual_seed(0)]
    p, drawn = torch.softmax(processed.float(), -1), tree.drawn
    if tree.nodes > 1:  # without drafts there is nothing to judge
        require_drawn(verifier, drawn is not None, tree.nodes == tree.levels + 1)
    if drawn is not None:
        choice = (block if verifier.rule == "block" else speculative_sampling)(tree, p, drawn, generators)
    elif verifier.rule == "released":
        choice = released(verifier, tree, processed, p, generators)
    else:
        after = LogitEvidence(tree, processed)
        choice = admit(verifier, tree, evidence, after, draw(p, generators), generators, spent, never_relax)
    decision = _decision(tree, evidence, choice, verifier.lossless)
    nothing = p[..., 0].isnan().gather(1, decision.path)  # where processors forbid every token, or logits are broken
    return decision._replace(top=decision.top.masked_fill(nothing, math.nan))


def require_drawn(verifier: Verifier, drawn: bool, chain: bool) -> None:
    """Make sure that at T > 0 a rule can judge trees whose drafts were drawn, or were not.

    Raises:
        SlipstreamError: If it cannot.
    """
    if drawn and not verifier.lossless:
        raise SlipstreamError(
            f"rule {verifier.rule!r} judges trees of the likeliest drafts; drawn ones need exact or block"
        )
    if verifier.rule == "block" and not (drawn and chain):
        raise SlipstreamError("rule 'block' needs a drawn chain: TreeShape.chain(depth, sampled=True)")


def decide_greedily(
    verifier: Verifier, tree: Tree, evidence: Evidence, spent: Sequence[Spent], never_relax: Tensor | None = None
) -> Decision:
    """`decide` at temperature 0, from any evidence."""
    choice = admit(verifier, tree, evidence, None, evidence.decided, [], spent, never_relax)
    return _decision(tree, evidence, choice, verifier.lossless)


def _decision(tree: Tree, evidence: Evidence, choice: Choice, lossless: bool) -> Decision:
    """Read off the accepted path, the emitted tokens and what they cost."""
    line = tree.ancestors[torch.arange(len(choice.leaf), device=choice.leaf.device), choice.leaf]  # [B, N], accepted
    counts = line.sum(1)
    place = torch.where(line, line.cumsum(1) - 1, tree.levels + 1)
    nodes = torch.arange(tree.nodes, device=line.device).expand_as(place)
    path = torch.zeros(len(line), tree.levels + 2, dtype=torch.long, device=line.device).scatter(1, place, nodes)
    path = path[:, :-1]  # [B, levels + 1]; 0 behind the counts
    after = torch.cat([path[:, 1:], torch.zeros_like(path[:, :1])], 1)
    ends = torch.arange(path.shape[1], device=path.device) == counts[:, None] - 1
    tokens = torch.where(ends, choice.bonus[:, None], tree.tokens.gather(1, after))
    tags = torch.where(ends, 2, choice.relaxed.gather(1, after).long())
    best = evidence.top.gather(1, path)
    last = evidence.at(choice.leaf, choice.bonus)[:, None]
    regrets = best - torch.where(ends, last, evidence.own.gather(1, after))
    margins = torch.zeros_like(best) if lossless else evidence.margins(path)
    return Decision(counts, path, tokens, tags, margins, regrets, best)
