"Two at once, clocks that jump, memory that is not there, numbers that are none: what is told, and what is kept"

import io, os, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import nbformat
import pandas as pd
import pytest
from killing import QUICK, Deadly, limited, posix, processes
from rg_tickets import batches, conduct, notebooks, runs
from rg_tickets.basics import alone
from rg_tickets.batches import Kept, Step, Study
from rg_tickets.imp import imp
from rg_tickets.rewind import Policy
from rg_tickets.tickets import Ticket
from rg_tickets.train import Diverged, Recipe
from studying import MANY, TINY, digests, here, undisturbed, whole, written

proc = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(),
    reason="needs /proc to know how much memory a process has",
)


@pytest.mark.slow
@posix
def test_studies_that_are_started_at_once(tmp_path, undisturbed, tell):
    folder, path = tmp_path / "many", written(MANY, tmp_path / "many.yaml")
    start = lambda: subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from rg_tickets.cli import main; main()",
            "study",
            str(path),
            "-f",
            str(folder),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = [start() for _ in range(3)]
    while not (folder / "study.json").exists() and any(p.poll() is None for p in first):
        time.sleep(0.05)
    ended = [(p.communicate(timeout=1800), p.returncode) for p in [*first, start()]]
    won = [out for (out, err), code in ended if code == 0]
    lost = [err for (out, err), code in ended if code == 1 and "notebooks in" not in out]
    assert (
        len(won) in (1, 2)
        and len(won) + len(lost) == 4
        and all(
            f"another process is working on {folder}: wait for it, or choose another folder" in o
            for o in lost
        )
    ), ended
    for name in ("find tasks=digits8", "find tasks=digits8/permuted", "report"):
        assert sum(o.count(f"{name}: running") for o in won) <= 1
    whole(folder, MANY)
    assert digests(folder) == undisturbed
    tell(
        f"4 starts of one study: {len(lost)} refused, nothing was run twice, all as if it had been started once"
    )


def quick(name, folder, given, home):
    "What a notebook leaves, without the work"
    nbformat.write(nbformat.v4.new_notebook(), home / "notebook.ipynb")
    (folder / "exponents.csv").write_text("sigma\n1\n")


@pytest.mark.parametrize(
    "clock",
    [lambda i: 2e9 - 1e5 * i, lambda i: -3.0 * i, lambda i: 1e9 + (-1) ** i * 1e8, lambda i: 0.0],
    ids=["back a day a look", "before 1970", "there and back", "stands still"],
)
def test_clocks_that_jump(clock, tmp_path, monkeypatch):
    looks = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: clock(next(looks)))
    monkeypatch.setattr(notebooks, "run", quick)
    mine, out = (
        Study(
            "mine",
            (Step("find", "resnet_imp", TINY), Step("tell", "report", after=("find",), folder=".")),
        ),
        io.StringIO(),
    )
    table = conduct.conduct(mine, tmp_path, here(), out=out)
    kept = Kept(tmp_path)
    assert (
        set(table.state) == {"done"}
        and set(table["at"]) == {"in 0 s"}
        and "-" not in "".join(table["at"] + table.left)
    )
    for i, p in enumerate(sorted(tmp_path.rglob("*"))):
        os.utime(p, ns=((-1) ** i * 10**18 + 10**18,) * 2)  # 1970 or 2033
    monkeypatch.setattr(notebooks, "run", lambda *args: pytest.fail("what is done was done again"))
    assert conduct.conduct(mine, tmp_path, here(), out=io.StringIO()).equals(
        table
    )  # and locks of other times hold nobody up
    find = kept.jobs()[0]
    home = kept.runs(find)
    runs.plan(home, [runs.Spec(rounds=3)])
    (home / runs.Spec(rounds=3).id).mkdir()
    runs.note(home / runs.Spec(rounds=3).id, 2, 0, 1, 3)
    for began in (clock(next(looks)) + 10**7, clock(next(looks)) - 10):
        kept.write(find, state="running", seen={}, before={}, began=began)
        with alone(tmp_path, ".study.lock"):
            row = batches.status(tmp_path).iloc[0]
        assert (
            row.state == "running"
            and row["at"] == "round 2 of 4"
            and "-" not in row.left
            and "nan" not in row.left
        )


SMALL = runs.Spec(**QUICK | dict(rounds=1, recipe=dict(epochs=1)))


def tried(specs, folder, jobs):
    "Run specs side by side; what was said, and how many rounds each has"
    try:
        runs.complete([specs], folder, jobs, device="cpu")
        said = ""
    except runs.RunsFailed as e:
        said = str(e)
    return said, {
        s.id: len(pd.read_csv(folder / s.id / "rounds.csv"))
        for s in specs
        if (folder / s.id / "rounds.csv").exists()
    }


