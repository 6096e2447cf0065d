"""The studies in benchmarks/, each by its command on a tiny target: what must hold whatever the figures are."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from importlib import import_module, util
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import save_llama
from datasets import Dataset
from jsonargparse import auto_parser
from test_tasks import write
from tiny import tiny_head

import slipstream
from slipstream.configs.errors import SlipstreamError
from slipstream.data import batches
from slipstream.decode import plan
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import Record
from slipstream.decode.policy import Policy
from slipstream.decode.speculation import SCHEDULES
from slipstream.decode.tasks import encode_first
from slipstream.decode.tree import TreeShape, make_tree
from slipstream.decode.verify import Token, Verifier

ROOT = Path(__file__).parent.parent
STUDIES = (
    "study",
    "answers",
    "decode",
    "defaults",
    "guards",
    "heads",
    "padding",
    "policies",
    "price",
    "recovery",
    "released",
    "signals",
)
TALKS = [
    {"question_id": 1, "category": "writing", "turns": ["Hi", "hello"], "reference": ["Yo", "Yo"]},
    {"question_id": 2, "category": "math", "turns": ["Yo user"], "reference": ["#### 2"]},
    {"question_id": 3, "category": "writing", "turns": ["Hi Yo hello"]},
]
NEUTRAL = Policy(tree=TreeShape(2, 2, 5), relaxed=Verifier("mars", "margin", 0.0))


@pytest.fixture(scope="module")
def studies():
    """The scripts by name; they import each other as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield {name: import_module(name) for name in STUDIES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer) -> dict[str, str]:
    """A target sure enough of its text, a neutral head, a model that thinks nearly as the target does, and prompts."""
    place = tmp_path_factory.mktemp("studies")
    save_llama(place / "target", tiny_tokenizer, initializer_range=0.3)
    target = slipstream.load_target(str(place / "target"), dtype=torch.float32)
    slipstream.save_head(tiny_head(target, target.vocab_size), place / "head", {})
    NEUTRAL.save(place / "head")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in target.model.parameters():
            noise = torch.randn(weights.shape, generator=generator)
            weights += 0.06 * noise * (weights.std() if weights.ndim > 1 else 0.0)
    target.model.save_pretrained(place / "model")
    tiny_tokenizer.save_pretrained(place / "model")
    prompts = str(write(place, *TALKS, name="talks"))
    return {
        "target": str(place / "target"),
        "head": str(place / "head"),
        "model": str(place / "model"),
        "prompts": prompts,
    }


@pytest.fixture
def command(studies, folders, tmp_path, monkeypatch, capsys):
    """Runs a study by its command line; its tables, each the lines by what they begin with."""

    def run(name, *options, draft="model", tokens=24):
        shared = [
            "--draft",
            folders[draft],
            "--target",
            folders["target"],
            "--dtype",
            "float32",
            "--out",
            str(tmp_path),
        ]
        shared += ["--prompts", f"[{folders['prompts']}]", "--tokens", str(tokens)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *shared, *options])
        studies["study"].run(studies[name].main)
        printed = capsys.readouterr().out
        assert (tmp_path / "table.md").read_text() == printed
        assert ElementTree.parse(tmp_path / "figure.svg").getroot().attrib["role"] == "img"
        return [_parsed(text) for text in printed.split("\n\n") if text.startswith("|")]

    return run


def _parsed(text: str) -> list[dict[str, str]]:
    names, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines())
    return [dict(zip(names, line, strict=True)) for line in lines]


def _number(cell: str) -> float:
    return float(re.split(r"[ %]", cell)[0])


def test_neutral_settings_cost_nothing_and_answers_are_kept(command, studies, monkeypatch):
    (lines,) = command("defaults", draft="head", tokens=12)
    by_name = {line[""]: line for line in lines}
    assert _number(by_name["tuned, mars"]["regret (nats/token)"]) == 0
    assert by_name["tuned, mars"]["tau"] == by_name["tuned, exact"]["tau"]
    assert lines[0]["over paper's tree, mars ratio 0.9 (95 %)"] == "1.00 [1.00, 1.00]"
    with monkeypatch.context() as patch:
        patch.setattr(plan, "answer_batch", None)  # nothing is answered again
        assert command("defaults", draft="head", tokens=12) == [lines]
    with pytest.raises(SystemExit, match=r"defaults\.py: .*made with tokens=12, not 13"):
        command("defaults", draft="head", tokens=13)


