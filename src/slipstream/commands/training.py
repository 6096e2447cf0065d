"""Commands that make heads: `capture`, `train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import Recipe

if TYPE_CHECKING:
    from slipstream.configs.recipe import TargetSettings
    from slipstream.distill.draft import DraftHead
    from slipstream.distill.target import Target


def capture(
    recipe: Recipe, out: Path, dtype: Literal["bfloat16", "float8_e4m3fn"] = "bfloat16", shard: str = "0/1"
) -> None:
    """Write the target's states of a recipe's conversations into a store, for train --data.features.

    Processes that `accelerate launch` or torchrun started divide the work; so do machines, by --shard.

    Args:
        recipe: Its sections target and data, and the kind of its head, say what is captured.
        out: Folder of the store.
        dtype: Of the states; `float8_e4m3fn` takes half the disk and is less exact.
        shard: I/N writes every N-th file from the I-th on. The last to write finishes the store.
    """
    from slipstream.configs.files import require_writable
    from slipstream.data.conversations import load
    from slipstream.distill.capture import bytes_per_token, claim, finish, missing, plan_store, write_shards
    from slipstream.distill.store import Manifest
    from slipstream.distill.target import find_device, load_target

    if recipe.target.shard:
        raise SlipstreamError(
            "slipstream capture divides the files over the processes, so that each needs the target: use target.device_map"
        )
    share, shares = _fraction(shard)
    process, processes, local = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    settings = recipe.target
    device = _device(settings, find_device(None, local))
    target = load_target(settings.name, dtype=settings.dtype, adapter=settings.adapter, device=device)
    target, _ = _begin(recipe, target)
    tokens = load(recipe.data, target.chat_tokenizer)
    target.require_room(max(map(len, tokens["input_ids"])))
    manifest = plan_store(target, tokens, recipe.data, dtype)
    claim(out, manifest)
    if Manifest.load(out).finished and not missing(out, manifest, range(len(manifest.shards))):
        if process == 0:
            print(f"this store is finished; nothing was changed: {out}", file=sys.stderr)
        return
    mine = range(len(manifest.shards))[share::shares]
    size = bytes_per_token(target, dtype)
    left = sum(manifest.shards[number].tokens for number in missing(out, manifest, mine))
    if process == 0:
        print(
            f"{manifest.rows:,} conversations, {manifest.tokens:,} tokens of {size:,} bytes: "
            f"{_megabytes(manifest.tokens * size):,} MB in {len(manifest.shards)} files; {_megabytes(left * size):,} MB "
            "are to be written here",
            file=sys.stderr,
        )
    require_writable(out, _megabytes(left * size))
    write_shards(target, tokens, out, manifest, mine[process::processes], recipe.data.batch_tokens)
    waiting = finish(out, manifest)
    if not waiting:
        print(f"store: {out}", file=sys.stderr)
    elif process == 0:
        print(f"this share is written; {waiting} files of {out} are still to come from others", file=sys.stderr)


def _device(settings: TargetSettings, device: str) -> str:
    """Where a target is loaded: on a device, unless it is to be spread over all of them."""
    if settings.device_map is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise SlipstreamError(
            "target.device_map auto takes all devices of a machine for one process: launch one process a machine"
        )
    return settings.device_map or device


def _begin(recipe: Recipe, target: Target) -> tuple[Target, DraftHead | None]:
    """The target, with the layers that the recipe's head reads; and that head, where there is one to go on from."""
    from slipstream.distill.draft import layers_read
    from slipstream.distill.heads import load_head

    if recipe.head.init is None:
        return target.reading(layers_read(recipe.head.kind, target)), None
    head = load_head(recipe.head.init)
    return target.reading(head.layer_ids), head


