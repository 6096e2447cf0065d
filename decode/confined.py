"""Run one program in this process, which decode/sandbox.py made for it. A script: nothing but the standard library.

Standard input holds a JSON object: the program, the limits, and a word nobody else knows. The word goes to standard output
when the program has run to its end; anything else there is the reason why it did not.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "fcntl.", "pty.")
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
    write, leave = os.write, os._exit  # the program may replace the originals

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if writes or (event.startswith(FORBIDDEN) and event not in HARMLESS):
            write(answer, f"forbidden: {event}".encode())
            leave(1)

    sys.addaudithook(hook)


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
