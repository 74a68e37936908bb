"""Settings that every test runs under.

Two virtual CPU devices, so that sharded code paths run in plain CI: some tests see only the first.
No implicit dtype promotion and no implicit rank promotion, so that neither hides a mistake.
"""

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Matrices of tests are small: OpenBLAS's threads, which wait busily, would only take time from the
# other worker. It reads the variable when NumPy and SciPy load it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests must not reach for the internet: the Hub's library, which reads the variable when it is
# loaded, fails at once instead of timing out.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

# Linux lets a process map 65,530 regions by default, and every program that XLA compiles for the
# CPU takes a handful: at the limit it aborts.
_MAPS = Path("/proc/self/maps")
_MANY_MAPS = 45_000
# Compiling a training step takes hundreds of megabytes that its program keeps.
_STATM = Path("/proc/self/statm")
_MANY_PAGES = 3 * 2**30 // os.sysconf("SC_PAGE_SIZE")

# Most programs of tests run once, and optimizing them takes longer than that. Subprocesses inherit
# the flags. JAX ends at a flag that it does not know, and releases differ in what they know.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    # Half of the time of compilation goes into MLIR, set up anew for every program.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if jax.__version_info__ < (0, 13):
    # A library for products, which arranges itself for each of them.
    _FLAGS.append("--xla_cpu_experimental_ynn_fusion_type=")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs, which take most of the time of tests, in pytest's cache.

    Each worker has a folder of its own: entries are not written whole or not at all.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    if getattr(config, "cache", None) is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir(f"xla-{worker}")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# Files that share fixtures or programs run in one worker, and what takes longest starts first: the
# workers end together. All other files follow, each by itself.
_TOGETHER = (
    ("tests/pipeline/", "tests/test_cli.py"),
    ("tests/methods/",),
    ("tests/sensitivity/",),
    ("tests/training/",),
    ("tests/serving/",),
)


def _group(nodeid: str) -> tuple[int, str]:
    """Rank and name of what a test runs together with."""
    for rank, starts in enumerate(_TOGETHER):
        if nodeid.startswith(starts):
            return rank, starts[0]
    return len(_TOGETHER), nodeid.partition("::")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _group(item.nodeid)[0])


# Tests that see one device, as on a user's CPU: they run whole sweeps, and partitioning takes a
# quarter of the time of compilation. Sweeps over meshes are compared in tests/sensitivity.
_ONE_DEVICE = (
    "tests/pipeline/",
    "tests/families/",
    "tests/methods/",
    "tests/sensitivity/test_latents.py",
    "tests/sensitivity/test_streaming.py",
    "tests/test_api.py",
    "tests/test_cli.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hides the second device around a test and its fixtures, those of the session included."""
    with pytest.MonkeyPatch.context() as patch:
        if item.nodeid.startswith(_ONE_DEVICE):
            first = jax.local_devices()[:1]
            patch.setattr(jax, "devices", lambda *backend: first)
            patch.setattr(jax, "local_devices", lambda *process: first)
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, workers take groups instead of files."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)[1]

    config.option.loadscopereorder = False  # by the number of tests
    return Groups(config, log)


def pytest_collection_finish() -> None:
    """Modules and tests stay: the garbage collector need not look through them again and again."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_stay_few() -> Iterator[None]:
    """Drops compiled programs between modules where the process has grown large."""
    yield
    if _MAPS.exists() and (
        _MAPS.read_bytes().count(b"\n") > _MANY_MAPS
        or int(_STATM.read_text().split()[1]) > _MANY_PAGES
    ):
        jax.clear_caches()
        # The allocator keeps what was freed: the process would stay large, and drop what other
        # modules need again after every one of them.
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)


@pytest.fixture(scope="session")
def closed_loop_summary() -> Any:
    """A `ClosedLoop`: two policies on 20 episodes of two tasks."""
    from qvla_jax.evaluation import success as results
    from qvla_jax.evaluation.drift import Drift
    from qvla_jax.evaluation.paired import Comparison

    names = ("libero-mini", "libero-mini@runs/x:3")

    def policy(name: str, solved: int) -> results.PolicySuccess:
        tasks = tuple(
            results.TaskSuccess(
                solved // 2, 10, mean_steps_of_successes=90.0, task=t, task_name=f"task_{t}_of_two"
            )
            for t in range(2)
        )
        overall = results.EpisodesSuccess(solved, 20, mean_steps_of_successes=90.0)
        return results.PolicySuccess(policy=name, policy_hash=name, overall=overall, tasks=tasks)

    return results.ClosedLoop(
        suite="libero_spatial",
        model_options={},
        settings=results.EpisodeSettings(
            max_steps=220, open_loop_steps=8, size=128, rendering="fast", simulator="none"
        ),
        policies=(policy(names[0], 18), policy(names[1], 15)),
        comparisons=(
            results.PolicyComparison(
                candidate=names[1],
                reference=names[0],
                overall=Comparison(both=14, candidate_only=1, reference_only=4, neither=1),
                drift=Drift(
                    seconds=(0.0, 0.4, 0.8),
                    pairs=(20, 20, 19),
                    distance_median=(0.0, 0.01, 0.02),
                    distance_upper=(0.0, 0.02, 0.05),
                    deviation_episodes=20,
                    deviation_mean=(0.0, 0.1, 0.3),
                    deviation_total=0.3,
                    deviation_standard_error=0.05,
                    tells_failures=None,
                ),
                tasks=(),
            ),
        ),
        provenance={},
    )
