"""Synthetic data sets with the feature structures of the public ones.

Structures are written from the data sets' own descriptions (the TensorFlow Datasets catalogue and
their features.json), pictures apart, which are tiny here. Leaves: "image", "depth" (a picture of
floats), "text", "string" (a text in a tensor), "bool", and "f4", "f8", "i4", "i8", "u1" for scalars
or with a shape, "f4[7]"; " zlib" behind one for compressed tensors.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

HEIGHT, WIDTH = 8, 12


@dataclass(frozen=True)
class Structure:
    """A set's features.

    Attributes:
      step: Of a step, but the flags and the reward that all have.
      episode: Beside the steps.
      signed: Whether values lie in [-1, 1] rather than [0, 1].
    """

    step: dict[str, Any]
    episode: dict[str, Any]
    signed: bool = False


def _rtx(action: dict[str, str], observation: dict[str, str], **kwargs: Any) -> Structure:
    language = {
        "natural_language_instruction": "string",
        "natural_language_embedding": "f4[512]",
    }
    return Structure({"action": action, "observation": observation | language}, **kwargs)


def _converted(
    action: str, observation: dict[str, str], *, signed: bool = False, **more: str
) -> Structure:
    step = {
        "action": action,
        "observation": observation,
        "discount": "f4",
        "language_instruction": "text",
        "language_embedding": "f4[512]",
        **more,
    }
    return Structure(step, {"episode_metadata": {"file_path": "text"}}, signed)


_GOOGLE = {
    "base_displacement_vector": "f4[2]",
    "base_displacement_vertical_rotation": "f4[1]",
    "gripper_closedness_action": "f4[1]",
    "rotation_delta": "f4[3]",
    "terminate_episode": "i4[3]",
    "world_vector": "f4[3]",
}
_PARTS = {"rotation_delta": "f4[3]", "terminate_episode": "f4", "world_vector": "f4[3]"}
_AUSTIN = {
    "image": "image",
    "state": "f4[8]",
    "state_ee": "f4[16]",
    "state_gripper": "f4[1]",
    "state_joint": "f4[7]",
    "wrist_image": "image",
}

STRUCTURES = {
    "fractal20220817_data": _rtx(
        _GOOGLE,
        {
            "base_pose_tool_reached": "f4[7]",
            "gripper_closed": "f4[1]",
            "gripper_closedness_commanded": "f4[1]",
            "height_to_bottom": "f4[1]",
            "image": "image",
            "orientation_box": "f4[2,3]",
            "orientation_start": "f4[4]",
            "robot_orientation_positions_box": "f4[3,3]",
            "rotation_delta_to_go": "f4[3]",
            "src_rotation": "f4[4]",
            "vector_to_go": "f4[3]",
            "workspace_bounds": "f4[3,3]",
        },
        episode={
            "aspects": {"already_success": "bool", "feasible": "bool", "success": "bool"},
            "attributes": {"collection_mode": "i8", "collection_mode_name": "string"},
        },
        signed=True,
    ),
    "kuka": _rtx(
        _GOOGLE,
        {
            "clip_function_input/base_pose_tool_reached": "f4[7] zlib",
            "clip_function_input/workspace_bounds": "f4[3,3] zlib",
            "gripper_closed": "f4[1] zlib",
            "height_to_bottom": "f4[1] zlib",
            "image": "image",
            "task_id": "f4[1] zlib",
        },
        episode={"success": "bool"},
        signed=True,
    ),
    "bc_z": _rtx(
        {
            "future/axis_angle_residual": "f4[30]",
            "future/target_close": "i8[10]",
            "future/xyz_residual": "f4[30]",
        },
        {
            "episode_success": "f4",
            "image": "image",
            "present/autonomous": "i8",
            "present/axis_angle": "f4[3]",
            "present/intervention": "i8",
            "present/sensed_close": "f4[1]",
            "present/xyz": "f4[3]",
            "sequence_length": "i8",
        },
        episode={},
    ),
    "language_table": Structure(
        {
            "action": "f4[2]",
            "observation": {
                "effector_target_translation": "f4[2]",
                "effector_translation": "f4[2]",
                "instruction": "i4[512]",
                "rgb": "image",
            },
        },
        {"episode_id": "string"},
        signed=True,
    ),
    "bridge_orig": Structure(
        {
            "action": "f4[7]",
            "observation": {
                **{f"image_{camera}": "image" for camera in range(4)},
                "state": "f4[7]",
            },
            "discount": "f4",
            "language_instruction": "text",
            "language_embedding": "f4[512]",
        },
        {
            "episode_metadata": {
                "episode_id": "i4",
                "file_path": "text",
                "has_image_0": "bool",
                "has_language": "bool",
            }
        },
    ),
    "bridge": _rtx(
        {"open_gripper": "bool", **_PARTS},
        {"image": "image", "state": "f4[7]"},
        episode={},
        signed=True,
    ),
    "taco_play": _rtx(
        {
            "actions": "f4[7]",
            "rel_actions_gripper": "f4[7]",
            "rel_actions_world": "f4[7]",
            "terminate_episode": "f4",
        },
        {
            "depth_gripper": "f4[8,12]",
            "depth_static": "f4[8,12]",
            "rgb_gripper": "image",
            "rgb_static": "image",
            "robot_obs": "f4[15]",
            "structured_language_instruction": "string",
        },
        episode={},
        signed=True,
    ),
    "jaco_play": _rtx(
        {
            "gripper_closedness_action": "f4[1]",
            "terminate_episode": "i4[3]",
            "world_vector": "f4[3]",
        },
        {
            "end_effector_cartesian_pos": "f4[7]",
            "end_effector_cartesian_velocity": "f4[6]",
            "image": "image",
            "image_wrist": "image",
            "joint_pos": "f4[8]",
        },
        episode={},
        signed=True,
    ),
    "berkeley_cable_routing": _rtx(
        _PARTS,
        {
            "image": "image",
            "robot_state": "f4[7]",
            "top_image": "image",
            "wrist225_image": "image",
            "wrist45_image": "image",
        },
        episode={},
        signed=True,
    ),
    "roboturk": _rtx(
        {"gripper_closedness_action": "f4[1]", **_PARTS},
        {"front_rgb": "image"},
        episode={},
        signed=True,
    ),
    "viola": _rtx(
        {"gripper_closedness_action": "f4", **_PARTS},
        {
            "agentview_rgb": "image",
            "ee_states": "f4[16]",
            "eye_in_hand_rgb": "image",
            "gripper_states": "f4[1]",
            "joint_states": "f4[7]",
        },
        episode={},
        signed=True,
    ),
    "berkeley_autolab_ur5": _rtx(
        {"gripper_closedness_action": "f4", **_PARTS},
        {
            "hand_image": "image",
            "image": "image",
            "image_with_depth": "depth",
            "robot_state": "f4[15]",
        },
        episode={},
        signed=True,
    ),
    "toto": _rtx(
        {"open_gripper": "bool", **_PARTS},
        {"image": "image", "state": "f4[7]"},
        episode={},
        signed=True,
    ),
    "stanford_hydra_dataset_converted_externally_to_rlds": _converted(
        "f4[7]",
        {"image": "image", "state": "f4[27]", "wrist_image": "image"},
        is_dense="bool",
    ),
    "austin_buds_dataset_converted_externally_to_rlds": _converted(
        "f4[7]", {"image": "image", "state": "f4[24]", "wrist_image": "image"}, signed=True
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": _converted(
        "f4[15]",
        {
            "depth": "i4[8,12,1]",
            "depth_additional_view": "i4[8,12,1]",
            "image": "image",
            "image_additional_view": "image",
            "state": "f4[13]",
        },
        signed=True,
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": _converted(
        "f4[8]",
        {"image": "image", "state": "f4[35]", "wrist_image": "image"},
        signed=True,
        skill_completion="f4",
    ),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": _converted(
        "f4[8]", {"image": "image", "state": "f4[21]"}
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": _converted("f4[7]", _AUSTIN, signed=True),
    "austin_sirius_dataset_converted_externally_to_rlds": _converted(
        "f4[7]", _AUSTIN, signed=True, action_mode="f4[1]", intv_label="f4[1]"
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": _converted(
        "f4[7]", {"image": "image", "state": "f4[7]"}
    ),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": _converted(
        "f4[8]", {"image": "image", "state": "f4[20]", "wrist_image": "image"}
    ),
    "utaustin_mutex": _converted(
        "f4[7]", {"image": "image", "state": "f4[24]", "wrist_image": "image"}, signed=True
    ),
    "berkeley_fanuc_manipulation": _converted(
        "f4[6]",
        {
            "end_effector_state": "f4[7]",
            "image": "image",
            "state": "f4[13]",
            "wrist_image": "image",
        },
    ),
    "cmu_stretch": _converted("f4[8]", {"image": "image", "state": "f4[4]"}),
    "fmb_dataset": _converted(
        "f4[7]",
        {
            "color_id": "u1",
            "eef_force": "f4[3]",
            "eef_pose": "f4[7]",
            "eef_torque": "f4[3]",
            "eef_vel": "f4[6]",
            **{f"image_{side}_{n}": "image" for side in ("side", "wrist") for n in (1, 2)},
            **{f"image_{s}_{n}_depth": "f4[8,12]" for s in ("side", "wrist") for n in (1, 2)},
            "joint_pos": "f4[7]",
            "joint_vel": "f4[7]",
            "length": "string",
            "object_id": "u1",
            "primitive": "string",
            "shape_id": "u1",
            "size": "string",
            "state_gripper_pose": "f4",
        },
    ),
    "dobbe": _converted(
        "f4[7]",
        {
            "gripper": "f4[1]",
            "quat": "f4[4]",
            "rot": "f4[3]",
            "state": "f4[7]",
            "wrist_image": "image",
            "xyz": "f4[3]",
        },
    ),
    "droid": Structure(
        {
            "action": "f8[7]",
            "action_dict": {
                "cartesian_position": "f8[6]",
                "cartesian_velocity": "f8[6]",
                "gripper_position": "f8[1]",
                "gripper_velocity": "f8[1]",
                "joint_position": "f8[7]",
                "joint_velocity": "f8[7]",
            },
            "discount": "f4",
            "language_instruction": "text",
            "language_instruction_2": "text",
            "language_instruction_3": "text",
            "observation": {
                "cartesian_position": "f8[6]",
                "exterior_image_1_left": "image",
                "exterior_image_2_left": "image",
                "gripper_position": "f8[1]",
                "joint_position": "f8[7]",
                "wrist_image_left": "image",
            },
        },
        {"episode_metadata": {"file_path": "text", "recording_folderpath": "text"}},
    ),
    "libero": Structure(
        {
            "action": "f4[7]",
            "discount": "f4",
            "language_instruction": "text",
            "observation": {
                "image": "image",
                "joint_state": "f4[7]",
                "state": "f4[8]",
                "wrist_image": "image",
            },
        },
        {"episode_metadata": {"file_path": "text"}},
        signed=True,
    ),
}

# Of every step, in every set.
_FLAGS = {"is_first": "bool", "is_last": "bool", "is_terminal": "bool", "reward": "f4"}


def leaves(tree: dict[str, Any], above: str = "") -> dict[str, str]:
    """The leaves of a structure by their paths."""
    flat = {}
    for key, node in tree.items():
        path = f"{above}{key}"
        flat |= leaves(node, f"{path}/") if isinstance(node, dict) else {path: node}
    return flat


class SyntheticRlds(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes one or more episodes of a structure."""

    VERSION = tfds.core.Version("0.1.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"0.1.0": "Synthetic."}
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(self, *, name: str, structure: Structure, episodes: list[Any], **kwargs: Any):
        self.name = name
        self._structure, self._episodes = structure, episodes
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        step = _features({**self._structure.step, **_FLAGS})
        features = {"steps": tfds.features.Dataset(step), **_features(self._structure.episode)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": enumerate(self._episodes)}

    def _generate_examples(self) -> None:
        raise NotImplementedError


def write(
    out: Path,
    name: str,
    *,
    structure: Structure | None = None,
    lengths: tuple[int, ...] = (5, 4),
    changes: dict[str, Any] | None = None,
    file_format: str = "array_record",
    shards: int = 1,
    seed: int = 0,
) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """Writes a set with the structure of ``name`` and returns its directory and what it holds.

    Args:
      out: Data directory.
      name: Of the set.
      structure: Another than the name's.
      lengths: Steps of each episode.
      changes: Values to write instead of random ones, [t, ...] by path; cut to an episode's length.
      file_format: array_record or tfrecord.
      shards: Number of files.
      seed: Of the random values.

    Returns:
      The directory of the version, and for each episode the values of a step's features, [t, ...]
      by path.
    """
    structure = structure or STRUCTURES[name]
    rng = np.random.default_rng(seed)
    flat = leaves({**structure.step, **_FLAGS})
    columns, examples = [], []
    for number, length in enumerate(lengths):
        text = f"pick up object {number}"
        values = {
            path: _random(leaf, length, rng, text=text, signed=structure.signed)
            for path, leaf in flat.items()
        }
        for path, value in (changes or {}).items():
            values[path] = np.asarray(value, values[path].dtype)[:length]
        columns.append(values)
        steps = [_nested(structure.step | _FLAGS, values, t) for t in range(length)]
        once = {
            path: _random(leaf, 1, rng, text=f"file {number}", signed=False)
            for path, leaf in leaves(structure.episode).items()
        }
        examples.append({"steps": steps, **_nested(structure.episode, once, 0)})
    builder = SyntheticRlds(
        name=name, structure=structure, episodes=examples, data_dir=out, file_format=file_format
    )
    config = tfds.download.DownloadConfig(num_shards=shards)
    with tempfile.TemporaryDirectory() as downloads:
        builder.download_and_prepare(download_dir=downloads, download_config=config)
    return Path(builder.data_dir), columns


def _features(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tfds.features.FeaturesDict(_features(node)) if isinstance(node, dict) else _leaf(node)
        for key, node in tree.items()
    }


def _leaf(leaf: str) -> Any:
    features = tfds.features
    if leaf == "image":
        return features.Image(shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, encoding_format="png")
    if leaf == "depth":
        return features.Image(shape=(HEIGHT, WIDTH, 1), dtype=np.float32)
    if leaf == "text":
        return features.Text()
    dtype, shape, encoding = _tensor(leaf)
    return features.Tensor(shape=shape, dtype=dtype, encoding=encoding)


def _tensor(leaf: str) -> tuple[Any, tuple[int, ...], str]:
    match = re.fullmatch(r"(\w+)(?:\[([\d,]+)\])?( zlib)?", leaf)
    assert match is not None, leaf
    kind, sizes, zlib = match.groups()
    dtype = {"bool": np.bool_, "string": np.str_}.get(kind) or np.dtype(kind)
    shape = tuple(map(int, sizes.split(","))) if sizes else ()
    return dtype, shape, "zlib" if zlib else "none"


def _random(
    leaf: str, length: int, rng: np.random.Generator, *, text: str, signed: bool
) -> np.ndarray:
    if leaf == "image":
        return rng.integers(0, 256, (length, HEIGHT, WIDTH, 3), np.uint8)
    if leaf == "depth":
        return rng.uniform(0, 1, (length, HEIGHT, WIDTH, 1)).astype(np.float32)
    if leaf in ("text", "string"):
        return np.asarray([text] * length)
    if leaf == "i4[512]":  # The characters of an instruction.
        codes = np.zeros((length, 512), np.int32)
        codes[:, : len(text)] = [ord(character) for character in text]
        return codes
    dtype, shape, _ = _tensor(leaf)
    if np.issubdtype(dtype, np.floating):
        return rng.uniform(-1.0 if signed else 0.0, 1.0, (length, *shape)).astype(dtype)
    return rng.integers(0, 2, (length, *shape)).astype(dtype)


def _nested(tree: dict[str, Any], values: dict[str, np.ndarray], t: int, above: str = "") -> Any:
    return {
        key: _nested(node, values, t, f"{above}{key}/")
        if isinstance(node, dict)
        else _plain(values[f"{above}{key}"][t])
        for key, node in tree.items()
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, np.str_) else value
