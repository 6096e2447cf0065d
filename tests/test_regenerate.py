"""Answers by the target, in this process and behind a server: every turn, no answer twice, the same rows after a kill."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import save_llama
from test_data import THINKING, assistant, user, with_template
from tiny import tiny_target
from transformers import LlamaForCausalLM

from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.data import server as data_server
from slipstream.data.regenerate import regenerate
from slipstream.data.server import regenerate as regenerate_by_server
from slipstream.data.template import encode_prompt
from slipstream.decode.sampling import sample
from slipstream.distill.target import load_target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

PROMPTS = [
    {"question_id": f"q-{i}", "category": "chat", "turns": [f"Hi {i}", "Yo hello", "Hi"][: 1 + i % 3]} for i in range(7)
]

DRAWN: dict[str, Any] = {"temperatures": [0.0, 0.7], "max_new_tokens": 9, "seed": 1}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The journal's rows in the order of their units, without the journal's own column."""
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return [{k: v for k, v in row.items() if k != "unit"} for row in sorted(rows, key=lambda row: row["unit"])]


# --- in this process ---


@pytest.fixture(scope="module")
def loaded(tiny_target_folder):
    return load_target(str(tiny_target_folder), dtype=torch.float32)


def answered(
    loaded,
    out: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    prompts: list[dict[str, Any]] = PROMPTS,
    **options: Any,
) -> list[dict[str, Any]]:
    settings = {"stop_ids": loaded.stop_ids(), "temperatures": [0.0], "max_new_tokens": 6, "seed": 1, "batch_size": 3}
    regenerate(
        loaded.name,
        partial(sample, loaded),
        tokenizer or loaded.chat_tokenizer,
        prompts,
        out=out,
        **{**settings, **options},
    )
    return rows_of(out)


def alone(
    loaded, tokenizer: PreTrainedTokenizerFast, prompt: dict[str, Any], new: int, stops: list[int], **options: Any
) -> dict[str, Any]:
    """One conversation by transformers' `generate`, turn after turn."""
    messages: list[dict[str, str]] = []
    tokens, finished = 0, True
    for turn in prompt["turns"]:
        if not finished:
            break
        messages.append(user(turn))
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **options
        )["input_ids"]
        out = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=stops
        )
        new_ids = out[0, ids.shape[1] :].tolist()
        finished = new_ids[-1] in stops
        tokens += len(new_ids)
        messages.append(assistant(tokenizer.decode(new_ids[:-1] if finished else new_ids)))
    return {"messages": messages, "finished": finished, "tokens": tokens}


@pytest.mark.parametrize("think", [None, True, False])
def test_every_turn_is_answered_as_the_target_alone_would_until_one_is_cut_short(
    tmp_path, loaded, tiny_tokenizer, think
):
    tokenizer = with_template(tiny_tokenizer, THINKING)
    stops = list(range(5, len(tokenizer), 9))  # some answers end, some do not
    options = {} if think is None else {"enable_thinking": think}
    rows = answered(loaded, tmp_path / "talks.jsonl", tokenizer, think=think, stop_ids=stops)
    wanted = {prompt["question_id"]: alone(loaded, tokenizer, prompt, 6, stops, **options) for prompt in PROMPTS}
    assert {row["id"] for row in rows} == set(wanted)
    for row in rows:
        assert {key: row[key] for key in ("messages", "finished", "tokens")} == wanted[row["id"]]
        assert row["think"] is think
    assert {len(row["messages"]) for row in rows} == {2, 4, 6}


def test_a_conversation_ends_with_an_answer_that_was_cut_short(tmp_path, loaded):
    rows = answered(loaded, tmp_path / "talks.jsonl", stop_ids=[-1], max_new_tokens=2)
    assert [(len(row["messages"]), row["finished"], row["tokens"]) for row in rows] == [(2, False, 2)] * len(PROMPTS)


def test_other_thinking_is_another_run_and_needs_a_template_that_knows_of_it(tmp_path, loaded, tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, THINKING)
    answered(loaded, tmp_path / "talks.jsonl", tokenizer, think=True, max_new_tokens=1)
    with pytest.raises(SlipstreamError, match="was made with think=True, not False"):
        answered(loaded, tmp_path / "talks.jsonl", tokenizer, think=False, max_new_tokens=1)
    with pytest.raises(SlipstreamError, match="no option enable_thinking"):
        answered(loaded, tmp_path / "others.jsonl", think=True)


