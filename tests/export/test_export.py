"""Exports are run from disk in processes without the package, and find what the model finds."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import exported
import flax
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import save_file

from detclipv2_jax.data import tokenizer, transforms
from detclipv2_jax.export import __main__ as export
from detclipv2_jax.export import programs, scripts
from detclipv2_jax.export.scripts import detector
from detclipv2_jax.export.scripts import weights as loader
from detclipv2_jax.inference import Predictor
from detclipv2_jax.models import detclip

WORDS = {"person": "a human being", "red car": "", "café": "", "dog's bowl": "", "東京": ""}
NUM_PHOTOS = 3
TEXT = ", ".join(f"{name}: {definition}" for name, definition in WORDS.items())
LIMITS = {"max_detections": 50, "nms_iou": 0.5}


@pytest.fixture(scope="module")
def predictor(micro_session):
    """The real architecture with random values, on two canvases."""
    config = micro_session.copy_and_resolve_references()
    config.eval.canvases = ((96, 64), (64, 96))
    config.eval.short_side, config.eval.long_side = 64, 96
    model = detclip.from_config(config.model)
    image, extent = np.zeros((1, 64, 96, 3), np.uint8), np.array([[64, 96]], np.int32)
    init = jax.jit(lambda key: model.init(key, image, extent, tokenizer.tokenize(["cat"]), train=False)["params"])
    return Predictor(config, model, init(jax.random.key(0)), step=7)


@pytest.fixture(scope="module", autouse=True)
def _modules_are_traced_once():
    made, make = [], programs.make_modules

    def make_once(*arguments):
        made.extend([] if made else [make(*arguments)])
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "make_modules", make_once)
        yield


@pytest.fixture(scope="module")
def photos(request, tmp_path_factory):
    """Landscape photographs, painted ones where there are none."""
    try:
        files = sorted((request.getfixturevalue("shared_data") / "coco_eval" / "images").iterdir())
    except pytest.skip.Exception:
        rng, files = np.random.default_rng(0), []
        for i in range(NUM_PHOTOS):
            pixels = rng.integers(0, 256, (6, 9 - i % 2, 3), dtype=np.uint8).repeat(70, axis=0).repeat(70, axis=1)
            files.append(tmp_path_factory.mktemp("photos") / f"{i}.png")
            Image.fromarray(pixels).save(files[-1])
    everything = (photo.pixels for photo in map(transforms.read, files))
    landscape = (pixels for pixels in everything if pixels.shape[0] < pixels.shape[1])
    return list(itertools.islice(landscape, NUM_PHOTOS))


@pytest.fixture(scope="module")
def expected(predictor, photos):
    """What the predictor finds, and the arguments of an export that must find the same."""
    found = predictor(photos, WORDS, batch_size=NUM_PHOTOS, **LIMITS)
    return found, exported.arguments(predictor, photos, WORDS), predictor.vocabulary(WORDS)[1][: len(WORDS)]


def _export(predictor, monkeypatch, folder, file_format, **options):
    monkeypatch.setattr(Predictor, "from_checkpoint", lambda workdir: predictor)
    export.run(checkpoint="run", format=file_format, output=str(folder), **options)
    return folder


def _check(found, expected):
    """Boxes (as shares of the photo's sides), scores and embeddings to 1e-4."""
    own, _, embeddings = expected
    np.testing.assert_allclose(found["embeddings"], embeddings, atol=1e-4)
    assert max(exported.differences(found, own)) < 1e-4
    assert all(len(photo.scores) > 10 for photo in own)


@pytest.mark.slow
def test_weights_and_vocabulary(predictor, monkeypatch, expected, tmp_path):
    folder = _export(predictor, monkeypatch, tmp_path / "out", "safetensors", words=TEXT)
    found = exported.run("safetensors", folder, {}, tmp_path)
    assert found.pop("words").tolist() == list(WORDS)
    assert found.pop("definitions").tolist() == list(WORDS.values())
    np.testing.assert_array_equal(found.pop("embeddings"), expected[2])
    params = flax.traverse_util.flatten_dict(predictor.params, sep="/")
    assert found.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value)
    assert json.loads((folder / "config.json").read_text())["model"]["embed_dim"] == 16
    listed = subprocess.run([sys.executable, "weights.py"], cwd=folder, capture_output=True, text=True, check=True)
    assert "F32 [] logit_bias" in listed.stdout.splitlines()
    assert len(listed.stdout.splitlines()) == len(params)
    line = [sys.executable, "weights.py", "logit_bias"]
    one = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True)
    assert float(one.stdout) == pytest.approx(float(params["logit_bias"]))