def test_all_decoders_answer_the_same_prompts(studies, folders, tmp_path, capsys):
    out = tmp_path / "table.md"
    prompts, settings = [Path(folders["prompts"])], {"device": "cpu", "dtype": "float32", "compiled": False}
    studies["decode"].main(folders["head"], folders["target"], prompts, limit=2, max_new_tokens=12, out=out, **settings)
    assert capsys.readouterr().out == out.read_text()
    lines = {line[""]: line for line in _parsed(out.read_text())}
    assert list(lines)[:3] == ["transformers generate", "transformers, prompt look-up", "ours, no draft"]
    assert lines["transformers generate"]["over generate (95 %)"].startswith("1.00 ")
    assert lines["ours, no draft"]["over no draft, same mode"] == "1.00"
    assert lines["ours, no draft"]["tau"] == "1.00"
    assert lines["ours, head, exact"]["tau"] == lines["ours, head, mars margin 0"]["tau"]
    assert {line["regret"] for line in lines.values()} == {"0.0000"}


@pytest.mark.parametrize("late", [False, True], ids=["no compiler", "compiling fails"])
def test_what_cannot_be_compiled_costs_no_other_measurement(studies, folders, tmp_path, monkeypatch, late):
    def broken(*given):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda function, **given: broken if late else broken())
    if late:
        monkeypatch.setattr(studies["decode"], "require_compiler", lambda device: None)
    out, prompts = tmp_path / "table.md", [Path(folders["prompts"])]
    with pytest.raises(SlipstreamError, match=r"failed were compiled.*no compiler here"):
        studies["decode"].main(
            folders["head"], folders["target"], prompts, limit=1, max_new_tokens=6, dtype="float32", out=out
        )
    names = [line[""] for line in _parsed(out.read_text())]
    assert names[0] == "transformers generate"
    assert len(names) == 8
    assert not any(name.startswith("compiled") for name in names)


def test_relaxed_tokens_and_regret_grow_with_what_guards_allow(command):
    guards = ["per_request=0", "per_request=1", "per_request=2", "regret=0.3"]
    costs, texts = command("guards", "--guards", str(guards).replace("'", ""))
    assert [line["mars:margin=1 with"] for line in costs] == ["exact", "no guard", *guards]
    costs, texts = ({line["mars:margin=1 with"]: line for line in lines} for lines in (costs, texts))
    assert costs["per_request=0"]["tau"] == costs["exact"]["tau"]
    for lines in (costs, texts):  # but for what the clock says
        strict, closed = (list(lines[name].values()) for name in ("exact", "per_request=0"))
        assert strict[-5:] == closed[-5:]
    shares = [
        _number(costs[name]["relaxed"]) for name in ("per_request=0", "per_request=1", "per_request=2", "no guard")
    ]
    assert shares == sorted(shares)
    assert shares[0] < shares[1] < shares[2]
    assert _number(costs["regret=0.3"]["largest"]) <= 0.3 < _number(costs["no guard"]["largest"])
    assert texts["exact"]["agreement with exact"].startswith("1.000")
    assert _number(texts["no guard"]["agreement with exact"]) < 1