def test_a_killed_run_loses_at_most_the_batch_in_hand_and_ends_with_the_same_rows(tmp_path, tiny_target_folder):
    prompts, out, whole = (tmp_path / name for name in ("prompts.jsonl", "talks.jsonl", "whole.jsonl"))
    rows = [{**PROMPTS[i % 7], "question_id": f"q-{i}"} for i in range(28)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["regenerate", "--target", str(tiny_target_folder), "--prompts", str(prompts), "--batch_size", "4"]
    command += ["--temperatures", "0.0", "0.7", "--max_new_tokens", "24"]
    child = subprocess.Popen([sys.executable, "-m", "slipstream.cli", *command, "--out", str(out)])
    while not out.exists() or out.stat().st_size < 3000:
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = [line for line in out.read_bytes().split(b"\n")[:-1] if line]
    assert 4 <= len(kept) < 28
    assert main([*command, "--out", str(out)]) == 0
    assert main([*command, "--out", str(whole)]) == 0
    written = len(kept) // 4 * 4  # a batch is written at once: at most its last is torn
    assert out.read_bytes().split(b"\n")[:written] == kept[:written]
    assert rows_of(out) == rows_of(whole)
    assert len(rows_of(whole)) == 28


def begun_before_digests(out: Path) -> None:
    """A journal whose settings are those of the version that only counted its prompts."""
    beside = out.with_name(out.name + ".settings.json")
    settings = json.loads(beside.read_text())
    assert settings.pop("prompts_digest")
    beside.write_text(json.dumps(settings))


def test_other_prompts_of_the_same_number_are_another_run(tmp_path, loaded):
    out, others = tmp_path / "talks.jsonl", [{**prompt, "turns": ["hello"]} for prompt in PROMPTS]
    rows = answered(loaded, out)
    with pytest.raises(SlipstreamError, match=f"{out} was made with prompts_digest="):
        answered(loaded, out, prompts=others)
    begun_before_digests(out)
    with pytest.raises(SlipstreamError, match=f"{out} was made with prompts=7, not 6"):
        answered(loaded, out, prompts=others[:6])
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:3]))  # one batch
    assert answered(loaded, out) == rows
    with pytest.raises(SlipstreamError, match=f"{out} was made with prompts_digest="):
        answered(loaded, out, prompts=others)


def test_prompts_that_leave_no_room_for_an_answer_are_left_out_and_named(tmp_path, loaded, capsys):
    long = {"question_id": "long", "category": "chat", "turns": ["hello " * 40]}
    rows = answered(loaded, tmp_path / "talks.jsonl", prompts=[PROMPTS[0], long, PROMPTS[3]], context=50)
    assert [row["id"] for row in rows] == ["q-0", "q-3"]
    said = capsys.readouterr().err
    assert "1 of 3 prompts leave no room for 6 tokens (--max_new_tokens) in the context of" in said
    assert "and are left out, the first: prompt long, " in said
    with pytest.raises(SlipstreamError, match=r"no prompt leaves room for 99 tokens .* in the context of .*, 50; the"):
        answered(loaded, tmp_path / "others.jsonl", max_new_tokens=99, context=50)
    assert not (tmp_path / "others.jsonl").exists()


def test_a_conversation_ends_before_a_turn_that_leaves_no_room_for_its_answer(tmp_path, loaded):
    stops = list(range(len(loaded.chat_tokenizer)))  # every answer is one token
    prompt = {"question_id": 1, "category": "chat", "turns": ["Hi", "hello " * 40, "Yo"]}
    short, whole = (
        answered(loaded, tmp_path / f"{context}.jsonl", prompts=[prompt], stop_ids=stops, context=context)
        for context in (60, 256)
    )
    assert [row["messages"] for row in short] == [whole[0]["messages"][:2]]
    assert (short[0]["finished"], short[0]["tokens"]) == (True, 1)
    assert len(whole[0]["messages"]) == 6


