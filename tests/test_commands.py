"""One command with all others, what all of them do with their options, and how they end."""

import errno
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from typing import Any, Literal

import pytest

import detclipv2_jax
from detclipv2_jax import __main__ as detclip
from detclipv2_jax import commands, validation
from detclipv2_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "detclipv2_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_help_ends_quietly_where_nobody_reads_its_end():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "detclipv2_jax", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_signals_wake_the_watch_of_a_command_and_nothing_else_afterwards():
    before = signal.set_wakeup_fd(-1)
    with commands._watched():
        pipe = signal.set_wakeup_fd(-1)
        assert pipe >= 0
        signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
    assert signal.set_wakeup_fd(before) == -1


def test_ctrl_c_in_a_callback_leaves_no_traceback(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))

    class Raises:
        def __init__(self, error):
            self.error = error

        def __del__(self):
            raise self.error

    def both():
        for error in (KeyboardInterrupt, OSError):
            Raises(error)

    with commands._watched():
        both()
    assert told == [OSError]
    both()
    assert told == [OSError, KeyboardInterrupt, OSError]


def test_help_names_every_command_and_each_is_a_program():
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout == run().stdout
    for name, (module, text) in detclip.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert text in done.stdout
        assert importlib.util.find_spec(f"detclipv2_jax.{module}")
        path = ROOT / "detclipv2_jax" / module.replace(".", "/")
        program = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert 'if __name__ == "__main__"' in program.read_text()


def test_options_reach_the_command():
    done = run("eval.names", "--help")
    assert done.returncode == 0
    assert "usage: python -m detclipv2_jax.eval.names" in done.stdout
    assert "--workdir" in run("train", "--help").stdout
    done = run("predict", "--checkpoint=x")
    assert done.returncode == 2
    assert "the following arguments are required: --images, --output" in done.stderr


def test_eval_is_the_other_mode(monkeypatch):
    ran = []
    monkeypatch.setattr(detclip.runpy, "run_module", lambda name, **_: ran.append((name, sys.argv[1:])))
    for arguments in (["eval", "--config=x"], ["train", "--config=x"], ["eval.coco", "--help"]):
        monkeypatch.setattr(sys, "argv", ["detclip", *arguments])
        detclip.main()
    assert ran == [
        ("detclipv2_jax.main", ["--mode=eval", "--config=x"]),
        ("detclipv2_jax.main", ["--config=x"]),
        ("detclipv2_jax.eval.coco", ["--help"]),
    ]


def test_an_unknown_command_is_named():
    done = run("trian")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no command 'trian'; there are train, eval, predict,")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config=demo", "--workdir=az://bucket/run"],
        ["train", "--config=demo", "--workdir", "hf://bucket/run"],
        ["train", "--config=demo", "--config.image_text.data=hf://set"],
        ["predict", "--checkpoint=hdfs://bucket/run", "--images=x", "--output=y", "--words=x"],
        ["prepare", "coco_json", "--input=https://host/a.json", "--output=x"],
    ],
)
def test_what_is_not_on_this_machine_is_refused_by_name(arguments, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    place = next(part for part in arguments if "://" in part)
    assert done.stderr.startswith("error: ")
    assert f"{place.partition('=')[2] or place} is neither on this machine nor in a bucket" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_place_elsewhere_in_a_configuration_is_refused():
    config = config_lib.base()
    config.detection.data = ("data/a", "gs://bucket/a", "hf://bucket/b")
    config.scenes.folder = "gs://bucket/scenes"
    with pytest.raises(ValueError, match=r"config.detection.data=hf://bucket/b is neither on this machine") as error:
        validation.validate(config, num_devices=1)
    assert "config.scenes.folder is gs://bucket/scenes; scenes are generated into a folder of this" in str(error.value)
    assert "bucket/a" not in str(error.value)


def test_words_may_look_like_places():
    def command(*, words: str, output: str):
        """Does nothing."""

    _, options = commands.parse(command, about="", arguments=["--words=http://x", "--output=a:b//c"])
    assert options == {"words": "http://x", "output": "a:b//c"}


@pytest.mark.parametrize(
    "argument", ["--output=file:///x", "--output=gs:/x", "--many=a,hdfs://x", "--names=('a', 'hf://x',)", "http://x"]
)
def test_what_is_elsewhere_is_said_before_what_is_missing(argument):
    with pytest.raises(ValueError, match="is neither on this machine nor in a bucket"):
        commands.parse(everything, about="", arguments=[argument])  # without --words


def everything(
    *, words: str, count: int = 0, share: float = 0.5, deep: bool = True, flat: bool = False,
    names: tuple[str, ...] = (), many: list[str] | None = None, kind: Literal["a", "b"] = "a",
    output: pathlib.Path | None = None, fails: str = "",
) -> Any:  # fmt: skip
    """Does all.

    Args:
      words: what is
        asked, 100%
      count: how many
    """
    if fails:
        raise {"value": ValueError, "file": FileNotFoundError, "type": TypeError, "ctrl-c": KeyboardInterrupt}[fails](
            "so it is"
        )
    return count if words == "status" else f"{words} {count} {share} {deep} {flat} {names} {many} {kind} {output}"


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ([], "x 0 0.5 True False () None a None"),
        (["--nodeep", "--flat", "--count=3", "--share=2"], "x 3 2.0 False True () None a None"),
        (["--deep", "--noflat", "--names=a,,b,", "--kind=b"], "x 0 0.5 True False ('a', 'b') None b None"),
        (["--many=a", "--many=b,c", "--output=a/b"], "x 0 0.5 True False () ['a', 'b,c'] a a/b"),
    ],
)
def test_options_become_the_values_that_a_function_names(arguments, printed, capsys):
    assert commands.run(everything, arguments=["--words=x", *arguments]) == 0
    assert capsys.readouterr().out == f"{printed}\n"


