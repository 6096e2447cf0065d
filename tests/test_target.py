"""The target adapter: hidden states, and trees on every architecture without a line of code for any."""

import gc
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, VOCAB, OracleDrafter, greedy, tiny_head, tiny_target
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, T5Config, T5ForConditionalGeneration

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.cache import TreeCache, causal
from slipstream.decode.drafters import HeadDrafter, NGramDrafter, NoDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape, make_tree
from slipstream.distill import blocks, packing
from slipstream.distill.packing import pack
from slipstream.distill.support import context_of
from slipstream.distill.target import Target, aux_layer_ids

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")

GEMMA3N = {
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}


def _tree(tokens, parents, levels):
    return make_tree(tokens[None], torch.tensor([parents]), torch.zeros(1, len(parents)), levels)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tree_gives_each_node_what_its_path_gives_alone(architecture):
    """Two rows of different length at once; both are longer than every sliding window here, or nearly so."""
    target = tiny_target(architecture)
    torch.manual_seed(1)
    lengths, prompts = [15, 7], torch.randint(3, VOCAB, (2, 15))
    one = _tree(torch.randint(3, VOCAB, (9,)), [0, 0, 0, 1, 1, 2, 3, 6, 5], levels=4)
    other = _tree(torch.randint(3, VOCAB, (9,)), [0, 0, 1, 1, 3, 3, 0, 6, 7], levels=4)
    cache = TreeCache(4, batch=2)
    target.forward(prompts, cache=cache)
    cache.commit_first(lengths)
    tokens, depths, ancestors = (
        torch.cat([getattr(t, name) for t in (one, other)]) for name in ("tokens", "depths", "ancestors")
    )
    out = target.forward(
        tokens, position_ids=depths + torch.tensor(lengths)[:, None], visible=cache.visible(ancestors), cache=cache
    )
    for row, length in enumerate(lengths):
        for node in range(9):
            path = ancestors[row, node].nonzero().squeeze(1)
            alone = target.forward(torch.cat([prompts[row, :length], tokens[row, path]])[None])
            torch.testing.assert_close(out.logits[row, node], alone.logits[0, -1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(out.features[row, node], alone.features[0, -1], rtol=1e-4, atol=1e-4)


def test_committing_paths_equals_having_run_only_those_paths():
    target = tiny_target()
    prompts, drafts = torch.arange(3, 15).view(2, 6), torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33]])
    tree = make_tree(drafts, torch.tensor([[0, 0, 0, 2], [0, 0, 1, 1]]), torch.zeros(2, 4), levels=2)
    cache = TreeCache(4, batch=2)
    target.forward(prompts, cache=cache)
    cache.commit_first([6, 4])
    at = torch.tensor([[6], [4]])
    target.forward(tree.tokens, position_ids=tree.depths + at, visible=cache.visible(tree.ancestors), cache=cache)
    cache.commit([[0, 2, 3], [0]])
    assert cache.lengths == [9, 5]
    alone = torch.ones(2, 1, 1, dtype=torch.bool)
    after = target.forward(
        torch.tensor([[40], [41]]), position_ids=torch.tensor([[9], [5]]), visible=cache.visible(alone), cache=cache
    )
    for row, line in enumerate(([3, 4, 5, 6, 7, 8, 20, 22, 23, 40], [9, 10, 11, 12, 30, 41])):
        plain = target.forward(torch.tensor([line]))
        torch.testing.assert_close(after.logits[row, -1], plain.logits[0, -1], rtol=1e-4, atol=1e-4)
    cache.rollback()
    cache.keep([1])
    again = target.forward(torch.tensor([[41]]), position_ids=torch.tensor([[5]]), cache=cache)
    torch.testing.assert_close(again.logits[0], after.logits[1], rtol=1e-4, atol=1e-4)


