"""Size, latency and fidelity of the exports of a checkpoint.

    python tests/benchmarks/export.py --checkpoint=RUN --images=PHOTO,PHOTO [--words="cat, red car"] [--batch_sizes=1,4]

Photos must go on one canvas of the run. Every export is run from disk in a process without the package; differences are
the largest from the predictor's boxes (as shares of the photo's sides) and scores. "first" compiles.
"""

import argparse
import pathlib
import sys
import tempfile
import time

sys.path.append(str(pathlib.Path(__file__).parents[1] / "export"))
import exported

from detclipv2_jax.export import __main__ as export
from detclipv2_jax.inference import Predictor, parse_words


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--words", default="person, dog, red car")
    parser.add_argument("--batch_sizes", default="1,4")
    parser.add_argument("--formats", default="safetensors,stablehlo,saved_model,onnx")
    options = parser.parse_args()
    predictor, words = Predictor.from_checkpoint(options.checkpoint), parse_words(options.words)
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    photos = options.images.split(",")[: max(sizes)]
    row = "{:12} {:>9} {:>9} {:>6} {:>8} {:>9} {:>9} {:>14} {:>8}".format
    print(row("", "export, s", "size, MB", "images", "load, s", "first, s", "then, s", "boxes differ", "scores"))
    with tempfile.TemporaryDirectory() as temporary:
        for file_format in options.formats.split(","):
            folder = pathlib.Path(temporary) / file_format
            start = time.perf_counter()
            given = options.words if file_format == "safetensors" else ""
            export.run(checkpoint=options.checkpoint, format=file_format, output=str(folder), words=given)
            files = [path for path in folder.rglob("*") if path.is_file()]
            written = f"{time.perf_counter() - start:.1f}", f"{sum(path.stat().st_size for path in files) / 1e6:.1f}"
            if file_format == "safetensors":
                print(row(file_format, *written, *[""] * 6))
                continue
            for size in sizes:
                arrays = exported.arguments(predictor, photos[:size], words)
                found = exported.run(file_format, folder, arrays, pathlib.Path(temporary))
                seconds = (f"{found[name]:.3f}" for name in ("load_s", "first_s", "next_s"))
                expected = predictor(photos[:size], words, batch_size=size)
                differ = (f"{value:.1e}" for value in exported.differences(found, expected))
                print(row(file_format, *written, size, *seconds, *differ))


if __name__ == "__main__":
    main()
