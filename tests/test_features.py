"""Training on a store is training online: the same batches, the same losses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from tiny import VOCAB, tiny_head, tiny_target

from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import DataSettings, DistillSettings, Recipe, TrainSettings
from slipstream.data.batches import Batches
from slipstream.distill import features
from slipstream.distill import target as target_module
from slipstream.distill.capture import claim, finish, plan_store, write_shards
from slipstream.distill.features import Slabs
from slipstream.distill.store import Store
from slipstream.distill.target import Target
from slipstream.train.trainer import Trainer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

RECIPE = Recipe(
    distill=DistillSettings(steps=3, noise=0.1, feature_weight=0.1, single=0.25),
    train=TrainSettings(max_steps=12, learning_rate=3e-3, accumulation=2, mixed_precision="no", log_every=1),
)


@pytest.fixture(scope="module")
def target(tiny_tokenizer) -> Target:
    """A bf16 target; the tokenizer is there for its template only."""
    return Target(tiny_target().model.bfloat16(), tiny_tokenizer, name="tiny")


@pytest.fixture(scope="module")
def tokens() -> Dataset:
    """Sixteen conversations of 12 to 27 tokens."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCAB, (12 + i,), generator=draw).tolist() for i in range(16)]
    return Dataset.from_list([{"input_ids": r, "mask": [0] * 4 + [1] * (len(r) - 4)} for r in rows]).with_format(
        "numpy"
    )


def stored(target: Target, tokens: Dataset, folder: Path, batch_tokens: int, dtype: str = "bfloat16") -> Store:
    manifest = plan_store(target, tokens, DataSettings(max_length=64), dtype)
    claim(folder, manifest)
    write_shards(target, tokens, folder, manifest, [0], batch_tokens)
    assert finish(folder, manifest) == 0
    return Store(folder)


