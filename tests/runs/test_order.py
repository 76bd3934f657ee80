"""The order of steps: shares, purity, positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detclipv2_jax.data.schema import Kind
from detclipv2_jax.runs.order import MIXTURES, StepOrder, mixed

PAPER = (5156, 6016, 2116)  # batches an epoch of O365, GoldG and CC15M (docs/decisions.md)


def test_the_papers_run_has_159k_steps_in_the_papers_shares():
    schedule = StepOrder(PAPER, epochs=12, seed=0)
    assert schedule.num_steps == schedule.total_steps == 159_456
    drawn = [schedule.draw(step).stream for step in range(*schedule.epoch_ends[:2])]
    assert tuple(np.bincount(drawn)) == PAPER


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 5),
    st.data(),
)
def test_every_stream_is_read_in_order_without_gaps(num_batches, epochs, seed, data):
    starts = [0, *(data.draw(st.integers(0, epochs)) for _ in num_batches[1:])]
    schedule = StepOrder(num_batches, epochs=epochs, seed=seed, from_epochs=starts)
    seen = [0] * len(num_batches)
    for step in range(schedule.num_steps):
        assert schedule.next_positions(step) == seen
        draw = schedule.draw(step)
        assert draw.position == seen[draw.stream]
        seen[draw.stream] += 1
        if step + 1 in schedule.epoch_ends:
            epoch = schedule.epoch_ends.tolist().index(step + 1) + 1
            assert seen == [max(epoch - start, 0) * n for n, start in zip(num_batches, starts, strict=True)]
    assert schedule.next_positions(schedule.total_steps) == seen


def test_order_depends_on_the_seed_only():
    order = [[StepOrder(PAPER, epochs=1, seed=seed).draw(step) for step in range(200)] for seed in (0, 0, 1)]
    assert order[0] == order[1] != order[2]


def test_every_epoch_has_another_order_and_any_step_can_be_asked_first():
    def epochs(seed, *, backwards=False):
        order = StepOrder((20, 30, 10), epochs=4, seed=seed)
        steps = range(order.num_steps)[:: -1 if backwards else 1]
        drawn = {step: order.draw(step) for step in steps}
        return [tuple(drawn[60 * epoch + i].stream for i in range(60)) for epoch in range(4)], drawn

    orders, drawn = epochs(5)
    assert len(set(orders)) == 4
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert epochs(5, backwards=True) == (orders, drawn)
    assert not set(epochs(6)[0]) & set(orders)
    for stream, count in enumerate((20, 30, 10)):  # over all epochs: 0, 1, 2, …
        positions = [drawn[step].position for step in range(240) if drawn[step].stream == stream]
        assert positions == list(range(4 * count))


def test_weights_multiply_the_steps_of_a_stream_and_zero_leaves_it_out():
    schedule = StepOrder((10, 10, 10), epochs=1, seed=0, weights=(0.5, 0.0, 2.0))
    drawn = np.bincount([schedule.draw(step).stream for step in range(schedule.num_steps)], minlength=3)
    assert drawn.tolist() == [5, 0, 20]
    rare = StepOrder((10, 100), epochs=3, seed=0, weights=(0.01, 1.0))  # a tenth of a batch is one
    assert np.bincount([rare.draw(step).stream for step in range(rare.num_steps)]).tolist() == [3, 300]


def test_num_steps_caps_the_run_but_not_the_horizon():
    capped = StepOrder((4, 4), epochs=10, seed=0, num_steps=7)
    assert (capped.num_steps, capped.total_steps) == (7, 80)
    assert StepOrder((4, 4), epochs=1, seed=0, num_steps=700).num_steps == 8


def test_kinds_share_an_epoch_as_the_mixture_says():
    kinds = [Kind.DETECTION, Kind.DETECTION, Kind.GROUNDING, Kind.IMAGE_TEXT, Kind.IMAGE_TEXT]
    num_steps = [30.0, 10.0, 60.0, 600.0, 300.0]
    for mixture, value, expected in (
        ("proportional", 0.5, num_steps),
        ("capped", 9.0, num_steps),
        ("capped", 10.0, num_steps),
        ("capped", 2.0, [30.0, 10.0, 60.0, 400 / 3, 200 / 3]),  # 200 of pairs beside 100 of boxes
        ("temperature", 1.0, num_steps),
        # the roots of 40, 60 and 900
        (
            "temperature",
            2.0,
            [
                num * 1000 / (40**0.5 + 60**0.5 + 30) / all_of**0.5
                for num, all_of in zip(num_steps, (40, 40, 60, 900, 900), strict=True)
            ],
        ),
        ("temperature", 1e9, [250.0, 250 / 3, 1000 / 3, 2000 / 9, 1000 / 9]),
    ):
        factors = mixed(num_steps, kinds, mixture=mixture, value=value)
        assert np.multiply(num_steps, factors) == pytest.approx(expected), (mixture, value)
    assert mixed([7.0, 5.0], [Kind.IMAGE_TEXT] * 2, mixture="capped", value=0.1) == [1.0, 1.0]  # nothing to be beside
    for mixture in MIXTURES:  # weights of 0
        zeros = [0.0, 4.0], [Kind.DETECTION, Kind.IMAGE_TEXT]
        assert np.multiply(zeros[0], mixed(*zeros, mixture=mixture, value=2.0)).tolist() == zeros[0]
        assert mixed([0.0], [Kind.GROUNDING], mixture=mixture, value=2.0) == [1.0]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixed_run_is_read_in_order_without_gaps_from_any_step(mixture):
    num_batches, kinds = [10, 20, 90], [Kind.DETECTION, Kind.GROUNDING, Kind.IMAGE_TEXT]

    def make():
        weights = mixed(num_batches, kinds, mixture=mixture, value=1.5)
        return StepOrder(num_batches, epochs=3, seed=2, weights=weights)

    whole, seen = make(), [0, 0, 0]
    for step in range(whole.num_steps):
        if step % 50 == 0:  # as after a restart
            resumed = make()
            assert resumed.next_positions(step) == seen
            assert resumed.draw(step) == whole.draw(step)
        draw = whole.draw(step)
        assert draw.position == seen[draw.stream]
        seen[draw.stream] += 1
    # 45 steps of pairs beside 30 of boxes; 10 : 20 : 90 to the power of 2/3 are 4.64 : 7.37 : 20.1 of 120 steps
    expected = {"proportional": [10, 20, 90], "capped": [10, 20, 45], "temperature": [17, 28, 75]}[mixture]
    assert seen == [3 * num for num in expected]


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least one stream"):
        StepOrder((4,), epochs=1, seed=0, weights=(0.0,))
    with pytest.raises(ValueError, match="in the first epoch"):
        StepOrder((4,), epochs=2, seed=0, from_epochs=(1,))


def test_upcoming_streams_are_those_drawn_from_that_steps_first():
    order = StepOrder([3, 5, 2, 4], epochs=3, seed=1, weights=[1.0, 1.0, 0.0, 1.0], from_epochs=[0, 2, 0, 1])
    for step in range(order.num_steps):
        later = list(dict.fromkeys(order.draw(at).stream for at in range(step, order.num_steps)))
        assert order.upcoming(step)[0] == later[0]
        assert set(order.upcoming(step)) >= set(later)
    assert order.upcoming(0) == [0, 3, 1]
    assert order.upcoming(order.num_steps) == []
    capped = StepOrder([3, 5], epochs=3, seed=1, num_steps=4, from_epochs=[0, 2])
    assert capped.upcoming(0) == [0]
    for num_steps, streams in ((6, [0]), (7, [0, 1])):  # the third epoch begins after six
        capped = StepOrder([3, 5], epochs=3, seed=1, num_steps=num_steps, from_epochs=[0, 2])
        assert capped.upcoming(0) == streams


def test_a_weight_gives_the_nearest_whole_number_of_steps():
    order = StepOrder([3, 5], epochs=2, seed=0, weights=[0.9, 0.3])  # 2.7 and 1.5, to the even number
    assert np.bincount([order.draw(step).stream for step in range(order.num_steps)]).tolist() == [2 * 3, 2 * 2]
