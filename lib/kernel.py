"""One notebook executed in a kernel of its own, with its progress on the terminal.

The kernel is today's interpreter, whatever kernels are registered with Jupyter. It talks over sockets in a private
folder (many kernels may start at once without sharing a name), reads no personal IPython settings, and reports the
library's progress lines through a file there (``lib.progress``).
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

from lib.progress import VARIABLE, duration

HEARTBEAT_S = 30.0  # a line at least this often
GRACE_S = 10.0  # what an interrupted cell gets to stop
LONGEST_SOCKET_PATH = 90  # the system's limit is 104 to 108 bytes, a port number is still added


class Interrupted(Exception):
    """Ctrl-C, or the system asked the run to end; ``signal`` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class Session:
    """A kernel's process and private folder, and what the terminal shows of it."""

    def __init__(self, name: str, cells: int, folder: Path) -> None:
        self.name, self.cells, self.folder = name, cells, folder
        self.cell = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.interrupted: int | None = None
        self._started = self._spoke = time.monotonic()
        self._deadline = float("inf")
        self._read = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        (folder / "progress").touch()

    def on_cell_start(self, cell: Any, cell_index: int) -> None:
        """nbclient's hook: remembers which cell runs."""
        self.cell = cell_index + 1

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: stops the running cell, so that the partial notebook is whole; a second signal kills."""
        if self.process is None or self.process.poll() is not None:
            raise Interrupted(number)
        if self.interrupted is None:
            self.interrupted = number
            self._deadline = time.monotonic() + GRACE_S
            self.process.send_signal(signal.SIGINT)
        else:
            self.process.kill()

    def last_words(self) -> str:
        """How a kernel that died ended, with the last line that it wrote past Jupyter."""
        code = self.process.wait(timeout=GRACE_S) if self.process else None
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"{signal.Signals(-code).name}{', often: out of memory' if code == -signal.SIGKILL else ''}"
        log = (self.folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{how}; it last wrote: {log[-1][:200]}" if log else how

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Forward progress and handle signals for the length of a ``with`` block."""
        handled = (signal.SIGINT, signal.SIGTERM) if os.name == "posix" else ()
        before = {number: signal.signal(number, self.interrupt) for number in handled}
        self._thread.start()
        try:
            yield
        finally:
            self._end.set()
            self._thread.join()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _watch(self) -> None:
        while not self._end.wait(0.25):
            self._forward()
            now = time.monotonic()
            if now - self._spoke >= HEARTBEAT_S:
                self._say(f"cell {self.cell} of {self.cells}, {duration(now - self._started)}")
            if now > self._deadline and self.process is not None:
                self.process.kill()
        self._forward()

    def _forward(self) -> None:
        """Print the progress lines that are new and whole."""
        with (self.folder / "progress").open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            self._say(line)

    def _say(self, line: str) -> None:
        print(f"   {self.name} | {line}", flush=True)
        self._spoke = time.monotonic()


def execute(source: Path, target: Path, parameters: dict[str, Any]) -> Any:
    """Execute ``source`` into ``target`` (saved after every cell) with ``parameters``; returns the notebook.

    Raises:
        Interrupted: by a signal; ``target`` holds the cells that ran.
        papermill.PapermillExecutionError: a cell raised.
        RuntimeError: the kernel died; the message says how.
    """
    from nbclient.exceptions import DeadKernelError

    cells = len(papermill.iorw.load_notebook_node(str(source)).cells)
    with tempfile.TemporaryDirectory(prefix="study-", ignore_cleanup_errors=True) as private:
        session = Session(source.stem[:2], cells, Path(private))
        with session.watched():
            try:
                return papermill.execute_notebook(
                    str(source.resolve()),
                    str(target.resolve()),
                    parameters,
                    kernel_name="python3",
                    language="python",
                    cwd=str(source.resolve().parent),
                    progress_bar=False,
                    start_timeout=120,
                    iopub_timeout=60,
                    record_timing=False,
                    on_cell_start=session.on_cell_start,
                    kernel_manager_class=_kernel_class(session),
                )
            except RuntimeError as error:  # a DeadKernelError, or no answer from a kernel that was just started
                if session.interrupted is None:
                    died = isinstance(error, DeadKernelError)
                    raise (RuntimeError(f"the kernel died ({session.last_words()})") if died else error) from None
            except papermill.PapermillExecutionError:
                if session.interrupted is None:
                    raise
            raise Interrupted(session.interrupted)


def _kernel_class(session: Session) -> Callable[..., AsyncKernelManager]:
    """A kernel manager bound to ``session``; nbclient makes its one instance."""
    folder = str(session.folder)
    ipc = {"transport": "ipc", "ip": os.path.join(folder, "k")}
    if os.name != "posix" or len(folder) > LONGEST_SOCKET_PATH:
        ipc = {}

    class PrivateKernel(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(connection_file=os.path.join(folder, "kernel.json"), **ipc, **options)

        @property
        def kernel_spec(self) -> KernelSpec:
            command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="Python 3", language="python")

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
            environment = os.environ | {VARIABLE: os.path.join(folder, "progress"), "IPYTHONDIR": folder}
            with open(os.path.join(folder, "log"), "wb") as log:
                await super().start_kernel(env=environment, stdout=log, stderr=subprocess.STDOUT, **options)
            session.process = getattr(self.provisioner, "process", None)

    return PrivateKernel
