"Two hundred kills at random moments, of runs and of studies: no bit differs, and no finished round is lost"

import os, random, signal, subprocess, sys, time
from collections import Counter
from dataclasses import replace
from pathlib import Path
import pytest
from killing import killed, posix, rounds_kept
from studying import MANY, complete_runs, digests, whole, written
from rg_tickets.batches import Kept

pytestmark = [
    pytest.mark.slow,
    posix,
    pytest.mark.skipif(
        not Path("/proc/self/stat").exists(), reason="needs /proc to find the processes of a study"
    ),
]
RUNS, STUDIES = dict(imp=70, carried=30, oneshot=30, step=30), 40


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, tmp_path, tell):
    began = time.monotonic()
    seen, complete, rounds = killed(name, RUNS[name], tmp_path)
    tell(
        f"{name}: {RUNS[name]} kills, {dict(seen)}; {complete} runs with {rounds} rounds came to their end, 0 bits differ, 0 finished rounds lost, {time.monotonic() - began:.0f} s"
    )


def family(pid):
    "(pid, command line) of a process's descendants, itself first"
    parents = {}
    for p in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(p.read_text().rpartition(")")[2].split()[1]), []).append(
                int(p.parent.name)
            )
        except OSError:
            pass
    found, todo = [], [pid]
    while todo:
        p = todo.pop(0)
        todo += parents.get(p, [])
        try:
            found.append((p, Path(f"/proc/{p}/cmdline").read_bytes()))
        except OSError:
            pass
    return found


def victims(kind, process):
    "Whom to kill: everything, the group (notebooks are in groups of their own), the study alone, one worker, or the process of one notebook; [] if there is none yet"
    if kind == "everything":
        return [p for p, _ in family(process.pid)]
    if kind == "the group":
        return [p for p, _ in family(process.pid) if os.getpgid(p) == os.getpgid(process.pid)]
    if kind == "the study":
        return [process.pid]
    mark = b"ipykernel_launcher" if kind == "a notebook" else b"--multiprocessing-fork"
    return [p for p, said in family(process.pid) if mark in said][:1]


def moment(folder, started):
    "What the study was doing"
    kept = Kept(folder)
    if not (folder / "study.json").exists():
        return "before it began"
    at_work = [
        j
        for j in kept.jobs()
        if (n := kept.note(j)).get("state") == "running" and n["began"] >= started
    ]
    if not at_work:
        return "no notebook at work"
    if any(j.experiment == "report" for j in at_work):
        return "while the report was made"
    far = [kept.at(j)[:2] for j in at_work]
    return (
        "while runs trained"
        if any(0 < a < b for a, b in far)
        else "after the last round"
        if any(b and a >= b for a, b in far)
        else "while notebooks started"
    )


def let_live(process, folder, started, kind, seconds):
    "Wait for the moment at which something is to die: any, or one at which runs train; the exit status if the study ended before"
    end = time.monotonic() + 600
    while (
        kind == "training"
        and process.poll() is None
        and moment(folder, started) != "while runs trained"
        and time.monotonic() < end
    ):
        time.sleep(0.05)
    try:
        return process.wait(min(seconds, 2) if kind == "training" else seconds)
    except subprocess.TimeoutExpired:
        return None


def kept_in(folder):
    return {p.parent.name: rounds_kept(p.parent) for p in folder.glob("*/*/ticket.safetensors")}


def test_studies(tmp_path, tell):
    study = replace(
        MANY,
        steps=tuple(
            replace(s, parameters=s.parameters | dict(epochs=120)) if s.parameters else s
            for s in MANY.steps
        ),
    )
    draw, seen, hit, path, ended, rounds, began = (
        random.Random(0),
        Counter(),
        Counter(),
        written(study, tmp_path / "many.yaml"),
        0,
        0,
        time.monotonic(),
    )
    process, folder = None, tmp_path / "alone"
    start = lambda: subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from rg_tickets.cli import main; main()",
            "study",
            str(path),
            "-f",
            str(folder),
            "-j",
            "2",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert start().wait() == 0
    want, length, folder = digests(folder), time.monotonic() - began, tmp_path / "0"

    def check():
        nonlocal ended, rounds, folder
        whole(folder, study)
        assert digests(folder) == want
        rounds += sum(kept_in(folder).values())
        ended += 1
        folder = tmp_path / str(ended)

    while sum(hit.values()) < STUDIES:
        if process is None:
            process, started = start(), time.time()
        code = let_live(
            process,
            folder,
            started,
            draw.choice(["any", "training"]),
            draw.uniform(0, 0.35 * length),
        )
        if code == 0:
            check()
        if code is None:
            kind = draw.choice(
                [
                    "everything",
                    "the group",
                    "the study",
                    "a worker",
                    "a worker",
                    "a notebook",
                    "a notebook",
                ]
            )
            chosen = victims(kind, process)
            if not chosen:
                continue
            before, done, when = kept_in(folder), complete_runs(folder), moment(folder, started)
            for p in chosen:
                try:
                    os.kill(p, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            hit[kind] += 1
            seen[when] += 1
            after = kept_in(folder)
            assert (
                all(after.get(k, 0) >= n for k, n in before.items())
                and done.items() <= complete_runs(folder).items()
            ), "a finished round was lost"
            if process.pid in chosen:
                code = process.wait()
        if code is not None:
            process = None
    for _ in range(3):  # a notebook that was killed has failed, and the next start does it
        process = process or start()
        code = process.wait(600)
        process = None
        if code == 0:
            break
    assert code == 0
    check()
    tell(
        f"studies: {STUDIES} kills of {dict(hit)}, {dict(seen)}; {ended} studies with {rounds} rounds came to their end, 0 bits differ, 0 finished rounds lost, {time.monotonic() - began:.0f} s"
    )
