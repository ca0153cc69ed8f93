"Processes that run, and ways to kill them: what the tests of failure share"

import functools, hashlib, itertools, json, multiprocessing, os, random, signal, time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
import pytest

try:
    import resource
except ImportError:
    resource = None  # on Windows
from rg_tickets import runs
from rg_tickets.tickets import Ticket

FILES = "ticket.safetensors", "rounds.csv", "flow.csv"
SPEC = dict(task="digits8", width=8, n_train=512, n_test=200, rounds=4, recipe=dict(epochs=3))
QUICK = dict(
    task="digits8", width=4, n_train=128, n_test=100, rounds=2
)  # for what needs no time to be killed in
CASES = {
    "imp": dict(),
    "carried": dict(rewind="none", recipe=dict(epochs=3, lr=0.02, schedule="constant")),
    "oneshot": dict(control="oneshot"),
    "step": dict(rewind="5it"),
}

processes = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if processes.get_start_method() == "forkserver":
    processes.set_forkserver_preload(
        ["rg_tickets.runs"]
    )  # so that a process begins to train at once
posix = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")


def work(spec, folder):
    "What a process does: a run, with its state put aside after every epoch"
    runs.imp = functools.partial(runs.imp, checkpoint_every=0)
    runs.execute(spec, folder, device="cpu")


def start(spec, folder):
    process = processes.Process(target=work, args=(spec, folder), daemon=True)
    process.start()
    return process


def wait_for(path, process, limit=120):
    "Wait until `path` is there"
    end = time.monotonic() + limit
    while not path.exists():
        assert process.is_alive() and time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.002)


def content(home):
    return {f: hashlib.sha256((home / f).read_bytes()).hexdigest() for f in FILES}


def moment(home, before):
    "Where in the run the process died, from what it left behind"
    if not (home / "ticket.safetensors").exists():
        return "before the first round"
    if any(".tmp" in p.name for p in set(home.iterdir()) - before):
        return "while a file was written"
    try:
        p = json.loads((home / "progress.json").read_text())
    except FileNotFoundError:
        return "before it went on"
    return "between rounds" if p["step"] == p["steps"] else "within a round"


def alone(spec, folder):
    "The uninterrupted run: (its files' digests, how long it trained)"
    home, process = Path(folder) / spec.id, start(spec, folder)
    wait_for(home / "config.json", process)
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return content(home), time.monotonic() - began


def let_live(process, home, kind, draw, length):
    "Wait until the moment at which the process is to die: early in its life, anywhere, as a round ends, or as one begins"
    process.join(
        draw.uniform(0, 0.05 * length) if kind == "early" else draw.uniform(0, 0.35 * length)
    )
    while kind in ("end of a round", "beginning of a round") and process.is_alive():
        try:
            p = json.loads((home / "progress.json").read_text())
        except FileNotFoundError:
            p = dict(n=0, step=1, steps=2)
        if p["step"] == (p["steps"] if kind == "end of a round" else 0) and p["n"] > 0:
            return time.sleep(draw.uniform(0, 0.03))
        time.sleep(0.001)


def rounds_kept(home):
    "How many finished rounds a run's ticket holds"
    path = home / "ticket.safetensors"
    return len(Ticket.load(path).rounds) if path.exists() else 0


def killed(name, kills, folder):
    "Kill the run `name` of `CASES` so often, always starting it again; (where it was hit, how many runs came to their end, their rounds). Asserts that nothing is lost and no bit differs"
    draw, seen, complete = random.Random(name), Counter(), 0
    spec = runs.Spec(**SPEC | CASES[name])
    kinds = itertools.cycle(["beginning of a round", "end of a round", "anywhere", "early"])
    expected, length = alone(spec, folder / "alone")
    while sum(seen.values()) < kills:
        place = folder / str(complete)
        home = place / spec.id
        before = set(home.iterdir()) if home.exists() else set()
        kept = rounds_kept(home)
        for f in ("config.json", "progress.json"):
            (home / f).unlink(
                missing_ok=True
            )  # notes, so that what is read below is this process's
        process = start(spec, place)
        wait_for(home / "config.json", process)
        let_live(process, home, next(kinds), draw, length)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert rounds_kept(home) >= kept, "a finished round was lost"
            if process.exitcode == -signal.SIGKILL:
                seen[moment(home, before)] += 1
                continue
        assert process.exitcode == 0
        assert (
            content(home) == expected
        )  # it came to its end between two kills; the next one starts anew
        complete += 1
    process = start(spec, folder / str(complete))
    process.join()
    home = folder / str(complete) / spec.id
    assert process.exitcode == 0 and content(home) == expected
    assert not (home / "state.safetensors").exists()
    return seen, complete + 1, (complete + 1) * rounds_kept(home)


@dataclass(frozen=True)
class Deadly:
    "A run that the system kills whenever it is tried"

    id: str = "deadly"
    rounds = 0

    def run(self, folder, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)


def limited(spare, function, args, pipe):
    "In a process with so many bytes left to it, and to those it starts: what a function gives or raises"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))
    try:
        pipe.send(("gave", function(*args)))
    except Exception as e:
        pipe.send((type(e).__name__, str(e)))
