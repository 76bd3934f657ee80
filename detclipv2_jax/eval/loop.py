"""Evaluation of a model: predict batch after batch on all devices, gather, score, write."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from detclipv2_jax import files
from detclipv2_jax.data import evaluation_set, tokenizer
from detclipv2_jax.data.concepts import check_classes
from detclipv2_jax.data.definitions import evaluation_notes
from detclipv2_jax.data.schema import Batch
from detclipv2_jax.data.selection import file_name
from detclipv2_jax.data.streams import EvalStream, eval_streams
from detclipv2_jax.eval import coco, lvis, names, proposals
from detclipv2_jax.eval.detections import Found
from detclipv2_jax.eval.result import Parts, Rows, write_detections, write_scores
from detclipv2_jax.inference import WORD_CHUNK, Detections, Detector, Limits, vocabulary
from detclipv2_jax.runs import checkpoints, processes
from detclipv2_jax.runs.sharding import BATCH, REPLICATED, make_mesh, param_shardings
from detclipv2_jax.runs.state import make_model
from detclipv2_jax.visualize import figures

SCORE = "sigmoid(logit) * sigmoid(centerness)"


class Evaluator:
    """Evaluates parameters of one model on `config.eval`; compiled functions and streams live as long as the object."""

    def __init__(
        self, config: ConfigDict, detector: Detector, *, streams: Sequence[EvalStream], workdir: str | pathlib.Path
    ):
        if not streams:
            raise ValueError("nothing to evaluate on: set config.eval.annotations and config.eval.images")
        mesh = detector.mesh or make_mesh()
        if config.eval.batch_size % mesh.size:
            raise ValueError(
                f"config.eval.batch_size {config.eval.batch_size} is not divisible by the number of devices {mesh.size}"
                f" (remainder {config.eval.batch_size % mesh.size})"
            )
        self._config, self._mesh, self._streams = config, mesh, streams
        self._workdir = pathlib.Path(workdir)
        self._truth = streams[0].ground_truth
        self.federated = self._truth.truth.federated  # whether scores are LVIS's
        self._scorer = lvis if self.federated else coco
        self._annotations_sha256 = files.sha256(self._truth.annotations)  # of the file as it was read
        self._limits = Limits.from_config(config.eval)
        self._detector = detector
        whole = NamedSharding(mesh, REPLICATED)
        self._gather = jax.jit(lambda *arrays: arrays, out_shardings=whole)
        self._checksum = jax.jit(_checksum, out_shardings=whole)

    def __call__(self, params: Any, *, step: int) -> dict[str, float]:
        """Returns the scores of `params` as fractions (see `coco.evaluate`), the same on every process.

        Federated annotations are scored by `lvis.evaluate`.

        Process 0 writes `eval/step_<step>_detections.json`, then `eval/step_<step>_scores.json` and pictures. An
        evaluation that was killed, or whose scores failed, continues where it was, if it is the same one: with the same
        parameters, photos, texts and limits.
        """
        embeddings = self._detector.encode_vocabulary(params, self._truth.texts)
        text = vocabulary.pad(embeddings, multiple=WORD_CHUNK)
        sums = np.asarray(self._checksum(params)).tolist()
        parts: Parts | None = None
        samples: list[_Sample] = []
        if jax.process_index() == 0:
            parts = Parts(self._workdir / "eval", fingerprint=self._fingerprint(step, sums))
        done = from_first_process(parts and parts.done)
        with tqdm.tqdm(
            total=sum(stream.num_batches for stream in self._streams),
            initial=done,
            desc="evaluating",
            unit="batch",
            leave=False,
            disable=True if parts is None else None,  # None: shown on a terminal only
        ) as progress:
            for batch in self._batches(done):
                processes.barrier("batch of the evaluation", timeout_s=self._config.timeout_s)
                found, example_ids, image_mask = self._predict(params, batch, text)
                progress.update()
                if parts is None:
                    continue
                parts.add(self._rows(found, example_ids, image_mask))
                samples += _samples(batch, found, limit=self._config.eval.num_pictures - len(samples))
        name = f"step_{step:08d}"
        if parts:
            parts.write()
        rows = self._in_truth(_rows_of_first_process(parts.all_rows() if parts else Rows.concatenate([])))
        if parts:  # before they are scored
            write_detections(self._workdir / "eval", name=name, detections=rows, truth=self._truth.truth)
        scores = self._score(rows)
        if parts:
            protocol = self._protocol(step) | {
                "weights_sha256": _sha256(sums),
                "images_evaluated": len(self._truth.images),
                "images_listed": len(self._truth.truth.images),
            }
            write_scores(self._workdir / "eval", name=name, scores=scores, protocol=protocol)
            tables = [
                (self._scorer, lambda name: not name.startswith((*names.SCORES, proposals.LEAD))),
                (names, lambda name: name.startswith(names.SCORES)),
                (proposals, lambda name: name.startswith(proposals.LEAD)),
            ]
            lines = [part.table({name: scores[name] for name in scores if has(name)}) for part, has in tables]
            logging.info("step %d: %s; in %%:\n%s", step, self._scorer.AP_KIND, "\n".join(filter(None, lines)))
            ids = [self._truth.truth.image_ids.ids[self._truth.images[sample.example_id]] for sample in samples]
            for sample, image_id in zip(samples, files.safe_names(ids), strict=True):
                self._draw(sample, path=self._workdir / "pictures" / f"{name}_found_{image_id}.jpg", step=step)
            parts.remove()
        return scores

    def recorded(self, step: int, *, params: Any = None) -> dict[str, float] | None:
        """Returns the scores of the evaluation of a step that the workdir holds, None without one of this protocol.

        With `params` they must be what was evaluated.
        """
        sums = {} if params is None else {"weights_sha256": _sha256(np.asarray(self._checksum(params)).tolist())}
        scores: dict[str, float] | None = None
        path = self._workdir / "eval" / f"step_{step:08d}_scores.json"
        if jax.process_index() == 0 and path.is_file():
            with contextlib.suppress(AttributeError, LookupError, OSError, TypeError, ValueError):  # it is damaged
                content = files.read_json(path)
                stored = content.pop("protocol")
                wanted = json.loads(json.dumps(self._protocol(step) | sums))
                del wanted["annotations"]  # the file may have moved: its hash counts
                if wanted.items() <= stored.items():
                    scores = {name: float(value) for name, value in content.items()}
        return from_first_process(scores)

    def _batches(self, done: int) -> Iterator[Batch]:
        """Yields the batches of all streams one after the other, without the first `done`."""
        for stream in self._streams:
            skipped = min(done, stream.num_batches)
            done -= skipped
            if skipped == stream.num_batches:
                continue
            batches = stream.iterate(skipped)
            try:
                yield from batches
            finally:
                batches.close()

    def _predict(
        self, params: Any, batch: Batch, text: tuple[np.ndarray, np.ndarray]
    ) -> tuple[Detections, np.ndarray, np.ndarray]:
        """Returns (detections, example ids, image mask) of the global batch, whole on every process."""
        found = self._detector.predict(params, self._detector.to_global(batch), *text, self._limits)
        sharding = NamedSharding(self._mesh, BATCH)
        labels = [jax.make_array_from_process_local_data(sharding, x) for x in (batch.example_id, batch.image_mask)]
        found, example_ids, image_mask = jax.tree.map(np.asarray, (found, *self._gather(*labels)))
        return found, example_ids, image_mask

    def _rows(self, found: Detections, example_ids: np.ndarray, image_mask: np.ndarray) -> Rows:
        """Returns the detections on real images; ids are those of examples and positions in the vocabulary."""
        keep = found.mask & image_mask[:, None]
        return Rows(
            image_ids=np.broadcast_to(example_ids[:, None], keep.shape)[keep],
            category_ids=np.asarray(found.labels)[keep],
            boxes=np.asarray(found.boxes)[keep],
            scores=np.asarray(found.scores)[keep],
        )

    def _in_truth(self, rows: Rows) -> Rows:
        """Returns the rows with positions in the truth for ids, in the order of its images."""
        images, categories = self._truth.images[rows.image_ids], self._truth.categories[rows.category_ids]
        return Rows.concatenate([Rows(images, categories, rows.boxes, rows.scores)])

    def _score(self, rows: Rows) -> dict[str, float]:
        """Returns the scores; each process scores its share of the categories, and all names."""
        share = coco.Share(jax.process_index(), jax.process_count(), _maximum_over_processes)
        truth = self._truth.truth
        found = Found(rows.image_ids, rows.category_ids, rows.xywh(), rows.scores.astype(np.float64))
        evaluated = [truth.image_ids.ids[i] for i in self._truth.images]
        scores = self._scorer.evaluate(truth, found, image_ids=evaluated, share=share)
        scores |= names.evaluate(truth, found, image_ids=evaluated)
        by_words = self._limits.score == "words"
        return scores if by_words else scores | proposals.evaluate(truth, found, image_ids=evaluated)

    def _draw(self, sample: _Sample, *, path: pathlib.Path, step: int) -> None:
        """Writes one picture: annotated boxes at the left, at the right as many found ones."""
        truth, image = self._truth.truth, int(self._truth.images[sample.example_id])
        rows = np.flatnonzero(truth.image == image)
        boxes = np.concatenate([truth.boxes[rows, :2], truth.boxes[rows, :2] + truth.boxes[rows, 2:]], axis=1)
        label_of = {category: label for label, category in enumerate(self._truth.categories.tolist())}
        figures.detections(
            sample.image,
            sample.boxes * sample.scale,
            sample.labels,
            self._truth.vocabulary.names,
            scores=sample.scores,
            max_drawn=min(20, max(3, len(rows))),
            truth=(boxes * sample.scale, np.array([label_of[c] for c in truth.category[rows].tolist()], np.int32)),
            title=f"{file_name(truth.images[image])} after {step} steps",
            path=path,
        )

    def _fingerprint(self, step: int, sums: list[float]) -> dict[str, Any]:
        """Returns all that the detections depend on; of the annotations only the photos and their sizes."""
        unsized = {"ap", "annotations", "annotations_sha256", "repaired"}
        protocol = {key: value for key, value in self._protocol(step).items() if key not in unsized}
        sizes = self._streams[0].sources[0].sizes.tobytes()
        return {
            "protocol": protocol,
            "weights": sums,
            "batch_size": self._streams[0].batch_size,
            "photos": self._truth.photos,
            "sizes": hashlib.sha256(sizes).hexdigest(),
        }

    def _protocol(self, step: int) -> dict[str, Any]:
        """Returns all that the detections and scores depend on beside the parameters."""
        section, truth, length = self._config.eval, self._truth, self._config.model.text.context_length
        return {
            "ap": self._scorer.AP_KIND,
            "checkpoint_step": step,
            "ema": self._config.optimizer.ema_decay > 0,
            "annotations": str(truth.annotations),
            "annotations_sha256": self._annotations_sha256,
            "repaired": truth.truth.odd,
            "score": SCORE if self._limits.score == "words" else self._limits.score,
            "score_threshold": self._limits.score_threshold,
            "nms": "over all categories" if self._limits.class_agnostic else "within each category",
            "nms_iou": self._limits.nms_iou,
            "pre_nms": self._limits.pre_nms,
            "max_detections": self._limits.max_detections,
            "canvases": [list(canvas) for canvas in section.canvases],
            "short_side": section.short_side,
            "long_side": section.long_side,
            "max_examples": section.max_examples,
            "definitions": truth.definitions,
            "prompts": truth.texts,
            "prompts_truncated": int(np.sum(tokenizer.num_tokens(truth.texts) > length)),
        }


def make(
    config: ConfigDict, detector: Detector, workdir: str | pathlib.Path, *, prefix: str = "config.eval"
) -> Evaluator:
    """Returns the evaluator of `config.eval`, its files checked; it writes to `workdir`, errors are led by `prefix`."""
    return Evaluator(config, detector, streams=make_streams(config, prefix=prefix), workdir=workdir)


def make_second(config: ConfigDict, detector: Detector, workdir: pathlib.Path) -> Evaluator | None:
    """Returns the evaluator of `config.forgetting`, which writes to <workdir>/forgetting; None if it names no files."""
    changed = second(config)
    return changed and make(changed, detector, workdir / "forgetting", prefix="config.forgetting")


def second(config: ConfigDict) -> ConfigDict | None:
    """Returns the configuration whose `eval` is the second set of `config.forgetting`; None if it names no files."""
    if not (config.forgetting.annotations or config.forgetting.images):
        return None
    config = config.copy_and_resolve_references()
    config.eval.update(config.forgetting)
    return config


def make_streams(config: ConfigDict, *, prefix: str = "config.eval") -> list[EvalStream]:
    """Returns this process's part of the images of `config.eval`."""
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    streams = eval_streams(config.eval, input_config=config.input, prefix=prefix, **place)
    for stream in streams[:1]:
        check_classes(stream.ground_truth.texts, config.model.text, where=prefix)
        evaluation_set.refuse_equal_texts(stream.ground_truth, context_length=config.model.text.context_length)
        for note in evaluation_notes(stream.ground_truth, prefix=prefix):
            logging.info(note)
    return streams


