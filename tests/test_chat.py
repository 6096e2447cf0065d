"""`slipstream generate` without a prompt, on a terminal: a chat of several turns, with colours and statistics or without."""

from __future__ import annotations

import io
import sys

import pytest

from slipstream.cli import main
from slipstream.distill.target import Target


@pytest.fixture
def chat(capsys, monkeypatch, tiny_target_folder):
    """Runs a chat of messages: what was printed to either stream, and the messages each answer was made from."""
    seen: list[list[dict[str, str]]] = []
    encode = Target.encode_prompt

    def noted(self, messages):
        seen.append([dict(message) for message in messages])
        return encode(self, messages)

    def run(*messages: str, options: tuple[str, ...] = ()):
        seen.clear()
        keyboard = io.StringIO("".join(f"{message}\n" for message in messages) + "\n")
        keyboard.isatty = lambda: True
        monkeypatch.setattr("sys.stdin", keyboard)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        target = str(tiny_target_folder)
        draft = ("--draft", target, "--dtype", "float32", "--max_new_tokens", "24")  # itself: all drafts are exact
        assert main(["generate", "--target", target, *draft, *options]) == 0
        return *capsys.readouterr(), list(seen)

    monkeypatch.setattr(Target, "encode_prompt", noted)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    return run


def test_a_second_turn_remembers_the_first(chat):
    out, _, (first, second) = chat("Hi", "Yo", options=("--quiet",))
    assert first == [{"role": "user", "content": "Hi"}]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert (second[0], second[2]["content"]) == (first[0], "Yo")
    shown = second[1]["content"].rstrip("\ufffd")  # a letter that was cut short waits for its end
    assert shown != ""
    assert out.startswith(f"> {shown}\n> ")
    alone, _, _ = chat("Yo", options=("--quiet",))
    assert out.removeprefix(f"> {shown}\n") != alone  # what was said before is read


def test_tokens_are_coloured_and_a_line_of_statistics_follows_each_answer(chat):
    out, err, _ = chat("Hi", "Yo")
    assert "\x1b[32m" in out  # accepted exactly
    lines = [line for line in err.splitlines() if "tokens/s" in line]
    assert len(lines) == 2
    assert all("acceptance length" in line and "relaxed 0.0%" in line for line in lines)


def test_quiet_prints_the_text_alone(chat):
    loud, _, _ = chat("Hi", "Yo")
    out, err, _ = chat("Hi", "Yo", options=("--quiet",))
    assert "\x1b" not in out
    assert "tokens/s" not in err
    assert out == loud.replace("\x1b[32m", "").replace("\x1b[0m", "")
