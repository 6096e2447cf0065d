"""On a card: the same tokens as `generate` gives there, in fp32 without TF32."""

import pytest
import torch
from tiny import greedy, tiny_head, tiny_target

from slipstream.decode.drafters import HeadDrafter, NGramDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.speculation import Speculation
from slipstream.decode.tree import TreeShape
from slipstream.distill.target import Target

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("schedule", ["fixed", "cost"])
def test_decoding_on_a_card_gives_what_generate_gives_there(architecture, schedule):
    torch.backends.cuda.matmul.allow_tf32 = False
    target = Target(tiny_target(architecture).model.cuda(), name=architecture)
    head = tiny_head(target).cuda()
    prompts = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0)).cuda()
    truth = greedy(target, prompts, 24)
    policy = Policy(tree=TreeShape(3, 3, 12), speculation=Speculation(schedule))
    for drafter in (HeadDrafter(head, target), NGramDrafter()):
        out = Decoder(target, drafter, policy).generate(prompts, max_new_tokens=24)
        assert out.sequences.tolist() == truth[:, : out.sequences.shape[1]].tolist()


def test_sampling_on_a_card_depends_on_nothing_but_the_seed():
    target = Target(tiny_target().model.cuda())
    decoder = Decoder(target, HeadDrafter(tiny_head(target).cuda(), target))
    prompt = torch.tensor([[5, 6, 7]]).cuda()
    first, again, other = (
        decoder.generate(prompt, max_new_tokens=20, temperature=1.0, seed=seed).sequences.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other
