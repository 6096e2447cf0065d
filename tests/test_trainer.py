"""The training loop: it learns, it resumes bit for bit, and what it simulates is what decoding measures."""

import copy
import gc
import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import VOCAB, greedy, tiny_head, tiny_target
from torch.nn.functional import pad

from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import DataSettings, DistillSettings, HeadSettings, Recipe, TrainSettings
from slipstream.data.batches import Batch, Batches
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import answer, simulated_acceptance_length
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape
from slipstream.distill.heads import load_head, new_head, save_head
from slipstream.distill.target import load_target
from slipstream.train.measure import Measure
from slipstream.train.metrics import Metrics
from slipstream.train.optimizer import learning_rate
from slipstream.train.trainer import Trainer

RECIPE = Recipe(
    distill=DistillSettings(steps=3, noise=0.1),
    train=TrainSettings(max_steps=8, learning_rate=3e-3, mixed_precision="no", log_every=2),
)


@cache
def answers(count=24, new=24):
    """Prompts and the tiny target's greedy continuations, token ids."""
    target = tiny_target()
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (1, 4), generator=draw) for _ in range(count)]
    return [(p[0].tolist(), greedy(target, p, new)[0, 4:].tolist()) for p in prompts]


def dataset(pairs):
    rows = [{"input_ids": p + a, "mask": [0] * len(p) + [1] * len(a)} for p, a in pairs]
    return Dataset.from_list(rows).with_format("numpy")


def trainer(folder, recipe=RECIPE, pairs=None):
    target = tiny_target()
    batches = Batches(dataset(pairs or answers()), 120, 0, recipe.data.batches)
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


def test_a_parallel_head_goes_on_from_before_it_was_unrolled(tmp_path):
    recipe = replace(RECIPE, distill=DistillSettings(single=0.5))

    def begin(name):
        target = tiny_target()
        batches = Batches(dataset(answers()), 120, 0)
        return Trainer(recipe, target, tiny_head(target, VOCAB, kind="parallel").train(), batches, tmp_path / name)

    whole, first = begin("whole"), begin("cut")
    whole.run()
    for _ in range(2):
        first._optimize(Metrics(3))
    first.save()
    second = begin("cut")
    second.run()
    for name, weight in whole.head.state_dict().items():
        assert torch.equal(weight, second.head.state_dict()[name]), name


def test_a_micro_batch_is_put_together_once(tmp_path, monkeypatch):
    run = trainer(tmp_path, replace(RECIPE, train=replace(RECIPE.train, accumulation=3)))
    asked, get = [], Batches.__getitem__
    monkeypatch.setattr(Batches, "__getitem__", lambda batches, index: asked.append(index) or get(batches, index))
    for _ in range(2):
        run._optimize(Metrics(3))
    assert asked == [0, 1, 2, 3, 4, 5]


def test_muon_has_the_matrices_inside_the_head_only(tmp_path):
    run = trainer(tmp_path)
    muon, adamw = run.launch.optimizers
    assert isinstance(muon, torch.optim.Muon)
    names = {id(p): name for name, p in run.head.named_parameters()}
    own = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert "fc.weight" in own
    assert "lm_head.weight" not in own
    assert {names[id(p)] for group in adamw.param_groups for p in group["params"]} == set(names.values()) - own


@pytest.mark.parametrize(("optimizer", "shares"), [("muon", [1, 0.2]), ("adamw", [1])])
def test_adamw_has_a_fifth_of_the_rate_beside_muon_and_all_of_it_alone(optimizer, shares, tmp_path):
    run = trainer(tmp_path, replace(RECIPE, train=replace(RECIPE.train, optimizer=optimizer)))
    for step in range(3):
        run._optimize(Metrics(3))
        rates = {group["lr"] for made in run.launch.optimizers for group in made.param_groups}
        assert rates == {share * learning_rate(step, run.total, run.settings) for share in shares}


def test_a_run_begun_with_one_rate_for_all_goes_on_with_it(tmp_path):
    recipe = replace(RECIPE, train=replace(RECIPE.train, optimizer="muon"))
    run = trainer(tmp_path, recipe)
    run._optimize(Metrics(3))
    run.save()
    assert trainer(tmp_path, recipe).launch.shares == run.launch.shares
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["progress"]["shares"]  # as older versions wrote it
    torch.save(state, tmp_path / "checkpoint.pt")
    assert trainer(tmp_path, recipe).launch.shares == [1.0, 1.0]


