"""What the code published with MARS does at T = 1, taken apart: {q := 1, released q} x {relaxation off, on}.

    python benchmarks/released.py --draft runs/quickstart/draft --out runs/released \\
        --prompts "[mt_bench.jsonl, alpaca.jsonl, gsm8k.jsonl, humaneval.jsonl]"

40 prompts of 64 tokens take some 12 minutes at 60 tokens/s, a third of them for the laws. The released code accepts a draft x
with min(1, p(x)/q(x)), q being the draft's own probability, though drafts are its likeliest tokens and not drawn from q;
with q := 1 the same code is the lossless rule, as long as its relaxation is off. Beside the four stand exact decoding
as it is here, and the paper's relaxation, which only replaces rejections.

The law of a rule is that of the first token it emits at a position, with p cut to its likeliest tokens: then all of it can be
enumerated, and many draws at one position be held to p. Draws are noise: what `exact` has of total variation is its floor.
The regret of answers is that of tokens passed by the ratio; what min(1, p/q) lets pass is seen in laws and likelihood alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from plots import Part, draw_points
from study import Study, mean, regret, relaxed, run, show, sums, table, tau, words

from slipstream.configs.progress import progress
from slipstream.data.journal import Journal
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import mean_interval
from slipstream.decode.fidelity import likelihood, measure_likelihood
from slipstream.decode.recorder import Observer
from slipstream.decode.scores import score_means, score_records
from slipstream.decode.tasks import encode_first
from slipstream.decode.tree import Tree, TreeShape, make_tree
from slipstream.decode.verify import Spent, Verifier, decide

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from study import Stated
    from torch import Tensor

    from slipstream.decode.drafters import Drafter, Round
    from slipstream.decode.evaluate import Record
    from slipstream.decode.verify import Verdict

    Position = tuple[Tree, Tensor]  # a tree and the target's logits at its nodes, [1, N, V]

TREE = TreeShape(4, 4, 16)


@dataclass
class Certain:
    """A drafter that is certain of each of its drafts: q := 1, as is true of children that are not drawn."""

    drafter: Drafter

    def begin(self, batch: int) -> None:
        """As the drafter does."""
        self.drafter.begin(batch)

    def keep(self, rows: Sequence[int]) -> None:
        """As the drafter does."""
        self.drafter.keep(rows)

    def propose(self, round: Round) -> Tree:
        """The drafter's trees without its probabilities."""
        return certain(self.drafter.propose(round))


def certain(tree: Tree) -> Tree:
    """The same tree with all drafts of probability 1."""
    return replace(tree, scores=torch.zeros_like(tree.scores))


class Positions(Observer):
    """An observer that keeps every drafted round of one prompt."""

    def __init__(self) -> None:
        self.kept: list[Position] = []

    def round(
        self,
        places: Sequence[int],
        tree: Tree,
        logits: Tensor,
        verdict: Verdict,
        seconds: tuple[float, float, float],
    ) -> None:
        """Keep tree and logits."""
        if tree.levels:
            self.kept.append((tree, logits))


