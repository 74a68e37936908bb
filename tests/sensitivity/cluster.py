"""The variables by which SLURM tells a process which one it is."""

import socket

# JAX takes the port of the coordinator from the number of the job.
_FIRST_PORT, _PORTS = 61440, 4096


def slurm_variables(processes: int) -> list[dict[str, str]]:
    """Those of each process of a job on this machine, at a port that is free."""
    for job in range(_PORTS):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", _FIRST_PORT + job)):
                break
    shared = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(processes),
        "SLURM_STEP_NUM_NODES": "1",
    }
    return [
        shared | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        for number in range(processes)
    ]
