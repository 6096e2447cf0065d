"""Every kind of head decodes what the target would, drafts as it was trained to, and survives its folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_formats import rewrite, shard, weights
from tiny import ARCHITECTURES, HEADS, VOCAB, greedy, tiny_head, tiny_target

import slipstream
from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import Recipe
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import simulated_acceptance_length
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape
from slipstream.distill.heads import describe_target, load_head, save_head
from slipstream.distill.target import load_target


def pair(kind, **overrides):
    target = tiny_target(**overrides)
    head = tiny_head(target, **HEADS[kind])
    return head, target.reading(head.layer_ids)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("shape", [TreeShape.chain(4), TreeShape(3, 3, 12), TreeShape.fixed((3, 2, 1))], ids=str)
def test_greedy_output_is_that_of_generate(kind, shape):
    head, target = pair(kind)
    prompts = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (4, 9, 6)]
    want = [greedy(target, prompt[None], 16)[0, len(prompt) :].tolist() for prompt in prompts]
    ids = torch.stack([torch.nn.functional.pad(p, (9 - len(p), 0)) for p in prompts])
    out = Decoder(target, HeadDrafter(head, target), Policy(tree=shape)).generate(
        ids, attention_mask=(ids > 0).long(), max_new_tokens=16
    )
    assert [[token.id for token in row] for row in out.rows] == want


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("rope", [LLAMA_3, YARN], ids=lambda rope: rope["rope_type"])
def test_a_head_turns_as_its_target_does(rope, tmp_path):
    target = tiny_target(rope_parameters=rope)
    save_head(tiny_head(target), tmp_path / "draft", {})
    mine, theirs = load_head(tmp_path / "draft").rotary, target.model.base_model.rotary_emb
    assert torch.equal(mine.inv_freq, theirs.inv_freq)
    assert mine.attention_scaling == theirs.attention_scaling
    assert not torch.equal(mine.inv_freq, tiny_head(tiny_target()).rotary.inv_freq)


@pytest.mark.parametrize("rope_type", ["dynamic", "default"])
def test_a_rope_that_depends_on_the_length_is_taken_at_its_base(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 2e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    target = tiny_target(rope_parameters=rope)
    assert tiny_head(target).config.rope_parameters == {"rope_type": "default", "rope_theta": 2e4}


@pytest.mark.parametrize("kind", HEADS)
def test_what_the_unroll_simulates_is_what_chains_measure(kind):
    head, target = pair(kind)
    decoder = Decoder(target, HeadDrafter(head, target), Policy(tree=TreeShape.chain(3)))
    pairs, lengths = [], []
    for seed in range(12):
        prompt = torch.randint(3, VOCAB, (1, 5), generator=torch.Generator().manual_seed(seed))
        pairs.append((prompt[0].tolist(), greedy(target, prompt, 24)[0, 5:].tolist()))
        lengths += decoder.generate(prompt, max_new_tokens=24).stats.accept_lengths
    assert sum(lengths) / len(lengths) == pytest.approx(simulated_acceptance_length(head, target, pairs, 3), rel=1e-6)
    assert max(lengths) > 1


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_the_same_out_of_its_folder(kind, tmp_path):
    head, target = pair(kind)
    save_head(head, tmp_path / "draft", {})
    again = load_head(tmp_path / "draft")
    again.borrow(target)
    ids = torch.randint(3, VOCAB, (1, 6))
    feature = head.fuse(target.forward(ids).features)
    assert torch.equal(feature, again.fuse(target.forward(ids).features))
    assert torch.equal(head.logits(feature), again.logits(feature))
    names = set(load_file(tmp_path / "draft" / "model.safetensors"))
    assert ("lm_head.weight" in names) == (HEADS[kind].get("kind") != "eagle1")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_eagle1_head_reads_the_state_behind_the_targets_last_norm(architecture):
    target = tiny_target(architecture)
    head = tiny_head(target, kind="eagle1")
    assert head.layer_ids == [4]
    ids = torch.randint(3, VOCAB, (1, 7))
    captured = target.reading([4]).capture(ids)
    assert torch.equal(captured.features, captured.hidden)
    assert torch.equal(target.reading([4]).forward(ids).features, captured.hidden)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_a_head_starts_at_the_mlp_of_the_targets_last_layer_and_at_the_norm_before_it(architecture):
    target = tiny_target(architecture)
    last = target.inner.layers[-1]
    norm = last.post_attention_layernorm
    torch.nn.init.uniform_(norm.weight)
    layer = tiny_head(target).midlayer
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert torch.equal(getattr(layer.mlp, name).weight, getattr(last.mlp, name).weight)
    x = torch.randn(5, 32)
    assert torch.allclose(layer.post_attention_layernorm(x), norm(x), atol=1e-5)


@pytest.mark.parametrize(("layers", "paired"), [(3, 3), (6, 4)])
def test_the_mlps_of_several_layers_start_at_those_of_the_targets_last_ones(layers, paired):
    target = tiny_target()
    head = tiny_head(target, layers=layers)
    own = [head.midlayer, *head.layers]
    for mine, theirs in zip(own[-paired:], target.inner.layers[-paired:], strict=True):
        assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *((name, {}) for name in (*ARCHITECTURES, "olmo") if name not in {"llama", "qwen2", "qwen3", "mistral"}),
        ("llama", {"intermediate_size": 64}),
        *(("llama", settings) for name, settings in HEADS.items() if name != "eagle3"),
        ("llama", {"norm_output": True}),
    ],
)
def test_an_mlp_that_has_no_like_in_the_target_starts_at_random(architecture, settings):
    target = tiny_target(architecture)
    layer, random = (tiny_head(target, from_target=start, **settings).midlayer for start in (True, False))
    for (name, mine), other in zip(layer.mlp.named_parameters(), random.mlp.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert (layer.post_attention_layernorm.weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_need_a_scale_are_no_start(dtype):
    target = tiny_target()
    down = target.inner.layers[-1].mlp.down_proj
    down.weight = torch.nn.Parameter((100 * down.weight).to(dtype), requires_grad=False)
    assert tiny_head(target).midlayer.mlp.down_proj.weight.abs().max() < 1


def test_a_target_that_gives_other_layers_is_refused():
    head, _ = pair("eagle1")
    with pytest.raises(SlipstreamError, match=r"reads layers \[4\]"):
        head.check_target(tiny_target())


def test_an_eagle1_head_of_another_width_is_refused():
    with pytest.raises(SlipstreamError, match="as wide as its target: 32, not 16"):
        tiny_head(tiny_target(), kind="eagle1", hidden_size=16)


@pytest.fixture(scope="module")
def bound(tmp_path_factory, tiny_target_folder):
    """A head that was trained on the tiny target in bf16, whose files hold fp32."""
    folder = tmp_path_factory.mktemp("bound") / "draft"
    target = load_target(str(tiny_target_folder), dtype="bfloat16")
    save_head(tiny_head(target), folder, {**describe_target(target), "recipe": Recipe().to_dict()})
    return folder


def test_a_target_is_known_by_its_place_and_by_its_weights(bound, tiny_target_folder, tmp_path, monkeypatch):
    moved = shutil.copytree(tiny_target_folder, tmp_path / "moved")
    monkeypatch.chdir(tiny_target_folder.parent)
    for name in (f"{tiny_target_folder}/", "tiny", "./tiny/", str(moved)):
        for dtype in ("bfloat16", "float32"):
            slipstream.load(load_target(name, dtype=dtype), bound)
    for dtype in ("bfloat16", "float32"):
        command = ["export", "--draft", str(bound), "--to", "speculators", "--target", str(moved), "--dtype", dtype]
        assert main([*command, "--out", str(tmp_path / dtype)]) == 0


@pytest.mark.parametrize("known", [True, False])
def test_a_target_of_other_weights_is_refused_until_the_head_is_bound_to_it(
    bound, tiny_target_folder, tmp_path, known, capsys
):
    other = shutil.copytree(tiny_target_folder, tmp_path / "other")
    tensors = weights(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    draft = shutil.copytree(bound, tmp_path / "draft")
    if not known:
        (draft / "provenance.json").unlink()
    command = ["generate", "--target", str(other), "--draft", str(draft), "--prompt", "Hi", "--max_new_tokens", "2"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"belongs to target {str(tiny_target_folder)!r}, not to {str(other)!r}" in line
    assert ("not these in bfloat16" if known else "unknown") in line
    assert line.endswith(f"set target_name in its config.json to {str(other)!r}")
    rewrite(draft, target_name=str(other))
    assert main(command) == 0


@pytest.fixture
def folder(tmp_path):
    save_head(tiny_head(tiny_target()), tmp_path / "draft", {})
    return tmp_path / "draft"


@pytest.mark.parametrize("broken", ["missing", "extra"])
def test_a_missing_and_an_unexpected_tensor_are_named(folder, broken):
    tensors = weights(folder / "model.safetensors")
    if broken == "missing":
        del tensors["fc.weight"]
        expected = r"missing keys \['fc.weight'\]"
    else:
        tensors["surplus.weight"] = torch.zeros(1)
        expected = r"unexpected keys \['surplus.weight'\]"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SlipstreamError, match=expected):
        load_head(folder)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_weights_cut_short_are_told_in_one_line(folder, keep, capsys):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SlipstreamError, match=r"^draft head '.*' cannot be read: [^\n]+$"):
        load_head(folder)
    assert main(["inspect", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"slipstream: {file} cannot be read, it is damaged or cut short")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocab_size": 120}, r"t2d has shape \[97\], config.json asks for \[120\]"),
        ({"draft_vocab_size": 50}, r"d2t has shape \[64\], config.json asks for \[50\]"),
        ({"hidden_size": 16}, r"fc.weight has shape \[32, 96\], config.json asks for \[16, 96\]"),
    ],
)
def test_a_config_that_claims_another_vocabulary_or_width_is_refused(folder, changes, told, capsys):
    rewrite(folder, **changes)
    with pytest.raises(SlipstreamError, match=told):
        load_head(folder)
    assert main(["inspect", str(folder)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("ids", [None, []])
def test_a_config_without_layer_ids_is_refused(folder, ids):
    rewrite(folder, eagle_aux_hidden_state_layer_ids=ids)
    with pytest.raises(SlipstreamError, match=rf"draft head '{folder}': config\.json must name eagle_aux"):
        load_head(folder)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": ', "\udcff"])
def test_a_config_or_policy_that_is_no_json_object_is_refused(folder, text):
    for name, load in (("decode.json", Policy.load), ("config.json", load_head)):
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(SlipstreamError, match=rf"{name} (cannot be read|holds no JSON object)"):
            load(folder)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"trees": {}}, "unknown key 'trees'; did you mean 'tree'"),
        ({"tree": {"dept": 3}}, "unexpected keyword argument 'dept'"),
        ({"tree": [3]}, "must be a mapping"),
        ({"tree": {"depth": 0}}, "tree depth must be at least 1, not 0"),
        ({"verify": {"rule": "mar"}}, "unknown verification rule 'mar'; did you mean 'mars'"),
        ({"speculation": {"threshold": "high"}}, "'str'"),
    ],
)
def test_a_policy_with_an_unknown_key_or_value_is_refused_with_its_file(folder, policy, told):
    (folder / "decode.json").write_text(json.dumps(policy))
    with pytest.raises(SlipstreamError, match=rf"decode\.json: .*{told}"):
        Policy.load(folder)


def test_a_head_in_shards_is_the_same(folder):
    whole = load_head(folder)
    whole.save_pretrained(folder.parent / "shards", max_shard_size="8KB")
    assert len(list(folder.parent.glob("shards/*.safetensors"))) > 1
    again = load_head(folder.parent / "shards").state_dict()
    assert {name: tensor.tolist() for name, tensor in again.items()} == {
        name: tensor.tolist() for name, tensor in whole.state_dict().items()
    }


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("../elsewhere.safetensors", "is not a file beside it"),
        ("/etc/passwd", "is not a file beside it"),
        ("weights.bin", "is no safetensors file"),
    ],
)
def test_shards_outside_the_folder_or_in_a_pickle_are_not_read(folder, place, told):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    second = {name for name, file in listed.items() if file.startswith("model-00002")}
    tensors = load_file(folder / "model-00002-of-00002.safetensors")
    save_file(tensors, folder.parent / "elsewhere.safetensors", metadata={"format": "pt"})
    torch.save(tensors, folder / "weights.bin")
    index.write_text(json.dumps({"weight_map": {**listed, **dict.fromkeys(second, place)}}))
    with pytest.raises(SlipstreamError, match=f"{told}; nothing was read"):
        load_head(folder)
