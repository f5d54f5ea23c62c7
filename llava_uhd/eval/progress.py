"""Progress with the time that is left: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Meter:
    """Counts finished items, as a context manager.

    Args:
        console: to write to.
        label: what is counted.
        total: items to do.
        quiet: show nothing (all processes but the first).
        interval: seconds between lines where the console is no terminal.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        total: int,
        quiet: bool = False,
        interval: float = 15.0,
    ) -> None:
        self.console, self.label, self.total = console, label, total
        self.quiet, self.interval = quiet, interval
        self.done = 0
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
            )

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task(self.label, total=self.total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Counts ``count`` more items."""
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
            return
        now = time.monotonic()
        if not self.quiet and (now - self._last >= self.interval or self.done == self.total):
            self._last = now
            self.console.print(self.line(now - self._start), highlight=False, soft_wrap=True)

    def line(self, elapsed: float) -> str:
        """State after ``elapsed`` seconds.

        Example: ``synthetic: 50 of 200, 5.0 items/s, 30 s left``.
        """
        rate = self.done / max(elapsed, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        return f"{self.label}: {self.done} of {self.total}, {rate:.1f} items/s, {left:.0f} s left"
