"""The target adapter: hidden states, and trees on every architecture without a line of code for any."""

import pytest
import torch
from tiny import ARCHITECTURES, VOCAB, tiny_target

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.cache import TreeCache
from slipstream.decode.tree import make_tree
from slipstream.distill.target import Target, aux_layer_ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tree_gives_each_node_what_its_path_gives_alone(architecture):
    target = tiny_target(architecture)
    torch.manual_seed(1)
    prompt = torch.randint(3, VOCAB, (1, 15))  # longer than every sliding window here
    parents = torch.tensor([0, 0, 0, 1, 1, 2, 3, 6, 5])
    tree = make_tree(torch.randint(3, VOCAB, (9,)), parents, torch.zeros(9), levels=4)
    cache = TreeCache(4)
    target.forward(prompt, cache=cache)
    cache.commit(range(15))
    visible = torch.cat([torch.ones(9, 15, dtype=torch.bool), tree.ancestors], 1)
    out = target.forward(tree.tokens[None], position_ids=(tree.depths + 15)[None], visible=visible[None], cache=cache)
    for node in range(9):
        path = tree.ancestors[node].nonzero().squeeze(1)
        alone = target.forward(torch.cat([prompt, tree.tokens[path][None]], 1))
        torch.testing.assert_close(out.logits[0, node], alone.logits[0, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.features[0, node], alone.features[0, -1], rtol=1e-4, atol=1e-4)


def test_committing_a_path_equals_having_run_only_that_path():
    target = tiny_target()
    prompt, tree_tokens = torch.arange(3, 9)[None], torch.tensor([20, 21, 22, 23])
    tree = make_tree(tree_tokens, torch.tensor([0, 0, 0, 2]), torch.zeros(4), levels=2)
    cache = TreeCache(4)
    target.forward(prompt, cache=cache)
    cache.commit(range(6))
    visible = torch.cat([torch.ones(4, 6, dtype=torch.bool), tree.ancestors], 1)[None]
    target.forward(tree.tokens[None], position_ids=(tree.depths + 6)[None], visible=visible, cache=cache)
    cache.commit([0, 2, 3])
    after = target.forward(torch.tensor([[30]]), position_ids=torch.tensor([[9]]), cache=cache)
    plain = target.forward(torch.cat([prompt, torch.tensor([[20, 22, 23, 30]])], 1))
    assert cache.length == 9
    torch.testing.assert_close(after.logits[0, -1], plain.logits[0, -1], rtol=1e-4, atol=1e-4)


def test_features_are_the_states_entering_the_chosen_layers():
    target = tiny_target("qwen2")
    ids = torch.arange(3, 10)[None]
    states = target.model(ids, output_hidden_states=True).hidden_states
    expected = torch.cat([states[i] for i in target.layer_ids], -1)
    torch.testing.assert_close(target.forward(ids).features, expected)


@pytest.mark.parametrize(("layers", "ids"), [(30, [2, 15, 27]), (32, [2, 16, 29]), (7, [2, 3, 4]), (4, [1, 2, 3])])
def test_aux_layers_are_those_of_eagle3_and_distinct_in_shallow_targets(layers, ids):
    assert aux_layer_ids(layers) == ids


@pytest.mark.parametrize("layers", range(1, 10))
def test_aux_layers_exist_and_are_distinct(layers):
    ids = aux_layer_ids(layers)
    assert len(set(ids)) == len(ids)
    assert max(ids) <= layers


def test_a_layer_beyond_the_target_is_refused():
    model = tiny_target().model
    with pytest.raises(SlipstreamError, match="layer 9"):
        Target(model, layer_ids=[1, 9])
