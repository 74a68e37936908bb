"""The report of what was done and measured, as JSON, as HTML and for terminals."""

from qvla_jax.report.page import SensitivityMap, render

__all__ = ["SensitivityMap", "render"]
