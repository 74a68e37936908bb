"""Policies in buckets, in a store in memory that lists checksums and breaks when told to."""

import base64
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qvla_jax import cli
from qvla_jax.errors import CheckpointWarning, InputError, RemoteError
from qvla_jax.families.openpi.config import GemmaConfig, SiglipConfig, preset
from qvla_jax.families.openpi.synthetic import synthesize
from qvla_jax.inference import import_policy, load_policy
from qvla_jax.inference.places import policy_folder
from qvla_jax.provenance import provenance
from qvla_jax.remote import buckets
from qvla_jax.remote.buckets import BucketFolder
from qvla_jax.remote.folder import digests_of, forget
from qvla_jax.report.modules import describe

from .fake_hub import contents

pytestmark = pytest.mark.filterwarnings("ignore:.*stand-in:qvla_jax.errors.CheckpointWarning")
_GEMMA = dict(depth=1, mlp_dim=16, num_heads=1, num_kv_heads=1, head_dim=8)
ADDRESS = "fake://bucket/checkpoints/tiny_pi0"


class Store(MemoryFileSystem):
    """Lists MD5 as Google's buckets do."""

    protocol = "fake"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    # What goes wrong: files whose bytes are others, how often a read at a byte fails, and whether
    # anything answers.
    wrong: ClassVar[set[str]] = set()
    failures: ClassVar[dict[int, int]] = {}
    reachable: ClassVar[bool] = True
    # Whether it lists checksums, and what becomes of a file once its first block was read.
    checksums: ClassVar[bool] = True
    changed: ClassVar[bytes | None] = None
    # Parts of files that were read.
    log: ClassVar[list[tuple[str, int, int]]] = []
    lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("fake://").strip("/")

    def find(self, path: str, **settings: Any) -> Any:
        if not type(self).reachable:
            raise ConnectionError("nobody answers")
        found = super().find(path, **settings)
        for name, info in found.items() if self.checksums else ():
            md5 = hashlib.md5(self.store[name].getvalue(), usedforsecurity=False).digest()
            info["md5Hash"] = base64.b64encode(md5).decode()
        return found

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        with self.lock:
            assert start is not None
            assert end is not None
            self.log.append((path.rpartition("/")[2], start, end))
            if self.failures.get(start, 0):
                self.failures[start] -= 1
                raise ConnectionError("cut")
            content = self.store[path].getvalue()[start:end]
            if start == 0 and self.changed is not None:
                self.pipe(path, self.changed)
            return bytes(len(content)) if path.rpartition("/")[2] in self.wrong else content


@pytest.fixture(scope="module")
def pi0(tmp_path_factory):
    config = dataclasses.replace(
        preset("pi0_libero"),
        vision=SiglipConfig(width=12, depth=1, mlp_dim=16, num_heads=3, image_size=28),
        language=GemmaConfig(width=16, **_GEMMA),
        action_expert=GemmaConfig(width=8, **_GEMMA),
        vocab_size=1030,
        action_horizon=3,
        max_prompt_tokens=12,
        num_steps=3,
    )
    folder = tmp_path_factory.mktemp("public") / "tiny_pi0"
    synthesize(config, folder)
    return folder


@pytest.fixture
def store(pi0, monkeypatch) -> Iterator[type[Store]]:
    fsspec.register_implementation("fake", Store, clobber=True)
    monkeypatch.setattr(buckets, "_WAITS", (0.0, 0.0))
    Store.store.clear()
    Store.pseudo_dirs[:] = [""]
    Store.wrong.clear()
    Store.failures.clear()
    Store.log.clear()
    Store.reachable = Store.checksums = True
    Store.changed = None
    files = {**contents(pi0), "train_state/step": bytes(9000), "README.md": b"#"}
    for name, content in files.items():
        Store().pipe(f"/bucket/checkpoints/tiny_pi0/{name}", content)
    return Store


def test_of_an_openpi_directory_only_what_is_read_is_fetched_and_recorded(store, pi0):
    policy = load_policy(ADDRESS)
    assert policy.fingerprint == load_policy(pi0).fingerprint
    expected = contents(pi0)
    assert {name for name, _, _ in store.log} == {name.rpartition("/")[2] for name in expected}
    (source,) = provenance(seed=0)["sources"]
    assert (source["source"], source["revision"]) == (ADDRESS, None)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in expected.items()}
    assert source["sha256"] == hashes
    forget()
    store.log.clear()
    assert policy_folder(ADDRESS).name == "tiny_pi0"
    assert store.log == []


def test_a_command_writes_where_its_policy_is_from(store, tmp_path, capsys):
    assert cli.main(["import", "--model", ADDRESS, "--out", str(tmp_path / "own"), "--json"]) == 0
    for content in (capsys.readouterr().out, (tmp_path / "own.config.json").read_text()):
        (source,) = json.loads(content)["sources"]
        assert source["source"] == ADDRESS
        assert len(source["sha256"]) == len(contents(policy_folder(ADDRESS)))


def test_values_of_arrays_stay_there_when_a_policy_is_described(store, tiny, tmp_path):
    import_policy(tiny, tmp_path / "own")
    files = contents(tmp_path / "own")
    for name, content in files.items():
        store().pipe(f"/bucket/own/{name}", content)
    found = describe("fake://bucket/own")
    assert found == dataclasses.replace(describe(str(tmp_path / "own")), source="fake://bucket/own")
    described = {name for name in files if not re.search(r"weights/.*/[\d.]+$", name)}
    assert len(store.log) == len(described) < len(files)
    (source,) = provenance(seed=0)["sources"]
    assert source["sha256"].keys() == described


