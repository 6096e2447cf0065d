"""Caches that grow while rows of different length are decoded: token for token what `generate` gives each of them."""

import pytest
import torch
from tiny import VOCAB, greedy, tiny_head, tiny_target

from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_rows_cross_the_edges_of_the_buffers_one_after_another(architecture):
    """Buffers hold 256 tokens, then 512, then 768: each row passes both edges in a round of its own."""
    new, lengths = 290, [251, 233, 244]
    target = tiny_target(architecture, max_position_embeddings=640, eos_token_id=None)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,), generator=draw) for length in lengths]
    ids = torch.stack([torch.nn.functional.pad(p, (max(lengths) - len(p), 0)) for p in prompts])
    mask = (ids > 0).long()
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target), Policy(tree=TreeShape(3, 3, 10, copied=4)))
    out = decoder.generate(ids, attention_mask=mask, max_new_tokens=new)
    for row, prompt in zip(out.rows, prompts, strict=True):
        assert [token.id for token in row] == greedy(target, prompt[None], new)[0, len(prompt) :].tolist()
    assert {layer.capacity for layer in decoder.drafter.cache.layers} == {768}
    assert any(length > 1 for length in out.stats.accept_lengths)  # some rounds moved what they kept
