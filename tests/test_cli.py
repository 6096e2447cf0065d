"""The command line: bad input is told in one line with status 2, and what exists is left alone."""

from __future__ import annotations

import inspect
import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from conftest import save_llama
from test_report import row
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaModel, ViTConfig, ViTModel

from slipstream.cli import COMMANDS, _parser, main
from slipstream.configs.recipe import HeadSettings, Recipe
from slipstream.decode.stream import TagStream
from slipstream.distill.heads import new_head, save_head
from slipstream.distill.target import load_target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("datasets_cache")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """What a refused command said: one line, and nothing else on either stream."""
        assert self.status == 2
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("slipstream: ")
        return line.removeprefix("slipstream: ")


@pytest.fixture
def slipstream(capsys) -> Callable[..., Ended]:
    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def odd_folders(tmp_path_factory, tiny_target_folder, tiny_tokenizer) -> Path:
    """Folders that hold no target: an encoder, a vision model, a model without its output matrix, torn files, .."""
    place = tmp_path_factory.mktemp("odd")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertConfig(vocab_size=len(tiny_tokenizer), initializer_range=1.0, **small)
    BertForMaskedLM(encoder).save_pretrained(place / "encoder")
    ViTModel(ViTConfig(image_size=16, patch_size=8, **small)).save_pretrained(place / "vision")
    LlamaModel(LlamaConfig(vocab_size=len(tiny_tokenizer), **small)).save_pretrained(place / "headless")
    for name in ("encoder", "vision", "headless"):
        tiny_tokenizer.save_pretrained(place / name)
    for name in ("torn", "mute", "wordless"):
        shutil.copytree(tiny_target_folder, place / name)
    weights = place / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (place / "mute" / "chat_template.jinja").unlink()
    for file in (place / "wordless").glob("*token*"):
        file.unlink()
    (place / "empty").mkdir()
    return place


@pytest.fixture(scope="module")
def drafts(tmp_path_factory, tiny_target_folder, tiny_tokenizer) -> Path:
    """Heads named after the tiny target, made for it (`right`) and for others, and one with another's name."""
    place = tmp_path_factory.mktemp("drafts")
    for name, shape in {"right": {}, "wide": {"hidden_size": 64}, "words": {"vocab_size": 300}}.items():
        save_llama(place / f"{name}-target", tiny_tokenizer, **shape)
        head = new_head(load_target(str(place / f"{name}-target")), torch.arange(64), HeadSettings(), seed=0)
        head.config.target_name = str(tiny_target_folder)
        save_head(head, place / name, {})
    head.config.target_name = "somebody/else"
    save_head(head, place / "named", {})
    return place


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"turns": ["Hi"]}\n')
    return file


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- commands and keys ---


def test_no_command_and_an_unknown_one_list_the_known(slipstream):
    assert "quickstart" in slipstream().complaint
    assert slipstream("trian").complaint == "unknown command 'trian'; did you mean 'train'?"
    complaint = slipstream("xyz").complaint
    assert all(name in complaint for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("generate", "--schedule", "foo"),
            "schedule must be one of fixed, heuristic, confidence, entropy, cost, not 'foo'",
        ),
        (
            ("export", "--draft", "a", "--out", "b", "--to", "trt"),
            "to must be one of eagle, sglang, vllm, speculators, not 'trt'",
        ),
        (("evaluate", "--out", "x", "--limit", "2.5"), "limit must be a whole number, not '2.5'"),
        (("evaluate", "--out", "x", "--temperature", "0", "a"), "temperature must be a number, not 'a'"),
        (("train", "--train.learning_rate", "abc"), "train.learning_rate must be a number, not 'abc'"),
        (("generate", "--prompt", "Hi", "--device", "banana"), "unknown device 'banana'; give cpu, cuda, cuda:1, .."),
        (("generate", "--prompt", "Hi", "--device", "cuda:99"), "device 'cuda:99' is not here: this machine has"),
    ],
)
def test_a_value_of_another_kind_is_told_in_plain_words(slipstream, arguments, message):
    assert slipstream(*arguments).complaint.startswith(message)