class Checkpoint(NamedTuple):
    """A trained model, ready for evaluation."""

    config: ConfigDict  # of its run
    detector: Detector
    params: Any
    step: int

    @classmethod
    def load(cls, workdir: str | pathlib.Path, *, fsdp: int = 1) -> Checkpoint:
        """Returns the newest checkpoint of a run on all devices, averaged if it averages; ValueError without one."""
        config, params, step = checkpoints.load_for_inference(workdir)
        mesh = make_mesh(fsdp=fsdp)
        params = jax.device_put(jax.tree.map(np.asarray, params), param_shardings(mesh, params))
        return cls(config, Detector(make_model(config.model), mesh=mesh), params, step)


def make_evaluation(config: ConfigDict, workdir: pathlib.Path) -> Callable[[], dict[str, float]]:
    """Returns the function that scores the newest checkpoint of a run on `config.eval`; it writes eval/ and pictures/.

    A workdir without checkpoints gets the scores of the run `init_from.checkpoint`, whose model and averaging hold.

    Raises:
      ValueError: no checkpoint, or nothing to evaluate on.
    """
    from_workdir = (workdir / "checkpoints").is_dir() or not config.init_from.checkpoint
    checkpoint = Checkpoint.load(workdir if from_workdir else config.init_from.checkpoint, fsdp=config.mesh.fsdp)
    if (size := config.eval.short_side) != (usual := checkpoint.config.eval.short_side):
        logging.warning(
            "photos are evaluated at a short side of %d px, the run did so at %d px: --config.eval.short_side, "
            ".long_side and .canvases",
            size,
            usual,
        )
    config = config.copy_and_resolve_references()
    config.model, config.optimizer.ema_decay = checkpoint.config.model, checkpoint.config.optimizer.ema_decay
    evaluator = make(config, checkpoint.detector, workdir)
    return functools.partial(evaluator, checkpoint.params, step=checkpoint.step)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """One photo as the network saw it, and what was found, in original pixels."""

    example_id: int
    image: np.ndarray
    scale: np.ndarray  # xyxy, canvas px per original px
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def _samples(batch: Batch, found: Detections, *, limit: int) -> list[_Sample]:
    """Returns the first photos of process 0's batch; its rows are the first of the global one."""
    samples = []
    for i in np.flatnonzero(batch.image_mask)[:limit]:
        height, width = batch.extent[i]
        keep = found.mask[i]
        samples.append(
            _Sample(
                example_id=int(batch.example_id[i]),
                image=batch.image[i, :height, :width].copy(),
                scale=batch.scale[i][[1, 0, 1, 0]],
                boxes=np.asarray(found.boxes[i])[keep],
                labels=np.asarray(found.labels[i])[keep],
                scores=np.asarray(found.scores[i])[keep],
            )
        )
    return samples


