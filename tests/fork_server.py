"""A process that has imported the study and forks for every command, so that starting one costs nothing.

Reads one JSON line per request, answers one: ``{"start": [arguments of lib.runs], "log": path}`` with the child's id,
``{"wait": id}`` with its exit code. In the children an audit hook (PEP 578) refuses every connection and look-up of a
host, and writes these and every class that a pickle asks for to ``log``.
"""

import json
import os
import sys
from typing import Any

from lib import experiments, runs  # noqa: F401  (experiments is what takes time to import)

WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "pickle.find_class")


def watch(log: str) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WATCHED:
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{event} {arguments}\n")
            if event.startswith("socket."):
                raise PermissionError(f"{event} is not allowed in this test")

    sys.addaudithook(hook)


def start(arguments: list[str], log: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(f"{log}.output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        watch(log)
        code = runs.main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            print(start(request["start"], request["log"]), flush=True)
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
