"""Statistics of actions and proprio, computed once for a split and cached.

The JSON has the layout of `dataset_statistics.json` in OpenVLA's checkpoints, so either program
reads the other's. Everything is computed in float64 over all steps.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from qvla_jax.array_typing import Bool, Float, Float64, NpArray
from qvla_jax.atomic import write_json
from qvla_jax.caches import cache_folder
from qvla_jax.data.episode import Episode
from qvla_jax.data.open_x.spec import DatasetSpec, JointActionSpec
from qvla_jax.data.opening import open_source
from qvla_jax.errors import DatasetError, InputError
from qvla_jax.remote.folder import remote_name

_VALUES: Final = ("mean", "std", "max", "min", "q01", "q99")
# Part of the cache's key: a change in what is computed or refused makes old caches stale.
_VERSION: Final = 2


@dataclass(frozen=True, kw_only=True)
class ArrayStatistics:
    """Statistics over steps of one array; `d` is its last axis.

    Attributes:
        mask: which entries are normalized (grippers are not). None means all.
    """

    mean: Float64[NpArray, " d"]
    std: Float64[NpArray, " d"]
    max: Float64[NpArray, " d"]
    min: Float64[NpArray, " d"]
    q01: Float64[NpArray, " d"]
    q99: Float64[NpArray, " d"]
    mask: Bool[NpArray, " d"] | None = None

    @classmethod
    def of(cls, values: Float[NpArray, "t d"], mask: Bool[NpArray, " d"] | None = None) -> Self:
        """Computes them from all steps; std is that of the population."""
        values = np.asarray(values, np.float64)
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
        return cls(
            mean=values.mean(axis=0),
            std=values.std(axis=0),
            max=values.max(axis=0),
            min=values.min(axis=0),
            q01=low,
            q99=high,
            mask=mask,
        )

    def to_json(self) -> dict[str, list[float] | list[bool]]:
        """As plain lists."""
        tree: dict[str, Any] = {name: getattr(self, name).tolist() for name in _VALUES}
        return tree if self.mask is None else {**tree, "mask": self.mask.tolist()}

    @classmethod
    def from_json(cls, tree: Any, where: str) -> Self:
        """Inverse of `to_json`; `where` begins the message of the DatasetError it may raise."""
        if not isinstance(tree, dict) or any(name not in tree for name in _VALUES):
            raise DatasetError(f"{where}: expected the lists {', '.join(_VALUES)}")
        arrays = {name: np.asarray(tree[name], np.float64) for name in _VALUES}
        mask = np.asarray(tree["mask"], np.bool_) if "mask" in tree else None
        shapes = {array.shape for array in (*arrays.values(), mask) if array is not None}
        if len(shapes) != 1 or not all(np.isfinite(array).all() for array in arrays.values()):
            raise DatasetError(
                f"{where}: lists differ in length or hold values that are not finite"
            )
        return cls(**arrays, mask=mask)


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """What a policy needs to normalize its inputs and un-normalize its actions."""

    dataset_name: str
    action: ArrayStatistics
    proprio: ArrayStatistics | None
    num_transitions: int
    num_trajectories: int

    @classmethod
    def of(cls, dataset_name: str, episodes: Iterable[Episode], *, joints: bool = False) -> Self:
        """Computes them from standardized episodes.

        Args:
            dataset_name: name of the data set.
            episodes: its episodes.
            joints: whether actions are those of joints, all of which are normalized; otherwise the
                gripper, last in an action, is masked.

        Raises:
            DatasetError: there are no episodes, or a value is not finite.
        """
        return cls._of_values(dataset_name, _finite_values(dataset_name, episodes), joints=joints)

    @classmethod
    def _of_values(
        cls, dataset_name: str, episodes: Iterable[tuple[NpArray, NpArray | None]], *, joints: bool
    ) -> Self:
        """From actions and states of each episode."""
        actions: list[NpArray] = []
        states: list[NpArray] = []
        for action, state in episodes:
            actions.append(action)
            if state is not None:
                states.append(state)
        if not actions:
            raise DatasetError(f"{dataset_name}: no episodes to compute statistics from")
        stacked = np.concatenate(actions)
        mask = None if joints else np.arange(stacked.shape[1]) < stacked.shape[1] - 1
        return cls(
            dataset_name=dataset_name,
            action=ArrayStatistics.of(stacked, mask),
            proprio=ArrayStatistics.of(np.concatenate(states)) if states else None,
            num_transitions=len(stacked),
            num_trajectories=len(actions),
        )

    def to_json(self) -> dict[str, Any]:
        """The layout of dataset_statistics.json."""
        tree: dict[str, Any] = {"action": self.action.to_json()}
        if self.proprio is not None:
            tree["proprio"] = self.proprio.to_json()
        tree |= {
            "num_transitions": self.num_transitions,
            "num_trajectories": self.num_trajectories,
        }
        return {self.dataset_name: tree}

    @classmethod
    def from_json(
        cls, tree: Any, dataset_name: str | None = None, where: str = "statistics"
    ) -> Self:
        """Inverse of `to_json`.

        Args:
            tree: what dataset_statistics.json holds.
            dataset_name: one of its data sets; optional if it has only one.
            where: names the source in errors.

        Raises:
            DatasetError: not that layout, or no such data set.
        """
        if not isinstance(tree, dict) or not tree:
            raise DatasetError(f"{where}: expected an object keyed by data set")
        if dataset_name is None and len(tree) > 1:
            raise DatasetError(f"{where}: name one of its data sets: {', '.join(sorted(tree))}")
        name = dataset_name or next(iter(tree))
        if name not in tree:
            raise DatasetError(f"{where}: no data set {name!r}; it has {', '.join(sorted(tree))}")
        entry = tree[name]
        if not isinstance(entry, dict) or "action" not in entry:
            raise DatasetError(f"{where}: {name!r} has no 'action'")
        has_proprio = "proprio" in entry
        return cls(
            dataset_name=name,
            action=ArrayStatistics.from_json(entry["action"], f"{where}: {name}/action"),
            proprio=ArrayStatistics.from_json(entry["proprio"], f"{where}: {name}/proprio")
            if has_proprio
            else None,
            num_transitions=int(entry.get("num_transitions", 0)),
            num_trajectories=int(entry.get("num_trajectories", 0)),
        )

    def save(self, path: str | Path) -> None:
        """Writes dataset_statistics.json."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path, dataset_name: str | None = None) -> Self:
        """Reads dataset_statistics.json; raises DatasetError as `from_json`."""
        try:
            tree = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: cannot be read as JSON ({error})") from error
        return cls.from_json(tree, dataset_name, str(path))


