"""Heads travel: what goes out loads in other engines and comes back the same, and what others made runs here."""

import json

import pytest
import torch
from conftest import save_llama
from loaders import (
    captured_before,
    eagle,
    read,
    sglang,
    sglang_layers,
    sglang_layers_before,
    vllm,
    vllm_layers,
)
from safetensors.torch import load_file, save_file
from tiny import VOCAB, tiny_head, tiny_target

import slipstream
from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape
from slipstream.distill.foreign import import_head
from slipstream.distill.formats import ENGINES, FORMATS, export_head
from slipstream.distill.heads import load_head, save_head
from slipstream.distill.inspection import inspect_head

LAYERS = {"num_hidden_layers": 8}  # so that the head reads the states entering layers 2, 4, 5
VARIANTS = [{"layers": 2, "norm_output": True, "norm_before_fc": True}, {"fc_norm": True}]
JOURNEYS = [
    *(("eagle3", engine, {}, 64) for engine in ENGINES),
    *(("eagle3", engine, {}, VOCAB) for engine in ENGINES),
    *(("eagle3", engine, settings, 64) for engine in ("vllm", "speculators") for settings in VARIANTS),
    *(("eagle1", engine, {"kind": "eagle1"}, VOCAB) for engine in FORMATS["eagle1"]),
]
TARGETS = {}


def target_of(tied=False):
    if tied not in TARGETS:
        TARGETS[tied] = tiny_target(**LAYERS, tie_word_embeddings=tied)
    return TARGETS[tied]


def exported(tmp_path, engine, target=None, size=64, **settings):
    target = target or target_of()
    head = tiny_head(target, size, **settings)
    export_head(head, engine, tmp_path / engine, target=target)
    return head, tmp_path / engine


def weights(path):
    """The tensors of a file, in memory: those of `load_file` lie in the file, which tests write over."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def shard(folder):
    """Two files and an index in place of one file."""
    tensors = weights(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def rewrite(folder, **changes):
    """Change keys of config.json; None takes a key out."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def decoded(target, head):
    """Tokens and how many drafts were accepted, for a few prompts."""
    target = target.reading(head.layer_ids)
    decoder = Decoder(target, HeadDrafter(head, target), Policy(tree=TreeShape(3, 3, 12)))
    prompts = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
    out = decoder.generate(prompts, max_new_tokens=20)
    return out.sequences.tolist(), out.stats.accept_lengths


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("kind", "engine", "settings", "size"), JOURNEYS)
def test_a_head_comes_back_as_it_went(tmp_path, kind, engine, settings, size, tied, sharded):
    target = target_of(tied)
    head, folder = exported(tmp_path, engine, target, size, **settings)
    if sharded:
        shard(folder)
    foreign = import_head(folder, tmp_path / "back")
    assert foreign.format == engine
    assert not [note for note in foreign.notes if "not stated" in note]
    back = load_head(tmp_path / "back")
    assert {key: value.tolist() for key, value in back.state_dict().items()} == {
        key: value.tolist() for key, value in head.state_dict().items()
    }
    ignored = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    keys = {*head.config.to_dict(), *back.config.to_dict()} - ignored  # transformers 5.0 leaves defaults out
    assert {key: getattr(back.config, key) for key in keys} == {key: getattr(head.config, key) for key in keys}
    back.borrow(target)
    tokens, accepted = decoded(target, back)
    assert (tokens, accepted) == decoded(target, head)
    assert max(accepted) > 1


@pytest.mark.parametrize("size", [64, VOCAB])
def test_sglang_fills_every_weight_and_passes_none_over(tmp_path, size):
    _, folder = exported(tmp_path, "sglang", size=size)
    assert sglang(folder, "eagle3") == ({"embed_tokens.weight"}, set())
    _, folder = exported(tmp_path, "sglang", size=VOCAB, kind="eagle1")
    assert sglang(folder, "eagle1") == ({"embed_tokens.weight"}, set())
    config, tensors = read(folder)
    assert not tensors["fc.bias"].any()  # SGLang's fc has a bias: without one in the file it stays random
    assert config["bias"] is False  # SGLang would give the attention one


