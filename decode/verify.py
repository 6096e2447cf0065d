"""Which drafted tokens the target lets through: the lossless rules, and MARS' margin-aware relaxation of them.

At a node the target decides on a token y: its argmax, or at T > 0 a draw from its distribution p. A child that is y is
accepted. For deterministic children this *is* the lossless tree rule (EAGLE accepts child x with probability p(x) and
renormalises otherwise): the accepted child has law p(x), and without one the correction has the law of p outside the
children. Relaxation only ever replaces a rejection.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.suggest import near

if TYPE_CHECKING:
    from collections.abc import Collection

    from slipstream.decode.tree import Tree

RULES = ("exact", "mars")
SIGNALS = {"ratio": 0.9, "margin": 1.0, "odds": 0.4}
"""Signals of the relaxed rule and the threshold each has by default."""


@dataclass(frozen=True)
class Verifier:
    """A verification rule and its guards.

    Attributes:
        rule: `exact` (lossless), or `mars` (arXiv 2601.15498).
        signal: When a runner-up may pass: `ratio` z2/z1 > threshold on raw logits (the paper's; never where z1 <= 0),
            `margin` z1 - z2 <= threshold nats on raw logits, `odds` p2/p1 >= threshold after the processors.
        threshold: Of the signal; None is the signal's default.
        lam: Probability that a relaxation the signal allows is taken, at T > 0.
        per_round: Relaxed tokens allowed in one round.
        per_request: Relaxed tokens allowed in one request.
        regret: Cumulative regret allowed in one request, nats; a token's regret is log p(top) - log p(token).
    """

    rule: str = "exact"
    signal: str = "ratio"
    threshold: float | None = None
    lam: float = 1.0
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
        if not 0 <= self.lam <= 1:
            raise SlipstreamError(f"lam must lie in [0, 1], not {self.lam:g}")
        for name in ("per_round", "per_request", "regret"):
            if not getattr(self, name) >= 0:
                raise SlipstreamError(f"the budget {name} must not be negative")

    @property
    def theta(self) -> float:
        """The threshold in force."""
        assert self.threshold is not None
        return self.threshold

    @property
    def lossless(self) -> bool:
        """Whether the output has the target's own distribution, whatever the draft."""
        budget = min(self.per_round, self.per_request, self.regret, self.lam)
        return self.rule == "exact" or budget == 0

    @property
    def label(self) -> str:
        """A short name: `exact`, or `mars ratio 0.9`."""
        return "exact" if self.rule == "exact" else f"mars {self.signal} {self.theta:g}"

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
    """What a request has used of its budgets."""

    relaxed: int = 0
    regret: float = 0.0


@dataclass(frozen=True)
class Token:
    """One emitted token.

    Attributes:
        id: Token id.
        tag: `exact` or `relaxed` for an accepted draft, `bonus` for the target's own.
        margin: z1 - z2 of the target where it was decided, nats; None where it was not looked at.
        regret: log p(top) - log p(token) under the unprocessed target, nats; None where it was not looked at.
    """

    id: int
    tag: str
    margin: float | None = None
    regret: float | None = None


@dataclass(frozen=True)
class Verdict:
    """One round's outcome: the accepted nodes, root first, and the tokens emitted, bonus last."""

    path: list[int]
    tokens: list[Token]


def verify(
    verifier: Verifier,
    tree: Tree,
    logits: Tensor,
    *,
    processed: Tensor | None = None,
    generator: torch.Generator | None = None,
    spent: Spent | None = None,
    never_relax: Collection[int] = (),
) -> Verdict:
    """Walk down the tree as far as the rule allows.

    Args:
        verifier: The rule.
        tree: N nodes.
        logits: The target's raw logits at the nodes, [N, V].
        processed: Logits after the processors, [N, V], to sample from; None decodes greedily from the raw ones.
        generator: For the draws.
        spent: Budgets used so far; updated.
        never_relax: Tokens that only pass exactly (end of sequence, other special tokens).

    Raises:
        SlipstreamError: If a logit on the way is not finite.
    """
    spent = spent if spent is not None else Spent()
    greedy = processed is None
    relaxing = not verifier.lossless
    if relaxing:
        values, ids = logits.topk(2)
        values = values.float()
        ranked, z, margins = ids.tolist(), values.tolist(), (values[:, 0] - values[:, 1]).tolist()
        best = ids[:, 0]
    else:
        best = logits.max(-1).indices  # on a CPU in bf16 ten times as fast as argmax
    if processed is not None:
        best = torch.multinomial(torch.softmax(processed.float(), -1), 1, generator=generator).squeeze(1)
    decided, tokens, children = best.tolist(), tree.tokens.tolist(), tree.children()

    def fires(node: int) -> bool:
        if verifier.signal == "ratio":
            return z[node][0] > 0 and z[node][1] / z[node][0] > verifier.theta
        if verifier.signal == "margin":
            return margins[node] <= verifier.theta
        if processed is None:
            return math.exp(-margins[node]) >= verifier.theta
        pair = torch.softmax(processed[node].float(), -1).topk(2).values
        return bool(pair[1] >= verifier.theta * pair[0])

    def relaxed_child(node: int) -> tuple[int, float] | None:
        """The child that may pass in place of the decided token, and its regret."""
        ranks = ranked[node][1:] if greedy else ranked[node]
        for rank, token in zip(((1,) if greedy else (0, 1)), ranks, strict=True):
            regret = margins[node] if rank else 0.0
            if token in children[node] and token not in never_relax and decided[node] not in never_relax:
                allowed = spent.regret + regret <= verifier.regret and spent.relaxed < verifier.per_request
                coin = greedy or verifier.lam == 1 or float(torch.rand((), generator=generator)) < verifier.lam
                return (children[node][token], regret) if allowed and fires(node) and coin else None
        return None

    node, path, out, relaxed_here = 0, [0], [], 0
    while True:
        y = decided[node]
        margin = margins[node] if relaxing else None
        if y in children[node]:
            node = children[node][y]
            out.append(Token(y, "exact", margin, 0.0 if greedy else None))
        else:
            found = relaxed_child(node) if relaxing and relaxed_here < verifier.per_round else None
            if found is None:
                break
            node, regret = found
            relaxed_here += 1
            spent.relaxed += 1
            spent.regret += regret
            out.append(Token(tokens[node], "relaxed", margin, regret))
        path.append(node)
    if not bool(torch.isfinite(logits[node].max())):
        raise SlipstreamError(f"the target's logits at draft node {node} are not finite; check its weights and dtype")
    out.append(Token(decided[node], "bonus", margins[node] if relaxing else None, 0.0 if greedy else None))
    return Verdict(path, out)