def test_a_run_writes_its_rows_as_it_goes_and_into_tensorboard(tmp_path):
    recipe = replace(RECIPE, train=replace(RECIPE.train, trackers=("tensorboard",)))
    run = trainer(tmp_path, recipe)
    run.run()
    written = tmp_path / "metrics.jsonl"
    assert [json.loads(line) for line in written.read_text().splitlines()] == run.rows
    whole = written.read_bytes()
    written.write_bytes(whole + whole.splitlines()[-1][:20])  # as a kill leaves it
    assert len(trainer(tmp_path, recipe).run()) == 4
    assert written.read_bytes() == whole
    assert list((tmp_path / "slipstream").rglob("events.out.tfevents*"))


def test_wandb_writes_for_a_later_sync_where_there_is_no_key(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no .netrc
    recipe = replace(RECIPE, train=replace(RECIPE.train, trackers=("wandb",)))
    trainer(tmp_path / "run", recipe).run()
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.stat().st_size > 0


def test_what_is_made_again_on_the_way_back_teaches_the_same(tmp_path):
    recipe = replace(RECIPE, train=replace(RECIPE.train, gradient_checkpointing=True))
    runs = [trainer(tmp_path / str(place), settings) for place, settings in enumerate((RECIPE, recipe))]
    rows, again = ([{**row, "seconds": 0} for row in run.run()] for run in runs)
    assert rows == again
    weights, wanted = (run.head.state_dict() for run in runs)
    assert all(torch.equal(weights[name], x) for name, x in wanted.items())


KEPT = replace(RECIPE, data=DataSettings(batches=3), distill=DistillSettings(steps=2, keep_features=True, single=0.5))


@pytest.mark.parametrize(("batches", "captured"), [(3, 3), (6, 6), (7, 6), (1000, 6)])  # there are 6
def test_kept_features_train_to_the_weights_of_features_captured_anew(tmp_path, batches, captured):
    recipe = replace(KEPT, data=DataSettings(batches=batches))
    online = replace(recipe, distill=replace(KEPT.distill, keep_features=False))
    kept, anew = trainer(tmp_path / "kept", recipe), trainer(tmp_path / "anew", online)
    calls = []
    capture = kept.target.capture
    kept.target.capture = lambda ids, starts: calls.append(1) or capture(ids, starts)
    rows = kept.run()
    anew.run()
    assert len(calls) == captured  # once per batch, though 8 steps were made
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

    def cut(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        run.save()
    monkeypatch.undo()
    assert trainer(tmp_path).step == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "recipe.json"]


def test_a_run_killed_in_a_checkpoint_goes_on_to_the_weights_of_an_uninterrupted_one(tmp_path, tiny_target_folder):
    turns = [[("user", "Hi " * (1 + i % 5)), ("assistant", "Yo hello " * (3 + i % 7))] for i in range(12)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"target.name": tiny_target_folder, "data.conversations": tmp_path / "c.jsonl", "data.batch_tokens": 100}
    given |= {
        "head.draft_vocab_size": 64,
        "train.max_steps": 10,
        "train.log_every": 2,
        "train.checkpoint_minutes": 1e-9,
    }
    command = ["train", *(f"--{name}={value}" for name, value in given.items())]
    assert main([*command, f"--out={tmp_path / 'whole'}"]) == 0
    code = (
        "import sys, time, torch\nfrom slipstream.cli import main\n"
        f"torch.set_num_threads({torch.get_num_threads()})\nsave, calls = torch.save, []\n"
        "def slow(state, file):\n"
        "    calls.append(file)\n"
        "    if len(calls) == 3: file.write(b'half of it'); print('in the third checkpoint', flush=True); time.sleep(600)\n"
        "    save(state, file)\n"
        "torch.save = slow\nmain(sys.argv[1:])\n"
    )
    cut = tmp_path / "cut"
    process_of = [sys.executable, "-c", code, *command, f"--out={cut}"]
    with subprocess.Popen(process_of, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert "in the third checkpoint\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGKILL)
    assert torch.load(cut / "train" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 4
    assert not (cut / "draft").exists()
    assert main([*command, f"--out={cut}"]) == 0
    weights, wanted = (load_file(run / "draft" / "model.safetensors") for run in (cut, tmp_path / "whole"))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], x) for name, x in wanted.items())


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_a_damaged_checkpoint_is_named(tmp_path, keep):
    trainer(tmp_path).save()
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        SlipstreamError, match=rf"^{file} is damaged or cut short; delete it to go on without it, [^\n]+$"
    ):
        trainer(tmp_path)
    file.unlink()
    assert trainer(tmp_path).step == 0


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"train": 3}'])
def test_a_damaged_recipe_is_named(tmp_path, text):
    trainer(tmp_path)
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(SlipstreamError, match=r"recipe\.json (cannot be read|holds no )"):
        trainer(tmp_path)


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    trainer(tmp_path)
    other = replace(RECIPE, train=replace(RECIPE.train, learning_rate=1e-4))
    with pytest.raises(SlipstreamError, match=r"holds another run \(train.learning_rate is 0.003 there"):
        trainer(tmp_path, other)


