"""Pictures of 28 x 28 pixels whose width and slant are known."""

import itertools

import numpy as np

CENTRE = 13.5
"""Of the coordinates below, x to the right and y upwards, in pixels from the upper left."""


def plane(x=0.0, y=0.0):
    rows, columns = np.indices((28, 28))
    return columns - CENTRE - x, CENTRE - rows - y


def stroke(*points, width, x=0.0, y=0.0):
    """What a round pen leaves along straight lines between points: all pixels at width / 2 or nearer."""
    px, py = plane(x, y)
    distance = np.full(px.shape, np.inf)
    for (ax, ay), (bx, by) in itertools.pairwise(points):
        dx, dy = bx - ax, by - ay
        along = np.clip(((px - ax) * dx + (py - ay) * dy) / (dx**2 + dy**2), 0.0, 1.0)
        distance = np.minimum(distance, np.hypot(px - ax - along * dx, py - ay - along * dy))
    return (distance <= width / 2)[..., None]


def bar(angle, width, length=16.0, **position):
    """A straight stroke, by its angle from the vertical in degrees, positive to the right."""
    end = length / 2 * np.sin(np.radians(angle)), length / 2 * np.cos(np.radians(angle))
    return stroke((-end[0], -end[1]), end, width=width, **position)


def ring(width, **position):
    return (np.abs(np.hypot(*plane(**position)) - 8.0) <= width / 2)[..., None]


def sheared(angle, width=6.0, height=20):
    """A parallelogram ``height`` rows high: an upright rectangle sheared to the right."""
    x, y = plane()
    return ((np.abs(x - y * np.tan(np.radians(angle))) <= width / 2) & (np.abs(y) < height / 2))[..., None]


def four(angle):
    """An open 4 whose stem, of 20 pixels, leans by an angle."""
    slope = np.tan(np.radians(angle))
    corners = [(-6.0, 9.0), (-6.0, 0.0), (3.0, 0.0), (3.0, 10.0), (3.0, -10.0)]
    return stroke(*[(x + slope * y, y) for x, y in corners], width=2.0)
