"""What a recorded round would have given under another rule or a smaller tree.

Round by round this is exact: the same code decides, on the numbers it would have seen. It is so for the rounds on their
recorded contexts; a policy that accepts other tokens comes to other contexts, so a mean over a trace is an estimate of
what a run of that policy would give.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.verify import Decision, decide_greedily

if TYPE_CHECKING:
    from slipstream.decode.trace import Header, Rounds, Trace
    from slipstream.decode.tree import Tree, TreeShape
    from slipstream.decode.verify import Verifier


class Replay(NamedTuple):
    """All rounds of a trace, decided anew.

    Attributes:
        decision: As of `verify.decide`, [R, ..]; `path` counts the nodes of the recorded trees.
        whole: Whether the smaller tree lay within the recorded one, [R]. Where it did not, unrecorded drafts are missing
            from it and the decision is that of the drafts there are.
    """

    decision: Decision
    whole: Tensor


def replay(trace: Trace, verifier: Verifier, shape: TreeShape | None = None) -> Replay:
    """Decide every round of a trace by a rule, on its own tree or on a smaller one.

    Raises:
        SlipstreamError: If a trace like this one cannot tell.
    """
    check(trace.header, verifier, shape)
    decisions, whole = [], []
    for rounds in trace.rounds():
        tree, inside = cut(rounds, trace.header.tree, shape) if shape else (rounds.tree, torch.ones_like(rounds.levels))
        decisions.append(judge(rounds, tree, verifier, trace.header))
        whole.append(inside.bool())
    width = max(decision.path.shape[1] for decision in decisions)
    counts = torch.cat([decision.counts for decision in decisions])
    others = [[pad(x, (0, width - x.shape[1])) for x in decision[1:]] for decision in decisions]
    return Replay(Decision(counts, *(torch.cat(x) for x in zip(*others, strict=True))), torch.cat(whole))


def check(header: Header, verifier: Verifier, shape: TreeShape | None = None) -> None:
    """Refuse what a trace cannot tell.

    Raises:
        SlipstreamError: If it was sampled, if budgets of whole requests are not those recorded, or the tree is not part
            of the recorded ones.
    """
    if header.temperature:
        raise SlipstreamError(f"a trace at temperature {header.temperature:g} holds single draws; replay greedy ones")
    over_rounds = {verifier.per_request, verifier.regret} - {0, math.inf}
    if over_rounds and verifier != header.verifier:
        raise SlipstreamError(
            "per_request and regret count over the rounds before, which another rule changes; only the recorded rule "
            "can be replayed with them, others with per_round"
        )
    if shape is None:
        return
    recorded = header.tree
    schedule = header.policy["speculation"]["schedule"]
    if recorded.paths or shape.paths or recorded.copied or shape.copied or schedule != "fixed":
        raise SlipstreamError(
            "only trees given by depth, top_k and nodes, without copies and under the fixed schedule, can be made smaller"
        )
    for name in ("depth", "top_k", "nodes"):
        most, asked = getattr(recorded, name), getattr(shape, name)
        if asked > most:
            raise SlipstreamError(f"the trace was recorded with {name} {most}; a tree of {name} {asked} is not in it")


def judge(rounds: Rounds, tree: Tree, verifier: Verifier, header: Header) -> Decision:
    """Decide rounds on their trees, or on what `cut` left of them."""
    never_relax = torch.tensor([*header.never_relax, -1])  # -1 is no token
    return decide_greedily(verifier, tree, rounds.evidence, rounds.spent, never_relax)


def cut(rounds: Rounds, recorded: TreeShape, shape: TreeShape) -> tuple[Tree, Tensor]:
    """The trees of a smaller shape within the recorded ones; nodes outside have token -1. And which are whole, [R].

    The tree is grown as the drafter grows it, from recorded nodes: the best `top_k` children of the best `top_k` nodes
    of each level, of all of them the best. A draft that was not recorded scores no more than any that was, so the result
    is that of the drafter if there are enough nodes, and if every node that would be expanded was expanded then, or is
    itself too poor for its children to be kept.
    """
    tree, depths = rounds.tree, rounds.tree.depths
    there = torch.isfinite(tree.scores)
    elder = (tree.parents[:, :, None] == tree.parents[:, None, :]).tril(-1)
    elder[:, :, 0] = False  # the root is nobody's sibling
    ranks = elder.sum(-1)
    reach = rounds.levels.clamp(max=shape.depth)[:, None]  # [R, 1]
    frontier = depths == 0
    candidates, lost = torch.zeros_like(there), torch.zeros_like(there)
    for depth in range(1, shape.depth + 1):
        level = there & (depths == depth)
        mine = level & (ranks < shape.top_k) & frontier.gather(1, tree.parents)
        candidates |= mine
        frontier = _best(mine, tree.scores, shape.top_k)
        lost |= frontier & ~_best(level, tree.scores, recorded.top_k) & (depth < reach)
    values = tree.scores.double() - 1e-9 * depths  # as `TreeBuilder` ranks them
    wanted = (shape.top_k + (reach - 1) * shape.top_k**2).clamp(max=shape.nodes - 1) * (reach > 0)
    kept = _best(candidates, values, wanted)
    least = values.masked_fill(~kept, math.inf).min(1, keepdim=True).values
    whole = (kept.sum(1) == wanted[:, 0]) & ~(lost & (values > least)).any(1)
    return replace(tree, tokens=tree.tokens.masked_fill(~kept & (depths > 0), -1)), whole


def _best(some: Tensor, values: Tensor, count: int | Tensor) -> Tensor:
    """The `count` of `some` [R, N] with the largest values, the earlier of equal ones; all of them where there are fewer."""
    order = values.masked_fill(~some, -math.inf).sort(dim=1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return some & (place < count)
