"""Command lines: the options of a command are the parameters of a function, their help is what its docstring says.

A command's module ends with `run`. What takes long to import is imported by its function, so that --help is quick.
Ctrl-C ends a command with one line and status 130, a second one at once, whatever the command is doing.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import inspect
import logging as python_logging
import os
import pathlib
import platform
import re
import select
import signal
import sys
import threading
import time
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

import detclipv2_jax
from detclipv2_jax import bucket_store, buckets, files
from detclipv2_jax.chips import has_nvidia_gpu

INTERRUPTED = 128 + signal.SIGINT  # what shells give a command that the signal ended
GRACE_S = 3.0  # after Ctrl-C, for a command to end by itself
_ENDING = {at_once: threading.Lock() for at_once in (False, True)}
_IS_NEEDED = threading.Event()
_EXTRAS = {"tensorflow_datasets": "prepare", "pyarrow": "prepare"}  # what brings a module that few commands need
Command = Callable[..., Any]


def run(
    command: Command | Mapping[str, Command], *, about: str | None = None, arguments: Sequence[str] | None = None
) -> int:
    """Calls a function with the options of the command line, and prints what it returns if that is text.

    Returns the exit status: what the function returns if that is a number, 0 otherwise.

    An option is a keyword of the function (see `_add_options`); what is wrong with a value is a ValueError, which ends
    the command with one line and status 1, as an OSError does, and whatever says that a disk is full.

    Args:
      command: the function, or several of which the first argument names one.
      about: what --help says of the whole.
      arguments: in place of those that the program was started with.
    """
    if arguments is None:
        with contextlib.suppress(RuntimeError, ValueError, AttributeError):  # no stderr
            faulthandler.enable()
        logging.use_absl_handler()
        logging.set_verbosity(logging.WARNING)
        flags.FLAGS.mark_as_parsed()  # absl's own, which libraries read
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only of what is C++ in JAX and TensorFlow
        # that CUDA cannot start is no error where there is no GPU
        python_logging.getLogger("jax._src.xla_bridge").addFilter(
            lambda record: "plugin configuration error" not in record.getMessage() or has_nvidia_gpu()
        )
        # a process beside the workers removes what an interrupted command leaves of them, and would warn of it
        given = os.environ.get("PYTHONWARNINGS")
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (given, "ignore:resource_tracker")))
    from_start = signal.getsignal(signal.SIGINT) is detclipv2_jax.stop
    try:
        if from_start:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        function, options = parse(command, about=about, arguments=sys.argv[1:] if arguments is None else arguments)
        with _watched(), buckets.arguments_here(options) as found:
            result = function(**found)
    except KeyboardInterrupt:
        end("stopped by Ctrl-C")
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        print(f"error: {error}: pip install 'detclipv2_jax[{_EXTRAS[error.name]}]'", file=sys.stderr)
        return 1
    except Exception as error:
        is_full = bool(files.no_room(error))
        if not is_full and not isinstance(error, (ValueError, OSError, bucket_store.BucketError)):
            raise
        print(f"error: {error}{'; make room there, or write elsewhere' * is_full}", file=sys.stderr)
        return 1
    finally:
        if from_start:  # nothing is at work any more
            signal.signal(signal.SIGINT, detclipv2_jax.stop)
    if isinstance(result, str):
        print(result)
    return result if isinstance(result, int) else 0


def end_last() -> None:
    """Lets this process, which others cannot do without, end after them when all get Ctrl-C."""
    _IS_NEEDED.set()


def end(message: str, *, at_once: bool = False) -> NoReturn:
    """Ends the process with one line; neither threads nor worker processes are waited for."""
    if not _ENDING[at_once].acquire(blocking=False):
        time.sleep(3 * GRACE_S)  # another thread does it
    _flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())
    if _IS_NEEDED.is_set() and not at_once:
        time.sleep(GRACE_S + 1)
    os._exit(INTERRUPTED)


def leave(status: int) -> NoReturn:
    """Ends the process with a status; threads, which Python would wait for, are not waited for."""
    _flush()
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Ends the process where its main thread does not hear of Ctrl-C: in a compiler, or waiting for another process.

    After the first one it has `GRACE_S`, unless it handles the signal itself; a second one ends it at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    except ValueError:  # not the main thread, which gets the signals
        before = None

    def watch() -> None:
        num, wait_s = 0, None
        while True:
            if not select.select([reader], [], [], wait_s)[0]:
                end("stopped by Ctrl-C")
            if not (received := os.read(reader, 1)):
                return os.close(reader)
            num += received[0] == signal.SIGINT
            if num > 1:
                end("stopped by Ctrl-C at once", at_once=True)
            handled = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            wait_s = None if handled or not num else GRACE_S

    def show(unraisable: sys.UnraisableHookArgs) -> None:
        # Ctrl-C in a callback of the collector, say, from which nothing is raised: `watch` ends the process
        if unraisable.exc_type is not KeyboardInterrupt:
            shown(unraisable)

    shown, sys.unraisablehook = sys.unraisablehook, show
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        sys.unraisablehook = shown
        if before is not None:
            signal.set_wakeup_fd(before)
        os.close(writer)


def parse(
    command: Command | Mapping[str, Command], *, about: str | None, arguments: Sequence[str]
) -> tuple[Command, dict[str, Any]]:
    """Returns the function that the arguments choose and its options; ends the process if they are wrong."""
    program = getattr(sys.modules["__main__"], "__spec__", None)
    name = program.name.removesuffix(".__main__") if program else "detclipv2_jax"
    style: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=about, **style)
    if isinstance(command, Mapping):
        kinds = parser.add_subparsers(metavar="KIND", required=True)
        for kind, function in command.items():
            text = (inspect.getdoc(getattr(function, "func", function)) or "").partition("\nArgs:")[0].strip()
            _add_options(kinds.add_parser(kind, help=text.partition("\n")[0], description=text, **style), function)
    else:
        _add_options(parser, command)
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option != "--words":
            for part in (value if equals else argument).split(","):
                files.check_here(part.strip("([ '\""), where=option if equals else "argument")
    known, rest = parser.parse_known_args(arguments)
    options = vars(known)
    function = options.pop("function")
    _keep_compiled(options.pop("compilation_cache", None))
    if unknown := [argument for argument in rest if not argument.startswith(("--config.", "--noconfig."))]:
        parser.error(f"unexpected argument {unknown[0]!r}; quote words and patterns that hold spaces")
    if isinstance(options.get("config"), _ConfigFile):
        options["config"] = configuration([f"--config={config_file(options['config'])}", *rest])
    elif rest:
        parser.error(f"{rest[0]} needs a configuration: --config=FILE")
    return function, options


def _add_options(parser: argparse.ArgumentParser, function: Command) -> None:
    """Adds an option for every keyword of a function that nobody bound yet.

    One without default must be given. A bool is --NAME or --noNAME, a tuple a list with commas, a list an option that
    may be given several times, a configuration a file, whose values --config.KEY=VALUE replaces.
    """
    parser.set_defaults(function=function)
    if {"config", "checkpoint"} & inspect.signature(function).parameters.keys():
        text = "folder of compiled programs, which are not compiled again; none: no folder (default: the variable "
        text += "JAX_COMPILATION_CACHE_DIR, or one in ~/.cache/detclipv2_jax)"
        parser.add_argument("--compilation_cache", metavar="PATH", help=text)
    described = inspect.getdoc(getattr(function, "func", function)) or ""
    arguments = re.split(r"\n\w+:\n", described.partition("\nArgs:\n")[2])[0]
    texts = {name: " ".join(text.split()) for name, text in re.findall(r"^  (\w+): (.*(?:\n    .*)*)", arguments, re.M)}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if name in getattr(function, "keywords", {}):
            continue
        required, default = parameter.default is parameter.empty, parameter.default
        kind = parameter.annotation
        if get_origin(kind) is types.UnionType:  # X | None
            kind = get_args(kind)[0]
        text = texts.get(name, "").replace("%", "%%")
        if not required and default not in (None, "", False, (), []):
            text += f" (default: {default})"
        options: dict[str, Any] = {"help": text, "required": required, "default": None if required else default}
        if kind is bool:
            parser.add_argument(f"--{name}", f"--no{name}", action=_Switch, nargs=0, **options)
        elif get_origin(kind) is Literal:
            parser.add_argument(f"--{name}", choices=get_args(kind), **options)
        elif get_origin(kind) is list:
            parser.add_argument(f"--{name}", action="append", metavar="TEXT", **options)
        elif get_origin(kind) is tuple:
            options["type"] = lambda text: tuple(filter(None, text.split(",")))
            parser.add_argument(f"--{name}", metavar="A,B,…", **options)
        elif kind is ConfigDict:
            parser.add_argument(f"--{name}", type=_ConfigFile, metavar="FILE[:VARIANT]", **options)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}.get(kind, "PATH")
            parser.add_argument(f"--{name}", type=kind, metavar=metavar, **options)


def _keep_compiled(folder: str | None) -> None:
    """Chooses the folder of compiled programs for JAX, which is not imported yet.

    By default each kind of processor has its own: a program for one may not run on another that shares the home.
    """
    if folder and bucket_store.place(folder):
        raise ValueError(f"--compilation_cache={folder} must be on this machine")
    if folder is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = "" if folder == "none" else os.path.abspath(folder)
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError, IndexError):
            flags_of = pathlib.Path("/proc/cpuinfo").read_text().partition("flags")[2].splitlines()[0]
            kind = f"{platform.machine()}-{zlib.crc32(flags_of.encode()):08x}"
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path.home() / ".cache/detclipv2_jax/compiled" / kind)


class _Switch(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, _: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class _ConfigFile(str):
    """The file of a configuration that is still to be read."""


def config_file(given: str) -> str:
    """Returns FILE[:VARIANT], where FILE may be the name of a configuration that comes with the package."""
    name, colon, variant = given.partition(":")
    package = pathlib.Path(__file__).parent
    if not re.fullmatch(r"\w+", name) or pathlib.Path(name).is_file():
        return given
    folders = (package / "configs", package.parent / "configs")  # of a wheel, of a checkout
    names = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.py")}
    if name not in names:
        raise ValueError(
            f"--config={given}: there is no such file, and no configuration {name}: {', '.join(sorted(names))}"
        )
    return f"{names[name]}{colon}{variant}"


def configuration(arguments: Sequence[str]) -> ConfigDict:
    """Returns the configuration of --config=FILE with the values of --config.key=value.

    They win over those of `config.chips`. A wrong key or a missing file ends in one line, not in a traceback.
    """
    values = flags.FlagValues()
    try:
        given = ["program", *arguments]
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=given)
        values(given)
        config = values.config
        overridden = config_flags.get_override_values(values["config"])
        # a file that could not be loaded shows only now, when something is read from it
        for chip in config.chips:
            config.chips[chip] = tuple(pair for pair in config.chips[chip] if pair[0] not in overridden)
        return config
    except (AttributeError, KeyError) as error:
        # it may hold another error's repr
        words = str(error.args[0]).strip("'").replace("\\n", " ").replace("\\'", "'")
        sys.exit(f"error: unknown configuration key: {' '.join(words.split())}")
    except (flags.Error, OSError, ValueError, TypeError) as error:
        # ml_collections puts a whole traceback into the message; its last line says what was wrong
        sys.exit(f"error: the configuration cannot be loaded: {str(error).strip().splitlines()[-1]}")
