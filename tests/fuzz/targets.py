"""The readers that are fuzzed, and honest files for them."""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qvla_jax import kernels
from qvla_jax.checkpoints import torch_zip
from qvla_jax.checkpoints.packed_file import PackedFile, write_packed
from qvla_jax.checkpoints.tensor_files import ShardedTensors, write_shards
from qvla_jax.checkpoints.torch_writer import write_torch_zip
from qvla_jax.data.open_x.features import Feature, check_features
from qvla_jax.data.open_x.spec import DatasetSpec
from qvla_jax.data.open_x.specs import get, load
from qvla_jax.data.opening import open_source
from qvla_jax.data.records import SplitRecords
from qvla_jax.data.samples import bundled_path
from qvla_jax.errors import DatasetError
from qvla_jax.families.options import LoadOptions
from qvla_jax.families.prismatic.checkpoint import huggingface
from qvla_jax.families.prismatic.checkpoint.settings import public_settings
from qvla_jax.families.prismatic.config import OpenVLAConfig, preset
from qvla_jax.pipeline.allocate import Allocations
from qvla_jax.quantization import InputStatistics, QuantizerSettings
from qvla_jax.quantization.allocation import Allocation
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layout import option_sizes
from qvla_jax.sensitivity import SensitivityTable
from qvla_jax.sensitivity.store import SweepStore

from .damage import damage_bytes, damage_json, damage_safetensors
from .harness import Target

BITS = (0, 2, 4, 8, 16)
INDEX = ChannelIndex(
    (
        LayerInfo(path="a", out_features=3, fan_in=20, has_bias=True),
        LayerInfo(path="b.0", out_features=2, fan_in=32, has_bias=False),
    )
)


def targets(folder: Path) -> list[Target]:
    """All of them; they read files below `folder`."""
    return [
        _packed(folder / "packed"),
        _torch(folder / "torch"),
        _shards(folder / "shards"),
        *_directory(folder / "directory"),
        _table(folder / "table", ".safetensors"),
        _table(folder / "table", ".npz"),
        _statistics(folder / "statistics"),
        _allocations(folder / "allocations"),
        _sweep(folder / "sweep"),
        _spec(folder / "spec"),
        _features(),
        *_dataset(folder / "dataset"),
        *_lerobot(folder / "lerobot"),
        *_messages(),
    ]


def _unsigned(_: Any) -> None:
    """Files without checksums."""


_CONTAINER = functools.partial(damage_safetensors, sign=_unsigned)


