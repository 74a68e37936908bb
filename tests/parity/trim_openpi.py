"""Makes the fixtures of pi0 and pi0.5 from the recorded reference checkpoints.

    python tests/parity/trim_openpi.py REFERENCE

REFERENCE holds `pi0_tiny` and `pi05_tiny` (random weights in openpi's own layout), with inputs and
outputs of every stage as openpi's JAX code computed them, and `pi0_other_layouts`. Checkpoints are
kept as they are. Of what was recorded seven of eight places of long sequences are left out, and
what is there twice; of resized images two of three rows; and of the reruns in bfloat16 all but the
actions.
"""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("pi0_tiny", "pi05_tiny")
# Of arrays over images or the prefix, one place in so many is kept, and of resized images one row.
PLACES_STEP = 8
ROWS_STEP = 3
_CHECKPOINT = ("params", "assets", "tokenizer")
# Axis of the places.
THINNED = {
    "image_tokens": 1, "prefix_tokens": 1, "prefix_layer_first": 1, "prefix_layer_last": 1,
    "prefix_out": 1, "kv_cache_first_k": 1, "kv_cache_first_v": 1, "kv_cache_last_k": 1,
    "kv_cache_last_v": 1, "siglip_patch_embed": 1, "siglip_with_posemb": 1, "siglip_block0": 1,
    "siglip_block0_attn": 1, "siglip_block_last": 1, "siglip_encoder_norm": 1,
    "image_float_base_0_rgb_sample0": 0,
}  # fmt: skip
_SIZES = ("180x320", "97x131", "301x200", "64x224", "224x224")


def trim(source: Path) -> None:
    """Writes `<name>.zip` (the checkpoint) and `<name>.npz` (what was recorded)."""
    name = source.name
    with zipfile.ZipFile(FIXTURES / f"{name}.zip", "w", zipfile.ZIP_LZMA) as archive:
        for part in _CHECKPOINT:
            for path in sorted((source / part).rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(source))
        archive.write(source / "tiny_archs.json", "tiny_archs.json")
    recorded = {
        key: value[(slice(None),) * THINNED[key] + (slice(None, None, PLACES_STEP),)]
        if key in THINNED
        else value
        for key, value in _load(source / "reference.npz").items()
        if not key.startswith("bf16") or key == "bf16p_actions"
    }
    # The images that the network takes are those of the record above; the camera's are kept of the
    # first observation.
    policy = {
        f"policy_{key}": value
        for key, value in _load(source / "policy.npz").items()
        if key not in ("obs1_image", "obs1_wrist_image")
        and not (key.startswith("in") and "_image_" in key and not key.endswith("mask"))
    }
    robots = {}
    if (source / "robots.npz").is_file():
        robots = {f"robots_{k}": v for k, v in _load(source / "robots.npz").items()}
    described = {
        "meta": json.loads((source / "meta.json").read_text()),
        "noise": {
            key: value["f32_vs_f64"]["max_abs"]
            for key, value in json.loads((source / "tolerances.json").read_text()).items()
            if "f32_vs_f64" in value
        },
        "mutations": json.loads((source / "mutations.json").read_text()),
        "tokenizer_cases": json.loads((source / "tokenizer_cases.json").read_text()),
    }
    content = np.frombuffer(json.dumps(described).encode(), np.uint8)
    np.savez_compressed(FIXTURES / f"{name}.npz", **recorded, **policy, **robots, described=content)


def _trim_images(source: Path) -> None:
    """Writes `openpi_preproc.npz`."""
    recorded = _load(source / "preproc.npz")
    kept = {f"uint8_{size}": recorded[f"uint8_{size}"] for size in _SIZES}
    kept |= {
        f"client_224_{size}": recorded[f"client_224_{size}"][::ROWS_STEP] for size in _SIZES[:-1]
    }
    assert np.array_equal(recorded["uint8_224x224"], recorded["client_224_224x224"])
    kept |= {key: value for key, value in recorded.items() if key.startswith("parse_")}
    np.savez_compressed(FIXTURES / "openpi_preproc.npz", **kept)


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def main() -> None:
    """Trims both checkpoints, and copies the names of the PyTorch layout."""
    reference = Path(sys.argv[1])
    FIXTURES.mkdir(exist_ok=True)
    for name in NAMES:
        trim(reference / name)
    _trim_images(reference / "pi0_tiny")
    layout = json.loads((reference / "pi0_other_layouts" / "pytorch_layout.json").read_text())
    shapes = {
        variant: {
            key: [entry["shape"], entry["layers"]] for key, entry in layout[variant]["keys"].items()
        }
        for variant in ("pi0", "pi05")
    }
    (FIXTURES / "openpi_pytorch_layout.json").write_text(json.dumps(shapes, indent=0) + "\n")


if __name__ == "__main__":
    main()
