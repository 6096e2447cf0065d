"""Run programs that a model wrote where they can do little harm.

Each program gets a process, an empty folder, and limits on time, memory, files and processes. What changes anything
outside ends it: an audit hook sees it in Python, what raises no audit event is replaced or cannot be imported, and behind
that stand the kernel's limits and, where the machine grants them, namespaces without network and without a way out of the
process tree. This is made for the mistakes of a model, not against an attacker: a program that looks for its judge's memory
can forge a pass, and one that looks for what was replaced can find it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from slipstream.configs.errors import SlipstreamError

_SCRIPT = str(Path(__file__).with_name("confined.py"))
_UNSHARE = ("unshare", "--net", "--pid", "--fork", "--kill-child")
# The kernel limits nobody's processes, but not root's. Reading stays allowed: Python may lie in a folder of root's.
_NOBODY = (
    "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search", "--bounding-set=-all,+dac_read_search", "--no-new-privs", "--pdeathsig=KILL",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a program may use: CPU seconds, seconds on the clock, address space."""

    seconds: int = 3
    wall_seconds: float = 10.0
    memory_mb: int = 1024


@dataclass(frozen=True)
class Isolation:
    """What this machine grants beyond the audit hook and the limits on time, memory and files.

    Attributes:
        network: The program is in a network namespace without interfaces.
        processes: The kernel lets it start no process.
    """

    network: bool
    processes: bool

    def to_dict(self) -> dict[str, bool]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why."""

    passed: bool
    reason: str = ""


@cache
def isolation() -> Isolation:
    """What the sandbox can promise here, found by trying."""
    prefix = _prefix()
    return Isolation(network="--net" in prefix, processes=os.geteuid() != 0 or "setpriv" in prefix)


def run_program(source: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program in the sandbox; it passes if it runs to its end.

    Raises:
        SlipstreamError: If this is not Linux.
    """
    return _run(source, limits, _prefix())


@cache
def _prefix() -> tuple[str, ...]:
    """The strongest isolation that works here, as the words before the command; none may."""
    if sys.platform != "linux":
        raise SlipstreamError(f"programs are scored on Linux only, not on {sys.platform}")
    strong = (*_UNSHARE, *_NOBODY) if os.geteuid() == 0 else (*_UNSHARE, "--user", "--map-root-user")
    choices = [strong, _NOBODY, ()] if os.geteuid() == 0 else [strong, ()]
    for words in choices:
        if all(shutil.which(tool) for tool in {"unshare", "setpriv"} & set(words)) and _run("", Limits(), words).passed:
            return words
    raise SlipstreamError(f"the sandbox cannot run {sys.executable} here; programs cannot be scored")


def _run(source: str, limits: Limits, prefix: tuple[str, ...]) -> Outcome:
    word = secrets.token_hex(16)
    request = {"program": source, "word": word, "seconds": limits.seconds, "memory_mb": limits.memory_mb}
    command = [*prefix, sys.executable, "-I", "-S", "-B", _SCRIPT]
    with tempfile.TemporaryDirectory(prefix="slipstream-") as folder, tempfile.TemporaryFile() as given:
        given.write(json.dumps(request).encode())
        given.seek(0)
        process = subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={},
            start_new_session=True, bufsize=0,
        )  # fmt: skip
        with process:
            in_time = _ends(process, limits.wall_seconds)
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)  # what escaped may hold the other end
            told = (process.stdout.read(200) or b"").decode(errors="replace")
    if not in_time:
        return Outcome(False, "timed out")
    return Outcome(True) if told == word else Outcome(False, told or "ended early")


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ends in time; either way its whole group is gone afterwards."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True
