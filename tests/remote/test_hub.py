"""Policies and data sets by their names on the Hub, against a server on loopback."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from qvla_jax import cli
from qvla_jax.data import CalibrationSet, bundled_path, calibration_set
from qvla_jax.errors import CheckpointError, CheckpointWarning, InputError, RemoteError
from qvla_jax.inference import load_policy
from qvla_jax.inference.places import policy_folder
from qvla_jax.pipeline.policies import model_of
from qvla_jax.progress import no_progress
from qvla_jax.provenance import provenance
from qvla_jax.remote.folder import forget
from qvla_jax.remote.hub import HubFolder, looks_like_one
from qvla_jax.report.modules import describe

from .fake_hub import COMMIT, FakeHub, Repository, contents, git_sha1

NAME = "somebody/tiny"
WEIGHTS = "model-00001-of-00001.safetensors"
LEROBOT = Path(__file__).parents[1] / "data" / "fixtures" / "lerobot.zip"
OTHERS = {
    "README.md": b"# tiny",
    "picture.png": bytes(3000),
    "pytorch_model.bin": bytes(5000),
    "optimizer.pt": bytes(2500),
    "runs/log.txt": b"loss",
}


@pytest.fixture
def served(hub: FakeHub, tiny: Path) -> FakeHub:
    files = {**contents(tiny), **OTHERS}
    hub.repositories[NAME] = Repository(files, {"main": COMMIT, "v1": COMMIT})
    return hub


def in_hub_cache(caches: Path, name: str = NAME) -> list[str]:
    """Files that the Hub's cache shows."""
    folder = caches / f"hub/models--{name.replace('/', '--')}/snapshots"
    return sorted(p.relative_to(folder / COMMIT).as_posix() for p in folder.rglob("*.*"))


def test_of_a_policy_only_what_is_read_is_fetched_and_recorded(served, tiny):
    seen = []
    policy = load_policy(f"{NAME}@v1", progress=lambda *report: seen.append(report))
    expected = contents(tiny)
    large = [name for name, content in expected.items() if len(content) >= 2000]
    assert served.requested() == sorted(expected.keys() - large)
    blobs = [path for method, path, _ in served.log if method == "GET" and "/blob/" in path]
    assert sorted(path.rpartition("/")[2] for path in blobs) == sorted(large)
    assert policy.config.name == "tiny"
    assert policy.fingerprint == load_policy(tiny).fingerprint
    found = provenance(seed=0)["sources"]
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in expected.items()}
    assert found == [{"source": f"{NAME}@v1", "revision": COMMIT, "sha256": hashes}]
    stages = {stage for stage, _, _ in seen}
    assert stages == {f"fetch {NAME}@v1 (MB)"}
    assert seen[-1][1] == seen[-1][2] == 1


@pytest.mark.parametrize(
    ("name", "asked"), [(f"{NAME}@{COMMIT}", []), (NAME, [f"/api/models/{NAME}/revision/main"])]
)
def test_what_is_in_the_cache_is_not_fetched_again(served, name, asked):
    folder = policy_folder(NAME)
    forget()
    served.log.clear()
    assert policy_folder(name) == folder
    assert [path for _, path, _ in served.log] == asked