def test_every_answer_fits_the_context_of_a_target_with_learned_positions(tmp_path, tiny_tokenizer):
    target = tiny_target("gpt2", vocab_size=len(tiny_tokenizer), max_position_embeddings=32)
    prompts = [{**PROMPTS[0], "question_id": i, "turns": ["Hi" + " hello" * i]} for i in range(30)]
    settings = {"stop_ids": [-1], "temperatures": [0.0], "max_new_tokens": 9, "seed": 1, "context": target.context}
    regenerate("gpt2", partial(sample, target), tiny_tokenizer, prompts, out=tmp_path / "talks.jsonl", **settings)
    rows = rows_of(tmp_path / "talks.jsonl")
    lengths = [len(encode_prompt(tiny_tokenizer, row["messages"][:1])) for row in rows]
    assert max(lengths) + 9 == 32
    assert {row["tokens"] for row in rows} == {9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens must be at least 1, not 0"),
        ({"temperatures": []}, "--temperatures must be numbers from 0 on, at least one"),
        ({"temperatures": [0.7, -1.0]}, "--temperatures must be numbers from 0 on"),
        ({"temperatures": [float("nan")]}, "--temperatures must be numbers from 0 on"),
    ],
)
def test_settings_that_draw_nothing_are_refused_before_anything_is_written(tmp_path, loaded, options, message):
    with pytest.raises(SlipstreamError, match=message):
        answered(loaded, tmp_path / "talks.jsonl", **options)
    if "batch_size" not in options:
        with pytest.raises(SlipstreamError, match=message):
            regenerate_by_server(
                "http://nowhere/v1", "tiny", PROMPTS, out=tmp_path / "talks.jsonl", **{**DRAWN, **options}
            )
    assert list(tmp_path.iterdir()) == []


# --- behind a server ---


class Stub(ThreadingHTTPServer):
    """Answers with the number of messages and the last question; `fail` may spoil a request by its body and number."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.now = self.most = 0
        self.fail: Callable[[dict[str, Any], int], int] = lambda body, number: 200
        self.seconds = 0.0
        self.finish = "stop"

    def message(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The reply to these messages."""
        return assistant(f"{len(messages)}: {messages[-1]['content']}")


class Handler(BaseHTTPRequestHandler):
    """One request to a `Stub`."""

    server: Stub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        stub = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.asked.append(body)
            number = len(stub.asked)
            stub.now += 1
            stub.most = max(stub.most, stub.now)
        time.sleep(stub.seconds)
        status = stub.fail(body, number)
        with stub.lock:
            stub.now -= 1
        if status == 0:  # hang up
            self.close_connection = True
            return
        reply: dict[str, Any] = {"error": {"message": "no way"}}
        if status == 200:
            choice = {"index": 0, "message": stub.message(body["messages"]), "finish_reason": stub.finish}
            usage = {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
            reply = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
                "usage": usage,
            }
        self.send(status, json.dumps(reply).encode(), "application/json")

    def send(self, status: int, content: bytes, kind: str) -> None:
        """Send a whole reply; who is refused may come again at once."""
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": len(content), "Retry-After-Ms": 1}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Tests are silent."""


@pytest.fixture
def stub():
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def served(stub: Stub, out: Path, prompts: list[dict[str, Any]] = PROMPTS, **options: Any) -> list[dict[str, Any]]:
    regenerate_by_server(stub.url, "tiny", prompts, out=out, **{**DRAWN, "parallel": 4, **options})
    return rows_of(out)


def expected(prompt: dict[str, Any], i: int) -> dict[str, Any]:
    """The row of prompt i."""
    turns = prompt["turns"]
    messages = [m for t, turn in enumerate(turns) for m in (user(turn), assistant(f"{2 * t + 1}: {turn}"))]
    fixed = {"category": prompt["category"], "think": None, "finished": True, "tokens": 5 * len(turns)}
    return {"id": prompt["question_id"], "messages": messages, "temperature": [0.0, 0.7][i % 2], **fixed}


EXPECTED = [expected(prompt, i) for i, prompt in enumerate(PROMPTS)]


def test_a_server_answers_every_turn_after_the_answers_before(tmp_path, stub):
    assert served(stub, tmp_path / "talks.jsonl") == EXPECTED
    assert len(stub.asked) == sum(len(prompt["turns"]) for prompt in PROMPTS)
    last = next(body for body in stub.asked if len(body["messages"]) == 5)
    (row,) = (row for row in EXPECTED if row["messages"][:5] == last["messages"])
    assert (last["model"], last["max_tokens"], last["temperature"]) == ("tiny", 9, row["temperature"])
    assert "chat_template_kwargs" not in last
    again = served(stub, tmp_path / "again.jsonl", parallel=1)
    assert again == EXPECTED
    seeds = sorted(body["seed"] for body in stub.asked)
    assert seeds[::2] == seeds[1::2]  # the same in both runs
    assert len(set(seeds)) == len(seeds) // 2


