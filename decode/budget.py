"""Budgets of fidelity, and the points that are held to them: a policy with what it gave."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.suggest import near
from slipstream.decode.evaluate import interval
from slipstream.decode.speculation import Speculation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.evaluate import Record
    from slipstream.decode.policy import Policy
    from slipstream.decode.tree import TreeShape
    from slipstream.decode.verify import Verifier

KINDS = ("strict", "regret", "agreement", "task")

NEARLY = 0.95
"""Of the highest speed: what a longer acceptance length may cost at most."""

AS_LONG = 0.98
"""Of the longest acceptance length: what less loss of fidelity may cost at most."""


@dataclass(frozen=True)
class Budget:
    """What the chosen policy may cost in fidelity.

    Attributes:
        kind: `strict`, exact decoding; `regret`, nats per token at most; `agreement`, the least share of tokens before
            the first difference from the exact output; `task`, the least share of the exact policy's task score.
        value: The limit; of `strict` it means nothing.
    """

    kind: str = "strict"
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`strict`, `regret=0.02`, `agreement=0.98` or `task=0.981`.

        Raises:
            SlipstreamError: If it is none of these.
        """
        kind, _, number = text.partition("=")
        if kind not in KINDS:
            raise SlipstreamError(f"unknown budget {kind!r}{near(kind, KINDS)}")
        if kind == "strict":
            if number:
                raise SlipstreamError(f"the strict budget takes no number, but was given {number}")
            return cls()
        try:
            value = float(number)
        except ValueError:
            example = "0.02" if kind == "regret" else "0.98"
            raise SlipstreamError(f"the budget {kind} needs a number: {kind}={example}, not {text!r}") from None
        if not value >= 0 or (kind != "regret" and value > 1):
            raise SlipstreamError(f"the budget {kind} is out of range: {value:g}")
        return cls(kind, value)

    def __str__(self) -> str:
        return self.kind if self.kind == "strict" else f"{self.kind}={self.value:g}"

    def met(self, point: Point) -> bool:
        """Whether a point that was run keeps to it; exact decoding is for `strict` alone."""
        if self.kind == "strict" or point.rule.lossless:
            return self.kind == "strict" and point.rule.lossless
        return self._loss(point) <= (self.value if self.kind == "regret" else -self.value)

    def choose(self, ran: Sequence[Point]) -> Point:
        """The best point that was run and keeps to it.

        Raises:
            SlipstreamError: If there is none; the nearest is named.
        """
        within = [point for point in ran if self.met(point)]
        if within:
            return self.best(within)
        relaxed = [point for point in ran if not point.rule.lossless]
        nearest = min(relaxed, key=lambda point: (self._loss(point), -point.speed))
        found = {
            "regret": f"{nearest.regret:.4f} nats",
            "agreement": f"{nearest.agreement:.3f}",
            "task": f"{nearest.recovery:.3f} of the exact score",
        }
        raise SlipstreamError(
            f"no relaxed policy keeps to {self} here; the nearest has {found[self.kind]}: {nearest.label}. "
            "Give that budget, or --budget strict"
        )

    def best(self, ran: Sequence[Point]) -> Point:
        """The fastest point that was run, whatever it loses; of those that cannot be told from it, the one that accepts most.

        Speeds of a few answers differ by chance. How many tokens a round gives does so less, and where verifying is cheaper
        than here it is what counts. Nothing is taken that was slower by a twentieth. Of points that accept as many, to a
        fiftieth, it is the one that loses least: what buys nothing is not spent.
        """
        fastest = max(ran, key=lambda point: point.speed)
        alike = [point for point in ran if point.speed >= NEARLY * fastest.speed and not point.slower(fastest)]
        longest = max(point.tau for point in alike)
        as_long = [point for point in alike if point.tau >= AS_LONG * longest]
        return min(as_long, key=lambda point: (0.0 if point.rule.lossless else self._loss(point), -point.tau))

    def _loss(self, point: Point) -> float:
        """What a relaxed point loses by this kind of budget; less is nearer to exact."""
        return {"regret": point.regret, "agreement": -point.agreement, "task": -point.recovery}[self.kind]


@dataclass(frozen=True)
class Point:
    """A policy and what it gives.

    Attributes:
        shape: Tree.
        rule: Verification rule.
        speed: Tokens per second.
        tau: Acceptance length.
        regret: Nats per token.
        relaxed: Share of tokens that were relaxed.
        schedule: Of speculation.
        predicted: Tokens per second foreseen, of a point that was run; None where nothing tells.
        basis: What that was foreseen from: `trace`, an acceptance length and the cost of a round; `run`, the acceptance
            length of the run itself and the rounds timed in between.
        agreement: Share of tokens before the first difference from exact decoding in the same tree, of a point that was
            run.
        recovery: Share of the exact policy's task score, of a point whose answers were scored.
        recovery_ci95: Its 95 % interval over prompts; None where there is none.
        scores: The task scores by name, as `scores.score_means` has them; empty where answers were not scored.
        confirmed: Whether it was run.
        records: What it did on each prompt it was run on.
    """

    shape: TreeShape
    rule: Verifier
    speed: float
    tau: float
    regret: float
    relaxed: float
    schedule: str = "fixed"
    predicted: float | None = None
    basis: str | None = None
    agreement: float = 1.0
    recovery: float = 1.0
    recovery_ci95: list[float] | None = field(default=None, compare=False)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False)
    confirmed: bool = False
    records: Sequence[Record] = field(default=(), compare=False, repr=False)

    def slower(self, other: Point) -> bool:
        """Whether this point is slower than another on the same prompts, beyond the 95 % interval of their ratio."""
        ratio, bounds = interval(other.records, self.records, seed=0)
        return (bounds[1] if bounds else ratio) < 1

    @property
    def label(self) -> str:
        """Rule, tree and schedule in words."""
        shape = f"depth {self.shape.depth}, top-k {self.shape.top_k}, {self.shape.nodes} nodes"
        shape += f" and {self.shape.copied} copied" if self.shape.copied else ""
        return ", ".join([self.rule.guarded, shape, *([self.schedule] if self.schedule != "fixed" else [])])

    def apply(self, policy: Policy) -> Policy:
        """The policy with this point's tree and schedule, and its rule as the relaxed one if it is one."""
        relaxed = policy.relaxed if self.rule.lossless else self.rule
        return replace(policy, tree=self.shape, relaxed=relaxed, speculation=Speculation(self.schedule))

    def to_dict(self, chosen: bool) -> dict[str, Any]:
        """As the report and `decode.json` have it."""
        return {
            "label": self.label,
            "rule": self.rule.guarded,
            "tree": f"{self.shape.depth}/{self.shape.top_k}/{self.shape.nodes}+{self.shape.copied}",
            "schedule": self.schedule,
            "tokens_per_second": round(self.speed, 2),
            "predicted_tokens_per_second": None if self.predicted is None else round(self.predicted, 2),
            "predicted_from": self.basis,
            "confirmed_over_predicted": None if self.predicted is None else round(self.speed / self.predicted, 3),
            "acceptance_length": round(self.tau, 3),
            "mean_regret_nats": round(self.regret, 5),
            "relaxed_share": round(self.relaxed, 4),
            "agreement": round(self.agreement, 4) if self.confirmed else None,
            **(
                {"recovery": round(self.recovery, 4), "recovery_ci95": self.recovery_ci95, "scores": self.scores}
                if self.scores
                else {}
            ),
            "lossless": self.rule.lossless,
            "confirmed": self.confirmed,
            "chosen": chosen,
        }