@pytest.mark.parametrize("batch", ["1", "2"])
def test_what_relaxing_keeps_of_the_score(command, folders, tmp_path, batch):
    target = slipstream.load_target(folders["target"], dtype=torch.float32)
    rows = []
    for row in TALKS[:2]:  # the target's own answers are the references
        said = slipstream.load(target).generate(torch.tensor([encode_first(target, row)]), max_new_tokens=24)
        text = target.chat_tokenizer.decode([token.id for token in said.tokens], skip_special_tokens=True)
        rows.append({**row, "turns": row["turns"][:1], "reference": [text]})
    prompts = write(tmp_path, *rows, name="scored")
    given = ("--prompts", f"[{prompts}]", "--batch_size", batch, "--rules", "[mars:margin=0, mars:margin=50]")
    (lines,) = command("recovery", *given)
    exact, neutral, loose = lines
    assert exact["score"] == "1.000 [1.000, 1.000]"
    assert exact["of exact's (95 %)"] == neutral["of exact's (95 %)"] == "1.000 [1.000, 1.000]"
    assert neutral["tau"] == exact["tau"]
    assert neutral["same answers"] == "2 of 2"
    assert loose["same answers"] != "2 of 2"
    assert _number(loose["of exact's (95 %)"]) < 1 < _number(exact["tau"]) < _number(loose["tau"])


def test_recovery_needs_prompts_that_can_be_scored(command, tmp_path):
    with pytest.raises(SystemExit, match=r"recovery\.py: .*talks.jsonl:\d: no reference; this study needs"):
        command("recovery")
    hopeless = write(tmp_path, {**TALKS[1], "reference": "none of this"}, name="hopeless")
    with pytest.raises(SystemExit, match=r"recovery\.py: exact decoding scores 0 on these prompts"):
        command("recovery", "--prompts", f"[{hopeless}]")


def test_a_guard_that_is_none_ends_the_command_with_one_line(command):
    with pytest.raises(SystemExit, match=r"guards\.py: unknown setting 'regrett' .*did you mean 'regret'"):
        command("guards", "--guards", "[regrett=2]")


def test_repetition_and_the_regret_of_halves_are_counted(studies):
    distinct, halves = studies["guards"].distinct, studies["guards"].halves
    assert distinct([1, 2, 1, 2, 1], 2) == 0.5  # 12 21 12 21
    assert distinct([1, 2, 3], 4) == 1
    tagged = [Token(1, "relaxed", 0.5, 0.4), Token(2, "exact"), Token(3, "bonus"), Token(4, "relaxed", 0.5, 0.2)]
    record = Record("all", tokens=4, tagged=tagged)
    assert halves([record], 4) == pytest.approx((0.2, 0.1))
    assert halves([record], 100) == pytest.approx((0.15, 0.0))


def test_every_schedule_is_compared_with_the_fixed_tree(command, studies):
    over_all, by_task = command("policies", "--tree.nodes", "10", tokens=12)
    assert [line["exact"] for line in over_all] == [
        f"{tree}, {schedule}" for tree in ("tuned tree", "10 nodes") for schedule in SCHEDULES
    ]
    first = by_task[0]
    assert list(first) == ["exact, over tuned tree, fixed", "all (3)", "writing (2)", "math (1)"]
    assert {cell.split()[0] for cell in list(first.values())[1:]} == {"1.00"}
    assert all(_number(line["tau"]) >= 1 for line in over_all)


def test_signals_at_equal_regret(command, tmp_path):
    margins = [0.0, 0.5, 1.0]
    swept = {"ratio": [1.0, 0.9], "margin": margins, "odds": [math.exp(-m) for m in margins]}
    sampled = {"ratio": [1.0], "margin": [0.0, 2.0]}
    options = ["--swept", str(swept), "--sampled", str(sampled), "--levels", "[0.01, 9]"]
    lines, equal = command("signals", *options)
    (trace,) = tmp_path.glob("*.arrow")
    greedy = {name: [x for x in lines if x["T"] == "0" and x["signal"] == name] for name in ("exact", *swept)}
    sampled_lines = [line for line in lines if line["T"] == "1"]
    for neutral in (greedy["ratio"][0], greedy["margin"][0], greedy["odds"][0]):
        assert (neutral["fires at"], neutral["tau"]) == ("0%", greedy["exact"][0]["tau"])
    closed, also_closed = (list(line.values())[3:] for line in sampled_lines[1:3])  # neutral rules draw the same
    assert closed == also_closed
    assert _number(sampled_lines[1]["relaxed"]) == 0 < _number(sampled_lines[3]["relaxed"])
    for line, other in zip(greedy["margin"], greedy["odds"], strict=True):  # greedily the same rule
        assert list(line.values())[3:] == list(other.values())[3:]
    fires, taus, regrets = (
        [_number(line[name]) for line in greedy["margin"]] for name in ("fires at", "tau", "regret (nats/token)")
    )
    assert fires == sorted(set(fires))
    assert taus == sorted(set(taus))
    assert regrets == sorted(set(regrets))
    at = {(line["T"], line["regret (nats/token)"], line["signal"]): line for line in equal}
    assert at["0", "0.01", "margin"]["tau"] == at["0", "0.01", "odds"]["tau"]
    assert at["0", "0.01", "ratio"]["above the first"] == "0.000 [0.000, 0.000]"
    assert at["0", "9", "margin"]["tau"] == "–"  # so much regret was never reached
    before = trace.read_bytes()
    assert command("signals", *options) == [lines, equal]
    assert trace.read_bytes() == before


