"""Run one program in this process, which decode/sandbox.py made for it. A script: nothing but the standard library.

Standard input holds a JSON object: the program, the limits, and a word nobody else knows. The word goes to standard output
when the program has run to its end; anything else there is the reason why it did not.
"""

from __future__ import annotations

import _imp
import json
import os
import resource
import sys
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec

FORBIDDEN = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "fcntl.", "pty.", "syslog.", "resource.prlimit", "sys.remote_exec",
)  # fmt: skip
# Functions and modules that change something outside, or start an interpreter without a hook, and raise no audit event.
SILENT = {
    "posix": "mkfifo mknod pidfd_open sched_setaffinity sched_setparam sched_setscheduler setpriority",
    "_posixsubprocess": "fork_exec",
    "_signal": "pidfd_send_signal",
    "sys": "activate_stack_trampoline",
    "time": "clock_settime clock_settime_ns",
}
ABSENT = (
    "_ctypes", "_curses", "_curses_panel", "_dbm", "_gdbm", "_interpreters", "_multiprocessing", "_posixshmem", "_sqlite3",
    "_ssl", "_testcapi", "_testinternalcapi", "_tkinter", "_xxsubinterpreters", "nis", "ossaudiodev", "readline", "termios",
)  # fmt: skip
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(seconds: int, memory_mb: int) -> None:
    """The kernel's limits: time, memory, files, and no further process or thread."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory_mb * 2**20,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def forbid(answer: int) -> None:
    """End the process at its first attempt to change anything outside of it; an audit hook cannot be taken off again."""
    write, leave = os.write, os._exit  # the program may replace the originals, and what this module names
    forbidden, harmless, writing, absent = FORBIDDEN, HARMLESS, _WRITING, {*ABSENT, *SILENT, "_imp"}
    places = frozenset(place.rstrip("/") for place in sys.path)

    def end(what: str, *arguments: object, **named: object) -> None:
        write(answer, f"forbidden: {what}".encode())
        leave(1)

    def admit(name: str, file: str | None) -> None:
        if name.rpartition(".")[2] in absent or (file and file.rpartition("/")[0] not in places):
            raise ModuleNotFoundError(f"no {name} in the sandbox", name=name)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import":
            admit(arguments[0], arguments[1])
        writes = event == "open" and (arguments[2] or 0) & writing
        if writes or (event.startswith(forbidden) and event not in harmless):
            end(event)

    replace(end, admit)
    sys.addaudithook(hook)


def replace(end: Callable[..., None], admit: Callable[[str, str | None], None]) -> None:
    """Put `end` in place of the silent functions, and `admit` before built-in modules, which bring them anew."""
    for module, names in SILENT.items():
        for name in names.split():
            for place in (import_module(module), os):
                if hasattr(place, name):
                    os.supports_dir_fd.discard(getattr(place, name))
                    setattr(place, name, partial(end, f"{module}.{name}"))
    create = _imp.create_builtin

    def create_builtin(spec: ModuleSpec) -> Any:
        admit(spec.name, None)
        return create(spec)

    _imp.create_builtin = create_builtin


def main() -> None:
    """Run the program; what it prints goes nowhere."""
    request = json.loads(sys.stdin.buffer.read())
    answer, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    write, leave = os.write, os._exit
    limit(request["seconds"], request["memory_mb"])
    forbid(answer)
    told = request["word"]
    try:
        exec(compile(request["program"], "<program>", "exec"), {})
    except BaseException as error:  # whatever the program raises, SystemExit included, is its failure
        told = f"raised {type(error).__name__}"
    write(answer, told.encode())
    leave(0)


if __name__ == "__main__":
    main()
