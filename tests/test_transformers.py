"""transformers' habits: generation configs, custom_generate in a pipeline, quantised targets."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import greedy, tiny_head, tiny_target
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TorchAoConfig,
    pipeline,
)

import slipstream
from slipstream.configs.errors import SlipstreamError
from slipstream.data.template import encode_prompt
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape
from slipstream.distill.target import Target, load_target

PROMPT = torch.tensor([[5, 6, 7, 5, 6]])


def decoder_of(target: Target) -> Decoder:
    return Decoder(target, HeadDrafter(tiny_head(target), target), Policy(tree=TreeShape(3, 3, 10)))


CONFIGS = [
    ({"max_new_tokens": 11, "repetition_penalty": 1.4}, {}),
    ({"max_new_tokens": 11, "repetition_penalty": 1.4}, {"repetition_penalty": 1.1}),
    ({"max_new_tokens": 11, "no_repeat_ngram_size": 2}, {"max_new_tokens": 7}),
    ({"max_length": 12, "suppress_tokens": [4, 5, 6, 40]}, {}),
    ({"max_length": 12}, {"max_new_tokens": 9}),
    ({"max_new_tokens": 11, "eos_token_id": 30, "min_new_tokens": 9}, {}),
    ({"max_new_tokens": 11, "do_sample": True, "temperature": 0.7}, {"do_sample": False}),
]


@pytest.mark.parametrize(("given", "named"), CONFIGS)
def test_a_generation_config_means_what_it_means_to_generate(given, named):
    target = tiny_target()
    target.model.generation_config.bad_words_ids = [[11], [20, 21]]  # fills in what nobody says
    config = GenerationConfig(**given)
    before = config.to_dict()
    want = target.model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), generation_config=config, **named)
    out = decoder_of(target).generate(PROMPT, generation_config=config, **named)
    assert out.sequences.tolist() == want.tolist()
    assert config.to_dict() == before


@pytest.mark.parametrize("stop", [None, "4th"])
@pytest.mark.parametrize("length", [None, 9, 40])
def test_the_callers_own_ends_stand_in_the_place_of_the_configs(length, stop):
    target = tiny_target()
    text = greedy(target, PROMPT, 40)[0].tolist()
    own = StoppingCriteriaList()
    if length:
        own.append(MaxLengthCriteria(length))
    if stop:
        own.append(EosTokenCriteria(text[PROMPT.shape[1] + 3]))
    given = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 20, "eos_token_id": 95, "do_sample": False}
    want, ours = (
        target.model.generate(PROMPT, stopping_criteria=StoppingCriteriaList(own), **given, **more)
        for more in ({}, {"custom_generate": decoder_of(target).custom_generate})
    )
    assert ours.tolist() == want.tolist()


def test_a_sampling_config_draws_as_the_same_keywords_do():
    decoder = decoder_of(tiny_target(initializer_range=0.1))
    config = GenerationConfig(do_sample=True, temperature=0.8, top_k=7, top_p=0.9, max_new_tokens=15)
    by_config = decoder.generate(PROMPT, generation_config=config, seed=3).sequences
    by_name = decoder.generate(PROMPT, temperature=0.8, top_k=7, top_p=0.9, max_new_tokens=15, seed=3).sequences
    assert by_config.tolist() == by_name.tolist()
    cold = decoder.generate(PROMPT, generation_config=config, temperature=0.0).sequences
    assert cold.tolist() == greedy(decoder.target, PROMPT, 15).tolist()
    warm = decoder.generate(PROMPT, do_sample=True, max_new_tokens=15, seed=3).sequences
    assert warm.tolist() == decoder.generate(PROMPT, temperature=1.0, max_new_tokens=15, seed=3).sequences.tolist()


@pytest.mark.parametrize(("options", "count"), [({}, 256), ({"max_length": 9}, 4), ({"max_length": 3}, 0)])
def test_without_a_number_of_new_tokens_there_is_one(options, count):
    decoder = Decoder(tiny_target(max_position_embeddings=512, eos_token_id=None))
    assert len(decoder.generate(PROMPT, **options).tokens) == count


def test_a_config_that_tree_decoding_cannot_honour_is_refused():
    with pytest.raises(SlipstreamError, match="num_beams=3 does not go with tree decoding"):
        Decoder(tiny_target()).generate(PROMPT, generation_config=GenerationConfig(num_beams=3))


@pytest.mark.parametrize("setting", [{"num_beam_groups": 2}, {"force_words_ids": [[7]]}, {"diversity_penalty": 0.5}])
def test_generate_refuses_them_too_where_this_decoder_is_to_do_it(setting):
    decoder = decoder_of(tiny_target())
    given = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 3, **setting}
    with pytest.raises(SlipstreamError, match=f"{next(iter(setting))}=.* does not go with tree decoding"):
        decoder.target.model.generate(PROMPT, custom_generate=decoder.custom_generate, **given)


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_a_streamer_gets_the_text_that_generate_gives_it(tiny_target_folder, skip_prompt):
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    decoder = decoder_of(target)
    prompt = torch.tensor([target.encode_prompt([{"role": "user", "content": "Yo hello"}])])
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40}
    texts = []
    for way in ("generate", "ours", "custom_generate"):
        # The timeout is for a failure only: all is there before it is read.
        streamer = TextIteratorStreamer(target.chat_tokenizer, skip_prompt=skip_prompt, timeout=5.0)
        if way == "generate":
            target.model.generate(prompt, do_sample=False, streamer=streamer, **given)
        elif way == "ours":
            decoder.generate(prompt, streamer=streamer, **given)
        else:
            drafted = partial(decoder.custom_generate, streamer=streamer)
            target.model.generate(prompt, do_sample=False, custom_generate=drafted, **given)
        texts.append("".join(streamer))
    assert texts[0] == texts[1] == texts[2] != ""
    assert ("hello" in texts[0]) is not skip_prompt


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_text_generation_pipeline_drafts(tiny_target_folder, batch_size):
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    decoder = slipstream.load(target, tiny_head(target))
    target.tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "Yo hello", "user")]
    generate = pipeline("text-generation", model=target.model, tokenizer=target.tokenizer, batch_size=batch_size)
    settings = {"max_new_tokens": 12, "do_sample": False}
    want = generate(chats, **settings)
    drafted = Rounds(decoder)
    assert generate(chats, custom_generate=drafted, **settings) == want
    assert drafted.prompts == len(chats)


class Rounds:
    """A decoder's `custom_generate` that counts the prompts it is given."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.prompts = decoder, 0

    def __call__(self, model, input_ids, **settings):
        self.prompts += len(input_ids)
        return self.decoder.custom_generate(model, input_ids, **settings)


