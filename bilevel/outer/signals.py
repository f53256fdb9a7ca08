"""Interrupts that wait for the end of an update."""

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Ctrl-C and SIGTERM, noted inside `with` and delivered where it suits.

    The second of them is delivered at once. A signal that was ignored stays so, and outside of the
    main thread, which alone can handle signals, nothing changes.

    Attributes:
        came: the signal that waits, None if there is none.
    """

    def __init__(self) -> None:
        """Nothing came yet."""
        self.came: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        """Note them from here on."""
        # Python drops a KeyboardInterrupt raised while a graph is freed: its weak references call
        # back, and what a callback raises is only printed. One in eight was lost.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Handle them as before; one that waits is delivered unless an error is on its way."""
        for number, before in self._before.items():
            signal.signal(number, before)
        if kind is None:
            self.deliver()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.came is not None:
            self.came = number
            self.deliver()
        self.came = number

    def deliver(self) -> None:
        """Do what the signal that waits would have done; nothing if none does.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SystemExit: for SIGTERM, with code 143, where nobody handled it before.
        """
        number, self.came = self.came, None
        if number is None:
            return
        before = self._before.get(number)
        ours = isinstance(getattr(before, "__self__", None), Interrupts)
        if callable(before) and not ours:
            before(number, None)  # `default_int_handler` raises; one of the user's may go on
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