@pytest.mark.parametrize("engine", ["vllm", "sglang", "eagle", "speculators"])
def test_vllm_fills_every_weight_and_stops_at_none(tmp_path, engine):
    _, folder = exported(tmp_path, engine)
    assert vllm(folder, "eagle3") <= {"embed_tokens.weight"}
    assert read(folder)[0]["norm_before_residual"] is False
    tensors = weights(folder / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(KeyError, match="extra"):
        vllm(folder, "eagle3")
    _, folder = exported(tmp_path, "vllm", size=VOCAB, kind="eagle1")
    assert vllm(folder, "eagle1") == {"embed_tokens.weight"}


def test_eagles_own_model_misses_only_what_it_reads_from_the_target(tmp_path):
    _, folder = exported(tmp_path, "eagle")
    assert eagle(folder, "eagle3") == {"embed_tokens.weight"}
    _, folder = exported(tmp_path, "eagle", size=VOCAB, kind="eagle1")
    assert eagle(folder, "eagle1") == set()


def test_both_spellings_of_the_layer_ids_select_what_the_head_was_trained_on(tmp_path):
    target = target_of()
    head, folder = exported(tmp_path, "sglang")
    config = read(folder)[0]
    ids = torch.randint(3, VOCAB, (1, 7))
    features = target.forward(ids).features
    for layers in (sglang_layers(config), sglang_layers_before(config), vllm_layers(config)):
        assert layers == head.layer_ids
        assert torch.equal(torch.cat(captured_before(target, ids, layers), -1), features)
    off_by_one = [i + 1 for i in vllm_layers(config)]
    assert not torch.allclose(torch.cat(captured_before(target, ids, off_by_one), -1), features)


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("where", ["top", "nested", "tag"])
def test_layer_ids_off_by_one_in_any_spelling_are_refused(tmp_path, where, shift):
    _, folder = exported(tmp_path, "vllm")
    config = read(folder)[0]
    place = {"top": config, "nested": config["eagle_config"], "tag": config["slipstream"]}[where]
    key = "layer_ids" if where == "tag" else "eagle_aux_hidden_state_layer_ids"
    place[key] = [i + 2 * shift if where == "nested" else i + shift for i in place[key]]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlipstreamError, match="contradicts itself on layer ids"):
        import_head(folder, tmp_path / "back")


@pytest.mark.parametrize(
    ("nested", "entering"), [([1, 3, 4], [2, 4, 5]), ([2, 4, 5], [2, 4, 5]), ([3, 4, 5], None), ([0, 1, 2], None)]
)
def test_layer_ids_of_sglang_alone_are_read_by_its_rule(tmp_path, nested, entering):
    _, folder = exported(tmp_path, "sglang")
    nested = {"eagle_aux_hidden_state_layer_ids": nested}
    rewrite(folder, eagle_aux_hidden_state_layer_ids=None, slipstream=None, eagle_config=nested)
    if entering is None:
        with pytest.raises(SlipstreamError, match="may be outputs or inputs of layers"):
            import_head(folder, tmp_path / "back")
    else:
        assert import_head(folder, tmp_path / "back").config.eagle_aux_hidden_state_layer_ids == entering


@pytest.mark.parametrize("engine", ["sglang", "eagle"])
def test_a_head_whose_layers_an_engine_would_not_capture_is_not_exported_to_it(tmp_path, engine):
    target = tiny_target()  # of four layers: the head reads the states entering 1, 2, 3
    with pytest.raises(SlipstreamError, match=f"--to {engine}: {engine} (takes layer ids|captures)"):
        exported(tmp_path, engine, target)
    assert not (tmp_path / engine).exists()


@pytest.mark.parametrize(
    ("settings", "engine", "why"),
    [
        ({"kind": "parallel"}, "vllm", "knows no parallel heads"),
        ({"kind": "eagle1"}, "speculators", "knows no eagle1 heads"),
        ({"hidden_size": 16}, "vllm", "embeddings of the head's width"),
        ({"fc_norm": True, "norm_before_fc": True}, "vllm", "norm_before_fc or fc_norm, not both"),
        ({"fc_norm": True}, "sglang", "knows no heads with fc_norm"),
        ({"layers": 2}, "eagle", "knows no heads with 2 layers"),
    ],
)
def test_a_head_an_engine_does_not_know_is_not_exported_to_it(tmp_path, settings, engine, why):
    with pytest.raises(SlipstreamError, match=f"--to {engine}: {engine} .*{why}"):
        exported(tmp_path, engine, **settings)
    save_head(tiny_head(target_of(), **settings), tmp_path / "draft", {})
    assert why in inspect_head(tmp_path / "draft").engines[engine]


@pytest.mark.parametrize(("engine", "settings"), [("speculators", {}), ("eagle", {"kind": "eagle1"})])
def test_an_engine_that_wants_embeddings_wants_the_target(tmp_path, engine, settings):
    with pytest.raises(SlipstreamError, match="give --target"):
        export_head(tiny_head(target_of(), VOCAB, **settings), engine, tmp_path / "out")


