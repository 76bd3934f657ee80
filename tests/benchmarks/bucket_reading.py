"""Images a second of batches from a bucket beside local files: photos in folders, and built sets.

Run: `python -m tests.benchmarks.bucket_reading [--images=256] [--bucket=gs://bucket/folder]`. Without --bucket a server
of S3's kind that answers after 30 ms, in a process of its own, and the servers of the tests stand for buckets, on this
machine; they are written in Python and have a bound of their own, which is printed: objects a second that are read and
not used. Seconds are of the clock.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import http.server
import multiprocessing
import os
import pathlib
import socket
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import bucket_servers
import building
import portpicker
from micro import micro_config

from detclipv2_jax import bucket_store, buckets
from detclipv2_jax.bucket_store import place
from detclipv2_jax.data import scenes
from detclipv2_jax.data.streams import train_streams

SIZE_PX = 320
LATENCY_S = 0.03


class Late(http.server.SimpleHTTPRequestHandler):
    """Gives the files of a folder as objects of S3's kind, each after a while."""

    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

    def log_message(self, *_):
        pass

    def do_GET(self):
        time.sleep(LATENCY_S)
        content = pathlib.Path(self.translate_path(self.path)).read_bytes()
        self.send_response_only(200)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class LateServer(http.server.ThreadingHTTPServer):
    request_queue_size = 128


def serve(folder: pathlib.Path, port: int) -> None:
    with LateServer(("127.0.0.1", port), functools.partial(Late, directory=str(folder))) as server:
        server.serve_forever()


def world(folder: pathlib.Path, num_images: int) -> None:
    """Writes photos, annotations and built sets of both kinds."""
    sizes = {"num_detection": num_images, "num_image_text": num_images, "num_grounding": 0, "num_eval": 0}
    scenes.write(folder, size_px=SIZE_PX, **sizes)
    for kind, file in (("coco_json", "detection.json"), ("image_text", "pairs.tsv")):
        options = {"images": str(folder), "shard_size": num_images // 4}
        building.build(kind, input=str(folder / file), output=str(folder / "built" / kind), **options)


def rates(where: str, *, is_built: bool) -> dict[str, float]:
    """Returns seconds until streams are open, and the images a second of an epoch of each kind."""
    c = micro_config()
    c.scenes.num_detection = c.scenes.num_grounding = c.scenes.num_image_text = c.scenes.num_eval = 0
    c.detection.batch_size = c.image_text.batch_size = 16
    if is_built:
        c.detection.data, c.image_text.data = (f"{where}/built/coco_json",), (f"{where}/built/image_text",)
    else:
        c.detection.annotations, c.image_text.pairs = f"{where}/detection.json", f"{where}/pairs.tsv"
        c.detection.images = c.image_text.images = where
    c.detection.canvases = c.image_text.canvases = ((SIZE_PX, SIZE_PX),)
    for section in (c.detection, c.image_text):
        section.short_side, section.long_side = (SIZE_PX, SIZE_PX), SIZE_PX
    start = time.perf_counter()
    streams = train_streams(buckets.localized(c))
    found = {"open_s": time.perf_counter() - start}
    for stream in streams:
        start = time.perf_counter()
        with contextlib.closing(stream.iterate()) as batches:
            for _ in range(stream.num_batches):
                next(batches)
        found[stream.kind.value] = stream.num_batches * stream.batch_size / (time.perf_counter() - start)
    return found


def show(what: str, found: dict[str, float]) -> None:
    print(
        f"{what:32} opened in {found['open_s']:5.1f} s; detection {found['detection']:5.0f} images/s, "
        f"pairs {found['image_text']:5.0f} images/s",
        flush=True,
    )


def compare(folder: pathlib.Path, where: str) -> None:
    """Prints what is read of a bucket, for the first time and again, after uploading a world."""
    target = place(where)
    start = time.perf_counter()
    num = buckets.upload(folder, target)
    print(f"{target.scheme}: {num} files uploaded, {num / (time.perf_counter() - start):.0f} a second")
    names = [target.below(name) for name in bucket_store.names_below(target) if name.endswith(".jpg")]
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(bucket_store.read, names))
    print(f"{target.scheme}: {len(names) / (time.perf_counter() - start):.0f} photos a second are read and not used")
    for is_built in (False, True):
        for when in ("first", "again"):
            show(f"{target.scheme}, {'built sets' if is_built else 'photos'}, {when}", rates(where, is_built=is_built))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--bucket", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        at = pathlib.Path(folder)
        world(at / "world", options.images)
        for is_built in (False, True):
            show(f"local {'built sets' if is_built else 'photos'}", rates(str(at / "world"), is_built=is_built))
        os.environ["DETCLIP_BUCKET_CACHE"] = str(at / "cache")
        if options.bucket:
            compare(at / "world", options.bucket)
            return
        port = portpicker.pick_unused_port()
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(at, port), daemon=True)
        process.start()
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)
        os.environ.update(bucket_servers.CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
        for when in ("first", "again"):
            show(f"after {LATENCY_S * 1e3:.0f} ms, photos, {when}", rates("s3://world", is_built=False))
        process.kill()
        for scheme in ("gs", "s3"):
            server = stack.enter_context(bucket_servers.served(scheme))
            os.environ.update(server.environment())
            compare(at / "world", bucket_servers.url(scheme, "bench"))


if __name__ == "__main__":
    main()
