"""Decoding: token-identical to `generate` when greedy, row by row, whatever drafts, tree, batch and architecture."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, VOCAB, OracleDrafter, greedy, tiny_head, tiny_target
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import slipstream
from slipstream.configs.errors import SlipstreamError
from slipstream.decode.drafters import HeadDrafter, ModelDrafter, NGramDrafter, NoDrafter, Round
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.processors import make_config
from slipstream.decode.tree import TreeBuilder, TreeShape, fixed_levels, graft, make_tree
from slipstream.decode.verify import Verifier
from slipstream.distill.target import Target, load_target

SHAPES = [TreeShape.chain(4), TreeShape.fixed((3, 2, 1)), TreeShape(3, 3, 12, copied=4), TreeShape(5, 4, 20)]
DRAFTERS = ["none", "head", "model", "ngram", "oracle"]
_MODELS = {}


def _target(architecture):
    if architecture not in _MODELS:
        _MODELS[architecture] = tiny_target(architecture)
    return _MODELS[architecture]


def _drafter(kind, target, truth):
    if kind == "model":
        return ModelDrafter(tiny_target("llama", seed=1), target)
    return {
        "none": NoDrafter,
        "head": lambda: HeadDrafter(tiny_head(target), target),
        "ngram": NGramDrafter,
        "oracle": lambda: OracleDrafter(truth),
    }[kind]()


def _greedy_rows(target, prompts, new):
    """Each prompt alone through `generate`: new tokens, padded with 0 to [B, n + new]."""
    rows = [greedy(target, prompt[None], new)[0] for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    return ids, mask


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_output_is_that_of_generate(architecture, drafter, batch):
    target = _target(architecture)
    for i, shape in enumerate(SHAPES):
        draw = torch.Generator().manual_seed(i)
        prompts = [torch.randint(3, VOCAB, (3 + (4 * i + 5 * row) % 13,), generator=draw) for row in range(batch)]
        truth = _greedy_rows(target, prompts, 16)
        ids, mask = _left_padded(prompts)
        decoder = Decoder(target, _drafter(drafter, target, truth), Policy(tree=shape))
        out = decoder.generate(ids, attention_mask=mask, max_new_tokens=16)
        for row, prompt in enumerate(prompts):
            want = greedy(target, prompt[None], 16)[0, len(prompt) :].tolist()
            assert [token.id for token in out.rows[row]] == want
            assert out.sequences[row, ids.shape[1] :][: len(want)].tolist() == want
        assert sum(out.stats.accept_lengths) == out.stats.new_tokens - batch
        if drafter == "oracle" and out.stats.new_tokens > 8 * batch:
            assert out.stats.acceptance_length > 1


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=4),
    new=st.integers(0, 20),
    depth=st.integers(1, 5),
    top_k=st.integers(1, 4),
    nodes=st.integers(2, 14),
    copied=st.integers(0, 5),
    stop=st.integers(0, 19),
    drafter=st.sampled_from(DRAFTERS),
    right=st.booleans(),
)
def test_any_prompts_lengths_and_stops_give_what_generate_gives(
    prompts, new, depth, top_k, nodes, copied, stop, drafter, right
):
    target = _target("llama")
    rows = [torch.tensor(prompt) for prompt in prompts]
    # A token of the first row's own output ends all rows: in the middle of an accepted path, as a bonus, or never.
    line = greedy(target, rows[0][None], 20)[0, len(rows[0]) :]
    eos = int(line[min(stop, len(line) - 1)])
    ids, mask = _left_padded(rows)
    if right:
        ids, mask = ids.new_zeros(ids.shape), mask.flip(1)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row)] = row
    truth = _greedy_rows(target, rows, 20)
    decoder = Decoder(
        target, _drafter(drafter, target, truth), Policy(tree=TreeShape(depth, top_k, nodes, copied=copied))
    )
    out = decoder.generate(ids, attention_mask=mask, max_new_tokens=new, eos_token_id=eos)
    for row, got in zip(rows, out.rows, strict=True):
        if not new:
            assert got == []
            continue
        want = target.model.generate(
            row[None], attention_mask=torch.ones_like(row)[None], max_new_tokens=new, do_sample=False, eos_token_id=eos
        )
        assert [token.id for token in got] == want[0, len(row) :].tolist()


@pytest.mark.parametrize("limit", range(10))
def test_the_limit_is_exact_to_the_token(limit):
    target = tiny_target()
    prompt = torch.tensor([[5, 6, 7]])
    truth = greedy(target, prompt, 12)
    decoder = Decoder(target, OracleDrafter(truth), Policy(tree=TreeShape(4, 3, 16)))
    out = decoder.generate(prompt, max_new_tokens=limit)
    assert out.sequences.tolist() == truth[:, : 3 + limit].tolist()


def test_rows_that_end_leave_and_the_others_go_on_as_they_would_alone():
    target = tiny_target()
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    stop = int(greedy(target, prompts[1:2], 12)[0, 5])
    out = Decoder(target, HeadDrafter(tiny_head(target), target)).generate(
        prompts, max_new_tokens=12, eos_token_id=stop
    )
    lengths = [len(row) for row in out.rows]
    assert min(lengths) < max(lengths) == 12
    for line, row in zip(out.sequences, out.rows, strict=True):
        assert line[3 + len(row) :].tolist() == [0] * (max(lengths) - len(row))  # the pad token


@pytest.mark.parametrize("copied", [0, 4])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_row_draws_the_same_alone_and_in_a_batch(temperature, copied):
    target = tiny_target(initializer_range=0.1)
    prompts = torch.tensor([[5, 6, 7, 5, 6], [8, 9, 10, 11, 12], [11, 12, 13, 14, 15]])  # one repeats itself
    policy = Policy(tree=TreeShape(3, 3, 9, copied=copied))
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target), policy)
    together = decoder.generate(prompts, max_new_tokens=15, temperature=temperature, seed=4)
    for row in range(3):
        alone = decoder.generate(prompts[row : row + 1], max_new_tokens=15, temperature=temperature, seed=4 + row)
        assert [t.id for t in alone.rows[0]] == [t.id for t in together.rows[row]]


@pytest.mark.parametrize(
    ("shape", "verify"),
    [
        (TreeShape.chain(3, sampled=True), "exact"),
        (TreeShape.chain(3, sampled=True), Verifier("block")),
        (TreeShape.fixed((2, 2), sampled=True), "exact"),
    ],
    ids=["chain", "block", "tree"],
)
def test_a_row_draws_the_same_alone_where_drafts_are_drawn(shape, verify):
    target = tiny_target(initializer_range=0.1)
    prompts = torch.tensor([[5, 6, 7, 5, 6], [8, 9, 10, 11, 12], [11, 12, 13, 14, 15]])
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target), Policy(tree=shape))
    asked = {"max_new_tokens": 15, "temperature": 1.0, "verify": verify}
    together = decoder.generate(prompts, seed=4, **asked)
    for row in range(3):
        alone = decoder.generate(prompts[row : row + 1], seed=4 + row, **asked)
        assert [t.id for t in alone.rows[0]] == [t.id for t in together.rows[row]]


def test_decoders_of_a_target_share_the_caches_that_graphs_were_recorded_for():
    target = tiny_target()
    assert Decoder(target)._caches is Decoder(target, NGramDrafter())._caches
    assert Decoder(tiny_target())._caches is not Decoder(target)._caches


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 2**63 - 1])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with pytest.raises(SlipstreamError, match=f"seed must fit into 64 bits, not {seed}"):
        Decoder(tiny_target()).generate(prompts, max_new_tokens=2, temperature=1.0, seed=seed)


def test_output_ends_at_the_context():
    target = tiny_target(max_position_embeddings=16)
    prompts = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    out = Decoder(target, HeadDrafter(tiny_head(target), target)).generate(
        prompts, attention_mask=mask, max_new_tokens=50
    )
    assert [len(row) for row in out.rows] == [6, 10]


@pytest.mark.parametrize("shape", [(0,), (1, 0), (0, 3)])
def test_anything_but_prompts_is_refused(shape):
    with pytest.raises(SlipstreamError, match="must be prompts"):
        Decoder(tiny_target()).generate(torch.ones(shape, dtype=torch.long))


def test_a_prompt_that_is_all_padding_or_longer_than_the_context_is_refused():
    decoder = Decoder(tiny_target())
    with pytest.raises(SlipstreamError, match="context of llama is 128"):
        decoder.generate(torch.ones(1, 128, dtype=torch.long))
    with pytest.raises(SlipstreamError, match="prompt 1 is empty"):
        decoder.generate(torch.ones(2, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_streamed_tokens_are_the_output():
    target, got = tiny_target(), []
    out = Decoder(target).generate(torch.tensor([[5, 6]]), max_new_tokens=6, on_tokens=got.extend)
    assert [t.id for t in got] == out.sequences[0, 2:].tolist()
    with pytest.raises(SlipstreamError, match="follows one prompt, not 2"):
        Decoder(target).generate(torch.ones(2, 3, dtype=torch.long), on_tokens=got.extend)


OPTIONS = [
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[11], [20, 21]]},
    {"min_new_tokens": 9, "eos_token_id": 30},
    {"forced_eos_token_id": 9},
    {"suppress_tokens": [4, 5, 6, 40]},
    {"sequence_bias": [[[7], 5.0], [[12, 13], -8.0]]},
    {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 30},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_every_logits_processor_works_on_trees_as_in_generate(options):
    target = tiny_target()
    prompt = torch.tensor([[5, 6, 7, 5, 6]])
    want = target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=14, do_sample=False, **options
    )
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target), Policy(tree=TreeShape(3, 3, 12)))
    assert decoder.generate(prompt, max_new_tokens=14, **options).sequences.tolist() == want.tolist()


class Alternate(LogitsProcessor):
    """A user's own: tokens of the other parity than the prefix is long."""

    def __call__(self, input_ids, scores):
        wrong = (torch.arange(scores.shape[1]) + input_ids.shape[1]) % 2 == 0
        return scores.masked_fill(wrong, -torch.inf)


