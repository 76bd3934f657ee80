"""Streams of host batches, read with Grain: endless for training, finite for evaluation.

A stream is (kind, canvas); a canvas may have several sizes, of which a batch has one.

The n-th batch is a pure function of n: order, scale, flip and negatives of the example at position p follow from
(seed, stream, p). A global batch holds the positions [n * batch_size, (n + 1) * batch_size), split contiguously over
the hosts, so that position follows from the step and the number of hosts changes nothing.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import queue
import threading
from collections.abc import Generator
from typing import Any

import grain
from absl import flags, logging

from detclipv2_jax.data import canvases, mirroring, workers
from detclipv2_jax.data.batches import OVERFLOWS, BatchMaker, Notes, Skipped, pixels_of, table_capacity
from detclipv2_jax.data.checks import refuse_above_share
from detclipv2_jax.data.concepts import Encoder, Pool, Vocabulary, check_classes, read_dictionary
from detclipv2_jax.data.evaluation_set import GroundTruth
from detclipv2_jax.data.schema import Batch, DataError, Kind, StalledError, UnusableError
from detclipv2_jax.data.sources import Source, open_evaluation, open_sources
from detclipv2_jax.files import printable

_FOREVER = 1 << 60


class Stream:
    """Batches of one (kind, canvas); `train_streams` makes them.

    Attributes:
      name: like "detection/800x1344", with the source behind it where each has a stream of its own.
      canvases: sizes of its canvas, the largest first; a batch has one of them.
      weight: factor on the number of its steps.
      batch_size: images a batch over all hosts.
      num_examples: images of an epoch.
      num_batches: batches of an epoch, rounded; at least 1.
      sources: the data sets behind it.
      capacities: static sizes: {"boxes": n, "table": t, "captions": m}.
      num_verified: one more: concepts that a federated image is annotated for; 0: no image is federated.
      class_names: whether captions are the names of classes.
      definitions: whether names are encoded with the definitions of `vocabularies`, which are those of each source.
      counters: what was repaired, cut or skipped so far, by reason; what happened while the files were loaded is
        with the first stream of the kind.
      overflow: what did not fit into the batch handed out last or was skipped in it, by name of the metric.
      examples: (source, position in it) of the rows of the batch handed out last.
    """

    def __init__(self, maker: BatchMaker, *, input_config: Any, max_bad_share: float, weight: float = 1.0):
        self.weight = weight
        self._maker, self._input, self._max_bad_share = maker, input_config, max_bad_share
        self._skipped: dict[int, Skipped] = {}
        self.name, self.kind, self.canvases = maker.name, maker.kind, maker.canvases
        self.batch_size, self.num_examples = maker.batch_size, len(maker.members)
        self.num_batches = max(1, round(self.num_examples / self.batch_size))
        self.sources, self.max_boxes = maker.sources, maker.max_boxes
        self.num_verified, self.class_names = maker.num_verified, maker.class_names
        self.definitions, self.vocabularies = maker.definitions, maker.vocabularies
        self.capacities = {"boxes": maker.max_boxes, "table": maker.capacity, "captions": maker.num_captions}
        self.counters: collections.Counter[str] = collections.Counter()
        self.overflow: dict[str, int] = {}
        self.examples: list[tuple[int, int]] = []

    def _account(self, batch: Batch, notes: Notes) -> Batch:
        self.counters.update(notes.counts)
        self.overflow = {f"num_{reason.split(':')[0].replace(' ', '_')}": notes.counts[reason] for reason in OVERFLOWS}
        self.examples = notes.examples
        new = {member: skipped for member, skipped in notes.skipped.items() if member not in self._skipped}
        for skipped in new.values():
            logging.warning("%s: skipped %s: %s", self.name, printable(skipped.example), skipped.reason)
            self.counters[f"image of {skipped.source} skipped: {skipped.reason}"] += 1
        self._skipped |= new
        self.overflow["num_images_skipped"] = len(new)
        reasons = collections.Counter(skipped.reason for skipped in self._skipped.values())
        refuse_above_share(reasons, self.num_examples, self._max_bad_share, what="images", where=self.name)
        return batch

    @property
    def canvas(self) -> tuple[int, int]:
        """The largest of its canvases."""
        return self.canvases[0]

    def canvas_of(self, n: int) -> tuple[int, int]:
        """Returns the canvas of the n-th global batch, the same on every host."""
        return self._maker.canvas_of(n)

    def batch(self, n: int) -> Batch:
        """Returns this host's rows of the n-th global batch, a pure function of n.

        Raises:
          ValueError: more than the configured share of the images cannot be read.
        """
        return self._account(*self._maker.make(n))

    def _dataset(self, start: int, end: int = _FOREVER) -> grain.MapDataset:
        # a worker process makes every so many-th batch; threads make several at once
        make = functools.partial(self._maker.make, step=self._input.num_workers)
        return grain.MapDataset.range(start, end).map(make)

    def iterate(self, start: int = 0) -> Generator[Batch, None, None]:
        """Yields batch(start), batch(start + 1), … read ahead by threads or processes; `close()` it when done.

        Raises:
          DataError: as `batch`; a worker process is gone.
          StalledError: there was no batch for `config.input.timeout_s`; the message names what is waited for.
        """
        ahead, num_workers = max(self._input.prefetch_batches, 1), self._input.num_workers
        num_threads = min(self._input.num_threads, ahead) if num_workers == 0 else 0
        dataset = self._dataset(start).to_iter_dataset(
            grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead if num_threads else 0)
        )
        if num_workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers copy parsed flags; in a notebook or a test nobody did
                flags.FLAGS.mark_as_parsed()
            options = grain.multiprocessing.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=max(ahead // num_workers, 1)
            )
            dataset = dataset.mp_prefetch(options, worker_init_fn=workers.end_with_parent)
        with workers.starting():
            iterator, n = iter(dataset), start
        try:
            while (item := self._next(iterator, n)) is not None:
                yield self._account(*item)
                n += 1
        finally:
            # where a disk hangs, this may wait for ever, and no error, of another stream neither, would end the run
            closing = threading.Thread(target=iterator.close, daemon=True)
            with contextlib.suppress(RuntimeError):  # Python itself is ending, and starts no thread
                closing.start()
                closing.join(timeout=min(10, self._input.timeout_s))

    def _next(self, iterator: Any, n: int) -> tuple[Batch, Notes] | None:
        """Returns what an iterator gives next, which is batch n; None at its end."""

        def read() -> None:
            try:
                with workers.starting():  # the first batch is what starts them
                    item = next(iterator, None)
                read_one.put((item, None))
            except Exception as error:
                read_one.put((None, error))

        read_one: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=read, daemon=True).start()
        try:
            item, error = read_one.get(timeout=self._input.timeout_s)
        except queue.Empty:
            raise StalledError(
                f"{self.name}: no batch {n} within {self._input.timeout_s} s (config.input.timeout_s); "
                f"{self._waited_for(n)}"
            ) from None
        if isinstance(error, RuntimeError) and "BucketError" not in f"{error!r}":  # Grain's, of a worker process
            raise DataError(f"{self.name}: {error} Out of memory? config.input.num_workers=0 needs least.") from error
        if error is not None:
            raise error
        return item

    def _waited_for(self, n: int) -> str:
        """Returns which example of batch n cannot be read now, for a message."""
        hanging = ["everything can be read now"]

        def read() -> None:
            for position in self._maker.positions(n):
                _, source, index = self._maker.place(position)
                hanging[0] = f"{self.sources[source].file(index)} does not answer"
                try:
                    pixels_of(self.sources[source][index])
                except (UnusableError, OSError):
                    continue
            hanging[0] = "everything can be read now"

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(timeout=min(10, self._input.timeout_s))
        return hanging[0]

    def named(self, examples: list[tuple[int, int]]) -> str:
        """Returns sources and positions in them of `examples`, for a message."""
        ids = collections.defaultdict(list)
        for source, index in examples:
            ids[self.sources[source].name].append(str(index))
        return "; ".join(f"{name}: {', '.join(indices)}" for name, indices in ids.items())


class EvalStream(Stream):
    """The images of one evaluation canvas in the order of the json; finite, the last batch padded by image_mask."""

    def __init__(self, maker: BatchMaker, *, ground_truth: GroundTruth, **options: Any):
        super().__init__(maker, **options)
        self.ground_truth = ground_truth
        self.num_batches = -(-self.num_examples // self.batch_size)

    def _dataset(self, start: int, end: int = 0) -> grain.MapDataset:
        return super()._dataset(start, end or self.num_batches)

    def batch(self, n: int) -> Batch:
        if not 0 <= n < self.num_batches:
            raise ValueError(f"{self.name} has {self.num_batches} batches; there is no batch {n}")
        return super().batch(n)


def _divide(batch_size: int, process_count: int, where: str) -> int:
    if batch_size % process_count:
        raise ValueError(f"{where}.batch_size {batch_size} is not divisible by the number of hosts {process_count}")
    return batch_size // process_count


def _kind_streams(
    config: Any,
    kind: Kind,
    sources: list[Source],
    dictionary: Vocabulary | None,
    *,
    process_index: int,
    process_count: int,
    table_multiple: int,
    suffix: str,
    weight: float,
) -> list[Stream]:
    section = config[kind.value]
    rows = _divide(section.batch_size, process_count, f"config.{kind.value}")
    encoder = Encoder(max_length=config.model.text.context_length)
    if kind is Kind.DETECTION or dictionary is None:  # categories got their definitions when they were read
        vocabularies = tuple(source.vocabulary for source in sources)
    else:
        vocabularies = (dictionary,) * len(sources)
    sizes: dict[str, Any]
    most_concepts = num_known = 0
    if kind is Kind.IMAGE_TEXT and sources[0].class_names:
        sizes = {"num_captions": 1, "class_names": True}
        num_known = min(rows, sum(len(known) for known in vocabularies))
    elif kind is Kind.IMAGE_TEXT:
        sizes = {"num_captions": section.max_phrases + 1}
    else:
        make_pool = functools.cache(lambda known: Pool(known, definitions=section.definitions, encoder=encoder))
        sizes = {
            "max_boxes": section.max_boxes,
            "max_box_concepts": section.max_box_concepts,
            "num_concepts": section.num_concepts,
            "pools": tuple(make_pool(known) for known in vocabularies),
        }
        most_concepts = max(source.most_concepts for source in sources)
        if kind is Kind.DETECTION and section.federated and any(source.federated for source in sources):
            sizes["num_verified"] = max(section.num_concepts, most_concepts)
        if kind is Kind.DETECTION or dictionary is None:  # then there are no concepts but those of the pools
            num_known = len({i for pool in sizes["pools"] for i in pool.encoded.ids.tolist()})
    capacity = table_capacity(
        section, kind, num_images=rows, table_multiple=table_multiple, most_concepts=most_concepts, num_known=num_known
    )
    streams = []
    for canvas, members in zip(section.canvases, canvases.assign(sources, section.canvases), strict=True):
        if not len(members):
            continue
        maker = BatchMaker(
            name=f"{kind.value}/{canvas[0]}x{canvas[1]}{suffix}",
            kind=kind,
            canvases=canvases.sizes(canvas, short_side=section.short_side, num_scales=section.num_scales),
            sources=tuple(sources),
            members=members,
            seed=config.seed,
            batch_size=section.batch_size,
            process_index=process_index,
            process_count=process_count,
            # a batch that has a size of its own is filled by its photos
            short_side=(min(canvas),) * 2 if section.num_scales else tuple(section.short_side),
            long_side=section.long_side,
            flip_prob=section.flip_prob,
            unflippable=mirroring.pattern(section.unflippable_words, english=kind is not Kind.IMAGE_TEXT),
            capacity=capacity,
            definitions=section.definitions,
            vocabularies=vocabularies,
            encoder=encoder,
            **sizes,
        )
        streams.append(Stream(maker, input_config=config.input, max_bad_share=section.max_bad_share, weight=weight))
    for source in sources:
        streams[0].counters.update(source.counters)
    return streams


def _grouped(sources: list[Source], section: Any, prefix: str) -> list[dict[str, Any]]:
    """Returns the sources that share streams, and the streams' suffix and weight: all, or each with its own weight."""
    weights = section.source_weights
    if not weights:
        named = [source for source in sources if source.class_names]
        others = [source for source in sources if not source.class_names]
        groups: list[dict[str, Any]] = [{"sources": others, "suffix": "", "weight": section.weight}]
        if named:
            groups.append({"sources": named, "suffix": "/classes", "weight": section.weight * section.class_weight})
        return [group for group in groups if group["sources"]]
    if len(weights) != len(sources) or min(weights) < 0:
        names = ", ".join(source.name for source in sources)
        raise ValueError(
            f"{prefix}.source_weights is {tuple(weights)}; it takes one number of 0 or more for each of the "
            f"{len(sources)} sources: {names}"
        )
    return [
        {"sources": [source], "suffix": f"/{i}_{source.name}", "weight": section.weight * weight}
        for i, (source, weight) in enumerate(zip(sources, weights, strict=True))
    ]


