"""Watching an engine at work, and writing down what it does: `record` makes a trace."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_through
from slipstream.decode.evidence import LogitEvidence
from slipstream.decode.trace import KEY, LISTS, PATH, ROUND, Header, fingerprint
from slipstream.decode.verify import TAGS, Spent
from slipstream.distill.store import weights_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import GenerationConfig, LogitsProcessorList

    from slipstream.decode.engine import Decoder
    from slipstream.decode.tree import Tree
    from slipstream.decode.verify import Verdict, Verifier

_BATCH = 1024  # rounds written at once


class Observer:
    """Shown what an engine does, round by round; by itself it lets everything pass."""

    def begin(
        self,
        rows: int,
        verifier: Verifier,
        never_relax: Tensor,
        config: GenerationConfig,
        processors: LogitsProcessorList,
    ) -> None:
        """A call begins, with so many prompts."""

    def round(
        self,
        places: Sequence[int],
        tree: Tree,
        logits: Tensor,
        verdict: Verdict,
        seconds: tuple[float, float, float],
    ) -> None:
        """A round has been verified; the first of a call is the prompts' own forward.

        Args:
            places: Which row of the call each row of the batch is.
            tree: What was drafted, N nodes per row.
            logits: The target's raw logits at the nodes, [B, N, V].
            verdict: What was kept.
            seconds: In the drafter, in the target, and in all else since the round before.
        """


class Recorder(Observer):
    """An observer that writes what it sees; made by `record`."""

    def __init__(self, file: BinaryIO, decoder: Decoder, top: int, draft: str | None) -> None:
        if top < 2:
            raise SlipstreamError(f"a trace keeps at least the 2 largest logits of a node, not {top}")
        self._file = file
        self._decoder = decoder
        self._draft = draft or fingerprint(decoder.drafter)
        self._weights = weights_fingerprint(decoder.target)
        self._top = min(top, decoder.target.vocab_size)
        self._writer: pa.RecordBatchFileWriter | None = None
        self._header: Header | None = None
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in (*ROUND, *LISTS)}
        self._nodes: list[int] = []  # nodes of each round not written yet
        self._emitted: list[int] = []
        self._first = self._requests = self._round = 0
        self._spent: list[Spent] = []
        self.rounds = 0

    def begin(
        self,
        rows: int,
        verifier: Verifier,
        never_relax: Tensor,
        config: GenerationConfig,
        processors: LogitsProcessorList,
    ) -> None:
        """A call begins; all calls of a trace are of one rule and temperature.

        Raises:
            SlipstreamError: If this one is of another, or is greedy with logits processors, which a trace does not hold.
        """
        if processors and not config.do_sample:
            name = type(processors[0]).__name__
            raise SlipstreamError(f"a trace holds the target's raw logits; {name} cannot be recorded")
        policy = self._decoder.policy.to_dict()
        header = Header(
            target=self._decoder.target.name,
            weights=self._weights,
            draft=self._draft,
            dtype=str(self._decoder.target.dtype).removeprefix("torch."),
            think=self._decoder.target.think,
            policy={name: policy[name] for name in ("tree", "speculation")},
            rule=verifier.to_dict(),
            temperature=float(config.temperature or 1.0) if config.do_sample else 0.0,
            never_relax=never_relax.tolist(),
            top=self._top,
        )
        if self._header is None:
            self._header = header
            metadata = {KEY: json.dumps(asdict(header)).encode()}
            lists = [pa.field(name, pa.list_(kind)) for name, kind in LISTS.items()]
            self._schema = pa.schema([*ROUND.items(), *lists], metadata=metadata)
            self._writer = pa.ipc.new_file(self._file, self._schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        elif header != self._header:
            ours, theirs = asdict(self._header), asdict(header)
            name = next(name for name in ours if ours[name] != theirs[name])
            raise SlipstreamError(
                f"a trace holds runs of one kind: it began with {name} {ours[name]}, not {theirs[name]}"
            )
        self._first, self._requests, self._round = self._requests, self._requests + rows, 0
        self._spent = [Spent() for _ in range(rows)]

    def round(
        self,
        places: Sequence[int],
        tree: Tree,
        logits: Tensor,
        verdict: Verdict,
        seconds: tuple[float, float, float],
    ) -> None:
        """Keep a round of every row."""
        evidence = LogitEvidence(tree, logits)
        logits, best = logits.topk(self._top)
        # Of equal logits the one decided on comes first.
        best = torch.where(best == evidence.decided[..., None], best[..., :1], best)
        best[..., 0] = evidence.decided
        rows, nodes = tree.tokens.shape
        spent = [self._spent[place] for place in places]
        node = {
            "tokens": tree.tokens,
            "parents": tree.parents,
            "scores": tree.scores,
            "own": evidence.own,
            "total": evidence.total,
            "entropy": evidence.entropy,
            "best_tokens": best,
            "best_logits": logits.float(),
        }
        flat = [token for tokens in verdict.tokens for token in tokens]
        values: dict[str, Any] = {
            "request": [self._first + place for place in places],
            "round": [self._round] * rows,
            "levels": [tree.levels] * rows,
            "spent_relaxed": [mine.relaxed for mine in spent],
            "spent_regret": [mine.regret for mine in spent],
            **{name: [value] * rows for name, value in zip(list(ROUND)[-3:], seconds, strict=True)},
            **{name: value.flatten().cpu() for name, value in node.items()},
            "path": [place for path in verdict.paths for place in path],
            "emitted": [token.id for token in flat],
            "tags": [TAGS.index(token.tag) for token in flat],
        }
        for name, kind in (ROUND | LISTS).items():
            self._columns[name].append(np.asarray(values[name]).astype(kind.to_pandas_dtype()))
        self._nodes += [nodes] * rows
        self._emitted += map(len, verdict.tokens)
        for mine, tokens in zip(spent, verdict.tokens, strict=True):
            mine.add(tokens)
        self._round += 1
        self.rounds += rows
        if len(self._nodes) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        assert self._writer is not None
        joined = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        arrays = [pa.array(joined[name]) for name in ROUND]
        for name in LISTS:
            sizes = np.array(self._emitted if name in PATH else self._nodes)
            sizes = sizes * self._top if name.startswith("best_") else sizes
            offsets = pa.array(np.concatenate([[0], sizes.cumsum()]).astype(np.int32))
            arrays.append(pa.ListArray.from_arrays(offsets, pa.array(joined[name])))
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._columns = {name: [] for name in self._columns}
        self._nodes, self._emitted = [], []

    def close(self) -> None:
        """Write what is left.

        Raises:
            SlipstreamError: If nothing was recorded.
        """
        if self._writer is None or not self.rounds:
            raise SlipstreamError("nothing was recorded: no prompt was answered with this observer")
        if self._nodes:
            self._flush()
        self._writer.close()


@contextlib.contextmanager
def record(path: Path, decoder: Decoder, top: int = 4, draft: str | None = None) -> Iterator[Recorder]:
    """An observer for `decoder.generate(..., observer=)`; the file is there when the block has ended well.

    Args:
        path: The trace to write.
        decoder: Who will be observed.
        top: Largest logits kept of every node: a relaxed rule of rank r needs r of them.
        draft: The drafter's fingerprint, where it is known already: of a large head it takes seconds.
    """
    with write_through(path) as file:
        recorder = Recorder(file, decoder, top, draft)
        yield recorder
        recorder.close()
