"""One clear line out of other libraries' errors."""

from pydantic import ValidationError

SHOWN = 80  # characters of a value that is quoted back


def first_line(error: Exception, characters: int = 160) -> str:
    """The first line of what an error says, cut; its kind where it says nothing."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:characters]


def first_problem(error: ValidationError, whole: str = "the file") -> str:
    """The first thing found wrong: where, what is wrong with it, and the value itself.

    Args:
        whole: what to call the place when it is no single field.
    """
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if not where or first["type"] == "missing":
        return f"{where or whole}: {first['msg']}"
    return f"{where}: {first['msg']}, found {repr(first['input'])[:SHOWN]}"
