"""All faults, room by room."""

from tests.mutations.listed import data, geometry, inference, losses, models, runs, tools

FAULTS = [fault for room in (geometry, models, losses, data, runs, inference, tools) for fault in room.FAULTS]
