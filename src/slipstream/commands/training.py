"""Commands that make heads: `train`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import Recipe


def train(recipe: Recipe, out: Path) -> None:
    """Train a head by a recipe into OUT/draft; goes on where an interrupted run stopped."""
    from slipstream.configs.files import require_writable
    from slipstream.data.batches import Batches
    from slipstream.data.conversations import read, tokenize
    from slipstream.data.vocabulary import draft_vocabulary
    from slipstream.decode.card import write_card
    from slipstream.distill.heads import new_head, save_head
    from slipstream.distill.target import EMBEDDED, EMBEDDED_LICENSE, load_target
    from slipstream.train.trainer import Trainer

    if (out / "draft" / "model.safetensors").is_file():
        trained = json.loads((out / "draft" / "provenance.json").read_text())["recipe"]
        if trained != json.loads(json.dumps(asdict(recipe))):
            raise SlipstreamError(f"{out} holds a head of another recipe; give another --out")
        print(f"this run is finished; nothing was changed. Draft head: {out / 'draft'}", file=sys.stderr)
        return
    require_writable(out, 500)
    target = load_target(recipe.target.name, dtype=recipe.target.dtype, adapter=recipe.target.adapter)
    tokens = tokenize(read(recipe.data.conversations), target.chat_tokenizer, recipe.data.max_length)
    vocabulary = draft_vocabulary(tokens, recipe.head.draft_vocab_size, target.vocab_size, target.stop_ids())
    head = new_head(target, vocabulary, recipe.head, seed=recipe.train.seed)
    target = target.reading(head.layer_ids)
    batches = Batches(tokens, recipe.data.batch_tokens, recipe.train.seed, recipe.data.batches)
    trainer = Trainer(recipe, target, head, batches, out / "train")
    rows = trainer.run()
    if trainer.accelerator.is_main_process:
        provenance = {"target": target.name, "recipe": asdict(recipe), "tokens": rows[-1]["tokens"]}
        save_head(trainer.accelerator.unwrap_model(trainer.head), out / "draft", provenance)
        write_card(out / "draft", target.name, license=EMBEDDED_LICENSE if target.name == EMBEDDED else None)
        print(f"draft head: {out / 'draft'}", file=sys.stderr)
