"""Sweeps that are started as processes of their own, and killed.

    sweep_process.py MODEL STORE TABLES DEVICES [COORDINATOR PROCESSES NUMBER]

MODEL is `exact` or `both` (exactly and to first order): the toy policy, and how it is swept.
"""

import sys
import time
from pathlib import Path

import jax

BITS = (0, 4, 16)


def sweep(model, store, mesh):
    """Method -> table."""
    from qvla_jax.sensitivity import sensitivities

    sys.path.insert(0, str(Path(__file__).parent))
    from toys import ToyFrames, toy_policy

    class SlowFrames(ToyFrames):
        """Not too fast to be killed in the middle."""

        def batches(self, size):
            for batch in super().batches(size):
                time.sleep(0.1)
                yield batch

    policy, frames = toy_policy(), SlowFrames(21 if model == "both" else 8)
    settings = {"bits": BITS, "probes": 3, "batch": 1, "joint": False, "mesh": mesh, "store": store}
    # The smallest blocks, so that a batch has several items.
    settings["memory"] = 0
    methods = ("exact", "jacobian") if model == "both" else ("exact",)
    return {m: sensitivities(policy, frames, method=m, **settings) for m in methods}


def main(model: str, store: str, tables: str, devices: str, *cluster: str) -> None:
    from qvla_jax.sharding import join_cluster, join_processes

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if cluster == ("slurm",):
        join_cluster()
    elif cluster:
        address, processes, number = cluster
        join_processes(address, int(processes), int(number))

    from qvla_jax import sharding
    from qvla_jax.sensitivity import SweepStore

    mesh = sharding.sweep_mesh(2 if cluster else 1)
    for name, table in sweep(model, SweepStore(Path(store)), mesh).items():
        if sharding.is_main_process():
            table.save(Path(tables) / f"{name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
