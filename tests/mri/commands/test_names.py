"""Names of files that mean something to the screen, or nothing in its encoding."""

import io
import os
from pathlib import Path

from rich.table import Table

from applications.command_line import console, progress_bars, say, shown

NAMES = ["b].h5", "[/].h5", "[red]a.h5", ":smile:.h5", "caf\udce9.h5", "a\x1b[2Jb.h5", "a\rb.h5"]


def test_a_name_is_shown_as_it_is_and_what_no_screen_takes_as_an_escape():
    assert [shown(name) for name in NAMES[:4]] == NAMES[:4]
    assert shown("caf\udce9.h5") == "caf\\udce9.h5"
    assert shown("a\x1b[2Jb\r") == "a\\x1b[2Jb\\r"
    assert shown(os.fsdecode(b"\xff")) == "\\udcff"


def test_every_way_to_the_screen_takes_every_name(monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(console, "_file", written)  # None otherwise: what sys.stdout is
    monkeypatch.setattr(console, "_width", 200)
    for name in NAMES:
        table = Table(title=name)
        table.add_column(name)
        table.add_row(name)
        console.print(table)
        console.print(f"Results  {Path(name)}")
        say(f"Images   {name}")
        with progress_bars() as report:
            report(f"reconstructing {name}", 0.5)
            report("more", 1.0)
    written.flush()
    text = written.buffer.getvalue().decode("utf-8")
    for name in NAMES:
        assert text.count(shown(name)) >= 5, name
    assert "\x1b[2J" not in text
