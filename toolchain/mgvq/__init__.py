"""MGVQ over a whole model: statistics, sensitivity, plan, sweep, and what mends the whole afterwards."""