def test_a_recipe_that_is_not_yaml_is_named(slipstream, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("train: [")
    assert slipstream("train", "--config", file, "--out", tmp_path / "out").complaint.startswith(
        f"{file} is not YAML: "
    )


@pytest.mark.parametrize(
    ("unknown", "near"),
    [("train.lerning_rate", "train.learning_rate"), ("data.bach_tokens", "data.batch_tokens"), ("otu", "out")],
)
def test_an_unknown_recipe_key_suggests_the_near_one(slipstream, tmp_path, unknown, near):
    complaint = slipstream("train", f"--{unknown}", 3, "--out", tmp_path / "run").complaint
    assert complaint.startswith(f"unknown key '{unknown}'; did you mean '{near}'?")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "near"),
    [
        ({"train": {"lerning_rate": 3}}, "train.learning_rate"),
        ({"trian": {"learning_rate": 3}}, "train.learning_rate"),
        ({"head": {"from_target": True}, "distil": {"steps": 2}}, "distill.steps"),
    ],
)
def test_an_unknown_key_in_a_recipe_suggests_the_near_one(slipstream, tmp_path, recipe, near):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    complaint = slipstream("train", "--config", file, "--out", tmp_path / "run").complaint
    assert f"did you mean '{near}'?" in complaint


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (("quickstart", "--minuts", 3), "minutes"),
        (("generate", "--prompt", "Hi", "--temprature", 1), "temperature"),
        (("evaluate", "--out", "x", "--ruls", "[]"), "rules"),
    ],
)
def test_an_unknown_option_suggests_the_commands_own(slipstream, arguments, near):
    assert f"did you mean '{near}'?" in slipstream(*arguments).complaint


def test_a_recipe_that_is_no_yaml_is_one_line(slipstream, tmp_path):
    (tmp_path / "recipe.yaml").write_text("train: {learning_rate: [\n")
    assert "line 2" in slipstream("train", "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "run").complaint


def test_malformed_conversations_are_one_line_that_names_the_file(tmp_path, tiny_target_folder):
    """In a process of its own, where libraries could print beside us."""
    talks = tmp_path / "talks.jsonl"
    talks.write_text('{"messages": [\n')
    command = ["train", "--target.name", tiny_target_folder, "--data.conversations", talks, "--out", tmp_path / "run"]
    run = subprocess.run([sys.executable, "-m", "slipstream.cli", *command], capture_output=True, text=True)
    assert str(talks) in Ended(run.returncode, run.stdout, run.stderr).complaint


def test_a_printed_recipe_can_be_fed_back(capsys, tmp_path):
    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["train", *arguments, "--print_config"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    first = printed("--train.learning_rate", "0.5", "--distill.steps", "7", "--out", "here")
    assert yaml.safe_load(first)["train"]["learning_rate"] == 0.5
    (tmp_path / "recipe.yaml").write_text(first)
    assert printed("--config", str(tmp_path / "recipe.yaml")) == first
    changed = yaml.safe_load(printed("--config", str(tmp_path / "recipe.yaml"), "--distill.steps", "3"))
    assert changed["distill"]["steps"] == 3
    assert changed["train"]["learning_rate"] == 0.5


# --- targets and drafts ---


@pytest.mark.parametrize("name", ["absent", "./absent", "/absent/model", "absent.gguf", "absent/of/three"])
def test_a_target_that_does_not_exist_is_named(slipstream, name):
    assert slipstream("generate", "--prompt", "Hi", "--target", name).complaint.startswith(
        f"target {name!r} does not exist; give a model folder"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "has no config.json"),
        ("encoder", "is no causal language model"),
        ("vision", "is no causal language model"),
        ("headless", "lm_head.weight"),
        ("torn", "cannot be loaded"),
        ("wordless", "tokenizer"),
        ("mute", "has no chat template"),
    ],
)
def test_a_folder_that_holds_no_chat_model_says_what_is_wrong(slipstream, odd_folders, name, message):
    ended = slipstream("generate", "--prompt", "Hi", "--target", odd_folders / name, "--max_new_tokens", 2)
    assert message in ended.complaint
    assert str(odd_folders / name) in ended.complaint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("named", "belongs to target 'somebody/else', not to"),
        ("wide", "expects features of width 64, but target"),
        ("words", "expects a vocabulary of 300, but target"),
        ("absent", "does not exist"),
    ],
)
def test_a_draft_that_does_not_fit_says_how(slipstream, tiny_target_folder, drafts, name, message):
    arguments = ("--prompt", "Hi", "--target", tiny_target_folder, "--draft", drafts / name)
    assert message in slipstream("generate", *arguments).complaint


