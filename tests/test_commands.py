"""How commands end; what their options are is tested with each of them."""

import os
import threading

from detclipv2_jax import commands


def test_the_process_that_others_need_ends_after_them(monkeypatch, capfd):
    slept = []
    monkeypatch.setattr(commands.time, "sleep", slept.append)
    monkeypatch.setattr(commands, "_IS_NEEDED", threading.Event())
    monkeypatch.setattr(os, "_exit", lambda status: slept.append(f"exit {status}"))

    def end():
        monkeypatch.setattr(commands, "_ENDING", threading.Lock())
        commands.end("over")

    end()
    assert slept == [f"exit {commands.INTERRUPTED}"]
    commands.end_last()
    end()
    assert slept[1:] == [commands.GRACE_S + 1, f"exit {commands.INTERRUPTED}"]
    assert capfd.readouterr().err == "over\nover\n"
