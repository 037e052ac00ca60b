"""What the commands ``python -m lib.…`` share."""

import argparse
from typing import NoReturn

from lib.config import StudyError


class Parser(argparse.ArgumentParser):
    """Bad options end in one line like every other user error."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print before it ends the process."""
        raise StudyError(f"{message}; see {self.prog} --help")
