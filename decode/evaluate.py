"""Measure rules against transformers' `generate`, on the same prompts, in the same run; rows of `results.json`."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.progress import progress
from slipstream.data.template import written
from slipstream.decode.drafters import NoDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.verify import Token, Verifier
from slipstream.distill.objectives import forward_kl
from slipstream.distill.unroll import unroll

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from slipstream.decode.recorder import Observer
    from slipstream.distill.draft import DraftHead
    from slipstream.distill.target import Target

BASELINES = ("autoregressive", "engine")
_BOOTSTRAP = 2000
_WARM_UP_TOKENS = 8


@dataclass
class Record:
    """What one rule did on one prompt, all turns together.

    Attributes:
        task: What the prompt belongs to; `mt_bench/writing` belongs to `mt_bench` too.
        tokens: New tokens.
        seconds: Of a batch each prompt bears an equal share; so with the target's and the draft's part.
        accept_lengths: Tokens emitted in each round, the bonus included.
        relaxed: Tokens accepted by relaxation.
        regret: Sum of their log p(top) - log p(token), nats.
        outputs: New token ids of each turn.
        tagged: The tokens of all turns; empty for transformers' own `generate`.
        turn_seconds: Seconds of each turn.
        turn_rounds: Rounds of each turn; for transformers' own `generate` its tokens.
        seed: Of the draws.
        batch: Number of the batch it was answered in; None where it was alone.
        log_likelihood: Of the outputs under the target, nats; None where it was not measured.
        scores: The answer's scores by their names.
    """

    task: str
    tokens: int = 0
    seconds: float = 0.0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    accept_lengths: list[int] = field(default_factory=list)
    relaxed: int = 0
    regret: float = 0.0
    outputs: list[list[int]] = field(default_factory=list)
    tagged: list[Token] = field(default_factory=list)
    turn_seconds: list[float] = field(default_factory=list)
    turn_rounds: list[int] = field(default_factory=list)
    seed: int = 0
    batch: int | None = None
    log_likelihood: float | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def add(self, output: list[int], tagged: list[Token], times: Times) -> None:
        """Add a turn."""
        self.tokens += len(output)
        self.outputs.append(output)
        self.tagged += tagged
        rounds = round_lengths(tagged)
        self.accept_lengths += rounds
        self.turn_rounds.append(len(rounds) if tagged else len(output))
        relaxed = [token.regret for token in tagged if token.tag == "relaxed"]
        self.relaxed += len(relaxed)
        self.regret += sum(relaxed)
        self.turn_seconds.append(times.seconds)
        self.seconds += times.seconds
        self.target_seconds += times.target
        self.draft_seconds += times.draft

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The answer to each turn."""
        return [written(tokenizer, ids) for ids in self.outputs]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """The inverse of `asdict`, through JSON."""
        return cls(**{**data, "tagged": [Token(*token) for token in data["tagged"]]})


class Times(NamedTuple):
    """Seconds of one turn, and the parts that target and draft took."""

    seconds: float
    target: float
    draft: float


def round_lengths(tokens: Sequence[Token]) -> list[int]:
    """Tokens emitted in each round of one row; the first token comes from the prompt's own forward.

    A round ends with its bonus. Worked example: tags `bonus, exact, bonus, bonus, exact` are rounds of 2, 1 and, cut
    short by the end, 1.
    """
    ends = [i for i, token in enumerate(tokens) if token.tag == "bonus"]
    if tokens and (not ends or ends[-1] < len(tokens) - 1):
        ends.append(len(tokens) - 1)
    return [end - before for before, end in itertools.pairwise(ends)]


