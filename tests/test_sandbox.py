"""The sandbox: a program passes by running to its end; one that reaches outside is ended, and nothing of it is left."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import subprocess
import time

import numpy as np
import pytest

from slipstream.decode import confined, sandbox
from slipstream.decode.sandbox import Limits, isolation, run_program

LIMITS = Limits(seconds=1, wall_seconds=1.5, memory_mb=256)


def test_a_program_passes_by_running_to_its_end():
    assert run_program("import collections, math, re, typing\nassert math.sqrt(4) == 2").passed
    assert run_program("def f(n):\n    return n and f(n - 1)\nf(500)\nprint('words')\nopen('/dev/null').read()").passed


def test_what_answers_import_is_there():
    usual = (
        "array asyncio bisect calendar cmath collections copy dataclasses datetime decimal doctest enum fractions functools"
        " hashlib heapq itertools json logging math multiprocessing operator pdb queue random re secrets signal statistics"
        " string struct subprocess textwrap threading time typing unittest urllib.request uuid zlib"
    )
    source = f"import {usual.replace(' ', ', ')}\nassert len(hashlib.sha3_256(uuid.uuid4().bytes).hexdigest()) == 64"
    assert run_program(source) == sandbox.Outcome(True)


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
        ("import os, time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(60)", "timed out"),
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


@pytest.fixture
def other():
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("os.mkfifo(new)", "posix.mkfifo"),
        ("os.mknod(new)", "posix.mknod"),
        ("posix.mknod(new)", "posix.mknod"),
        ("signal.pidfd_send_signal(os.pidfd_open(other), 9)", "posix.pidfd_open"),
        ("signal.pidfd_send_signal(os.open(f'/proc/{other}', os.O_RDONLY), 9)", "_signal.pidfd_send_signal"),
        ("resource.prlimit(other, resource.RLIMIT_NOFILE, (9, 9))", "resource.prlimit"),
        ("os.setpriority(os.PRIO_PROCESS, other, 9)", "posix.setpriority"),
        ("os.sched_setaffinity(other, [0])", "posix.sched_setaffinity"),
        ("os.sched_setscheduler(other, os.SCHED_BATCH, os.sched_param(0))", "posix.sched_setscheduler"),
        ("os.sched_setparam(other, os.sched_param(0))", "posix.sched_setparam"),
        ("_posixsubprocess.fork_exec()", "_posixsubprocess.fork_exec"),
        ("time.clock_settime()", "time.clock_settime"),
        ("time.clock_settime_ns()", "time.clock_settime_ns"),
        ("syslog.syslog('')", "syslog.syslog"),
        ("__main__.FORBIDDEN = ()\n    os.mkdir(new)", "os.mkdir"),
        ("builtins.isinstance = lambda *a: False\n    open(new, 'w')", "open"),
    ],
)
def test_the_hook_needs_no_help_from_the_kernel(tmp_path, other, source, what):
    program = (
        "import __main__, _posixsubprocess, builtins, os, posix, resource, signal, syslog, time\n"
        f"new, other = {str(tmp_path / 'new')!r}, {other.pid}\n"
        f"try:\n    {source}\nexcept BaseException:\n    pass\n"
    )
    before = state(other.pid)
    assert sandbox._run(program, LIMITS, ()) == sandbox.Outcome(False, f"forbidden: {what}")
    assert list(tmp_path.iterdir()) == []
    assert other.poll() is None
    assert state(other.pid) == before


def state(pid: int) -> tuple[object, ...]:
    return (
        resource.prlimit(pid, resource.RLIMIT_NOFILE),
        os.getpriority(os.PRIO_PROCESS, pid),
        os.sched_getaffinity(pid),
        os.sched_getscheduler(pid),
    )


@pytest.mark.parametrize("module", ["posix", "_signal", "_posixsubprocess", "time", "sys", "_imp"])
@pytest.mark.parametrize(
    "source",
    [
        "del sys.modules[{0!r}]\nimport {0}",
        "del sys.modules[{0!r}]\nimportlib.import_module({0!r})",
        "util.module_from_spec(sys.modules[{0!r}].__spec__)",
    ],
)
def test_what_was_replaced_is_not_imported_anew(module, source):
    program = f"import _imp, _posixsubprocess, importlib, sys\nfrom importlib import util\n{source.format(module)}"
    assert run_program(program, LIMITS).reason == "raised ModuleNotFoundError"


@pytest.mark.parametrize("module", confined.ABSENT)
def test_modules_whose_doings_raise_no_event_are_absent(module):
    sources = [f"import {module}", f"import importlib\nimportlib.import_module({module!r})"]
    found = importlib.util.find_spec(module)
    if found and found.has_location:
        sources.append(under_a_path(f"some.{module}", found.origin))
    for source in sources:
        assert run_program(source, LIMITS).reason == "raised ModuleNotFoundError"


def under_a_path(name: str, file: str | None) -> str:
    return f"from importlib import util\nutil.module_from_spec(util.spec_from_file_location({name!r}, {file!r}))"


def test_compiled_modules_come_from_the_standard_library_only():
    source = under_a_path("_multiarray_umath", np._core._multiarray_umath.__file__)
    assert run_program(source, LIMITS).reason == "raised ModuleNotFoundError"


@pytest.mark.parametrize(
    "source",
    [
        "import readline\nreadline.write_history_file(victim)",
        "import sqlite3\nsqlite3.connect(victim + '.new')",
        "import ssl\nssl.create_default_context().keylog_filename = victim + '.new'",
        "import tkinter\ntkinter.Tcl().eval('file delete ' + victim)",
        "import _dbm\n_dbm.open(victim, 'n')",
        "import _gdbm\n_gdbm.open(victim, 'n')",
        "import ctypes\nctypes.CDLL(None).unlink(victim.encode())",
        "import _xxsubinterpreters as i\ni.run_string(i.create(), f'import os; os.remove({victim!r})')",
        "import _testcapi\n_testcapi.pymarshal_write_long_to_file(1, victim, 1)",
    ],
)
def test_libraries_that_open_files_by_themselves_do_not_get_to_it(tmp_path, source):
    victim = tmp_path / "victim"
    victim.write_text("here")
    outcome = sandbox._run(f"victim = {str(victim)!r}\n{source}", LIMITS, ())
    assert outcome == sandbox.Outcome(False, "raised ModuleNotFoundError")
    assert list(tmp_path.iterdir()) == [victim]
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
