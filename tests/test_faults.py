"""Numbers that are not finite end a request at once, and are told with their row, place and layer."""

import math

import pytest
import torch
from tiny import greedy, tiny_head, tiny_target
from transformers import LogitsProcessor, LogitsProcessorList

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.drafters import HeadDrafter, NoDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape, make_tree

PROMPT = torch.tensor([[5, 6, 7, 8]])


def _broken(place, index, value):
    """A decoder with a head whose target has a weight that is not finite."""
    target = tiny_target()
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target), Policy(tree=TreeShape(3, 3, 8)))
    with torch.no_grad():
        target.model.get_parameter(place)[index] = value
    return decoder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("place", "index", "value", "origin"),
    [
        ("model.embed_tokens.weight", (7, 3), math.nan, "the embedding layer is the first .*, at text position 2"),
        ("model.layers.0.mlp.down_proj.weight", (1, 2), math.nan, "layer 0 is the first .*, at text position 0"),
        ("model.layers.2.mlp.down_proj.weight", (1, 2), math.nan, "layer 2 is the first .*, at text position 0"),
        ("model.layers.1.self_attn.o_proj.weight", (1, 2), math.inf, "layer 1 is the first .*, at text position 0"),
        ("model.layers.3.mlp.down_proj.weight", (1, 2), math.inf, "layer 3 or the norm behind it is the first"),
        ("model.norm.weight", 5, math.inf, "layer 3 or the norm behind it is the first"),
        ("lm_head.weight", 9, math.nan, "its output layer is the first to break"),
    ],
)
def test_the_first_layer_that_breaks_is_named(place, index, value, origin, temperature):
    decoder = _broken(place, index, value)
    told = rf"the logits of row 0 at text position 3 are not finite: {origin}.*; check the target's weights and dtype"
    with pytest.raises(SlipstreamError, match=told):
        decoder.generate(PROMPT, max_new_tokens=8, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_of_plus_infinity_is_an_error_and_one_of_minus_infinity_a_token_that_cannot_be(temperature):
    decoder = _broken("lm_head.weight", (9, 0), math.inf)  # as the sign of what it reads
    model = decoder.target.model
    state = decoder.target.capture(PROMPT).hidden[0, -1, 0]
    with torch.no_grad():
        model.lm_head.weight[9, 0] = math.inf * float(state.sign())
    with pytest.raises(SlipstreamError, match="at text position 3 are not finite: its output layer"):
        decoder.generate(PROMPT, max_new_tokens=1, temperature=temperature)
    with torch.no_grad():
        model.lm_head.weight[9, 0] = -math.inf * float(state.sign())
    assert decoder.generate(PROMPT, max_new_tokens=1, temperature=temperature).tokens[0].id != 9


def test_the_row_and_the_position_are_those_of_the_call():
    """The first row has ended and left when the second comes to a token whose embedding is broken, and which no draft is."""
    target, prompts = tiny_target(eos_token_id=None), torch.tensor([[0, 5, 6, 7], [11, 12, 13, 14]])
    head = tiny_head(target, size=64)
    first, second = greedy(target, prompts[:1, 1:], 3)[0, 3:].tolist(), greedy(target, prompts[1:], 30)[0, 4:].tolist()
    where = next(i for i, token in enumerate(second) if i > 4 and token >= 64 and token not in [*first, *second[:i]])
    stop = next(token for token in first if token not in second[: where + 1])
    with torch.no_grad():
        target.model.model.embed_tokens.weight[second[where]] = math.nan
    decoder = Decoder(target, HeadDrafter(head, target), Policy(tree=TreeShape(3, 3, 8)))
    given = {"attention_mask": (prompts > 0).long(), "max_new_tokens": 30, "eos_token_id": stop}
    told = f"row 1 at text position {4 + where} are not finite: the embedding layer .* at text position {4 + where};"
    with pytest.raises(SlipstreamError, match=told):
        decoder.generate(prompts, **given)


class Adds(LogitsProcessor):
    """A user's own: adds a number to a token's logit."""

    def __init__(self, token, number):
        self.token, self.number = token, number

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] += self.number
        return scores


@pytest.mark.parametrize("number", [math.inf, math.nan])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_processors_that_break_logits_are_told_from_a_target_that_does(number, temperature):
    target = tiny_target()
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target))
    own = LogitsProcessorList([Adds(9, number)])
    with pytest.raises(
        SlipstreamError, match="row 0 at text position 3 are finite, but not behind the logits processors"
    ):
        decoder.generate(PROMPT, max_new_tokens=8, temperature=temperature, logits_processor=own)


def test_a_broken_draft_is_told_from_a_broken_text():
    """A masked value that is NaN is NaN still: one draft breaks all nodes of its tree."""
    target = tiny_target(eos_token_id=None)
    text = greedy(target, PROMPT, 12)[0].tolist()
    token = next(token for token in range(3, 64) if token not in text)

    class Drafts(NoDrafter):
        def propose(self, round):
            tokens = torch.stack([round.roots, torch.full_like(round.roots, token)], 1)
            return make_tree(tokens, torch.tensor([[0, 0]]), torch.zeros(1, 2), levels=1)

    with torch.no_grad():
        target.model.model.embed_tokens.weight[token] = math.nan
    with pytest.raises(
        SlipstreamError, match=r"row 0 at text position 4 are not finite: by itself the text has finite"
    ):
        Decoder(target, Drafts()).generate(PROMPT, max_new_tokens=12)
