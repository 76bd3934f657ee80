"""An export is read back as it was written, by name from a hub too, and what is wrong with one is said in one error."""

import fnmatch
import http.server
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading

import flax
import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from detclipv2_jax import config_json
from detclipv2_jax.eval import loop
from detclipv2_jax.export import __main__ as export
from detclipv2_jax.export import card, programs
from detclipv2_jax.inference import Predictor
from detclipv2_jax.models import detclip
from detclipv2_jax.runs import checkpoints, exported, hub, state
from detclipv2_jax.runs.state import TrainState

WORDS = {"red car": "", "café": "a place", "東京": ""}
TEXT = ", ".join(f"{name}: {definition}" for name, definition in WORDS.items())
SCORES = [("AP", 50.5), ("APr", 25.0), ("APc", 0.0)]  # of the run; what was not measured is left out
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(scope="module")
def run(micro_session, tmp_path_factory):
    """The workdir of a run with one checkpoint, scored."""
    workdir, config = tmp_path_factory.mktemp("runs") / "run", micro_session.copy_and_resolve_references()
    config.name, config.init_from.text = "a: [name]", "clip.safetensors"
    config.detection.data, config.scenes.num_detection = ("data/objects365",), 0
    model = detclip.from_config(config.model)
    params = jax.jit(lambda key: state.init_params(model, key, context_length=16))(jax.random.key(0))
    (workdir / "eval").mkdir(parents=True)
    (workdir / "config.json").write_text(config_json.to_json(config))
    protocol = {"ap": "LVIS v1", "annotations": "data/lvis/min\u2028i.json", "nms_iou": 0.6, "unheard of": 1}
    scores = {"AP": 0.5054, "APr": 0.25, "APc": 0.0, "APf": -1.0, "APl": 0.5, "found": 1.0, "protocol": protocol}
    (workdir / "eval" / "step_00000007_scores.json").write_text(json.dumps(scores))
    manager = checkpoints.Checkpoints(workdir, keep=1)
    manager.save(7, TrainState(step=jax.numpy.int32(7), params=params, opt_state=(), ema=None))
    manager.close()
    return workdir


@pytest.fixture(scope="module")
def checkpoint(run):
    return Predictor.from_checkpoint(run, keep_vocabularies=False)


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8).repeat(20, axis=0).repeat(20, axis=1)


@pytest.fixture(scope="module")
def folders(run, tmp_path_factory):
    """An export of each type of weights."""
    found = {dtype: tmp_path_factory.mktemp("exports") / dtype for dtype in TYPES}
    for dtype, folder in found.items():
        given = {"license": "apache-2.0"} if dtype == "float32" else {}
        export.run(checkpoint=str(run), format="hub", output=str(folder), words=TEXT, weights=dtype, **given)
    return found