def _megabytes(size: int) -> int:
    return -(-size // 2**20)


def _fraction(shard: str) -> tuple[int, int]:
    """I and N of `I/N`."""
    first, _, second = shard.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise SlipstreamError(f"--shard is I/N with I from 0 to below N, such as 0/4, not {shard!r}")
    return int(first), int(second)


def train(
    recipe: Recipe,
    out: Path,
    plan: bool = False,
    card: list[float] = [],  # noqa: B006 (jsonargparse copies defaults)
) -> None:
    """Train a head by a recipe into OUT/draft; goes on where an interrupted run stopped.

    Args:
        recipe: All settings.
        out: Folder of the run.
        plan: Print what memory, disk and time every stage takes, and start nothing.
        card: Plan for cards of so many GB and TFLOP/s, in place of this machine's own; a third number is how many of them a
            process has under target.device_map.
    """
    if plan:
        from slipstream.planning import show

        if os.environ.get("RANK", "0") == "0":
            show(recipe, out, card)
        return
    if card:
        raise SlipstreamError("--card describes a card for --plan")
    from slipstream.configs.files import require_writable
    from slipstream.data.batches import Batches
    from slipstream.data.conversations import load
    from slipstream.data.vocabulary import draft_vocabulary
    from slipstream.decode.card import write_card
    from slipstream.distill.adapters import add_lora
    from slipstream.distill.gguf import EMBEDDED, EMBEDDED_LICENSE
    from slipstream.distill.heads import describe_target, new_head, save_head
    from slipstream.distill.objectives import weighted
    from slipstream.distill.store import Store
    from slipstream.distill.target import load_target
    from slipstream.train.launch import start
    from slipstream.train.trainer import Trainer

    weighted(recipe.distill.objectives)  # fails before anything runs
    if _finished(recipe, out):
        print(f"this run is finished; nothing was changed. Draft head: {out / 'draft'}", file=sys.stderr)
        return
    require_writable(out, 500)
    accelerator = start(recipe.train, out)
    store = None
    with accelerator.main_process_first():  # what it converts and tokenizes, the others find in caches
        settings, device = recipe.target, _device(recipe.target, "cpu")
        known = recipe.data.features is not None or not accelerator.is_main_process  # by `capture`, or by the first one
        target = load_target(
            settings.name,
            dtype=settings.dtype,
            adapter=settings.adapter,
            device=device,
            think=recipe.data.think,
            known=known,
        )
        target, head = _begin(recipe, target)
        if recipe.data.features is None:
            tokens = load(recipe.data, target.chat_tokenizer)
        else:
            store = Store(Path(recipe.data.features).expanduser())
            store.require(target, recipe.data)
            tokens = store.tokens
    data = recipe.data
    batches = Batches(tokens, data.batch_tokens, recipe.train.seed, data.batches, packed=data.packed)
    target.require_room(int(batches.lengths.max()))
    if head is None:
        vocabulary = draft_vocabulary(tokens, recipe.head.draft_vocab_size, target.vocab_size, target.stop_ids())
        head = new_head(target, vocabulary, recipe.head, seed=recipe.train.seed)
    else:
        head.requires_grad_(True)
        if recipe.head.lora_rank is not None:
            add_lora(head, recipe.head.lora_rank, recipe.train.seed)
    origin = describe_target(target)  # before its weights are in shards
    trainer = Trainer(recipe, target, head, batches, out / "train", store=store, accelerator=accelerator)
    rows = trainer.run()
    trained = trainer.result()
    if trained is not None:
        provenance = {**origin, "recipe": recipe.to_dict(), "tokens": rows[-1]["tokens"]}
        save_head(trained, out / "draft", provenance)
        write_card(out / "draft", target.name, license=EMBEDDED_LICENSE if target.name == EMBEDDED else None)
        print(f"draft head: {out / 'draft'}", file=sys.stderr)


def _finished(recipe: Recipe, out: Path) -> bool:
    """Whether a run's folder holds its head already.

    Raises:
        SlipstreamError: If it is the head of another recipe, or of one that nobody wrote down.
    """
    from slipstream.distill.heads import read_provenance

    draft = out / "draft"
    if not (draft / "model.safetensors").is_file():
        return False
    trained = read_provenance(draft).get("recipe")
    if trained is None:
        raise SlipstreamError(f"{draft} holds a head whose recipe nobody wrote down; give another --out")
    if Recipe.written(trained, draft / "provenance.json") != recipe.to_dict():
        raise SlipstreamError(f"{out} holds a head of another recipe; give another --out")
    return True