def test_stop_strings_and_a_time_limit_end_an_answer_as_in_generate(tiny_target_folder):
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    target.model.generation_config.eos_token_id = None
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target))
    ids = torch.arange(3, 9)[None]
    plain = decoder.generate(ids, max_new_tokens=24, eos_token_id=None)
    text = target.chat_tokenizer.decode([token.id for token in plain.tokens[6:8]])
    options = {"max_new_tokens": 24, "stop_strings": [text]}
    theirs = target.model.generate(ids, do_sample=False, tokenizer=target.chat_tokenizer, **options)
    ours = decoder.generate(ids, eos_token_id=None, **options)
    assert ours.sequences.tolist() == theirs.tolist()
    assert len(ours.tokens) <= 8
    assert len(decoder.generate(ids, max_new_tokens=24, eos_token_id=None, max_time=-1.0).tokens) == 1
    with pytest.raises(SlipstreamError, match="must be a tensor of token ids, \\[B, n\\], not str"):
        decoder.generate("Hi")


def test_a_users_own_processor_and_stopping_criteria_are_honoured():
    target = tiny_target()
    prompt = torch.tensor([[5, 6, 7]])
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target))
    out = decoder.generate(prompt, max_new_tokens=12, logits_processor=LogitsProcessorList([Alternate()]))
    assert len(out.tokens) > 4
    assert all(token.id % 2 == (3 + i + 1) % 2 for i, token in enumerate(out.tokens))
    ends = [lambda ids, scores: torch.tensor([ids.shape[1] >= 9])]  # `generate` takes a plain list as well
    assert len(decoder.generate(prompt, max_new_tokens=12, stopping_criteria=ends).tokens) == 6
    greedily = decoder.generate(prompt, max_new_tokens=12, do_sample=False, temperature=2.0)
    assert greedily.sequences.equal(decoder.generate(prompt, max_new_tokens=12).sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalti": 1.2}, "did you mean 'repetition_penalty'"),
        ({"num_beams": 4}, "num_beams=4 does not go with tree decoding"),
        ({"num_beam_groups": 2}, "num_beam_groups=2 does not go with tree decoding"),
        ({"diversity_penalty": 0.5}, "diversity_penalty=0.5 does not go with tree decoding"),
        ({"constraints": [object()]}, "constraints=.* does not go with tree decoding"),
        ({"force_words_ids": [[7]]}, r"force_words_ids=\[\[7\]\] does not go with tree decoding"),
        ({"guidance_scale": 2.0}, "keeps a state from token to token"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative"),
        ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty=1.2 does not go with tree decoding"),
        ({"output_scores": True}, "output_scores=True does not go with tree decoding"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    with pytest.raises(SlipstreamError, match=message):
        Decoder(tiny_target()).generate(torch.tensor([[5, 6]]), **options)


@pytest.mark.parametrize("batch", [1, 2])
def test_custom_generate_is_generate(batch):
    target = tiny_target()
    ids, mask = _left_padded([torch.arange(3, 9), torch.arange(20, 24)][:batch])
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target))
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.2}
    want = target.model.generate(ids, **settings)
    assert target.model.generate(ids, custom_generate=decoder.custom_generate, **settings).tolist() == want.tolist()
    with pytest.raises(SlipstreamError, match="another model"):
        tiny_target().model.generate(ids, custom_generate=decoder.custom_generate, **settings)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.ones(1, 4, 32)}, "'inputs_embeds' does not go with tree decoding"),
        ({"position_ids": torch.arange(4)[None] + 2}, "position_ids must count the tokens"),
        ({"token_type_ids": torch.tensor([[0, 0, 1, 1]])}, "'token_type_ids' does not go"),
        ({"token_type_ids": torch.zeros(1, 4)}, None),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1]]), "position_ids": torch.tensor([[0, 0, 1, 2]])}, None),
    ],
)
def test_inputs_beside_the_prompt_are_refused_where_they_would_count(inputs, message):
    decoder, ids = Decoder(tiny_target()), torch.tensor([[5, 6, 7, 8]])
    config = make_config(decoder.target, None, {"max_new_tokens": 3}, 4)
    given = {"logits_processor": LogitsProcessorList(), "stopping_criteria": [], "generation_config": config, **inputs}
    if message is None:
        assert decoder.custom_generate(decoder.target.model, ids, **given).shape == (1, 7)
        return
    with pytest.raises(SlipstreamError, match=message):
        decoder.custom_generate(decoder.target.model, ids, **given)