@pytest.mark.parametrize("kind", [{"load_in_4bit": True}, {"load_in_8bit": True, "llm_int8_threshold": 0.0}])
def test_a_target_in_bitsandbytes_keeps_its_own_tokens(tmp_path, kind):
    """With its threshold left at 6, which columns stay in 16 bits depends on all tokens of a forward."""
    pytest.importorskip("bitsandbytes")
    tiny_target(hidden_size=64, intermediate_size=128).model.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**kind)
    target = Target(
        AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, quantization_config=settings, device_map="cpu"
        )
    )
    head = tiny_head(target)
    want = target.model.generate(PROMPT, max_new_tokens=16, do_sample=False)
    assert slipstream.load(target, head).generate(PROMPT, max_new_tokens=16).sequences.tolist() == want.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_in_int8_keeps_its_own_tokens(tiny_target_folder, tmp_path, dtype):
    """torchao's int8 weights, on the CPU: decoding gives what the quantised model's own `generate` gives."""
    quantization = pytest.importorskip("torchao.quantization")
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tiny_target_folder, dtype=dtype, quantization_config=settings)
    plain = load_target(str(tiny_target_folder), dtype=dtype)
    target = Target(model, plain.tokenizer, name=plain.name)
    assert not torch.equal(target.forward(PROMPT).logits, plain.forward(PROMPT).logits)
    head = tiny_head(target).to(dtype)
    decoder = slipstream.load(target, head)
    for text in ("Hi", "Yo hello"):
        prompt = torch.tensor([encode_prompt(plain.tokenizer, [{"role": "user", "content": text}])])
        want = model.generate(prompt, max_new_tokens=16, do_sample=False)
        assert decoder.generate(prompt, max_new_tokens=16).sequences.tolist() == want.tolist()
    model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    saved = load_target(str(tmp_path), dtype=dtype)
    assert torch.equal(saved.forward(PROMPT).logits, target.forward(PROMPT).logits)
