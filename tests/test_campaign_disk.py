"A disk that is full, a file that may not grow, a folder one may only read: what was there stays, and the message says what to do"

import json, os, subprocess, sys
import pandas as pd
import pytest
import torch
from killing import posix
from rg_tickets import batches, progress, runs
from rg_tickets.basics import alone, replacing
from rg_tickets.masks import MaskHistory
from rg_tickets.tickets import Ticket, load_tensors, save_tensors
from studying import MANY, digests, undisturbed, whole, written

pytestmark = posix
FREE = "free some space or choose a folder you may write to"


class Disk:
    "A file system of a few megabytes in memory"

    def __init__(self, path):
        self.path, self.ballast = path, path / "ballast"

    def do(self, *words):
        return (
            subprocess.run(
                [*map(str, words), str(self.path)], capture_output=True, text=True
            ).returncode
            == 0
        )

    def fill(self, leave=0):
        "Leave so many bytes"
        with open(self.ballast, "wb", buffering=0) as f:
            try:
                while True:
                    f.write(bytes(4096))
            except OSError:
                pass
        with open(self.ballast, "r+b") as f:
            f.truncate(max(0, self.ballast.stat().st_size - leave))

    def empty(self):
        self.ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    disk = Disk(path)
    if (
        sys.platform != "linux"
        or os.geteuid()
        or not disk.do("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs")
    ):
        pytest.skip("needs leave to mount a small file system")
    try:
        yield disk
    finally:
        disk.do("mount", "-o", "remount,rw")
        disk.do("umount", "-l")


def ticket(size):
    return Ticket({"w": torch.randn(size)}, MaskHistory.dense({"w": torch.zeros(size)}), [], {})


WRITERS = {  # name -> (what writes it, given how much to write)
    "ticket.safetensors": lambda path, size: ticket(size).save(path),
    "state.safetensors": lambda path, size: save_tensors(
        path, {"w": torch.randn(size)}, {}, "state"
    ),
    "rounds.csv": lambda path, size: runs.write_csv(path, pd.DataFrame(dict(n=range(size)))),
    "study.json": lambda path, size: _text(path, json.dumps([0] * size)),
}


def _text(path, text):
    with replacing(path) as tmp:
        tmp.write_text(text)


def refused(path, write, what):
    "The writer is refused in a sentence that says where, why and what to do, and the file is as it was, with nothing beside it"
    before, there = path.read_bytes(), sorted(os.listdir(path.parent))
    with pytest.raises(OSError) as e:
        write()
    said = str(e.value)
    assert (
        f"could not write {path}: {what}" in said
        and "Nothing was changed" in said
        and FREE in said
        and "Error while" not in said
    ), said
    assert path.read_bytes() == before and sorted(os.listdir(path.parent)) == there, (
        "the old file was touched, or something was left behind"
    )
    return said


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name, disk, tell):
    path, write = disk.path / name, WRITERS[name]
    write(path, 100)
    refused(path, lambda: write(path, 3_000_000), "No space left on device")  # larger than the disk
    disk.fill()
    said = refused(path, lambda: write(path, 101), "No space left on device")
    disk.fill(leave=8192)
    refused(path, lambda: write(path, 10_000), "No space left on device")  # it begins well
    disk.empty()
    write(path, 101)
    tell(said.replace(str(disk.path), "DISK"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_one_may_only_read(name, tmp_path, request):
    if os.geteuid():
        folder, lock, free = tmp_path, lambda: tmp_path.chmod(0o500), lambda: tmp_path.chmod(0o700)
    else:
        disk = request.getfixturevalue("disk")
        folder, lock, free = (
            disk.path,
            lambda: disk.do("mount", "-o", "remount,ro"),
            lambda: disk.do("mount", "-o", "remount,rw"),
        )
    path, write = folder / name, WRITERS[name]
    write(path, 100)
    lock()
    try:
        refused(
            path,
            lambda: write(path, 101),
            "Permission denied" if os.geteuid() else "Read-only file system",
        )
        with pytest.raises(OSError, match="cannot write to .* Choose a folder you may write to"):
            runs.writable(folder)
    finally:
        free()
    write(path, 101)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_may_not_grow(name, tmp_path):
    "A quota, in effect; anyone may have one"
    import resource

    path, write = tmp_path / name, WRITERS[name]
    write(path, 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        refused(path, lambda: write(path, 100_000), "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_noticed_before_hours_are_spent_and_a_lost_note_stops_nobody(disk):
    progress.note(disk.path, 0, 1, 2, 3)
    disk.fill()
    there = sorted(os.listdir(disk.path))
    with pytest.raises(OSError, match="free some space"):
        runs.writable(disk.path)
    progress.note(disk.path, 1, 1, 2, 3)
    assert (
        progress.far(disk.path) == 0.5 and sorted(os.listdir(disk.path)) == there
    )  # the old note, and nothing beside it


def test_a_run_whose_disk_fills_up_keeps_its_rounds(disk, tmp_path, monkeypatch):
    spec = runs.Spec(width=4, n_train=128, n_test=100, rounds=3, recipe=dict(epochs=2))
    want, real = runs.execute(spec, tmp_path / "alone", device="cpu"), runs.note
    monkeypatch.setattr(
        runs,
        "note",
        lambda home, n, step, *rest: (
            real(home, n, step, *rest),
            disk.fill() if (n, step) == (2, 2) else None,
        ),
    )
    with pytest.raises(
        OSError,
        match=f"could not write {disk.path}.*ticket.safetensors: No space left on device. Nothing was changed.*{FREE}",
    ):
        runs.execute(spec, disk.path, device="cpu")
    home = disk.path / spec.id
    assert len(Ticket.load(home / "ticket.safetensors").rounds) == len(
        pd.read_csv(home / "rounds.csv")
    ) == 2 and not [p for p in home.iterdir() if ".tmp" in p.name]
    with pytest.raises(OSError, match="cannot write to .* free some space"):
        runs.execute(spec, disk.path, device="cpu")
    disk.empty()
    monkeypatch.setattr(runs, "note", real)
    runs.execute(spec, disk.path, device="cpu")
    for name in ("ticket.safetensors", "rounds.csv", "flow.csv"):
        assert (home / name).read_bytes() == (want / name).read_bytes()
    with alone(home):
        pass
    assert load_tensors(home / "ticket.safetensors", "ticket")


@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 100_000])
def test_a_study_whose_disk_is_full_goes_on_when_it_is_not(
    leave, disk, tmp_path, undisturbed, tell
):
    folder, path = disk.path / "many", written(MANY, tmp_path / "many.yaml")
    folder.mkdir()
    disk.fill(leave)
    start = lambda: subprocess.run(
        [
            sys.executable,
            "-c",
            "from rg_tickets.cli import main; main()",
            "study",
            str(path),
            "-f",
            str(folder),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    done = start()
    said = (done.stderr + done.stdout).replace(str(disk.path), "DISK")
    last = [o for o in said.splitlines() if "No space left" in o]
    assert (
        done.returncode == 1
        and last
        and "free some space" in said.lower()
        and "Traceback" not in done.stderr
    ), said
    tell(f"{leave} bytes left: {last[0][:300]}")
    disk.empty()
    disk.do("mount", "-o", "remount,size=200m")
    done = start()
    assert done.returncode == 0, done.stdout + done.stderr
    whole(folder, MANY)
    assert digests(folder) == undisturbed and batches.status(folder).state.eq("done").all()