def test_a_cache_that_holds_more_than_the_prompt_is_refused():
    target, ids, past = tiny_target(), torch.arange(3, 9)[None], DynamicCache()
    target.model(ids[:, :4], past_key_values=past)
    settings = {"custom_generate": Decoder(target).custom_generate, "past_key_values": past, "max_new_tokens": 3}
    with pytest.raises(SlipstreamError, match="past_key_values holds 4 tokens: give all of them in input_ids"):
        target.model.generate(ids[:, 4:], attention_mask=torch.ones_like(ids), **settings)
    want = greedy(target, ids, 3)
    assert target.model.generate(ids, attention_mask=torch.ones_like(ids), **settings).equal(want)


@pytest.mark.parametrize("rule", ["mars:margin=3", "mars:ratio=0.1", "mars:odds=0", "typical:epsilon=0", "top_n"])
@pytest.mark.parametrize("options", [{"suppress_tokens": list(range(0, VOCAB, 2))}, {"top_k": 1}])
def test_no_rule_lets_a_token_pass_that_the_processors_forbid(rule, options):
    """The draft is always the runner-up of the raw logits."""
    target = tiny_target(initializer_range=0.1)

    class RunnerUp(NoDrafter):
        def propose(self, round):
            second = target.forward(round.ids[:, : round.lengths[0]]).logits[:, -1].topk(2).indices[:, 1:]
            tokens = torch.cat([round.roots[:, None], second], 1)
            return make_tree(tokens, torch.tensor([[0, 0]]), torch.zeros(1, 2), levels=1)

    prompt = torch.tensor([[5, 6, 7]])
    out = Decoder(target, RunnerUp()).generate(prompt, max_new_tokens=40, temperature=0.8, verify=rule, **options)
    if "top_k" in options:
        want = target.forward(out.sequences).logits[0, 2:-1].argmax(-1)
        assert [token.id for token in out.tokens] == want.tolist()
    else:
        assert all(token.id % 2 for token in out.tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_processors_that_forbid_every_token_are_told(temperature):
    with pytest.raises(SlipstreamError, match="not behind the logits processors: check whether these leave a token"):
        Decoder(tiny_target()).generate(
            torch.tensor([[5, 6]]), max_new_tokens=4, temperature=temperature, suppress_tokens=list(range(VOCAB))
        )


def test_block_verification_decodes():
    target = tiny_target(eos_token_id=None)
    chain = Policy(tree=TreeShape.chain(3, sampled=True))
    head = tiny_head(target)
    out = Decoder(target, HeadDrafter(head, target), chain).generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=24, temperature=1.0, verify="block"
    )
    assert len(out.tokens) == 24


