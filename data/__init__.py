"""Episodes: RLDS reading, statistics, calibration sets and the bundled sample."""