def test_what_a_price_buys(command):
    options = ["--margins", "[0.0, 1.0]", "--prices", "[1e6, 0.5]", "--rank", "3", "--levels", "[0.01]"]
    costs, texts, equal = command("price", *options)
    exact, closed, loose, also_closed, looser, dear, cheap = costs
    for line in (closed, also_closed, dear):  # no margin, or none that is worth its price
        assert (line["tau"], _number(line["regret (nats/token)"])) == (exact["tau"], 0)
    assert 0 < _number(loose["regret (nats/token)"]) <= _number(looser["regret (nats/token)"])
    assert _number(cheap["tau"]) > _number(exact["tau"])
    same = {line["rule"]: line["same answers"] for line in texts}
    assert same["exact"] == same["mars:margin=2,rank=3,price=1e+06"] == "100%"
    assert [line["rule"] for line in equal] == ["margin", "margin, rank 3", "price, rank 3"]
    assert equal[0]["above the first"].startswith("0.000")


def test_a_level_of_regret_lies_between_two_thresholds(studies):
    prompt = np.array([[10.0, 10, 0, 10, 0], [14, 10, 0.2, 10, 1], [12, 10, 0.1, 10, 1]])  # tau 1, 1.4, 1.2
    curve = np.repeat(prompt[:, None], 3, axis=1)
    assert studies["signals"].at_levels(prompt, (0.005, 0.015)) == pytest.approx([1.1, 1.3])
    (tau, above), beyond = studies["signals"].equal_regret({"a": curve, "b": curve}, (0.015, 0.05))["b"]
    assert (tau[0], tau[1], above[0]) == (pytest.approx(1.3), pytest.approx([1.3, 1.3]), 0)
    assert math.isnan(beyond[0][0])
    assert beyond[0][1] is None


CHILD = torch.tensor([[0, 2]])


def _law(studies, rule, *, draft, draws=4000):
    """The law at a root whose only draft is token 2, of probability `draft`; and p."""
    tree = make_tree(CHILD, torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0.0, math.log(draft)]]), 1)
    z = torch.tensor([[[3.0, 2.2, 2.0, 1.0, -9.0], [0.0] * 5]])
    generator = torch.Generator().manual_seed(0)
    return studies["released"].law(Verifier.of(rule), tree, z, 4, draws, generator)


@pytest.mark.parametrize(("draft", "lossless"), [(1.0, True), (0.4, False)])
def test_the_released_rule_is_lossless_only_with_q_of_one(studies, draft, lossless):
    found, p, passed = _law(studies, "released:lam=0", draft=draft)
    assert p[4] == 0  # beyond the 4 likeliest
    accepted = min(1.0, float(p[2]) / draft)
    wanted = p * (1 - accepted) / (1 - p[2])
    wanted[2] = accepted
    assert found.numpy() == pytest.approx(wanted.numpy(), abs=0.03)
    assert passed == pytest.approx(accepted, abs=0.03)
    measured = studies["released"].distances(found, p, 4000)
    assert measured["degrees"] == 3
    assert measured["tv"] == pytest.approx(float((wanted - p).abs().sum() / 2), abs=0.03)
    assert (measured["chi"] / measured["degrees"] < 4) is lossless


