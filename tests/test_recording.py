"""`slipstream evaluate --trace`: whole traces whatever happened, which replay to what `results.json` says."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_tasks import write
from tiny import tiny_head, tiny_target

import slipstream
from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.decode import plan as plan_module
from slipstream.decode import suite
from slipstream.decode.drafters import HeadDrafter, NGramDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import answer_batch
from slipstream.decode.plan import Plan
from slipstream.decode.recorder import record
from slipstream.decode.replay import replay
from slipstream.decode.suite import evaluate
from slipstream.decode.tasks import read_tasks
from slipstream.decode.trace import Trace, join

if TYPE_CHECKING:
    from pathlib import Path

TALKS = [
    {"question_id": 1, "category": "math", "turns": ["Yo user"]},
    {"question_id": 2, "category": "writing", "turns": ["Hi Yo hello"]},
    {"question_id": 3, "category": "writing", "turns": ["Hi", "hello", "Yo"]},
    {"question_id": 4, "category": "writing", "turns": ["Hi Hi", "user"]},
]
RULES = ("exact", "mars:margin=3,regret=4")
TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """The report takes most of the time of a tiny run, and other tests read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "write_report", lambda path, results: None)
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("tasks"), *TALKS, name="talks")


@pytest.fixture(scope="module")
def decoders(tiny_target_folder) -> dict[str, Decoder]:
    """A head and look-ups in the text, over one target."""
    target = slipstream.load_target(str(tiny_target_folder), dtype=torch.float32)
    return {
        "heads/one": Decoder(target, HeadDrafter(tiny_head(target, 200), target)),
        "ngram": Decoder(target, NGramDrafter()),
    }


@pytest.fixture(scope="module")
def run(decoders, prompts, tmp_path_factory) -> Path:
    """Every rule, at two temperatures and batch sizes."""
    out = tmp_path_factory.mktemp("run")
    plan = Plan(RULES, temperatures=(0.0, 1.0), batch_sizes=(1, 2), max_new_tokens=TOKENS, trace=True)
    evaluate(decoders, read_tasks([prompts]), plan, out)
    return out


def answers(out: Path, model: str) -> list[dict[str, Any]]:
    """What `answers.jsonl` says of one contender, by prompt."""
    lines = [json.loads(line) for line in (out / "answers.jsonl").open()]
    return [line["choices"][0] for line in lines if line["model_id"] == model]


def accept_lengths(counts: list[tuple[int, int]], new_tokens: list[int]) -> list[list[int]]:
    """Tokens of each round of each request, from (request, tokens) in order of time; what is behind its end is cut."""
    out: list[list[int]] = [[] for _ in new_tokens]
    for request, count in counts:
        out[request].append(min(count, new_tokens[request] - sum(out[request])))
    return [lengths[1:] for lengths in out]  # the first is the prompt's own forward


def test_a_replay_gives_the_accepted_lengths_that_results_have(run, decoders):
    results = json.loads((run / "results.json").read_text())
    assert len(results["traces"]) == len(list((run / "traces").iterdir())) == 2 * 2 * 4
    pooled = {}
    for row in results["rows"]:
        if row["task"] == "all" and row["draft"]:
            name = f"{row['draft']} {row['rule']} T={row['temperature']:g} batch={row['batch_size']}"
            pooled[name] = row
    relaxed = 0
    for model, file in results["traces"].items():
        row, choices = pooled[model], answers(run, model)
        trace = Trace.open(run / file, decoders[row["draft"]])
        assert trace.header.temperature == row["temperature"]
        assert trace.header.verifier.to_dict() == row["verifier"]
        requests = [request for rounds in trace.rounds() for request in rounds.request.tolist()]
        if row["temperature"]:  # single draws, which do not replay
            counts = [count for rounds in trace.rounds() for count in rounds.counts.tolist()]
        else:
            counts = replay(trace, trace.header.verifier).decision.counts.tolist()
        turns = [n for choice in choices for n in choice["new_tokens"]]
        lengths = accept_lengths(list(zip(requests, counts, strict=True)), turns)
        assert [n for some in lengths for n in some] == [n for choice in choices for n in choice["accept_lengths"]]
        flat = [n for some in lengths for n in some]
        assert sum(flat) / len(flat) == pytest.approx(row["acceptance_length"], abs=5e-4)
        relaxed += round(row["relaxed_share"] * row["tokens"])
    assert relaxed > 0


class InterruptedRunError(Exception):
    pass


SMALL = Plan(RULES, batch_sizes=(2,), max_new_tokens=8, trace=True)


