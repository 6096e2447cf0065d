"""The sandbox: a program passes by running to its end; one that reaches outside is ended, and nothing of it is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import pytest

from slipstream.decode import sandbox
from slipstream.decode.sandbox import Limits, isolation, run_program

LIMITS = Limits(seconds=1, wall_seconds=1.5, memory_mb=256)


def test_a_program_passes_by_running_to_its_end():
    assert run_program("import collections, math, re, typing\nassert math.sqrt(4) == 2").passed
    assert run_program("def f(n):\n    return n and f(n - 1)\nf(500)\nprint('words')\nopen('/dev/null').read()").passed


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2", "raised AssertionError"),
        ("this is no Python", "raised SyntaxError"),
        ("'\\ud800'.encode() or 1 / 0", "raised UnicodeEncodeError"),
        ("def f(): f()\nf()", "raised RecursionError"),
        ("input()", "raised EOFError"),
        ("x = [bytearray(10**6) for _ in range(10**6)]", "raised MemoryError"),
        ("import time\ntime.sleep(60)", "timed out"),
        ("import os, time\nos.setsid()\ntime.sleep(60)", "timed out"),
    ],
)
def test_a_program_that_fails_says_how(source, reason):
    begun = time.monotonic()
    outcome = run_program(source, LIMITS)
    assert (outcome.passed, outcome.reason) == (False, reason)
    assert time.monotonic() - begun < 10


def test_cpu_time_is_limited_apart_from_the_clock():
    assert run_program("while True: pass", Limits(seconds=1, wall_seconds=30)).reason == "ended early"


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "print('passed')\nraise SystemExit",
        "import os\nfor n in range(32):\n    try: os.write(n, b'passed')\n    except OSError: pass\nos._exit(0)",
        "import os\nos.write = lambda *a: 1 / 0\nos._exit = exit\nassert False",
    ],
)
def test_ending_early_or_printing_success_is_no_success(source):
    assert not run_program(source + "\nassert False", LIMITS).passed


@pytest.mark.parametrize(
    ("source", "event"),
    [
        ("os.fork()", "os.fork"),
        ("subprocess.run(['true'])", "subprocess.Popen"),
        ("os.system('true')", "os.system"),
        ("os.posix_spawn('/bin/true', ['true'], {})", "os.posix_spawn"),
        ("os.kill(os.getppid(), 9)", "os.kill"),
        ("socket.socket()", "socket.__new__"),
        ("socket.getaddrinfo('localhost', 1)", "socket.getaddrinfo"),
        ("open('left', 'w')", "open"),
        ("os.open('left', os.O_CREAT | os.O_WRONLY)", "open"),
        ("os.mkdir('left')", "os.mkdir"),
        ("os.remove(victim)", "os.remove"),
        ("os.rename(victim, victim + '.gone')", "os.rename"),
        ("shutil.rmtree(os.path.dirname(victim))", "shutil.rmtree"),
        ("import ctypes", "ctypes.dlopen"),
    ],
)
def test_a_program_that_reaches_outside_is_ended_though_it_catches_everything(tmp_path, source, event):
    victim = tmp_path / "victim"
    victim.write_text("here")
    program = (
        f"import os, shutil, socket, subprocess\nvictim = {str(victim)!r}\n"
        f"try:\n    {source}\nexcept BaseException:\n    pass\n"
    )
    assert run_program(program, LIMITS) == sandbox.Outcome(False, f"forbidden: {event}")
    assert victim.read_text() == "here"


def test_a_fork_bomb_does_not_start(tmp_path):
    source = "import os\nfor _ in range(50):\n    try: os.fork()\n    except BaseException: pass"
    assert run_program(source, LIMITS).reason == "forbidden: os.fork"


def test_the_kernel_stops_what_no_audit_event_announces():
    if not isolation().processes:
        pytest.skip("the kernel does not limit root's processes, and this machine does not let root become nobody")
    assert (
        run_program("import threading\nthreading.Thread(target=print).start()", LIMITS).reason == "raised RuntimeError"
    )


def test_what_floods_its_pipe_waits_for_its_end():
    flood = "import os\nfor n in range(3, 9):\n    try: os.write(n, b'x' * 10**7)\n    except OSError: pass"
    assert run_program(flood, LIMITS).reason == "timed out"


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    script = tmp_path / "confined.py"  # a name that no other test's processes have
    shutil.copy(sandbox._SCRIPT, script)
    monkeypatch.setattr(sandbox, "_SCRIPT", str(script))
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(folder))
    for source in ("pass", "import os, time\nos.setsid()\ntime.sleep(77)", "while True: pass"):
        run_program(source, LIMITS)
    assert list(folder.iterdir()) == []
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(script) not in running


def test_isolation_is_claimed_only_where_it_was_found(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda tool: None)
    for cached in (sandbox._prefix, isolation):
        cached.cache_clear()
    try:
        assert isolation() == sandbox.Isolation(network=False, processes=os.geteuid() != 0)
        assert run_program("pass").passed
        assert run_program("import socket\nsocket.socket()").reason == "forbidden: socket.__new__"
    finally:
        for cached in (sandbox._prefix, isolation):
            cached.cache_clear()
