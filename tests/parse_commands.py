"""Parses commands as their programs would, without running them: a JSON list of argument lists in, of results out.

Each command has a process of its own, forked when the large libraries are imported, since flags are global.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import runpy
import sys
from typing import Any

from ml_collections import ConfigDict

import detclipv2_jax.eval.loop  # most of what the programs import  # noqa: F401
from detclipv2_jax import commands, config_json, train, validation  # noqa: F401


class Parsed(BaseException):
    """The command is parsed; the program must not go on."""


def parse(module: str, arguments: list[str]) -> dict[str, Any]:
    """Returns {"error"}, or what the program makes of a command; {} of a script with a parser of its own."""
    found: dict[str, Any] = {}
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *given, **options):
        parse_args(parser, *given, **options)
        raise Parsed

    def run(command, *, about):
        _, options = commands.parse(command, about=about, arguments=arguments)
        config = options.get("config")
        if isinstance(config, ConfigDict):
            validation.validate(config, num_devices=1)
            workdir = options.get("workdir") or f"runs/{config.name}"
            found.update(config=config_json.to_json(config), workdir=workdir, mode=options.get("mode"))
        raise Parsed

    argparse.ArgumentParser.parse_args, commands.run = parse_and_stop, run  # type: ignore[method-assign]
    sys.argv = [module, *arguments]
    for folder in ("benchmarks", "demo"):  # scripts import what lies beside them
        sys.path.insert(0, str(pathlib.Path(__file__).parent / folder))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    except Parsed:
        return found
    except SystemExit as stop:
        return {"error": f"{stop.code}\n{said.getvalue()}"}
    except ValueError as error:
        return {"error": str(error)}
    return {"error": "it parses no flags"}


def in_own_process(module: str, arguments: list[str]) -> dict[str, Any]:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with os.fdopen(writing, "w") as file:
            json.dump(parse(module, arguments), file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)


if __name__ == "__main__":
    results = [in_own_process(module, arguments) for module, *arguments in json.load(sys.stdin)]
    print(json.dumps(results))