def test_as_many_conversations_as_asked_for_are_under_way_at_once(tmp_path, stub):
    together = threading.Barrier(8, timeout=60)
    stub.fail = lambda body, number: 200 if together.wait() >= 0 else 500
    rows = served(stub, tmp_path / "talks.jsonl", [{**PROMPTS[0], "question_id": i} for i in range(16)], parallel=8)
    assert len(rows) == 16
    assert stub.most == 8


@pytest.mark.parametrize("think", [True, False])
def test_thinking_is_asked_for_and_thoughts_are_kept(tmp_path, stub, think):
    stub.message = lambda messages: {**assistant("Yo"), "reasoning_content": "hm"}
    rows = served(stub, tmp_path / "talks.jsonl", PROMPTS[:2], think=think)
    assert all(body["chat_template_kwargs"] == {"enable_thinking": think} for body in stub.asked)
    assert rows[0]["messages"] == [user("Hi 0"), {**assistant("Yo"), "reasoning_content": "hm"}]
    assert {row["think"] for row in rows} == {think}


@pytest.mark.parametrize("key", ["", " \n"])
def test_an_empty_key_is_none(tmp_path, stub, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert served(stub, tmp_path / "talks.jsonl") == EXPECTED


def test_a_server_is_not_asked_other_prompts_into_the_same_file(tmp_path, stub):
    out, others = tmp_path / "talks.jsonl", [{**prompt, "turns": ["hello"]} for prompt in PROMPTS]
    served(stub, out)
    with pytest.raises(SlipstreamError, match=f"{out} was made with prompts_digest="):
        served(stub, out, others)
    begun_before_digests(out)
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:3]))
    assert served(stub, out) == EXPECTED


def test_nothing_is_asked_after_an_answer_that_was_cut_short(tmp_path, stub):
    stub.finish = "length"
    rows = served(stub, tmp_path / "talks.jsonl")
    assert [(len(row["messages"]), row["finished"]) for row in rows] == [(2, False)] * len(PROMPTS)


@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_what_a_server_fails_to_do_is_asked_again(tmp_path, stub, status):
    stub.fail = lambda body, number: 200 if number % 3 else status
    assert served(stub, tmp_path / "talks.jsonl", parallel=2 if status else 1) == EXPECTED


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "answers 401; set OPENAI_API_KEY to its key: .*no way"),
        (404, "answers 404; --server must end in /v1, and --target be the model's name there"),
        (400, "answers 400: .*no way"),
        (503, "answers 503: .*the same command goes on where it stopped"),
    ],
)
def test_a_server_that_keeps_failing_is_an_error_and_what_it_answered_stays(
    tmp_path, stub, monkeypatch, status, message
):
    monkeypatch.setattr(data_server, "_RETRIES", 1)
    stub.fail = lambda body, number: 200 if number <= 3 else status
    with pytest.raises(SlipstreamError, match=message) as caught:
        served(stub, tmp_path / "talks.jsonl", parallel=1)
    assert stub.url in str(caught.value)
    assert "\n" not in str(caught.value)
    kept = len(rows_of(tmp_path / "talks.jsonl"))
    assert kept
    stub.asked.clear()
    stub.fail = lambda body, number: 200
    assert served(stub, tmp_path / "talks.jsonl") == EXPECTED
    assert len({body["messages"][0]["content"] for body in stub.asked}) == len(PROMPTS) - kept


def test_a_few_prompts_may_be_refused_and_are_named(tmp_path, stub, capsys):
    prompts = [{**PROMPTS[0], "question_id": f"q-{i}", "turns": [f"Hi {i}"]} for i in range(40)]
    stub.fail = lambda body, number: 400 if body["messages"][0]["content"] in ("Hi 7", "Hi 8") else 200
    rows = served(stub, tmp_path / "talks.jsonl", prompts)
    assert {row["id"] for row in rows} == {prompt["question_id"] for prompt in prompts} - {"q-7", "q-8"}
    assert "2 of 40 prompts were refused by the server, the first: prompt q-" in capsys.readouterr().err


