"""Every kind of head decodes what the target would, drafts as it was trained to, and survives its folder."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import ARCHITECTURES, HEADS, VOCAB, greedy, tiny_head, tiny_target

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import simulated_acceptance_length
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape
from slipstream.distill.heads import load_head, save_head


def pair(kind, **overrides):
    target = tiny_target(**overrides)
    head = tiny_head(target, **HEADS[kind])
    return head, target.reading(head.layer_ids)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("shape", [TreeShape.chain(4), TreeShape(3, 3, 12), TreeShape.fixed((3, 2, 1))], ids=str)
def test_greedy_output_is_that_of_generate(kind, shape):
    head, target = pair(kind)
    prompts = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (4, 9, 6)]
    want = [greedy(target, prompt[None], 16)[0, len(prompt) :].tolist() for prompt in prompts]
    ids = torch.stack([torch.nn.functional.pad(p, (9 - len(p), 0)) for p in prompts])
    out = Decoder(target, HeadDrafter(head, target), Policy(tree=shape)).generate(
        ids, attention_mask=(ids > 0).long(), max_new_tokens=16
    )
    assert [[token.id for token in row] for row in out.rows] == want


@pytest.mark.parametrize("kind", HEADS)
def test_what_the_unroll_simulates_is_what_chains_measure(kind):
    head, target = pair(kind)
    decoder = Decoder(target, HeadDrafter(head, target), Policy(tree=TreeShape.chain(3)))
    pairs, lengths = [], []
    for seed in range(12):
        prompt = torch.randint(3, VOCAB, (1, 5), generator=torch.Generator().manual_seed(seed))
        pairs.append((prompt[0].tolist(), greedy(target, prompt, 24)[0, 5:].tolist()))
        lengths += decoder.generate(prompt, max_new_tokens=24).stats.accept_lengths
    assert sum(lengths) / len(lengths) == pytest.approx(simulated_acceptance_length(head, target, pairs, 3), rel=1e-6)
    assert max(lengths) > 1


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_the_same_out_of_its_folder(kind, tmp_path):
    head, target = pair(kind)
    save_head(head, tmp_path / "draft", {})
    again = load_head(tmp_path / "draft")
    again.borrow(target)
    ids = torch.randint(3, VOCAB, (1, 6))
    feature = head.fuse(target.forward(ids).features)
    assert torch.equal(feature, again.fuse(target.forward(ids).features))
    assert torch.equal(head.logits(feature), again.logits(feature))
    names = set(load_file(tmp_path / "draft" / "model.safetensors"))
    assert ("lm_head.weight" in names) == (HEADS[kind].get("kind") != "eagle1")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_eagle1_head_reads_the_state_behind_the_targets_last_norm(architecture):
    target = tiny_target(architecture)
    head = tiny_head(target, kind="eagle1")
    assert head.layer_ids == [4]
    ids = torch.randint(3, VOCAB, (1, 7))
    captured = target.reading([4]).capture(ids)
    assert torch.equal(captured.features, captured.hidden)
    assert torch.equal(target.reading([4]).forward(ids).features, captured.hidden)


def test_a_target_that_gives_other_layers_is_refused():
    head, _ = pair("eagle1")
    with pytest.raises(SlipstreamError, match=r"reads layers \[4\]"):
        head.check_target(tiny_target())


def test_an_eagle1_head_of_another_width_is_refused():
    with pytest.raises(SlipstreamError, match="as wide as its target: 32, not 16"):
        tiny_head(tiny_target(), kind="eagle1", hidden_size=16)