def test_drafters_keep_to_the_context_and_to_their_own():
    target = tiny_target("gpt2", max_position_embeddings=32)
    prompt = torch.tensor([[5, 6, 7] * 8])
    for drafter in (NGramDrafter(), ModelDrafter(tiny_target("gpt2", seed=1, max_position_embeddings=26), target)):
        out = Decoder(target, drafter, Policy(tree=TreeShape.chain(10))).generate(prompt, max_new_tokens=50)
        assert out.sequences.equal(greedy(target, prompt, 8))


def test_a_draft_model_may_know_fewer_tokens():
    target = tiny_target()
    drafter = ModelDrafter(tiny_target(seed=1, vocab_size=64), target)
    prompt = torch.tensor([[5, 90, 7, 80]])
    assert Decoder(target, drafter).generate(prompt, max_new_tokens=12).sequences.equal(greedy(target, prompt, 12))


def test_a_draft_model_with_another_tokenizer_is_refused(tiny_tokenizer):
    def model(*tokens, name):
        tokenizer = deepcopy(tiny_tokenizer)
        tokenizer.add_tokens(list(tokens))
        return Target(tiny_target(vocab_size=len(tokenizer) + 8).model, tokenizer, name=name)

    target = model("Ahoy", "Ahem", name="large")
    ModelDrafter(model("Ahoy", name="small"), target)  # it may know fewer
    with pytest.raises(
        SlipstreamError, match=r"small has another tokenizer than large: token 'Aye' is \d+ there and unknown"
    ):
        ModelDrafter(model("Ahoy", "Ahem", "Aye", name="small"), target)
    with pytest.raises(SlipstreamError, match=r"than large: token '(Ahoy|Ahem)' is \d+ there and \d+ here"):
        ModelDrafter(model("Ahem", "Ahoy", name="small"), target)
    with pytest.raises(
        SlipstreamError, match="draft model llama has 120 tokens, target llama 97"
    ):  # without tokenizers
        ModelDrafter(tiny_target(vocab_size=120), tiny_target())


