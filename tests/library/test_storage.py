import errno
import hashlib
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch

from lightning_custom import storage
from lightning_custom.errors import CheckpointError

CONTENT = {"weight": torch.arange(12.0).reshape(3, 4), "half": torch.ones(2, dtype=torch.bfloat16), "step": 7}


def put(root: Path, step: int, content: dict | None = None) -> Path:
    """A checkpoint of ``step`` with one file."""
    temporary = storage.temporary_folder(root, step)
    temporary.mkdir(parents=True)
    facts = storage.write_tensors(temporary / "state.pt", CONTENT if content is None else content)
    storage.publish(root, step, {"files": {"state.pt": facts}, "scores": {}})
    return storage.step_folder(root, step)


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


class Attack:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_written_tensors_are_read_by_torch_and_the_checksum_is_the_files(tmp_path):
    facts = storage.write_tensors(tmp_path / "a.pt", CONTENT)
    data = (tmp_path / "a.pt").read_bytes()
    assert facts == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(read["weight"], CONTENT["weight"])
    assert torch.equal(read["half"], CONTENT["half"])
    assert read["step"] == 7


def test_saved_steps_are_in_order_and_other_names_are_not_checkpoints(tmp_path):
    for name in ("step-00000010", "step-00000009", "step-123456789", "step-00000008.bad", "step-7", "step-000000007"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-step-00000011").mkdir()
    assert storage.saved_steps(tmp_path) == [9, 10, 123456789]
    assert [storage.step_folder(tmp_path, step).is_dir() for step in (9, 10, 123456789)] == [True] * 3
    assert storage.saved_steps(tmp_path / "nothing") == []


def test_everything_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc to name a file descriptor's file")
    put(tmp_path, 1)
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append(f"{a.name} -> {b.name}"), rename(a, b))[1])
    put(tmp_path, 2)
    temporary = ".tmp-step-00000002"
    moved = f"{temporary} -> step-00000002"
    assert events == ["state.pt", ".tmp-manifest.json", temporary, moved, tmp_path.name]


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_flipped_bit_anywhere_is_found(tmp_path, name):
    folder = put(tmp_path, 1)
    good, sound = (folder / name).read_bytes(), storage.verify(folder)
    places = range(0, len(good), 1 if name == "manifest.json" else 37)
    for i, position in enumerate(places):
        flip(folder / name, position, i % 8)
        with pytest.raises(CheckpointError, match=name):
            storage.verify(folder)
        (folder / name).write_bytes(good)
    assert storage.verify(folder) == sound


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_file_is_found(tmp_path, name, kept):
    path = put(tmp_path, 1) / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=name):
        storage.verify(path.parent)


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_missing_file_is_found(tmp_path, name):
    folder = put(tmp_path, 1)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: (missing|unreadable \(No such file)"):
        storage.verify(folder)


@pytest.mark.parametrize("text", ["[]", "null", '{"format": 99}', '{"format": 1}', '{"format": 1, "sha256": 3}'])
def test_a_manifest_of_another_kind_is_refused(tmp_path, text):
    folder = put(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest"):
        storage.verify(folder)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, legacy):
    target, path = tmp_path / "attacked", tmp_path / "state.pt"
    if legacy:
        path.write_bytes(pickle.dumps({"a": Attack(target)}))
    else:
        torch.save({"a": Attack(target)}, path)
    with pytest.raises(CheckpointError, match=r"state.pt: refused by the safe loader \(") as caught:
        storage.read_tensors(path)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    if not legacy:  # the attack would have worked on another loader
        torch.load(path, weights_only=False)
        assert target.exists()


def test_content_that_is_no_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds a list instead of a dict"):
        storage.read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("point", ["fsync", "replace", "open"])
def test_a_failed_replacement_leaves_the_old_text(tmp_path, monkeypatch, point):
    path = tmp_path / "status.json"
    storage.write_atomically(path, "old")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if point == "fsync" else Path, point, fail)
    with pytest.raises(OSError, match="No space left"):
        storage.write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    storage.write_atomically(path, "new")
    assert path.read_text() == "new"


class Killed(BaseException):
    """Stands for kill -9: nothing in the library may handle it."""


@pytest.mark.parametrize("failure", [Killed, OSError])
@pytest.mark.parametrize("point", range(6))
def test_replacing_a_checkpoint_leaves_the_old_or_the_new_at_every_point(tmp_path, monkeypatch, failure, point):
    folder = put(tmp_path, 1, {"value": 1})
    calls = 0
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def failing(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == point + 3:  # the two before are of the new file and its folder, tested elsewhere
                raise failure
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", failing(fsync))
    monkeypatch.setattr(Path, "rename", failing(rename))
    monkeypatch.setattr(shutil, "rmtree", failing(rmtree))
    try:
        put(tmp_path, 1, {"value": 2})
    except (Killed, OSError):
        reached = True
    else:
        reached = False
    monkeypatch.undo()
    storage.sweep(tmp_path)
    assert reached == (point < 5)
    storage.verify(folder)
    assert storage.read_tensors(folder / "state.pt")["value"] in ((2,) if point >= 3 else (1,))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_reads_back_wrong_loses_its_name_and_the_replaced_one_returns(tmp_path, monkeypatch):
    folder = put(tmp_path, 1, {"value": 1})
    rename = Path.rename

    def damaging(path, target):
        if target == folder:
            flip(path / "state.pt", 100, 0)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", damaging)
    with pytest.raises(CheckpointError, match="checksum differs"):
        put(tmp_path, 1, {"value": 2})
    monkeypatch.undo()
    storage.sweep(tmp_path)
    assert storage.read_tensors(folder / "state.pt")["value"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000001.bad"]


def test_prune_deletes_all_but_the_kept(tmp_path):
    for step in (1, 2, 3, 4):
        put(tmp_path, step)
    storage.prune(tmp_path, {1, 4, 99})
    assert storage.saved_steps(tmp_path) == [1, 4]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_deletion_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    folder = put(tmp_path, 1)

    def cut_short(path, **_):
        if Path(path).exists():
            (Path(path) / "state.pt").unlink()
            raise Killed

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(Killed):
        storage.discard(folder)
    monkeypatch.undo()
    assert storage.saved_steps(tmp_path) == []
    storage.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_set_aside_never_overwrites(tmp_path):
    names = [storage.set_aside(put(tmp_path, 1, {"value": i})).name for i in range(3)]
    assert names == ["step-00000001.bad", "step-00000001.bad-2", "step-00000001.bad-3"]
    assert [storage.read_tensors(tmp_path / name / "state.pt")["value"] for name in names] == [0, 1, 2]
    assert storage.saved_steps(tmp_path) == []


def test_sweep_takes_only_what_is_temporary(tmp_path):
    put(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002").mkdir()
    (tmp_path / ".tmp-step-00000002" / "state.pt").write_text("half")
    (tmp_path / ".tmp-best.json").write_text("half")
    (tmp_path / "best.json").write_text("{}")
    storage.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "step-00000001"]
    storage.sweep(tmp_path / "nothing")


@pytest.mark.parametrize("number, passes", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_only_a_file_system_without_folder_fsync_is_excused(tmp_path, monkeypatch, number, passes):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if passes:
        storage.fsync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match="Input/output error"):
            storage.fsync_folder(tmp_path)


def test_a_size_limit_is_reported_as_such(tmp_path):
    """torch turns what the file says into a line about its own source."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            storage.write_tensors(tmp_path / "a.pt", {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported_as_such(small_disk):
    with pytest.raises(OSError, match="No space left on device"):
        storage.write_tensors(small_disk / "a.pt", {"a": torch.zeros(1_000_000)})