def test_a_draft_that_fits_decodes_to_the_text_of_the_target_alone(slipstream, tiny_target_folder, drafts):
    command = ("generate", "--prompt", "Hi", "--target", tiny_target_folder, "--max_new_tokens", 24, "--quiet")
    alone = slipstream(*command, "--dtype", "float32")
    drafted = slipstream(*command, "--dtype", "float32", "--draft", drafts / "right")
    assert alone.status == drafted.status == 0
    assert alone.out == drafted.out != ""


def test_what_is_compiled_is_compiled_before_the_answer(slipstream, tiny_target_folder, monkeypatch):
    command = ("generate", "--prompt", "Hi", "--target", tiny_target_folder, "--max_new_tokens", 24, "--quiet")
    plain = slipstream(*command, "--dtype", "float32", "--draft", "ngram").out
    order = []

    def compile(function, **given):
        return lambda *args: order.append("compiled") or function(*args)

    monkeypatch.setattr(torch, "compile", compile)
    put = TagStream.put
    monkeypatch.setattr(TagStream, "put", lambda *args: order.append("shown") or put(*args))
    assert slipstream(*command, "--dtype", "float32", "--draft", "ngram", "--compiled").out == plain != ""
    assert order[: order.index("shown")].count("compiled") > 1  # the look whether anything compiles, and a warm-up


def test_a_causal_lm_and_the_text_itself_can_draft(slipstream, tiny_target_folder):
    arguments = ("--prompt", "Hi", "--target", tiny_target_folder, "--max_new_tokens", "20", "--quiet")
    plain = slipstream("generate", *arguments).out
    for draft in (tiny_target_folder, "ngram"):
        for schedule in ("fixed", "cost"):
            assert slipstream("generate", *arguments, "--draft", draft, "--schedule", schedule).out == plain


def test_a_prompt_may_come_from_standard_input_but_not_be_empty(slipstream, tiny_target_folder, monkeypatch):
    arguments = ("--target", tiny_target_folder, "--max_new_tokens", "8", "--quiet")
    wanted = slipstream("generate", "--prompt", "Hi", *arguments).out
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert slipstream("generate", *arguments).out == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "no prompt" in slipstream("generate", *arguments).complaint


def test_on_a_terminal_a_chat_begins_that_remembers_and_ends_with_an_empty_line(
    slipstream, tiny_target_folder, monkeypatch
):
    terminal = io.StringIO("Hi\nYo\n\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    said = slipstream("generate", "--target", tiny_target_folder, "--max_new_tokens", "8", "--quiet")
    assert said.status == 0
    assert said.out.count("> ") == 3


def test_a_prompt_longer_than_the_context_says_both_lengths(slipstream, tiny_target_folder):
    complaint = slipstream("generate", "--prompt", "Hi " * 300, "--target", tiny_target_folder).complaint
    assert complaint == f"the prompt has 310 tokens, the context of {tiny_target_folder} is 256"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", -1, "temperature must not be negative"),
        ("--verify", "exat", "unknown verification rule 'exat'"),
        ("--dtype", "float3", "float3"),
        ("--max_new_tokens", -3, "max_new_tokens"),
    ],
)
def test_an_impossible_option_of_generate_is_named(slipstream, tiny_target_folder, option, value, message):
    arguments = ("--prompt", "Hi", "--target", tiny_target_folder, option, value)
    assert message in slipstream("generate", *arguments).complaint


# --- prompts and folders ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "do not exist"),
        (b"", "holds no prompts"),
        (b'{"turns": ["Hi"]}\n{"turns": [\n', ":2: not JSON"),
        (b'{"turns": ["Hi"]}\n{"prompt": "Hi"}\n', ':2: needs "turns"'),
        (b'{"turns": ["Hi"]}\n["Hi"]\n', ':2: needs "turns"'),
        (b'{"turns": ["\xff"]}\n', "UTF-8"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "regenerate"])
def test_bad_prompts_are_told_with_file_and_line(slipstream, tmp_path, tiny_target_folder, command, content, message):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content)
    run = slipstream(command, "--target", tiny_target_folder, "--prompts", file, "--out", tmp_path / "out.jsonl")
    assert str(file) in run.complaint
    assert message in run.complaint
    assert not (tmp_path / "out").exists()


def test_prompts_may_hold_any_character(slipstream, tmp_path, tiny_target_folder):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"turns": ["Hi\u2028Yo\u0085"]}, ensure_ascii=False) + "\n", encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    command = ("regenerate", "--target", tiny_target_folder, "--prompts", file, "--out", out, "--max_new_tokens", 2)
    assert slipstream(*command).status == 0
    assert json.loads(out.read_text())["messages"][0]["content"] == "Hi\u2028Yo\u0085"


