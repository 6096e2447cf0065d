"""Values of a recipe that cannot be, data that does not fit and folders of other runs: one line before anything runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from slipstream.cli import main
from slipstream.configs.recipe import HeadSettings
from slipstream.distill.heads import new_head, save_head
from slipstream.distill.target import load_target

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def complaint(capsys) -> Callable[..., str]:
    """What a refused command says: one line, and nothing else on either stream."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        return line.removeprefix("slipstream: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--config", "absent.yaml"), "absent.yaml"),
        (("--train.learning_rate", "fast"), "train.learning_rate"),
        (("--train.learning_rate", "-1"), "train.learning_rate must be above 0"),
        (("--target.dtype", "float3"), "float3"),
        (("--train.mixed_precision", "bf8"), "bf8"),
        (("--distill.objectives", "reverse"), "reverse"),
        (("--distill.steps", "0"), "distill.steps"),
        (("--head.draft_vocab_size", "0"), "head.draft_vocab_size"),
        (("--data.batch_tokens", "0"), "data.batch_tokens"),
        (("--train.max_steps", "0"), "train.max_steps"),
        (("--train.trackers", '["wandbb"]'), "wandbb"),
        (("--target.adapter", "absent/or/not"), "absent/or/not"),
        (("--data.conversations", "absent.jsonl"), "absent.jsonl"),
        (("--data.conversations", '["absent.json", "absent.arrow"]'), "absent.json"),
        (("--data.malformed", "1.5"), "data.malformed"),
        (("--data.think", "true"), "enable_thinking"),
        (("--train.betas", "[1.0, 2.0]"), "train.betas must be from 0 to below 1, not (1.0, 2.0)"),
        (("--train.weight_decay", "-1"), "train.weight_decay must be 0 or above"),
        (("--train.seed", "-1"), "train.seed must be from 0 to below 2**32"),
        (("--train.epochs", ".inf"), "train.epochs must be above 0, not inf"),
        (("--train.ema", "1"), "train.ema must be above 0 and below 1"),
        (("--train.warmup", "1"), "train.warmup must be from 0 to below 1"),
        (("--distill.noise", "-1"), "distill.noise must be 0 or above"),
        (("--distill.single", "-1"), "distill.single must be from 0 to 1"),
        (("--distill.relaxed_threshold", ".nan"), "distill.relaxed_threshold must be a finite number"),
        (("--distill.objectives", '{"forward_kl": -1.0}'), "distill.objectives must be 0 or above"),
        (("--distill.objectives", "{}"), "distill.objectives needs an objective of a weight above 0"),
        (("--distill.objectives", '{"forward_kl": 0}'), "distill.objectives needs an objective of a weight above 0"),
        (("--distill.objectives", '{"forwardkl": 1}'), "did you mean 'forward_kl'"),
        (
            ("--distill.feature_weight", "1", "--head.hidden_size", "16"),
            "of a head of width 16 with those of a target of 32",
        ),
        (("--head.hidden_size", "17"), "head.hidden_size must be a multiple of 4, the target's attention heads"),
        (("--train.shard", "true"), "muon needs whole matrices"),
    ],
)
@pytest.mark.parametrize("plan", [False, True], ids=["train", "plan"])
def test_a_value_that_cannot_be_is_named(complaint, tmp_path, tiny_target_folder, arguments, named, plan):
    if plan and arguments[0] in ("--target.adapter", "--data.conversations", "--data.think"):
        pytest.skip("a plan needs neither weights nor data")
    talks = tmp_path / "talks.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo hello"}]
    talks.write_text(json.dumps({"messages": messages}) + "\n")
    recipe = ("--target.name", tiny_target_folder, "--data.conversations", talks, "--train.max_steps", 1)
    recipe = (*recipe, "--head.draft_vocab_size", 3)
    plan = ["--plan"] if plan else []
    assert named in complaint("train", *recipe, *arguments, "--out", tmp_path / "run", *plan)


@pytest.mark.parametrize("command", [("train",), ("train", "--plan"), ("capture",)])
def test_a_conversation_longer_than_the_context_is_refused(complaint, tmp_path, tiny_target_folder, command):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo hello" * 150}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    recipe = ("--target.name", tiny_target_folder, "--data.conversations", tmp_path / "talks.jsonl")
    recipe = (*recipe, "--train.max_steps", 1, "--out", tmp_path / "run")
    told = (
        f"a conversation has 312 tokens, the context of {tiny_target_folder} is 256: set data.max_length to 256 or less"
    )
    assert complaint(*command, *recipe) == told
    assert main([*map(str, command), *map(str, recipe), "--data.max_length", "256"]) == 0


@pytest.mark.parametrize("provenance", [None, "{}", '{"imported": {}}', '{"recipe": 3}', "{"])
def test_a_head_whose_recipe_is_not_known_is_not_taken_for_a_finished_run(
    complaint, tmp_path, tiny_target_folder, provenance
):
    draft = tmp_path / "run" / "draft"
    save_head(new_head(load_target(str(tiny_target_folder)), torch.arange(64), HeadSettings(), seed=0), draft, {})
    (draft / "provenance.json").unlink()
    if provenance is not None:
        (draft / "provenance.json").write_text(provenance)
    before = {file.name: file.read_bytes() for file in draft.iterdir()}
    assert str(draft) in complaint("train", "--out", tmp_path / "run")
    assert {file.name: file.read_bytes() for file in draft.iterdir()} == before