@given(st.sets(st.integers(1, 15)), st.integers(0, 3))
def test_one_row_is_committed_as_the_rows_of_a_batch_are(nodes, committed):
    path, states = [0, *sorted(nodes)], torch.arange(3 * 20 * 2.0).view(1, 3, 20, 2)
    alone, batch = TreeCache(2, batch=1), TreeCache(2, batch=2)
    for cache in (alone, batch):
        for first, count, taken in ((0, committed, [*range(committed)]), (committed, 16, path)):
            for layer in cache.layers:
                new = states[:, :, first : first + count].expand(len(cache.lengths), -1, -1, -1)
                layer.update(new, -new)
            cache.commit([taken] * len(cache.lengths))
        assert cache.lengths == [committed + len(path)] * len(cache.lengths)
    kept = [*range(committed), *(committed + node for node in path)]
    for mine, theirs in zip(alone.layers, batch.layers, strict=True):
        for ours, others, sign in ((mine.keys, theirs.keys, 1), (mine.values, theirs.values, -1)):
            assert torch.equal(ours[:, :, : len(kept)], sign * states[:, :, kept])
            assert torch.equal(ours[:, :, : len(kept)], others[:1, :, : len(kept)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_continue_from_the_captured_state_as_the_model_does(architecture):
    target = tiny_target(architecture)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    captured, out = target.capture(ids), target.forward(ids)
    rows = torch.tensor([[True, False] * 4 + [True], [False] * 3 + [True] * 6])
    torch.testing.assert_close(target.logits(captured.hidden[rows]), out.logits[rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(captured.features, out.features)
    torch.testing.assert_close(target.forward(ids).logits, out.logits)  # and the model is itself again


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_texts_in_one_row_leave_the_states_each_leaves_alone(architecture):
    target = tiny_target(architecture)
    draw = torch.Generator().manual_seed(0)
    lengths = (9, 70, 1, 12)  # short and long ones are attended to by different kernels
    texts = [torch.randint(3, VOCAB, (length,), generator=draw) for length in lengths]
    starts = torch.tensor([sum(lengths[:i]) for i in range(4)]).repeat_interleave(torch.tensor(lengths))
    packed = target.capture(torch.cat(texts)[None], starts[None])
    alone = [target.capture(text[None]) for text in texts]
    for mine, theirs in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.cat(theirs, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])  # qwen2 and gpt_neox have biases
def test_packed_weights_give_what_the_model_gives_and_leave_it_as_it_is(architecture):
    target = tiny_target(architecture)
    target = Target(target.model.to(torch.bfloat16))
    names, ids = list(target.model.state_dict()), torch.arange(3, 12)[None]
    stock = target.model(ids).logits
    with blocks.used():
        plain = target.model(ids).logits
    cache = TreeCache(4)
    packed = target.forward(ids, cache=cache).logits
    assert target._packing is not None
    torch.testing.assert_close(packed, plain, rtol=0.05, atol=0.05)
    assert torch.equal(target.model(ids).logits, stock)
    assert list(target.model.state_dict()) == names
    assert pack(target.model) is target._packing  # another user of the same model shares what is packed


@needs_compiler
def test_compiled_decoding_gives_what_generate_gives():
    prompt = torch.tensor([[5, 6, 7, 8]])
    for architecture in ("llama", "qwen2"):  # the second in the same process, of the same sizes
        target = tiny_target(architecture, num_hidden_layers=2)
        target.compile()
        for drafter in (HeadDrafter(tiny_head(target), target), NGramDrafter()):
            decoder = Decoder(target, drafter, Policy(tree=TreeShape(3, 3, 8)))
            assert decoder.generate(prompt, max_new_tokens=30).sequences.tolist() == greedy(target, prompt, 30).tolist()


@needs_compiler
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="nothing is packed on this CPU")
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # qwen2 has biases
def test_compiled_forwards_use_packed_weights_and_forget_them_with_the_model(architecture):
    held = len(packing._PACKED), len(packing._JOINED)
    target = Target(tiny_target(architecture, num_hidden_layers=2).model.to(torch.bfloat16))
    target.compile()
    cache, ids = TreeCache(2, capacity=64), torch.arange(3, 12)[None]
    target.forward(ids, cache=cache)
    cache.commit_first([9])
    outs = []
    for how in (None, target.compiled):
        cache.compiled = how
        visible, positions = cache.visible(causal(4, 1, torch.device("cpu"))), torch.arange(9, 13)[None]
        outs.append(target.forward(ids[:, :4], position_ids=positions, visible=visible, cache=cache))
        cache.rollback()
    eager, compiled = outs
    torch.testing.assert_close(compiled.logits, eager.logits, rtol=0.05, atol=0.1)
    torch.testing.assert_close(compiled.features, eager.features, rtol=0.05, atol=0.1)
    assert len(packing._PACKED) == held[0] + 2 * 7 + 1
    # What reads the same states: queries, keys and values (with biases they stay apart), and the two of the gate.
    assert len(packing._JOINED) == held[1] + 2 * (2 if architecture == "llama" else 1)
    target.model.float().bfloat16()  # the weights lie elsewhere then
    cache.compiled = target.compiled
    again = target.forward(ids[:, :4], position_ids=positions, visible=visible, cache=cache)
    torch.testing.assert_close(again.logits, eager.logits, rtol=0.05, atol=0.1)
    del target, cache, eager, compiled, outs, again
    gc.collect()
    assert (len(packing._PACKED), len(packing._JOINED)) == held


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


@pytest.mark.parametrize(
    ("architecture", "overrides", "reason"),
    [
        ("rwkv", {}, "rwkv keeps a state from token to token"),
        ("mamba", {}, "mamba has linear_attention layers, whose state"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 2]]}, "gpt_neo has local layers"),
        ("deepseek_v32", {"num_key_value_heads": 4}, "deepseek_v32 has indexed_attention layers"),
        ("bloom", {}, "bloom counts positions by tokens in the cache"),
        ("falcon", {"alibi": True}, "falcon counts positions by tokens in the cache"),
        ("gemma3n_text", GEMMA3N, "gemma3n_text has layers that share keys and values"),
        ("bart", {"is_encoder_decoder": False}, "bart counts positions by tokens in the cache"),
    ],
)
def test_models_that_cannot_verify_a_tree_are_refused(architecture, overrides, reason):
    with pytest.raises(SlipstreamError, match=reason):
        tiny_target(architecture, **overrides)