def law(
    rule: Verifier, tree: Tree, logits: Tensor, top_k: int, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """How often a rule emits each token first, and what the target would: [W] both; and how often a draft passed.

    Args:
        rule: The rule.
        tree: One tree of N nodes.
        logits: The target's at its nodes, [1, N, V].
        top_k: Of the target's distribution; the W tokens are those that are among them at any node, and the drafts.
        draws: How many.
        generator: Of the draws.
    """
    best = logits.topk(min(top_k, logits.shape[-1]))
    tokens = torch.cat([best.indices.flatten(), tree.tokens.flatten()]).unique()
    logits = logits[..., tokens].float()
    processed = logits.masked_fill(logits < best.values[..., -1:].float(), -torch.inf)
    narrow = torch.searchsorted(tokens, tree.tokens)
    ids, parents, scores = (x.expand(draws, -1) for x in (narrow, tree.parents, tree.scores))
    raw, cut = (x.expand(draws, -1, -1) for x in (logits, processed))
    decision = decide(
        rule, make_tree(ids, parents, scores, tree.levels), raw, cut, [generator], [Spent() for _ in range(draws)]
    )
    counts = torch.bincount(decision.tokens[:, 0], minlength=len(tokens))
    passed = float((decision.counts > 1).double().mean())
    return counts.double() / draws, torch.softmax(processed[0, 0].double(), -1), passed


def distances(found: Tensor, p: Tensor, draws: int) -> dict[str, float]:
    """Total variation; chi-square over tokens that are expected more than 5 times, and its degrees; entropy, nats."""
    common = p * draws > 5
    observed, wanted = found[common] * draws, p[common] * draws
    wanted = wanted * observed.sum() / wanted.sum()
    chi = float(((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
    return {
        "tv": float((found - p).abs().sum() / 2),
        "chi": chi,
        "degrees": max(0, int(common.sum()) - 1),
        "entropy": float(torch.special.entr(found).sum()),
        "target": float(torch.special.entr(p).sum()),
    }


def positions(decoder: Decoder, row: dict[str, Any], tokens: int, count: int, seed: int) -> list[Position]:
    """Rounds of an exact answer at T = 1, at equal distances; all of them where there are fewer than `count`."""
    seen = Positions()
    ids = encode_first(decoder.target, row)
    prompt = torch.tensor([ids], device=decoder.target.device)
    decoder.generate(
        prompt, max_new_tokens=tokens, temperature=1.0, verify="exact", eos_token_id=None, seed=seed, observer=seen
    )
    return seen.kept[:: max(1, -(-len(seen.kept) // count))]


def laws_at(
    position: Position, cells: Mapping[str, tuple[Decoder, str]], top_k: int, draws: int, generator: torch.Generator
) -> dict[str, dict[str, float]]:
    """`distances` by cell at one position, and how often a draft passed."""
    tree, logits = position
    out = {}
    for name, (decoder, rule) in cells.items():
        shown = certain(tree) if isinstance(decoder.drafter, Certain) else tree
        found, p, passed = law(Verifier.of(rule), shown, logits, top_k, draws, generator)
        out[name] = {**distances(found, p, draws), "passed": passed}
    return out


def laws(
    study: Study, plain: Decoder, cells: Mapping[str, tuple[Decoder, str]], top_k: int, draws: int, count: int
) -> dict[str, list[list[dict[str, float]]]]:
    """`laws_at` by cell, prompt and position; kept in the folder prompt by prompt."""
    begun = study.begun | {"tree": str(plain.policy.tree), "cells": {name: rule for name, (_, rule) in cells.items()}}
    begun |= {"top_k": top_k, "draws": draws, "positions": count}
    with Journal(study.out / "laws.jsonl", begun) as journal, progress("laws", len(study.rows), "prompts") as advance:
        for i, row in enumerate(study.rows):
            if i not in journal.units:
                generator = torch.Generator(plain.target.device).manual_seed(study.seed + i)
                chosen = positions(plain, row, study.tokens, count, study.seed + i)
                journal.append(i, [{"cells": laws_at(one, cells, top_k, draws, generator)} for one in chosen])
            advance()
        lines = journal.rows()
    prompts = range(len(study.rows))
    return {name: [[line["cells"][name] for line in lines if line["unit"][0] == i] for i in prompts] for name in cells}


def over_positions(by_prompt: list[list[dict[str, float]]], key: str) -> Stated:
    """Mean of a distance over positions, its interval over prompts."""
    sizes = [float(len(group)) for group in by_prompt]
    return mean_interval([sum(values[key] for values in group) for group in by_prompt], sizes, 0)


def law_lines(found: Mapping[str, list[list[dict[str, float]]]]) -> list[list[str]]:
    """The table of laws: means over positions with intervals over prompts, chi-square over its degrees pooled."""
    lines = []
    for name, by_prompt in found.items():
        over = {key: over_positions(by_prompt, key) for key in ("passed", "tv", "entropy", "target")}
        chi, degrees = (sum(values[key] for group in by_prompt for values in group) for key in ("chi", "degrees"))
        cells = [words(over[key], 3) for key in ("passed", "tv")]
        lines.append(
            [name, *cells, f"{chi / max(1, degrees):.2f}", *(words(over[key], 3) for key in ("entropy", "target"))]
        )
    return lines


def answer_lines(study: Study, answers: Mapping[str, list[Record]]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns of the table of answers, and its lines; scores where prompts have references."""
    target = study.decoder.target
    measure_likelihood(target, study.rows, list(answers.values()))
    scored = [i for i, row in enumerate(study.rows) if "reference" in row or "test" in row]
    chosen = {name: [records[i] for i in scored] for name, records in answers.items()}
    score_records(target, [study.rows[i] for i in scored], list(chosen.values()))
    scores = list(dict.fromkeys(name for records in chosen.values() for r in records for name in r.scores))
    lines = []
    for name, records in answers.items():
        counts, likely = sums(records), likelihood(records, 0)
        means = score_means(chosen["exact"], chosen[name], 0)
        lines.append(
            [
                name,
                words(tau(counts)),
                f"{relaxed(counts):.1%}",
                words(regret(counts), 4),
                words((likely["log_likelihood"], likely["log_likelihood_ci95"]), 3),
                words(mean(counts[:, 3]), 1),
                *(words((means[score]["mean"], means[score]["ci95"]), 3) for score in scores),
            ]
        )
    return ["rule", "tau", "relaxed", "regret (nats/token)", "log-likelihood (nats/token)", "length", *scores], lines


def main(
    tree: TreeShape = TREE,
    ratio: float = 0.9,
    top_k: int = 20,
    draws: int = 1000,
    count: int = 4,
    **settings: Any,
) -> None:
    """Print two Markdown tables: laws at single positions, and answers; draw total variation and acceptance length.

    Args:
        tree: Drafted by all; the released code knows no copies.
        ratio: Threshold of the relaxation.
        top_k: Likeliest tokens of the target to which the laws are cut.
        draws: Of each law.
        count: Positions of each prompt.
        **settings: Of `Study`.
    """
    study = Study(**settings)
    plain = study.variant(tree=replace(tree, copied=0))
    one = Decoder(plain.target, Certain(plain.drafter), plain.policy)
    on = f"released:ratio={ratio:g}"
    cells = {
        "exact": (plain, "exact"),
        f"mars ratio {ratio:g}": (plain, f"mars:ratio={ratio:g}"),
        "q := 1, off": (one, f"{on},lam=0"),
        "q := 1, on": (one, on),
        "released q, off": (plain, f"{on},lam=0"),
        "released q, on": (plain, on),
    }
    answers = study.answers(cells, temperature=1.0)
    found = laws(study, plain, cells, top_k, draws, count)
    names = ["rule", "a draft passes", "TV to p", "chi-square / degrees", "entropy (nats)", "of p"]
    parts = [
        Part(
            "total variation to p", {name: {"": over_positions(by_prompt, "tv")} for name, by_prompt in found.items()}
        ),
        Part("acceptance length", {name: {"": tau(sums(records))} for name, records in answers.items()}),
    ]
    show(
        study.out,
        draw_points("What the released rule writes and accepts at temperature 1", parts),
        table(names, law_lines(found)),
        table(*answer_lines(study, answers)),
    )


if __name__ == "__main__":
    run(main)
