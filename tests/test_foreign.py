"""Heads others made: SafeAILab's published layout runs here; what is missing, damaged or contradictory is named."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import save_llama
from safetensors.torch import load_file, save_file
from test_formats import LAYERS, decoded, exported, rewrite, shard, target_of, weights
from tiny import VOCAB, tiny_head

import slipstream
from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.distill.foreign import import_head, read_foreign
from slipstream.distill.heads import load_head


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("targets") / "eight"
    save_llama(folder, tiny_tokenizer, **LAYERS)
    return folder


def published(folder, kind, *, vocab=284, drafted=40, file="pytorch_model.bin"):
    """Random fp16 weights under the names and with the config.json that SafeAILab publishes."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (32, 64), "self_attn.k_proj": (16, 64), "self_attn.v_proj": (16, 64),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64),
        "hidden_norm": (32,), "input_layernorm": (32,), "post_attention_layernorm": (32,),
    }  # fmt: skip
    if kind == "eagle1":
        shapes = {
            name: (shape[0], 32) if name[-6:] in ("q_proj", "k_proj", "v_proj") else shape
            for name, shape in shapes.items()
        }
        shapes = {
            f"layers.0.{name}": shape
            for name, shape in shapes.items()
            if name not in ("hidden_norm", "input_layernorm")
        }
        shapes |= {"fc": (32, 64), "embed_tokens": (vocab, 32)}
    else:
        shapes = {f"midlayer.{name}": shape for name, shape in shapes.items()}
        shapes |= {"fc": (32, 96), "norm": (32,), "lm_head": (drafted, 32)}
    tensors = {
        f"{name}.weight": (torch.randn(shape, generator=draw) * 0.3 if len(shape) > 1 else torch.ones(shape)).half()
        for name, shape in shapes.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64,
        "max_position_embeddings": 256, "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.28.1", "use_cache": True, "vocab_size": vocab,
    }  # fmt: skip
    if kind == "eagle1":
        tensors["fc.bias"] = torch.randn(32, generator=draw).half()
        config["bias"] = True
    else:
        ids = torch.randperm(vocab, generator=draw)[:drafted].sort().values
        tensors["d2t"] = ids - torch.arange(drafted)
        tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
        config["draft_vocab_size"] = drafted
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)
    return tensors