@pytest.fixture
def folder(folders, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(folders["float32"], tmp_path / "model")


def same(found, expected):
    for name in ("boxes", "scores", "labels", "vocabulary"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert len(expected.scores) > 5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
def test_an_export_finds_what_the_checkpoint_cast_so_finds(folders, checkpoint, photo, dtype):
    folder = folders[dtype]
    with safe_open(folder / "weights.safetensors", framework="np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {  # noqa: SIM118  (not a dict)
            {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
        }
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".md", ".safetensors", ".safetensors"]
    found = Predictor.from_pretrained(folder)
    assert (found.step, found.words) == (7, WORDS)
    cast = jax.tree.map(lambda x: np.asarray(x).astype(TYPES[dtype]).astype(np.float32), checkpoint.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, cast)
    assert config_json.to_json(found.config) == config_json.to_json(checkpoint.config)
    expected = Predictor(checkpoint.config, checkpoint.detector.model, cast)
    if dtype != "float32":  # the same program
        found.detector = expected.detector = checkpoint.detector
    same(found(photo), expected(photo, WORDS))


def test_every_reader_of_checkpoints_takes_an_export(folders, checkpoint, tmp_path, photo):
    read = loop.Checkpoint.load(folders["float32"])
    jax.tree.map(np.testing.assert_array_equal, read.params, checkpoint.params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), checkpoint.params)
    checkpoints.check_start(folders["bfloat16"], checkpoint.config.model, shapes)
    with pytest.raises(ValueError, match=r"(?s)init_from.checkpoint .*unexpected .*head"):
        checkpoints.check_start(folders["bfloat16"], checkpoint.config.model, {"swin": shapes["swin"]})
    export.run(checkpoint=str(folders["float32"]), format="safetensors", output=str(tmp_path / "again"))
    first, again = (exported.load(folder) for folder in (folders["float32"], tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert again.words == first.words == WORDS
    np.testing.assert_array_equal(again.embeddings, first.embeddings)
    predictor = Predictor.from_checkpoint(folders["float32"], keep_vocabularies=False)
    with pytest.raises(ValueError, match="words must be a list of words"):
        predictor(photo, "")


@pytest.mark.slow
def test_an_export_is_read_without_what_trains(folders, checkpoint, photo, tmp_path):
    blocked = ("grain", "clu", "orbax", "tqdm", "tensorflow", "matplotlib", "pycocotools", "huggingface_hub")
    Image.fromarray(photo).save(tmp_path / "photo.png")
    code = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {blocked}:
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
        import numpy as np
        from detclipv2_jax.inference import Predictor
        found = Predictor.from_pretrained(sys.argv[1])(sys.argv[2])
        np.savez(sys.argv[3], boxes=found.boxes, scores=found.scores, labels=found.labels, vocabulary=found.vocabulary)
        try:
            Predictor.from_pretrained("user/name")
        except ValueError as error:
            print(error)
    """
    line = [sys.executable, "-c", textwrap.dedent(code), folders["float32"], tmp_path / "photo.png", tmp_path / "a.npz"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "user/name is no folder here, and models of the hub need huggingface_hub: pip install"
    )
    stored, own = np.load(tmp_path / "a.npz"), checkpoint(photo, WORDS)
    np.testing.assert_array_equal(np.sort(stored["labels"]), np.sort(own.labels))
    # another number of threads may round otherwise
    np.testing.assert_allclose(stored["scores"], own.scores, atol=1e-5)
    assert stored["vocabulary"].tolist() == list(WORDS)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def hollow(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def rename(folder, old, new):
    (folder / old).rename(folder / new)


def reshape(folder):
    weights = load_file(folder / "weights.safetensors")
    weights["logit_bias"] = weights["logit_bias"].reshape(1)
    weights["head/more"] = weights.pop("head/scores_bias") if "head/scores_bias" in weights else np.zeros(2, np.float32)
    save_file(weights, folder / "weights.safetensors")


def retype(folder, dtype, factor=1):
    weights = load_file(folder / "weights.safetensors")
    changed = np.asarray(weights["logit_bias"] * factor, dtype)
    save_file(weights | {"logit_bias": changed}, folder / "weights.safetensors")


def nest(folder):
    weights = load_file(folder / "weights.safetensors")
    save_file(weights | {"logit_bias/a": np.zeros(1, np.float32)}, folder / "weights.safetensors")


def index(folder, content):
    (folder / "weights.safetensors").unlink()
    (folder / "weights.safetensors.index.json").write_text(json.dumps(content))


def configure(folder, **values):
    content = json.loads((folder / "config.json").read_text())
    content["model"] |= values
    (folder / "config.json").write_text(json.dumps(content))


def listed(folder, **values):
    path = folder / "vocabulary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def embed(folder, embeddings):
    save_file({"embeddings": embeddings}, folder / "vocabulary.safetensors")


AGAIN = "damaged or half downloaded; download or export it again"
DAMAGES = {
    "cut weights": (lambda f: cut(f / "weights.safetensors"), rf"weights\.safetensors cannot be read .*{AGAIN}"),
    # as long as it must be, and never written to the end
    "half a download": (lambda f: hollow(f / "weights.safetensors"), rf"weights that are not those that .*{AGAIN}"),
    "no numbers": (lambda f: retype(f, np.float32, np.nan), rf"weights that are no finite numbers; .*{AGAIN}"),
    "a pointer": (
        lambda f: (f / "weights.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        rf"weights\.safetensors cannot be read .*{AGAIN}",
    ),
    "only a card": (
        lambda f: [path.unlink() for path in f.iterdir() if path.suffix != ".md"],
        rf"has no weights\.safetensors, only README\.md: it is {AGAIN}",
    ),
    "an unfinished file": (
        lambda f: rename(f, "weights.safetensors", "weights.safetensors.incomplete"),
        r"has no weights\.safetensors, only README\.md, config\.json, .*weights\.safetensors\.incomplete",
    ),
    "a folder for a file": (
        lambda f: ((f / "weights.safetensors").unlink(), (f / "weights.safetensors").mkdir()),
        rf"has no weights\.safetensors, only .*{AGAIN}",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"it has no config\.json; give .* an export"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json must be an object of sections"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), r"config\.json is no valid json"),
    "sizes": (lambda f: configure(f, embed_dim=1 << 40), r"config\.model\.embed_dim is 1099511627776"),
    "no model": (lambda f: configure(f, dtype="float7"), r"no model has the values of config\.model \(.+\)"),
    "another model": (
        lambda f: configure(f, embed_dim=32), r"(?s)does not fit the model .*reshaped .*\(16, 16\) -> \(16, 32\)",
    ),
    "other weights": (reshape, r"(?s)does not fit the model .*unexpected \(1\): head/more.*logit_bias \(1,\) -> \(\)"),
    "integers": (lambda f: retype(f, np.int32), r"another type than float32, bfloat16, float16: logit_bias \(int32\)"),
    "doubles": (lambda f: retype(f, np.float64), r"another type than .*: logit_bias \(float64\); write"),
    "nested": (nest, "logit_bias is a weight and holds others"),
    "a missing shard": (
        lambda f: index(f, {"weight_map": {"a": "weights-00001-of-00002.safetensors"}}),
        rf"has no weights-00001-of-00002\.safetensors, only .*{AGAIN}",
    ),
    "an index of elsewhere": (lambda f: index(f, {"weight_map": {"a": "../a.safetensors"}}), "files beside it"),
    "an empty index": (lambda f: index(f, {"weight_map": {}}), "has no weight_map"),
    "an index that is none": (lambda f: index(f, ["a"]), "has no weight_map"),
    "a word twice": (lambda f: listed(f, words=["a", "a", "b"]), r"vocabulary\.json is no vocabulary \(words must be"),
    "a word too few": (lambda f: listed(f, words=["a", "b"]), r"vocabulary\.json is no vocabulary \(zip"),
    "a blank word": (lambda f: listed(f, words=["a", " ", "b"]), r"vocabulary\.json is no vocabulary \(words must"),
    "numbers for words": (lambda f: listed(f, words=[1, 2, 3]), r"vocabulary\.json is no vocabulary"),
    "half a vocabulary": (lambda f: (f / "vocabulary.json").unlink(), rf"vocabulary\.json is no vocabulary .*{AGAIN}"),
    "other embeddings": (
        lambda f: embed(f, np.zeros((3, 4), np.float32)),
        r"vocabulary\.safetensors holds float32\[3, 4\], not finite numbers float32\[3, 16\]",
    ),
    "double embeddings": (
        lambda f: embed(f, np.zeros((3, 16))),
        r"vocabulary\.safetensors holds float64\[3, 16\], not finite numbers float32\[3, 16\]",
    ),
    "infinite embeddings": (
        lambda f: embed(f, np.where(np.eye(3, 16, k=7), np.inf, 1).astype(np.float32)),
        "not finite numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_one_error(folder, damage):
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        Predictor.from_pretrained(folder)


def test_weights_in_several_files(folder, checkpoint):
    weights = load_file(folder / "weights.safetensors")
    names = {name: f"weights-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(names.values()):
        part = {name: weights[name] for name in weights if names[name] == file}
        save_file(part, folder / file, metadata={"step": "9" * 40, "sha256": "of this part alone"})
    index(folder, {"metadata": {}, "weight_map": names})
    assert exported.is_export(folder)
    found = exported.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, checkpoint.params)
    assert found.step == 0  # what is stored is no number of steps
    for text, step in (("9" * 15, 10**15 - 1), ("1" * 16, 0), ("-1", 0), ("", 0)):
        save_file({"a": np.zeros(1, np.float32)}, folder / "weights.safetensors", metadata={"step": text})
        assert exported._read_weights(folder)[1] == step


def test_the_hash_of_weights_is_of_names_types_shapes_and_values_in_any_order():
    a, b = np.arange(6, dtype=np.float32), np.ones(3, np.float32)
    whole = exported._digest({"a": a, "b": b})
    assert exported._digest({"b": b, "a": a}) == whole
    others = ({"a": a, "c": b}, {"a": a.reshape(2, 3), "b": b}, {"a": a.view(np.int32), "b": b}, {"a": a, "b": b + 1})
    assert whole not in {exported._digest(weights) for weights in others}


def test_words_without_embeddings_are_no_vocabulary(checkpoint, tmp_path):
    exported.save(tmp_path, config=checkpoint.config, params={"a": np.zeros(1)}, step=3, words=WORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "weights.safetensors"]
    assert exported._read_weights(tmp_path)[1] == 3


def test_a_folder_with_checkpoints_is_a_run(folder, run):
    assert exported.is_export(folder)
    assert not exported.is_export(run)
    (folder / "checkpoints").mkdir()
    assert not exported.is_export(folder)
    with pytest.raises(
        ValueError, match=r"has no weights\.safetensors.* give the workdir .* to Predictor\.from_checkp"
    ):
        Predictor.from_pretrained(run)


def test_a_number_too_large_for_a_type_is_named():
    with pytest.raises(ValueError, match="a/b has numbers too large for float16; give another --weights"):
        exported.cast({"a": {"b": np.array([1.0, 1e5], np.float32)}}, "float16")
    assert np.isinf(exported.cast({"a": np.array([np.inf], np.float32)}, "float16")["a"]).all()
    assert exported.cast({"a": np.array([1e5], np.float32)}, "bfloat16")["a"].dtype == ml_dtypes.bfloat16


def test_stored_weights_are_rounded_once(checkpoint, tmp_path):
    rounded = programs.stored(checkpoint, weights="bfloat16", dtype="bfloat16")
    programs.write_model(tmp_path, rounded, words=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "weights.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, exported.load(tmp_path).params, rounded.params)
    assert rounded.config.model.dtype == rounded.detector.model.dtype == "bfloat16"
    assert checkpoint.config.model.dtype == "float32"
    assert state.checked_model(rounded.config, rounded.params, what="it", folder="here") == rounded.detector.model
    flat = flax.traverse_util.flatten_dict(rounded.params, sep="/")
    assert {value.dtype.name for value in flat.values()} == {"float32"}
    assert rounded.step == checkpoint.step == 7


def test_the_card_says_what_the_run_says(folders, checkpoint):
    text = (folders["float32"] / "README.md").read_text()
    front, body = text.split("---\n")[1:3]
    about = yaml.safe_load(front)
    assert about["license"] == "apache-2.0"
    assert about["pipeline_tag"] == "zero-shot-object-detection"
    (result,) = about["model-index"][0]["results"]
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == SCORES
    num = sum(value.size for value in jax.tree.leaves(checkpoint.params))
    for part in (
        "# a: [name]", "| training | 7 steps |", "| detection data | data/objects365 |", "| licence | apache-2.0 |",
        "| started from | clip.safetensors |", "| vocabulary | 3 words",
        f"| model | {num:,} parameters, stored as float32 |",
        "| AP | APr | APc |", "| 50.5 | 25.0 | 0.0 |", "* ap: LVIS v1", "* nms_iou: 0.6",
    ):  # fmt: skip
        assert part in body, part
    assert "unheard of" not in body


def test_the_card_names_all_data_and_what_the_training_started_from(micro):
    micro.detection.annotations, micro.detection.data = "a.json", ("data/b", "data/c")
    micro.scenes.num_detection, micro.scenes.num_grounding = 1200, 0
    with micro.grounding.ignore_type():
        micro.grounding.annotations, micro.grounding.data = "", "data/d"  # as in configurations of old runs
    micro.image_text.pairs, micro.image_text.data, micro.scenes.num_image_text = "e.tsv", (), 0
    micro.init_from.swin, micro.init_from.text = "swin.safetensors", "clip.safetensors"
    assert sorted(card._data(micro)) == [
        "| detection data | a.json, data/b, data/c, 1,200 generated scenes |",
        "| grounding data | data/d |",
        "| image-text data | e.tsv |",
        "| started from | swin.safetensors, clip.safetensors |",
    ]


def test_without_a_licence_there_is_no_such_field(folders):
    text = (folders["bfloat16"] / "README.md").read_text()
    assert "license" not in yaml.safe_load(text.split("---\n")[1])
    assert ", of the weights in float32 that became bfloat16:" in text
    assert "| licence | none was named when this was exported: ask whoever gave it to you |" in text


@pytest.mark.parametrize("name", ["unknown", "none", "Apache 2.0", "", "a\nb"])
def test_what_names_no_licence(name):
    with pytest.raises(ValueError, match=r"names no licence; give its identifier"):
        card.check_license(name)
    card.check_license("cc-by-nc-4.0")


def test_the_hub_reads_the_card(folders):
    library = pytest.importorskip("huggingface_hub")
    for dtype, license in (("float32", "apache-2.0"), ("bfloat16", None)):
        data = library.ModelCard.load(folders[dtype] / "README.md").data
        assert (data.license, data.library_name, data.model_name) == (license, "detclipv2_jax", "a: [name]")
        assert [(one.metric_type, one.metric_value) for one in data.eval_results] == SCORES


def test_a_run_without_scores_or_with_others(run, checkpoint, tmp_path):
    options = {"license": "", "weights": "float32", "words": None}
    assert "No scores of step 7 lay beside" in card.write(checkpoint, tmp_path, **options)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "step_00000007_scores.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no scores with their protocol"):
        card.write(checkpoint, tmp_path, **options)


def test_options_of_the_hub_are_of_its_format(run, tmp_path):
    options = {"checkpoint": str(run), "output": str(tmp_path / "new")}
    for given in ({"license": "mit"}, {"push": "a/b"}, {"private": True}):
        with pytest.raises(ValueError, match="are of --format=hub, not of safetensors"):
            export.run(format="safetensors", **options, **given)
    for form, weights in (("safetensors", "float16"), ("hub", "int8")):
        with pytest.raises(ValueError, match=f"--weights={weights} is not of --format={form}: hub stores float32, "):
            export.run(format=form, weights=weights, **options)
    with pytest.raises(ValueError, match=r"--license=Apache 2\.0 names no licence"):
        export.run(format="hub", license="Apache 2.0", **options)
    with pytest.raises(ValueError, match=r"--push=a must be USER/NAME"):
        export.run(format="hub", push="a", **options)
    assert not (tmp_path / "new").exists()


# --- the hub


@pytest.fixture
def server(folders, tmp_path, monkeypatch):
    """A hub on this machine with the model user/model; it returns what was asked for."""
    library = pytest.importorskip("huggingface_hub")
    asked, files = [], {path.name: path.read_bytes() for path in folders["float32"].iterdir()}
    files["weights.py"] = b"raise RuntimeError"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(path := self.path.partition("?")[0])
            parts = path.strip("/").split("/")
            body, status = b"{}", 404
            if parts[:4] == ["api", "models", "user", "model"]:
                listing = [
                    {"type": "file", "oid": name, "size": len(data), "path": name} for name, data in files.items()
                ]
                answer = listing if parts[4] == "tree" else {"id": "user/model", "sha": "a" * 40}
                body, status = json.dumps(answer).encode(), 404 if parts[-1] == "none" else 200
            elif parts[:3] == ["user", "model", "resolve"]:
                body, status = files[parts[-1]], 200
            self.send_response(status)
            if status == 404:
                code = "RevisionNotFound" if parts[-1] == "none" else "RepoNotFound"
                self.send_header("X-Error-Code", code)
            self.send_header("ETag", f'"{parts[-1]}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{served.server_port}"
    threading.Thread(target=served.serve_forever, daemon=True).start()
    download = library.snapshot_download

    def from_here(name, **options):
        return download(name, endpoint=address, cache_dir=tmp_path / "cache", token=False, **options)

    monkeypatch.setattr(library, "snapshot_download", from_here)
    yield asked
    served.shutdown()
    served.server_close()


def test_a_model_by_name_is_downloaded_once_without_code(server, checkpoint):
    found = Predictor.from_pretrained("user/model")
    jax.tree.map(np.testing.assert_array_equal, found.params, checkpoint.params)
    assert "/user/model/resolve/" + "a" * 40 + "/weights.safetensors" in server
    assert not any("weights.py" in path for path in server)
    server.clear()
    assert (hub.local_folder("user/model") / "config.json").is_file()
    assert not any("resolve" in path for path in server)


def test_names_that_the_hub_does_not_have(server):
    with pytest.raises(ValueError, match=r"user/none is no folder here, and the hub shows you no model of that name"):
        Predictor.from_pretrained("user/none")
    with pytest.raises(ValueError, match=r"user/model is no folder here, and .* has no revision none"):
        Predictor.from_pretrained("user/model", revision="none")


@pytest.mark.parametrize("name", ["nowhere", "/a/b", "a/b/c", "../nowhere", "user/..", "a b/c", ""])
def test_what_is_neither_a_folder_nor_a_name(name, tmp_path):
    with pytest.raises(ValueError, match=r"is no folder; give the folder of an export, or USER/NAME"):
        Predictor.from_pretrained(tmp_path / "a" if name == "nowhere" else name or tmp_path / "none")


@pytest.mark.parametrize("source", [None, 7, b"user/model"])
def test_what_is_no_name_at_all(source):
    with pytest.raises(ValueError, match=rf"^{source!r} is no folder; give the folder of an export, or USER/NAME"):
        Predictor.from_pretrained(source)


def test_a_file_of_that_name_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("user").mkdir()
    pathlib.Path("user/model").write_text("")
    with pytest.raises(ValueError, match="user/model is no folder; give the folder of an export"):
        hub.local_folder("user/model")


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    library = pytest.importorskip("huggingface_hub")
    download = library.snapshot_download
    options = {"endpoint": "http://127.0.0.1:9", "cache_dir": tmp_path, "token": False}
    monkeypatch.setattr(library, "snapshot_download", lambda name, **given: download(name, **given | options))
    with pytest.raises(ValueError, match=r"user/model is no folder here, and the hub fails .*: check the network, or"):
        Predictor.from_pretrained("user/model")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("RevisionNotFoundError", "has no revision v2"),
        ("GatedRepoError", "gives it to those who asked"),
        ("RepositoryNotFoundError", "shows you no model of that name"),
        ("HFValidationError", "shows you no model of that name"),
        ("OSError", "the hub fails (OSError: the first line): check the network"),
    ],
)
def test_what_an_error_of_the_hub_means(kind, told):
    class_of = {"GatedRepoError": (type("RepositoryNotFoundError", (Exception,), {}),)}  # as the library has it
    error = type(kind, class_of.get(kind, (Exception,)), {})("the first line\nmore")
    assert told in hub._explained(error, "v2")


def test_a_folder_is_pushed(folders, monkeypatch, run, tmp_path, capsys):
    library, calls = pytest.importorskip("huggingface_hub"), []

    class Hub:
        def create_repo(self, name, **options):
            if name == "user/forbidden":
                raise PermissionError("not yours")
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr(library, "HfApi", Hub)
    output = tmp_path / "out"
    export.run(checkpoint=str(run), format="hub", output=str(output), push="user/model", private=True)
    assert calls[0] == ("user/model", {"private": True, "exist_ok": True})
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("user/model", pathlib.Path(output))
    patterns = calls[1]["allow_patterns"]
    weights = ["weights-00001-of-00002.safetensors", "weights.safetensors.index.json"]  # of a larger model
    for name in (*(path.name for path in folders["float32"].iterdir()), *weights):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
    assert not any(fnmatch.fnmatch(name, pattern) for name in ("weights.py", "notes.txt") for pattern in patterns)
    assert hub.push(output, "user/open", private=False) == "https://hub/user/open"
    assert calls[2] == ("user/open", {"private": False, "exist_ok": True})
    printed = capsys.readouterr().out
    assert printed.endswith("https://hub/user/model\n")
    assert "note: the card names no licence" in printed
    with pytest.raises(
        ValueError, match=r"--push=user/forbidden: the hub fails .*not yours.*; the export itself is whole"
    ):
        hub.push(output, "user/forbidden", private=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"--push needs huggingface_hub: pip install 'detclipv2_jax\[hub\]'"):
        hub.check_push("user/model")
