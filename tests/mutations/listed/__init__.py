"""All faults, room by room."""

from tests.mutations.listed import data, geometry, inference, losses, models, reading, runs, tools

FAULTS = [fault for room in (geometry, models, losses, data, reading, runs, inference, tools) for fault in room.FAULTS]