def test_a_server_that_is_not_there_or_speaks_otherwise_is_an_error_that_names_it(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(data_server, "_RETRIES", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    options = {"temperatures": [0.0], "max_new_tokens": 9, "seed": 1, "out": tmp_path / "talks.jsonl"}
    with pytest.raises(SlipstreamError, match=f"{url} cannot be reached: "):
        regenerate_by_server(url, "tiny", PROMPTS, **options)
    monkeypatch.setattr(Handler, "do_POST", lambda self: self.send(200, b"<html>Welcome</html>", "text/html"))
    with pytest.raises(SlipstreamError, match="gives no chat completion with its usage, but '<html>Welcome"):
        regenerate_by_server(stub.url, "tiny", PROMPTS, **options)
    with pytest.raises(SlipstreamError, match="--parallel must be at least 1, not 0"):
        regenerate_by_server(stub.url, "tiny", PROMPTS, parallel=0, **options)


def test_no_row_is_begun_once_enough_tokens_are_there(tmp_path, stub):
    rows = served(stub, tmp_path / "talks.jsonl", PROMPTS * 10, max_response_tokens=100, parallel=1)
    assert 100 <= sum(row["tokens"] for row in rows) < 115


def test_a_killed_run_loses_only_what_was_under_way_and_ends_with_the_same_rows(tmp_path, stub):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "talks.jsonl"
    rows = [{**PROMPTS[i % 7], "question_id": f"q-{i}"} for i in range(60)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = (
        "import sys; from pathlib import Path; from slipstream.commands.data import regenerate\n"
        "url, prompts, out = sys.argv[1:]\n"
        "regenerate(Path(prompts), Path(out), 'tiny', [0.0, 0.7], server=url, parallel=4)\n"
    )
    stub.seconds = 0.02
    with subprocess.Popen([sys.executable, "-c", code, stub.url, str(prompts), str(out)]) as process:
        while len(stub.asked) < 50:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = len(rows_of(out))
    assert 10 < kept < 60
    stub.asked.clear()
    again = ["regenerate", "--server", stub.url, "--target", "tiny", "--temperatures", "0.0", "0.7", "--parallel", "8"]
    assert main([*again, "--prompts", str(prompts), "--out", str(out)]) == 0
    assert rows_of(out) == [expected(row, i) for i, row in enumerate(rows)]
    assert len([body for body in stub.asked if len(body["messages"]) == 1]) == 60 - kept


@pytest.fixture
def talkative(tmp_path, tiny_tokenizer) -> Path:
    """A random target that ends its turns now and then, and begins none."""
    folder = tmp_path / "talkative"
    save_llama(folder, tiny_tokenizer)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[tiny_tokenizer.eos_token_id] *= 6
        model.lm_head.weight[tiny_tokenizer.bos_token_id] = 0
    model.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def transformers_serve(folder: Path) -> Iterator[str]:
    """`transformers serve` over a target on loopback; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    with subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


@pytest.mark.slow
def test_transformers_serve_answers_as_this_process_does(tmp_path, talkative):
    settings: dict[str, Any] = {"temperatures": [0.0], "max_new_tokens": 8, "seed": 1}
    with transformers_serve(talkative) as url:
        regenerate_by_server(url, str(talkative), PROMPTS, out=tmp_path / "served.jsonl", parallel=3, **settings)
        with pytest.raises(SlipstreamError, match=r"answers 400: .*requested 'other'"):
            regenerate_by_server(url, "other", PROMPTS, out=tmp_path / "other.jsonl", **settings)
    loaded = load_target(str(talkative), dtype=torch.float32)
    stop_ids, mine = loaded.stop_ids(), tmp_path / "mine.jsonl"
    regenerate(
        loaded.name, partial(sample, loaded), loaded.chat_tokenizer, PROMPTS, stop_ids=stop_ids, out=mine, **settings
    )
    rows = {row["id"]: row for row in rows_of(mine)}
    assert {row["id"]: row for row in rows_of(tmp_path / "served.jsonl")} == rows
    assert len({(len(row["messages"]), row["finished"]) for row in rows.values()}) > 2
