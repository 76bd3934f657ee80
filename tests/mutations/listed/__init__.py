"""All faults, room by room."""

from tests.mutations.listed import (
    by_chance,
    data,
    demo,
    geometry,
    inference,
    kinds,
    later,
    losses,
    models,
    reading,
    runs,
    tools,
    unseen,
    waves,
)

ROOMS = (geometry, models, losses, data, reading, runs, inference, demo, tools, kinds, later, unseen, waves, by_chance)
FAULTS = [fault for room in ROOMS for fault in room.FAULTS]