def test_an_encoder_with_a_decoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(SlipstreamError, match="is an encoder and a decoder"):
        Target(model)


def test_the_context_ends_where_keys_would_be_computed_anew():
    ropes = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    ropes["original_max_position_embeddings"] = 32
    target = tiny_target("phi3", eos_token_id=None, original_max_position_embeddings=32, rope_parameters=ropes)
    prompt = torch.arange(3, 23)[None]
    want = greedy(target, prompt, 12)
    for drafter in (NoDrafter(), HeadDrafter(tiny_head(target), target), OracleDrafter(want)):
        decoder = Decoder(target, drafter, Policy(tree=TreeShape(4, 3, 12)))
        assert decoder.generate(prompt, max_new_tokens=60).sequences.tolist() == want.tolist()
    with pytest.raises(SlipstreamError, match="the context of phi3 is 32"):
        Decoder(target).generate(torch.arange(3, 36)[None])


def test_texts_end_before_queries_are_scaled_by_their_slot():
    target = tiny_target("llama4_text", max_position_embeddings=100_000)
    assert target.context == 8191 - 512
    with pytest.raises(SlipstreamError, match="this row of several texts has 9000"):
        target.capture(torch.zeros(1, 9000, dtype=torch.long), torch.zeros(1, 9000, dtype=torch.long))
    long = {"max_position_embeddings": 100_000, "attn_temperature_tuning": False}
    assert tiny_target("llama4_text", **long).context == 100_000


def test_a_config_without_a_context_is_refused():
    with pytest.raises(SlipstreamError, match="the config of remote has no max_position_embeddings"):
        context_of(PreTrainedConfig(), "remote")


class Products(TorchDispatchMode):
    """Notes the operators that multiply matrices over the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (VOCAB,):
            self.seen.append(operator._schema.name)
        return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_slice_of_the_prompt_is_one_product_with_the_output_layer(architecture):
    """As in `generate`, whose prompts' last positions a frozen layer would multiply row by row (packing.fold_rows)."""
    target = tiny_target(architecture)
    Target(target.model)  # again
    with torch.no_grad(), Products() as products:
        target.model(torch.randint(3, VOCAB, (3, 6)), logits_to_keep=1)
    assert "aten::mm" in products.seen
    assert "aten::bmm" not in products.seen
    assert len(target.model.get_output_embeddings()._forward_pre_hooks) == 1