def test_ctrl_c_ends_a_command_after_what_it_waits_for(monkeypatch):
    """The watch gets the numbers of signals through a pipe, as Python writes them there."""
    ended, is_over = [], threading.Event()

    def end(message, *, at_once=False):
        ended.append(at_once)
        is_over.set()
        if threading.current_thread() is threading.main_thread():
            raise SystemExit

    monkeypatch.setattr(commands, "end", end)
    for grace_s, received, at_once in (
        (0.0, [signal.SIGTERM, signal.SIGTERM, signal.SIGINT], False),
        (60.0, [signal.SIGINT, signal.SIGTERM, signal.SIGINT], True),
    ):
        monkeypatch.setattr(commands, "GRACE_S", grace_s)
        with commands._watched():
            pipe = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
            os.write(pipe, bytes(received))
            assert is_over.wait(10)
        assert ended == [at_once]
        is_over.clear()
        ended.clear()
    with pytest.raises(SystemExit):
        commands.run(everything, arguments=["--words=x", "--fails=ctrl-c"])
    assert ended == [False]


def test_ctrl_c_is_heard_while_a_command_is_at_work_and_ends_it_quietly_before_and_after():
    before, during = signal.getsignal(signal.SIGINT), []
    try:
        for handler in (detclipv2_jax.stop, signal.SIG_IGN):
            signal.signal(signal.SIGINT, handler)
            commands.run(lambda: during.append(signal.getsignal(signal.SIGINT)), arguments=[])
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert during == [signal.default_int_handler, signal.SIG_IGN]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "error: [Errno 28] No space left on device; make room there, or write elsewhere",
        ),
        (
            RuntimeError("No space left on device"),
            "error: No space left on device; make room there, or write elsewhere",
        ),
        (ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"), "pip install 'detclipv2_jax[prepare]'"),
    ],
)
def test_what_a_person_can_mend_is_one_line(error, said, capsys):
    def command():
        raise error

    assert commands.run(command, arguments=[]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(said)


def test_other_modules_that_are_missing_are_a_fault_of_the_program():
    def command():
        raise ModuleNotFoundError("No module named 'jaxx'", name="jaxx")

    with pytest.raises(ModuleNotFoundError):
        commands.run(command, arguments=[])


def test_how_a_command_ends(capsys):
    assert commands.run(everything, arguments=["--words=status", "--count=7"]) == 7
    for fails in ("value", "file"):
        assert commands.run(everything, arguments=["--words=x", f"--fails={fails}"]) == 1
        assert capsys.readouterr().err == "error: so it is\n"
    with pytest.raises(TypeError):  # a fault of the program
        commands.run(everything, arguments=["--words=x", "--fails=type"])
    for arguments, message in (
        ([], "required: --words"),
        (["--words=x", "--kind=c"], "invalid choice: 'c'"),
        (["--words=x", "--cou=3"], "unexpected argument '--cou=3'; quote words"),  # no abbreviations
        (["--words=x", "red"], "unexpected argument 'red'"),
        (["--words=x", "--config.seed=1"], "--config.seed=1 needs a configuration: --config=FILE"),
    ):
        with pytest.raises(SystemExit, match="2"):
            commands.run(everything, arguments=arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        commands.run({"first": everything}, arguments=["first", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--words TEXT what is asked, 100% " in shown
    assert "--count N how many " in shown
    assert "--share X (default: 0.5)" in shown
    assert "--deep, --nodeep (default: True)" in shown
    assert "--names A,B,…" in shown


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_configuration_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "good.py").write_text(
        "from detclipv2_jax import config\ndef get_config():\n    c = config.base()\n"
        "    c.chips.h100 = (('seed', 5), ('epochs', 7))\n    return c\n"
    )
    (tmp_path / "bad.py").write_text("def get_config():\n    raise ValueError('no\\nsuch world')\n")
    config = commands.configuration([f"--config={tmp_path}/good.py", "--config.seed=3"])
    assert (config.seed, config.chips.h100) == (3, (("epochs", 7),))  # the command line wins
    for arguments, message in (
        (["bad.py"], "error: the configuration cannot be loaded: such world"),
        (["none.py"], "error: the configuration cannot be loaded: .*none.py"),
        (["good.py", "--config.sed=3"], "error: unknown configuration key: .*sed"),
        (["good.py", "--config.seed=x"], "error: the configuration cannot be loaded: .*seed"),
    ):
        with pytest.raises(SystemExit, match=message):
            commands.configuration([f"--config={tmp_path}/{arguments[0]}", *arguments[1:]])


@pytest.mark.parametrize(
    ("arguments", "variable", "expected"),
    [
        ([], None, "~/.cache/detclipv2_jax/compiled/"),
        ([], "/mine", "/mine"),
        (["--compilation_cache=there"], "/mine", "{cwd}/there"),
        (["--compilation_cache=none"], "/mine", ""),
    ],
)
def test_where_compiled_programs_are_kept(arguments, variable, expected, monkeypatch):
    def command(*, checkpoint: str = ""):
        """Does nothing."""

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    if variable:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable)
    _, options = commands.parse(command, about="", arguments=arguments)
    assert options == {"checkpoint": ""}
    with pytest.raises(ValueError, match="--compilation_cache=gs://bucket/x must be on this machine"):
        commands.parse(command, about="", arguments=["--compilation_cache=gs://bucket/x"])
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    expected = expected.replace("~", str(pathlib.Path.home())).format(cwd=os.getcwd())
    assert folder == expected or (expected.endswith("/") and re.fullmatch(rf"{expected}\w+-[0-9a-f]{{8}}", folder))


def test_the_version():
    assert run("--version").stdout.strip() == detclipv2_jax.__version__ == importlib.metadata.version("detclipv2_jax")


def test_configurations_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "configs").glob("*.py"):
        assert commands.config_file(path.stem) == str(path)
        assert commands.config_file(f"{path.stem}:some") == f"{path}:some"
    assert commands.config_file("configs/demo.py") == "configs/demo.py"
    (tmp_path / "swin_t").mkdir()  # a folder is no configuration
    assert commands.config_file("swin_t") == str(ROOT / "configs" / "swin_t.py")
    (tmp_path / "demo").write_text("")
    assert commands.config_file("demo") == "demo"  # the user's own file
    with pytest.raises(
        ValueError, match=r"--config=nope: there is no such file, and no configuration nope: coco_json, "
    ):
        commands.config_file("nope")


def test_a_wheel_s_configurations_come_before_a_checkout_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "site" / "detclipv2_jax"
    for folder in (package / "configs", package.parent / "configs"):
        folder.mkdir(parents=True)
        (folder / "demo.py").write_text("")
        (folder / "notes.txt").write_text("")
    monkeypatch.setattr(commands, "__file__", str(package / "commands.py"))
    assert commands.config_file("demo") == str(package / "configs" / "demo.py")
    with pytest.raises(ValueError, match=r"no configuration notes: demo$"):
        commands.config_file("notes")


def test_the_process_that_others_need_ends_after_them(monkeypatch, capfd):
    slept = []
    monkeypatch.setattr(commands.time, "sleep", slept.append)
    monkeypatch.setattr(commands, "_IS_NEEDED", threading.Event())
    monkeypatch.setattr(os, "_exit", lambda status: slept.append(f"exit {status}"))

    def end():
        monkeypatch.setattr(commands, "_ENDING", (threading.Lock(), threading.Lock()))
        commands.end("over")

    end()
    assert slept == [f"exit {commands.INTERRUPTED}"]
    commands.end_last()
    end()
    assert slept[1:] == [commands.GRACE_S + 1, f"exit {commands.INTERRUPTED}"]
    assert capfd.readouterr().err == "over\nover\n"


def test_a_process_that_leaves_has_said_all_and_waits_for_no_thread():
    code = "import threading, time\nfrom detclipv2_jax import commands\n"
    code += "threading.Thread(target=lambda: (time.sleep(5), print('late'))).start()\n"
    code += "print('said', end='')\ncommands.leave(7)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "said")


@pytest.mark.parametrize("there", [True, False])
def test_cuda_that_cannot_start_is_no_error_without_a_gpu(there, tmp_path):
    plugin = tmp_path / "jax_plugins" / "xla_cuda99"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("def initialize():\n    raise RuntimeError('Unable to load CUDA')\n")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nexit {0 if there else 9}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    code = "from detclipv2_jax import chips, commands\nchips.os.path.exists = lambda path: False\n"
    code += "def run():\n    import jax\n    return jax.default_backend()\nraise SystemExit(commands.run(run))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("JAX_PLATFORMS")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "cpu\n", done.stderr
    assert ("Unable to load CUDA" in done.stderr) == there
    assert there or not done.stderr
