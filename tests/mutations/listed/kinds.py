"""Faults of other kinds, planted after the tests of the others were written: off by one, order, type, default, side."""

from tests.mutations.fault import plant

FAULTS = [
    *plant(
        "geometry/boxes.py", "geometry/test_boxes.py",
        ("jnp.minimum(before, after) / jnp.maximum(jnp.maximum(before, after), EPSILON)", "jnp.minimum(before, after) / jnp.maximum(before + after, EPSILON)"),
        ("    return (boxes[..., :2] + boxes[..., 2:]) * 0.5", "    return jnp.round((boxes[..., :2] + boxes[..., 2:]) * 0.5)"),
    ),
    *plant(
        "geometry/nms.py", "geometry/test_nms.py",
        ("(jnp.arange(max_outputs) < count)[:, None]  # 2", "(jnp.arange(max_outputs) <= count)[:, None]  # 2"),
        ("return kept, jnp.arange(max_outputs) < count", "return kept, jnp.arange(max_outputs) <= count"),
    ),
    *plant(
        "geometry/anchors.py", "geometry/test_boxes.py::test_a_centre_on_the_edge_of_a_photo_is_not_on_it",
        ("jnp.all(centers_yx[None] < extent", "jnp.all(centers_yx[None] <= extent"),
    ),
    *plant(
        "models/detclip.py", "models/test_detclip.py::test_lengths_are_of_float32_whatever_comes_in",
        ("logit_bias=config.logit.bias,", "logit_bias=config.logit.scale,", "::test_embeddings_are_normalized_and_start_with_the_prior"),
        ("    x = x.astype(jnp.float32)\n    squared", "    squared"),
    ),
    *plant(
        "models/text_encoder.py", "models/test_text_encoder.py::test_initial_values_have_the_sizes_of_clip",
        ("output_std = (width * 2 * self.num_layers) ** -0.5", "output_std = (width * self.num_layers) ** -0.5"),
        ("jnp.argmax(tokens, axis=-1)[:, None, None]", "jnp.sum(tokens > 0, axis=-1)[:, None, None] - 1", "::test_nothing_after_the_end_matters"),
    ),
    *plant(
        "models/atss_head.py", "models/test_atss_head.py::test_parameters_and_what_is_not_an_embedding_are_float32",
        ("(self.num_levels,), jnp.float32)", "(self.num_levels,), self.dtype)"),
    ),
    *plant(
        "losses/contrastive.py", "losses/test_contrastive.py::test_equals_brute_force",
        ("{\"accuracy\": rank == 1.0,", "{\"accuracy\": rank <= 2.0,"),
        ("jnp.sum(logits >= gather(own, axes)", "jnp.sum(logits > gather(own, axes)"),
        ("own * settings.temperature}", "own}"),
        ("(settings.label_smoothing / num_valid)", "(settings.label_smoothing / b)"),
        slow=True,
    ),
    *plant(
        "losses/devices.py", "losses/test_devices.py",
        ("return min(num_rows, size - size % 128 if size > 128 else size)", "return min(num_rows, size)"),
        ("if axes and any(n % mesh.size for n in num_rows):", "if False:"),
    ),
    *plant(
        "train_step.py", "test_train_step_losses.py",
        ("box_lib.clip(boxes, images.extent[:, None]),  # before", "boxes,  # before"),
        ("return TrainState(step=state.step + 1,", "return TrainState(step=state.step,"),
        ("(param - average), ema, params)", "(param - average), ema, state.params)"),
        slow=True,
    ),
    *plant(
        "data/phrases.py", "prepare/test_image_text.py",
        ("found.append(list(phrases.values())[:max_phrases])", "found.append(list(phrases.values())[: max_phrases + 1])"),
        ("key not in _stop_keys() and ", ""),
        slow=True,
    ),
    *plant(
        "data/spans.py", "cases/test_training_data.py::test_odd_spans_are_counted",
        ("joined[-1] = joined[-1][0], max(end, joined[-1][1])", "joined[-1] = joined[-1][0], end"),
        ("pairs = sorted((max(int(start), 0), int(end)) for start, end in itertools.islice(spans, _MAX_SPANS + 1))", "pairs = [(max(int(start), 0), int(end)) for start, end in itertools.islice(spans, _MAX_SPANS + 1)]"),
    ),
    *plant(
        "data/selection.py", "data/test_sources.py",
        ("random.Random(seed).shuffle(ids)", "random.Random(0).shuffle(ids)"),
        slow=True,
    ),
    *plant(
        "data/selection.py", "data/test_checks.py",
        ("images = content[\"images\"][:max_examples] if max_examples", "images = content[\"images\"][: max_examples + 1] if max_examples"),
    ),
    *plant(
        "data/scenes.py", "data/test_scenes.py::test_parts_have_scenes_of_their_own_and_captions_the_side_that_is_seen",
        ("np.random.default_rng((seed, _PARTS.index(part), i))", "np.random.default_rng((seed, i))"),
        ("if scene.things[0].center[0] < scene.things[1].center[0]", "if scene.things[0].center[1] < scene.things[1].center[1]"),
    ),
    *plant(
        "data/truth.py", "data/test_annotations.py",
        ("return (0, int(key), \"\") if is_number", "return (0, 0, str(key)) if is_number"),
        ("new = np.flatnonzero(rows & ~bad)", "new = np.flatnonzero(rows)"),
    ),
    *plant(
        "data/annotations.py", "data/test_annotations.py",
        ("np.where(np.abs(boxes) > MAX_NUMBER, np.inf, boxes)", "np.where(boxes > MAX_NUMBER, np.inf, boxes)"),
        ("inside[:, 0] * inside[:, 1] < 0.9 * size[:, 0] * size[:, 1]", "inside[:, 0] * inside[:, 1] < size[:, 0] * size[:, 1]"),
        ("np.maximum(-low, end - limit) > 2", "np.maximum(-low, end - limit) > 3"),
    ),
    *plant(
        "runs/metrics.py", "runs/test_metrics.py",
        ("row[\"step\"] <= start]", "row[\"step\"] < start]"),
        ("elapsed / max(self._steps, 1)", "elapsed"),
        ("value if math.isfinite(value) else None", "value"),
    ),
    *plant(
        "runs/checkpoints.py", "runs/test_checkpoints.py",
        ("return [i >= old or checkpoint.step == self.best", "return [i > old or checkpoint.step == self.best"),
    ),
    *plant(
        "runs/pretrained.py", "runs/test_pretrained.py",
        ("for stage in (2, 3, 4) for leaf in (\"bias\", \"scale\"))", "for stage in (2, 3) for leaf in (\"bias\", \"scale\"))"),
        slow=True,
    ),
    *plant(
        "runs/order.py", "runs/test_order.py::test_a_weight_gives_the_nearest_whole_number_of_steps",
        ("round(n * weight)", "int(n * weight)"),
    ),
    *plant(
        "inference/vocabulary.py", "inference/test_vocabulary.py",
        ("np.arange(len(text) + padding) < len(text)", "np.arange(len(text) + padding) < len(text) + padding"),
    ),
    *plant(
        "predict/__main__.py", "test_predict.py::test_boxes_of_a_photo_that_is_read_at_half_size_are_of_the_whole test_predict.py::test_everything_is_written",
        ("id_of, num = {path: i + 1 for", "id_of, num = {path: i for"),
        slow=True,
    ),
    *plant(
        "predict/search.py", "test_predict.py::test_boxes_of_a_photo_that_is_read_at_half_size_are_of_the_whole test_predict.py::test_everything_is_written",
        ("found.boxes / photo.scale[None]", "found.boxes * photo.scale[None]"),
        slow=True,
    ),
    *plant(
        "visualize/charts.py", "visualize/test_visualize.py::test_bars_are_ordered_and_one_is_marked",
        ("order = np.argsort(values, kind=\"stable\")", "order = np.argsort(-np.asarray(values), kind=\"stable\")"),
        ("1 if i == marked else 0", "0 if i == marked else 1"),
        ("np.array([points[step] for step in sorted(points)])", "np.array(list(points.values()))", "::test_metrics_are_in_the_order_of_their_steps_and_the_last_line_of_a_step_counts"),
    ),
    *plant(
        "visualize/drawing.py", "visualize/test_visualize.py",
        ("padding = (y >= extent[0]) | (x >= extent[1])", "padding = (y >= extent[1]) | (x >= extent[0])"),
        ("level = (similarity - low) / max(high - low, 1e-12)", "level = (high - similarity) / max(high - low, 1e-12)"),
        ("top = height - cell.shape[0] if bottom else 0", "top = 0 if bottom else height - cell.shape[0]", "::test_cells_of_a_row_are_aligned"),
    ),
    *plant(
        "visualize/regions.py", "visualize/test_regions.py::test_points_are_of_the_best_region_on_the_photo_and_in_its_pixels",
        ("to_photo = (1 / photos.scale[0])[::-1]", "to_photo = 1 / photos.scale[0]"),
        ("np.where(found.on_photo[0][:, None], similarity, -np.inf)", "similarity"),
    ),
    *plant(
        "eval/names.py", "eval/test_names.py",
        ("overlap.max(axis=1) > MIN_IOU", "overlap.max(axis=1) >= MIN_IOU"),
        ("np.lexsort((-found.scores, found.images))", "np.lexsort((found.scores, found.images))"),
        ("~truth.crowd & ~truth.ignored", "~truth.crowd"),
    ),
    *plant(
        "eval/odinw.py", "eval/test_odinw.py",
        ("float(np.mean(values)) if len(values) == len(group) else None", "float(np.mean(values)) if values else None"),
        ("plain_names=plain_names or kind == \"finetuned\")", "plain_names=plain_names)", "::test_a_fine_tuned_run_is_asked_with_the_names_it_was_trained_with"),
        slow=True,
    ),
    *plant(
        "eval/grounding.py", "eval/test_grounding.py::test_the_first_box_that_overlaps_any_is_a_hit eval/test_grounding.py::test_recall_of_any_box_and_of_merged_boxes",
        ("return int(ranks[0]) + 1 if len(ranks)", "return int(ranks[-1]) + 1 if len(ranks)"),
        ("np.concatenate([low, high - low])[None]", "np.concatenate([low, high])[None]"),
    ),
    *plant(
        "preflight/data_plan.py", "preflight/test_preflight.py::test_steps_and_sizes_of_the_paper_s_run",
        ("(config.epochs - section.from_epoch) * num_batches", "config.epochs * num_batches", "::test_a_kind_that_begins_later_has_fewer_steps"),
        ("* factor / len(section.canvases)", "* factor"),
        ("plan.num_steps.get(name, 0) + num_steps / len(sizes)", "num_steps / len(sizes)", "data/test_data_plan.py::test_steps_of_a_stream_are_even_over_the_sizes_of_its_canvas_whatever_its_name"),
        ("+ num_steps / len(sizes)", "+ num_steps", "data/test_data_plan.py::test_steps_of_a_stream_are_even_over_the_sizes_of_its_canvas_whatever_its_name"),
        ("(1 - MAX_MISSING_SHARE) * published.num_examples", "MAX_MISSING_SHARE * published.num_examples", "data/test_data_plan.py::test_a_built_folder_that_is_too_small_and_was_not_compared"),
        slow=True,
    ),
    *plant(
        "convert/reading.py", "convert/test_convert.py::test_types_that_numpy_has_stay",
        ("\"F8_E5M2\": _FLOAT8[1]", "\"F8_E5M2\": _FLOAT8[0]", "cases/test_text.py"),
        ("(x.float() if x.dtype == torch.bfloat16 else x)", "(x.float())"),
    ),
    *plant(
        "prepare/box_json.py", "prepare/test_lvis.py",
        ("{\"r\": \"rare\", \"c\": \"common\", \"f\": \"frequent\"}", "{\"r\": \"common\", \"c\": \"rare\", \"f\": \"frequent\"}"),
        slow=True,
    ),
    *plant(
        "claims/ablations.py", "claims/test_claims.py::test_seeds_that_all_rows_have",
        ("if all(seed in row_seeds for", "if any(seed in row_seeds for"),
    ),
    *plant(
        "claims/ablations.py", "claims/test_claims.py::test_a_claim_is_judged_by_the_interval_of_its_paired_margins claims/test_claims.py::test_the_margin_that_is_nearest_to_failing_is_told claims/test_claims.py::test_what_five_seeds_do_not_decide_has_more",
        ("stdtrit(num - 1, 0.975)", "stdtrit(num, 0.975)"),
        ("stdtrit(num - 1, 0.975)", "stdtrit(num - 1, 0.95)"),
        ("ddof=1", "ddof=0"),
        ("np.all(means >= halves)", "np.any(means >= halves)"),
        ("np.all(means >= halves)", "np.all(means > halves)"),
        ("np.any(means < -halves)", "np.all(means < -halves)"),
        ("means - halves))", "means))"),
        ("means + halves if word", "means - halves if word"),
        ("if seed < num}", "if seed <= num}"),
        ("while num < finding.max_seeds", "while num < len(SEEDS)"),
    ),
    *plant(
        "commands.py", "test_commands.py",
        ("time.sleep(GRACE_S + 1)", "pass"),
    ),
]  # fmt: skip