@pytest.mark.parametrize("option", ["--limit", "--max_new_tokens"])
def test_evaluating_nothing_is_refused(slipstream, tmp_path, tiny_target_folder, prompts, option):
    command = ("evaluate", "--target", tiny_target_folder, "--prompts", prompts, option, 0)
    assert option.strip("-") in slipstream(*command, "--out", tmp_path / "out").complaint
    assert not (tmp_path / "out" / "results.json").exists()


def test_evaluate_again_changes_nothing_and_another_run_is_refused(slipstream, tmp_path, tiny_target_folder, prompts):
    out = tmp_path / "out"
    command = ("evaluate", "--target", tiny_target_folder, "--prompts", prompts, "--max_new_tokens", 4, "--out", out)
    assert slipstream(*command).status == 0
    before = contents(out)
    assert set(before) == {"answers.jsonl", "report.html", "results.json", "table.md"}
    assert slipstream(*command).status == 0
    other = slipstream(*command, "--seed", 3)
    assert other.complaint == f"{out} holds the results of another run (seed); give another --out"
    assert contents(out) == before


def test_regenerate_leaves_a_file_that_is_not_its_own_alone(slipstream, tiny_target_folder, prompts):
    before = prompts.read_bytes()
    command = ("regenerate", "--target", tiny_target_folder, "--prompts", prompts, "--max_new_tokens", 8)
    assert str(prompts) in slipstream(*command, "--out", prompts).complaint
    assert prompts.read_bytes() == before


def test_synthesize_makes_the_folder_it_writes_to(slipstream, tmp_path):
    out = tmp_path / "new" / "prompts.jsonl"
    assert slipstream("synthesize", "--own", 0, "--topics", 20, "--out", out).status == 0
    assert all(json.loads(line)["turns"] for line in out.read_text().splitlines())


@pytest.mark.parametrize("command", ["regenerate", "synthesize"])
def test_where_text_cannot_be_written_nothing_is_made(slipstream, tiny_target_folder, prompts, command):
    asked = ("--prompts", prompts) if command == "regenerate" else ()
    out = prompts / "talks.jsonl"
    said = slipstream(command, "--target", tiny_target_folder, *asked, "--out", out).complaint
    assert said.startswith(f"cannot write to {prompts}: ")
    (folder := prompts.with_name("talks.jsonl")).mkdir()
    said = slipstream(command, "--target", tiny_target_folder, *asked, "--out", folder).complaint
    assert said == f"--out must be a file, {folder} is a folder"


def test_answers_are_written_as_json_lines_or_parquet(slipstream, tiny_target_folder, prompts):
    command = ("regenerate", "--target", tiny_target_folder, "--prompts", prompts, "--out")
    before = contents(prompts.parent)
    for name in ("talks.csv", "talks"):
        said = slipstream(*command, prompts.with_name(name)).complaint
        assert said == f"--out must end in .jsonl or .parquet, not {name!r}"
    assert contents(prompts.parent) == before


@pytest.mark.parametrize("option", ["--topics", "--own"])
def test_synthesize_writes_no_negative_number_of_prompts(slipstream, tmp_path, option):
    said = slipstream("synthesize", option, -3, "--out", tmp_path / "prompts.jsonl").complaint
    assert said.startswith("--topics and --own must not be negative, but are ")
    assert contents(tmp_path) == {}


def test_synthesize_takes_no_more_prompts_by_the_target_than_were_asked_for(slipstream, tmp_path, monkeypatch):
    out, own = tmp_path / "prompts.jsonl", []
    monkeypatch.setattr("slipstream.distill.target.load_target", lambda name, **_: SimpleNamespace(chat_tokenizer=None))

    def own_prompts(*_: object, count: int, out: Path, **__: object) -> None:
        own.extend(
            {"question_id": f"self-{i}", "turns": [f"Hi {i}"], "unit": [i, 0, 1]} for i in range(len(own), count)
        )
        out.write_text("".join(json.dumps(row) + "\n" for row in own))

    monkeypatch.setattr("slipstream.data.synthesize.self_prompts", own_prompts)
    for asked in (5, 3):
        assert slipstream("synthesize", "--own", asked, "--topics", 0, "--out", out).status == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["turns"] for row in rows] == [[f"Hi {i}"] for i in range(asked)]
        assert not any("unit" in row for row in rows)


