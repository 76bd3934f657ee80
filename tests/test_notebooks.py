"""The notebooks, run from a clean kernel on the run that DETCLIP_RUN names; `.ci/run` names the demo's."""

import base64
import io
import os
import pathlib
import re
import tempfile

import nbclient
import nbformat
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
# pictures that each shows
PICTURES = {"word_region_alignment": 4, "example_boxes": 3, "look_at_a_batch": 4, "your_own_data": 3}


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs_of(book):
    return [output for cell in book.cells for output in cell.get("outputs", ())]


def num_pictures(book):
    return sum(bool({"image/png", "image/jpeg"} & output.get("data", {}).keys()) for output in outputs_of(book))


def keep(book, path, *, places):
    """Writes a notebook that was run: small pictures, no times, no moving lines, no folders of this machine."""
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        outputs = []
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                if outputs and outputs[-1].output_type == "stream" and outputs[-1].name == output.name:
                    outputs[-1].text += output.text
                    continue
            elif png := output.get("data", {}).pop("image/png", None):
                picture, small = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
                picture.thumbnail((900, 1800))
                picture.save(small, "JPEG", quality=80)
                output["data"] = {"image/jpeg": base64.b64encode(small.getvalue()).decode()}
            outputs.append(output)
        for output in outputs:
            if output.output_type == "stream":
                text = output.text.replace("\r\n", "\n")
                text = re.sub(r"[^\n]*\r|[^\n]*\d+%\|[^\n]*\n?|\x1b\[A", "", text)
                for place in map(str, places):
                    text = text.replace(f"{place}/", "")
                output.text = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", text)
        if "outputs" in cell:
            cell.outputs = [output for output in outputs if output.output_type != "stream" or output.text.strip()]
    nbformat.write(book, path)


def test_every_notebook_is_listed_and_holds_what_it_shows():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(PICTURES)
    for name, num in PICTURES.items():
        book = read(name)
        assert num_pictures(book) == num, f"{name}: run it as `.ci/run` does, with DETCLIP_KEEP=notebooks"
        assert not any(output.output_type == "error" for output in outputs_of(book)), name
        printed = "".join(output.get("text", "") for output in outputs_of(book))
        assert not re.search(r"(?<![\w.~*])/(home|root|tmp|work|usr|var|Users|private)/", printed), name


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_notebook_runs(name, monkeypatch, tmp_path):
    run = os.environ.get("DETCLIP_RUN")
    if not run:
        pytest.skip("set DETCLIP_RUN to the workdir of a run, e.g. of configs/demo.py")
    monkeypatch.setenv("DETCLIP_RUN", str(pathlib.Path(run).absolute()))
    monkeypatch.setenv("DETCLIP_STEPS", "20")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # a kernel of its own: one device, as users have; what is kept is of code as users compile it
    flags = "" if os.environ.get("DETCLIP_KEEP") else re.sub(r"--xla_force\S*", "", os.environ["XLA_FLAGS"])
    monkeypatch.setenv("XLA_FLAGS", flags)
    for folder in ("configs", "notebooks"):  # what the notebook writes goes elsewhere
        (tmp_path / folder).symlink_to(ROOT / folder)
    book = read(name)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert num_pictures(book) == PICTURES[name]
    printed = "".join(output.get("text", "") for output in outputs_of(book))
    assert not re.search("^error: ", printed, re.MULTILINE)  # how our commands end that fail
    if folder := os.environ.get("DETCLIP_KEEP"):
        keep(book, pathlib.Path(folder) / f"{name}.ipynb", places=(tmp_path, ROOT, pathlib.Path.home()))