def test_a_relaxation_of_the_released_code_skips_the_draw(studies):
    found, _, passed = _law(studies, "released:ratio=0.6", draft=0.4)  # 2.2 / 3 fires; token 2 is third
    assert passed == 0
    assert found[2] > 0
    found, _, passed = _law(studies, "released:ratio=0.9", draft=0.1)  # does not fire: p/q > 1
    assert passed == 1
    assert found[2] == 1


def test_the_two_by_two(command, tmp_path):
    laws, answers = command("released", "--draws", "200", "--count", "1", tokens=16)
    assert [line["rule"] for line in laws] == [line["rule"] for line in answers]
    by_name = {line["rule"]: {name: _number(cell) for name, cell in line.items() if name != "rule"} for line in laws}
    lossless = [by_name[name] for name in ("exact", "q := 1, off")]
    lossy = [values for values in by_name.values() if values not in lossless]
    assert len(lossy) == 4
    assert max(x["TV to p"] for x in lossless) < min(x["TV to p"] for x in lossy)
    assert max(x["chi-square / degrees"] for x in lossless) < 2 < min(x["chi-square / degrees"] for x in lossy)
    assert min(x["entropy (nats)"] for x in lossless) > max(x["entropy (nats)"] for x in lossy)
    texts = {line["rule"]: line for line in answers}
    assert {"rouge_l", "final_number"} < set(texts["exact"])  # of the prompts that have references
    assert _number(texts["exact"]["relaxed"]) == _number(texts["released q, off"]["relaxed"]) == 0
    assert _number(texts["released q, on"]["relaxed"]) > 0
    assert _number(texts["released q, off"]["tau"]) > _number(texts["exact"]["tau"])
    assert len((tmp_path / "laws.jsonl").read_text().splitlines()) == len(TALKS)


def test_padding_is_a_share_of_what_is_computed(studies, monkeypatch):
    monkeypatch.setattr(batches, "POOL", batches.POOL)
    rows = [{"input_ids": [0] * n, "mask": [1] * n} for n in (1, 3) * 4]
    tokens = Dataset.from_list(rows).with_format("numpy")
    assert studies["padding"].padding(tokens, 6, 4) == 0  # rows of 1 together, rows of 3 in pairs
    alone, sorted_together = (studies["padding"].padding(tokens, 6, pool) for pool in (1, 2))
    assert 0 < sorted_together < alone < 1 / 3 + 1e-9  # a row of 3 beside one of 1


def test_acceptance_of_heads_is_that_of_exact_decoding(studies, folders, capsys):
    heads = studies["heads"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "TREES", {"wide": TreeShape(2, 2, 5), "chain": TreeShape.chain(2)})
        asked = {"limit": 3, "tokens": 12, "batch_size": 2, "dtype": "float32", "prompts": [Path(folders["prompts"])]}
        heads.main([folders["head"]] * 2, folders["target"], **asked)
    first, second = _parsed(capsys.readouterr().out)
    assert first == second
    loaded = slipstream.load(folders["target"], folders["head"], dtype=torch.float32)
    decoder = Decoder(loaded.target, loaded.drafter, Policy(tree=TreeShape.chain(2)))
    lengths: list[int] = []
    for row in heads.first_turns(asked["prompts"], 3):
        ids = torch.tensor([encode_first(decoder.target, row)])
        lengths += decoder.generate(ids, max_new_tokens=12).stats.accept_lengths
    assert _number(first["chain"]) == pytest.approx(sum(lengths) / len(lengths), abs=0.006)
    assert 1 <= _number(first["wide"]) <= 3


