"""A policy that is served from a thread, and observations for it."""

import asyncio
import contextlib
import threading

import numpy as np


@contextlib.contextmanager
def running(policy, *, others=None, **settings):
    """Serves in a thread; yields the server and its event loop."""
    from qvla_jax.serving import PolicyServer, ServeConfig

    config = ServeConfig(**{"port": 0, "max_batch": 4, **settings})
    ready, box = threading.Event(), {}

    async def main():
        box["stop"] = asyncio.Event()
        box["loop"] = asyncio.get_running_loop()
        try:
            async with PolicyServer(policy, config, others=others) as server:
                box["server"] = server
                ready.set()
                await box["stop"].wait()
        except BaseException as error:
            box["error"] = error
        finally:
            ready.set()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    ready.wait()
    if "error" in box:
        thread.join()
        raise box["error"]
    try:
        yield box["server"]
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(60)
        assert not thread.is_alive()
        if "error" in box:
            raise box["error"]


def openpi_observation(policy, seed=0):
    """The same as openpi's LIBERO example names it."""
    own = policy.fake_observation(seed)
    return {
        "observation/image": own["image"],
        "observation/wrist_image": own["wrist_image"],
        "observation/state": own["state"].astype(np.float64),
        "prompt": own["instruction"],
    }
