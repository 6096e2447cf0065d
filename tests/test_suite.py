"""`slipstream evaluate` over drafts, rules, temperatures and batch sizes: what it writes, and that it goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_tasks import GSM8K, HUMANEVAL, write
from tiny import tiny_head

import slipstream
from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.decode import plan as plan_module
from slipstream.decode import suite
from slipstream.decode.evaluate import Record, Times, answer_batch, autoregressive, by_task, interval
from slipstream.decode.plan import Plan, measure
from slipstream.decode.policy import Policy
from slipstream.decode.stream import Pieces
from slipstream.decode.suite import evaluate, short_names
from slipstream.decode.tasks import read_tasks
from slipstream.decode.tree import TreeShape
from slipstream.decode.verify import Verifier

if TYPE_CHECKING:
    from pathlib import Path

TALKS = [
    {"question_id": 1, "category": "writing", "turns": ["Hi", "hello"], "reference": ["Yo", "Yo"]},
    {"question_id": 2, "category": "math", "turns": ["Yo user"], "reference": ["#### 2"]},
    {"question_id": 3, "category": "writing", "turns": ["Hi Yo hello"], "reference": ["Hi"]},
]
TOKENS = 8


@pytest.fixture(scope="module")
def heads(tmp_path_factory, tiny_target_folder) -> list[str]:
    """Folders of two random heads."""
    place = tmp_path_factory.mktemp("heads")
    target = slipstream.load_target(str(tiny_target_folder), dtype=torch.float32)
    for seed, name in enumerate(("one", "two")):
        slipstream.save_head(tiny_head(target, 200, seed=seed), place / name, {})
    return [str(place / "one"), str(place / "two")]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tasks")
    return [write(folder, *TALKS, name="talks"), write(folder, GSM8K, HUMANEVAL, name="work")]


@pytest.fixture(scope="module")
def decoders(tiny_target_folder, heads) -> dict[str, Any]:
    target = slipstream.load_target(str(tiny_target_folder), dtype=torch.float32)
    return {name: slipstream.load(target, folder) for name, folder in zip(("one", "two"), heads, strict=True)}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_target_folder, heads, files) -> Path:
    """Two heads, two rules, two temperatures, two batch sizes, two files, scored: by the command."""
    out = tmp_path_factory.mktemp("run") / "out"
    command = ["evaluate", "--target", str(tiny_target_folder), "--draft", *heads, "--prompts", *map(str, files)]
    command += ["--rules", "exact", "mars:margin=0.7,regret=5", "--temperature", "0", "1", "--batch_size", "1", "2"]
    command += ["--score", "--max_new_tokens", str(TOKENS), "--dtype", "float32", "--seed", "4", "--out", str(out)]
    assert main(command) == 0
    return out


@pytest.fixture(scope="module")
def results(run) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def answers(run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]


def test_rows_are_the_whole_grid_and_the_baselines_stand_first(run, results):
    assert {path.name for path in run.iterdir()} == {"answers.jsonl", "report.html", "results.json", "table.md"}
    assert (results["seed"], results["plan"]["seed"]) == (4, 4)
    assert len(results["policies"]) == 2
    rows = [row for row in results["rows"] if row["task"] == "all"]
    assert [(row["temperature"], row["batch_size"]) for row in rows[::6]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    rules = ["autoregressive", "engine", *["exact", "mars:margin=0.7,regret=5"] * 2]
    assert [row["rule"] for row in rows] == rules * 4
    assert [bool(row["draft"]) for row in rows[:6]] == [False, False, True, True, True, True]
    assert {row["task"] for row in results["rows"]} == {"all", "talks", "talks/writing", "talks/math", "work"}
    assert rows[3]["verifier"]["threshold"] == 0.7
    assert rows[3]["verifier"]["regret"] == 5.0


def test_exact_gives_the_targets_tokens_alone_and_in_batches(results):
    for row in results["rows"]:
        if row["temperature"] == 0 and row["lossless"]:
            assert row["identical_to_target"] is True
            assert row["agreement"]["exact_match"] == row["agreement"]["common_prefix"] == 1.0
            assert row["regret_quantiles"] is row["relaxed_margins"] is row["regret_by_length"] is None
        if row["temperature"] == 1:
            assert row["agreement"] is None
        assert row["compared_with"] == ("autoregressive" if row["lossless"] else "exact")


def test_relaxed_tokens_are_told_by_margin_and_by_place(results):
    relaxed = [row for row in results["rows"] if row["relaxed_share"]]
    assert relaxed
    for row in relaxed:
        assert sum(row["relaxed_margins"]["counts"]) == pytest.approx(row["relaxed_share"] * row["tokens"], abs=0.1)
        assert row["relaxed_margins"]["edges"][-1] <= row["verifier"]["threshold"]
        if row["prompts"] == 1:
            last = row["regret_by_length"][-1]
            assert last["tokens"] == row["tokens"]
            assert last["mean"] == pytest.approx(row["mean_regret_nats"] * row["tokens"], abs=1e-3)


def test_samples_are_the_first_answers_of_each_task(results):
    prompts = [sample["prompt"] for sample in results["samples"]]
    assert list(dict.fromkeys(prompts)) == [TALKS[0]["turns"][0], TALKS[1]["turns"][0], prompts[-1]]
    assert len(prompts) == 3 * 4  # heads and rules
    assert all(0 < len(sample["tokens"]) <= TOKENS for sample in results["samples"])


def test_draws_do_not_depend_on_the_batch(answers):
    texts: dict[str, list[list[str]]] = {}
    for line in answers:
        if " exact T=1" in line["model_id"]:
            texts.setdefault(line["answer_id"][:-1], []).append(line["choices"][0]["turns"])
    assert len(texts) == 10  # two drafts, five prompts
    assert all(alone == together for alone, together in texts.values())


def test_answers_feed_spec_benchs_evaluation(answers, results):
    """Its script takes the tokens, seconds and accept lengths of the first choice, by category."""
    assert len({line["answer_id"] for line in answers}) == len(answers) == 4 * 6 * 5
    mine = [line for line in answers if line["model_id"].endswith("one exact T=0 batch=1")]
    choices = [line["choices"][0] for line in mine]
    (row,) = [
        r for r in results["rows"]
        if (r["task"], r["rule"], r["temperature"], r["batch_size"]) == ("all", "exact", 0, 1) and r["draft"] == "one"
    ]  # fmt: skip
    lengths = [n for choice in choices for n in choice["accept_lengths"]]
    assert sum(lengths) / len(lengths) == pytest.approx(row["acceptance_length"], abs=1e-3)
    assert sum(sum(choice["new_tokens"]) for choice in choices) == row["tokens"]
    for line, choice in zip(mine, choices, strict=True):
        turns = len(choice["turns"])
        assert len(choice["wall_time"]) == len(choice["new_tokens"]) == len(choice["decoding_steps"]) == turns
        assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"])
        assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"]) - turns  # the first token belongs to no round
        assert {"question_id", "category", "model_id", "tstamp"} <= set(line)
    assert len({line["seed"] for line in mine}) == len(mine)


def test_scores_stand_in_rows_and_table_with_length_and_sandbox(run, results):
    first = next(row for row in results["rows"] if row["task"] == "work")
    assert set(first["scores"]) == {"final_number", "pass@1"}
    assert first["scores"]["pass@1"]["mean_output_tokens"] > 0
    assert set(results["sandbox"]) == {"network", "processes"}
    table = (run / "table.md").read_text()
    for heading in ("Speed", "Speed by task", "Acceptance by position", "Fidelity", "Scores"):
        assert f"### {heading}\n" in table
    lossless = table.partition("**Relaxed")[0]
    assert "mars" not in lossless
    assert all(line.count("|") == block.splitlines()[0].count("|")
               for block in table.split("\n\n") if block.startswith("| ") for line in block.splitlines())  # fmt: skip


def test_a_lossy_rule_agrees_with_exact_up_to_its_first_relaxed_token(decoders, files, tmp_path):
    rows = read_tasks(files[:1], 1)
    plan = Plan(rules=("exact", "mars:margin=3"), max_new_tokens=30)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(suite, "measure", lambda *given: seen.append(measure(*given)) or seen[0])
        results = evaluate({"one": decoders["one"]}, rows, plan, tmp_path)
    (groups,) = seen[0].values()
    tags = [token.tag for token in groups[3][0].tagged]
    row = results["rows"][3]
    assert row["agreement"]["common_prefix"] >= round(tags.index("relaxed") / len(tags), 4)
    assert row["agreement"]["exact_match"] == 0


class InterruptedRunError(Exception):
    pass


def test_an_interrupted_run_asks_only_for_what_is_missing(decoders, files, tmp_path, monkeypatch):
    decoder = {"one": decoders["one"]}
    plan = Plan(rules=("exact",), temperatures=(0.0, 0.9), batch_sizes=(2,), max_new_tokens=6)
    rows = read_tasks(files[:1])
    asked: list[tuple[str, Any]] = []

    def limited(count: float):
        def call(decoder, rule, batch, **options):
            if "seed" in options:  # no warm-up
                if len(asked) >= count:
                    raise InterruptedRunError
                asked.append((rule, [row["question_id"] for row in batch]))
            return answer_batch(decoder, rule, batch, **options)

        monkeypatch.setattr(plan_module, "answer_batch", call)

    limited(4)
    with pytest.raises(InterruptedRunError):
        evaluate(decoder, rows, plan, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"progress.jsonl", "progress.jsonl.settings.json"}
    kept = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    with pytest.raises(SlipstreamError, match="was made with max_new_tokens=6, not 7"):
        evaluate(decoder, rows, Plan(**{**vars(plan), "max_new_tokens": 7}), tmp_path)
    limited(float("inf"))
    evaluate(decoder, rows, plan, tmp_path)
    # 2 batches, 2 temperatures; the batch that was interrupted behind its first rule began anew
    assert Counter(rule for rule, _ in asked) == {"autoregressive": 5, "engine": 4, "exact": 4}
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "report.html", "results.json", "table.md"}
    times = [json.loads(line)["choices"][0]["wall_time"] for line in (tmp_path / "answers.jsonl").open()]
    assert all(row["turn_seconds"] in times for row in kept)  # what was measured before stands


def test_an_interrupted_run_goes_on_with_drafts_in_their_order_only(decoders, files, tmp_path, monkeypatch):
    plan, rows = Plan(rules=("exact",), max_new_tokens=4), read_tasks(files[:1])

    def stop(*_: Any) -> None:
        raise InterruptedRunError

    monkeypatch.setattr(suite, "measure_likelihood", stop)
    with pytest.raises(InterruptedRunError):
        evaluate(decoders, rows, plan, tmp_path)
    turned = dict(reversed(decoders.items()))
    assert list(turned) != list(decoders)
    with pytest.raises(SlipstreamError, match="drafts"):  # answers are kept by place
        evaluate(turned, rows, plan, tmp_path)


def test_scores_against_other_references_are_another_run(decoders, files, tmp_path):
    rows = [{**row, "reference": ["Yo"] * len(row["turns"])} for row in read_tasks(files[:1])]
    plan = Plan(rules=("exact",), max_new_tokens=4, score=True)
    evaluate({"one": decoders["one"]}, rows, plan, tmp_path)
    with pytest.raises(SlipstreamError, match=r"another run \(references\)"):
        evaluate(
            {"one": decoders["one"]},
            [{**row, "reference": ["hello"] * len(row["turns"])} for row in rows],
            plan,
            tmp_path,
        )


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path, tiny_target_folder, files):
    out = tmp_path / "out"
    command = ["evaluate", "--target", str(tiny_target_folder), "--draft", "ngram", "--prompts", str(files[0])]
    command += ["--rules", "exact", "--max_new_tokens", "60", "--batch_size", "1", "3", "--out", str(out)]
    child = subprocess.Popen([sys.executable, "-m", "slipstream.cli", *command], stderr=subprocess.DEVNULL)
    journal, deadline = out / "progress.jsonl", time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.stat().st_size:
            break
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "results.json").exists()
    kept = [json.loads(line)["turn_seconds"] for line in journal.read_text().splitlines() if line.endswith("}")]
    assert kept
    again = [sys.executable, "-m", "slipstream.cli", *command]  # with as many threads
    assert subprocess.run(again, stderr=subprocess.DEVNULL, check=False).returncode == 0
    times = [json.loads(line)["choices"][0]["wall_time"] for line in (out / "answers.jsonl").open()]
    assert all(seconds in times for seconds in kept)


def test_a_batch_gives_each_row_what_it_gets_alone_and_the_statistics_are_those_of_the_engine(decoders):
    decoder = decoders["one"]
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "temperature": 0.8}
    together = answer_batch(decoder, "exact", TALKS, seed=5, **options)
    for i, row in enumerate(TALKS):
        alone = answer_batch(decoder, "exact", [row], seed=5 + i, **options)[0]
        assert alone.outputs == together[i].outputs
        assert alone.accept_lengths == together[i].accept_lengths
    assert [len(record.outputs) for record in together] == [2, 1, 1]
    ids = torch.tensor([[5, 6, 7]])
    out = decoder.generate(ids, max_new_tokens=TOKENS, verify="exact")
    mine = Record("all")
    mine.add([token.id for token in out.tokens], out.tokens, Times(1.0, 0.5, 0.25))
    assert mine.accept_lengths == out.stats.accept_lengths
    assert (mine.relaxed, mine.regret) == (out.stats.relaxed, pytest.approx(out.stats.regret))


@pytest.mark.parametrize(
    ("drafts", "short"),
    [
        (["runs/a/draft", "runs/b/draft"], ["a", "b"]),
        (["heads/one", "ngram"], ["heads/one", "ngram"]),
        (["a/draft", "a/b/draft"], ["draft", "b/draft"]),
        (["runs/a/draft"], ["runs/a/draft"]),
    ],
)
def test_drafts_are_told_apart_by_what_differs(drafts, short):
    assert list(short_names(drafts).values()) == short


def test_tasks_are_pooled_by_what_they_belong_to():
    records = [[Record(task) for task in ("a/x", "a/y", "b")]]
    assert {name: len(groups[0]) for name, groups in by_task(records).items()} == {
        "all": 3, "a": 2, "a/x": 1, "a/y": 1, "b": 1
    }  # fmt: skip
    assert list(by_task([[Record("x"), Record("x")]])) == ["all"]
    assert list(by_task([[Record("x"), Record("xy")]])) == ["all", "x", "xy"]


def test_a_batch_is_drawn_as_one_for_the_interval():
    fast = [Record("all", tokens=10, seconds=1.0, batch=i // 2) for i in range(4)]
    slow = [Record("all", tokens=10, seconds=2.0 + i // 2, batch=i // 2) for i in range(4)]
    ratio, bounds = interval(slow, fast, 0)
    assert ratio == pytest.approx(2.5)
    assert bounds == [2.0, 3.0]  # of two batches there are three samples
    assert interval(slow[:2], fast[:2], 0)[1] is None


@pytest.mark.parametrize(
    ("text", "verifier"),
    [
        ("exact", Verifier()),
        ("mars:margin=0.5", Verifier("mars", "margin", 0.5)),
        ("mars: odds=0.3, regret=10, rank=3", Verifier("mars", "odds", 0.3, rank=3, regret=10.0)),
        ("mars:margin=2,price=1.5", Verifier("mars", "margin", 2.0, price=1.5)),
        ("lenience:leniency=0.5", Verifier("lenience", leniency=0.5)),
    ],
)
def test_a_rule_may_carry_its_settings(text, verifier):
    assert Verifier.of(text) == verifier
    assert Policy().rule(text) == verifier


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--rules", "exat"), "unknown verification rule 'exat'; did you mean 'exact'?"),
        (("--rules", "mars:magrin=1"), "unknown setting 'magrin' in rule 'mars:magrin=1'; did you mean 'margin'?"),
        (("--rules", "mars:margin=x"), "'margin' in rule 'mars:margin=x' must be a number, not 'x'"),
        (("--rules", "exact", "exact"), "rules names 'exact' twice"),
        (("--batch_size", "2", "0"), "batch_size must be at least 1, not 0"),
        (
            ("--rules", "mars:ratio=0.9,margin=1"),
            "rule 'mars:ratio=0.9,margin=1' names two signals, ratio and margin; give one",
        ),
        (("--temperature", "0", "-1"), "temperature must be a number from 0 up, not -1"),
        (("--seed", "-5"), "seed must not be negative, but is -5"),
        (("--max_new_tokens", "0"), "max_new_tokens must be at least 1, not 0"),
        (("--trace",), "--trace records rounds of drafts, and there is none; give --draft"),
        (("--score",), 'line.jsonl:1: no reference; --score needs "reference", one per turn'),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(tmp_path, capsys, option, message):
    file = write(tmp_path, {"turns": ["Hi"]}, name="line")
    out = tmp_path / "out"
    command = ["evaluate", "--target", "nowhere/at-all", "--prompts", str(file), "--out", str(out), *option]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(message)
    assert not out.exists()


def test_a_prompt_that_does_not_fit_is_named_before_anything_runs(tmp_path, decoders):
    file = write(tmp_path, {"turns": ["Hi"]}, {"turns": ["Hi " * 300]}, name="long")
    with pytest.raises(SlipstreamError, match=r"long\.jsonl:3: the prompt has \d+ tokens, the context of .* is 256"):
        evaluate(decoders, read_tasks([file]), Plan(), tmp_path)
    file = write(tmp_path, {"turns": ["Hi", "Yo", "hello"]}, name="talk")
    with pytest.raises(SlipstreamError, match=r"talk\.jsonl:1: .* up to 300 of answers before its last turn, .* fewer"):
        evaluate(decoders, read_tasks([file]), Plan(max_new_tokens=150), tmp_path)
    assert not (tmp_path / "progress.jsonl").exists()


def test_a_rule_that_cannot_judge_the_trees_is_refused_before_anything_runs(tmp_path, decoders, files):
    plan = Plan(rules=("exact", "block"), temperatures=(0.0, 1.0), max_new_tokens=4)
    with pytest.raises(SlipstreamError, match="rule 'block' needs a drawn chain"):
        evaluate(decoders, read_tasks(files[:1]), plan, tmp_path)
    drawn = replace(decoders["one"].policy, tree=TreeShape.chain(2, sampled=True))
    chained = {"one": slipstream.Decoder(decoders["one"].target, decoders["one"].drafter, drawn)}
    with pytest.raises(SlipstreamError, match="rule 'mars' judges trees of the likeliest drafts"):
        evaluate(chained, read_tasks(files[:1]), replace(plan, rules=("exact", "mars")), tmp_path)
    assert not list(tmp_path.iterdir())
    rows = evaluate(chained, read_tasks(files[:1]), plan, tmp_path)["rows"]
    assert {row["rule"] for row in rows} == {"autoregressive", "engine", "exact", "block"}


def test_an_interrupted_run_does_not_go_on_with_other_weights(tmp_path, tiny_target_folder, heads, files, monkeypatch):
    target = slipstream.load_target(str(tiny_target_folder), dtype=torch.float32)
    decoders, plan = {"one": slipstream.load(target, heads[0])}, Plan(max_new_tokens=4)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "measure_likelihood", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(decoders, read_tasks(files[:1]), plan, tmp_path)
    with torch.no_grad():
        next(target.model.parameters()).mul_(1.5)
    with pytest.raises(SlipstreamError, match="weights"):
        evaluate(decoders, read_tasks(files[:1]), plan, tmp_path)


def test_the_baseline_decodes_as_ours_does(tiny_target_folder):
    """Nothing of the checkpoint's generation config filters, and nothing goes beyond the context."""
    target = slipstream.load_target(str(tiny_target_folder), dtype=torch.float32)
    prompts = [list(range(3, 9)), list(range(9, 40))]
    plain, _ = autoregressive(target, prompts, max_new_tokens=12)
    config = target.model.generation_config
    config.update(repetition_penalty=1.7, no_repeat_ngram_size=1, suppress_tokens=plain[0][:2])
    assert autoregressive(target, prompts, max_new_tokens=12)[0] == plain
    looked_up, _ = autoregressive(target, prompts[:1], max_new_tokens=12, prompt_lookup_num_tokens=4)
    assert looked_up == plain[:1]
    assert target.model.generation_config is config
    out = slipstream.Decoder(target).generate(torch.tensor(prompts[:1]), max_new_tokens=12)
    assert [token.id for token in out.tokens] == plain[0]
    target.model.generation_config.eos_token_id = None
    long = [5 + i % 100 for i in range(target.context - 3)]
    assert [len(row) for row in autoregressive(target, [long], max_new_tokens=9)[0]] == [3]


def test_answers_are_shown_in_characters_and_compared_by_token(tiny_tokenizer):
    ids = tiny_tokenizer("Yo 中é!", add_special_tokens=False)["input_ids"]
    pieces = Pieces(tiny_tokenizer, special=True)
    shown = [pieces.add(token) for token in ids]
    assert "".join(shown) == "Yo 中é!"
    assert "\ufffd" not in "".join(shown)
    assert any(len(piece) == 0 for piece in shown)  # bytes of a character that was not whole yet


def test_lines_keep_the_spaces_they_begin_with(tiny_tokenizer, monkeypatch):
    """Some decoders (Llama 2's) strip a space from what they are given."""
    plain = tiny_tokenizer.decode
    monkeypatch.setattr(tiny_tokenizer, "decode", lambda ids, **options: plain(ids, **options).removeprefix(" "))
    text = "Yo:\n  hello\n Yo\n"
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(tiny_tokenizer, special=True)
    assert "".join(map(pieces.add, ids)) == text


def test_one_category_beside_none_has_its_own_rows():
    records = [[Record("all", tokens=4), Record("b", tokens=6)]]
    assert {name: [r.tokens for r in group[0]] for name, group in by_task(records).items()} == {"all": [4, 6], "b": [6]}
