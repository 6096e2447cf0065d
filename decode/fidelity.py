"""How far a rule's output is from the target's own: agreement, likelihood, and the regret of relaxed tokens."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from slipstream.configs.progress import progress
from slipstream.data.template import written
from slipstream.decode.evaluate import mean_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.evaluate import Record
    from slipstream.distill.target import Target

QUANTILES = (0.5, 0.9, 0.99, 1.0)
_BINS = 8
_NARROWEST = 0.01  # nats that the bins span at least
_POINTS = 24


def common_prefix(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> int:
    """Tokens before the first difference, over all turns; what follows a difference answers another conversation."""
    pairs = zip(itertools.chain(*first), itertools.chain(*second), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def agreement(strict: Sequence[Record], ours: Sequence[Record], seed: int) -> dict[str, Any]:
    """How much of the strict greedy output a rule gave, each with its 95 % interval over prompts.

    `exact_match`: share of prompts with the same tokens. `common_prefix`: tokens before the first difference as a share
    of the longer output, mean over prompts. `equal_tokens`: the same share, pooled over all tokens.
    """
    prefixes = [common_prefix(a.outputs, b.outputs) for a, b in zip(strict, ours, strict=True)]
    longer = [max(a.tokens, b.tokens) for a, b in zip(strict, ours, strict=True)]
    same = [float(a.outputs == b.outputs) for a, b in zip(strict, ours, strict=True)]
    ones = [1.0] * len(same)
    shares = [prefix / length for prefix, length in zip(prefixes, longer, strict=True)]
    return {
        **_stated("exact_match", same, ones, seed),
        **_stated("common_prefix", shares, ones, seed),
        **_stated("equal_tokens", prefixes, longer, seed),
    }


def likelihood(records: Sequence[Record], seed: int) -> dict[str, Any]:
    """Mean log-likelihood of the outputs under the target, nats per token, with its 95 % interval over prompts."""
    sums = [r.log_likelihood for r in records if r.log_likelihood is not None]
    return _stated("log_likelihood", sums, [r.tokens for r in records], seed)


def regret_quantiles(records: Sequence[Record]) -> dict[str, float] | None:
    """The tail of what a relaxed token costs, nats, over relaxed tokens alone; None where there are none."""
    regrets = [token.regret for r in records for token in r.tagged if token.tag == "relaxed"]
    if not regrets:
        return None
    values = np.quantile(regrets, QUANTILES)
    return {"max" if q == 1 else f"{q:g}": round(float(v), 4) for q, v in zip(QUANTILES, values, strict=True)}


def relaxed_margins(records: Sequence[Record]) -> dict[str, list[float]] | None:
    """Histogram of z1 - z2 at relaxed tokens, nats: `edges` of the bins and `counts` in them; None where there are none."""
    tokens = [token for r in records for token in r.tagged if token.tag == "relaxed"]
    margins = [token.margin for token in tokens if token.margin is not None]
    if not margins:
        return None
    counts, edges = np.histogram(margins, _BINS, (0, max(*margins, _NARROWEST)))
    return {"edges": [round(float(edge), 4) for edge in edges], "counts": counts.tolist()}


def regret_by_length(records: Sequence[Record]) -> list[dict[str, float]] | None:
    """How regret adds up along an output: up to so many `tokens` of it, over the `answers` that are at least so long.

    `mean` and `q90` (nats) are of the sum of the regrets of an answer's relaxed tokens so far. None where there are none.
    """
    if not any(token.tag == "relaxed" for r in records for token in r.tagged):
        return None
    sums = [np.cumsum([token.regret if token.tag == "relaxed" else 0.0 for token in r.tagged]) for r in records]
    longest = max(map(len, sums))
    out = []
    for tokens in np.unique(np.linspace(1, longest, _POINTS).round().astype(int)).tolist():
        reached = [float(s[tokens - 1]) for s in sums if len(s) >= tokens]
        mean, q90 = float(np.mean(reached)), float(np.quantile(reached, 0.9))
        out.append({"tokens": tokens, "answers": len(reached), "mean": round(mean, 4), "q90": round(q90, 4)})
    return out


def measure_likelihood(target: Target, prompts: Sequence[dict[str, Any]], groups: Sequence[Sequence[Record]]) -> None:
    """Set `log_likelihood` of every record of each group (one record per prompt): one forward per turn.

    The distribution is the target's own at temperature 1, whatever the outputs were drawn at. Equal outputs of several
    groups are looked at once.
    """
    with progress("likelihood", len(prompts), "prompts") as advance:
        for i, row in enumerate(prompts):
            known: dict[str, float] = {}
            for group in groups:
                outputs = group[i].outputs
                if (key := str(outputs)) not in known:
                    known[key] = _log_likelihood(target, row["turns"], outputs)
                group[i].log_likelihood = known[key]
            advance()


def _log_likelihood(target: Target, turns: Sequence[str], outputs: Sequence[Sequence[int]]) -> float:
    """Sum over the tokens of all turns of log p(token | what came before)."""
    tokenizer, chat, total = target.chat_tokenizer, [], 0.0
    for turn, output in zip(turns, outputs, strict=True):
        chat.append({"role": "user", "content": turn})
        prompt = target.encode_prompt(chat)
        ids = torch.tensor([[*prompt, *output]], device=target.device)
        rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=target.device)  # row p predicts token p+1
        logits = target.forward(ids, logits_to_keep=rows).logits[0].float()  # [output, V]
        total -= float(cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        chat.append({"role": "assistant", "content": written(tokenizer, output)})
    return total


def _stated(name: str, values: Sequence[float], weights: Sequence[float], seed: int) -> dict[str, Any]:
    mean, span = mean_interval(values, weights, seed)
    return {name: round(mean, 4), f"{name}_ci95": span}
