"""All faults, room by room."""

from tests.mutations.listed import data, geometry, inference, kinds, losses, models, reading, runs, tools

ROOMS = (geometry, models, losses, data, reading, runs, inference, tools, kinds)
FAULTS = [fault for room in ROOMS for fault in room.FAULTS]
