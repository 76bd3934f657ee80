"""Faults of a hostile reading, room by room, that the tests of their files notice."""

from tests.mutations.fault import plant

FAULTS = [
    *plant(
        "bucket_store.py", "test_buckets.py",
        ("lambda store: begun or store.read", "lambda store: store.read", "::test_photos_of_a_batch_are_fetched_at_once_and_those_of_the_next_meanwhile"),
        ("return version if found == content else None", "return version", "::test_writes_on_condition"),
        ("chr(min(ord(beginning[-1]) + 1, 0x10FFFF))", "beginning[-1]", "::test_writes_on_condition"),
        slow=True,
    ),
    *plant(
        "buckets.py", "test_buckets.py",
        ("if self._added > limit_bytes() / 64:", "if self._added > limit_bytes() / 2:", "::test_photos_make_room_and_files_in_use_do_not"),
        ("path not in _begun and path", "path", "::test_photos_of_a_batch_are_fetched_at_once_and_those_of_the_next_meanwhile"),
        ("_begun.pop(os.fspath(path), None)", "_begun.get(os.fspath(path))", "::test_photos_of_a_batch_are_fetched_at_once_and_those_of_the_next_meanwhile"),
        ("goal = limit_bytes() * 0.95", "goal = limit_bytes() * 0.5", "::test_photos_make_room_and_files_in_use_do_not"),
        ("when < time.time() - _UNUSED_S", "when > time.time() - _UNUSED_S", "::test_photos_make_room_and_files_in_use_do_not"),
        ("if facts.st_mtime >= since or os.path.isdir(path):", "if os.path.isdir(path):", "::test_a_file_is_fetched_once_and_asked_for_once_a_run"),
        ("where.key.replace(\"**/\", \"*\")", "where.key", "::test_folders_and_patterns"),
        ("int(float(os.environ.get(\"DETCLIP_BUCKET_CACHE_GB\", 100)) * 1e9)", "int(float(os.environ.get(\"DETCLIP_BUCKET_CACHE_GB\", 100)) * 1e6)", "::test_photos_make_room_and_files_in_use_do_not"),
        ("key=lambda path: path.stat().st_mtime_ns", "key=lambda path: path.name", "::test_a_command_reads_and_writes_buckets"),
        ("if name in (\"words\", \"workdir\", \"checkpoint\") or not any", "if name in (\"workdir\", \"checkpoint\") or not any", "::test_options_that_must_be_here"),
        slow=True,
    ),
    *plant(
        "chips.py", "test_chips.py",
        ("Chip(\"h100\", \"NVIDIA H100\", \"cuda\", 989e12, 3350e9", "Chip(\"h100\", \"NVIDIA H100\", \"cuda\", 1979e12, 3350e9", "::test_peaks_and_memories_of_the_data_sheets"),
    ),
    *plant(
        "claims/__main__.py", "claims/test_claims.py",
        ("np.ptp(values) / 2:.1f", "np.ptp(values):.1f", "::test_the_table_tells_verdicts_means_spreads_and_what_is_missing"),
        ("\"base_\": lambda box: frequency[box[\"category_id\"]] == \"f\"", "\"base_\": lambda box: frequency[box[\"category_id\"]] != \"f\"", "::test_scores_are_those_of_the_subsets"),
    ),
    *plant(
        "claims/__main__.py", "claims/test_claims.py",
        ("steps = (steps[0], shared + steps[1])", "steps = (steps[0], steps[1])", "::test_the_plot_counts_detection_steps"),
        slow=True,
    ),
    *plant(
        "commands.py", "test_commands.py",
        ("tuple(filter(None, text.split(\",\")))", "tuple(text.split(\",\"))", "::test_options_become_the_values_that_a_function_names"),
        ("pair for pair in config.chips[chip] if pair[0] not in overridden", "pair for pair in config.chips[chip]", "::test_a_configuration_that_cannot_be_loaded_is_one_line"),
    ),
    *plant(
        "convert/layouts.py", "convert/test_convert.py",
        ("depths[stage] = max(depths[stage], int(match[3]) + 1)", "depths[stage] = int(match[3]) + 1", "::test_the_way_back_is_exact"),
        ("\"odd\": 2 * stage + 1", "\"odd\": 2 * stage - 1", "::test_features_of_a_converted_checkpoint_are_the_librarys"),
    ),
    *plant(
        "data/annotations.py", "data/test_annotations.py",
        ("(inside[:, 0] * inside[:, 1] < 0.9 * size[:, 0] * size[:, 1])", "(inside[:, 0] * inside[:, 1] < 0.5 * size[:, 0] * size[:, 1])", "::test_boxes_of_another_form_are_told"),
        ("runs.append(value + (runs[-2] if len(runs) > 2 else 0))", "runs.append(value + (runs[-2] if len(runs) > 1 else 0))", "::test_boxes_around_masks_and_polygons"),
    ),
    *plant(
        "data/batches.py", "data/test_batches.py",
        ("short_sides = rng.integers(*self.short_side, self.batch_size, endpoint=True)", "short_sides = rng.integers(self.short_side[0], self.short_side[1] + 8, self.batch_size)", "::test_every_scale_of_the_range_is_drawn_evenly_both_ends_included"),
        ("multiple = math.lcm(8, table_multiple)", "multiple = 8 * table_multiple", "::test_rows_of_the_concept_table"),
        slow=True,
    ),
    *plant(
        "data/batches.py", "data/test_streams.py",
        ("if len(distinct) > self.num_captions:", "if len(distinct) >= self.num_captions:", "::test_phrases_are_unique_and_capped"),
        ("owned.append(distinct[: self.num_captions])", "owned.append(distinct[-self.num_captions :])", "::test_phrases_are_unique_and_capped"),
        ("np.concatenate([concepts[i][~doubtful], negatives[i][negatives[i] < self.capacity]])", "np.concatenate([concepts[i][~doubtful], negatives[i]])", "::test_only_as_many_verified_negatives_as_there_is_room_for_and_never_what_is_doubtful"),
        slow=True,
    ),
    *plant(
        "data/built.py", "data/test_built.py",
        ("box_concepts=(np.cumsum(stays) - 1)[record.box_concepts[rows]].astype(np.int32)", "box_concepts=record.box_concepts[rows].astype(np.int32)", "::test_part_of_a_folder_with_definitions_and_without_categories"),
        ("definitions = tuple(definition or dictionary.definition(name) for name, definition in pairs)", "definitions = tuple(dictionary.definition(name) or definition for name, definition in pairs)", "::test_part_of_a_folder_with_definitions_and_without_categories"),
    ),
    *plant(
        "data/built.py", "data/test_built.py",
        ("np.searchsorted(ends, index, side=\"right\")", "np.searchsorted(ends, index)", "::test_a_source_travels_to_other_processes"),
        slow=True,
    ),
    *plant(
        "data/checks.py", "data/test_checks.py",
        ("if num_bad > share * total:", "if num_bad >= share * total and num_bad:", "::test_a_share_may_be_bad_and_not_more"),
    ),
    *plant(
        "data/concepts.py", "data/test_concepts.py",
        ("same_definition.get(vocabulary.definitions[i], ()) for i in members", "() for i in members", "::test_negatives_leave_out_positives_synonyms_and_the_caption"),
        ("return found[name] if name in found else found.get(key(name), \"\")", "return found.get(key(name), \"\")", "::test_an_exact_name_wins_over_its_plural"),
        ("rows[truncated, -2] = tokenizer.EOS_ID", "rows[truncated, -1] = tokenizer.EOS_ID", "::test_ids_are_hashes_of_what_is_encoded"),
    ),
    *plant(
        "data/concepts.py", "data/test_concepts.py",
        ("if num_positive > capacity:", "if num_positive >= capacity:", "::test_table_against_a_loop"),
        slow=True,
    ),
    *plant(
        "data/leakage.py", "data/test_checks.py",
        ("(0{6}\\d{6})\\.jpe?g", "(0{6}\\d{6})\\.jpg", "::test_photos_of_other_sets_by_the_number_of_coco"),
    ),
    *plant(
        "data/scene_drawing.py", "data/test_scenes.py",
        ("low = np.maximum(np.floor(center - 1.45 * radius), 0).astype(int)", "low = np.maximum(np.floor(center - 1.0 * radius), 0).astype(int)", "::test_a_turned_shape_is_painted_to_its_ends"),
    ),
    *plant(
        "data/scenes.py", "data/test_scenes.py",
        ("if thing.texture != \"plain\" and rng.random() < 0.15 else thing.name", "if thing.texture != \"plain\" and rng.random() < 0.5 else thing.name", "::test_a_texture_is_told_now_and_then"),
        ("joint = \"left of\" if scene.things[0].center[0] < scene.things[1].center[0]", "joint = \"left of\" if scene.things[0].center[1] < scene.things[1].center[1]", "::test_parts_have_scenes_of_their_own_and_captions_the_side_that_is_seen"),
    ),
    *plant(
        "data/selection.py", "data/test_sources.py",
        ("if width > 1 and height > 1:", "if width > 1 or height > 1:", "::test_few_shots_have_every_category_as_often_and_no_image_more"),
        ("num_images.update(present[image_id])", "num_images.update(list(present[image_id])[:1])", "::test_few_shots_have_every_category_as_often_and_no_image_more"),
        slow=True,
    ),
    *plant(
        "data/sources.py", "data/test_sources.py",
        ("self.most_concepts = max(self.most_concepts, 1 + len(phrases))", "self.most_concepts = max(self.most_concepts, len(phrases))", "::test_pair_records"),
    ),
    *plant(
        "data/transforms.py", "data/test_transforms.py",
        ("return self.size[::-1] if self.orientation >= 5 else self.size", "return self.size[::-1] if self.orientation > 5 else self.size", "::test_exif_rotation_is_honoured_as_pillow_does"),
        ("return pixels[::-1, ::-1].transpose(1, 0, 2)", "return pixels[::-1].transpose(1, 0, 2)", "::test_exif_rotation_is_honoured_as_pillow_does"),
        ("shrinks = pixels.shape[0] > 2 * stored[0] or pixels.shape[1] > 2 * stored[1]", "shrinks = pixels.shape[0] > 2 * stored[0] and pixels.shape[1] > 2 * stored[1]", "::test_a_side_alone_that_shrinks_is_averaged"),
        ("empty = finite & ~inverted & ((boxes[:, 2] == boxes[:, 0]) | (boxes[:, 3] == boxes[:, 1]))", "empty = finite & ~inverted & ((boxes[:, 2] == boxes[:, 0]) & (boxes[:, 3] == boxes[:, 1]))", "::test_boxes_are_clipped_or_dropped_by_reason"),
    ),
    *plant(
        "eval/coco.py", "eval/test_coco.py",
        ("return categories % self.count == self.index", "return categories // self.count == self.index", "::test_published_numbers"),
        ("values = values[values > -1]", "values = np.maximum(values, 0.0)", "::test_frequencies_average_their_categories"),
    ),
    *plant(
        "eval/detections.py", "eval/test_detections.py",
        ("sample = slice(None, None, 1 + len(boxes) // _NUM_LOOKED_AT)", "sample = slice(0, 1)", "::test_boxes_of_another_form_are_told_by_most_of_those_looked_at"),
        ("if (boxes[:, 2:] < 0).any():", "if (boxes[:, 2:] <= 0).any():", "::test_positions_in_the_truth_and_what_was_repaired"),
    ),
    *plant(
        "eval/grounding.py", "eval/test_grounding.py",
        ("(overlaps >= MIN_IOU).any(axis=1)", "(overlaps > MIN_IOU).any(axis=1)", "::test_recall_of_any_box_and_of_merged_boxes"),
        ("int(rank <= k) for k in RANKS", "int(rank < k) for k in RANKS", "::test_recall_of_any_box_and_of_merged_boxes"),
        ("low, high = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)", "low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)", "::test_recall_of_any_box_and_of_merged_boxes"),
    ),
    *plant(
        "eval/loop.py", "eval/test_loop.py",
        ("max_drawn=min(20, max(3, len(rows))),", "max_drawn=20,", "::test_part_of_the_images_and_what_is_drawn_and_recorded"),
        slow=True,
    ),
    *plant(
        "eval/lvis.py", "eval/test_lvis_scores.py",
        ("free = (iou[start:end, None] >= thresholds)", "free = (iou[start:end, None] > thresholds)", "::test_an_overlap_of_exactly_the_threshold_is_enough"),
        ("order = np.lexsort((box, iou, detection, place))", "order = np.lexsort((-box, iou, detection, place))", "::test_of_boxes_that_overlap_as_much_the_last_is_taken"),
    ),
    *plant(
        "eval/names.py", "eval/test_names.py",
        ("belonging = np.flatnonzero(overlap.max(axis=1) > MIN_IOU)", "belonging = np.flatnonzero(overlap.max(axis=1) >= MIN_IOU)", "::test_counts_by_hand"),
    ),
    *plant(
        "eval/odinw.py", "eval/test_odinw.py",
        ("if len(values) == len(group) else None", "if values else None", "::test_command_scores_what_is_there"),
        ("-(-config.eval.batch_size // jax.device_count()) * jax.device_count()", "config.eval.batch_size // jax.device_count() * jax.device_count()", "::test_command_scores_what_is_there"),
        ("member.prompts.get(x, x) for x in vocabulary.names", "member.prompts.get(x, \"\") for x in vocabulary.names", "::test_command_scores_what_is_there"),
    ),
    *plant(
        "eval/odinw.py", "eval/test_odinw.py",
        ("plain_names=plain_names or kind == \"finetuned\"", "plain_names=plain_names", "::test_a_fine_tuned_run_is_asked_with_the_names_it_was_trained_with"),
        slow=True,
    ),
    *plant(
        "eval/proposals.py", "eval/test_proposals.py",
        ("part = dataclasses.replace(agnostic, ignored=truth.ignored | others)", "part = dataclasses.replace(agnostic, ignored=others)", "::test_objects_are_found_under_whatever_name"),
        ("found = found.take(np.argsort(-found.scores, kind=\"stable\"))", "found = found.take(np.argsort(found.scores, kind=\"stable\"))", "::test_a_place_counts_once_and_300_of_an_image"),
        ("place = np.arange(len(images)) - np.searchsorted(images, images)", "place = np.arange(len(images))", "::test_a_place_counts_once_and_300_of_an_image"),
    ),
    *plant(
        "eval/result.py", "eval/test_result.py",
        ("order = np.argsort(image_ids, kind=\"stable\")", "order = np.argsort(image_ids)[::1] if len(image_ids) < 17 else np.argsort(image_ids)", "::test_rows_become_coco_results"),
        ("if time.time() - folder.stat().st_mtime > LEFT_SECONDS:", "if time.time() - folder.stat().st_mtime < LEFT_SECONDS:", "::test_rows_are_put_on_disk_once_a_minute_and_what_is_a_week_old_goes"),
    ),
    *plant(
        "eval/thresholds.py", "eval/test_thresholds.py",
        ("threshold = (lowest + below) / 2", "threshold = lowest", "::test_few_examples_take_the_common_threshold_and_a_wanted_precision_that_there_is_not_keeps_nothing"),
        ("good = num_right > 0 if min_precision is None else (precision >= min_precision) & (num_right > 0)", "good = num_right > 0 if min_precision is None else (precision > min_precision) & (num_right > 0)", "::test_thresholds_equal_brute_force"),
        ("few = one.num_boxes < MIN_EXAMPLES", "few = one.num_boxes <= MIN_EXAMPLES", "::test_few_examples_take_the_common_threshold_and_a_wanted_precision_that_there_is_not_keeps_nothing"),
        ("order = order[counted[order]]", "pass", "::test_thresholds_equal_brute_force"),
        ("ends = np.flatnonzero(np.diff(scores, append=-np.inf))", "ends = np.arange(len(scores))", "::test_thresholds_equal_brute_force"),
        ("np.flatnonzero(good)[-1])", "np.flatnonzero(good)[0])", "::test_thresholds_equal_brute_force"),
    ),
    *plant(
        "export/__main__.py", "export/test_from_pretrained.py",
        ("asked = asked or dict(predictor.words)", "asked = asked or {}", "::test_every_reader_of_checkpoints_takes_an_export"),
        slow=True,
    ),
    *plant(
        "export/programs.py", "export/test_export.py",
        ("photos = Photos(image, extent, (extent / original_size).astype(jnp.float32), original_size)", "photos = Photos(image, extent, (original_size / extent).astype(jnp.float32), original_size)", "::test_stablehlo"),
        ("if config.model.head.deform_impl in (\"auto\", \"pallas\"):", "if config.model.head.deform_impl in (\"auto\",):", "::test_what_is_exported_has_no_kernels"),
        slow=True,
    ),
    *plant(
        "export/scripts/detector.py", "export/test_export.py",
        ("(0, -len(text) % WORDS)", "(0, len(text) % WORDS)", "::test_numbers_of_words_share_a_program"),
        slow=True,
    ),
    *plant(
        "export/scripts/weights.py", "export/test_export.py",
        ("VOCABULARY = \"weights.safetensors\", \"vocabulary.safetensors\"", "VOCABULARY = \"weights.safetensors\", \"weights.safetensors\"", "::test_weights_and_vocabulary"),
        slow=True,
    ),
    *plant(
        "files.py", "test_files.py",
        ("if not encoding and 4 * data[:256].count(0) > len(data[:256]):", "if not encoding and 2 * data[:256].count(0) > len(data[:256]):", "::test_utf_16_is_refused_by_name"),
        ("last[name.casefold()] = 1", "last[name] = 1", "::test_names_that_a_file_system_may_take_for_one_are_told_apart"),
        ("return text if text.isprintable() else ascii(text)", "return text if text.isascii() else ascii(text)", "::test_a_name_in_a_line_of_a_log"),
    ),
    *plant(
        "geometry/anchors.py", "geometry/test_boxes.py",
        ("centers_yx[None] < extent[:, None]", "centers_yx[None] <= extent[:, None]", "::test_a_centre_on_the_edge_of_a_photo_is_not_on_it"),
    ),
    *plant(
        "geometry/anchors.py", "geometry/test_boxes.py",
        ("tuple((-(-canvas[0] // stride), -(-canvas[1] // stride)) for stride in STRIDES)", "tuple((-(-canvas[0] // stride), canvas[1] // stride) for stride in STRIDES)", "::test_anchor_grid"),
        slow=True,
    ),
    *plant(
        "geometry/atss.py", "geometry/test_atss.py",
        ("positive = (overlap >= threshold) & inside & box_mask[:, None]", "positive = (overlap >= threshold) & inside", "::test_masked_boxes_take_part_in_nothing"),
        ("first = jnp.clip(nearest - WINDOW // 2, 0, np.asarray(sides) - size)", "first = jnp.clip(nearest - WINDOW // 2, 0, np.asarray(sides))", "::test_the_nearest_anchors_are_found_near_the_box_wherever_it_lies"),
    ),
    *plant(
        "geometry/atss.py", "geometry/test_atss.py",
        ("if index.shape[1] > 1:", "if index.shape[1] > 2:", "::test_the_threshold_by_hand_where_it_binds"),
        slow=True,
    ),
    *plant(
        "geometry/boxes.py", "geometry/test_boxes.py",
        ("return jnp.min(inside, axis=-1) > margin", "return jnp.min(inside, axis=-1) >= margin", "::test_scale_clip_and_contains"),
        ("WH_RATIO_CLIP = 16 / 1000", "WH_RATIO_CLIP = 1 / 1000", "::test_decoded_sides_are_bounded"),
        ("return (boxes[..., :2] + boxes[..., 2:]) * 0.5", "return boxes[..., :2] + jnp.floor((boxes[..., 2:] - boxes[..., :2]) * 0.5)", "::test_deltas_are_inverse_and_follow_the_formula"),
    ),
    *plant(
        "geometry/nms.py", "geometry/test_nms.py",
        ("overlap & (classes[a][:, None] == classes[b][None])", "overlap & (classes[a][:, None] >= classes[b][None])", "::test_equal_to_torchvision"),
    ),
    *plant(
        "geometry/nms.py", "geometry/test_nms.py",
        ("order = jnp.argsort(jnp.where(mask, -scores, jnp.inf), stable=True)", "order = jnp.argsort(jnp.where(mask, -scores, jnp.inf), stable=True)[::1][: num_boxes - num_boxes % 2 or 1]", "::test_minus_infinity_is_a_score_like_any_other"),
        slow=True,
    ),
    *plant(
        "inference/detect.py", "inference/test_inference.py",
        ("mask = (scores > limits.score_threshold) & (box_lib.area(boxes) > 0.0)", "mask = scores > limits.score_threshold", "::test_detect_equals_brute_force"),
    ),
    *plant(
        "inference/detect.py", "inference/test_inference.py",
        ("rows = jnp.sort(rows, axis=-1)", "rows = rows + 0", "::test_chunks_and_padding_change_nothing"),
        ("np.maximum(np.ceil(np.asarray(extent) / anchor_lib.STRIDES[0] - 0.5), 1)", "np.maximum(np.ceil(np.asarray(extent) / anchor_lib.STRIDES[0]), 1)", "::test_predictor_aligns_a_caption"),
        slow=True,
    ),
    *plant(
        "inference/detector.py", "inference/test_exemplars.py",
        ("float(jnp.clip(-bias / scale, 0.1, 1.0))", "float(jnp.clip(-bias / scale, 0.1, 10.0))", "::test_the_length_of_a_query_is_at_most_that_of_a_word"),
        slow=True,
    ),
    *plant(
        "inference/exemplars.py", "inference/test_exemplars.py",
        ("known.areas[rows] >= np.median(known.areas[rows])", "known.areas[rows] > np.median(known.areas[rows])", "::test_examples_of_a_whole_data_set"),
        ("np.random.default_rng(seed)", "np.random.default_rng(0)", "::test_examples_of_a_whole_data_set"),
    ),
    *plant(
        "inference/exemplars.py", "inference/test_exemplars.py",
        ("not (cut[2:] > cut[:2]).all():", "not (cut[2:] >= cut[:2]).all():", "::test_wrong_examples_are_one_clear_error"),
        slow=True,
    ),
    *plant(
        "inference/tiles.py", "inference/test_tiles.py",
        ("np.maximum.at(scores, best[held], scores[parts[held]])", "scores[best[held]] = scores[parts[held]]", "::test_parts_of_an_object_go_into_the_whole_one"),
        ("scores, stays = scores.copy(),", "scores, stays = scores,", "::test_parts_of_an_object_go_into_the_whole_one"),
    ),
    *plant(
        "inference/tiles.py", "inference/test_tiles.py",
        ("classes=np.pad(classes[rows], (0, padding)),", "classes=None,", "::test_parts_of_an_object_go_into_the_whole_one"),
        slow=True,
    ),
    *plant(
        "interpolate.py", "test_interpolate.py",
        ("if first.old <= 0:", "if first.old < 0:", "::test_the_smaller_share_judges"),
        ("scores.get(config.eval.monitor, scores[\"AP\"])", "scores[\"AP\"]", "::test_the_best_weights_are_kept"),
        ("*(score(round(i / steps, 4)) for i in range(1, steps))", "*(score(round(i / steps, 4)) for i in range(1, steps - 1))", "::test_the_best_weights_are_kept"),
    ),
    *plant(
        "losses/alignment.py", "losses/test_alignment_loss.py",
        ("counts &= hits | columns.verified[:, None]", "counts &= columns.verified[:, None]", "::test_alignment_loss_equals_brute_force_and_ignores_masked_places"),
    ),
    *plant(
        "losses/class_names.py", "losses/test_class_names.py",
        ("valid = image_mask & jnp.any(proposed.mask, axis=1) & captions.mask[:, 0]", "valid = image_mask & captions.mask[:, 0]", "::test_images_of_one_class_are_no_negatives_of_each_other"),
        ("is_best = jnp.sum(logits >= own[None], axis=0) == 1", "is_best = jnp.sum(logits > own[None], axis=0) == 0", "::test_images_of_one_class_are_no_negatives_of_each_other"),
        ("mean(own * settings.temperature)", "mean(own)", "::test_images_of_one_class_are_no_negatives_of_each_other"),
    ),
    *plant(
        "losses/concept_table.py", "losses/test_concept_table.py",
        ("slot = jnp.cumsum(is_unique, dtype=jnp.int32) - 1", "slot = jnp.cumsum(is_unique, dtype=jnp.int32)", "::test_unique_rows_number_the_canonical_rows_without_gaps"),
        ("starts = (high[1:] != high[:-1]) | (low[1:] != low[:-1]) | masked[1:]", "starts = (high[1:] != high[:-1]) | (low[1:] != low[:-1])", "::test_canonical_rows_are_the_first_valid_ones"),
    ),
    *plant(
        "losses/contrastive.py", "losses/test_contrastive.py",
        ("loss = losses[0] if len(losses) == 1 else 0.5 * (losses[0] + losses[1])", "loss = losses[0] if len(losses) == 1 else losses[0] + losses[1]", "::test_equals_brute_force"),
        ("rank = reduce_scatter(jnp.sum(logits >= gather(own, axes)[:, None]", "rank = reduce_scatter(jnp.sum(logits > gather(own, axes)[:, None]", "::test_equals_brute_force"),
    ),
    *plant(
        "losses/devices.py", "losses/test_devices.py",
        ("size - size % 128 if size > 128 else size", "size - size % 128 if size >= 256 else size", "::test_sizes_of_chunks"),
        ("return _as_bits(lambda bits: jax.lax.all_gather(bits, axes, tiled=True), x) if axes else x", "return _as_bits(lambda bits: jax.lax.all_gather(bits, axes[::-1], tiled=True), x) if axes else x", "::test_rows_are_split_in_order_and_sums_are_shared"),
    ),
    *plant(
        "losses/image_side.py", "losses/test_contrastive.py",
        ("similarity = jnp.where(mask[None, None], similarity.reshape(b, k, size, m), LOW)", "similarity = similarity.reshape(b, k, size, m)", "::test_equals_brute_force"),
        ("share = region_mask / jnp.maximum(jnp.sum(region_mask, axis=1, keepdims=True, dtype=jnp.float32), 1.0)", "share = region_mask / region_mask.shape[1]", "::test_equals_brute_force"),
    ),
    *plant(
        "losses/localization.py", "losses/test_localization.py",
        ("return box_sum, jnp.sum(jnp.where(positive, cross_entropy, 0.0))", "return box_sum, jnp.sum(cross_entropy)", "::test_perfect_boxes_cost_nothing_and_centerness_is_cross_entropy"),
        ("target_centerness * (1.0 - box_lib.generalized_iou(predicted, target_boxes))", "target_centerness * (1.0 - box_lib.iou(predicted, target_boxes))", "::test_disjoint_box_costs_one_minus_giou_times_its_weight"),
        ("target_boxes = jnp.where(positive[..., None], target_boxes, anchors)", "target_boxes = target_boxes + 0.0", "::test_masked_anchors_have_exactly_zero_gradients_even_for_degenerate_targets"),
    ),
    *plant(
        "losses/matching.py", "losses/test_contrastive.py",
        ("best_bar.at[slots[:, m]].add(weights[:, m, None] * scores_bar)", "best_bar.at[slots[:, m]].set(weights[:, m, None] * scores_bar)", "::test_equals_brute_force"),
    ),
    *plant(
        "losses/matching.py", "losses/test_contrastive.py",
        ("start = jnp.minimum(n * size, unique.order.shape[0] - size)", "start = n * size", "::test_concepts_of_two_chunks_count_once"),
        slow=True,
    ),
    *plant(
        "losses/proposals.py", "losses/test_contrastive_proposals.py",
        ("min(settings.pre_nms, num_anchors)", "min(settings.num_proposals, num_anchors)", "::test_equals_brute_force"),
        ("boxes[top],\n        top_scores,", "boxes[top],\n        scores[: top.shape[0]],", "::test_equals_brute_force"),
    ),
    *plant(
        "losses/selection_pallas.py", "losses/test_selection_pallas.py",
        ("return best[: b * a].reshape(b, a)", "return best[: b * a].reshape(a, b).T", "::test_interpreted_kernel_equals_a_plain_maximum"),
    ),
    *plant(
        "models/atss_head.py", "models/test_atss_head.py",
        ("mask = jax.nn.sigmoid(steering[..., 2 * TAPS :])", "mask = 2 * jax.nn.sigmoid(steering[..., 2 * TAPS :])", "::test_outputs_and_gradients_equal_torch"),
        ("box_feature = tower(name=\"box_tower\")(feature)", "box_feature = jax.lax.stop_gradient(tower(name=\"box_tower\")(feature))", "::test_outputs_and_gradients_equal_torch"),
        ("class_feature = tower(name=\"class_tower\")(class_feature)", "class_feature = tower(name=\"class_tower\")(feature)", "::test_outputs_and_gradients_equal_torch"),
        ("box_deltas=_flatten(box_outputs * scales[level]),", "box_deltas=_flatten(box_outputs * scales[0]),", "::test_outputs_and_gradients_equal_torch"),
    ),
    *plant(
        "models/deform_conv.py", "models/test_deform_conv.py",
        ("inside = (top >= -1) & (top < h) & (left >= -1) & (left < w)", "inside = (top >= 0) & (top < h) & (left >= -1) & (left < w)", "::test_equal_to_torchvision"),
        ("return jnp.where((distance >= -1.0) & (distance < 1.0), weight, 0.0)", "return jnp.where((distance > -1.0) & (distance <= 1.0), weight, 0.0)", "::test_equal_to_torchvision"),
    ),
    *plant(
        "models/deform_conv.py", "models/test_deform_conv.py",
        ("jnp.max(jnp.abs(arguments[1])) < BAND_RADIUS", "jnp.max(arguments[1]) < BAND_RADIUS", "::test_the_band_is_left_only_for_larger_offsets"),
        slow=True,
    ),
    *plant(
        "models/detclip.py", "models/test_detclip.py",
        ("rows = jnp.arange(height)[None] < extent[:, :1]", "rows = jnp.arange(height)[None] <= extent[:, :1]", "::test_what_the_padding_holds_does_not_matter"),
        ("IMAGE_STD = np.array((58.395, 57.12, 57.375), np.float32)", "IMAGE_STD = np.array((57.375, 57.12, 58.395), np.float32)", "::test_regions_and_gradients_equal_torch"),
        slow=True,
    ),
    *plant(
        "models/fpn.py", "models/test_fpn.py",
        ("conv((3, 3), strides=2, padding=1, name=f\"output{level}\")(levels[-1])", "conv((3, 3), strides=2, padding=1, name=f\"output{level}\")(levels[2])", "::test_levels_and_gradients_equal_torch"),
        ("[:, : size[0], : size[1]]", "[:, : size[0], -size[1] :]", "::test_levels_and_gradients_equal_torch"),
    ),
    *plant(
        "models/repeat.py", "models/test_repeat.py",
        ("len(turns) >= MIN_REPEATS and len(turns[-1]) == len(blocks)", "len(turns) >= MIN_REPEATS", "::test_blocks_take_turns_and_whole_turns_alone_are_a_loop"),
    ),
    *plant(
        "models/swin.py", "models/test_swin.py",
        ("relative = position[:, None] - position[None, :] + window - 1", "relative = position[None, :] - position[:, None] + window - 1", "::test_equal_to_the_libraries"),
        ("return x[:, :h, :w]", "return x[:, -h:, -w:]", "::test_equal_to_the_libraries"),
        ("for shift in (0, self.window_size // 2)[:depth]", "for shift in (0, (self.window_size + 1) // 2)[:depth]", "::test_equal_to_the_libraries"),
        (".transpose(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)", ".transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)", "::test_equal_to_the_libraries"),
    ),
    *plant(
        "models/text_encoder.py", "models/test_text_encoder.py",
        ("causal = jnp.tril(jnp.ones((length, length), bool))", "causal = jnp.ones((length, length), bool)", "::test_equal_to_the_libraries"),
        ("y = y * jax.nn.sigmoid(1.702 * y)", "y = jax.nn.gelu(y)", "::test_equal_to_the_libraries"),
    ),
    *plant(
        "models/text_encoder.py", "models/test_text_encoder.py",
        ("x = x + position[None, :length].astype(self.dtype)", "x = x + position[None, -length:].astype(self.dtype)", "::test_nothing_after_the_end_matters"),
        slow=True,
    ),
    *plant(
        "models/window_attention.py", "models/test_window_attention.py",
        ("MASKED = -100.0", "MASKED = -10.0", "::test_values_and_gradients_are_those_of_the_formula"),
    ),
    *plant(
        "models/window_attention.py", "models/test_window_attention.py",
        ("fits = size**2 <= TILE and", "fits = size**2 < TILE and", "::test_what_the_kernel_cannot_hold_is_left_to_xla"),
        slow=True,
    ),
    *plant(
        "predict/formats.py", "predict/test_formats.py",
        ("for i, (path, found) in enumerate(results, start=1):", "for i, (path, found) in enumerate(results):", "::test_supervision_reads_coco"),
        ("corners = found.boxes.astype(np.float64).reshape(-1, 2, 2) / (width, height)", "corners = found.boxes.astype(np.float64).reshape(-1, 2, 2) / (height, width)", "::test_supervision_reads_yolo"),
    ),
    *plant(
        "predict/inputs.py", "predict/test_videos.py",
        ("if num_frames % every == 0:", "if num_frames % every == every - 1:", "::test_frames_are_photos_with_names_of_their_own"),
        ("if announced - num_frames > max(1, announced // 100):", "if announced - num_frames > max(10, announced // 10):", "::test_a_video_that_cannot_be_read_is_one_error"),
    ),
    *plant(
        "predict/inputs.py", "test_predict.py",
        ("for name in safe_names(path.stem for path in paths)]", "for name in safe_names(path.name for path in paths)]", "::test_everything_is_written"),
    ),
    *plant(
        "predict/thresholds.py", "test_predict.py",
        ("rows = np.flatnonzero(position[found.labels] >= 0)", "rows = np.flatnonzero(position[found.labels] > 0)", "::test_thresholds_are_chosen_written_and_used_again"),
        slow=True,
    ),
    *plant(
        "preflight/hlo.py", "preflight/test_hlo.py",
        ("network[kind] += times * size", "network[kind] += size", "::test_collectives_in_and_out_of_loops"),
        ("max(branches, key=lambda branch: branch.memory)", "min(branches, key=lambda branch: branch.memory)", "::test_what_one_branch_sends_counts_though_the_other_moves_more_memory"),
    ),
    *plant(
        "preflight/report.py", "preflight/test_preflight.py",
        ("f\"more than {memory / GIB:.1f} GiB", "f\"more than {memory / 1e9:.1f} GiB", "::test_a_refusal_without_a_number_is_no_number_and_all_is_tried"),
        ("well = well and all(row.fits for row in rows)", "well = all(row.fits for row in rows)", "::test_one_report_of_the_data_and_one_of_each_topology"),
        slow=True,
    ),
    *plant(
        "prepare/classes.py", "prepare/test_classes.py",
        ("elif not 0 <= label < len(self.names) or not self.names[label]:", "elif not 0 <= label < len(self.names):", "::test_a_folder_of_class_folders"),
    ),
    *plant(
        "prepare/box_json.py", "prepare/test_box_readers.py",
        ("sorted(images_of.items(), key=lambda item: (len(item[1]), item[0]))", "sorted(images_of.items(), key=lambda item: (-len(item[1]), item[0]))", "::test_few_images_show_the_rarest_categories"),
    ),
    *plant(
        "prepare/dictionary.py", "prepare/test_dictionary.py",
        (".argmax(axis=1).tolist()", ".argmin(axis=1).tolist()", "::test_what_is_left_takes_the_definition_that_a_text_tower_finds"),
        ("entry.head and of_head >= row[i] - HEAD_MARGIN", "entry.head", "::test_a_head_word_counts_where_the_tower_finds_no_name_clearly_nearer"),
        ("entry.head and of_head >= row[i] - HEAD_MARGIN", "entry.head and of_head >= row[i]", "::test_a_head_word_counts_where_the_tower_finds_no_name_clearly_nearer"),
        ("0 < int(number) <= len(offsets)", "0 < int(number) < len(offsets)", "::test_senses_of_names_plurals_and_alternatives"),
    ),
    *plant(
        "prepare/image_text.py", "prepare/test_image_text.py",
        ("if len(caption) > MAX_CHARACTERS:", "if len(caption) >= MAX_CHARACTERS:", "::test_bad_lines_of_a_tsv_have_defined_results"),
    ),
    *plant(
        "prepare/inspect.py", "prepare/test_inspect.py",
        ("width = -(-(high - low + 1) // _MAX_BINS)", "width = max((high - low + 1) // _MAX_BINS, 1)", "::test_bins_are_whole_and_few"),
        slow=True,
    ),
    *plant(
        "prepare/box_json.py", "prepare/test_lvis.py",
        ("missing = [field for field in FEDERATED if not any(field in image for image in content[\"images\"])]", "missing = [field for field in FEDERATED[:1] if not any(field in image for image in content[\"images\"])]", "::test_a_json_that_is_not_lvis_is_refused"),
    ),
    *plant(
        "prepare/pseudo_boxes.py", "prepare/test_model_passes.py",
        ("caption = f\"{caption.rstrip(' .')}. {self._names[box.word]}\"", "caption = f\"{caption}. {self._names[box.word]}\"", "::test_a_dictionary_completes_what_the_caption_does_not_name"),
        slow=True,
    ),
    *plant(
        "prepare/record_builder.py", "prepare/test_shards.py",
        ("sum(length > CONTEXT_LENGTH for length in lengths.values())", "sum(length >= CONTEXT_LENGTH for length in lengths.values())", "::test_concepts_above_the_context_are_counted"),
    ),
    *plant(
        "prepare/text_tower.py", "prepare/test_text_tower.py",
        ("np.pad(tokens, ((0, -len(tokens) % _BATCH), (0, 0)))", "np.pad(tokens, ((-len(tokens) % _BATCH, 0), (0, 0)))", "::test_cosines_of_names"),
        slow=True,
    ),
    *plant(
        "runs/checkpoints.py", "runs/test_checkpoints.py",
        ("old = len(checkpoints) - self._num_newest", "old = len(checkpoints) - self._num_newest - 1", "::test_the_newest_and_the_best_stay"),
        ("key=lambda step: (step == first, step), reverse=True", "key=lambda step: step, reverse=True", "::test_what_was_saved_comes_back_and_damage_is_told"),
    ),
    *plant(
        "runs/exported.py", "export/test_from_pretrained.py",
        ("weights |= tensors", "weights = tensors", "::test_weights_in_several_files"),
        ("or not np.isfinite(stored).all():", "or np.isnan(stored).all():", "::test_what_is_wrong_is_one_error"),
        ("if words and embeddings is not None:", "if embeddings is not None:", "::test_stored_weights_are_rounded_once"),
        ("return not (path / \"checkpoints\").is_dir() and any(", "return any(", "::test_a_folder_with_checkpoints_is_a_run"),
        slow=True,
    ),
    *plant(
        "runs/hub.py", "export/test_from_pretrained.py",
        ("private=private, exist_ok=True", "private=False, exist_ok=True", "::test_a_folder_is_pushed"),
        ("snapshot_download(name, revision=revision,", "snapshot_download(name,", "::test_names_that_the_hub_does_not_have"),
        slow=True,
    ),
    *plant(
        "runs/metrics.py", "runs/test_metrics.py",
        ("self._kept = [row for row in numbered if row[\"step\"] <= start]", "self._kept = [row for row in numbered if row[\"step\"] < start]", "::test_lines_after_the_start_are_removed_and_the_start_stays"),
        ("\"timing/step_seconds\": elapsed / max(self._steps, 1),", "\"timing/step_seconds\": elapsed / max(self._images, 1),", "::test_rates_and_waiting"),
        ("minutes = round(seconds / 60)", "minutes = int(seconds / 60)", "::test_durations_are_rounded_to_minutes"),
    ),
    *plant(
        "runs/optimizer.py", "runs/test_optimizer.py",
        ("if scores[step] > best or step < config.warmup_steps", "if scores[step] >= best or step < config.warmup_steps", "::test_plateaus_lower_the_rate_and_end_the_run"),
        ("max(total_steps, warmup + 1), end_value=config.min_learning_rate", "max(total_steps, warmup + 1), end_value=0.0", "::test_other_learning_rates"),
        ("round(share * total_steps): config.decay_factor", "int(share * total_steps): config.decay_factor", "::test_other_learning_rates"),
    ),
    *plant(
        "runs/order.py", "runs/test_order.py",
        ("min(1.0, value * boxes / totals[Kind.IMAGE_TEXT])", "value * boxes / totals[Kind.IMAGE_TEXT]", "::test_kinds_share_an_epoch_as_the_mixture_says"),
        ("if mixture == \"capped\" and boxes and totals", "if mixture == \"capped\" and totals", "::test_kinds_share_an_epoch_as_the_mixture_says"),
        ("np.searchsorted(self.epoch_ends, step, side=\"right\")", "np.searchsorted(self.epoch_ends, step, side=\"left\")", "::test_the_papers_run_has_159k_steps_in_the_papers_shares"),
        ("length = sum(totals.values()) / sum(shares.values()) if shares else 0.0", "length = 1.0 if shares else 0.0", "::test_kinds_share_an_epoch_as_the_mixture_says"),
    ),
    *plant(
        "runs/pretrained.py", "runs/test_pretrained.py",
        ("return value[: shape[0]]", "return value[-shape[0] :]", "::test_files_are_fitted_to_the_model"),
    ),
    *plant(
        "runs/processes.py", "runs/test_processes.py",
        ("(\"JAX_COORDINATOR_ADDRESS\", \"COORDINATOR_ADDRESS\")", "(\"COORDINATOR_ADDRESS\",)", "::test_joining_is_automatic_where_variables_say_so"),
    ),
    *plant(
        "runs/sharding.py", "runs/test_sharding.py",
        ("key=lambda axis: (shape[axis], axis)", "key=lambda axis: (shape[axis], -axis)", "::test_the_largest_divisible_axis_is_split"),
    ),
    *plant(
        "runs/sharding.py", "runs/test_sharding.py",
        ("offset = jax.process_index() * batch.concept_tokens.shape[0]", "offset = jax.process_index() * batch.image.shape[0]", "::test_rows_of_a_later_process_follow_those_of_the_ones_before"),
        slow=True,
    ),
    *plant(
        "session.py", "test_session.py",
        ("if key.startswith(\"num_\")", "if key.startswith(\"num_d\")", "::test_generated_files_are_those_that_were_asked_for"),
        ("if changed and not allowed:", "if changed and allowed:", "::test_data_that_changed"),
    ),
    *plant(
        "train.py", "test_train.py",
        ("step in run.order.epoch_ends[section.every_epochs - 1 :: section.every_epochs]", "step in run.order.epoch_ends[:: section.every_epochs]", "::test_evaluations_come_at_the_ends_of_epochs_or_every_few_steps"),
        ("return max(sorted(scores), key=lambda step: scores[step][run.config.eval.monitor])", "return max(sorted(scores, reverse=True), key=lambda step: scores[step][run.config.eval.monitor])", "::test_the_best_step_is_the_first_with_the_best_monitored_score"),
    ),
    *plant(
        "train_step.py", "test_train_step_losses.py",
        ("average + (1.0 - ema_decay) * (param - average)", "average + ema_decay * (param - average)", "::test_the_update_the_average_and_the_norms_follow_from_the_gradient"),
        ("first[:, None] * length + place", "first[:, None] + place", "::test_loss_and_gradients_equal_the_oracle"),
        slow=True,
    ),
    *plant(
        "validation.py", "test_config.py",
        ("return Rule(key, lambda value: (value >= 0 if lowest else value > 0) and value < 1, text)", "return Rule(key, lambda value: (value >= 0 if lowest else value > 0) and value <= 1, text)", "::test_what_goes_by_scores_needs_them"),
        ("lambda value: 0 <= value < optimizer.learning_rate, allowed", "lambda value: 0 <= value <= optimizer.learning_rate, allowed", "::test_edges_of_what_is_allowed"),
    ),
    *plant(
        "visualize/charts.py", "visualize/test_visualize.py",
        ("columns = min(4, len(panels) + bool(bars))", "columns = min(4, len(panels))", "::test_curves_have_a_panel_a_quantity"),
        ("if top > 0 and top < 0.3 * axes.get_ylim()[1]:", "if top > 0 and top < 0.9 * axes.get_ylim()[1]:", "::test_what_matters_most_comes_first_and_scores_are_in_percent"),
        ("order = np.argsort(values, kind=\"stable\")", "order = np.argsort(-values, kind=\"stable\")", "::test_bars_are_ordered_and_one_is_marked"),
        slow=True,
    ),
    *plant(
        "visualize/drawing.py", "visualize/test_drawing.py",
        ("padding = (y >= extent[0]) | (x >= extent[1])", "padding = (y > extent[0]) | (x > extent[1])", "::test_stripes_of_padding_are_diagonal"),
    ),
    *plant(
        "visualize/figures.py", "visualize/test_visualize.py",
        ("used = np.union1d(batch.box_concepts[batch.box_mask], batch.caption_concepts[batch.caption_mask])", "used = np.unique(batch.box_concepts[batch.box_mask])", "::test_contact_sheet_says_what_a_batch_holds"),
        slow=True,
    ),
    *plant(
        "visualize/drawing.py", "test_labels.py",
        ("max(12, min(15, round(max(size) / 55)))", "max(12, min(18, round(max(size) / 55)))", "::test_labels_are_legible_on_their_colour_and_no_wider_than_the_photo"),
    ),
    *plant(
        "labels.py", "test_labels.py",
        ("for y in (y1 - height, y1, y2, y2 - height, (y1 + y2 - height) / 2)", "for y in (y1, y1 - height, y2, y2 - height, (y1 + y2 - height) / 2)", "::test_labels_are_legible_on_their_colour_and_no_wider_than_the_photo"),
    ),
    *plant(
        "labels.py", "visualize/test_visualize.py",
        ("max_drawn if len(good) else min(max_drawn, NUM_WEAK)", "max_drawn", "::test_detections_without_any"),
    ),
]  # fmt: skip
