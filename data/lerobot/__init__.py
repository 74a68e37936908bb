"""LeRobot data sets (v2.0, v2.1 and v3.0), read by pyarrow and PyAV alone (extra `lerobot`).

    dataset = LeRobotDataset("data/libero", spec="lerobot/libero")

`info` reads their description, `episodes` the table of their episodes, `rows` their numbers and
pictures, `videos` the frames of their videos; `specs` has what the public sets mean.
"""

from qvla_jax.data.lerobot.dataset import LeRobotDataset as LeRobotDataset

__all__ = ["LeRobotDataset"]
