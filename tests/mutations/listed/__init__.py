"""All faults, room by room."""

from tests.mutations.listed import (
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

ROOMS = (geometry, models, losses, data, reading, runs, inference, demo, tools, kinds, later, unseen, waves)
FAULTS = [fault for room in ROOMS for fault in room.FAULTS]
