"""Boxes, anchors, assignment and suppression in float64 NumPy, written from the papers, one box at a time.

Nothing in this folder imports the package. Boxes are xyxy in px.
"""

import numpy as np

STRIDES = (8, 16, 32, 64, 128)  # P3 to P7
DELTA_STD = np.array([0.1, 0.1, 0.2, 0.2])


def anchors(canvas):
    """Returns (boxes [a, 4], anchors a level): one square of 8 strides in the middle of every cell, row by row."""
    boxes, counts = [], []
    for stride in STRIDES:
        rows, columns = -(-canvas[0] // stride), -(-canvas[1] // stride)
        counts.append(rows * columns)
        cells = [(column, row) for row in range(rows) for column in range(columns)]
        center = (np.array(cells) + 0.5) * stride
        boxes.append(np.concatenate([center - 4 * stride, center + 4 * stride], axis=1))
    return np.concatenate(boxes), tuple(counts)


def centers(boxes):
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def area(boxes):
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0.0), axis=-1)


def decode(anchors, deltas):
    """Returns boxes from (dx, dy, dw, dh) as Faster R-CNN has them, each divided by its standard deviation."""
    deltas = np.asarray(deltas, np.float64) * DELTA_STD
    size = anchors[..., 2:] - anchors[..., :2]
    center = centers(anchors) + deltas[..., :2] * size
    size = size * np.exp(np.clip(deltas[..., 2:], np.log(16 / 1000), np.log(1000 / 16)))
    return np.concatenate([center - size / 2, center + size / 2], axis=-1)


def clip(boxes, extent):
    """Returns boxes cut at an image of (height, width) px."""
    return np.clip(boxes, 0.0, [extent[1], extent[0], extent[1], extent[0]])


def _overlap(a, b):
    size = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0.0)
    common = np.prod(size, axis=-1)
    union = area(a) + area(b) - common
    return common / np.maximum(union, 1e-12), union


def iou(a, b):
    """Returns the IoU of boxes at equal positions."""
    return _overlap(np.asarray(a, np.float64), np.asarray(b, np.float64))[0]


def generalized_iou(a, b):
    """Returns IoU minus the share of the hull that neither box covers, of boxes at equal positions."""
    overlap, union = _overlap(a, b)
    hull = area(np.concatenate([np.minimum(a[..., :2], b[..., :2]), np.maximum(a[..., 2:], b[..., 2:])], axis=-1))
    return overlap - (hull - union) / hull


def centerness(anchors, boxes):
    """Returns sqrt(min(l, r) / max(l, r) · min(t, b) / max(t, b)) of the anchors' centres; 0 outside the box."""
    center = centers(anchors)
    before, after = center - boxes[..., :2], boxes[..., 2:] - center
    inside = np.all((before > 0) & (after > 0), axis=-1)
    ratio = np.minimum(before, after) / np.where(inside[..., None], np.maximum(before, after), 1.0)
    return np.where(inside, np.sqrt(np.where(inside, np.prod(ratio, axis=-1), 0.0)), 0.0)


def on_photo(anchors, extent):
    """Returns which anchors have their centre on a photo of (height, width) px at the top left."""
    x, y = centers(anchors).T
    return (x < extent[1]) & (y < extent[0])


def assign(anchor_boxes, level_counts, boxes, box_mask, top_k=9):
    """Returns (box index, positive) of every anchor by ATSS's Algorithm 1."""
    anchor_boxes, boxes = np.float64(anchor_boxes), np.float64(boxes)
    best, owner = np.full(len(anchor_boxes), -1.0), np.zeros(len(anchor_boxes), int)
    for number, box in enumerate(boxes):
        if not box_mask[number]:
            continue
        distance = np.square(centers(anchor_boxes) - centers(box)).sum(axis=1)
        candidates, start = [], 0
        for count in level_counts:
            order = np.argsort(distance[start : start + count], kind="stable")
            candidates.extend(start + order[:top_k])
            start += count
        candidates = np.array(candidates)
        overlap = iou(anchor_boxes[candidates], box)
        threshold = overlap.mean() + overlap.std(ddof=1)
        center = centers(anchor_boxes[candidates])
        inside = np.minimum(center - box[:2], box[2:] - center).min(axis=1) > 0.01
        for anchor, value in zip(candidates[inside], overlap[inside], strict=True):
            if value >= threshold and value > best[anchor]:
                best[anchor], owner[anchor] = value, number
    return owner, best >= 0


def nms(boxes, scores, threshold, max_outputs, mask=None, classes=None):
    """Returns the indices that greedy suppression keeps, best first, the lower index first of equal scores."""
    boxes = np.float64(boxes)
    left = [i for i in np.argsort(-scores, kind="stable") if mask is None or mask[i]]
    kept = []
    while left and len(kept) < max_outputs:
        best = left.pop(0)
        kept.append(best)
        overlap = iou(boxes[best], boxes[left])
        same = np.ones(len(left), bool) if classes is None else classes[left] == classes[best]
        left = [i for i, o, s in zip(left, overlap, same, strict=True) if not (o > threshold and s)]
    return kept
