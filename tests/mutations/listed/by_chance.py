"""Faults that were drawn at random (`--random`) and survived; the tests that notice them came after."""

from tests.mutations.fault import plant

FAULTS = [
    *plant(
        "atomic.py", "test_files.py::test_a_file_of_the_same_content_stays_and_any_other_is_replaced",
        ("            if not part:\n", "            if part:\n"),
        ("path.stat().st_size != other.stat().st_size", "path.stat().st_size == other.stat().st_size"),
    ),
    *plant(
        "data/sources.py", "data/test_built.py::test_part_of_a_folder_with_definitions_and_without_categories",
        ("if built_names and not sources:", "if built_names and sources:"),
        slow=True,
    ),
    *plant(
        "prepare/classes.py", "prepare/test_classes.py::test_labels_without_names_are_numbers",
        ("getattr(label, \"num_classes\", 0) or 0", "getattr(label, \"num_classes\", 0) and 0"),
        slow=True,
    ),
    *plant(
        "convert/layouts.py", "convert/test_convert.py::test_a_text_tower_is_expected_as_deep_as_its_names",
        ("max(depths[1], 1),", "max(depths[2], 1),"),
    ),
    *plant(
        "commands.py", "test_commands.py::test_signals_wake_the_watch_of_a_command_and_nothing_else_afterwards",
        ("os.set_blocking(writer, False)", "pass"),
        ("            signal.set_wakeup_fd(before)\n", "            pass\n"),
    ),
    *plant(
        "chips.py", "test_defaults.py",
        ("\"a10g\": Gpu((8, 6), 80, 1.71,", "\"a10g\": Gpu((8, 6), 80, 2.1375,"),
    ),
    *plant(
        "validation.py", "test_config.py::test_values_of_a_chip_are_put_into_a_copy_and_their_names_must_be_keys",
        (".copy_and_resolve_references().lock()", ".copy_and_resolve_references()"),
    ),
    *plant(
        "__main__.py", "test_commands.py::test_help_ends_quietly_where_nobody_reads_its_end",
        ("signal.signal(signal.SIGPIPE, signal.SIG_DFL)", "pass"),
    ),
]  # fmt: skip
