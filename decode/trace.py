"""Every round of a run in an Arrow file: what was drafted, what the target thought of it, what was kept, how long it took."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_through
from slipstream.decode.drafters import HeadDrafter, ModelDrafter
from slipstream.decode.tree import Tree, TreeShape, make_tree
from slipstream.decode.verify import Spent, Verifier
from slipstream.distill.store import weights_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from slipstream.decode.drafters import Drafter
    from slipstream.decode.engine import Decoder

VERSION = 3
KEY = b"slipstream.trace"

ROUND = {  # columns with one value a round
    "request": pa.int32(),
    "round": pa.int32(),
    "levels": pa.uint8(),
    "spent_relaxed": pa.int32(),
    "spent_regret": pa.float64(),
    "draft_seconds": pa.float32(),
    "target_seconds": pa.float32(),
    "rest_seconds": pa.float32(),
}
NODE = {  # one a node; of the last two, `top` a node
    "tokens": pa.int32(),
    "parents": pa.uint16(),
    "scores": pa.float32(),
    "own": pa.float32(),
    "total": pa.float32(),
    "entropy": pa.float32(),
    "best_tokens": pa.int32(),
    "best_logits": pa.float32(),
}
PATH = {"path": pa.uint16(), "emitted": pa.int32(), "tags": pa.uint8()}  # one an emitted token
LISTS = NODE | PATH


@dataclass(frozen=True)
class Header:
    """What a trace was recorded with.

    Attributes:
        target: Name of the target.
        weights: Fingerprint of its weights.
        draft: Fingerprint of the drafter.
        dtype: Of the target.
        think: What the target's chat template was told about thinking; None is nothing.
        policy: Tree and speculation schedule, as in `decode.json`.
        rule: The verification rule, as in `decode.json`.
        temperature: 0 where decoding was greedy.
        never_relax: Tokens that only pass exactly.
        top: Largest logits kept of every node.
        version: Of the format.
    """

    target: str
    weights: str
    draft: str
    dtype: str
    think: bool | None
    policy: dict[str, Any]
    rule: dict[str, Any]
    temperature: float
    never_relax: list[int]
    top: int
    version: int = VERSION

    @property
    def tree(self) -> TreeShape:
        """The tree that was drafted."""
        return TreeShape(**self.policy["tree"])

    @property
    def verifier(self) -> Verifier:
        """The rule that was applied."""
        return Verifier.from_dict(self.rule)


def fingerprint(drafter: Drafter) -> str:
    """Tells one draft from another: a hash of its weights in bf16, or its kind and settings where it has none."""
    module = None
    if isinstance(drafter, HeadDrafter):
        module = drafter.head
    elif isinstance(drafter, ModelDrafter):
        module = drafter.model.model
    if module is None:
        return repr(drafter) if is_dataclass(drafter) else type(drafter).__name__
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        bits = value.bfloat16().view(torch.int16) if value.is_floating_point() else value
        digest.update(bits.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TraceEvidence:
    """Evidence as a trace holds it: greedy, and of the few largest logits only (`evidence.Evidence` has the shapes)."""

    own: Tensor
    total: Tensor
    entropy: Tensor
    decided: Tensor
    logits: Tensor  # the largest of each node, [R, N, top]

    @property
    def top(self) -> Tensor:
        """The largest logit, [R, N]."""
        return self.logits[..., 0]

    def best(self, count: int) -> Tensor:
        """The `count` largest logits, [R, N, count].

        Raises:
            SlipstreamError: If the trace holds fewer.
        """
        held = self.logits.shape[-1]
        if count > held:
            raise SlipstreamError(
                f"the rule looks at the {count} largest logits of a node, the trace holds {held}: record it with more"
            )
        return self.logits[..., :count]

    def margins(self, path: Tensor) -> Tensor:
        """z1 - z2 at the nodes `path` [R, D]."""
        return (self.logits[..., 0] - self.logits[..., 1]).gather(1, path)

    def at(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """Logits of the tokens that end a round: greedily, the largest."""
        return self.top.gather(1, nodes[:, None])[:, 0]


@dataclass(frozen=True)
class Rounds:
    """R rounds of a trace. Rows with fewer nodes than N are filled with children of the root whose token is -1.

    Attributes:
        tree: What was drafted; `levels` is the most of all rows.
        levels: Levels drafted in each round, [R].
        evidence: What the target thought of it.
        request: Which request each round belongs to, [R].
        round: Its number there, [R]; round 0 is the prompt's own forward.
        spent: What the request had used of its budgets before.
        seconds: In the drafter, in the target and in all else, [R, 3]; those of the whole batch it was decoded in.
        counts: Tokens emitted, the end of a request not cut yet, [R].
        path: Nodes accepted, the root first, [R, D], -1 behind the counts.
        emitted: Tokens, the bonus last, [R, D], -1 behind the counts.
        tags: 0 exact, 1 relaxed, 2 bonus, [R, D], -1 behind the counts.
    """

    tree: Tree
    levels: Tensor
    evidence: TraceEvidence
    request: Tensor
    round: Tensor
    spent: list[Spent]
    seconds: Tensor
    counts: Tensor
    path: Tensor
    emitted: Tensor
    tags: Tensor


@dataclass(frozen=True)
class Trace:
    """A trace on disk; open one with `Trace.open`."""

    path: Path
    header: Header
    _reader: pa.RecordBatchFileReader = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, decoder: Decoder | None = None) -> Trace:
        """Open a trace, to be used with a decoder.

        Raises:
            SlipstreamError: If it is missing, no trace of this format, or of another target, draft, dtype or `think`.
        """
        if not path.is_file():
            raise SlipstreamError(f"trace {str(path)!r} does not exist")
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            metadata = (reader.schema.metadata or {}).get(KEY)
        except (pa.ArrowException, OSError) as error:
            raise SlipstreamError(f"{path} is not a trace, or not a whole one") from error
        if metadata is None:
            raise SlipstreamError(f"{path} is not a trace of slipstream")
        try:
            data = json.loads(metadata)
            version = data["version"]
            header = Header(**{f.name: data.get(f.name) for f in fields(Header)})
        except (ValueError, KeyError, TypeError) as error:
            raise SlipstreamError(f"{path} is damaged: its header cannot be read; record it again") from error
        if version != VERSION:
            raise SlipstreamError(
                f"{path} is a trace of format {version}, this version reads {VERSION}; record it again"
            )
        if decoder is not None:
            _require_same(path, header, decoder)
        return cls(path, header, reader)

    def __len__(self) -> int:
        return sum(self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches))

    def mean_tokens(self) -> float:
        """Tokens emitted per request, the ends of requests not cut."""
        tokens = requests = 0
        for rounds in self.rounds():
            tokens += int(rounds.counts.sum())
            requests += int((rounds.round == 0).sum())
        return tokens / requests

    def rounds(self) -> Iterator[Rounds]:
        """All rounds in the order they were recorded, some at a time.

        Raises:
            SlipstreamError: If a part of the file cannot be read.
        """
        for i in range(self._reader.num_record_batches):
            try:
                batch = self._reader.get_batch(i)
                batch.validate(full=True)  # a length that is wrong may end the whole process
                rounds = _read(batch, self.header.top)
            except (pa.ArrowException, OSError, KeyError, ValueError, RuntimeError) as error:
                raise SlipstreamError(f"{self.path} is damaged in part {i}; record it again") from error
            yield rounds


def join(path: Path, parts: Sequence[tuple[Path, Sequence[int]]]) -> None:
    """Write several traces as one.

    Args:
        path: The trace to write.
        parts: Each trace with the numbers that its requests get.

    Raises:
        SlipstreamError: If one is missing, or was recorded with other settings than the first.
    """
    first = Trace.open(parts[0][0])
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with write_through(path) as file, pa.ipc.new_file(file, first._reader.schema, options=options) as writer:
        for place, numbers in parts:
            part = Trace.open(place)
            if part.header != first.header:
                raise SlipstreamError(f"{place} was recorded with other settings than {parts[0][0]}; they do not join")
            for i in range(part._reader.num_record_batches):
                batch = part._reader.get_batch(i)
                requests = pa.array(np.take(numbers, batch.column("request").to_numpy()), ROUND["request"])
                writer.write_batch(batch.set_column(0, batch.schema.field("request"), requests))


def _require_same(path: Path, header: Header, decoder: Decoder) -> None:
    target = decoder.target
    if header.weights != weights_fingerprint(target):
        raise SlipstreamError(
            f"{path} was recorded with target {header.target}, of other weights than {target.name} has; record it again"
        )
    here = {
        "draft": fingerprint(decoder.drafter),
        "dtype": str(target.dtype).removeprefix("torch."),
        "think": target.think,
    }
    for name, ours in here.items():
        theirs = asdict(header)[name]
        if theirs != ours:
            raise SlipstreamError(
                f"{path} was recorded with {name} {_word(theirs)}, not {_word(ours)}; record it again"
            )


def _word(value: str | bool | None) -> str:
    """A setting as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _read(batch: pa.RecordBatch, top: int) -> Rounds:
    def of_round(name: str) -> Tensor:
        return torch.from_numpy(batch.column(name).to_numpy(zero_copy_only=False).astype(_numpy(ROUND[name])))

    def padded(name: str, fill: float, width: int = 1) -> Tensor:
        """A list column as [R, most] or [R, most, width]."""
        column = batch.column(name)
        sizes = torch.from_numpy(np.diff(column.offsets.to_numpy()).astype(np.int64)) // width
        flat = torch.from_numpy(column.flatten().to_numpy().astype(_numpy(LISTS[name])))
        out = flat.new_full((len(sizes), int(sizes.max()), width), fill)
        out[torch.arange(out.shape[1]) < sizes[:, None]] = flat.view(-1, width)
        return out if width > 1 else out[..., 0]

    levels = of_round("levels")
    tree = make_tree(padded("tokens", -1), padded("parents", 0), padded("scores", -torch.inf), int(levels.max()))
    path = padded("path", -1)
    spent = zip(of_round("spent_relaxed").tolist(), of_round("spent_regret").tolist(), strict=True)
    return Rounds(
        tree=tree,
        levels=levels,
        evidence=TraceEvidence(
            own=padded("own", -torch.inf),
            total=padded("total", 0.0),
            entropy=padded("entropy", 0.0),
            decided=padded("best_tokens", 0, top)[..., 0],
            logits=padded("best_logits", 0.0, top),
        ),
        request=of_round("request"),
        round=of_round("round"),
        spent=[Spent(relaxed, regret) for relaxed, regret in spent],
        seconds=torch.stack([of_round(name) for name in list(ROUND)[-3:]], 1),
        counts=(path >= 0).sum(1),
        path=path,
        emitted=padded("emitted", -1),
        tags=padded("tags", -1),
    )


def _numpy(kind: pa.DataType) -> type:
    """What torch computes with: 64-bit integers, floats as they are."""
    return kind.to_pandas_dtype() if pa.types.is_floating(kind) else np.int64
