"""Conversations as what a head learns from: token ids with the assistant's mask, in an Arrow file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic
from slipstream.configs.progress import console, progress
from slipstream.data.messages import normalize
from slipstream.data.sources import read
from slipstream.data.template import render, require_generation_prompt, thinking

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from slipstream.configs.recipe import DataSettings
    from slipstream.data.sources import Source

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "mask": List(Value("bool")),
        "left_out": Value("string"),  # where the row lies and why nothing is learned from it; else empty
        "malformed": Value("bool"),
    }
)
_EARLY = 1000  # rows before which a share of malformed ones says little
_NAMED = 3  # rows a message names


def load(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The token rows (see `tokenize`) of a recipe's conversations."""
    return tokenize(
        read(settings.conversations, stream=settings.stream),
        tokenizer,
        settings.max_length,
        think=settings.think,
        malformed=settings.malformed,
    )


def tokenize(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    think: bool | None = None,
    malformed: float = 0.05,
) -> Dataset:
    """Rows of `input_ids` and `mask` (true on the assistant's tokens), cut at `max_length`; rows that teach nothing go.

    The sources are read once, row by row; the tokens go to an Arrow file in the cache of `datasets`, which is mapped
    into memory, not loaded, and is found again as long as sources, tokenizer and settings stay what they are.

    Args:
        sources: What `read` opened.
        tokenizer: With the target's chat template.
        max_length: Longer conversations are cut, tokens.
        think: Whether the template is told that the answers think; None tells it nothing.
        malformed: Share of the rows that may be malformed; they are named, counted and left out.

    Raises:
        SlipstreamError: If a source cannot be read, more rows are malformed, rows were made with another `think`, the
            template has no generation prompt or no switch for thinking, or no row has an assistant turn.
    """
    options = thinking(tokenizer, think)
    require_generation_prompt(tokenizer, **options)

    def token_rows() -> Iterator[dict[str, Any]]:
        left_out: list[str] = []
        seen = 0
        with progress("tokenize", None, "rows") as advance:
            for source in sources:
                for number, row in source.rows():
                    seen += 1
                    place = f"{source.name} row {number}"
                    _require_think(row, think, place)
                    tokens = _token_row(row, place, tokenizer, max_length, options)
                    if tokens["malformed"]:
                        left_out.append(tokens["left_out"])
                    if seen >= _EARLY:
                        _require_share(left_out, seen, malformed)
                    yield tokens
                    advance()
        if not seen:
            raise SlipstreamError(f"{', '.join(source.name for source in sources)}: no conversations")

    code = [(Path(__file__).parent / name).read_text() for name in ("conversations.py", "messages.py", "template.py")]
    made_of = [tokenizer, max_length, think, [source.identity for source in sources], code]
    try:
        rows = Dataset.from_generator(token_rows, features=_FEATURES, fingerprint=Hasher.hash(made_of))
    except DatasetGenerationError as error:  # hides what the generator raised
        raise error.__cause__ or error from None
    return _kept(rows, max_length, malformed).with_format("numpy")


def _token_row(
    row: Any, place: str, tokenizer: PreTrainedTokenizerBase, max_length: int, options: dict[str, bool]
) -> dict[str, Any]:
    """One row of `_FEATURES`; an answer that was cut short (`finished` false) has no end-of-turn token to teach."""
    try:
        messages = normalize(row)
        finished = row.get("finished") is not False
        rendered = render(tokenizer, messages, finished=finished, max_length=max_length, **options)
    except SlipstreamError as error:
        return {"input_ids": [], "mask": [], "left_out": f"{place}: {error}", "malformed": True}
    ids, mask = rendered.input_ids[:max_length], rendered.assistant_mask[:max_length]
    if sum(mask) < 2:
        return {"input_ids": [], "mask": [], "left_out": place, "malformed": False}
    return {"input_ids": ids, "mask": mask, "left_out": "", "malformed": False}


def _require_think(row: Any, think: bool | None, place: str) -> None:
    """Our answers say how they were made; other people's rows say nothing, or something else."""
    said = row.get("think", think) if isinstance(row, dict) else think
    if said != think and (said is None or isinstance(said, bool)):
        raise SlipstreamError(
            f"{place}: this answer was made with think {json.dumps(said)}, but data.think is {json.dumps(think)}; "
            "they must be the same"
        )


def _require_share(left_out: Sequence[str], rows: int, malformed: float) -> None:
    if len(left_out) > malformed * rows:
        raise SlipstreamError(
            f"{len(left_out):,} of {rows:,} rows are malformed, more than data.malformed ({malformed:g}): "
            f"{'; '.join(left_out[:_NAMED])}"
        )


def _kept(rows: Dataset, max_length: int, malformed: float) -> Dataset:
    """The rows that teach something; says which others there were."""
    table = rows.data.table
    out = pyarrow.compute.not_equal(table["left_out"], "")
    bad = table["left_out"].filter(table["malformed"]).to_pylist()
    empty = table["left_out"].filter(pyarrow.compute.and_not(out, table["malformed"])).to_pylist()
    _require_share(bad, len(rows), malformed)
    if len(bad) + len(empty) == len(rows):
        raise SlipstreamError(
            f"no conversation has an assistant turn within {max_length} tokens (data.max_length); "
            "nothing can be learned from them"
        )
    for places, why in ((bad, "are malformed"), (empty, f"have no assistant turn within {max_length} tokens")):
        if places:
            named = "; ".join(places[:_NAMED]) + ("; ..." if len(places) > _NAMED else "")
            note = f"{len(places):,} of {len(rows):,} rows {why} and are left out: {named}"
            console.print(note, markup=False, soft_wrap=True)
    tokens = rows.select_columns(["input_ids", "mask"])
    if bad or empty:
        taught = pyarrow.compute.indices_nonzero(pyarrow.compute.invert(out))
        tokens = tokens.select(taught.cast("int64").to_numpy())
    return tokens


def pack(journal: Path, out: Path) -> None:
    """A journal of conversations as a small Parquet file (zstd), without the journal's own columns; ids are texts there.

    Raises:
        SlipstreamError: If the journal holds no conversation.
    """
    text = journal.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]  # not splitlines: a row may hold U+2028
    if not rows:
        raise SlipstreamError(f"{journal} holds no conversation; {out} is not written")
    keep = ("id", "category", "messages", "temperature", "think", "finished", "tokens")
    columns = {name: [row.get(name) for row in rows] for name in keep if any(name in row for row in rows)}
    if "id" in columns:
        columns["id"] = [str(name) for name in columns["id"]]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, compression="zstd", compression_level=19)
    write_atomic(out, buffer.getvalue())