def test_a_run_of_a_version_that_knew_fewer_settings_goes_on_where_these_are_at_their_defaults(tmp_path):
    trainer(tmp_path)
    place = tmp_path / "recipe.json"
    older = json.loads(place.read_text())
    del older["data"]["packed"]
    place.write_text(json.dumps(older))
    with pytest.raises(SlipstreamError, match=r"holds another run \(data.packed is False there, True here\)"):
        trainer(tmp_path, replace(RECIPE, data=replace(RECIPE.data, packed=True)))
    trainer(tmp_path)


@pytest.mark.parametrize("change", ["a token", "the mask", "the order", "a row less"])
def test_a_run_whose_data_changed_does_not_go_on(tmp_path, change):
    run = trainer(tmp_path)
    run._optimize(Metrics(3))
    run.save()
    pairs = copy.deepcopy(answers())
    if change == "a token":
        pairs[3][1][2] += 1
    elif change == "the mask":
        pairs[3] = (pairs[3][0] + pairs[3][1][:1], pairs[3][1][1:])
    elif change == "the order":
        pairs[3], pairs[4] = pairs[4], pairs[3]
    else:
        pairs = pairs[:-1]
    with pytest.raises(SlipstreamError, match=r"was begun on other data: .* give another --out"):
        trainer(tmp_path, pairs=pairs)
    assert trainer(tmp_path).step == 1


def test_a_checkpoint_of_a_version_that_did_not_know_the_data_goes_on(tmp_path):
    run = trainer(tmp_path)
    run._optimize(Metrics(3))
    run.save()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["progress"]["data"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert trainer(tmp_path, pairs=answers()[:-1]).step == 1


def test_an_unknown_objective_names_the_near_one(tmp_path):
    with pytest.raises(SlipstreamError, match="did you mean 'forward_kl'"):
        trainer(tmp_path, replace(RECIPE, distill=DistillSettings(objectives={"forwardkl": 1.0})))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        run.head.fc.weight[0, 0] = float("nan")
    with pytest.raises(SlipstreamError, match="NaN or infinite at step 0"):
        run.run()
    kept = load_file(tmp_path / "bad-step-0-process-0.safetensors")
    assert torch.equal(kept["input_ids.0"], run.batches[0].input_ids)
    assert run.head.fc.weight.isnan().sum() == 1  # there was no step
    with pytest.raises(SlipstreamError, match="weights are NaN or infinite, and the checkpoint before was kept"):
        run.save()
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_nothing_that_goes_on_is_mapped_from_the_checkpoint(tmp_path, optimizer):
    recipe = replace(RECIPE, train=replace(RECIPE.train, optimizer=optimizer, ema=0.5))
    run = trainer(tmp_path, recipe)
    run._optimize(Metrics(3))
    run.save()
    again = trainer(tmp_path, recipe)
    gc.collect()
    assert str(tmp_path / "checkpoint.pt") not in Path("/proc/self/maps").read_text()
    state = [x for o in again.launch.optimizers for kept in o.state.values() for x in kept.values()]
    assert len(state) >= len([*again.head.parameters()])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("16 GiB were asked for"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
    ],
)
def test_running_out_of_memory_names_the_setting_to_lower(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    run = trainer(tmp_path)
    monkeypatch.setattr(run, "_optimize", full)
    with pytest.raises(SlipstreamError, match=r"lower data\.batch_tokens \(120\)"):
        run.run()


class _Joined:
    """Micro-batches 4i .. 4i+3 of others, as one."""

    def __init__(self, batches):
        self.batches, self.limit, self.batch_tokens, self.per_epoch = batches, None, 0, 1
        self.digest = batches.digest

    def __getitem__(self, index):
        parts = [self.batches[4 * index + i] for i in range(4)]
        width = max(part.mask.shape[1] for part in parts)
        kinds = zip(*((part.input_ids, part.mask) for part in parts), strict=True)
        return Batch(*(torch.cat([pad(x, (0, width - x.shape[1])) for x in kind]) for kind in kinds))


@pytest.mark.parametrize("feature_weight", [0.0, 10.0])
def test_four_micro_batches_teach_what_they_teach_at_once(tmp_path, feature_weight):
    settings = replace(RECIPE.train, optimizer="adamw", max_steps=4, log_every=1)
    distill = DistillSettings(steps=3, feature_weight=feature_weight)
    plain = replace(RECIPE, distill=distill, train=replace(settings, accumulation=4))
    target = tiny_target()
    batches = Batches(dataset(answers()), 60, 0)
    runs = []
    for name, recipe, data in (("4", plain, batches), ("1", replace(plain, train=settings), _Joined(batches))):
        run = Trainer(recipe, target, tiny_head(target, VOCAB).train(), data, tmp_path / name)
        runs.append(([row["loss"] for row in run.run()], run.head.state_dict()))
    (losses, weights), (others, wanted) = runs
    assert losses == pytest.approx(others, rel=1e-4)
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5)


