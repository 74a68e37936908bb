"""Runs an exported policy on its example. It needs JAX and NumPy, and nothing of qvla_jax.

    python run.py

Beside this file: policy.json (what goes in and comes out), policy.stablehlo (the function, for
`jax.export`), weights.safetensors and example.npz (inputs, and the actions that belong to them).
"""

import json
from pathlib import Path

import jax
import jax.export
import numpy as np

HERE = Path(__file__).resolve().parent


def read_weights(path):
    """Name -> array, mapped from the file."""
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    dtypes = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "U32": "uint32"}
    dtypes |= {"U16": "uint16", "U8": "uint8", "I32": "int32", "I8": "int8", "BOOL": "bool"}
    content = np.memmap(path, mode="r")
    weights = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            values = content[first:last].view(jax.numpy.dtype(dtypes[entry["dtype"]]))
            weights[name] = values.reshape(entry["shape"])
    return weights


def load(folder=HERE):
    """A function of the inputs in policy.json, by name, that returns normalized actions."""
    exported = jax.export.deserialize(bytearray((folder / "policy.stablehlo").read_bytes()))
    weights = jax.device_put(read_weights(folder / "weights.safetensors"))
    call = jax.jit(exported.call)
    return lambda inputs: call(weights, inputs)


def main():
    """Compares the actions of the example with the recorded ones."""
    known = json.loads((HERE / "policy.json").read_text())
    example = np.load(HERE / "example.npz")
    act = load()
    found = []
    for number in range(known["example"]["observations"]):
        inputs = {entry["name"]: example[f"{number}.{entry['name']}"] for entry in known["inputs"]}
        found.append(np.asarray(act(inputs)))
    difference = np.abs(np.concatenate(found) - example["actions"]).max()
    print(json.dumps({"platform": jax.default_backend(), "largest_difference": float(difference)}))


if __name__ == "__main__":
    main()