def test_the_command_line_names_the_revision_and_the_hashes(served, tmp_path, tiny):
    # In a process of its own, where the library reads its variables.
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "QVLA_CACHE": str(tmp_path / "own"),
    }
    command = [sys.executable, "-m", "qvla_jax.cli", "inspect", f"{NAME}@v1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (source,) = json.loads(done.stdout)["sources"]
    assert (source["source"], source["revision"]) == (f"{NAME}@v1", COMMIT)
    # Of the weights only the header is read.
    assert source["sha256"].keys() == contents(tiny).keys() - {WEIGHTS}
    assert (tmp_path / "home/hub/models--somebody--tiny/snapshots" / COMMIT).is_dir()


def test_the_weights_of_a_policy_that_is_described_stay_there(served, tiny, caches, monkeypatch):
    content = contents(tiny)[WEIGHTS]
    header = 8 + int.from_bytes(content[:8], "little")
    found = describe(NAME)
    ranges = [r for _, path, r in served.log if path.endswith(WEIGHTS) and "/blob/" in path]
    assert ranges == ["bytes=0-7", f"bytes=0-{header - 1}"]
    assert WEIGHTS not in in_hub_cache(caches)
    expected = describe(str(tiny))
    assert found == dataclasses.replace(expected, source=f"{NAME}, public layout")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match=f"{WEIGHTS}: .* HF_HUB_OFFLINE is set"):
        describe(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    policy_folder(NAME)
    served.log.clear()
    assert describe(NAME) == found
    assert served.log == []


@pytest.mark.parametrize("header", [b"", bytes(8), b"\xff" * 8 + bytes(3000), bytes(3000)])
def test_weights_without_a_header_are_refused(served, header):
    served.repositories[NAME].files[WEIGHTS] = header
    with pytest.raises(RemoteError, match=f"{WEIGHTS}: not a safetensors file"):
        describe(NAME)


def test_a_fingerprint_needs_all_weights(served, tiny, capsys):
    assert cli.main(["inspect", NAME, "--fingerprint", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["result"]["fingerprint"] == load_policy(tiny).fingerprint
    assert told["sources"][0]["sha256"].keys() == contents(tiny).keys()


def test_an_imported_policy_says_where_it_is_from(served, tmp_path, capsys):
    assert cli.main(["import", "--model", NAME, "--out", str(tmp_path / "own")]) == 0
    settings = json.loads((tmp_path / "own.config.json").read_text())
    assert [(s["source"], s["revision"]) for s in settings["sources"]] == [(NAME, COMMIT)]
    assert load_policy(tmp_path / "own").config.name == "tiny"


def test_an_interrupted_transfer_goes_on(served, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    file = "model-00001-of-00001.safetensors"
    served.cuts[file] = [100_000]
    folder = policy_folder(NAME)
    content = served.repositories[NAME].files[file]
    assert (folder / file).read_bytes() == content
    ranges = [asked for method, path, asked in served.log if file in path and method == "GET"]
    assert ranges[0] is None
    assert ranges[1].startswith("bytes=100000-")
    assert len(ranges) == 2


def test_a_broken_transfer_keeps_complete_files(served, monkeypatch, caches):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    file = "model-00001-of-00001.safetensors"
    served.cuts[file] = [10] * 50
    with pytest.raises(RemoteError, match=rf"{file}: not in the cache, .* does not deliver"):
        policy_folder(NAME)
    assert file not in in_hub_cache(caches)
    served.cuts.clear()
    served.log.clear()
    policy_folder(NAME)
    assert {path.rpartition("/")[2] for m, path, _ in served.log if m == "GET"} == {file}


@pytest.mark.parametrize("file", ["dataset_statistics.json", "tokenizer.json"])
def test_a_file_with_a_wrong_hash_is_refused_and_not_kept(served, caches, file):
    content = served.repositories[NAME].files[file]
    served.wrong[file] = bytes(reversed(content))
    is_large = len(content) >= 2000
    digest = hashlib.sha256(content).hexdigest() if is_large else git_sha1(content)
    with pytest.raises(RemoteError, match=rf"{NAME}: {file}: not the file .* expected {digest}"):
        policy_folder(NAME)
    assert file not in in_hub_cache(caches)
    assert not (caches / f"hub/models--somebody--tiny/blobs/{digest}").exists()
    served.wrong.clear()
    assert (policy_folder(NAME) / file).read_bytes() == content


def test_a_file_that_changed_in_the_cache_is_found(served):
    path = policy_folder(NAME) / "config.json"
    blob = path.resolve()
    blob.write_bytes(b"{}")
    forget()
    with pytest.raises(RemoteError, match=r"config.json: not the file that the Hub announces"):
        policy_folder(NAME)
    assert policy_folder(NAME) == path.parent
    assert path.read_bytes() == served.repositories[NAME].files["config.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "somebody/nothing",
            "no such file or directory here, and .* shows no model 'somebody/noth",
        ),
        (f"{NAME}@v2", "has the model somebody/tiny, but no revision 'v2'"),
        (f"{NAME}@", "expected OWNER/NAME or OWNER/NAME@REVISION"),
        ("somebody/other", "no checkpoint that is read; it holds notes.txt"),
        ("somebody/bin", "the weights are pytorch_model.bin, which are not read"),
        ("somebody/part", "part/head.pt: would be passed over"),
    ],
)
def test_what_is_not_there_is_named(served, tiny, name, message):
    weights = {n: c for n, c in contents(tiny).items() if not n.endswith(".safetensors")}
    served.repositories["somebody/other"] = Repository({"notes.txt": b"x"})
    served.repositories["somebody/bin"] = Repository(weights | {"pytorch_model.bin": b"x"})
    served.repositories["somebody/part"] = Repository(contents(tiny) | {"head.pt": b"x"})
    with pytest.raises(InputError, match=message):
        load_policy(name)
    assert not any("pytorch_model" in path or "head.pt" in path for _, path, _ in served.log)


def test_a_file_that_is_listed_and_not_served_is_named(served):
    folder = HubFolder(NAME, "model")
    del served.repositories[NAME].files["tokenizer.json"]
    with pytest.raises(RemoteError, match=r"tokenizer.json: .* does not give it"):
        folder.fetch(["tokenizer.json"])


def test_gated_models_need_a_token(served, monkeypatch):
    served.repositories[NAME].gated = True
    with pytest.raises(RemoteError, match=r"accept them at .*/somebody/tiny, and .* HF_TOKEN"):
        policy_folder(NAME)
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    assert (policy_folder(NAME) / "config.json").is_file()


def test_offline_the_cache_is_all_there_is(served, monkeypatch):
    folder = policy_folder(NAME)
    forget()
    served.log.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in (NAME, f"{NAME}@{COMMIT}"):
        assert policy_folder(name) == folder
    for name in ("somebody/other", f"{NAME}@v1"):
        with pytest.raises(
            RemoteError, match=r"HF_HUB_OFFLINE is set, and the cache \(.*\) does n"
        ):
            policy_folder(name)
    assert served.log == []


def test_offline_what_another_program_fetched_is_checked_by_its_names(served, monkeypatch, tiny):
    huggingface_hub.snapshot_download(NAME, endpoint=served.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = policy_folder(NAME)
    hashes = provenance(seed=0)["sources"][0]["sha256"]
    config = contents(tiny)["config.json"]
    assert hashes["config.json"] == hashlib.sha256(config).hexdigest()
    forget()
    (folder / "config.json").resolve().write_bytes(b"[]")
    with pytest.raises(RemoteError, match=r"config.json: not the file that the Hub announces"):
        policy_folder(NAME)


def test_without_an_answer_the_cache_is_used_with_a_warning(served, monkeypatch):
    folder = policy_folder(NAME)
    forget()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.warns(
        CheckpointWarning, match=f"does not deliver .* in the cache, commit {COMMIT}"
    ):
        assert policy_folder(NAME) == folder


def test_a_path_that_exists_is_never_looked_for_elsewhere(served, tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert policy_folder(NAME) == Path(NAME)
    assert policy_folder(Path("somebody/else")) == Path("somebody/else")
    with pytest.raises(CheckpointError, match=r"config.json: missing"):
        load_policy(NAME)
    assert served.log == []


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("openvla/openvla-7b", True),
        ("openvla/openvla-7b@refs/pr/1", True),
        ("lerobot/libero/part", False),
        ("libero-mini", False),
        ("./runs/x", False),
        ("../x", False),
        ("/runs/x", False),
        ("runs/x/", False),
        ("~/x", False),
    ],
)
def test_which_names_are_looked_for_on_the_hub(name, model):
    assert looks_like_one(name, "model") == model


@pytest.mark.parametrize(
    ("name", "model", "quantized"),
    [
        ("owner/name", "owner/name", ""),
        ("owner/name@v1.0", "owner/name@v1.0", ""),
        ("owner/name@refs/pr/2", "owner/name@refs/pr/2", ""),
        (f"owner/name@{COMMIT}", f"owner/name@{COMMIT}", ""),
        ("owner/name@4", "owner/name", "4"),
        ("owner/name@v1.0@4", "owner/name@v1.0", "4"),
        ("owner/name@runs/x", "owner/name", "runs/x"),
        ("owner/name@v1@runs/x:3.5", "owner/name@v1", "runs/x:3.5"),
        ("owner/name@here", "owner/name", "here"),
        ("owner/name@here:3", "owner/name", "here:3"),
        ("mini@old", "mini", "old"),
    ],
)
def test_a_revision_is_told_from_a_quantization(name, model, quantized, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_of(name) == (model, quantized)


def test_of_a_data_set_only_the_files_of_drawn_episodes_are_fetched(hub, tmp_path):
    files = {f"libero/1.0.0/{name}": c for name, c in contents(bundled_path()).items()}
    other = {"other/1.0.0/dataset_info.json": b"{}", "README.md": b"#"}
    hub.repositories["lab/sets"] = Repository(files | other, kind="dataset")
    drawn = calibration_set("lab/sets/libero@main", frames=2, progress=no_progress)
    (source,) = drawn.manifest["sources"]
    assert source["source"] == f"lab/sets/libero/1.0.0@{COMMIT}"
    asked = [path.rpartition("/")[2] for method, path, _ in hub.log if method == "GET"]
    assert not any("heldout" in name or name == "README.md" for name in asked)
    assert any("calibration" in name for name in asked)
    assert drawn.manifest["sha256"] == calibration_set("bundled", frames=2).manifest["sha256"]
    drawn.save(tmp_path / "set.json")
    forget()
    again = CalibrationSet.from_manifest(tmp_path / "set.json")
    assert again.manifest == drawn.manifest


def test_of_a_lerobot_set_the_rows_and_videos_of_drawn_episodes_are_fetched(hub, tmp_path):
    with zipfile.ZipFile(LEROBOT) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "v21_videos"
    hub.repositories["lerobot/libero"] = Repository(contents(folder), kind="dataset")
    drawn = calibration_set("lerobot/libero", frames=2, trajectories=2, horizon=2)
    (source,) = drawn.manifest["sources"]
    assert source["source"] == f"lerobot/libero@{COMMIT}"
    (batch,) = drawn.batches(2)
    asked = {path.partition(COMMIT)[2] for method, path, _ in hub.log if method == "GET"}
    episodes = {f"episode_{number:06d}" for number in drawn.manifest["episodes"]}
    assert len(episodes) == 2
    fetched = {name for path in asked for name in re.findall(r"episode_\d+", path)}
    assert fetched == episodes
    assert not any("stats" in path for path in asked)
    local = calibration_set(
        folder, frames=2, trajectories=2, horizon=2, spec="lerobot/libero", split="train"
    )
    (expected,) = local.batches(2)
    for key in ("image", "wrist_image", "state", "actions"):
        np.testing.assert_array_equal(batch[key], expected[key])
