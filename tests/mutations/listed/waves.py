"""Faults of a hostile reading, room by room, that the tests of their files notice."""

from tests.mutations.fault import plant

FAULTS = [
    *plant(
        "data/annotations.py", "data/test_annotations.py",
        ("(inside.prod(axis=1) < 0.9 * size.prod(axis=1))", "(inside.prod(axis=1) < 0.5 * size.prod(axis=1))", "::test_boxes_of_another_form_are_told"),
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
        ("owned.append(distinct[: self.num_captions])", "owned.append(distinct[-self.num_captions :])", "::test_phrases_are_unique_and_capped"),
        ("np.concatenate([concepts[i][~doubtful], negatives[i][negatives[i] < self.capacity]])", "np.concatenate([concepts[i][~doubtful], negatives[i]])", "::test_only_as_many_verified_negatives_as_there_is_room_for_and_never_what_is_doubtful"),
        slow=True,
    ),
    *plant(
        "data/built.py", "data/test_built.py",
        ("np.searchsorted(np.cumsum(self._split.shard_lengths), index, side=\"right\")", "np.searchsorted(np.cumsum(self._split.shard_lengths), index)", "::test_a_source_travels_to_other_processes"),
        slow=True,
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
        "data/scenes.py", "data/test_scenes.py",
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
        ("empty = finite & ~inverted & ((boxes[:, 2] == boxes[:, 0]) | (boxes[:, 3] == boxes[:, 1]))", "empty = finite & ~inverted & ((boxes[:, 2] == boxes[:, 0]) & (boxes[:, 3] == boxes[:, 1]))", "::test_boxes_are_clipped_or_dropped_by_reason"),
    ),
    *plant(
        "eval/coco.py", "eval/test_coco.py",
        ("return categories % self.count == self.index", "return categories // self.count == self.index", "::test_published_numbers"),
    ),
    *plant(
        "eval/grounding.py", "eval/test_grounding.py",
        ("(overlaps >= MIN_IOU).any(axis=1)", "(overlaps > MIN_IOU).any(axis=1)", "::test_recall_of_any_box_and_of_merged_boxes"),
        ("int(rank <= k) for k in RANKS", "int(rank < k) for k in RANKS", "::test_recall_of_any_box_and_of_merged_boxes"),
        ("low, high = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)", "low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)", "::test_recall_of_any_box_and_of_merged_boxes"),
    ),
    *plant(
        "eval/lvis.py", "eval/test_lvis_scores.py",
        ("free = (iou[start:end, None] >= thresholds)", "free = (iou[start:end, None] > thresholds)", "::test_an_overlap_of_exactly_the_threshold_is_enough"),
        ("\"AP75\": mean(all_areas[:, 5])", "\"AP75\": mean(all_areas[:, 4])", "::test_numbers_of_lvis_api"),
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
        ("return jnp.min(inside, axis=-1) > margin", "return jnp.min(inside, axis=-1) >= margin", "::test_flip_scale_clip_and_contains"),
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
    ),
    *plant(
        "losses/class_names.py", "test_class_name_steps.py",
        ("mean(own * settings.temperature)", "mean(own)", "::test_tokens_class_names_and_a_capped_mixture_train_and_resume"),
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
        ("shifts = (self.shift if rows > 1 else 0, self.shift if columns > 1 else 0)", "shifts = (self.shift, self.shift)", "::test_equal_to_the_libraries"),
        ("region = wrapped[0][:, None] * 2 + wrapped[1][None, :]", "region = wrapped[0][:, None] + wrapped[1][None, :]", "::test_equal_to_the_libraries"),
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
        ("fits = qkv.shape[2] <= TILE and", "fits = qkv.shape[2] < TILE and", "::test_what_the_kernel_just_holds_is_left_to_it"),
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
        "prepare/classes.py", "prepare/test_classes.py",
        ("elif not 0 <= label < len(self.names) or not self.names[label]:", "elif not 0 <= label < len(self.names):", "::test_a_folder_of_class_folders"),
    ),
    *plant(
        "prepare/coco_json.py", "prepare/test_coco_json.py",
        ("sorted(images_of.items(), key=lambda item: (len(item[1]), item[0]))", "sorted(images_of.items(), key=lambda item: (-len(item[1]), item[0]))", "::test_few_images_show_the_rarest_categories"),
    ),
    *plant(
        "prepare/dictionary.py", "prepare/test_dictionary.py",
        ("0 < int(number) <= len(offsets)", "0 < int(number) < len(offsets)", "::test_senses_of_names_plurals_and_alternatives"),
    ),
    *plant(
        "prepare/pseudo_boxes.py", "prepare/test_model_passes.py",
        ("caption = f\"{caption.rstrip(' .')}. {self._names[box.word]}\"", "caption = f\"{caption}. {self._names[box.word]}\"", "::test_a_dictionary_completes_what_the_caption_does_not_name"),
        slow=True,
    ),
    *plant(
        "prepare/text_tower.py", "prepare/test_text_tower.py",
        ("np.pad(tokens, ((0, -len(tokens) % _BATCH), (0, 0)))", "np.pad(tokens, ((-len(tokens) % _BATCH, 0), (0, 0)))", "::test_the_most_similar_name_and_its_cosine"),
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
    ),
    *plant(
        "runs/optimizer.py", "runs/test_optimizer.py",
        ("if scores[step] > best or step < config.warmup_steps", "if scores[step] >= best or step < config.warmup_steps", "::test_plateaus_lower_the_rate_and_end_the_run"),
        ("max(total_steps, warmup + 1), end_value=config.min_learning_rate", "max(total_steps, warmup + 1), end_value=0.0", "::test_other_learning_rates"),
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
        "runs/sharding.py", "runs/test_sharding.py",
        ("offset = jax.process_index() * batch.concept_tokens.shape[0]", "offset = jax.process_index() * batch.image.shape[0]", "::test_rows_of_a_later_process_follow_those_of_the_ones_before"),
        slow=True,
    ),
]  # fmt: skip
