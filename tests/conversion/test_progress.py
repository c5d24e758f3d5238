"""The line that a terminal gets when a conversion takes long."""

import io
import sys
import time

from attnres_fx.conversion import progress
from attnres_fx.conversion.progress import Progress


class Terminal(io.StringIO):
    def __init__(self, tty=True):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


def stands_in_for_stderr(monkeypatch, tty=True):
    """Not a fixture: pytest puts its own stream in place between a fixture and its test."""
    made = Terminal(tty)
    monkeypatch.setattr(sys, "stderr", made)
    return made


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_what_takes_long_is_said_and_then_every_step(monkeypatch):
    terminal = stands_in_for_stderr(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    with Progress("Llama") as shown:
        shown.step("capturing it")
        wait_for(terminal.getvalue)
        shown.step("comparing it")
    assert terminal.getvalue().splitlines() == [
        "attnres_fx: Llama: capturing it …",
        "attnres_fx: Llama: comparing it …",
    ]


def test_nothing_is_said_of_what_is_done_in_time_or_where_nobody_looks(monkeypatch):
    terminal = stands_in_for_stderr(monkeypatch)
    with Progress("Llama") as shown:
        shown.step("capturing it")
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    terminal = stands_in_for_stderr(monkeypatch, tty=False)
    with Progress("Llama") as shown:
        shown.step("capturing it")
        time.sleep(0.1)
    assert terminal.getvalue() == ""