@pytest.mark.parametrize("kind", ["eagle3", "eagle1"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_published_head_is_imported_and_decodes(tmp_path, target_folder, kind, file, capsys):
    tensors = published(tmp_path / "theirs", kind, file=file)
    name = str(target_folder)
    assert main(["import", "--from", str(tmp_path / "theirs"), "--out", str(tmp_path / "draft"), "--target", name]) == 0
    told = capsys.readouterr().err
    assert "rope_theta is not stated: 10000.0" in told
    ids = {"eagle3": [2, 4, 5], "eagle1": [8]}[kind]
    assert f"layer ids are not stated: {ids}" in told
    head = load_head(tmp_path / "draft")
    assert (head.config.kind, head.layer_ids, head.config.target_name) == (kind, ids, name)
    assert head.config.rope_parameters["rope_theta"] == 10000.0
    assert torch.equal(head.fc.weight, tensors["fc.weight"].float())
    assert load_file(tmp_path / "draft" / "model.safetensors")["fc.weight"].dtype == torch.float16
    if kind == "eagle3":
        assert head.vocabulary().tolist() == tensors["t2d"].nonzero()[:, 0].tolist()
    else:
        assert torch.equal(head.fc.bias, tensors["fc.bias"].float())
    decoder = slipstream.load(name, tmp_path / "draft", dtype="float32")
    prompt = torch.tensor([[5, 9, 11, 42]])
    out = decoder.generate(prompt, max_new_tokens=16)
    alone = decoder.target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False
    )
    assert torch.equal(out.sequences, alone)


def test_a_published_head_that_was_not_imported_is_pointed_to_import(tmp_path):
    published(tmp_path / "theirs", "eagle3")
    with pytest.raises(SlipstreamError, match="no draft head of slipstream's; slipstream import reads other projects'"):
        load_head(tmp_path / "theirs")


def test_a_published_head_in_shards_is_read_whole(tmp_path, target_folder):
    published(tmp_path / "one", "eagle3", file="model.safetensors")
    published(tmp_path / "shards", "eagle3", file="model.safetensors")
    shard(tmp_path / "shards")
    one, shards = (read_foreign(tmp_path / name, str(target_folder)) for name in ("one", "shards"))
    assert {key: value.tolist() for key, value in one.tensors.items()} == {
        key: value.tolist() for key, value in shards.tensors.items()
    }


def test_a_published_head_needs_its_target_for_the_layers(tmp_path):
    published(tmp_path / "theirs", "eagle3")
    with pytest.raises(SlipstreamError, match=r"says no layer ids; name the target with --target"):
        import_head(tmp_path / "theirs", tmp_path / "draft")


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_matrix_that_is_the_targets_is_taken_from_it(tmp_path, tiny_tokenizer, tied):
    """SGLang: tied to the embeddings, or `draft_vocab_size` null for the target's own output matrix."""
    name = str(tmp_path / "target")
    save_llama(tmp_path / "target", tiny_tokenizer, **LAYERS)
    target = slipstream.load_target(name, dtype="float32")
    _, folder = exported(tmp_path, "sglang", target, target.vocab_size)
    tensors = weights(folder / "model.safetensors")
    del tensors["lm_head.weight"], tensors["d2t"]
    save_file(tensors, folder / "model.safetensors")
    rewrite(folder, tie_word_embeddings=tied, draft_vocab_size=target.vocab_size if tied else None)
    with pytest.raises(SlipstreamError, match=r"no lm_head\.weight, the target's is meant; name it with --target"):
        import_head(folder, tmp_path / "draft")
    import_head(folder, tmp_path / "draft", target=name)
    back = load_head(tmp_path / "draft")
    output = target.embeddings if tied else target.model.lm_head
    assert torch.equal(back.lm_head.weight, output.weight)
    assert back.vocabulary().tolist() == list(range(target.vocab_size))


def test_a_missing_and_an_unexpected_tensor_are_named(tmp_path):
    _, folder = exported(tmp_path, "vllm")
    tensors = weights(folder / "model.safetensors")
    extra = {**tensors, "midlayer.self_attn.q_norm.weight": torch.ones(8)}
    save_file(extra, folder / "model.safetensors")
    with pytest.raises(SlipstreamError, match=r"unexpected tensors \['midlayer\.self_attn\.q_norm\.weight'\]"):
        import_head(folder, tmp_path / "draft")
    for name in tensors.keys() - {"t2d"}:
        save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
        with pytest.raises(SlipstreamError, match=rf"missing tensors .*{name}"):
            import_head(folder, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocab_size": 128}, "claims a vocabulary of 128, t2d is for one of 97"),
        ({"vocab_size": 50}, "one outside the vocabulary of 50"),
        ({"draft_vocab_size": 63}, r"d2t has shape \[64\], config.json asks for \[63\]"),
        ({"num_attention_heads": 8}, r"q_proj.weight has shape \[32, 64\], config.json asks for \[64, 64\]"),
        ({"num_attention_heads": None}, "num_attention_heads must be a number above 0, not None"),
        ({"hidden_size": "32"}, "hidden_size must be a number above 0, not '32'"),
        ({"hidden_size": 16}, "config.json asks for"),
        ({"target_hidden_size": 64}, "a head of width 32 for a target of width 64"),
        ({"head_dim": "8"}, "head_dim must be a number above 0, not '8'"),
        ({"rms_norm_eps": "small"}, "config.json: rms_norm_eps must be like 1e-06, not 'small'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "lacks or misnames 'spiral'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "lacks or misnames .*'factor'"),
        ({"eagle_aux_hidden_state_layer_ids": "2"}, "layer ids must be a list of numbers, not '2'"),
        ({"num_attention_heads": 3}, "hidden_size 32 is no multiple of num_attention_heads 3"),
        ({"hidden_act": "sillu"}, "config.json: unknown hidden_act 'sillu'; did you mean 'silu'"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps must be like 1e-06, not \[1\]"),
        ({"rope_parameters": [1]}, r"rope_parameters must be a mapping, not \[1\]"),
        ({"rope_parameters": None, "rope_theta": "abc"}, "rope_theta must be like 10000.0, not 'abc'"),
        ({"rope_parameters": {"rope_theta": "abc"}}, "rope_theta must be like 10000.0, not 'abc'"),
        ({"eagle_config": [1]}, r"eagle_config must be a mapping, not \[1\]"),
        ({"slipstream": "x"}, "slipstream must be a mapping, not 'x'"),
        ({"slipstream": {"target": 3}}, "the target's name must be a text, not 3"),
        ({"speculators_config": "x"}, "speculators_config must be a mapping, not 'x'"),
        ({"speculators_config": {"verifier": 3}}, "verifier must be a mapping, not 3"),
        ({"transformer_layer_config": 3}, "transformer_layer_config must be a mapping, not 3"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names, not 'LlamaForCausalLM'"),
        ({"architectures": [3]}, r"architectures must be a list of names, not \[3\]"),
        ({"num_hidden_layers": 2}, "missing tensors"),
        ({"norm_before_fc": True}, r"missing tensors \['input_norm.weight'\]"),
    ],
)
def test_a_config_that_claims_what_the_tensors_are_not_is_refused(tmp_path, changes, told):
    _, folder = exported(tmp_path, "eagle")
    rewrite(folder, **changes)
    with pytest.raises(SlipstreamError, match=told):
        import_head(folder, tmp_path / "draft")


def test_what_is_null_is_not_stated(tmp_path):
    _, folder = exported(tmp_path, "eagle")
    config = json.loads((folder / "config.json").read_text())
    nulls = (
        "slipstream",
        "eagle_config",
        "speculators_config",
        "transformer_layer_config",
        "architectures",
        "rope_scaling",
    )
    (folder / "config.json").write_text(json.dumps({**config, **dict.fromkeys(nulls)}))
    assert import_head(folder, tmp_path / "draft").config.kind == "eagle3"


def test_a_head_for_another_vocabulary_than_the_targets_is_refused(tmp_path, target_folder):
    published(tmp_path / "theirs", "eagle3", vocab=200)
    with pytest.raises(SlipstreamError, match=rf"claims vocab_size 200, but target '{target_folder}' has 284"):
        import_head(tmp_path / "theirs", tmp_path / "draft", target=str(target_folder))


@pytest.mark.parametrize("change", ["twice", "outside", "other"])
def test_vocabulary_maps_that_cannot_be_are_refused(tmp_path, change):
    _, folder = exported(tmp_path, "eagle")
    tensors = weights(folder / "model.safetensors")
    if change == "other":
        tensors["t2d"] = tensors["t2d"].roll(1)
    else:
        tensors["d2t"][5] += {"twice": 1, "outside": VOCAB}[change]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        SlipstreamError, match="t2d marks other tokens" if change == "other" else "d2t names a token twice"
    ):
        import_head(folder, tmp_path / "draft")


def test_speculators_configs_are_not_guessed_at(tmp_path):
    _, folder = exported(tmp_path, "speculators")
    rewrite(folder, norm_before_residual=None)
    with pytest.raises(SlipstreamError, match="lacks norm_before_residual: speculators takes false, vLLM true"):
        import_head(folder, tmp_path / "draft")
    rewrite(folder, speculators_model_type="peagle", norm_before_residual=False)
    with pytest.raises(SlipstreamError, match="holds a 'peagle' speculator"):
        import_head(folder, tmp_path / "draft")


def test_a_head_of_ours_needs_no_import(tmp_path):
    tiny_head(target_of()).save_pretrained(tmp_path / "ours")
    with pytest.raises(SlipstreamError, match="is a draft head of slipstream's already"):
        import_head(tmp_path / "ours", tmp_path / "draft")


@pytest.mark.parametrize("command", [["import", "--out", "{out}", "--from"], ["inspect"]])
@pytest.mark.parametrize("keep", [0, 7, 200, -1])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_told_in_one_line(tmp_path, keep, file, command, capsys):
    published(tmp_path / "theirs", "eagle3", file=file)
    path = tmp_path / "theirs" / file
    path.write_bytes(path.read_bytes()[:keep])
    assert main([part.format(out=tmp_path / "draft") for part in command] + [str(tmp_path / "theirs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"slipstream: {path} ")
    assert "damaged" in line
    assert not (tmp_path / "draft").exists()


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("plain", [True, False], ids=["a bare pickle", "torch.save"])
def test_code_in_a_pickle_is_not_run(tmp_path, plain):
    published(tmp_path / "theirs", "eagle3")
    path, trap = tmp_path / "theirs" / "pytorch_model.bin", {"fc.weight": Trap(tmp_path / "sprung")}
    if plain:
        path.write_bytes(pickle.dumps(trap, protocol=2))
    else:
        torch.save(trap, path)
    with pytest.raises(
        SlipstreamError, match=r"pytorch_model\.bin holds more than tensors, or is damaged; its code was not run"
    ):
        import_head(tmp_path / "theirs", tmp_path / "draft")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..", "..\\x", ""])
def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path, place):
    _, folder = exported(tmp_path, "eagle")
    save_file({"fc.weight": torch.zeros(32, 96)}, tmp_path / "elsewhere.safetensors")
    shard(folder)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**listed, "fc.weight": place}}))
    with pytest.raises(SlipstreamError, match="is not a file beside it; nothing was read"):
        import_head(folder, tmp_path / "draft")


