"""The training loop: it learns, it resumes bit for bit, and what it simulates is what decoding measures."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tiny import VOCAB, greedy, tiny_head, tiny_target

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import DataSettings, DistillSettings, Recipe, TrainSettings
from slipstream.data.batches import Batches
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import simulated_acceptance_length
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape
from slipstream.distill.heads import load_head, save_head
from slipstream.train.metrics import Metrics
from slipstream.train.optimizer import learning_rate
from slipstream.train.trainer import Trainer

RECIPE = Recipe(
    distill=DistillSettings(steps=3, noise=0.1),
    train=TrainSettings(max_steps=8, learning_rate=3e-3, mixed_precision="no", log_every=2),
)


def answers(target, count=24, new=24):
    """Prompts and the target's greedy continuations, token ids."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (1, 4), generator=draw) for _ in range(count)]
    return [(p[0].tolist(), greedy(target, p, new)[0, 4:].tolist()) for p in prompts]


def dataset(pairs):
    rows = [{"input_ids": p + a, "mask": [0] * len(p) + [1] * len(a)} for p, a in pairs]
    return Dataset.from_list(rows).with_format("numpy")


def trainer(folder, recipe=RECIPE):
    target = tiny_target()
    batches = Batches(dataset(answers(target)), 120, 0, recipe.data.batches)
    return Trainer(recipe, target, tiny_head(target, VOCAB).train(), batches, folder)


def test_an_interrupted_run_goes_on_to_bit_equal_weights(tmp_path):
    whole = trainer(tmp_path / "whole")
    rows = whole.run()
    first = trainer(tmp_path / "cut")
    for _ in range(4):
        first._optimize(Metrics(3))
    first.save()
    del first
    second = trainer(tmp_path / "cut")
    assert second.step == 4
    second.run()
    for name, weight in whole.head.state_dict().items():
        assert torch.equal(weight, second.head.state_dict()[name]), name
    assert rows[-1]["step"] == 8


KEPT = replace(RECIPE, data=DataSettings(batches=3), distill=DistillSettings(steps=2, keep_features=True, single=0.5))


def test_kept_features_train_to_the_weights_of_features_captured_anew(tmp_path):
    online = replace(KEPT, distill=replace(KEPT.distill, keep_features=False))
    kept, anew = trainer(tmp_path / "kept", KEPT), trainer(tmp_path / "anew", online)
    calls = []
    capture = kept.target.capture
    kept.target.capture = lambda ids: calls.append(1) or capture(ids)
    rows = kept.run()
    anew.run()
    assert len(calls) == 3  # once per batch, though 8 steps were made
    for name, weight in kept.head.state_dict().items():
        assert torch.equal(weight, anew.head.state_dict()[name]), name
    assert [len(row["accuracy"]) for row in rows] == [2] * 4
    assert all(row["accuracy"][1] == 0 for row in rows[:2])  # one step only in the first half


def test_a_run_on_kept_features_goes_on_to_bit_equal_weights(tmp_path):
    whole, first = trainer(tmp_path / "whole", KEPT), trainer(tmp_path / "cut", KEPT)
    whole.run()
    for _ in range(5):
        first._optimize(Metrics(2))
    first.save()
    second = trainer(tmp_path / "cut", KEPT)
    second.run()
    for name, weight in whole.head.state_dict().items():
        assert torch.equal(weight, second.head.state_dict()[name]), name


def test_keeping_features_without_saying_of_how_many_batches_is_refused():
    with pytest.raises(SlipstreamError, match=r"needs data\.batches"):
        Recipe(distill=DistillSettings(keep_features=True))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.save()
    run.step = 5
    monkeypatch.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run.save()
    monkeypatch.undo()
    assert trainer(tmp_path).step == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "recipe.json"]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    trainer(tmp_path)
    other = replace(RECIPE, train=replace(RECIPE.train, learning_rate=1e-4))
    with pytest.raises(SlipstreamError, match=r"holds another run \(train.learning_rate is 0.003 there"):
        trainer(tmp_path, other)


def test_an_unknown_objective_names_the_near_one(tmp_path):
    with pytest.raises(SlipstreamError, match="did you mean 'forward_kl'"):
        trainer(tmp_path, replace(RECIPE, distill=DistillSettings(objectives={"forwardkl": 1.0})))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        run.head.fc.weight[0, 0] = float("nan")
    with pytest.raises(SlipstreamError, match="NaN or infinite at step 0"):
        run.run()


def test_what_training_simulates_is_what_chains_measure(tmp_path):
    target = tiny_target()
    pairs = answers(target)
    recipe = replace(RECIPE, train=replace(RECIPE.train, max_steps=150, learning_rate=1e-2, optimizer="adamw"))
    run = Trainer(recipe, target, tiny_head(target, VOCAB).train(), Batches(dataset(pairs), 400, 0), tmp_path)
    rows = run.run()
    assert rows[-1]["simulated_acceptance_length"] > rows[0]["simulated_acceptance_length"]
    save_head(run.head, tmp_path / "draft", {"target": "tiny"})
    head = load_head(tmp_path / "draft")
    simulated = simulated_acceptance_length(head, target, pairs, 3)
    decoder = Decoder(target, HeadDrafter(head, target), Policy(tree=TreeShape(3, 1, 4)))
    lengths = []
    for prompt, answer in pairs:
        out = decoder.generate(torch.tensor([prompt]), max_new_tokens=24)
        assert [t.id for t in out.tokens] == answer
        lengths += out.stats.accept_lengths
    assert simulated > 1.3
    assert sum(lengths) / len(lengths) == pytest.approx(simulated, rel=1e-6)


def test_the_rate_warms_up_and_ends_low():
    settings = TrainSettings(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1.0
    assert 0.02 <= rates[-1] < 0.03


@pytest.mark.parametrize("broken", ["missing", "truncated", "extra"])
def test_a_damaged_head_is_refused_by_name(tmp_path, broken):
    from safetensors.torch import load_file, save_file

    save_head(tiny_head(tiny_target()), tmp_path / "draft", {})
    file = tmp_path / "draft" / "model.safetensors"
    if broken == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
        expected = "cannot be read"
    else:
        tensors = load_file(file)
        if broken == "missing":
            del tensors["fc.weight"]
            expected = r"missing keys \['fc.weight'\]"
        else:
            tensors["surplus.weight"] = torch.zeros(1)
            expected = r"unexpected keys \['surplus.weight'\]"
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SlipstreamError, match=expected):
        load_head(tmp_path / "draft")
