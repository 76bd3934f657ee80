"""All commands: `detclip COMMAND [option …]`, or `python -m detclipv2_jax COMMAND [option …]`.

COMMAND --help explains each, which is also a program of its own: `python -m detclipv2_jax.predict`. --config=NAME,
without a folder, is one of the configurations that come with the package where there is no such file.
"""

from __future__ import annotations

import runpy
import signal
import sys

import detclipv2_jax

COMMANDS = {
    "train": ("main", "trains, and evaluates on the way"),
    "eval": ("main", "evaluates a checkpoint"),
    "predict": ("predict", "finds any words on any images"),
    "interpolate": ("interpolate", "keeps weights between a run and its fine-tune, scored on new and old data"),
    "demo": ("demo", "opens a page for the browser: photos, words, captions, example boxes"),
    "prepare": ("prepare", "builds data sets and dictionaries; shows what training gets"),
    "preflight": ("preflight", "compiles every step for accelerators that are not there, and checks the data"),
    "convert": ("convert", "turns published weights of towers into ours"),
    "export": ("export", "writes a model for other programs"),
    "visualize": ("visualize", "draws detections, alignments and curves"),
    "claims": ("claims", "runs the experiments behind the table of the paper's claims"),
    "eval.coco": ("eval.coco", "scores detections in a file against a COCO json"),
    "eval.lvis": ("eval.lvis", "scores detections in a file against an LVIS json"),
    "eval.names": ("eval.names", "shares of found objects with the right name, from detections in a file"),
    "eval.odinw": ("eval.odinw", "evaluates on the ODinW data sets"),
    "transfer": ("transfer", "fine-tunes on the sets of ODinW or Roboflow and evaluates: zero-shot, few shots, full"),
    "eval.grounding": ("eval.grounding", "evaluates phrases on Flickr30k Entities and RefCOCO"),
}


def usage() -> str:
    """Returns what --help prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([(__doc__ or "").strip(), "", *lines])


def main() -> None:
    """Runs the command that the first argument names, with the others."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads the first lines alone is no error
        print(usage())
    elif name == "--version":
        print(detclipv2_jax.__version__)
    elif name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}; there are {', '.join(COMMANDS)}")
    else:
        if name == "eval":
            arguments.insert(0, "--mode=eval")
        sys.argv[1:] = arguments
        runpy.run_module(f"detclipv2_jax.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