def train_streams(
    config: Any, *, process_index: int = 0, process_count: int = 1, table_multiple: int = 1
) -> list[Stream]:
    """Returns the training streams: detection, grounding, image-text, each with its canvases in order.

    Kinds without files and canvases without examples are left out. With `source_weights` each source of a kind has its
    own streams.

    Args:
      config: the whole configuration.
      process_index: this host.
      process_count: number of hosts; divides every batch size.
      table_multiple: the concept table's rows are a multiple of it (devices of this host) and of 8.

    Raises:
      ValueError: everything that is missing, empty or of another kind, one line each; no image was read yet.
    """
    opened: list[dict[str, Any]] = []  # arguments of `_kind_streams`
    problems = []
    for kind in Kind:
        try:
            section, prefix = config[kind.value], f"config.{kind.value}"
            sources = open_sources(kind, section, prefix=prefix)
            for source in sources if config.model.text.classes else ():
                if kind is not Kind.DETECTION:
                    raise ValueError(f"{prefix} has data, but phrases are no classes (config.model.text.classes)")
                texts = source.vocabulary.texts(definitions=section.definitions)
                check_classes(texts, config.model.text, where=f"{prefix}, {source.name}")
            groups = _grouped(sources, section, prefix)
            dictionary = read_dictionary(section.dictionary) if groups and section.dictionary else None
            opened += [{"kind": kind, "dictionary": dictionary, **group} for group in groups]
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    if not opened:
        raise ValueError(
            "no training data: set config.detection.annotations, config.grounding.annotations or "
            "config.image_text.pairs, each with its images"
        )
    hosts: dict[str, Any] = {"process_index": process_index, "process_count": process_count}
    return [
        stream for group in opened for stream in _kind_streams(config, **group, **hosts, table_multiple=table_multiple)
    ]


