"""Writing files so that a reader, or the next run, never finds half of one."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib.config import StudyError

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file so that it is whole or absent, even if the machine stops; its folders are made.

    Raises:
        StudyError: full disk, missing permission; what was there before stays.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes files that only their owner may read
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes ``folder`` at the end: a folder that exists is whole.

    What was there before is replaced; when the block raises, it stays. Of processes that train together, let the first
    alone enter: each removes what another has half filled.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(f".saving-{folder.name}-*"):  # by a run that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".saving-{folder.name}-"))
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """A file's digest as 64 hex digits, without holding the file in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refused_write(error: Exception, folder: Path) -> StudyError | None:
    """The one line for an error that means that the system refused a write; None for any other error.

    The Rust libraries that write weights and tokenizers keep only the text of the system's error, as ``shutil`` does of
    a folder that it copies, and torch not even that.
    """
    if isinstance(error, OSError) and not isinstance(error, shutil.Error):
        return cannot_write(Path(error.filename or folder), error) if error.errno in REFUSED else None
    kept = "[Errno {}]" if isinstance(error, shutil.Error) else "(os error {})"
    for number in REFUSED:
        if kept.format(number) in str(error):
            return cannot_write(folder, OSError(number, os.strerror(number)))
    if "enforce fail at inline_container" in str(error) and "StreamReader" not in str(error):
        return cannot_write(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    return None


def cannot_write(path: Path, error: OSError) -> StudyError:
    """The one line for a write that the system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StudyError(f"disk full while writing {path}; finished records are safe, free some space and run again")
    return StudyError(f"cannot write {path} ({error.strerror}); give a writable results folder with -p results FOLDER")