@pytest.mark.parametrize("minutes", ["0", "-1", "soon", "nan", "inf"])
def test_quickstart_wants_some_minutes(slipstream, tmp_path, minutes):
    assert "minutes" in slipstream("quickstart", "--minutes", minutes, "--out", tmp_path / "run").complaint
    assert not (tmp_path / "run").exists()


def test_quickstart_leaves_a_folder_that_holds_something_else_alone(slipstream, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        assert slipstream("quickstart", "--out", out).complaint == (
            f"{out} exists and is no quickstart run; give another --out"
        )
    assert list(contents(tmp_path)) == ["thesis.txt"]


@pytest.fixture
def finished(tmp_path) -> Path:
    """A folder as a finished quickstart leaves it, so far as the command looks."""
    rows = [row("autoregressive", 1.0, speedup_ci95=None), row("engine", 1.1), row("exact", 1.6), row("mars", 1.8)]
    header: dict[str, Any] = {"target": "tiny", "draft": "draft", "device": "cpu", "dtype": "bfloat16"}
    out = tmp_path / "run"
    (out / "draft").mkdir(parents=True)
    (out / "quickstart.json").write_text(json.dumps({"minutes": 1.0, "fresh": False}))
    (out / "results.json").write_text(json.dumps({**header, "versions": {}, "seed": 0, "rows": rows}))
    (out / "draft" / "model.safetensors").write_bytes(b"weights")
    (out / "report.html").write_text("<html>")
    return out


def test_a_finished_quickstart_changes_nothing_and_shows_its_results(slipstream, finished):
    before = contents(finished)
    ended = slipstream("quickstart", "--minutes", 1, "--out", finished)
    assert ended.status == 0
    assert "this run is finished; nothing was changed" in ended.err
    assert "1.60" in ended.err + ended.out
    assert contents(finished) == before


def test_a_quickstart_of_other_settings_is_refused(slipstream, finished):
    before = contents(finished)
    assert "holds a run of other settings" in slipstream("quickstart", "--minutes", 2, "--out", finished).complaint
    assert contents(finished) == before


def test_a_flag_takes_no_value(tiny_target_folder, capsys):
    arguments = ["generate", "--target", str(tiny_target_folder), "--prompt", "Hi", "--max_new_tokens", "4"]
    assert main([*arguments, "--dtype", "float32", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_the_quickstart_recipe_in_yaml_says_what_the_defaults_say():
    recipe = yaml.safe_load((files("slipstream.configs") / "quickstart.yaml").read_text())
    for section, settings in recipe.items():
        for key, value in settings.items():
            assert getattr(getattr(Recipe(), section), key) == value, f"{section}.{key}"


@pytest.mark.parametrize(
    "name", sorted(path.name for path in files("slipstream.configs").iterdir() if path.name.endswith(".yaml"))
)
def test_every_recipe_that_ships_is_one(name):
    file = files("slipstream.configs") / name
    parsed = _parser().parse_args(["train", "--config", str(file), "--out", "anywhere"]).train
    for section, settings in yaml.safe_load(file.read_text()).items():
        for key, value in settings.items():
            assert parsed[section][key] == value, f"{section}.{key}"


def broken(command: str, error: BaseException) -> Callable[..., None]:
    """A command that ends like this."""

    def run(**_: Any) -> None:
        raise error

    function = COMMANDS[command]
    run.__doc__, run.__signature__ = function.__doc__, inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize(
    ("command", "setting"), [("regenerate", "lower --batch_size"), ("generate", "take a smaller target")]
)
def test_out_of_memory_names_what_to_lower(slipstream, monkeypatch, command, setting):
    monkeypatch.setitem(COMMANDS, command, broken(command, torch.OutOfMemoryError("of 80 GiB 0 are free")))
    given = ("--prompts", "x", "--out", "y") if command == "regenerate" else ("--prompt", "x")
    assert slipstream(command, *given).complaint.startswith(f"out of memory: {setting}")


@pytest.mark.parametrize(("command", "told"), [("evaluate", "goes on where it stopped"), ("tune", "interrupted\n")])
def test_only_what_goes_on_says_so_when_it_is_interrupted(slipstream, monkeypatch, command, told):
    monkeypatch.setitem(COMMANDS, command, broken(command, KeyboardInterrupt()))
    ended = slipstream(command, *(("--out", "x") if command == "evaluate" else ("--draft", "x")))
    assert ended.status == 130
    assert ended.err.startswith("slipstream: interrupted")
    assert told in ended.err
