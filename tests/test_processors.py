"""Logits processors on trees: every one that `generate` knows sees each node with its own prefix, of its own row."""

import pytest
import torch
from tiny import VOCAB, tiny_head, tiny_target
from transformers import LogitsProcessorList
from transformers.generation import logits_process as known

from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.processors import TreeProcessors
from slipstream.decode.tree import TreeShape, make_tree

V, END = 12, 7
PREFIXES = [torch.tensor([9, 8, 4]), torch.tensor([4])]
TOKENS = torch.tensor([[4, 5, 6, 7, 5], [4, 6, 5, 9, 4]])  # of two trees, the roots first
PARENTS = torch.tensor([[0, 0, 0, 1, 3], [0, 0, 1, 1, 2]])

PROCESSORS = [
    [known.TemperatureLogitsWarper(0.7)],
    [known.TopKLogitsWarper(3)],
    [known.TopPLogitsWarper(0.6)],
    [known.TopHLogitsWarper(0.4)],
    [known.MinPLogitsWarper(0.2)],
    [known.TypicalLogitsWarper(0.5)],
    [known.EpsilonLogitsWarper(0.08)],
    [known.EtaLogitsWarper(0.2)],
    [known.LogitNormalization()],
    [known.SuppressTokensLogitsProcessor([2, 3]), known.InfNanRemoveLogitsProcessor()],
    [known.SuppressTokensAtBeginLogitsProcessor([2, 3, 5], 3)],
    [known.RepetitionPenaltyLogitsProcessor(1.7)],
    [known.NoRepeatNGramLogitsProcessor(2)],
    [known.SequenceBiasLogitsProcessor([[[7], 5.0], [[4, 5], -8.0], [[8, 4, 5, 2], 3.0]])],
    [known.NoBadWordsLogitsProcessor([[2], [4, 5], [6, 5, 1]], END)],
    [known.MinLengthLogitsProcessor(4, END)],
    [known.MinNewTokensLengthLogitsProcessor(3, 2, END)],
    [known.ForcedBOSTokenLogitsProcessor(3)],
    [known.ForcedEOSTokenLogitsProcessor(5, END)],
    [known.ExponentialDecayLengthPenalty((1, 1.5), END, 3)],
    [known.PrefixConstrainedLogitsProcessor(lambda _, ids: [int(ids.sum()) % V, int(ids[-1])], 1)],
    [known.WatermarkLogitsProcessor(V, "cpu")],
    [known.TopKLogitsWarper(6), known.RepetitionPenaltyLogitsProcessor(1.7), known.TopPLogitsWarper(0.8)],
]


def _lines():
    """Row, node and prefix of every node, told by walking up from it."""
    for row, prefix in enumerate(PREFIXES):
        for node in range(TOKENS.shape[1]):
            path, at = [], node
            while at:
                path.insert(0, int(TOKENS[row, at]))
                at = int(PARENTS[row, at])
            yield row, node, torch.tensor([*prefix.tolist(), *path])


@pytest.mark.parametrize("processors", PROCESSORS, ids=lambda group: type(group[-1]).__name__)
def test_processors_see_each_nodes_own_prefix(processors):
    tree = make_tree(TOKENS, PARENTS, torch.zeros(2, 5), levels=3)
    logits = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(0)) * 2
    before, group = logits.clone(), LogitsProcessorList(processors)
    out = TreeProcessors(group, 2)([0, 1], PREFIXES, tree, logits)
    assert logits.equal(before)
    assert not out.equal(before)
    for row, node, prefix in _lines():
        want = group(prefix[None], logits[row, node : node + 1].clone())[0]
        torch.testing.assert_close(out[row, node], want)


def test_processors_know_which_row_of_the_call_they_see():
    """Rows that ended have left: what was the third is now the first."""

    def allowed(row, ids):
        return [(int(ids.sum()) + 3 * row + i) % V for i in range(2)]

    tree = make_tree(TOKENS, PARENTS, torch.zeros(2, 5), levels=3)
    processors = LogitsProcessorList([known.PrefixConstrainedLogitsProcessor(allowed, 1)])
    out = TreeProcessors(processors, 3)([2, 0], PREFIXES, tree, torch.zeros(2, 5, V))
    for row, node, prefix in _lines():
        assert sorted(out[row, node].isfinite().nonzero()[:, 0].tolist()) == sorted(allowed([2, 0][row], prefix))


def thirds(row, ids):
    """Every third token, from which on depends on the row and on the last one."""
    return list(range(3 + row + int(ids[-1]) % 3, VOCAB, 3))


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([[5]], {"forced_bos_token_id": 9}),
        ([[5, 6, 7, 5, 6]], {"begin_suppress_tokens": list(range(0, VOCAB, 2))}),
        ([[5, 6, 7, 5, 6]], {"renormalize_logits": True, "remove_invalid_values": True}),
        ([[5, 6, 7, 5, 6]], {"watermarking_config": {"bias": 4.0, "seeding_scheme": "selfhash"}}),
        ([[5, 6, 7], [8, 9, 10]], {"prefix_allowed_tokens_fn": thirds}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_begin_or_constrain_a_text_are_generates(prompt, options):
    target, prompt = tiny_target(), torch.tensor(prompt)
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target), Policy(tree=TreeShape(3, 3, 12)))
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False, **options}
    want = target.model.generate(prompt, **given)
    assert target.model.generate(prompt, custom_generate=decoder.custom_generate, **given).tolist() == want.tolist()