@pytest.fixture
def one(store, monkeypatch) -> bytes:
    """One file of several blocks."""
    content = bytes(range(256)) * 40
    store().pipe("/bucket/one/file", content)
    monkeypatch.setattr(buckets, "_BLOCK_BYTES", 4000)
    return content


def fetched() -> bytes:
    forget()
    folder = BucketFolder("fake://bucket/one")
    folder.fetch(folder.files)
    return (folder.folder / "file").read_bytes()


def test_a_block_that_fails_is_asked_for_again(store, one):
    store.failures[0] = 2
    assert fetched() == one
    assert [start for _, start, _ in store.log] == [0, 0, 0, 4000, 8000]


def test_an_interrupted_transfer_goes_on_where_it_stopped(store, one, caches):
    store.failures[8000] = 3
    with pytest.raises(RemoteError, match=r"file: the transfer failed at byte 8000 \(cut\)"):
        fetched()
    assert not (caches / "own/buckets/files/fake/bucket/one/file").exists()
    store.log.clear()
    assert fetched() == one
    assert store.log == [("file", 8000, len(one))]


def test_a_file_with_a_wrong_checksum_is_refused_and_not_kept(store, one, caches):
    store.wrong.add("file")
    md5 = hashlib.md5(one, usedforsecurity=False).hexdigest()
    with pytest.raises(RemoteError, match=rf"one: file: not the file .*md5 .* expected {md5}"):
        fetched()
    assert [p for p in (caches / "own/buckets/files").rglob("*") if p.is_file()] == []
    store.wrong.clear()
    assert fetched() == one


def test_a_file_that_changed_there_or_here_is_fetched_again(store, one, caches):
    assert fetched() == one
    store().pipe("/bucket/one/file", one[::-1])
    assert fetched() == one[::-1]
    (caches / "own/buckets/files/fake/bucket/one/file").write_bytes(b"")
    assert fetched() == one[::-1]


@pytest.mark.parametrize("checksums", [True, False])
def test_a_file_that_changes_meanwhile_is_refused(store, one, caches, checksums):
    store.checksums = checksums
    store.changed = one[::-1]
    with pytest.raises(RemoteError, match=r"file: (changed there while|not the file)"):
        fetched()
    assert [p for p in (caches / "own/buckets/files").rglob("*") if p.is_file()] == []
    store.changed = None
    assert fetched() == one[::-1]


def test_offline_the_cache_is_all_there_is(store, one, monkeypatch):
    assert fetched() == one
    store.log.clear()
    store.reachable = False
    with pytest.warns(CheckpointWarning, match="nobody answers.*using what is in the cache"):
        assert fetched() == one
    with pytest.raises(RemoteError, match=r"two: cannot be listed \(nobody answers\)"):
        BucketFolder("fake://bucket/two")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetched() == one
    with pytest.raises(RemoteError, match=r"HF_HUB_OFFLINE is set, and the cache \(.*\) does not"):
        BucketFolder("fake://bucket/two")
    assert store.log == []


def test_offline_a_file_that_was_not_fetched_is_named(store, one, monkeypatch):
    BucketFolder("fake://bucket/one").fetch([])
    folder = BucketFolder("fake://bucket/one")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RemoteError, match="file: HF_HUB_OFFLINE is set"):
        folder.fetch(["file"])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("fake://bucket/nothing", "there is nothing at this address"),
        (
            "unheard://bucket/x",
            r"Protocol not known: unheard\): .* pip install 'qvla-jax\[buckets\]'",
        ),
        ("fake://bucket/../x", "not an address"),
        ("fake://bucket/steps", "holds the steps 5, 30; name one of them"),
    ],
)
def test_what_is_not_there_is_named(store, address, message):
    for step in (30, 5):
        store().pipe(f"/bucket/steps/{step}/params/x", b"x")
    with pytest.raises(InputError, match=message):
        load_policy(address)


def test_where_s3_encrypts_the_etag_is_no_checksum(store, one, monkeypatch):
    etag = f'"{"0" * 32}"'
    head = {"ServerSideEncryption": "aws:kms", "ETag": etag}
    asked = []

    def call_s3(self, method, **settings):
        asked.append((method, settings))
        return head

    monkeypatch.setattr(store, "call_s3", call_s3, raising=False)
    find = Store.find

    def encrypted(self, path, **settings):
        found = find(self, path, **settings)
        return {n: {"size": i["size"], "ETag": etag} for n, i in found.items()}

    monkeypatch.setattr(store, "find", encrypted)
    assert fetched() == one
    assert asked == [("head_object", {"Bucket": "bucket", "Key": "one/file"})]
    store().pipe("/bucket/one/file", one[::-1])
    head["ETag"], etag = etag, f'"{"1" * 32}"'
    with pytest.raises(RemoteError, match=r"not the file that the store announces \(md5"):
        fetched()


def test_crc32c_is_that_of_googles_buckets(tmp_path):
    pytest.importorskip("google_crc32c")
    (tmp_path / "x").write_bytes(b"123456789")
    assert digests_of(tmp_path / "x", ["crc32c"], 9) == {"crc32c": "4waSgw=="}
