"""Commands that carry heads to and from other projects: `export`, `import`, `inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from slipstream.configs.errors import SlipstreamError

Dtype = Literal["bfloat16", "float16", "float32"]
To = Literal["eagle", "sglang", "vllm", "speculators"]


def export(draft: Path, to: To, out: Path, target: str | None = None, dtype: Dtype | None = None) -> None:
    """Write a head as another engine loads it, with SERVING.md, which says how to launch the engine.

    Args:
        draft: The head's folder, or hub id.
        to: Who will load it.
        out: Folder to write.
        target: The head's target: its embeddings go along where the engine wants them, and SERVING.md names it.
        dtype: Of the weights; default: as they are.
    """
    from slipstream.decode.policy import FILE, Policy
    from slipstream.distill.formats import export_head, wants_embeddings
    from slipstream.distill.heads import load_head, locate
    from slipstream.distill.serving import serving_notes
    from slipstream.distill.target import DTYPES, load_target
    from slipstream.distill.tensors import read_json

    _require_new(out)
    draft = locate(draft)
    stored = read_json(draft / "config.json").get("dtype", "float32")
    head = load_head(draft, dtype=DTYPES[dtype or stored])
    needed = target is not None and wants_embeddings(head.config, to)
    tree = Policy.load(draft).tree
    shape = {"depth": tree.depth, "top_k": tree.top_k, "nodes": tree.nodes}
    named = target or head.config.target_name or "TARGET"
    notes = serving_notes(to, head.config.kind, out.absolute(), named, **shape, tuned=(draft / FILE).is_file())
    along = {file: draft / file for file in (FILE, "provenance.json")}
    export_head(
        head,
        to,
        out,
        target=load_target(str(target), dtype=head.dtype) if needed else None,
        drafts=tree.depth,
        extras={"SERVING.md": notes, **{file: path.read_text() for file, path in along.items() if path.is_file()}},
    )
    print(f"{to}: {out}; to launch it: {out / 'SERVING.md'}", file=sys.stderr)


def _require_new(out: Path) -> None:
    if out.exists():
        raise SlipstreamError(f"{out} exists; give another --out")


def import_(from_: Path, out: Path, target: str | None = None) -> None:
    """Read a head of another project (SafeAILab's, SGLang's, vLLM's, speculators') and write it as one of ours.

    Args:
        from_: Folder with its config.json and weights.
        out: The head's folder.
        target: Its target, for what its config.json does not say; the head is bound to it.
    """
    from slipstream.distill.foreign import import_head

    _require_new(out)
    foreign = import_head(from_, out, target=target)
    for note in foreign.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"draft head: {out}, from the layout of {foreign.format}", file=sys.stderr)


def inspect_(folder: Path, target: str | None = None) -> None:
    """Say what a folder with a draft head holds, and which engines will take it, or why not.

    Args:
        folder: One of our heads, or another project's.
        target: Its target, where config.json does not say enough.
    """
    from rich.console import Console
    from rich.table import Table

    from slipstream.decode.policy import FILE, Policy
    from slipstream.distill.inspection import inspect_head

    found = inspect_head(folder, target)
    policy = Policy.load(folder)
    tree, schedule = policy.tree, policy.speculation.schedule
    tuned = f"depth {tree.depth}, top-k {tree.top_k}, {tree.nodes} nodes"
    tuned += f" and {tree.copied} copied" if tree.copied else ""
    tuned += f", {schedule}" if schedule != "fixed" else ""
    tuned += f"; relaxed: {policy.relaxed.label}"
    facts = Table(box=None, show_header=False)
    for what, value in {
        **found.facts,
        "policy": tuned if (folder / FILE).is_file() else f"none tuned: {tuned}",
    }.items():
        facts.add_row(what, value)
    engines = Table("engine", "takes it", box=None)
    for engine, why in found.engines.items():
        engines.add_row(engine, why or "yes")
    Console().print(facts, engines, sep="\n\n")
