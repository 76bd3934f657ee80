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


def test_compiled_programs_have_a_folder_for_each_kind_of_processor(monkeypatch, tmp_path):
    name = "JAX_COMPILATION_CACHE_DIR"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, "given")
    commands.keep_compiled(None)
    assert os.environ[name] == "given"
    commands.keep_compiled("none")
    assert os.environ[name] == ""
    monkeypatch.chdir(tmp_path)
    commands.keep_compiled("own")
    assert os.environ[name] == str(tmp_path / "own")
    monkeypatch.delenv(name)
    commands.keep_compiled(None)
    if name in os.environ:  # where processors are described
        assert os.environ[name].startswith(str(tmp_path / ".cache/detclipv2_jax/compiled"))
