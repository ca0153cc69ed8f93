"A run that is killed at any moment goes on to the very bytes of a run that was left alone"

import os, signal
import filelock
import pytest
from killing import SPEC, killed, posix, processes, start, wait_for, work
from rg_tickets import runs
from rg_tickets.tickets import TicketError, load_tensors


def complain(spec, folder, pipe):
    "The same, telling what went wrong"
    try:
        work(spec, folder)
        pipe.send("nothing")
    except Exception as e:
        pipe.send(f"{type(e).__name__}: {e}")


@posix
@pytest.mark.parametrize(
    "name, share", [("imp", 1.0), ("carried", 0.5), ("oneshot", 0.5), ("step", 0.5)]
)
def test_killed_and_restarted(name, share, tmp_path, request, tell):
    kills = max(1, round(share * request.config.getoption("--kills")))
    seen, complete, _ = killed(name, kills, tmp_path)
    tell(
        f"{name}: {kills} kills, {dict(seen)}; {complete} runs came to their end, all with the same bytes"
    )


@posix
def test_a_state_of_every_epoch_is_there(tmp_path):
    "The premise of the test above: what is taken up after a kill is the state put aside within the round"
    spec, rounds = runs.Spec(**SPEC), set()
    process = start(spec, tmp_path)
    state = tmp_path / spec.id / "state.safetensors"
    wait_for(state, process)
    while process.is_alive():
        try:
            h = load_tensors(state, "state")[1]
            rounds.add((h["n"], h["step"]))
        except (FileNotFoundError, TicketError):
            pass  # replaced while it was read
    assert {n for n, _ in rounds} >= {0, 1, 2} and len({step for _, step in rounds}) == 3


@posix
def test_leftovers_are_swept(tmp_path):
    "What a killed process was writing is gone when the run has come to its end"
    spec = runs.Spec(**SPEC | dict(rounds=1, recipe=dict(epochs=1)))
    home = tmp_path / spec.id
    home.mkdir()
    for name in (".ticket.safetensors.1.tmp", ".rounds.csv.1.tmp", ".tmpx8Yz0A"):
        (home / name).write_bytes(b"half a fi")  # the last as safetensors calls its own
    process = start(spec, tmp_path)
    process.join()
    left = [p.name for p in home.iterdir() if ".tmp" in p.name]
    assert process.exitcode == 0 and not left, f"files of killed processes were left behind: {left}"


@posix
def test_two_processes_on_one_folder(tmp_path):
    spec = runs.Spec(**SPEC | dict(rounds=12))
    home = tmp_path / spec.id
    first = start(spec, tmp_path)
    wait_for(home / "state.safetensors", first)
    os.kill(first.pid, signal.SIGSTOP)  # so that whatever changes now was not the first one's doing
    content = lambda: {p.name: p.read_bytes() for p in home.iterdir() if p.name != ".lock"}
    try:
        before = content()
        here, there = processes.Pipe()
        second = processes.Process(target=complain, args=(spec, tmp_path, there), daemon=True)
        second.start()
        assert here.poll(120), "the second process said nothing"
        said = here.recv()
        second.join()
        assert said.startswith(f"RuntimeError: another process is working on {home}: wait for it")
        assert content() == before
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()  # a stopped process heeds nothing else
    with filelock.FileLock(home / ".lock", timeout=5):
        pass  # a killed process holds nothing