def test_scripts_are_short_and_need_little():
    """Fewer than 60 lines each; of third parties the loader needs NumPy and safetensors alone."""
    folder = pathlib.Path(scripts.__path__[0])
    assert all(len((folder / name).read_text().splitlines()) < 60 for name in ("weights.py", "detector.py"))
    code = (
        "import sys, weights; print(sorted({'jax', 'flax', 'tensorflow', 'torch', 'detclipv2_jax'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_reading_allocates_no_more_than_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({f"{i}": np.full((250, 1000), i, np.float32) for i in range(4)}, path)
    tracemalloc.start()
    assert loader.shapes(tmp_path) == {f"{i}": ("F32", (250, 1000)) for i in range(4)}
    assert tracemalloc.get_traced_memory()[1] < 100_000
    assert loader.load(tmp_path)["3"].sum() == 750_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size + 100_000


@pytest.mark.parametrize(
    ("entry", "num_bytes"),
    [
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}, 16),
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}, 16),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, 8),
        ({"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]}, 0),
    ],
)
def test_a_header_that_promises_more_than_the_file_has_is_refused(tmp_path, entry, num_bytes):
    header = json.dumps({"a": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(num_bytes)
    (tmp_path / "weights.safetensors").write_bytes(data)
    for read in (loader.shapes, loader.load):
        with pytest.raises(SafetensorError):
            read(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + header)
    with pytest.raises(SafetensorError):
        loader.shapes(tmp_path)


@pytest.mark.slow
def test_stablehlo(predictor, monkeypatch, expected, tmp_path):
    folder = _export(predictor, monkeypatch, tmp_path / "out", "stablehlo", **LIMITS)
    names = ["detect_64x96.stablehlo", "detect_96x64.stablehlo", "encode_text.stablehlo"]
    assert sorted(path.name for path in folder.glob("*.stablehlo")) == names
    module = jax.export.deserialize(bytearray((folder / names[0]).read_bytes()))
    assert module.platforms == ("cpu", "tpu", "cuda")
    *_, image, _, _, text = module.in_avals
    assert str(image.shape) == "(b, 64, 96, 3)"
    assert str(text.shape) == "(w, 16)"
    found = exported.run("stablehlo", folder, expected[1], tmp_path)
    _check(found, expected)
    assert set(found["labels_of_one"].tolist()) == {1}  # rows that are zero are no words, others are


@pytest.mark.parametrize(("words", "rows"), [(1, 128), (127, 128), (128, 128), (129, 256)])
def test_numbers_of_words_share_a_program(words, rows):
    found = object.__new__(detector.Detector)
    found._weights, found._call = None, {"detect_8x4": lambda *arguments: {"text": arguments[-1]}}
    text = found(np.zeros((1, 8, 4, 3)), [[8, 4]], [[8, 4]], np.ones((words, 2)))["text"]
    np.testing.assert_array_equal(text, (np.arange(rows) < words)[:, None].repeat(2, axis=1))


@pytest.mark.slow
def test_saved_model(predictor, monkeypatch, expected, tmp_path):
    folder = _export(predictor, monkeypatch, tmp_path / "out", "saved_model", **LIMITS)
    found = exported.run("saved_model", folder, expected[1], tmp_path)
    _check(found, expected)
    texts = expected[1]["words"]
    assert [name.decode() for name in found["names"][0][:5]] == texts[found["labels"][0][:5]].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["any photos and words", "fixed photos and own words"])
def test_onnx(predictor, monkeypatch, expected, photos, tmp_path, own):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    given = {"batch_size": NUM_PHOTOS, "bake_words": True} if own else {}
    folder = _export(predictor, monkeypatch, tmp_path / "out", "onnx", words=TEXT, **LIMITS, **given)
    found = exported.run("onnx", folder, expected[1], tmp_path)
    _check({"embeddings": expected[2]} | found, expected)
    from detclipv2_jax.export.scripts import onnx_detector

    detector = onnx_detector.Detector(folder, threads=1, providers=["CPUExecutionProvider"])
    assert detector.words == list(WORDS)
    assert detector.canvases == [(64, 96), (96, 64)]
    written = [path.suffix for path in folder.iterdir() if path.is_file()]
    assert sorted(written) == sorted([*[".onnx"] * (3 - own), *[".npz"] * (not own), ".py"])
    arrays = [expected[1][name] for name in ("image", "extent", "original_size")]
    if own:
        with pytest.raises(ValueError, match="this model has its own words"):
            detector(*arrays, expected[2])
        with pytest.raises(onnxruntime_error(), match="Got: 1 Expected: 3"):
            detector(*(array[:1] for array in arrays))
        return
    np.testing.assert_allclose(detector.text, expected[2], atol=1e-4)
    # one photo alone; 130 rows more, which are no words
    alone = detector(*(array[:1] for array in arrays), np.pad(detector.text, ((130, 0), (0, 0))))
    assert max(exported.differences(alone | {"labels": alone["labels"] - 130}, expected[0][:1])) < 1e-4
    # resized by Pillow
    image, extent, size = detector.place(Image.fromarray(photos[0]))
    np.testing.assert_array_equal([extent[0], size[0]], [arrays[1][0], arrays[2][0]])
    assert np.abs(image[0].astype(int) - arrays[0][0]).mean() < 4.0


def test_functions_have_the_sizes_that_are_asked_for(predictor):
    weights = {"a": np.zeros(2, np.float32)}
    functions = programs.make_functions(predictor, weights, None, images=3, words=5)
    shapes = {name: [shape.shape for shape in rest] for name, (_, (_, *rest)) in functions.items()}
    assert shapes == {
        "encode_text": [(5, 16)],
        "detect_96x64": [(3, 96, 64, 3), (3, 2), (3, 2), (5, 16)],
        "detect_64x96": [(3, 64, 96, 3), (3, 2), (3, 2), (5, 16)],
    }


def test_options_reach_what_writes(predictor, monkeypatch, tmp_path, capsys):
    calls = {}

    def write(folder, *given, **options):
        folder.mkdir()
        (folder / "file").write_bytes(bytes(2_500_000))
        calls[folder.name] = (given[1:], options)

    def portable(predictor, **options):
        calls["portable"] = options
        return predictor

    for name, function in (("write", write), ("write_onnx", write), ("portable", portable)):
        monkeypatch.setattr(programs, name, function)
    (tmp_path / "words.txt").write_text("mug: of mine\n")
    limits = {"score_threshold": 0.125, "nms_iou": 0.375, "max_detections": 7}
    asked = {"words": "unicorn", "words_file": str(tmp_path / "words.txt"), "vocabulary": "coco"}
    _export(predictor, monkeypatch, tmp_path / "a", "stablehlo", dtype="bfloat16", **asked, **limits)
    given, options = calls["a"]
    assert (given, calls["portable"]) == (("stablehlo",), {"dtype": "bfloat16", "branches": True})
    assert {name: getattr(options["limits"], name) for name in limits} == limits
    assert (len(options["words"]), options["words"]["mug"], "unicorn" in options["words"]) == (82, "of mine", True)
    assert capsys.readouterr().out == f"      2.50 MB  {tmp_path}/a/file\n"
    settings = {"batch_size": 2, "bake_words": True, "opset": 20, "weights": "int8"}
    _export(predictor, monkeypatch, tmp_path / "b", "onnx", words=TEXT, **settings)
    given, options = calls["b"]
    assert calls["portable"] == {"dtype": "float32", "branches": False}
    assert options.pop("limits").max_detections == predictor.config.eval.max_detections
    assert options == settings | {"words": WORDS}


def onnxruntime_error():
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    return InvalidArgument


def test_wrong_arguments(predictor, monkeypatch, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output: .*used holds something already; give a new folder"):
        _export(predictor, monkeypatch, tmp_path / "used", "safetensors")
    with pytest.raises(ValueError, match="--words: a SavedModel takes its words when it runs"):
        _export(predictor, monkeypatch, tmp_path / "new", "saved_model", words=TEXT)
    with pytest.raises(ValueError, match=r"nms_iou is 2\.0; it must lie between 0 and 1"):
        _export(predictor, monkeypatch, tmp_path / "new", "stablehlo", nms_iou=2.0)
    for options, message in (
        ({"opset": 17}, r"--opset is 17; this program and onnx .* can write 18 to \d\d"),
        ({"batch_size": -1}, r"--batch_size is -1; give a number of photos, or 0 for any"),
        ({"bake_words": True}, "--bake_words needs words: give --words, --words_file or --vocabulary"),
        ({"dtype": "bfloat16"}, "--dtype=bfloat16: ONNX models compute in float32"),
        ({"weights": "float16"}, r"--weights=float16 is not of --format=onnx: hub stores .*, onnx float32, int8"),
        ({"license": "mit"}, "are of --format=hub, not of onnx"),
    ):
        with pytest.raises(ValueError, match=message):
            _export(predictor, monkeypatch, tmp_path / "new", "onnx", **options)
    for options in ({"opset": 20}, {"batch_size": 2}, {"bake_words": True}):
        with pytest.raises(ValueError, match="are of --format=onnx, not of stablehlo"):
            _export(predictor, monkeypatch, tmp_path / "new", "stablehlo", **options)
    monkeypatch.delattr("detclipv2_jax.export.onnx_model", raising=False)
    monkeypatch.setitem(sys.modules, "detclipv2_jax.export.onnx_model", None)
    with pytest.raises(ValueError, match=r"--format=onnx needs onnx: pip install 'detclipv2_jax\[onnx\]'"):
        programs.write_onnx(tmp_path / "new", predictor, limits=None, words={})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is no workdir: it has no config"):
        export.run(checkpoint=str(tmp_path), format="safetensors", output=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_command_line(tmp_path):
    line = [sys.executable, "-m", "detclipv2_jax.export", f"--checkpoint={tmp_path}", "--format=stablehlo"]
    line += [f"--output={tmp_path / 'new'}", "--words=cat", "--vocabulary=coco"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path} is no workdir: it has no config.json")


@pytest.mark.parametrize(("given", "kept"), [("auto", "xla"), ("pallas", "xla"), ("gather", "gather")])
def test_what_is_exported_has_no_kernels(predictor, given, kept):
    config = predictor.config.copy_and_resolve_references()
    config.model.head.deform_impl = given
    found = programs.portable(Predictor(config, predictor.detector.model, predictor.params, step=7), dtype="bfloat16")
    values = found.config.model
    assert (values.head.deform_impl, values.swin.attention_impl, values.dtype) == (kept, "xla", "bfloat16")
    assert found.detector.model.head["deform_impl"] == kept
    assert config.model.head.deform_impl == given
    assert found.step == 7


def test_what_libraries_say_while_they_load_is_dropped_and_errors_after_it_are_not(capfd):
    @programs.quiet()
    def load():
        os.write(2, b"failed call to cuInit\n")
        raise ImportError

    with pytest.raises(ImportError):
        load()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
