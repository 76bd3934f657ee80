"""Converts a public checkpoint into a file that a run starts from, and back.

  python -m detclipv2_jax.convert PART --input=FILE --output=FILE.safetensors [--layout=LAYOUT]

| PART      | layouts, recognised by their names                                          | goes in               |
|-----------|-----------------------------------------------------------------------------|-----------------------|
| swin      | microsoft (the Swin repository), timm, torchvision, transformers            | config.init_from.swin |
| clip_text | openai, open_clip, transformers, each alone or with the image tower         | config.init_from.text |

--input is a .safetensors file, or with PyTorch installed a .pth, .pt or .bin file, from which plain weights are read
and no code is run. Whatever is missing, unexpected or of another shape is an error that lists it. Windows and the 77
positions of CLIP stay as they are: a run fits them to its model when it starts (`runs/pretrained.py`). The text
tower computes QuickGELU, as OpenAI's weights need; names do not tell weights trained with plain GELU (LAION's).

With --layout, a file with our names is written for that library instead; the numbers are the same, bit for bit.
"""

from __future__ import annotations

import sys

from absl import app, flags

from detclipv2_jax import convert, interrupts


@interrupts.in_one_line
def _main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError(f"give one PART of {', '.join(convert.PARTS)}; got {argv[1:]}")
    values = flags.FLAGS
    try:
        print(convert.run(argv[1], source=values.input, output=values.output, layout=values.layout))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "checkpoint to read", required=True)
    flags.DEFINE_string("output", None, ".safetensors file to write", required=True)
    flags.DEFINE_string("layout", "", "of --output, for the way back: microsoft, timm, torchvision, transformers, …")
    app.run(_main)
