"""The report: what was done and measured, for machines (JSON), people (HTML) and terminals."""

from qvla_jax.report.page import SensitivityMap, render

__all__ = ["SensitivityMap", "render"]
