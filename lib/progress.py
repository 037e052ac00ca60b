"""One progress line: what is running, how far it is and how long it will take.

On a terminal it rewrites itself; in a file it falls back to one plain line per step of at least ``EVERY_S`` seconds;
under ``lib.execute`` the lines go to the file named by ``STUDY_PROGRESS``, so that notebooks stay clean.
"""

import os
import sys
import time

from lib import distributed

EVERY_S = 15.0
VARIABLE = "STUDY_PROGRESS"


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``; ``4000`` -> ``1:06:40``."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


class Progress:
    """Reports on a job of ``total`` steps; ``title`` says what runs."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, max(total, 1)
        self.started = self.last = time.monotonic()
        self.first = 0

    def resumed_at(self, step: int) -> None:
        """Steps done in an earlier sitting do not count for the estimate."""
        self.first = step

    def update(self, step: int) -> None:
        """Report ``step`` of ``total``, at most every ``EVERY_S`` seconds (twice a second on a terminal)."""
        now = time.monotonic()
        if not distributed.is_main():
            return
        terminal = sys.stderr.isatty() and VARIABLE not in os.environ
        if now - self.last < (0.5 if terminal else EVERY_S):
            return
        self.last = now
        done = max(step - self.first, 1)
        left = (now - self.started) / done * (self.total - step)
        line = f"{self.title}: {step}/{self.total} ({step / self.total:.0%}), {duration(left)} left"
        if terminal:
            print(f"\r{line:<100.100}", end="", file=sys.stderr, flush=True)
        else:
            say(line)

    def close(self) -> None:
        """Clear the line on a terminal."""
        if distributed.is_main() and sys.stderr.isatty() and VARIABLE not in os.environ:
            print("\r" + " " * 100 + "\r", end="", file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Report one plain line where progress belongs."""
    if not distributed.is_main():
        return
    path = os.environ.get(VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    else:
        print(line, file=sys.stderr, flush=True)