@pytest.fixture(scope="module")
def whole(decoders, prompts, tmp_path_factory) -> Path:
    """A run that was not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    evaluate({"heads/one": decoders["heads/one"]}, read_tasks([prompts]), SMALL, out)
    return out


@pytest.mark.parametrize("finished", [0, 3, 7])
def test_an_interrupted_run_leaves_the_traces_of_a_whole_one(decoders, prompts, whole, tmp_path, monkeypatch, finished):
    rows, decoder, left = read_tasks([prompts]), {"heads/one": decoders["heads/one"]}, finished

    def limited(*given: Any, **options: Any) -> Any:
        nonlocal left
        out = answer_batch(*given, **options)
        if "seed" in options:  # no warm-up
            left -= 1
            if left < 0:
                raise InterruptedRunError
        return out

    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "answer_batch", limited)
        with pytest.raises(InterruptedRunError):
            evaluate(decoder, rows, SMALL, tmp_path)
    drafted = [divmod(number, 4) for number in range(finished) if number % 4 > 1]  # two baselines, two rules
    assert {path.name for path in tmp_path.glob("progress.traces/*")} == {f"{n}-{who}.arrow" for n, who in drafted}
    if finished >= 4:  # a batch is kept
        with pytest.raises(SlipstreamError, match="was made with trace=True, not False"):
            evaluate(decoder, rows, replace(SMALL, trace=False), tmp_path)
    evaluate(decoder, rows, SMALL, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in whole.iterdir()}
    files = json.loads((tmp_path / "results.json").read_text())["traces"]
    assert list(files) == list(RULES)
    for file in files.values():
        pairs = zip(Trace.open(tmp_path / file).rounds(), Trace.open(whole / file).rounds(), strict=True)
        for mine, theirs in pairs:
            for name in ("request", "round", "path", "emitted", "tags"):
                assert getattr(mine, name).tolist() == getattr(theirs, name).tolist()
            assert mine.evidence.logits.tolist() == theirs.evidence.logits.tolist()


def test_a_lost_or_foreign_part_is_named(tmp_path):
    target = tiny_target()
    parts = []
    for seed in range(2):
        decoder = Decoder(target, HeadDrafter(tiny_head(target, seed=seed), target))
        parts.append((tmp_path / f"{seed}.arrow", [0]))
        with record(parts[-1][0], decoder) as recorder:
            decoder.generate(torch.arange(3, 9)[None], max_new_tokens=4, observer=recorder)
    with pytest.raises(SlipstreamError, match=r"1\.arrow was recorded with other settings than .*0\.arrow"):
        join(tmp_path / "all.arrow", parts)
    with pytest.raises(SlipstreamError, match=r"trace '.*2\.arrow' does not exist"):
        join(tmp_path / "all.arrow", [parts[0], (tmp_path / "2.arrow", [1])])
    assert not (tmp_path / "all.arrow").exists()


def test_the_command_records_and_a_run_without_it_has_no_traces(tiny_target_folder, prompts, tmp_path):
    command = ["evaluate", "--target", str(tiny_target_folder), "--draft", "ngram", "--prompts", str(prompts)]
    command += ["--rules", "exact", "--max_new_tokens", "4", "--dtype", "float32", "--limit", "1"]
    assert main([*command, "--trace", "--out", str(tmp_path / "with")]) == 0
    assert main([*command, "--out", str(tmp_path / "without")]) == 0
    results = json.loads((tmp_path / "with" / "results.json").read_text())
    assert results["traces"] == {"exact": "traces/exact.arrow"}
    assert len(Trace.open(tmp_path / "with" / "traces" / "exact.arrow")) > 0
    assert not (tmp_path / "without" / "traces").exists()
    assert "traces" not in json.loads((tmp_path / "without" / "results.json").read_text())


class Idler:
    """An observer that takes its time."""

    rounds = 0

    def begin(self, *given: Any) -> None:
        pass

    def round(self, *given: Any) -> None:
        time.sleep(0.05)
        self.rounds += 1


def test_the_time_of_an_observer_is_not_counted():
    target, idler = tiny_target(), Idler()
    decoder = Decoder(target, HeadDrafter(tiny_head(target), target))
    begun = time.perf_counter()
    out = decoder.generate(torch.arange(3, 9)[None], max_new_tokens=12, observer=idler)
    whole = time.perf_counter() - begun
    assert out.stats.seconds < whole - 0.05 * idler.rounds + 0.01
    assert out.stats.rest_seconds >= 0
