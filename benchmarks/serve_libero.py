"""Episodes of LIBERO by a robot that asks a server, through openpi's own client.

    qvla serve --policy four.qvla &
    python benchmarks/serve_libero.py --task 0 --episodes 3

The simulator stands for the robot: it knows the address and nothing of the policy. Prints which
episodes succeed, and how long the robot waited for its chunks. Needs the extra `libero` and the
package openpi-client.
"""

import argparse
import time

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from qvla_jax.data.libero import suites
from qvla_jax.data.libero.environment import LiberoEnvironment


def main() -> None:
    """Runs official episodes of one task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--task", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=3)
    arguments = parser.parse_args()

    server = WebsocketClientPolicy(arguments.host, arguments.port)
    metadata = server.get_server_metadata()
    print(metadata)
    waits, successes = [], 0
    with LiberoEnvironment(arguments.suite, arguments.task) as environment:
        for episode in range(arguments.episodes):
            environment.reset(episode, seed=episode)
            as_libero = metadata["gripper"] == "libero"
            step = environment.step_raw if as_libero else environment.step
            success, steps = False, 0
            while not success and steps < suites.get(arguments.suite).max_steps:
                seen = environment.observe()
                observation = {
                    "observation/image": seen["image"],
                    "observation/wrist_image": seen["wrist_image"],
                    "observation/state": seen["state"],
                    "prompt": seen["instruction"],
                }
                start = time.perf_counter()
                actions = server.infer(observation)["actions"]
                waits.append(1e3 * (time.perf_counter() - start))
                for action in actions:
                    steps += 1
                    success = step(action)
                    if success:
                        break
            successes += success
            print(f"episode {episode}: {'success' if success else 'failure'} after {steps} steps")
    median, high = np.percentile(waits, [50, 95])
    print(
        f"{successes} of {arguments.episodes} episodes of {environment.name}; {len(waits)} chunks, "
        f"waited for {median:.1f} ms (median), {high:.1f} ms (95th percentile)"
    )


if __name__ == "__main__":
    main()