def eval_streams(
    section: Any, *, input_config: Any, prefix: str = "config.eval", process_index: int = 0, process_count: int = 1
) -> list[EvalStream]:
    """Returns the evaluation streams of a section like config.eval; images as in training but without augmentation.

    Args:
      section: config.eval.
      input_config: config.input.
      prefix: what errors call the section.
      process_index: this host.
      process_count: number of hosts; divides the batch size.

    Raises:
      ValueError: a file or folder is missing or of another kind; while reading, an image cannot be used.
    """
    _divide(section.batch_size, process_count, prefix)
    opened = open_evaluation(section, prefix=prefix)
    if opened is None:
        return []
    source, ground_truth = opened
    streams = []
    for canvas, members in zip(section.canvases, canvases.assign([source], section.canvases), strict=True):
        if not len(members):
            continue
        maker = BatchMaker(
            name=f"eval/{canvas[0]}x{canvas[1]}",
            kind=Kind.DETECTION,
            canvases=(tuple(canvas),),
            sources=(source,),
            members=members,
            seed=0,
            batch_size=section.batch_size,
            process_index=process_index,
            process_count=process_count,
            short_side=(section.short_side, section.short_side),
            long_side=section.long_side,
            encoder=Encoder(),
            endless=False,
        )
        streams.append(
            EvalStream(maker, ground_truth=ground_truth, input_config=input_config, max_bad_share=section.max_bad_share)
        )
    return streams
