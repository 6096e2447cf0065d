"""Heads on the hub: pushed with what they need, fetched with their policy, cached, never as pickles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from fakehub import FakeHub, revision
from huggingface_hub import ModelCard, constants, hf_api
from test_report import row
from tiny import tiny_head
from transformers import AutoConfig, AutoModel
from transformers.utils import hub as transformers_hub

import slipstream
from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.decode.card import model_card, write_card
from slipstream.decode.policy import Policy
from slipstream.decode.tree import TreeShape
from slipstream.distill.draft import DraftConfig, DraftHead
from slipstream.distill.gguf import EMBEDDED
from slipstream.distill.heads import load_head, save_head
from slipstream.distill.inspection import inspect_head
from slipstream.distill.store import weights_fingerprint
from slipstream.distill.target import load_target

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = {
    "target": "tiny", "draft": "draft", "device": "cpu", "dtype": "float32", "date": "2026-11-21",
    "rows": [row("autoregressive", 1.0, speedup_ci95=None), row("engine", 1.1), row("exact", 1.6)],
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[FakeHub]:
    """A hub that every client in this process talks to, and an empty cache."""
    server = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # transformers 5.0 has none
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    yield server
    server.close()


@pytest.fixture
def head_folder(tmp_path, tiny_target_folder) -> Path:
    """A head of the tiny target with a policy and a card of its own."""
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    folder = tmp_path / "draft"
    save_head(tiny_head(target), folder, {"target": target.name})
    Policy(tree=TreeShape(3, 2, 7)).save(folder)
    write_card(folder, target.name, results=RESULTS)
    return folder


def push(*arguments: object) -> int:
    return main(["push", *map(str, arguments)])


def test_a_pushed_head_decodes_from_its_hub_name_with_its_policy_and_later_without_a_network(
    hub, head_folder, tiny_target_folder, monkeypatch
):
    (head_folder / "optimizer.bin").write_bytes(b"pickle")
    before = {file.name: file.read_bytes() for file in head_folder.iterdir()}
    options = ("--target", "somebody/tiny", "--license", "mit")
    assert push("--draft", head_folder, "--repo", "me/head", "--private", *options) == 0
    assert {file.name: file.read_bytes() for file in head_folder.iterdir()} == before
    files = hub.repos["me/head"]
    assert sorted(files) == ["README.md", "config.json", "decode.json", "model.safetensors", "provenance.json"]
    assert hub.private == {"me/head"}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("somebody/tiny", "mit")
    assert (card.data.library_name, card.data.pipeline_tag) == ("slipstream", "text-generation")
    assert "1.60×" in card.text
    assert str(tiny_target_folder) not in card.text

    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    target.name = "somebody/tiny"
    prompt = torch.tensor([[5, 6, 7]])
    want = target.model.generate(prompt, max_new_tokens=12, do_sample=False)
    for offline in (False, True):
        if offline:
            hub.repos.clear()
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        decoder = slipstream.load(target, "me/head")
        assert decoder.policy.tree == TreeShape(3, 2, 7)
        assert decoder.generate(prompt, max_new_tokens=12).sequences.tolist() == want.tolist()
        weights = load_head("me/head").state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in load_head(head_folder).state_dict().items())


def test_a_head_goes_and_comes_in_transformers_own_ways(hub, head_folder):
    head = load_head(head_folder)
    head.push_to_hub("me/plain")
    assert "model.safetensors" in hub.repos["me/plain"]
    assert isinstance(AutoConfig.from_pretrained("me/plain"), DraftConfig)
    for came in (AutoModel.from_pretrained("me/plain"), DraftHead.from_pretrained("me/plain")):
        assert isinstance(came, DraftHead)
        assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in came.state_dict().items())


def test_auto_classes_read_a_heads_folder(head_folder):
    assert isinstance(AutoModel.from_pretrained(head_folder), DraftHead)
    assert AutoConfig.from_pretrained(head_folder).model_type == "slipstream_eagle3"


def test_a_causal_lm_on_the_hub_can_draft(hub, tiny_target_folder):
    hub.repos["me/small"] = {file.name: file.read_bytes() for file in tiny_target_folder.iterdir()}
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    prompt = torch.tensor([[5, 6, 7]])
    out = slipstream.load(target, "me/small").generate(prompt, max_new_tokens=12)
    assert out.sequences.tolist() == target.model.generate(prompt, max_new_tokens=12, do_sample=False).tolist()
    assert out.stats.acceptance_length > 2  # it drafts for itself


def test_a_head_in_a_pickle_is_neither_read_nor_pushed(hub, head_folder, capsys):
    state = load_head(head_folder).state_dict()
    (head_folder / "model.safetensors").unlink()
    torch.save(state, head_folder / "pytorch_model.bin")
    with pytest.raises(SlipstreamError, match=r"model\.safetensors is missing"):
        load_head(head_folder)
    assert push("--draft", head_folder, "--repo", "me/head") == 2
    assert "pickled weights are not read" in capsys.readouterr().err
    hub.repos["me/pickle"] = {file.name: file.read_bytes() for file in head_folder.iterdir()}
    with pytest.raises(SlipstreamError, match=r"model\.safetensors is missing"):
        load_head("me/pickle")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "a/b"), "names no licence; give --license"),
        (("--license", "mit"), "is no hub id (owner/name), so that nobody could load it; give --target"),
        (("--license", "mit", "--target", "just-a-name"), "target 'just-a-name' is no hub id"),
        (("--license", "mit", "--target", "a/b", "--repo", "forbidden/head"), "cannot push to 'forbidden/head'"),
    ],
)
def test_a_push_that_cannot_be_says_why_and_uploads_nothing(hub, head_folder, capsys, options, message):
    assert push("--draft", head_folder, "--repo", "me/head", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert hub.repos == {}


@pytest.mark.parametrize("offline", [False, True])
def test_a_head_that_is_not_on_the_hub_is_named(hub, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(SlipstreamError, match="draft 'me/nothing' is neither a folder nor on the hub"):
        load_head("me/nothing")


def test_a_card_keeps_its_licence_and_what_else_its_header_says(head_folder, hub):
    card = head_folder / "README.md"
    card.write_text(model_card("tiny", license="mit"))
    write_card(head_folder, "tiny", results=RESULTS)
    assert ModelCard.load(card).data.license == "mit"
    card.write_text(card.read_text().replace("license: mit", "license: mit\nlanguage: en"))
    assert push("--draft", head_folder, "--repo", "me/head", "--target", "a/b") == 0
    header = ModelCard(hub.repos["me/head"]["README.md"].decode()).data
    assert (header.language, header.license, header.base_model) == ("en", "mit", "a/b")


def test_what_a_card_says_beside_its_measurements_stays(head_folder):
    card = head_folder / "README.md"
    own = model_card("tiny", license="mit").replace("license: mit", "license: mit\nlanguage: en")
    own = own.replace("Not measured yet.\n", "About my head.\n\nNot measured yet.\n\n## Data\n\nMy own text.\n")
    card.write_text(own)
    for results in (RESULTS, RESULTS | {"date": "later"}):
        write_card(head_folder, "tiny", results=results)
        text = card.read_text()
        assert text.count("Measured on") == text.count("1.60×") == 1
        assert f"{results['date']}:" in text
        assert "Not measured" not in text
        assert "About my head.\n\nMeasured on" in text
        assert text.endswith("\n\n## Data\n\nMy own text.\n")
    header = ModelCard.load(card).data
    assert (header.language, header.license) == ("en", "mit")
    card.write_text("Mine alone.\n")
    write_card(head_folder, "tiny", results=RESULTS)
    assert "\nMine alone.\n\nMeasured on" in card.read_text()


def test_a_card_names_the_target_that_the_head_does(head_folder, tiny_target_folder):
    (head_folder / "README.md").unlink()
    write_card(head_folder, "/another/path/to/it", results=RESULTS)
    assert str(tiny_target_folder) in (head_folder / "README.md").read_text()


def test_only_a_head_has_a_card_of_ours(tiny_target_folder, tmp_path, capsys):
    folder = shutil.copytree(tiny_target_folder, tmp_path / "model")
    (folder / "README.md").write_text("A language model.\n")
    assert main(["evaluate", "--draft", str(folder), "--card", "--out", str(tmp_path / "out")]) == 2
    assert "holds no draft head of slipstream's" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "A language model.\n"


def test_a_card_loads_the_head_as_it_was_measured():
    line = 'slipstream.load("tiny", "path/to/this/folder"{})'
    assert line.format("") in model_card("tiny", results=RESULTS)
    compiled = RESULTS | {"device": "cpu (2 threads), compiled"}
    assert line.format(", compiled=True") in model_card("tiny", results=compiled)


def test_the_embedded_target_is_named_as_the_hub_knows_it():
    header = ModelCard(model_card(EMBEDDED)).data
    assert header.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert header.license is None


def test_a_head_without_a_card_is_pushed_with_one(hub, head_folder):
    (head_folder / "README.md").unlink()
    assert push("--draft", head_folder, "--repo", "me/head", "--target", "a/b", "--license", "mit") == 0
    assert "Not measured yet" in hub.repos["me/head"]["README.md"].decode()
    assert json.loads(hub.repos["me/head"]["config.json"])["target_name"] == "a/b"


def test_a_head_on_the_hub_is_exported(hub, head_folder, tmp_path):
    assert push("--draft", head_folder, "--repo", "me/head", "--target", "a/b", "--license", "mit") == 0
    out = tmp_path / "exported"
    assert main(["export", "--draft", "me/head", "--to", "vllm", "--out", str(out)]) == 0
    assert (out / "config.json").is_file()


def test_evaluate_writes_what_it_measured_into_the_card_when_told_to(head_folder, tiny_target_folder, tmp_path):
    write_card(head_folder, str(tiny_target_folder), license="mit")
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["Hi"]}\n')
    arguments = ["--target", tiny_target_folder, "--draft", head_folder, "--prompts", tmp_path / "prompts.jsonl"]
    settings = ["--rules", "exact", "--max_new_tokens", "6", "--dtype", "float32"]
    before = (head_folder / "README.md").read_text()
    for flags in ([], ["--card"]):
        assert (head_folder / "README.md").read_text() == before
        out = tmp_path / f"out{len(flags)}"
        assert main(["evaluate", *map(str, arguments), *settings, *flags, "--out", str(out)]) == 0
    card = ModelCard.load(head_folder / "README.md")
    assert card.data.license == "mit"
    assert "| transformers |" in card.text
    assert main(["evaluate", "--draft", "ngram", "--card", "--out", str(tmp_path / "none")]) == 2


def test_a_trained_head_has_a_card_that_waits_for_figures(tiny_target_folder, tmp_path):
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo hello Yo"}]}
    (tmp_path / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 4)
    arguments = ["--target.name", tiny_target_folder, "--data.conversations", tmp_path / "talks.jsonl"]
    settings = ["--train.max_steps", 1, "--head.draft_vocab_size", 64, "--out", tmp_path / "run"]
    assert main(["train", *map(str, [*arguments, *settings])]) == 0
    text = (tmp_path / "run" / "draft" / "README.md").read_text()
    assert "Not measured yet" in text
    assert ModelCard(text).data.library_name == "slipstream"


def test_a_trained_head_says_what_identifies_its_target_and_inspect_shows_it(hub, tiny_target_folder, tmp_path, capsys):
    files = {file.name: file.read_bytes() for file in tiny_target_folder.iterdir()}
    hub.repos["me/small"] = files
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo hello Yo"}]}
    (tmp_path / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 4)
    told = {}
    for name in ("me/small", str(tiny_target_folder)):
        out = tmp_path / Path(name).name
        arguments = ["--target.name", name, "--data.conversations", tmp_path / "talks.jsonl", "--out", out]
        assert main(["train", *map(str, arguments), "--train.max_steps", "1", "--head.draft_vocab_size", "64"]) == 0
        told[name] = json.loads((out / "draft" / "provenance.json").read_text())
    ours, local = told["me/small"], told[str(tiny_target_folder)]
    assert (ours["target"], ours["revision"], local["revision"]) == ("me/small", revision(files), None)
    assert ours["weights"] == local["weights"] == weights_fingerprint(load_target(str(tiny_target_folder)))
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "small" / "draft")]) == 0
    shown = capsys.readouterr().out
    assert ours["revision"] in shown
    assert ours["weights"] in shown
    assert inspect_head(tmp_path / "tiny" / "draft").facts["target's revision"] == "not recorded"


def test_a_head_on_the_hub_is_not_tuned_in_its_cache(capsys):
    assert main(["tune", "--draft", "me/head"]) == 2
    assert "me/head holds no draft head: config.json is missing" in capsys.readouterr().err
