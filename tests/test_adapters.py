"""LoRA on a head: only the updates learn, merged they are the head that was trained, alone they fit their head only."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import RECIPE, answers, dataset
from tiny import HEADS, VOCAB, tiny_head, tiny_target

from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import HeadSettings
from slipstream.data.batches import Batches
from slipstream.distill.adapters import add_lora, merge_adapter, rebuild, save_adapter
from slipstream.distill.heads import load_head
from slipstream.distill.objectives import forward_kl
from slipstream.distill.target import load_target
from slipstream.distill.unroll import unroll
from slipstream.train.trainer import Trainer


def loss(head, target):
    ids = torch.randint(3, VOCAB, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unroll(head, target, ids, torch.ones_like(ids).bool(), scale=torch.ones(2), objective=forward_kl).loss


@pytest.mark.parametrize("kind", HEADS)
def test_merged_updates_are_the_head_that_was_trained(kind, tmp_path):
    target = tiny_target()
    base, head = (tiny_head(target, VOCAB, **HEADS[kind]) for _ in range(2))
    target = target.reading(head.layer_ids)
    add_lora(head, 4)
    assert torch.equal(loss(head, target), loss(base, target))  # they begin at nothing
    trainer = Trainer(RECIPE, target, head.train(), Batches(dataset(answers()), 120, 0), tmp_path / "train")
    trainer.run()
    for name, weight in head.state_dict().items():
        if "lora_" not in name and name.replace(".base_layer", "") in base.state_dict():
            assert torch.equal(weight, base.state_dict()[name.replace(".base_layer", "")]), name
    trained = loss(head.eval(), target)
    assert not torch.equal(trained, loss(base, target))
    merged = trainer.result()
    assert set(merged.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(loss(merged, target), trained, rtol=1e-4, atol=1e-4)
    save_adapter(head.config, head.state_dict(), tmp_path / "adapter")
    again = merge_adapter(base, tmp_path / "adapter")
    again.borrow(target)
    torch.testing.assert_close(loss(again, target), trained, rtol=1e-4, atol=1e-4)


def test_updates_of_another_head_are_refused(tmp_path):
    target = tiny_target()
    head = tiny_head(target)
    add_lora(head, 2)
    save_adapter(head.config, head.state_dict(), tmp_path)
    with pytest.raises(SlipstreamError, match="belongs to another head"):
        merge_adapter(tiny_head(target, layers=2, hidden_size=16), tmp_path)
    with pytest.raises(SlipstreamError, match="holds no adapter"):
        merge_adapter(head, tmp_path / "none")


def test_a_rank_without_a_head_to_update_is_refused():
    with pytest.raises(SlipstreamError, match=r"give its folder as head\.init"):
        HeadSettings(lora_rank=4)


def test_rebuilding_a_plain_head_is_loading_it():
    head = tiny_head(tiny_target())
    again = rebuild(head.config, head.state_dict())
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in head.state_dict().items())


def test_the_command_goes_on_from_a_head(tiny_target_folder, tmp_path, datasets_cache):
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo hello Yo hello"}]}
    (tmp_path / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 6)
    common = ["--target.name", tiny_target_folder, "--data.conversations", tmp_path / "talks.jsonl"]
    first = ["--train.max_steps", 2, "--head.draft_vocab_size", 64, "--out", tmp_path / "first"]
    assert main(["train", *map(str, [*common, *first])]) == 0
    more = ["--train.max_steps", 2, "--head.init", tmp_path / "first" / "draft", "--head.lora_rank", 2]
    assert main(["train", *map(str, [*common, *more, "--out", tmp_path / "second"])]) == 0
    old, new = (load_head(tmp_path / name / "draft") for name in ("first", "second"))
    assert torch.equal(old.lm_head.weight, new.lm_head.weight)
    assert not torch.equal(old.fc.weight, new.fc.weight)
    assert torch.allclose(merge_adapter(old, tmp_path / "second" / "adapter").fc.weight, new.fc.weight, atol=1e-6)


@pytest.fixture
def adapter(tiny_target_folder, tmp_path):
    """An adapter of the tiny target that changes what it says."""
    model = get_peft_model(
        load_target(str(tiny_target_folder)).model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_head_of_an_adapted_target_decodes_with_it(tiny_target_folder, adapter, tmp_path, datasets_cache, capsys):
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo hello Yo hello"}]}
    (tmp_path / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 6)
    train = ["--target.name", tiny_target_folder, "--target.adapter", adapter, "--target.dtype", "float32"]
    train += ["--data.conversations", tmp_path / "talks.jsonl", "--train.max_steps", 2, "--head.draft_vocab_size", 64]
    assert main(["train", *map(str, [*train, "--out", tmp_path / "run"])]) == 0
    draft = tmp_path / "run" / "draft"

    def said(target, *more):
        command = [
            "generate",
            "--target",
            target,
            "--prompt",
            "Hi",
            "--max_new_tokens",
            12,
            "--dtype",
            "float32",
            "--quiet",
        ]
        capsys.readouterr()
        status = main([*map(str, [*command, *more])])
        return status, capsys.readouterr()

    adapted, bare = (said(tiny_target_folder, *more)[1].out for more in (["--adapter", adapter], []))
    assert adapted != bare
    assert said(tiny_target_folder, "--draft", draft)[1].out == adapted
    merged = load_target(str(tiny_target_folder), dtype=torch.float32, adapter=str(adapter))
    merged.model.save_pretrained(tmp_path / "merged")
    merged.tokenizer.save_pretrained(tmp_path / "merged")
    assert said(tmp_path / "merged", "--draft", draft)[1].out == adapted  # known by its weights, and adapted once
    base = shutil.copytree(tiny_target_folder, tmp_path / "base")
    status, told = said(base, "--draft", draft)
    assert status == 2
    assert "belongs to target" in told.err
    assert said(base, "--draft", draft, "--adapter", adapter)[1].out == adapted
