"""Task scores of answers: HumanEval's tests, GSM8K's final number, ROUGE-L against a reference."""

from __future__ import annotations

import ast
import re
import warnings
from decimal import Decimal
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from slipstream.configs.progress import progress
from slipstream.decode.evaluate import mean_interval
from slipstream.decode.sandbox import run_program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.decode.evaluate import Record
    from slipstream.distill.target import Target

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?\d[\d,]*(?:\.\d+)?")
_FINAL = re.compile(rf"####[ \t]*({_NUMBER.pattern})\.?\s*$", re.MULTILINE)
_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_FUTURE = re.compile(r"^from __future__ import (?:\([^)]*\)|.*)", re.MULTILINE)
_WORD = re.compile(r"[^\W_]+")


def score(row: dict[str, Any], turns: Sequence[str]) -> dict[str, float]:
    """The score of one answer under its name, between 0 and 1.

    `pass@1` where the row has a test (one answer, so 0 or 1); `final_number` where the references end as GSM8K's do
    (`#### 42`); `rouge_l` otherwise, the mean over turns.
    """
    if "test" in row:
        return {"pass@1": float(run_program(program(row, turns[0])).passed)}
    pairs = list(zip(row["reference"], turns, strict=False))
    if all("####" in reference for reference, _ in pairs):
        hits = [(number := final_number(text)) is not None and number == final_number(given) for given, text in pairs]
        return {"final_number": sum(hits) / len(hits)}
    return {"rouge_l": sum(rouge_l(reference, text) for reference, text in pairs) / len(pairs)}


def score_records(target: Target, prompts: Sequence[dict[str, Any]], groups: Sequence[Sequence[Record]]) -> None:
    """Set `scores` of every record of each group (one record per prompt); equal answers are scored once.

    Args:
        target: Whose tokens the answers are.
        prompts: Rows that can be scored.
        groups: The records.
    """
    tokenizer = target.chat_tokenizer
    with progress("score", len(prompts), "prompts") as advance:
        for i, row in enumerate(prompts):
            known: dict[tuple[str, ...], dict[str, float]] = {}
            for group in groups:
                texts = tuple(group[i].texts(tokenizer))
                if texts not in known:
                    known[texts] = score(row, texts)
                group[i].scores = known[texts]
            advance()


def score_means(base: Sequence[Record], ours: Sequence[Record], seed: int) -> dict[str, dict[str, Any]]:
    """Each score's mean with its 95 % interval over prompts, its paired difference to `base`, and answer lengths."""
    out = {}
    for name in dict.fromkeys(name for r in ours for name in r.scores):
        pairs = [(b, o) for b, o in zip(base, ours, strict=True) if name in o.scores]
        ones = [1.0] * len(pairs)
        mean, span = mean_interval([o.scores[name] for _, o in pairs], ones, seed)
        change, change_span = mean_interval([o.scores[name] - b.scores[name] for b, o in pairs], ones, seed)
        out[name] = {
            "mean": round(mean, 4),
            "ci95": span,
            "difference": round(change, 4),
            "difference_ci95": change_span,
            "prompts": len(pairs),
            "mean_output_tokens": round(sum(o.tokens for _, o in pairs) / len(pairs), 2),
        }
    return out


def recovery(base: Sequence[Record], ours: Sequence[Record], seed: int) -> tuple[float, list[float] | None]:
    """The score of `ours`, all prompts together, as a share of that of `base`; and its 95 % interval, paired by prompt."""
    kept, given = ([sum(r.scores.values()) for r in records] for records in (ours, base))
    return mean_interval(kept, given, seed)


def program(row: dict[str, Any], text: str) -> str:
    """HumanEval's program: the prompt, the completion, the test, and its call.

    Of a chat answer the completion is the first code block that defines the function, after what earlier blocks define
    and after the prompt's text up to the function; else the first block, else all of it, after the whole prompt.
    """
    defines = re.compile(rf"^(?:async )?def {re.escape(row['entry_point'])}\b", re.MULTILINE)
    blocks = _FENCE.findall(text)
    whole = [dedent(block) for block in blocks]
    at = next((i for i, block in enumerate(whole) if defines.search(block)), None)
    if at is None:
        parts = [row["prompt"], blocks[0] if blocks else text]
    else:
        parts = [defines.split(row["prompt"], maxsplit=1)[0], *map(_definitions, whole[:at]), whole[at]]
    code = "\n".join(parts)
    first = "\n".join(_FUTURE.findall(code))  # Python wants them before anything else
    return f"{first}\n{_FUTURE.sub('', code)}\n{row['test']}\ncheck({row['entry_point']})\n"


def _definitions(block: str) -> str:
    """What a block imports and defines, literals among it; nothing of what it would run, or if it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "\n".join(ast.unparse(statement) for statement in ast.parse(block).body if _defines(statement))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""


def _defines(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign):
        return not any(isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) for node in ast.walk(statement))
    return isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def final_number(text: str) -> Decimal | None:
    """The number after the last `####` with nothing but a number to the end of its line, else the last number.

    `####` before anything else is a heading of Markdown. None where there is no number.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    found = _FINAL.findall(text) or _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def rouge_l(reference: str, text: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), lower case, without stemming."""
    ours, theirs = _WORD.findall(text.lower()), _WORD.findall(reference.lower())
    if not ours or not theirs:
        return 0.0
    lengths = [0] * (len(theirs) + 1)  # of the longest common subsequence with the first words of the reference
    for word in ours:
        above_left = 0
        for j, other in enumerate(theirs, 1):
            above = lengths[j]
            lengths[j] = above_left + 1 if word == other else max(above, lengths[j - 1])
            above_left = above
    return 2 * lengths[-1] / (len(ours) + len(theirs))