def train(
    target: Target,
    tokens: Dataset,
    folder: Path,
    batch_tokens: int,
    store: Store | None = None,
    recipe: Recipe = RECIPE,
    packed: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Metric rows and weights of a run."""
    batches = Batches(tokens if store is None else store.tokens, batch_tokens, 0, packed=packed)
    run = Trainer(recipe, target, tiny_head(target, VOCAB).train(), batches, folder, store=store)
    return run.run(), run.head.state_dict()


def test_where_a_conversation_is_captured_alone_training_is_bit_equal_to_online(target, tokens, tmp_path, monkeypatch):
    store = stored(target, tokens, tmp_path / "store", batch_tokens=1)
    rows, weights = train(target, tokens, tmp_path / "online", batch_tokens=1)
    monkeypatch.setattr(Target, "capture", None)  # the target's layers are not wanted
    again, mine = train(target, tokens, tmp_path / "stored", batch_tokens=1, store=store)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    for name, weight in weights.items():
        assert torch.equal(weight, mine[name]), name


def test_in_batches_of_other_shapes_losses_differ_by_the_targets_rounding_only(target, tokens, tmp_path):
    store = stored(target, tokens, tmp_path / "store", batch_tokens=50)
    rows, _ = train(target, tokens, tmp_path / "online", batch_tokens=90)
    again, _ = train(target, tokens, tmp_path / "stored", batch_tokens=90, store=store)
    assert [row["tokens"] for row in again] == [row["tokens"] for row in rows]
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows], rel=0.01)


def test_packed_batches_are_read_from_a_store_as_the_target_leaves_them(target, tokens, tmp_path):
    store = stored(target, tokens, tmp_path / "store", batch_tokens=1)
    rows, _ = train(target, tokens, tmp_path / "online", batch_tokens=90, packed=True)
    again, _ = train(target, tokens, tmp_path / "stored", batch_tokens=90, store=store, packed=True)
    assert [row["tokens"] for row in again] == [row["tokens"] for row in rows]
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows], rel=0.01)


def test_what_cannot_be_read_is_told_where_it_is_learned_from(target, tokens, tmp_path, monkeypatch):
    store = stored(target, tokens, tmp_path / "store", batch_tokens=1)
    batches = Batches(store.tokens, 1, 0)
    bad = batches.rows(5)[0]
    read = Store.read

    def torn(self, row):
        if row == bad:
            raise SlipstreamError("torn")
        return read(self, row)

    monkeypatch.setattr(Store, "read", torn)
    run = Trainer(RECIPE, target, tiny_head(target, VOCAB).train(), batches, tmp_path / "run", store=store)
    with pytest.raises(SlipstreamError, match="torn"):
        run.run()
    assert run.step == 2  # of two batches each; batch 5 is the second of step 2


def test_an_fp8_store_trains_to_nearly_the_same_losses(target, tokens, tmp_path):
    store = stored(target, tokens, tmp_path / "store", 90, "float8_e4m3fn")
    rows, _ = train(target, tokens, tmp_path / "online", batch_tokens=90)
    again, _ = train(target, tokens, tmp_path / "stored", batch_tokens=90, store=store)
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows], rel=0.05)


def test_training_on_some_batches_over_and_over_reads_them_from_a_store_too(target, tokens, tmp_path):
    store = stored(target, tokens, tmp_path / "store", batch_tokens=1)
    recipe = replace(RECIPE, data=DataSettings(batches=3))
    runs = []
    for name, source in (("online", None), ("stored", store)):
        batches = Batches(tokens, 1, 0, 3)
        run = Trainer(recipe, target, tiny_head(target, VOCAB).train(), batches, tmp_path / name, store=source)
        runs.append([row["loss"] for row in run.run()])
    assert runs[0] == runs[1]


def test_what_is_kept_stays_what_it_was_and_lies_apart_from_the_heap(monkeypatch):
    kept = Slabs().keep(torch.ones(3))
    assert kept.untyped_storage().nbytes() > 2**25  # more than glibc's heap takes
    monkeypatch.setattr(features, "_SLAB", 4096)
    slabs, draw = Slabs(), torch.Generator().manual_seed(0)
    shapes = [(1, 7, 3), (2, 5, 9), (1, 0, 4), (3, 3, 1), (1, 40, 96), (4, 7, 9)]  # the fifth is larger than a slab
    given = [torch.randn(shape, generator=draw) for shape in shapes]
    given = [x.bfloat16() if place % 2 else x for place, x in enumerate(given)]
    wanted = [x.clone() for x in given]
    kept = [slabs.keep(x) for x in given]
    for x in given:
        x.zero_()
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(kept, wanted, strict=True))
    assert [x.data_ptr() % 64 for x in kept] == [0] * len(kept)
    assert len({x.untyped_storage().data_ptr() for x in kept}) == 3


def test_kept_features_and_a_store_are_one_too_many():
    with pytest.raises(SlipstreamError, match=r"data\.features has it on disk already"):
        Recipe(data=DataSettings(features="store", batches=2), distill=DistillSettings(keep_features=True))


def test_a_recipe_captures_and_trains_and_another_kind_of_head_is_refused(
    capsys, monkeypatch, tmp_path, tiny_target_folder
):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo " * n}]} for n in (5, 9)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = [f"--target.name={tiny_target_folder}", f"--data.conversations={tmp_path / 'c.jsonl'}"]
    recipe += ["--head.kind=eagle1", "--head.draft_vocab_size=64", "--train.max_steps=2", "--train.mixed_precision=no"]
    assert main(["capture", *recipe, f"--out={tmp_path / 'store'}"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(target_module, "require_causal", None)  # `capture` saw to it: the layers are not run
        patch.setattr(Target, "capture", None)
        recipe += [f"--data.features={tmp_path / 'store'}"]
        assert main(["train", *recipe, f"--out={tmp_path / 'eagle1'}"]) == 0
    assert (tmp_path / "eagle1" / "draft" / "model.safetensors").is_file()
    capsys.readouterr()
    assert main(["train", *recipe, "--head.kind=eagle3", f"--out={tmp_path / 'eagle3'}"]) == 2
    assert "does not fit" in (told := capsys.readouterr().err)
    assert "(layer_ids: [4] there, [1, 2, 3] here); give another data.features, or capture again" in told