def test_an_eagle1_head_of_a_small_vocabulary_drafts_over_the_whole_one_elsewhere(tmp_path):
    target = target_of()
    head, folder = exported(tmp_path, "vllm", kind="eagle1")
    import_head(folder, tmp_path / "back")
    back = load_head(tmp_path / "back")
    back.borrow(target)
    assert (head.config.draft_vocab_size, back.config.draft_vocab_size) == (64, VOCAB)
    assert decoded(target, back)[0] == decoded(target, head)[0]


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("targets") / "eight"
    save_llama(folder, tiny_tokenizer, **LAYERS)
    return folder


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_commands_carry_a_head_its_policy_and_its_provenance_out_and_back(tmp_path, target_folder, dtype, capsys):
    target = slipstream.load_target(str(target_folder), dtype="float32")
    save_head(tiny_head(target, 64), tmp_path / "draft", {"target": target.name, "seed": 3})
    Policy(tree=TreeShape(3, 2, 40), measured={"acceptance_length": 2.5}).save(tmp_path / "draft")
    flags = ["--dtype", dtype] if dtype else []
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["export", "--draft", str(tmp_path / "draft"), "--to", "sglang", "--out", str(out), *flags]) == 0
    serving = (out / "SERVING.md").read_text()
    assert (
        f"python -m sglang.launch_server --model-path {target_folder} --speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path {out} --speculative-num-steps 3 --speculative-eagle-topk 2 "
        "--speculative-num-draft-tokens 11\n"  # a tree of depth 3 and width 2 has no more nodes
    ) in serving
    assert '{"method": "eagle3", "model": "' + str(out) + '", "num_speculative_tokens": 3}' in serving
    assert "verify exactly" in serving
    assert "tuned policy" in serving
    assert main(["import", "--from", str(out), "--out", str(back), "--target", str(target_folder)]) == 0
    assert Policy.load(back).to_dict() == Policy.load(tmp_path / "draft").to_dict()
    assert json.loads((back / "provenance.json").read_text())["seed"] == 3
    assert weights(out / "model.safetensors")["fc.weight"].dtype == (torch.float16 if dtype else torch.float32)
    decoder = slipstream.load(target, back, dtype="float32")
    ids = torch.tensor([[5, 9, 11]])
    assert torch.equal(
        decoder.generate(ids, max_new_tokens=12).sequences,
        slipstream.load(target, tmp_path / "draft").generate(ids, max_new_tokens=12).sequences,
    )
    capsys.readouterr()
    assert main(["import", "--from", str(out), "--out", str(back)]) == 2
    assert capsys.readouterr().err == f"slipstream: {back} exists; give another --out\n"


def test_inspect_says_what_a_folder_holds_and_who_takes_it(tmp_path, target_folder, capsys):
    target = slipstream.load_target(str(target_folder), dtype="float32")
    head = tiny_head(target, 64)
    save_head(head, tmp_path / "draft", {})
    export_head(head, "sglang", tmp_path / "sglang")
    assert main(["inspect", str(tmp_path / "sglang")]) == 0
    out = capsys.readouterr().out
    for told in (
        "eagle3",
        str(target_folder),
        "64 of 284",
        "entering layers [2, 4, 5], outputs of layers [1, 3, 4]",
        "none tuned",
    ):
        assert told in " ".join(out.split())
    assert inspect_head(tmp_path / "draft").engines == {
        "slipstream": "", **{engine: f"after export --to {engine}" for engine in ENGINES}
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "engine", "settings", "size"), JOURNEYS)
def test_inspect_finds_no_fault_with_an_export_for_its_engine(tmp_path, kind, engine, settings, size):
    _, folder = exported(tmp_path, engine, size=size, **settings)
    assert inspect_head(folder).engines[engine] == ""


def test_inspect_names_what_keeps_an_engine_off(tmp_path):
    _, folder = exported(tmp_path, "eagle")
    engines = inspect_head(folder).engines
    assert engines["vllm"] == ""
    assert "it wants 'LlamaForCausalLMEagle3' in architectures" in engines["sglang"]
    assert (
        "wants speculators_model_type; it wants the layer's tensors as layers.0.*; it misses ['embed_tokens.weight']"
        in (engines["speculators"])
    )
    rewrite(folder, eagle_aux_hidden_state_layer_ids=None, eagle_config=None, slipstream=None)
    assert "name the target with --target" in inspect_head(folder).engines["slipstream"]