def autoregressive(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> tuple[list[list[int]], float]:
    """transformers' own `generate`, as ours decodes: nothing of the checkpoint's generation config filters the logits.

    Args:
        target: Whose model.
        prompts: Token ids of each.
        max_new_tokens: Per prompt; none goes beyond the context.
        temperature: 0 is greedy.
        seed: Of the draws.
        **options: Other settings of `generate`, `prompt_lookup_num_tokens` for one.

    Returns:
        New tokens of each prompt, and seconds.
    """
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
    room = [min(max_new_tokens, target.context - len(prompt)) for prompt in prompts]
    ids, mask = _padded(prompts, target)
    stops = target.stop_ids()
    own, target.model.generation_config = target.model.generation_config, GenerationConfig(eos_token_id=stops or None)
    target.model.generation_config.pad_token_id = own.pad_token_id if own is not None else None
    try:
        begun = time.perf_counter()
        out = target.model.generate(ids, attention_mask=mask, max_new_tokens=max(room), **options)
        seconds = time.perf_counter() - begun
    finally:
        target.model.generation_config = own
    rows = []
    for row, most in zip(out[:, ids.shape[1] :].tolist(), room, strict=True):  # behind a row's end stands padding
        end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
        rows.append(row[: min(end + 1, most)])
    return rows, seconds


def _padded(prompts: Sequence[Sequence[int]], target: Target) -> tuple[Tensor, Tensor]:
    """Prompts and their mask, [B, n], padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=target.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=target.device)
    return ids, mask


def answer_batch(
    decoder: Decoder,
    rule: str | Verifier,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    observer: Observer | None = None,
) -> list[Record]:
    """Answer all turns of several prompt rows together; each turn sees the rule's own answers to the turns before.

    Row b draws from seed + b; rows with more turns should come first, for a row that has ended leaves its place. The
    observer is shown one call per turn; transformers' own `generate` has nothing to show.
    """
    target = decoder.target
    tokenizer = target.chat_tokenizer
    records = [Record(row.get("task") or row.get("category") or "all", seed=seed + i) for i, row in enumerate(rows)]
    chats: list[list[dict[str, str]]] = [[] for _ in rows]
    engine, verify = (Decoder(target, NoDrafter()), "exact") if rule == "engine" else (decoder, rule)
    for turn in range(max(len(row["turns"]) for row in rows)):
        going = [i for i, row in enumerate(rows) if turn < len(row["turns"])]
        for i in going:
            chats[i].append({"role": "user", "content": rows[i]["turns"][turn]})
        prompts = [target.encode_prompt(chats[i]) for i in going]
        tagged: list[list[Token]] = [[] for _ in going]
        if rule == "autoregressive":
            outputs, seconds = autoregressive(
                target, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
            spent = Times(seconds, seconds, 0.0)
        else:
            ids, mask = _padded(prompts, target)
            out = engine.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                verify=verify,
                seed=seed,
                observer=observer,
            )
            tagged, outputs = out.rows, [[token.id for token in row] for row in out.rows]
            spent = Times(out.stats.seconds, out.stats.target_seconds, out.stats.draft_seconds)
        share = Times(*(part / len(going) for part in spent))
        for i, output, tokens in zip(going, outputs, tagged, strict=True):
            records[i].add(output, tokens, share)
            chats[i].append({"role": "assistant", "content": written(tokenizer, output)})
    return records


def warm_up(
    decoder: Decoder,
    rule: str | Verifier,
    batches: Sequence[Sequence[dict[str, Any]]],
    *,
    max_new_tokens: int,
    **options: Any,
) -> None:
    """Answer batches of prompt rows as `answer_batch` does, uncounted, before anything is timed.

    A few tokens of the first one are enough, unless every size of tree and cache has a graph of its own to record: then all
    that run through graphs, the single prompts of ours, are answered in full.
    """
    how = decoder.target.compiled
    graphs = how is not None and how.static and rule != "autoregressive"
    alone = [rows for rows in batches if len(rows) == 1]
    if graphs and alone:
        for rows in alone:
            answer_batch(decoder, rule, rows, max_new_tokens=max_new_tokens, **options)
    else:
        opening = [{**row, "turns": row["turns"][:1]} for row in batches[0]]
        answer_batch(decoder, rule, opening, max_new_tokens=_WARM_UP_TOKENS, **options)


def answer(decoder: Decoder, rule: str | Verifier, row: dict[str, Any], **options: Any) -> Record:
    """`answer_batch` on one prompt row."""
    return answer_batch(decoder, rule, [row], **options)[0]


def compare(
    pairs: Sequence[tuple[Decoder, str | Verifier]],
    prompts: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    label: str,
    between: Callable[[], None] | None = None,
) -> list[list[Record]]:
    """Records of greedy answers by decoder with its rule, and by prompt.

    All answer a prompt before the next one comes, so that drift hits them alike; `between` is called behind each.
    """
    if max_new_tokens < 1:
        raise SlipstreamError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    for decoder, rule in pairs:
        warm_up(decoder, rule, [[row] for row in prompts], max_new_tokens=max_new_tokens)
    records: list[list[Record]] = [[] for _ in pairs]
    with progress(label, len(pairs) * len(prompts), "answers") as advance:
        for row in prompts:
            for place, (decoder, rule) in zip(records, pairs, strict=True):
                place.append(answer(decoder, rule, row, max_new_tokens=max_new_tokens))
                advance()
            if between is not None:
                between()
    return records


def interval(base: Sequence[Record], ours: Sequence[Record], seed: int) -> tuple[float, list[float] | None]:
    """Ratio of pooled tokens per second, and its 95 % interval: paired bootstrap over prompts, or over batches of them.

    A single one has no interval; so with `mean_interval`.
    """
    batches: dict[object, np.ndarray] = {}
    for i, (b, o) in enumerate(zip(base, ours, strict=True)):
        key = ("alone", i) if o.batch is None else o.batch
        batches[key] = batches.get(key, 0) + np.array([b.tokens, b.seconds, o.tokens, o.seconds])
    data = np.array(list(batches.values()))

    def ratio(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 2] / sums[..., 3]) / (sums[..., 0] / sums[..., 1])

    bounds = _bounds(ratio(_resampled(data, seed)), 3) if len(data) > 1 else None
    return float(ratio(data.sum(0))), bounds


def mean_interval(values: Sequence[float], weights: Sequence[float], seed: int) -> tuple[float, list[float] | None]:
    """Sum of `values` over sum of `weights`, one of each per prompt, and the 95 % interval: bootstrap over prompts.

    There is no interval where so few prompts have a weight that a draw of prompts may have none.
    """
    data = np.array([values, weights], float).T
    sums = _resampled(data, seed)
    bounds = _bounds(sums[:, 0] / sums[:, 1], 4) if len(data) > 1 and sums[:, 1].all() else None
    return float(data[:, 0].sum() / data[:, 1].sum()), bounds


def _resampled(data: np.ndarray, seed: int) -> np.ndarray:
    """Column sums [S, C] of S samples of the rows of `data` [N, C], drawn with replacement."""
    picks = np.random.default_rng(seed).integers(len(data), size=(_BOOTSTRAP, len(data)))
    return data[picks].sum(1)


def _bounds(values: np.ndarray, digits: int) -> list[float]:
    return [round(float(v), digits) for v in np.quantile(values, [0.025, 0.975])]


def by_position(lengths: Sequence[int]) -> list[float]:
    """Share of rounds in which at least 1, 2, .. drafts were accepted; a round of length n accepted n - 1.

    An answer's last round counts likewise, though it may have been cut short on a draft.
    """
    counts = np.bincount(lengths, minlength=2)
    reached = counts[::-1].cumsum()[::-1] / max(1, len(lengths))
    return [round(float(v), 4) for v in reached[2:]]


def by_task(records: list[list[Record]]) -> dict[str, list[list[Record]]]:
    """The records of `compare` by task: `all` first, then each task and what it belongs to, where there are several."""
    tasks = dict.fromkeys(r.task for r in records[0])
    names = ["all"]
    for task in tasks:
        parts = task.split("/")
        names += ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return {
        name: [[r for r in group if name == "all" or f"{r.task}/".startswith(f"{name}/")] for group in records]
        for name in dict.fromkeys(names if len(tasks) > 1 else names[:1])
    }


def result_rows(
    decoder: Decoder,
    rules: Sequence[str | Verifier],
    records: list[list[Record]],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    identical: dict[str, bool] | None = None,
) -> list[dict[str, Any]]:
    """Rows of `results.json` from the records of `compare`; the first two rules must be the baselines.

    Each category is a task of its own where there are several; the task `all` pools them and comes first.
    """
    out = []
    for task, chosen in by_task(records).items():
        for rule, group in zip(rules, chosen, strict=True):
            verifier = decoder.policy.rule(rule) if rule not in BASELINES else Verifier()
            name = rule if isinstance(rule, str) else verifier.label
            tokens, seconds = sum(r.tokens for r in group), sum(r.seconds for r in group)
            lengths = [n for r in group for n in r.accept_lengths]
            target, draft = sum(r.target_seconds for r in group), sum(r.draft_seconds for r in group)
            speedup, span = interval(chosen[0], group, seed)
            out.append(
                {
                    "task": task,
                    "rule": name,
                    "temperature": temperature,
                    "verifier": None if name in BASELINES else verifier.to_dict(),
                    "lossless": verifier.lossless,
                    "prompts": len(group),
                    "tokens": tokens,
                    "tokens_per_second": round(tokens / seconds, 2),
                    "speedup": round(speedup, 3),
                    "speedup_ci95": span,
                    "speedup_engine": round(interval(chosen[1], group, seed)[0], 3),
                    "acceptance_length": round(float(np.mean(lengths)), 3) if lengths else 1.0,
                    "acceptance_by_position": by_position(lengths) if lengths else [],
                    "relaxed_share": round(sum(r.relaxed for r in group) / tokens, 4),
                    "mean_regret_nats": round(sum(r.regret for r in group) / tokens, 5),
                    "mean_output_tokens": round(tokens / len(group), 2),
                    "identical_to_target": (identical or {}).get(name),
                    "time_split": {
                        "target": round(target, 2),
                        "draft": round(draft, 2),
                        "rest": round(seconds - target - draft, 2),
                    },
                }
            )
    return out


def identical_outputs(records: list[list[Record]], names: Sequence[str]) -> dict[str, bool]:
    """Whether each rule gave `generate`'s tokens on every prompt (records of one run, the first rule autoregressive)."""
    reference = [r.outputs for r in records[0]]
    return {name: [r.outputs for r in group] == reference for name, group in zip(names, records, strict=True)}


def simulated_acceptance_length(
    head: DraftHead, target: Target, answers: Sequence[tuple[list[int], list[int]]], steps: int
) -> float:
    """tau that the training-time unroll foresees for chains of `steps` drafts on given (prompt, output) token ids.

    Each output is walked as decoding would: a round that starts at row p and keeps a drafts emits a+1 tokens, and the
    next starts at row p+a+1. The first token comes from the prompt's own forward and belongs to no round.
    """
    emitted = rounds = 0
    for prompt, output in answers:
        ids = torch.tensor([prompt + output], device=target.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, len(prompt) :] = True
        with torch.no_grad():
            out = unroll(head, target, ids, mask, scale=torch.ones(steps, device=ids.device), objective=forward_kl)
        keeps = dict(zip(out.positions[1].tolist(), out.accepted.tolist(), strict=True))
        row, end = len(prompt) - 1, len(prompt) + len(output) - 2  # row p predicts token p+2
        while row < end:
            step = min(keeps[row] + 1, end - row)
            emitted, rounds, row = emitted + step, rounds + 1, row + step
    return emitted / max(1, rounds)
