"""The whole way of the data on the real embedded target, small."""

import json
import subprocess
import sys

import pytest
import torch

import slipstream
from slipstream.cli import main
from slipstream.data.template import encode_prompt
from slipstream.distill.gguf import EMBEDDED

ROW_KEYS = {
    "task", "rule", "temperature", "lossless", "prompts", "tokens", "tokens_per_second", "speedup", "speedup_ci95",
    "speedup_engine", "acceptance_length", "acceptance_by_position", "relaxed_share", "mean_regret_nats",
    "mean_output_tokens", "identical_to_target",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of `slipstream quickstart`, killed in the middle of training and given again."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "slipstream.cli", "quickstart", "--out", str(out), "--minutes", "0.5"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        first.wait(timeout=30)
    except subprocess.TimeoutExpired:
        first.kill()
    subprocess.run(command, check=True, timeout=500)
    return out


def test_results_have_the_schema_and_exact_decoding_gives_the_targets_tokens(run):
    results = json.loads((run / "results.json").read_text())
    assert {"target", "draft", "device", "dtype", "versions", "seed", "rows"} <= set(results)
    pooled = [row for row in results["rows"] if row["task"] == "all"]
    assert [row["rule"] for row in pooled] == ["autoregressive", "engine", "exact", "mars"]
    assert all(set(row) >= ROW_KEYS for row in results["rows"])
    assert pooled[2]["identical_to_target"] is True
    assert pooled[2]["lossless"]
    assert not pooled[3]["lossless"]
    training = results["training"]
    simulated, measured = training["simulated_acceptance_length"], training["measured_chain_acceptance_length"]
    assert simulated == pytest.approx(measured, rel=0.05)


def test_the_head_loads_in_a_fresh_process_and_gives_the_same_tokens(run):
    code = (
        "import slipstream, torch, sys, json; d = slipstream.load(sys.argv[1], sys.argv[2], dtype='float32');"
        "print(json.dumps(d.generate(torch.tensor([json.loads(sys.argv[3])]), max_new_tokens=24).sequences.tolist()))"
    )
    decoder = slipstream.load(EMBEDDED, run / "draft", dtype="float32")
    prompt = encode_prompt(decoder.target.chat_tokenizer, [{"role": "user", "content": "What is a comet?"}])
    command = [sys.executable, "-c", code, EMBEDDED, str(run / "draft"), json.dumps(prompt)]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True)
    here = decoder.generate(torch.tensor([prompt]), max_new_tokens=24)
    truth = decoder.target.model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert json.loads(fresh.stdout.splitlines()[-1]) == here.sequences.tolist() == truth.tolist()


def test_a_finished_run_says_so_and_changes_nothing(run, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert main(["quickstart", "--out", str(run), "--minutes", "0.5"]) == 0
    assert "finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_evaluate_writes_answers_in_spec_bench_form(run, tmp_path):
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text(json.dumps({"question_id": 7, "category": "x", "turns": ["Name a fruit.", "And another."]}))
    arguments = ["--draft", str(run / "draft"), "--prompts", str(prompts), "--max_new_tokens", "12"]
    assert main(["evaluate", *arguments, "--dtype", "float32", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows[2]["rule"] == "exact"
    assert rows[2]["identical_to_target"] is True
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["model_id"] for line in lines] == ["autoregressive", "engine", "exact", "mars"]
    assert lines[2]["choices"][0]["turns"] == lines[0]["choices"][0]["turns"]
    assert all(len(line["choices"][0]["turns"]) == 2 for line in lines)
