"""Commands that make text: `synthesize`, `regenerate`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import require_writable

_DISK_MB = 1


def _require_file(out: Path, *suffixes: str) -> None:
    """Make sure that `out` names a file that can be written."""
    if suffixes and out.suffix not in suffixes:
        raise SlipstreamError(f"--out must end in {' or '.join(suffixes)}, not {out.name!r}")
    if out.is_dir():
        raise SlipstreamError(f"--out must be a file, {out} is a folder")
    require_writable(out.parent, _DISK_MB)


def _name(target: str, adapter: str | None) -> str:
    """What a journal knows the target by."""
    return target if adapter is None else f"{target} with {adapter}"


def synthesize(
    out: Path,
    target: str = "smollm2-135m-instruct",
    topics: int = 1000,
    own: int = 500,
    seed: int = 1,
    device: str | None = None,
    adapter: str | None = None,
) -> None:
    """Write prompts: sampled from the target, and crossed from the topics that ship with the package.

    Args:
        out: JSONL file of Spec-Bench rows.
        target: Who writes the prompts.
        topics: Prompts from the list of topics and tasks.
        own: Prompts by the target itself.
        seed: The same seed gives the same prompts.
        device: `cpu`, `cuda`, `cuda:1`, ..; default: a card where there is one.
        adapter: A peft adapter of the target, folder or hub id.
    """
    from slipstream.configs.files import write_atomic
    from slipstream.data.synthesize import self_prompts, topic_prompts
    from slipstream.decode.sampling import sample
    from slipstream.decode.tasks import read_prompts
    from slipstream.distill.target import find_device, load_target

    if topics < 0 or own < 0:
        raise SlipstreamError(f"--topics and --own must not be negative, but are {topics} and {own}")
    _require_file(out)
    rows = topic_prompts(topics, seed)
    if own:
        loaded = load_target(target, device=find_device(device), adapter=adapter)
        sampled = out.with_name(out.stem + ".own.jsonl")
        who = _name(target, adapter)
        self_prompts(who, partial(sample, loaded), loaded.chat_tokenizer, count=own, seed=seed, out=sampled)
        rows += [{k: v for k, v in row.items() if k != "unit"} for row in read_prompts(sampled, own)]
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows):,} prompts: {out}", file=sys.stderr)


def regenerate(
    prompts: Path,
    out: Path,
    target: str = "smollm2-135m-instruct",
    temperatures: list[float] = [0.0, 0.7, 1.0],  # noqa: B006 (jsonargparse copies defaults)
    max_new_tokens: int = 320,
    max_response_tokens: int | None = None,
    think: bool | None = None,
    seed: int = 1,
    batch_size: int = 160,
    device: str | None = None,
    adapter: str | None = None,
    server: str | None = None,
    parallel: int = 32,
) -> None:
    """Let the target answer prompts, in this process (resumable to the batch) or behind a server (to the row).

    Args:
        prompts: JSONL file of Spec-Bench rows; all their turns are answered.
        out: JSONL file of conversations, or a Parquet file, which is written from the JSONL beside it at the end.
        target: Who answers; with a server, the model's name there.
        temperatures: Dealt out to the prompts in turn; 0 is greedy.
        max_new_tokens: Per answer.
        max_response_tokens: Begin no batch (no row) once this many are there.
        think: Whether answers think before they speak, for templates with `enable_thinking`; train with the same.
        seed: Of the draws and of the order.
        batch_size: Prompts answered at once in this process.
        device: `cpu`, `cuda`, `cuda:1`, ..; default: a card where there is one.
        adapter: A peft adapter of the target, folder or hub id.
        server: Of an OpenAI-compatible server, the address that ends in /v1; its key is $OPENAI_API_KEY.
        parallel: Prompts answered at once by the server.
    """
    from slipstream.data.conversations import pack
    from slipstream.decode.tasks import read_prompts

    _require_file(out, ".jsonl", ".parquet")
    if server is not None and adapter is not None:
        raise SlipstreamError("--adapter is for targets in this process; name the server's adapted model with --target")
    journal = out.with_suffix(".jsonl")
    rows = read_prompts(prompts)
    settings: dict[str, Any] = {
        "temperatures": temperatures,
        "max_new_tokens": max_new_tokens,
        "max_response_tokens": max_response_tokens,
        "think": think,
        "seed": seed,
        "out": journal,
    }
    if server is not None:
        from slipstream.data.server import regenerate as answer_by_server

        answer_by_server(server, target, rows, parallel=parallel, **settings)
    else:
        from slipstream.data.regenerate import regenerate as answer
        from slipstream.decode.sampling import sample
        from slipstream.distill.target import find_device, load_target

        loaded = load_target(target, device=find_device(device), adapter=adapter)
        settings |= {"stop_ids": loaded.stop_ids(), "batch_size": batch_size, "context": loaded.context}
        answer(_name(target, adapter), partial(sample, loaded), loaded.chat_tokenizer, rows, **settings)
    if out.suffix == ".parquet":
        pack(journal, out)
    print(f"conversations: {out}", file=sys.stderr)
