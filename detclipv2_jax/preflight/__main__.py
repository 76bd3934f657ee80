"""Compiles every step of a run for accelerators that are not there, and checks its data: before a machine is rented.

  python -m detclipv2_jax.preflight --config=configs/swin_t.py --topology=v5e:4x8 [--topology=h100:8]

Topologies are v4, v5e, v5p or v6e with the shape of the slice, or a100_40gb, a100_80gb, h100, h200, b200, l4, a10g,
rtx4080, rtx4090 or rtx5090 with the number of GPUs (h100:8, rtx4090:1). Programs need the compiler of the installed
jax, and no accelerator: `pip install 'jax[tpu]==VERSION'`, `pip install jax-cuda13-{plugin,pjrt}==VERSION`.
Each program is compiled by a process of its own, one after the other, and kept by the hash of what was lowered.

Prints, in Markdown, what is wrong with the data, and the memory, arithmetic, traffic and least time of every step, from
which the least chip-hours of the whole run follow; with --by=module also which part of the model moves how much. Exit
status 1: a step does not fit or something is wrong with the data.
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Literal

from ml_collections import ConfigDict

from detclipv2_jax import commands


def main(
    *,
    config: ConfigDict,
    topology: list[str],
    only: tuple[str, ...] = (),
    cache: pathlib.Path = pathlib.Path("~/.cache/detclipv2_jax/preflight"),
    data: bool = True,
    by: Literal["step", "module"] = "step",
    output: pathlib.Path | None = None,
) -> int:
    """Prints the report; returns 1 unless all is well.

    Args:
      config: configuration, e.g. configs/swin_t.py
      topology: e.g. v5e:4x8 or h100:8; may be given several times
      only: steps to compile, by the beginning of their names: detection,image_text/320x320
      cache: folder of results
      data: check the files of the data sets; --nodata plans with what was published
      by: module: add a table of what each module of a step moves
      output: file for the report, too
    """
    # not the TPU of the machine it may run on, which takes one process at a time
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from detclipv2_jax.preflight import report

    text, well = report.run(
        config, topology, only=only, cache=cache.expanduser(), check_data=data, by_module=by == "module"
    )
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    return int(not well)


if __name__ == "__main__":
    sys.exit(commands.run(main, about=__doc__))