@pytest.mark.slow
@posix
@proc
def test_a_run_that_needs_more_memory_than_there_is(tmp_path, tell):
    "A real limit; the others are complete, and the message says what to do"
    good, wide = [replace(SMALL, seed=i) for i in range(2)], replace(SMALL, width=2048)
    there, mine = processes.Pipe()
    process = processes.Process(
        target=limited, args=(2**31, tried, ([wide, *good], tmp_path, 1), mine)
    )
    process.start()
    assert there.poll(300)
    kind, (said, rounds) = there.recv()
    process.join()
    assert (
        kind == "gave"
        and said.startswith("1 of 3 runs failed, the others are complete")
        and "out of memory (" in said
        and "narrower network" in said
    ), said
    assert (
        rounds == {s.id: 2 for s in good}
        and "Traceback" in (tmp_path / wide.id / "error.txt").read_text()
    )
    tell(said.replace(str(tmp_path), "FOLDER")[:300])


@pytest.mark.slow
@posix
def test_a_run_that_is_always_killed_takes_no_other_with_it(tmp_path, tell):
    good = [replace(SMALL, seed=i) for i in range(5)]
    began = time.monotonic()
    said, rounds = tried([Deadly(), *good[:3], Deadly("deadly too"), *good[3:]], tmp_path, 2)
    assert (
        said.startswith("2 of 7 runs failed, the others are complete")
        and "its worker was killed, twice (out of memory?)" in said
    ), said
    assert rounds == {s.id: 2 for s in good}
    tell(
        f"2 of 7 runs killed whenever they were tried: the other 5 are complete, {time.monotonic() - began:.0f} s"
    )


@pytest.mark.slow
@posix
def test_a_notebook_without_memory_stops_no_study(tmp_path, tell):
    mine = Study(
        "mine",
        (
            Step("wide", "resnet_imp", TINY | dict(width=2**17, jobs=1)),
            Step("good", "resnet_imp", TINY | dict(jobs=1)),
            Step("late", "resnet_imp", TINY, needs=("wide",)),
            Step("tell", "report", after=("wide", "good", "late"), folder="."),
        ),
    )
    table = conduct.conduct(mine, tmp_path / "mine", here(), out=io.StringIO()).set_index("job")
    assert (
        table.state.to_dict() == dict(wide="failed", good="done", late="waiting", tell="done")
        and "out of memory" in table.note["wide"]
        and "wide: failed" in (tmp_path / "mine" / "verdict.txt").read_text()
    )
    tell(table.note["wide"].replace(str(tmp_path), "FOLDER")[:300])


def test_a_loss_that_is_no_number(tmp_path):
    "The run stops and names the step; the next start says the same; nothing of it passes for a round"
    wild = replace(SMALL, recipe=dict(epochs=4, lr=1e12))
    said = []
    for _ in range(2):
        with pytest.raises(Diverged) as e:
            runs.execute(wild, tmp_path, device="cpu")
        said.append(str(e.value))
        home = tmp_path / wild.id
        assert (
            Ticket.load(home / "ticket.safetensors").rounds == []
            and not (home / "rounds.csv").exists()
        )
    assert (
        said[0] == said[1]
        and "at step" in said[0]
        and "learning rate" in said[0]
        and "lower it, or set clip=1.0" in said[0]
    )
    words, rounds = tried([wild, SMALL], tmp_path, 1)
    assert (
        said[0] in words and rounds == {SMALL.id: 2} and said[0] in (home / "error.txt").read_text()
    )


def test_a_loss_that_becomes_no_number_keeps_the_last_good_round(tmp_path):
    "The first round trains as it should, the second goes on at a rate that is far too high"

    def begin():
        task, network = runs.build(SMALL)
        return imp(
            task,
            network,
            3,
            rewind=Policy(("optimizer",), rate=1e12),
            recipe=Recipe(epochs=4),
            device="cpu",
            folder=tmp_path,
            checkpoint_every=0,
        )

    rounds, said, kept = [], [], set()
    for _ in range(3):
        with pytest.raises((Diverged, ValueError)) as e:
            for r in begin():
                rounds.append(r.n)
        said.append(str(e.value))
        t = Ticket.load(tmp_path / "ticket.safetensors")
        kept.add((tmp_path / "ticket.safetensors").read_bytes())
        assert len(t.rounds) == 1 and t.rounds[0]["metrics"]["loss"] < 10 and t.history.rounds == 1
    assert (
        rounds == [0, 0, 0]
        and len(kept) == 1
        and len(set(said)) == 1
        and "step" in said[0]
        and "lower" in said[0]
    ), said