def test_load_takes_models_and_drafters_and_nothing_else():
    target, prompt = tiny_target(), torch.tensor([[5, 6, 7]])
    want = greedy(target, prompt, 8)
    for draft in (tiny_target(seed=1).model, NGramDrafter(), "ngram", "none"):
        decoder = slipstream.load(target.model, draft)
        assert isinstance(decoder.drafter, NoDrafter) is (draft == "none")
        assert decoder.generate(prompt, max_new_tokens=8).sequences.equal(want)
    with pytest.raises(SlipstreamError, match="draft must be a folder, a hub id, a head or a model, not int"):
        slipstream.load(target, 3)


def test_a_fixed_tree_wider_than_the_drafts_vocabulary_is_refused():
    target = tiny_target()
    decoder = Decoder(target, HeadDrafter(tiny_head(target, size=3), target), Policy(tree=TreeShape.fixed((5, 2))))
    with pytest.raises(SlipstreamError, match="5 children of one node, the draft knows 3 tokens"):
        decoder.generate(torch.tensor([[5, 6]]), max_new_tokens=4)


def test_budget_zero_is_exact_token_for_token():
    target = tiny_target()
    prompt = torch.tensor([[5, 6, 7]])
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target), Policy(tree=TreeShape(3, 3, 12)))
    rule = Verifier("mars", "margin", 50.0, per_request=0)
    assert rule.lossless
    assert (
        decoder.generate(prompt, verify=rule, max_new_tokens=20).sequences.tolist()
        == greedy(target, prompt, 20).tolist()
    )


