"""Faults of the page in the browser."""

from tests.mutations.fault import plant

FAULTS = [
    *plant(
        "demo/album.py",
        "demo/test_page.py",
        (
            "path.suffix.lower() in buckets.IMAGE_SUFFIXES and path.resolve().is_relative_to(inside)",
            "path.suffix.lower() in buckets.IMAGE_SUFFIXES",
            "::test_an_album_has_the_photos_of_its_folder_only",
        ),
        ("if len(self._entries) == MAX_LISTED:", "if False:", "::test_a_large_folder_is_shown_in_part"),
        ("if len(self._uploads) > MAX_UPLOADS:", "if False:", "::test_uploads_are_bounded"),
        ("if len(data) > MAX_UPLOAD_BYTES:", "if False:", "::test_uploads_are_bounded"),
        ("if height * width > MAX_PIXELS:", "if False:", "::test_uploads_are_bounded"),
        (
            "picture.thumbnail((long_side, long_side))",
            "pass",
            "::test_a_photo_is_shown_upright_and_without_what_cameras_write",
        ),
        ("printable(name)[:80]", "name", "::test_a_photo_is_uploaded"),
        (
            "self._decoded(entry)  # an error comes now",
            "pass  # an error comes now",
            "::test_a_damaged_upload_is_refused_at_once",
        ),
    ),
    *plant(
        "demo/answers.py",
        "demo/test_page.py",
        (
            "key = json.dumps([entry.id, words, given])",
            "key = json.dumps([words, given])",
            "::test_what_was_found_is_not_looked_for_again",
        ),
        (
            "key = json.dumps([entry.id, words, given])",
            "key = json.dumps([entry.id, words])",
            "::test_what_was_found_is_not_looked_for_again",
        ),
        ("if len(self._kept) > _NUM_KEPT:", "if False:", "::test_what_was_found_is_not_looked_for_again"),
        ("hex_color(ink_on(color))", "hex_color(color)", "::test_a_name_looks_as_in_pictures"),
        ("min_score=threshold,", "min_score=0.0,", "::test_the_picture_shows_what_scores_enough"),
        ("not 0 <= threshold <= 1", "not 0 <= threshold", "::test_the_picture_shows_what_scores_enough"),
        (
            "(self.album.pixels(photo), box) for photo, box in examples",
            "(self.album.pixels(entry.id), box) for photo, box in examples",
            "::test_an_example_is_found_on_another_photo",
        ),
        ("all(type(side) in (int, float) for side in box)", "True", "::test_what_is_wrong_is_said_in_words"),
        ("if len(grouped) > MAX_NAMES:", "if False:", "::test_what_is_wrong_is_said_in_words"),
        ("if len(text) > MAX_CHARS:", "if False:", "::test_what_is_wrong_is_said_in_words"),
        ("if not self._lock.acquire(timeout=MAX_WAITING_S):", "if False:", "::test_nobody_waits_for_ever"),
        (
            "[*filter(None, [chosen]), *phrases_of(caption)]",
            "[*phrases_of(caption), *filter(None, [chosen])]",
            "::test_phrases_of_a_caption_are_located",
        ),
        (
            "drawing.heat(small, values, low=low, high=high)",
            "drawing.heat(small, found.maps[0], low=low, high=high)",
            "::test_phrases_of_a_caption_are_located",
        ),
        (
            'self._predictor.vocabulary([f"thing {i}" for i in range(TEXT_BATCH)])',
            "pass",
            "::test_what_finds_words_is_compiled_before_the_first_question",
        ),
    ),
    *plant(
        "demo/server.py",
        "demo/test_page.py",
        ("if self.server.only_here and not is_loopback(name):", "if False:", "::test_other_sites_get_nothing"),
        ('if origin not in (None, f"http://{host}"):', "if False:", "::test_other_sites_get_nothing"),
        ("if len(length) > 12 or int(length) > max_bytes:", "if False:", "::test_uploads_over_http_are_bounded"),
        ("if self.headers.get_content_type() != kind:", "if False:", "::test_uploads_over_http_are_bounded"),
        ("if time.monotonic() > end:", "if False:", "::test_slow_clients_are_let_go"),
        ("timeout = IDLE_S", "timeout = None", "::test_idle_clients_are_let_go"),
        ("if not self._free.acquire(blocking=False):", "if False:", "::test_connections_are_bounded"),
        ("            self._free.release()", "            pass", "::test_connections_are_bounded"),
        ('"nosniff"', '""', "::test_every_answer_forbids_other_hosts"),
        ("default-src 'self'; img-src", "img-src", "::test_every_answer_forbids_other_hosts"),
        ("if not isinstance(request, dict):", "if False:", "::test_questions_over_http"),
        ("album_lib.UnknownPhotoError: 404", "album_lib.UnknownPhotoError: 400", "::test_questions_over_http"),
    ),
    *plant(
        "demo/__main__.py",
        "demo/test_page.py",
        ('host: str = "127.0.0.1"', 'host: str = "0.0.0.0"', "::test_the_command_serves_the_photos_of_a_run"),
        ("keep_vocabularies=False", "keep_vocabularies=True", "::test_the_command_serves_the_photos_of_a_run"),
    ),
    *plant(
        "inference/predictor.py",
        "inference/test_inference.py",
        (
            "vocabulary.pad(text[: len(names)], multiple=8)",
            "vocabulary.pad(text[: len(names)], multiple=1)",
            "::test_predictor_aligns_captions_of_any_number_of_phrases",
        ),
        ("np.asarray(array)[0, : len(names)]", "np.asarray(array)[0]", "::test_predictor_aligns_a_caption"),
    ),
]