def _script(name):
    """A script that needs none of the others, under a name that is no package's."""
    spec = util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_are_those_of_generate(studies, folders, capsys):
    target = slipstream.load_target(folders["target"], dtype=torch.float32)
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    given, answers = (target, prompts, 12, 0.0), studies["answers"]
    assert answers.ours(*given) == answers.theirs(*given)
    answers.main(folders["target"], batch=4, groups=2, max_new_tokens=3, dtype="float32")
    assert re.search(r"ours \d+ tokens/s: [\d.]+x \(batches [\d.]+ to [\d.]+\)", capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_a_training_step_is_measured(monkeypatch, capsys, kind):
    train = _script("train")
    tiny = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 512}
    monkeypatch.setitem(train.SHAPES, "wide", {**tiny, "num_hidden_layers": 4, "num_key_value_heads": 2})
    train.main(kind=kind, case="wide", length=40, rounds=2)
    measured = json.loads(capsys.readouterr().out)
    assert measured["tokens_per_second"] > 0
    assert measured["peak_mb"] >= 0


def test_training_steps_take_turns_and_their_ratios_are_told_with_their_spread(monkeypatch, capsys):
    train, speeds = _script("train"), iter([100, 200, 50, 200, 100, 220])

    def run(command, **_):
        given = auto_parser(train.main, as_positional=False).parse_args(command[2:])
        assert (given.case, given.length, given.steps, given.rounds) == ("wide", 64, 5, 2)
        found = {"tokens_per_second": next(speeds), "peak_mb": {"plain": 90, "ours": 30}[given.kind]}
        return SimpleNamespace(stdout=f"a warning\n{json.dumps(found)}\n")

    monkeypatch.setattr(train.subprocess, "run", run)
    train.main(lengths=[], random_length=64, steps=5, rounds=2, repeats=3)
    *_, line = capsys.readouterr().out.strip().splitlines()
    assert line == "| wide | 64 | 100 | 200 | 2.20 (2.00–4.00) | 90 | 30 | 0.33 |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_measurements_for_a_card_say_that_there_is_none():
    with pytest.raises(SystemExit, match=r"gpu\.py needs a CUDA device"):
        _script("gpu").main("head")
    with pytest.raises(SystemExit, match=r"train\.py --device cuda needs a CUDA device"):
        _script("train").main(device="cuda")


def test_what_fails_on_a_card_is_told_behind_all_the_others(monkeypatch):
    gpu, ran = _script("gpu"), []

    def run(command, *, env):
        ran.append((Path(command[1]).name, env["TORCH_CUDNN_SDPA_DEPRIORITIZED"], env["PATH"]))
        return SimpleNamespace(returncode=int(ran[-1][0] == "batch.py"))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    with pytest.raises(SystemExit, match=r"failed: batch\.py .*--batch 4; batch\.py .*--batch 10$"):
        gpu.main("head")
    assert ran == [(name, "1", os.environ["PATH"]) for name in ("decode.py", "batch.py", "batch.py", "train.py")]


def test_batches_are_measured_behind_a_pass_that_is_not(studies, folders, monkeypatch, capsys):
    batch, passes = _script("batch"), []
    real = batch._pairs
    monkeypatch.setattr(batch, "_pairs", lambda *given: passes.append(real(*given)) or passes[-1])
    monkeypatch.setattr(batch, "read_prompts", lambda limit: TALKS[:limit])
    batch.main(folders["head"], folders["target"], batch=2, prompts=3, max_new_tokens=4, dtype="float32")
    assert [group.shape for group in passes] == [(1, 2, 2)] * 2
    printed = capsys.readouterr().out
    speeds = passes[1][0, :, 0] / passes[1][0, :, 1]
    assert f"one by one {speeds[0]:.1f} tokens/s, batch of 2 {speeds[1]:.1f} tokens/s" in printed
    assert printed.count("greedy verification, 64 nodes") == 2


def test_what_is_run_on_a_card_knows_its_options(studies):
    commands = _script("gpu").commands("head", "target", compiled=True, limit=3)
    assert [script for script, *_ in commands] == ["decode.py", "batch.py", "batch.py", "train.py"]
    for script, *options in commands:  # `studies` lets decode.py find study.py
        given = auto_parser(_script(Path(script).stem).main, as_positional=False).parse_args(options)
        assert given.device == "cuda"