def joint_statistics(
    paths: Sequence[str | Path], split: str = "train", *, spec: DatasetSpec | str | None = None
) -> DatasetStatistics:
    """Statistics of a split of several data sets together, named after all of them.

    Args:
        paths: RLDS or LeRobot directories; of a single one it is `dataset_statistics`.
        split: the split that a policy is trained on.
        spec: how the data sets are read, if not as their names say; see `open_source`.

    Raises:
        DatasetError: one cannot be read, or their actions are of different kinds.
    """
    if len(paths) == 1:
        return dataset_statistics(paths[0], split, spec=spec)
    sources = [open_source(path, split, spec=spec) for path in paths]
    values = (_finite_values(source.name, source.episodes(images=False)) for source in sources)
    name = "+".join(source.name for source in sources)
    kinds = {isinstance(source.spec.action, JointActionSpec) for source in sources}
    if len(kinds) > 1:
        raise DatasetError(
            f"{name}: actions of joints and of an end effector have nothing in common"
        )
    every = itertools.chain.from_iterable(values)
    return DatasetStatistics._of_values(name, every, joints=kinds.pop())


def _finite_values(
    dataset_name: str, episodes: Iterable[Episode]
) -> Iterator[tuple[NpArray, NpArray | None]]:
    """Actions and states of each episode, if there is no NaN or infinity in them."""
    for episode in episodes:
        for name, array in (("action", episode.action), ("state", episode.state)):
            if array is not None and not np.isfinite(array).all():
                step, entry = np.argwhere(~np.isfinite(array))[0].tolist()
                raise DatasetError(
                    f"{dataset_name}: {name} of episode {episode.id} holds non-finite values: "
                    f"{array[step, entry]} in entry {entry} at step {step}"
                )
        yield episode.action, episode.state


def dataset_statistics(
    path: str | Path,
    split: str = "train",
    *,
    spec: DatasetSpec | str | None = None,
    cache: bool = True,
) -> DatasetStatistics:
    """Statistics of a split, from the cache if the data are still those it was computed from.

    The cache is next to the data, or in the user's cache folder if that cannot be written. A cache
    whose fingerprint differs from the data's is stale and is replaced.

    Args:
        path: RLDS or LeRobot directory.
        split: the split that a policy is trained on.
        spec: how the data set is read, if not as its name says; see `open_source`.
        cache: whether to read and write the cache.
    """
    dataset = open_source(path, split, spec=spec)
    content = dataset.fingerprint()
    read_as = json.dumps(dataset.spec.to_json(), sort_keys=True)
    fingerprint = f"{_VERSION} {hashlib.sha256(read_as.encode()).hexdigest()} {content}"
    spec_name, set_name = (name.replace("/", "_") for name in (dataset.spec.name, dataset.name))
    name = f"dataset_statistics_{split}_{spec_name}.json"
    folders = [cache_folder("statistics") / f"{set_name}-{content[:16]}"]
    if "://" not in str(dataset.path) and remote_name(Path(dataset.path)) is None:
        folders.insert(0, Path(dataset.path))
    if cache:
        for folder in folders:
            cached = _read_cache(folder / name, dataset.name, fingerprint)
            if cached is not None:
                return cached
    computed = DatasetStatistics.of(
        dataset.name,
        dataset.episodes(images=False),
        joints=isinstance(dataset.spec.action, JointActionSpec),
    )
    for folder in folders if cache else []:
        try:
            tree = computed.to_json()
            tree[dataset.name]["fingerprint"] = fingerprint
            write_json(folder / name, tree)
            break
        except InputError:  # it cannot be written there
            continue
    return computed


def _read_cache(path: Path, dataset_name: str, fingerprint: str) -> DatasetStatistics | None:
    try:
        tree = json.loads(path.read_text())
        if tree[dataset_name]["fingerprint"] != fingerprint:
            return None
        return DatasetStatistics.from_json(tree, dataset_name)
    except (OSError, ValueError, KeyError, TypeError, DatasetError):
        return None  # Absent or unusable: its content can always be recomputed.