def test_the_running_average_is_the_head_and_survives_a_stop(tmp_path):
    recipe = replace(RECIPE, train=replace(RECIPE.train, ema=0.5))
    whole = trainer(tmp_path / "whole", recipe)
    whole.run()
    first = trainer(tmp_path / "cut", recipe)
    for _ in range(3):
        first._optimize(Metrics(3))
    first.save()
    second = trainer(tmp_path / "cut", recipe)
    second.run()
    average, again = whole.result().state_dict(), second.result().state_dict()
    assert not torch.equal(average["fc.weight"], whole.head.fc.weight)
    for name, weight in average.items():
        assert torch.equal(weight, again[name]), name


def test_the_best_head_by_real_decoding_is_kept(tmp_path, monkeypatch):
    recipe = replace(RECIPE, train=replace(RECIPE.train, measure_every=2))
    run = trainer(tmp_path, recipe)
    seen, said = [], iter([1.1, 1.4, 1.3, 1.2])
    monkeypatch.setattr(run, "measure", lambda weights: seen.append(copy.deepcopy(weights)) or next(said))
    rows = run.run()
    assert [row["acceptance_length"] for row in rows] == [1.1, 1.4, 1.3, 1.2]
    best = run.result().state_dict()
    assert all(torch.equal(best[name], weight) for name, weight in seen[1].items())


def test_measured_acceptance_is_that_of_the_decoder(tiny_target_folder, tmp_path):
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    settings = TrainSettings(measure_every=1, measure_prompts=str(tmp_path / "p.jsonl"), measure_tokens=8)
    (tmp_path / "p.jsonl").write_text('{"turns": ["Name a fruit."]}\n')
    head = new_head(target, torch.arange(200), HeadSettings(), seed=0)
    tau = Measure(target, head.config, settings)(head.state_dict())
    record = answer(
        Decoder(target, HeadDrafter(head.eval(), target)), "exact", {"turns": ["Name a fruit."]}, max_new_tokens=8
    )
    assert tau == pytest.approx(sum(record.accept_lengths) / len(record.accept_lengths), abs=1e-4)


def test_what_training_simulates_is_what_chains_measure(tmp_path):
    target = tiny_target()
    pairs = answers()
    recipe = replace(RECIPE, train=replace(RECIPE.train, max_steps=150, learning_rate=1e-2, optimizer="adamw"))
    run = Trainer(recipe, target, tiny_head(target, VOCAB).train(), Batches(dataset(pairs), 400, 0), tmp_path)
    rows = run.run()
    assert rows[-1]["simulated_acceptance_length"] > rows[0]["simulated_acceptance_length"]
    save_head(run.head, tmp_path / "draft", {"target": "tiny"})
    head = load_head(tmp_path / "draft")
    simulated = simulated_acceptance_length(head, target, pairs, 3)
    decoder = Decoder(target, HeadDrafter(head, target), Policy(tree=TreeShape(3, 1, 4)))
    lengths = []
    for prompt, expected in pairs:
        out = decoder.generate(torch.tensor([prompt]), max_new_tokens=24)
        assert [t.id for t in out.tokens] == expected
        lengths += out.stats.accept_lengths
    assert simulated > 1.3
    assert sum(lengths) / len(lengths) == pytest.approx(simulated, rel=1e-6)


def test_the_rate_warms_up_and_ends_low():
    settings = TrainSettings(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1.0
    assert 0.02 <= rates[-1] < 0.03
