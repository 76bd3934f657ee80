"""Boxes, anchors, assignment and suppression: pure functions of arrays, in float32."""