def _file(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """Writes the content to the path, and reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def run(content: bytes) -> Any:
        path.write_bytes(content)
        return read(path)

    return run


def _packed(folder: Path) -> Target:
    rng = np.random.default_rng(0)
    layers = {
        name: kernels.pack(
            rng.normal(size=(6, 20)).astype(np.float32), np.array((*BITS, 4)), group,
            grid="rtn", bias=rng.normal(size=6).astype(np.float32), source_dtype="float32",
        )
        for name, group in (("a", None), ("b", 16))
    }  # fmt: skip
    inputs = {
        "a": kernels.LayerInputs(),
        "b": kernels.LayerInputs(8, np.ones(20, np.float32)),
    }
    path = folder / "policy.qvla"
    folder.mkdir(parents=True)
    config = preset("tiny-test").to_dict()
    header = {"config": config, "statistics": {}, "quantization": {}, "packages": {}}
    tensors = {"norm.weight": rng.normal(size=8).astype(np.float32)}
    stream = ((name, layers[name], inputs[name]) for name in layers)
    write_packed(
        path, layers=stream, tensors=tensors, files={"tokenizer.json": b"{}"}, header=header
    )

    def read(path: Path) -> None:
        file = PackedFile(path)
        OpenVLAConfig.from_dict(file.header.get("config"))
        for name in file.layers:
            file.weight(name)
            file.inputs(name)
        file.check_others()
        _sum_up(file.tensors)
        _ = file.files, file.packed_bytes, file.other_bytes

    def sign(own: dict[str, Any]) -> None:
        own["sha256"] = hashlib.sha256(own["header"].encode("utf-8", "replace")).hexdigest()

    damage = functools.partial(damage_safetensors, sign=sign)
    return Target("qvla", (path.read_bytes(),), _file(path, read), damage, weight=2)


def _sum_up(tensors: Any) -> None:
    """Touches every byte: what is mapped must be there."""
    for name in tensors:
        np.add.reduce(np.ascontiguousarray(tensors[name]).view(np.uint8).ravel(), dtype=np.int64)


def _torch(folder: Path) -> Target:
    folder.mkdir(parents=True)
    path = folder / "head.pt"
    write_torch_zip(path, {
        "w": np.arange(12, dtype=np.float32).reshape(3, 4), "module.b": np.zeros(2, np.int64),
    })  # fmt: skip
    seeds = (path.read_bytes(),)

    def read(path: Path) -> None:
        tensors = torch_zip.read_torch_zip(path)
        assert sum(t.nbytes for t in tensors.values()) <= path.stat().st_size
        _sum_up(tensors)

    return Target("pt", seeds, _file(path, read), damage_bytes, weight=6)


def _shards(folder: Path) -> Target:
    folder.mkdir(parents=True)
    write_shards(folder, {"a": np.ones((2, 3), np.float32), "b": np.arange(4, dtype=np.int64)})
    (path,) = folder.glob("*-00001-*.safetensors")

    def read(path: Path) -> None:
        _sum_up(ShardedTensors(path.parent))

    return Target("safetensors", (path.read_bytes(),), _file(path, read), _CONTAINER, weight=2)


def _directory(folder: Path) -> list[Target]:
    """The settings and the index of a public directory, one damaged at a time."""
    folder.mkdir(parents=True)
    config = preset("tiny-test")
    plain = dataclasses.replace(config, decoding="tokens") if config.decoding == "l1" else config
    statistics = {"x": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}}}
    files = public_settings(plain) | {"dataset_statistics.json": statistics}
    write_shards(folder, {"a": np.ones(2, np.float32)})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    found = []
    for path in sorted(folder.glob("*.json")):
        copy = folder.with_name(f"{folder.name}-{path.stem}")
        shutil.copytree(folder, copy)
        index = path.name.endswith("index.json")
        read = _read_shards if index else _read_settings
        own = _file(copy / path.name, lambda p, read=read: read(p.parent))
        seeds = (path.read_bytes(),)
        found.append(Target(f"hf-{path.name}", seeds, own, damage_json, weight=0.4))
    return found


def _read_shards(folder: Path) -> None:
    _sum_up(ShardedTensors(folder))


def _read_settings(folder: Path) -> None:
    if huggingface.is_huggingface(folder):
        huggingface.read_config(folder, LoadOptions(unnorm_key="x"))


def example_table() -> SensitivityTable:
    rng = np.random.default_rng(0)
    costs = np.sort(rng.exponential(size=(5, 5)), axis=1)[:, ::-1].copy()
    costs[:, -1] = 0
    return SensitivityTable(
        costs=costs, sizes=option_sizes(INDEX, BITS), bits=BITS, index=INDEX, method="jacobian",
        provenance={"policy": "p", "calibration": "c", "seed": 3}, standard_error=costs / 10,
        settings=QuantizerSettings(rounding="nearest"), joint=(2.0, 1.5, 1.0, 1.0, 1.0),
    )  # fmt: skip


def _table(folder: Path, suffix: str) -> Target:
    path = folder / f"sensitivity{suffix}"
    example_table().save(path)

    def read(path: Path) -> None:
        SensitivityTable.load(path).problem(budget_bits=6)

    damage = damage_bytes if suffix == ".npz" else _CONTAINER
    return Target(f"table{suffix}", (path.read_bytes(),), _file(path, read), damage)


def _statistics(folder: Path) -> Target:
    path = folder / "statistics.safetensors"
    means = {layer.path: np.zeros(layer.fan_in) for layer in INDEX.layers}
    InputStatistics(means, {"a": np.eye(20)}, {"calibration": "c"}).save(path)

    def read(path: Path) -> None:
        statistics = InputStatistics.load(path)
        statistics.check(INDEX, covariances=False)
        for name in statistics.covariances:
            if name in statistics.means:
                statistics.covariance(name)

    return Target("statistics", (path.read_bytes(),), _file(path, read), _CONTAINER)


def _allocations(folder: Path) -> Target:
    path = folder / "allocation.safetensors"
    item = Allocation(
        bits=np.array([4, 4, 2, 0, 16]), index=INDEX, quantizer=None, sensitivity="jacobian",
        baseline=False, solver="core",
        budget_bits=6.0, budget_bytes=100, stored_bytes=90, predicted_sse_normalized=0.1,
        lower_bound=0.1, seconds=0.1,
    )  # fmt: skip
    Allocations((item,), INDEX, {"policy fingerprint": "p", "calibration hash": "c"}).save(path)

    def read(path: Path) -> None:
        found = Allocations.load(path)
        _ = [item.name for item in found.items], found.chosen

    return Target("allocation", (path.read_bytes(),), _file(path, read), _CONTAINER)


def _sweep(folder: Path) -> Target:
    store = SweepStore(folder)
    store.sweep(seed=0).get("item", lambda: np.arange(6.0).reshape(2, 3))
    (path,) = folder.glob("*/item.npy")

    def read(_: Path) -> None:
        store.sweep(seed=0).get("item", lambda: np.zeros(1))

    return Target("sweep-item", (path.read_bytes(),), _file(path, read), damage_bytes)


def _spec(folder: Path) -> Target:
    path = folder / "spec.json"
    seeds = tuple(json.dumps(get(n).to_json()).encode() for n in ("libero", "taco_play"))

    def read(path: Path) -> None:
        spec = load(str(path))
        shapes: dict[str, Any] = {name: (7,) for name in spec.features()}
        shapes |= {name: (8, 8, 3) for name in (spec.image, spec.wrist_image) if name}
        with contextlib.suppress(DatasetError):  # other data sets have other shapes
            check_features(spec, _described(spec, shapes))

    return Target("rlds-spec", seeds, _file(path, read), damage_json)


def _described(spec: DatasetSpec, shapes: dict[str, Any]) -> dict[str, Feature]:
    """Features of some shapes, of the dtypes that a specification takes them to have."""
    dtypes = {spec.image: np.uint8, spec.wrist_image: np.uint8, spec.instruction: np.object_}
    return {
        name: Feature(shape, np.dtype(dtypes.get(name, np.float32)))
        for name, shape in shapes.items()
    }


def _features() -> Target:
    """A data set's features against the specification that is to read it."""
    spec: DatasetSpec = get("libero")
    shapes: dict[str, Any] = {name: [7] for name in spec.features()}
    shapes |= {name: [8, 8, 3] for name in (spec.image, spec.wrist_image) if name}
    shapes |= {"observation/state": [8], spec.instruction: []}
    seeds = (json.dumps(shapes).encode(),)

    def read(content: bytes) -> None:
        try:
            tree = json.loads(content)
            features = {
                str(name): tuple(None if n is None else abs(int(n)) for n in shape)
                for name, shape in tree.items()
            }
        except (AttributeError, TypeError, ValueError, RecursionError, OverflowError):
            return  # TFDS hands out shapes and nothing else
        check_features(spec, _described(spec, features))

    return Target("rlds-features", seeds, read, damage_json)


def _dataset(folder: Path) -> list[Target]:
    """The descriptions of a data set, which TFDS reads."""
    found = []
    for name in ("dataset_info.json", "features.json"):
        copy = folder / name.removesuffix(".json")
        copy.mkdir(parents=True)
        for path in Path(str(bundled_path())).glob("*.json"):
            shutil.copy(path, copy)

        def read(path: Path) -> None:
            from etils import epath

            records = SplitRecords(epath.Path(path.parent), "heldout")
            check_features(get("libero"), records.features)

        seeds = ((copy / name).read_bytes(),)
        own = _file(copy / name, read)
        found.append(
            Target(f"rlds-{name}", seeds, own, damage_json, weight=0.2, warm_up=_load_tensorflow)
        )
    return found


RECORDED = Path(__file__).parents[1] / "data" / "fixtures" / "lerobot.zip"


def _lerobot(folder: Path) -> list[Target]:
    """Descriptions, tables and rows of the sets that lerobot wrote.

    Not their videos: PyAV makes code where it raises an error, which is among what is forbidden.
    """
    if importlib.util.find_spec("av") is None:
        return []
    with zipfile.ZipFile(RECORDED) as file:
        file.extractall(folder)
    v3, v2 = folder / "v30_images", folder / "v21_videos"
    chosen = {
        "info.json": (v3 / "meta" / "info.json", damage_json),
        "tasks.parquet": (v3 / "meta" / "tasks.parquet", damage_bytes),
        "episodes.parquet": (v3 / "meta/episodes/chunk-000/file-000.parquet", damage_bytes),
        "rows": (v3 / "data" / "chunk-000" / "file-000.parquet", damage_bytes),
        "episodes.jsonl": (v2 / "meta" / "episodes.jsonl", damage_bytes),
        "tasks.jsonl": (v2 / "meta" / "tasks.jsonl", damage_bytes),
    }  # fmt: skip
    found = []
    for name, (original, damage) in chosen.items():
        whole = v3 if v3 in original.parents else v2
        path = folder / name / original.relative_to(whole)
        shutil.copytree(whole, folder / name)

        def read(_: Path, root: Path = folder / name) -> None:
            next(open_source(root, spec="lerobot/libero").episodes([0]))

        seeds = (original.read_bytes(),)
        found.append(Target(f"lerobot-{name}", seeds, _file(path, read), damage, weight=0.1))
    return found


def _load_tensorflow() -> None:
    """TFDS imports it, which takes seconds, for a dtype that it does not know."""
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorflow")


def _robots_messages() -> list[Target]:
    """Pickles of LeRobot's asynchronous client."""
    from qvla_jax.serving import lerobot_messages

    path = Path(__file__).parents[1] / "serving" / "lerobot_messages.json"
    recorded = json.loads(path.read_text()).values()
    readers = {
        "instructions": lerobot_messages.read_instructions,
        "observation": lerobot_messages.read_observation,
    }
    return [
        Target(
            f"message-lerobot-{kind}", tuple(base64.b64decode(m[kind]) for m in recorded), read,
            damage_bytes, weight=5,
        )
        for kind, read in readers.items()
    ]  # fmt: skip


def _messages() -> list[Target]:
    try:
        from qvla_jax.serving import json_numpy, msgpack_numpy, pictures
    except ImportError:
        return []
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    observation = {"image": image, "state": np.ones(8, np.float32), "instruction": "go é"}
    contents = (
        observation,
        {f"observation/{key}": value for key, value in observation.items()},
        {"a": [1, -1, 2**40, 0.5, True, None, {"b": []}], "prompt": ""},
    )

    def read(decode: Callable[[bytes], Any], content: bytes) -> None:
        assert isinstance(decode(content), dict)

    def file(kind: str) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.tile(image, (4, 4, 1))).save(buffer, kind)
        return buffer.getvalue()

    def look(content: bytes) -> None:
        assert max(pictures.decode_picture("image", content, 64).shape) <= 64

    def json_or_bytes(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
        return (damage_bytes if rng.randrange(2) else damage_json)(content, rng, others)

    return [
        Target(
            "message-msgpack", tuple(map(msgpack_numpy.encode, contents)),
            functools.partial(read, msgpack_numpy.decode), damage_bytes, weight=15,
        ),
        Target(
            "message-json", tuple(json_numpy.encode(c).encode() for c in contents),
            functools.partial(read, lambda m: json_numpy.decode(m)[0]), json_or_bytes, weight=15,
        ),
        *_robots_messages(),
        Target("picture", (file("PNG"), file("JPEG")), look, damage_bytes, weight=2),
    ]  # fmt: skip
