"""What the commands ``python -m lib.…`` share."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from lib.config import StudyError

RESUMABLE = "interrupted; finished runs are kept, the same command goes on from the last checkpoint"


class Parser(argparse.ArgumentParser):
    """Bad options end in one line like every other user error."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print before it ends the process."""
        raise StudyError(f"{message}; see {self.prog} --help")


def exit_code(command: Callable[[], int | None], interrupted: str) -> int:
    """Run ``command``: its own exit code (``None`` is 0), 2 after a user's mistake, 130 after Ctrl-C.

    Args:
        interrupted: the line that Ctrl-C ends in; a mistake's line is its own.
    """
    try:
        return command() or 0
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
