"""What is measured: the table of metrics, and sums over a whole set that are taken batch by batch."""

from flashsae.metrics.activity import LatentActivity, active_entries, count_active, direction_recovery, is_dead
from flashsae.metrics.table import METRICS, OUTLIER_NORM_RATIO, Metric, table
from flashsae.metrics.variance import (
    FVU,
    VarianceSpread,
    norm_limit,
    unit_of,
    variance_spread,
)

__all__ = [
    "FVU",
    "METRICS",
    "OUTLIER_NORM_RATIO",
    "LatentActivity",
    "Metric",
    "VarianceSpread",
    "active_entries",
    "count_active",
    "direction_recovery",
    "is_dead",
    "norm_limit",
    "table",
    "unit_of",
    "variance_spread",
]
