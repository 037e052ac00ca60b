"""Progress: the share, the estimate, and one plain line per step where there is no terminal to rewrite."""

import io
from types import SimpleNamespace

import pytest

from lib import progress
from lib.progress import Progress, duration, say


class Screen(io.StringIO):
    """What stderr is: a terminal or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """``clock.now`` is the time in seconds that ``lib.progress`` sees."""
    found = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


@pytest.fixture
def screen(monkeypatch, request) -> Screen:
    found = Screen(getattr(request, "param", False))
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=found))  # pytest swaps the real one itself
    return found


on_a_terminal = pytest.mark.parametrize("screen", [True], indirect=True)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (0.6, "0:01"), (59.4, "0:59"), (59.6, "1:00"), (75, "1:15"), (3599.7, "1:00:00"), (4000, "1:06:40"),
     (90_000, "25:00:00")],
)  # fmt: skip
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_a_line_has_the_share_and_the_time_left(clock, screen):
    job = Progress("training", 200)
    clock.now += 20
    job.update(50)
    clock.now += 20
    job.update(150)
    assert screen.getvalue().splitlines() == [
        "training: 50/200 (25%), 1:00 left",  # 50 steps in 20 s, 150 to go
        "training: 150/200 (75%), 0:13 left",  # 150 in 40 s
    ]


def test_the_last_step_leaves_nothing(clock, screen):
    job = Progress("job", 10)
    clock.now += 30
    job.update(10)
    assert screen.getvalue() == "job: 10/10 (100%), 0:00 left\n"


def test_steps_of_an_earlier_sitting_do_not_count_for_the_estimate(clock, screen):
    job, fresh = Progress("resumed", 100), Progress("fresh", 100)
    job.resumed_at(80)
    clock.now += 20
    job.update(90)
    fresh.update(90)
    assert screen.getvalue().splitlines() == [
        "resumed: 90/100 (90%), 0:20 left",  # 10 steps in 20 s
        "fresh: 90/100 (90%), 0:02 left",
    ]


def test_a_resumed_job_that_has_done_nothing_yet_has_an_estimate(clock, screen):
    job = Progress("resumed", 100)
    job.resumed_at(80)
    clock.now += 16
    job.update(80)
    assert screen.getvalue() == "resumed: 80/100 (80%), 5:20 left\n"


def test_a_job_of_no_steps_is_no_division_by_zero(clock, screen):
    job = Progress("empty", 0)
    clock.now += 20
    job.update(0)
    assert screen.getvalue() == "empty: 0/1 (0%), 0:20 left\n"


def test_a_file_gets_one_plain_line_every_so_many_seconds(clock, screen):
    job = Progress("job", 1000)
    for step in range(1, 101):
        clock.now += 1
        job.update(step)
    job.close()
    text = screen.getvalue()
    assert [line.split(" ")[1] for line in text.splitlines()] == [f"{step}/1000" for step in range(15, 101, 15)]
    assert all(sign == "\n" or sign.isprintable() for sign in text), text


@on_a_terminal
def test_a_terminal_gets_one_line_that_is_rewritten_and_cleared(clock, screen):
    job = Progress("a job with a name that does not fit " * 4, 10)
    for step in range(1, 5):
        clock.now += 0.3
        job.update(step)
    written = screen.getvalue()
    assert written.count("\r") == 2 and "\n" not in written, "at most twice a second"
    assert [len(line) for line in written.split("\r")[1:]] == [100, 100], "a shorter line covers a longer one"
    job.close()
    assert screen.getvalue().removeprefix(written) == "\r" + " " * 100 + "\r"


@on_a_terminal
def test_under_the_notebooks_lines_go_to_the_file_and_the_terminal_stays_clean(clock, screen, tmp_path, monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "lines"))
    job = Progress("größer", 10)
    for _ in range(2):
        clock.now += 14
        job.update(5)
    job.close()
    say("done")
    assert (tmp_path / "lines").read_text(encoding="utf-8") == "größer: 5/10 (50%), 0:28 left\ndone\n"
    assert screen.getvalue() == ""


def test_a_plain_line_goes_to_stderr(capsys):
    say("3 cached")
    assert capsys.readouterr() == ("", "3 cached\n")
