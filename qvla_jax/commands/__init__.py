"""One module for each command of `qvla`: `Config`, its settings, and `main`, which takes them.

`main` runs a stage with progress bars and returns an `output.Result`, or prints by itself and
returns None. `qvla_jax.cli` lists the commands, and imports the module of the one that runs.
"""
