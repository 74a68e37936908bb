"""Makes the fixtures of this folder from the recorded reference checkpoints.

    python tests/parity/trim.py REFERENCE

REFERENCE holds the tiny checkpoints (random weights) with inputs and outputs of every stage as the
public PyTorch code computed them. What no policy reads is set to zero, so that it compresses away,
or left out: SigLIP's pooling head, the towers' last block (kept for `openvla_tiny`, which tests
that it is not read), weights that a component file overrides, embeddings of tokens that do not
occur, three of four places of long sequences, and the reruns in bfloat16.
"""

import json
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 for safetensors)
import numpy as np
import safetensors.numpy

from qvla_jax.checkpoints.torch_zip import read_torch_zip
from qvla_jax.families.prismatic.word_tokenizer import word_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
_METADATA = (
    "config.json",
    "dataset_statistics.json",
    "preprocessor_config.json",
    "tiny_vision_archs.json",
    "tokenizer.json",
)
# Rows of the real vocabulary whose logits are compared: the action tokens and the padding rows.
_KEPT_ROWS = slice(31744, 32064)
# Of arrays over a whole sequence [1, t, ...], one place in so many is kept.
PLACES_STEP = 4
_SEQUENCES = ("llm_", "logits_prefill", "plain_forward_hidden", "train_batch_actions")
_LEFT_OUT = (
    "action_head_input",  # actions_hidden_states in another shape
    "image_224",  # `preproc` records the image chain
    "images_224",
    "env_image",
)


def trim(source: Path) -> None:
    """Writes `<name>.zip` (the checkpoint) and `<name>.npz` (what was recorded)."""
    name = source.name
    recorded = _recorded(source)
    drop = _is_unread(keep_last_block=name == "openvla_tiny")
    with zipfile.ZipFile(FIXTURES / f"{name}.zip", "w", zipfile.ZIP_LZMA) as archive:
        for file in _METADATA:
            if (source / file).is_file():
                archive.write(source / file, file)
        if not (source / "tokenizer.json").is_file():  # token ids are recorded, prompts are not
            archive.writestr("tokenizer.json", word_tokenizer().to_str())
        index = json.loads((source / "model.safetensors.index.json").read_text())
        film = any(source.glob("vision_backbone--*"))
        kept = {
            tensor: shard
            for tensor, shard in index["weight_map"].items()
            if not (film and tensor.startswith("vision_backbone."))
        }
        archive.writestr(
            "model.safetensors.index.json", json.dumps({**index, "weight_map": kept}, indent=1)
        )
        for shard in sorted(set(kept.values())):
            tensors = safetensors.numpy.load_file(source / shard)
            trimmed = {
                tensor: _trimmed_rows(tensor, array, recorded)
                for tensor, array in tensors.items()
                if tensor in kept
            }
            trimmed = {t: np.zeros_like(a) if drop(t) else a for t, a in trimmed.items()}
            archive.writestr(shard, safetensors.numpy.save(trimmed))
        for path in sorted(source.glob("*_checkpoint.pt")):
            archive.writestr(path.name, _trimmed_component(path, drop))
    np.savez_compressed(FIXTURES / f"{name}.npz", **recorded)


def _is_unread(*, keep_last_block: bool) -> Callable[[str], bool]:
    def unread(tensor: str) -> bool:
        last = ".blocks.2." in tensor and not keep_last_block
        return "attn_pool" in tensor or last or "featurizer.norm." in tensor

    return unread


def _trimmed_rows(name: str, tensor: np.ndarray, recorded: Mapping[str, np.ndarray]) -> np.ndarray:
    if len(tensor) < 32000:
        return tensor
    rows = np.zeros_like(tensor)
    used = (
        _KEPT_ROWS
        if "lm_head" in name
        else np.unique(np.concatenate([v.ravel() for k, v in recorded.items() if "ids" in k]))
    )
    rows[used] = tensor[used]
    return rows