def test_shards_and_their_index_agree(tmp_path):
    _, folder = exported(tmp_path, "eagle")
    shard(folder)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**listed, "gone.weight": listed["d2t"]}}))
    with pytest.raises(SlipstreamError, match=r"lacks \['gone\.weight'\]"):
        import_head(folder, tmp_path / "draft")
    index.write_text(json.dumps({"weight_map": {key: file for key, file in listed.items() if key != "d2t"}}))
    with pytest.raises(SlipstreamError, match=r"holds unlisted \['d2t'\]"):
        import_head(folder, tmp_path / "draft")
    (folder / listed["fc.weight"]).unlink()
    index.write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(SlipstreamError, match="does not exist"):
        import_head(folder, tmp_path / "draft")


@pytest.mark.parametrize("text", ["", "[1]", '{"a": ', "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    _, folder = exported(tmp_path, "eagle")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SlipstreamError, match=r"config\.json (cannot be read|holds no JSON object)"):
        import_head(folder, tmp_path / "draft")


def test_an_imported_head_draws_the_same_tree_as_the_one_sent(tmp_path):
    head, folder = exported(tmp_path, "eagle")
    rewrite(folder, slipstream=None, eagle_config=None)  # as another project would write it
    import_head(folder, tmp_path / "draft")
    assert decoded(target_of(), load_head(tmp_path / "draft")) == decoded(target_of(), head)
