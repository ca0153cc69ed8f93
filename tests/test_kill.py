"A run that is killed at any moment goes on to the very bytes of a run that was left alone"
import functools, hashlib, itertools, json, multiprocessing, os, random, signal, time
from collections import Counter
from pathlib import Path
import filelock
import pytest
from rg_tickets import runs
from rg_tickets.tickets import TicketError, load_tensors

FILES = "ticket.safetensors", "rounds.csv", "flow.csv"
SPEC = dict(task="digits8", width=8, n_train=512, n_test=200, rounds=4, recipe=dict(epochs=3))
CASES = {"imp": dict(), "carried": dict(rewind="none", recipe=dict(epochs=3, lr=.02, schedule="constant")), "oneshot": dict(control="oneshot"), "step": dict(rewind="5it")}

processes = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
if processes.get_start_method() == "forkserver": processes.set_forkserver_preload(["rg_tickets.runs"])  # so that a process begins to train at once
posix = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")


def work(spec, folder):
    "What a process does: a run, with its state put aside after every epoch"
    runs.imp = functools.partial(runs.imp, checkpoint_every=0)
    runs.execute(spec, folder, device="cpu")


def complain(spec, folder, pipe):
    "The same, telling what went wrong"
    try: work(spec, folder); pipe.send("nothing")
    except Exception as e: pipe.send(f"{type(e).__name__}: {e}")


def start(spec, folder):
    process = processes.Process(target=work, args=(spec, folder), daemon=True)
    process.start()
    return process


def wait_for(path, process, limit=120):
    "Wait until `path` is there"
    end = time.monotonic() + limit
    while not path.exists():
        assert process.is_alive() and time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(.002)


def content(home): return {f: hashlib.sha256((home / f).read_bytes()).hexdigest() for f in FILES}


def moment(home, before):
    "Where in the run the process died, from what it left behind"
    if not (home / "ticket.safetensors").exists(): return "before the first round"
    if any(p.suffix == ".tmp" for p in set(home.iterdir()) - before): return "between rounds or while a file was written"
    try: p = json.loads((home / "progress.json").read_text())
    except FileNotFoundError: return "before it went on"
    return "between rounds or while a file was written" if p["step"] == p["steps"] else "within a round"


def alone(spec, folder):
    "The uninterrupted run: (its files' digests, how long it trained)"
    home, process = Path(folder) / spec.id, start(spec, folder)
    wait_for(home / "config.json", process)
    began = time.monotonic()
    process.join(); assert process.exitcode == 0
    return content(home), time.monotonic() - began


def let_live(process, home, kind, draw, length):
    "Wait until the moment at which the process is to die: early in its life, anywhere, as a round ends, or as one begins"
    process.join(draw.uniform(0, .05 * length) if kind == "early" else draw.uniform(0, .35 * length))
    while kind in ("end of a round", "beginning of a round") and process.is_alive():
        try: p = json.loads((home / "progress.json").read_text())
        except FileNotFoundError: p = dict(n=0, step=1, steps=2)
        if p["step"] == (p["steps"] if kind == "end of a round" else 0) and p["n"] > 0: return time.sleep(draw.uniform(0, .03))
        time.sleep(.001)


@posix
@pytest.mark.parametrize("name, share", [("imp", 1.), ("carried", .5), ("oneshot", .5), ("step", .5)])
def test_killed_and_restarted(name, share, tmp_path, request):
    kills, draw, seen, complete = max(1, round(share * request.config.getoption("--kills"))), random.Random(name), Counter(), 0
    spec = runs.Spec(**SPEC | CASES[name])
    kinds = itertools.cycle(["beginning of a round", "end of a round", "anywhere", "early"])
    expected, length = alone(spec, tmp_path / "alone")
    while sum(seen.values()) < kills:
        folder = tmp_path / str(complete); home = folder / spec.id
        before = set(home.iterdir()) if home.exists() else set()
        for f in ("config.json", "progress.json"): (home / f).unlink(missing_ok=True)  # notes, so that what is read below is this process's
        process = start(spec, folder)
        wait_for(home / "config.json", process)
        let_live(process, home, next(kinds), draw, length)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL); process.join()
            if process.exitcode == -signal.SIGKILL: seen[moment(home, before)] += 1; continue
        assert process.exitcode == 0
        assert content(home) == expected  # it came to its end between two kills; the next one starts anew
        complete += 1
    folder = tmp_path / str(complete)
    process = start(spec, folder); process.join()
    assert process.exitcode == 0 and content(folder / spec.id) == expected
    assert not (folder / spec.id / "state.safetensors").exists()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n  {name}: {kills} kills, {dict(seen)}; {complete + 1} runs came to their end, all with the same bytes")


@posix
def test_a_state_of_every_epoch_is_there(tmp_path):
    "The premise of the test above: what is taken up after a kill is the state put aside within the round"
    spec, rounds = runs.Spec(**SPEC), set()
    process = start(spec, tmp_path); state = tmp_path / spec.id / "state.safetensors"
    wait_for(state, process)
    while process.is_alive():
        try: h = load_tensors(state, "state")[1]; rounds.add((h["n"], h["step"]))
        except (FileNotFoundError, TicketError): pass  # replaced while it was read
    assert {n for n, _ in rounds} >= {0, 1, 2} and len({step for _, step in rounds}) == 3


@posix
def test_leftovers_are_swept(tmp_path):
    "What a killed process was writing is gone when the run has come to its end"
    spec = runs.Spec(**SPEC | dict(rounds=1, recipe=dict(epochs=1))); home = tmp_path / spec.id
    home.mkdir()
    for name in (".ticket.safetensors.1.tmp", ".rounds.csv.1.tmp"): (home / name).write_bytes(b"half a fi")
    process = start(spec, tmp_path); process.join()
    left = [p.name for p in home.iterdir() if p.suffix == ".tmp"]
    assert process.exitcode == 0 and not left, f"files of killed processes were left behind: {left}"


@posix
def test_two_processes_on_one_folder(tmp_path):
    spec = runs.Spec(**SPEC | dict(rounds=12)); home = tmp_path / spec.id
    first = start(spec, tmp_path)
    wait_for(home / "state.safetensors", first)
    os.kill(first.pid, signal.SIGSTOP)  # so that whatever changes now was not the first one's doing
    content = lambda: {p.name: p.read_bytes() for p in home.iterdir() if p.name != ".lock"}
    try:
        before = content()
        here, there = processes.Pipe()
        second = processes.Process(target=complain, args=(spec, tmp_path, there), daemon=True); second.start()
        assert here.poll(120), "the second process said nothing"
        said = here.recv(); second.join()
        assert said.startswith(f"RuntimeError: another process is working on {home}: wait for it")
        assert content() == before
    finally: os.kill(first.pid, signal.SIGKILL); first.join()  # a stopped process heeds nothing else
    with filelock.FileLock(home / ".lock", timeout=5): pass  # a killed process holds nothing
