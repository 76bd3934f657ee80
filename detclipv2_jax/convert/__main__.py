"""Converts a public checkpoint into a file that a run starts from, and back.

  python -m detclipv2_jax.convert KIND --input=FILE --output=FILE.safetensors [--layout=LAYOUT]

| KIND      | layouts, recognised by their names                                          | goes in               |
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

import functools
import sys

from detclipv2_jax import commands, convert

if __name__ == "__main__":
    towers = {part: functools.partial(convert.run, part) for part in convert.PARTS}
    sys.exit(commands.run(towers, about=__doc__))