def _checksum(params: Any) -> Float[Array, " p"]:
    """Returns a number for every parameter, which changes when training goes on."""
    return jnp.stack([jnp.sum(jnp.abs(value)) for value in jax.tree.leaves(params)])


def _sha256(sums: list[float]) -> str:
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def from_first_process(value: Any) -> Any:
    """Returns process 0's value (what JSON holds; keys of dicts are texts, tuples lists there) on every process."""
    if jax.process_count() == 1:
        return value
    return json.loads(_bytes_of_first_process(json.dumps(value).encode()))


def _rows_of_first_process(rows: Rows) -> Rows:
    """Returns process 0's rows on every process."""
    if jax.process_count() == 1:
        return rows
    columns = [np.array(column) for column in dataclasses.astuple(rows)]
    types = from_first_process([column.dtype.str for column in columns])
    data = [
        np.frombuffer(_bytes_of_first_process(column.tobytes()), t) for column, t in zip(columns, types, strict=True)
    ]
    return Rows(data[0], data[1], data[2].reshape(-1, 4), data[3])


def _maximum_over_processes(array: np.ndarray) -> np.ndarray:
    """Returns the elementwise maximum of every process's array of float64, which a device would round."""
    parts = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
    return np.asarray(parts, np.uint8).view(np.float64).reshape(-1, *array.shape).max(axis=0)


def _bytes_of_first_process(own: bytes) -> bytes:
    """Returns process 0's bytes on every process."""
    data = np.frombuffer(own, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).astype(np.uint8).tobytes()