class RunnerUpDrafter(NoDrafter):
    """Always proposes the target's second choice."""

    def __init__(self, target):
        self.target = target

    def propose(self, round):
        second = self.target.forward(round.ids[:, : round.lengths[0]]).logits[:, -1].topk(2).indices[:, 1]
        return make_tree(torch.stack([round.roots, second], 1), torch.tensor([[0, 0]]), torch.zeros(1, 2), levels=1)


def test_relaxed_tokens_stay_within_the_threshold_and_their_regret_adds_up():
    target = tiny_target(initializer_range=0.1)
    decoder = Decoder(target, RunnerUpDrafter(target))
    out = decoder.generate(torch.tensor([[5, 6, 7]]), verify=Verifier("mars", "margin", 0.5), max_new_tokens=60)
    relaxed = [t for t in out.tokens if t.tag == "relaxed"]
    assert 0 < len(relaxed) == out.stats.relaxed
    assert all(0 <= t.margin <= 0.5 for t in relaxed)
    assert any(t.tag == "bonus" and t.margin > 0.5 for t in out.tokens)
    assert out.stats.regret == pytest.approx(sum(t.regret for t in relaxed))


def test_the_tree_keeps_the_best_nodes_with_their_ancestors():
    builder = TreeBuilder()
    top = builder.add(torch.tensor([[10, 11]]), torch.tensor([[-1, -1]]), torch.tensor([[-0.1, -3.0]]))
    level = torch.tensor([[20, 21, 22, 23]])
    builder.add(level, top.repeat_interleave(2, 1), torch.tensor([[-0.1, -0.5, -4.0, -5.0]]))
    tree = builder.build(torch.tensor([9]), 4)
    assert tree.tokens.tolist() == [[9, 10, 20, 21]]  # 20 is certain given 10, and ties with it
    assert tree.parents.tolist() == [[0, 0, 1, 1]]
    assert tree.depths.tolist() == [[0, 1, 2, 2]]
    assert tree.ancestors[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert tree.children()[0].tolist() == [[1, -1], [2, 3], [-1, -1], [-1, -1]]


def test_a_fixed_tree_is_its_paths():
    shape = TreeShape(paths=((1,), (0,), (0, 0), (0, 1), (0, 0, 0)))
    assert (shape.depth, shape.top_k, shape.nodes) == (3, 2, 6)
    levels = [tuple(index.tolist() for index in level) for level in fixed_levels(shape.paths, torch.device("cpu"))]
    assert levels == [([0, 0], [0, 1], [0, 0], [0]), ([0, 0], [0, 1], [1, 1], [0]), ([0], [0], [3], [])]
    assert TreeShape.fixed((2, 1)).paths == ((0,), (1,), (0, 0), (1, 0))
    assert shape.within(1) == TreeShape(paths=((0,), (1,)))
    with pytest.raises(SlipstreamError, match=r"path \(0, 1\) needs \(0, 0\)"):
        TreeShape(paths=((0,), (0, 1)))


@pytest.mark.parametrize("shape", [TreeShape(3, 3, 13), TreeShape.fixed((2, 3, 2)), TreeShape.chain(4)])
@pytest.mark.parametrize("kind", ["head", "model"])
def test_drafted_scores_are_those_of_each_path_alone(shape, kind):
    """Two rows of different length in one batch, against a drafter that only ever sees one path, as decided text."""
    target, model = tiny_target(), tiny_target(seed=1)
    head = tiny_head(target)

    def drafter():
        return HeadDrafter(head, target) if kind == "head" else ModelDrafter(model, target)

    ids, lengths = torch.tensor([[5, 6, 7, 8, 9], [15, 16, 17, 0, 0]]), [5, 3]
    features = target.forward(ids[:, :4]).features
    with torch.no_grad():
        together = drafter()
        together.begin(2)
        tree = together.propose(Round(ids, ids.numpy(), lengths, features, [4, 2], shape))
        for row in range(2):
            for node in range(1, tree.nodes):
                path = tree.tokens[row, tree.ancestors[row, node]][1:]
                chain, score = drafter(), 0.0
                chain.begin(1)
                known = lengths[row]
                text, seen = ids[row : row + 1, :known], features[row : row + 1, : known - 1]
                alone = Round(text, text.numpy(), [known], seen, [known - 1], shape)
                logits, state = chain._extend(alone)
                state = state[:, None]
                for depth, token in enumerate(path, 1):
                    logp = torch.log_softmax(logits.flatten(), -1)
                    score += float(logp[(chain.vocabulary == token).nonzero()[0, 0]])
                    seen = torch.ones(1, 1, depth, dtype=torch.bool)
                    logits, state = chain._step(token[None, None], state, depth, alone, seen)
                assert float(tree.scores[row, node]) == pytest.approx(score, abs=1e-3)


def test_a_grafted_path_leaves_the_tree_where_it_differs():
    # Under the root: a (5) with children b (6) and c (7), and d (8). Paths: a c x y, and z w.
    tokens, parents = torch.tensor([[1, 5, 8, 6, 7]] * 2), torch.tensor([[0, 0, 0, 1, 1]] * 2)
    tree = make_tree(tokens, parents, torch.zeros(2, 5), 2)
    grown = graft(tree, torch.tensor([[5, 7, 20, 21], [30, 31, 32, 33]]), 2)
    assert grown.tokens[:, 5:].tolist() == [[20, 21], [30, 31]]
    assert grown.parents[:, 5:].tolist() == [[4, 5], [0, 5]]
    assert grown.depths[:, 5:].tolist() == [[3, 4], [1, 2]]
    assert grown.tokens[:, :5].equal(tokens)
    assert grown.parents[:, :5].equal(parents)


def test_copies_beside_a_head_are_accepted_where_the_text_repeats():
    target = _target("llama")
    prompt = torch.randint(3, VOCAB, (1, 6), generator=torch.Generator().manual_seed(5))
    said = greedy(target, prompt, 40)
    ids = torch.cat([said, prompt], 1)  # the answer stands in the prompt already
    lengths = {}
    for copied in (0, 6):
        policy = Policy(tree=TreeShape(2, 2, 5, copied=copied))
        out = Decoder(target, HeadDrafter(tiny_head(target), target), policy).generate(ids, max_new_tokens=20)
        assert out.sequences.equal(greedy(target, ids, 20))
        lengths[copied] = out.stats.acceptance_length
    assert lengths[6] >= lengths[0]


def test_prompt_look_up_copies_what_followed_the_latest_same_ending():
    text = torch.tensor([[1, 2, 3, 4, 5, 9, 2, 3, 6, 7, 8, 2, 3], [1, 2, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    tree = NGramDrafter().propose(Round(text, text.numpy(), [13, 4], text, [1, 1], TreeShape.chain(3)))
    assert tree.tokens.tolist() == [[3, 6, 7, 8], [8, 0, 0, 0]]
    assert tree.parents.tolist() == [[0, 0, 1, 2]] * 2
    assert NGramDrafter().propose(Round(text[1:], text[1:].numpy(), [4], text, [1], TreeShape())).nodes == 1