def _trimmed_component(path: Path, drop: Callable[[str], bool]) -> bytes:
    """A `.pt` file as PyTorch wrote it, but for the bytes of storages that nothing reads."""
    tensors = read_torch_zip(path)
    # Tensors are stored in the order of the state dict, one storage each.
    unread = {str(i) for i, tensor in enumerate(tensors) if drop(tensor)}
    copy = FIXTURES / "component.tmp"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            data = old.read(member)
            folder, _, key = member.filename.rpartition("/")
            if folder.endswith("/data") and key in unread:
                data = bytes(len(data))
            new.writestr(member.filename, data)
    for tensor, array in read_torch_zip(copy).items():
        expected = np.zeros_like(array) if drop(tensor) else tensors[tensor]
        assert np.array_equal(array, expected), tensor
    content = copy.read_bytes()
    copy.unlink()
    return content


def _recorded(source: Path) -> dict[str, np.ndarray]:
    meta = json.loads((source / "meta.json").read_text())
    arrays = {k: v for k, v in _load(source / "reference.npz").items() if "bf16" not in k}
    arrays |= _load(source / "more_samples.npz")
    for part, wanted in {
        "train_batch": ("actions_hidden_states", "predicted_actions", "proprio"),
        "plain_forward": ("input_ids", "hidden_states_2", "hidden_states_3", "logits_last"),
    }.items():
        if (source / f"{part}.npz").is_file():
            arrays |= {
                f"{part}_{k}": v for k, v in _load(source / f"{part}.npz").items() if k in wanted
            }
    kept = {}
    for name, array in arrays.items():
        if name in _LEFT_OUT:
            continue
        sequence = name.startswith(_SEQUENCES) or name == "logits"
        wide = (
            name.startswith(("dino_", "siglip_", "fused_", "projector_")) and max(array.shape) > 200
        )
        if (sequence or wide) and array.ndim == 3 and "decode" not in name:
            array = array[:, ::PLACES_STEP]
        if name.endswith(("logits_step0", "logits_last")) and array.shape[-1] > 32000:
            array = array[..., _KEPT_ROWS]
        sample = name.startswith("sample")
        if sample and "pixel_values" in name:
            # The towers' 56 x 56 pixels: smaller than the image that they were made from.
            kept[name.replace("pixel_values", "pixels")] = _pixels(array, source)
        if sample and ("model_image" in name or "pixel_values" in name):
            continue
        if name == "pixel_values" and array.shape[-1] > 56:
            continue
        if not name.startswith(("dino_block2", "siglip_block2")) or "openvla_tiny" in str(source):
            kept[name] = array
    tolerances = json.loads((source / "tolerances.json").read_text())
    noise = {
        k: v["f32_vs_f64"]["max_abs"]
        for k, v in tolerances.items()
        if not k.startswith("_") and k in kept
    }
    mutations = source / "mutations.json"
    described = {
        "meta": meta,
        "noise": noise,
        "mutations": json.loads(mutations.read_text()) if mutations.is_file() else {},
    }
    kept["described"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
    return kept


def _pixels(values: np.ndarray, source: Path) -> np.ndarray:
    """uint8 images [v, H, W, 3] that the processor makes these normalized values [1, 6 v, H, W] of.

    Read off SigLIP's half, whose mean and deviation are 0.5.
    """
    halves = values[0].reshape(-1, 2, 3, *values.shape[2:])[:, 1]
    pixels = (halves.astype(np.float64) * 0.5 + 0.5) * 255.0
    rounded = np.round(pixels)
    assert np.abs(pixels - rounded).max() < 1e-3, source
    return rounded.astype(np.uint8).transpose(0, 2, 3, 1)


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def main() -> None:
    """Trims every checkpoint, and copies the record of the image chain."""
    reference = Path(sys.argv[1])
    FIXTURES.mkdir(exist_ok=True)
    for name in ("openvla_tiny", "openvla_oft_tiny", "openvla_oft_film_tiny"):
        trim(reference / name)
    trim(reference / "openvla_realvocab_bf16")
    chain = _load(reference / "preproc" / "preproc_reference.npz")
    np.savez_compressed(FIXTURES / "preproc.npz", **chain)


if __name__ == "__main__":
    main()
