"""Statistics that one wrong reading cannot move: the median, and the median of the slopes of all pairs of points.

Theil, "A rank-invariant method of linear and polynomial regression analysis" (1950), and Sen (1968): up to 29 % of the points may
lie without moving the slope beyond what the others say.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def theil_sen(points: Sequence[tuple[float, float]]) -> float:
    """The median slope of (x, y) points, in y per x; 0 if no two points differ in x. Quadratic: keep to some hundred points."""
    if not points or all(y == points[0][1] for _, y in points):
        return 0.0  # sensors count whole degrees, and stand still for most of their lives
    slopes = [
        (later_y - earlier_y) / (later_x - earlier_x)
        for index, (earlier_x, earlier_y) in enumerate(points)
        for later_x, later_y in points[index + 1 :]
        if later_x != earlier_x
    ]
    return median(slopes) if slopes else 0.0
