"""How many cases hypothesis tries. No test decides on time, whatever else the machine does."""

from hypothesis import HealthCheck, settings

CHECKS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
