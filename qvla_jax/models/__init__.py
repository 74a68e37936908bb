"""What the networks of all families share: layers, and finding and replacing modules by path."""

from qvla_jax.models.surgery import get_module, named_modules, replace_modules

__all__ = ["get_module", "named_modules", "replace_modules"]
