"""Evaluation in 2 processes with 4 devices each equals one process; this file is also the program of a process."""

import json
import pathlib
import sys

import jax
import planted
import pytest
import two_processes

from detclipv2_jax.eval import loop
from detclipv2_jax.inference import Detector
from detclipv2_jax.runs.sharding import make_mesh


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    dataset = planted.write_dataset(tmp_path / "set", num_images=11)
    truth = json.loads(dataset.read_text())
    for image in truth["images"]:
        image |= {"neg_category_ids": [3], "not_exhaustive_category_ids": []}
    federated = dataset.with_name("federated.json")
    federated.write_text(json.dumps(truth))
    outputs = two_processes.outputs_of(__file__, dataset, federated, tmp_path, timeout_s=240)
    for path in (dataset, federated):
        expected = run(path, tmp_path / "one" / path.stem)
        for output in outputs:
            printed = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            (found,) = (row["scores"] for row in printed if row["name"] == path.stem)
            assert found == pytest.approx(expected, abs=1e-12)
        folders = [tmp_path / name / path.stem / "eval" for name in ("one", "two")]
        one, two = (json.loads((folder / "step_00000002_detections.json").read_text()) for folder in folders)
        assert one == two


def run(dataset, workdir):
    """Returns the scores of the planted model; every process of a run calls it."""
    config, model, params = planted.make()
    config.eval.update({"annotations": str(dataset), "images": str(dataset.parent / "images")})
    config.eval.update({"batch_size": 8, "num_pictures": 0, "max_detections": 20})
    return loop.make(config, Detector(model, mesh=make_mesh()), workdir)(params, step=2)


def main(address, process_id, *datasets, folder):
    jax.distributed.initialize(address, num_processes=2, process_id=process_id)
    for path in map(pathlib.Path, datasets):
        print(json.dumps({"name": path.stem, "scores": run(path, pathlib.Path(folder) / "two" / path.stem)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], folder=sys.argv[5])
