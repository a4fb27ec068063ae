"""Progress display: bars in a terminal, a widget in a notebook, and elsewhere one plain line per minute."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

#: Called with the name of a stage, the units done and the total units; the total is 0 if it is not known.
Report = Callable[[str, int, int], None]

# Seconds between two lines where no bars can be shown, as in a log file.
INTERVAL = 60.0


@contextmanager
def shown(
    console: Console | None = None, *more: ProgressColumn, transient: bool = False, interval: float = INTERVAL
) -> Iterator[Report]:
    """Context that displays progress; it yields the function to report progress to.

    Args:
        console: console to write to; default stderr.
        more: additional columns of a bar, after name, share and time left.
        transient: remove the bars at the end.
        interval: seconds between two lines where neither a terminal nor a notebook shows bars.
    """
    console = console or Console(stderr=True)
    # In a notebook without ipywidgets, rich would show advice to install it instead of bars.
    widget = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    if console.is_terminal or widget:
        with Progress(*_columns(), *more, console=console, transient=transient) as bars:
            yield _Bars(bars)
        return
    lines = Lines(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    ended = threading.Event()

    def tell_now_and_then() -> None:
        while not ended.wait(interval):
            lines.tell()

    # A thread, because one block of a large model can take longer than the interval.
    thread = threading.Thread(target=tell_now_and_then, name="fp4-progress", daemon=True)
    with suppress(RuntimeError):  # out of memory for its stack: the work goes on without lines
        thread.start()
    try:
        yield lines
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()


class _Bars:
    """One bar per stage; the bar of a stage without a known total is removed when the next stage begins."""

    def __init__(self, bars: Progress) -> None:
        self.bars, self.tasks = bars, dict[str, TaskID]()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            for task in [task for task in self.bars.tasks if task.total is None]:
                self.bars.remove_task(task.id)
            self.tasks[stage] = self.bars.add_task(stage, total=total or None)
        self.bars.update(self.tasks[stage], completed=done, total=total or None)


@dataclass
class _Stage:
    """State of the current stage; ``first`` units were already done when it began, for instance by an earlier run."""

    name: str
    began: float
    first: int
    done: int
    total: int


class Lines:
    """Progress as plain lines: one per call of :meth:`tell`, and one at the end of each stage.

    Args:
        write: called with each line.
        clock: returns a time in seconds; only differences are used.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.write, self.clock = write, clock
        self._stage: _Stage | None = None
        self._lock = threading.Lock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Record the progress of a stage; writes a line when the stage is complete."""
        with self._lock:
            if self._stage is None or self._stage.name != stage:
                self._stage = _Stage(stage, self.clock(), done, done, total)
            now = self._stage
            ended = done == total > 0 and (now.done, now.total) != (done, total)
            now.done, now.total = done, total
            if ended:
                self.write(f"{stage}: 100%, in {duration(self.clock() - now.began)}")

    def tell(self) -> None:
        """Write the progress of the current stage and an estimate of its remaining time."""
        with self._lock:
            now = self._stage
            if now is None or now.done == now.total > 0:
                return
            if not now.total:
                self.write(f"{now.name}: for {duration(self.clock() - now.began)}")
                return
            new = now.done - now.first
            left = "time left not known yet"
            if new > 0:
                seconds = (self.clock() - now.began) * (now.total - now.done) / new
                left = f"about {duration(seconds)} left"
            self.write(f"{now.name}: {now.done / now.total:.0%}, {left}")


def duration(seconds: float) -> str:
    """A number of seconds as text with one unit, such as ``"12 s"`` or ``"3 min"``."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
