"""A head is measured on answers of the kind it was trained for: the template is told the same about thinking."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from conftest import save_llama
from test_data import THINKING, assistant, user, with_template
from test_tune import FEW
from tiny import tiny_head

from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.decode import suite
from slipstream.decode.policy import Policy
from slipstream.decode.trace import Trace
from slipstream.decode.tune import RULES, tune
from slipstream.distill.heads import save_head, trained_think
from slipstream.distill.target import Target, load_target
from slipstream.train.measure import Measure

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("datasets_cache")
TOKENS = 12


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, tiny_tokenizer) -> Path:
    """A target whose template can be told not to think."""
    folder = tmp_path_factory.mktemp("target") / "thinker"
    save_llama(folder, with_template(tiny_tokenizer, THINKING))
    return folder


@pytest.fixture(scope="module")
def draft(tmp_path_factory, thinker, datasets_cache) -> Path:
    """A head trained without thinking, by the command; it was measured so as well."""
    folder = tmp_path_factory.mktemp("run")
    talk = {"messages": [user("Hi"), assistant("Yo hello Yo")]}
    (folder / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 4)
    command = [
        "train",
        "--target.name",
        thinker,
        "--data.conversations",
        folder / "talks.jsonl",
        "--data.think",
        "false",
    ]
    settings = ["--train.max_steps", 1, "--train.measure_every", 1, "--head.draft_vocab_size", 64]
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measure, "__call__", lambda self, weights: told.append(self.target.think) or 1.0)
        assert main([*map(str, [*command, *settings]), "--out", str(folder / "run")]) == 0
    assert told == [False]
    return folder / "run" / "draft"


@pytest.fixture
def asked(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in ("Hi", "Yo")))
    return file


def by_transformers(folder: Path, text: str, think: bool) -> str:
    """The target's own greedy answer."""
    target = load_target(str(folder), dtype=torch.float32)
    ids = target.chat_tokenizer.apply_chat_template(
        [user(text)], add_generation_prompt=True, return_tensors="pt", return_dict=True, enable_thinking=think
    )["input_ids"]
    out = target.model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return target.chat_tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def options(thinker: Path, draft: Path) -> list[str]:
    words = ["--target", thinker, "--draft", draft, "--max_new_tokens", TOKENS, "--dtype", "float32"]
    return [str(word) for word in words]


@pytest.mark.parametrize(("given", "think"), [([], False), (["--think", "true"], True)])
def test_evaluate_asks_as_the_head_was_trained_or_as_it_is_told(thinker, draft, asked, tmp_path, given, think):
    command = ["evaluate", *options(thinker, draft), "--prompts", str(asked), "--rules", "exact", *given]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["think"] is think
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").open()]
    wanted = [by_transformers(thinker, text, think) for text in ("Hi", "Yo")]
    assert [line["choices"][0]["turns"][0] for line in lines] == wanted * 3
    assert by_transformers(thinker, "Hi", not think) != wanted[0]


@pytest.mark.parametrize(("given", "think"), [([], False), (["--think", "true"], True)])
def test_generate_asks_likewise(thinker, draft, capsys, given, think):
    assert main(["generate", *options(thinker, draft), "--quiet", "--prompt", "Hi", *given]) == 0
    half = "\n\ufffd"  # of a character, at the end of a stream
    assert capsys.readouterr().out.rstrip(half) == by_transformers(thinker, "Hi", think).rstrip(half)


def test_tune_asks_likewise_and_says_so(thinker, draft, asked, tmp_path, monkeypatch, capsys):
    few = {"shapes": FEW, "rules": RULES[:1]}
    monkeypatch.setattr("slipstream.decode.tune.tune.__kwdefaults__", {**tune.__kwdefaults__, **few})
    path = tmp_path / "trace.arrow"
    command = ["tune", *options(thinker, draft), "--prompts", str(asked), "--budget", "strict", "--trace", str(path)]
    assert main(command) == 0
    assert Policy.load(draft).measured["think"] is False
    assert Trace.open(path).header.think is False
    capsys.readouterr()
    assert main([*command, "--think", "true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{path} was recorded with think false, not true; record it again")


def test_a_run_goes_on_with_the_same_thinking_only(thinker, draft, asked, tmp_path, monkeypatch, capsys):
    command = ["evaluate", *options(thinker, draft), "--prompts", str(asked), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(suite, "measure_likelihood", lambda *_: {}["stop"])
        with pytest.raises(KeyError):
            main(command)
    assert main([*command, "--think", "true"]) == 2
    assert "was made with think=False, not True" in capsys.readouterr().err
    assert main(command) == 0


def test_heads_that_were_trained_otherwise_need_a_word(thinker, draft, asked, tmp_path, capsys):
    target = load_target(str(thinker))
    save_head(tiny_head(target), tmp_path / "other", {})
    assert (trained_think(draft), trained_think(tmp_path / "other")) == (False, None)
    command = ["evaluate", "--target", "nowhere/at-all", "--draft", str(draft), str(tmp_path / "other"), "ngram"]
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"({draft} with think false, {tmp_path / 'other'} with think null); give --think" in line
    command[4:] = [str(draft), str(thinker), "ngram"]  # a small model was not trained for a target
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "target 'nowhere/at-all' cannot be loaded" in capsys.readouterr().err


def test_a_target_keeps_what_its_template_is_told_and_needs_one_that_listens(thinker, tiny_target_folder):
    quiet = load_target(str(thinker), think=False)
    text = quiet.chat_tokenizer.decode(quiet.reading([0, 1]).encode_prompt([user("Hi")]))
    assert text.endswith("<think>\n\n</think>\n\n")
    with pytest.raises(SlipstreamError, match="no option enable_thinking"):
        load_target(str(tiny_target_folder), think=True)
    with pytest.raises(SlipstreamError, match="came without a tokenizer"):
        Target(quiet.model, think=True)
