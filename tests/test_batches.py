"Studies as a user meets them: hostile files, order, failure, resuming; and workers that are killed"

import concurrent.futures as futures, io, json, os, signal, subprocess, sys, time, tempfile
from collections import Counter
from pathlib import Path
import nbformat
import pandas as pd
import pytest
from killing import posix
from studying import (
    MANY,
    TINY,
    alive_kernels,
    complete_runs,
    digests,
    here,
    running,
    undisturbed,
    whole,
    written,
)
from rg_tickets import batches, cli, conduct, notebooks
from rg_tickets.batches import Kept, Step, Study, study_of
from rg_tickets.executors import team


def command(words, capsys, monkeypatch):
    "(exit status, output, lines of stderr) of `rg-tickets words...`, in this process"
    monkeypatch.setattr(sys, "argv", ["rg-tickets", *map(str, words)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    said = capsys.readouterr()
    return e.value.code, said.out, [o for o in said.err.splitlines() if o.strip()]


# Files that are wrong, or worse


def laughs(depth, breadth):
    return "a0: &a0 [ha]\n" + "".join(
        f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * breadth)}]\n" for i in range(depth)
    )


HOSTILE = {
    "laughs": laughs(9, 9),
    "many small laughs": laughs(40, 2),
    "merged": "a: &a {x: 1}\nb: &b {<<: *a, <<: *a}\n",
    "object": "study: !!python/object/apply:os.system ['touch pwned']",
    "name": "study: !!python/name:os.system",
    "new": "study: !!python/object/new:subprocess.Popen [['touch', 'pwned']]",
    "module": "study: !!python/module:antigravity",
    "itself": "a: &a {b: *a}",
    "deep": "{a: " * 5000,
    "deep list": "[" * 50_000,
    "tab": "a:\n\t- b",
    "two documents": "a: 1\n---\nb: 2",
    "binary": "a: !!binary aGFsbG8=",
    "set": "a: !!set {x, y}",
    "date": "a: 2026-01-01",
    "infinite": "a: .inf",
    "large": "a: " + "x" * 200_000,
    "nothing": "",
    "zero": "a: \0",
    "number as key": "1: 2",
    "unknown tag": "a: !include /etc/passwd",
    "no text": "\ud800".encode("utf-8", "surrogatepass"),
    "latin": "study: caf\xe9".encode("latin-1"),
    "wide": "study: mine".encode("utf-16"),
    "spaces": " \n\n",
    "remark": "# nothing here\n",
    "list": "- study: mine",
    "bare": "mine",
    "long number": "a: " + "9" * 10_000,
    "mapping as key": "? {a: b}\n: c",
    "many keys": "".join(f"{i:x}:\n" for i in range(16_000)),
    "a key twice": "study: mine\nstudy: yours\n",
    "laughs as keys": laughs(9, 9) + "? *a9\n: x",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_quickly(case, tmp_path, capsys, monkeypatch, ends):
    monkeypatch.chdir(tmp_path)
    text = HOSTILE[case]
    Path("mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with ends():
        code, out, lines = command(["study", "mine.yaml"], capsys, monkeypatch)
    assert (
        code == 2
        and len(lines) == 1
        and lines[0].startswith("rg-tickets: mine.yaml")
        and len(lines[0]) < 400
    ), lines
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def study(**step):
    return dict(study="mine", steps=[dict(name="find", experiment="resnet_imp") | step])


WRONG = {
    "experiment": (study(experiment="resnet_inp"), "did you mean 'resnet_imp'?"),
    "no such file": (study(experiment="../../etc/passwd"), "unknown experiment"),
    "parameter": (study(parameters=dict(sedes=2)), "did you mean 'seeds'?"),
    "type": (study(parameters=dict(seeds="two")), "should be int, not str"),
    "task": (study(parameters=dict(tasks=["digit8"])), "did you mean 'digits8'?"),
    "scale": (study(parameters=dict(scale="papre")), "did you mean 'paper'?"),
    "shell": (study(parameters=dict(tasks=["digits8; touch pwned"])), "unknown task"),
    "shell in a grid": (study(grid=dict(tasks=[["$(touch pwned)"]])), "unknown task"),
    "folder by parameter": (study(parameters=dict(folder="/etc")), "by the step's own key"),
    "step's folder": (study(folder="../../elsewhere"), "without '..'"),
    "absolute": (study(folder="/tmp/elsewhere"), "does not lie within"),
    "home": (study(folder="~root"), "does not lie within"),
    "windows": (study(folder="..\\..\\x"), "does not lie within"),
    "drive": (study(folder="C:x"), "does not lie within"),
    "control character": (study(folder="a\nb"), "does not lie within"),
    "study's folder": (study() | dict(folder="../runs"), "--folder"),
    "step's name": (study(name="../x"), "is no name"),
    "study's name": (study() | dict(study="a b"), "is no name"),
    "itself": (study(needs="find"), "in a circle"),
    "circle": (
        dict(
            study="x",
            steps=[
                dict(name=a, experiment="resnet_imp", **{how: [b]})
                for a, b, how in (("a", "b", "needs"), ("b", "c", "after"), ("c", "a", "needs"))
            ],
        ),
        "in a circle: ",
    ),
    "name twice": (
        dict(study="x", steps=[dict(name="find", experiment="resnet_imp")] * 2),
        "two steps are called 'find'",
    ),
    "jobs twice": (study(grid=dict(seeds=[2, 3, 2])), "does a grid name a value twice?"),
    "no steps": (dict(study="x", steps=[]), "at least one step"),
    "study key": (study() | dict(stpes=[]), "did you mean 'steps'?"),
    "folder between": (study(folder="a/../../b"), "without '..'"),
    "key": (study(paramters={}), "did you mean 'parameters'?"),
    "grid": (study(grid=dict(seeds=2)), "needs a list of values"),
    "huge grid": (study(grid=dict(seeds=[*range(200)], rounds=[*range(200)])), "more than 10,000"),
    "needs": (study(needs=["fnd"]), "did you mean 'find'?"),
    "steps": (dict(study="x", steps="find"), "should be a list"),
    "impossible": (study(parameters=dict(prune=1.5)), "find: "),
    "nested": (study(parameters=dict(tasks=[["digits8"]])), "find: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_study_starts_nothing(case, tmp_path, capsys, monkeypatch):
    given, says = WRONG[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(json.dumps(given))  # JSON is YAML
    code, out, lines = command(["study", "mine.yaml"], capsys, monkeypatch)
    assert code == 2 and len(lines) == 1 and says in lines[0], lines
    assert {p.name for p in tmp_path.iterdir()} <= {"mine.yaml"}


def test_a_link_does_not_lead_out(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "out").symlink_to("/etc")
    with pytest.raises(ValueError, match="leads out of the study's folder"):
        conduct.conduct(
            study_of(study(folder="out", parameters=TINY)),
            tmp_path / "mine",
            here(),
            out=io.StringIO(),
        )


def test_python_and_file_say_the_same(tmp_path):
    twin = Study(
        "mine",
        (
            Step("find", "resnet_imp", dict(seeds=2), dict(tasks=[["digits8"], ["textures"]])),
            Step("tell", "report", after=("find",), folder="."),
        ),
    )
    text = "study: mine\nsteps:\n- {name: find, experiment: resnet_imp, parameters: {seeds: 2}, grid: {tasks: [[digits8], [textures]]}}\n- {name: tell, experiment: report, after: find, folder: .}\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert (
        batches.read(tmp_path / "mine.yaml") == twin
        and twin.jobs() == batches.read(tmp_path / "mine.yaml").jobs()
    )


def test_shipped_studies(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, lines = command(["study", "--list"], capsys, monkeypatch)
    assert not code and [o.split(":")[0] for o in out.splitlines()] == [
        "bert",
        "elastic",
        "embedded",
        "resnet50",
        "tables",
    ]
    code, out, lines = command(["study", "bert", "--dry-run"], capsys, monkeypatch)
    assert not code and "4 notebooks" in out and "needs imp" in out and not any(tmp_path.iterdir())
    assert {s: [j.experiment for j in batches.read(s).jobs()] for s in batches.studies()}[
        "elastic"
    ] == ["elastic_imp", "elastic_transfer", "report"]


@pytest.mark.parametrize(
    "words, says",
    [
        ("dusk://h:1", "did you mean 'dask'?"),
        ("dask://nobody", "dask://HOST:PORT"),
        ("slurm", "no cluster file"),
        ("local:8", "takes no address"),
    ],
)
def test_executors_refuse(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(json.dumps(study(parameters=TINY)))
    code, out, lines = command(["study", "mine.yaml", "--executor", words], capsys, monkeypatch)
    assert code == 2 and says in lines[0]


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ImportError, match=r"pip install 'rg_tickets\[dask\]'"):
        team("dask://127.0.0.1:8786").__enter__()
    from rg_tickets.executors import CLUSTER

    (tmp_path / "c.yaml").write_text(CLUSTER)
    with pytest.raises(ImportError, match="dask-jobqueue"):
        team(f"slurm:{tmp_path / 'c.yaml'}").__enter__()


# A study, for real and as small as can be: one notebook that works, one that fails, one that needs it, and the report

ODD = Path(tempfile.mkdtemp()) / "odd.pth"  # it is there, so only the run itself can find it wrong
ODD.write_bytes(b"these are no weights")
FAILING = Study(
    "mine",
    (
        Step("bad", "resnet_imp", TINY | dict(prune_type="pt_trans", pretrained=str(ODD))),
        Step("good", "resnet_imp", TINY),
        Step("late", "resnet_imp", TINY, needs=("bad",)),
        Step("tell", "report", after=("bad", "good", "late"), folder="."),
    ),
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "(folder, what was printed)"
    folder, out = tmp_path_factory.mktemp("study") / "mine", io.StringIO()
    conduct.conduct(FAILING, folder, here(), out=out)
    return folder, out.getvalue()


def test_one_failure_stops_nobody(ran):
    folder, out = ran
    table = batches.status(folder).set_index("job")
    assert (
        table.state.to_dict() == dict(bad="failed", good="done", late="waiting", tell="done")
        and "odd.pth" in table.note["bad"]
        and "needs bad" in table.note["late"]
    )
    assert (
        "Traceback" in (folder / "bad" / "error.txt").read_text()
        and "\x1b" not in (folder / "bad" / "error.txt").read_text()
        and not (folder / "good" / "error.txt").exists()
    )
    assert {"bad: failed", "late: waiting", "tell: done"} <= {
        " ".join(o.split()[:2]).rstrip(":") for o in out.splitlines()
    }
    assert (
        "late: waiting" in (folder / "verdict.txt").read_text()
        and len(list((folder / "good").glob("*/ticket.safetensors"))) == 2
    )


def test_notebooks_are_valid_and_say_what_they_are(ran):
    for name in ("good", "bad", "tell"):
        nb = nbformat.read(ran[0] / name / "notebook.ipynb", 4)
        nbformat.validate(nb)
        told = nb.metadata["rg_tickets"]
        assert (
            told["versions"]["rg_tickets"]
            and told["versions"]["torch"]
            and told["hardware"]["cores"]
            and "commit" in told
            and nb.metadata["kernelspec"]["name"] == "python3"
        )
        assert nb.metadata["papermill"]["parameters"]["folder"] == told["parameters"]["folder"]
    assert (
        nbformat.read(ran[0] / "good" / "notebook.ipynb", 4).metadata["rg_tickets"]["parameters"][
            "width"
        ]
        == 4
    )


def test_questions_to_its_folder(ran, capsys, monkeypatch, tmp_path):
    folder = ran[0]
    code, out, lines = command(["status", folder], capsys, monkeypatch)
    assert not code and "1 waiting" in out and "2 done" in out
    code, out, lines = command(["show", folder / "bad"], capsys, monkeypatch)
    assert not code and "odd.pth" in out and "Traceback" in out
    code, out, lines = command(["show", folder / "good"], capsys, monkeypatch)
    assert not code and "state: done" in out
    code, out, lines = command(
        ["collect", folder, "-o", tmp_path / "results.csv"], capsys, monkeypatch
    )
    assert not code
    table = pd.read_csv(tmp_path / "results.csv")
    assert len(table) == 6 and set(table.seed) == {0, 1} and set(table.n) == {0, 1, 2}
    code, out, lines = command(["collect", folder, "--table", "exponents"], capsys, monkeypatch)
    assert not code and "sigma" in out.splitlines()[0] and "good" in out
    code, out, lines = command(["collect", folder, "--table", "exponent"], capsys, monkeypatch)
    assert code == 2 and "there are: exponents, flow" in lines[0]


def test_a_second_start_does_what_is_missing(ran, monkeypatch):
    folder, out = ran[0], io.StringIO()
    tickets = {p: p.stat().st_mtime_ns for p in folder.glob("*/*/ticket.safetensors")}
    executed = []
    monkeypatch.setattr(
        notebooks,
        "run",
        lambda name, runs, given, home: (
            executed.append(home.name) or (_ for _ in ()).throw(MemoryError("no more"))
        ),
    )
    table = conduct.conduct(FAILING, folder, here(), out=out).set_index("job")
    assert (
        executed == ["bad"]
        and table.state.to_dict() == dict(bad="failed", good="done", late="waiting", tell="done")
        and table.note["bad"].startswith("out of memory (MemoryError: no more): run fewer jobs")
    )
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/*/ticket.safetensors")} == tickets


def test_one_study_at_a_time(ran, tmp_path, capsys, monkeypatch):
    folder = ran[0]
    kept = Kept(folder)
    hold = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys, filelock; l = filelock.FileLock({str(folder / '.study.lock')!r}); l.acquire(); print('held', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert hold.stdout.readline().strip() == "held"
        with pytest.raises(RuntimeError, match="another process is working on"):
            conduct.conduct(FAILING, folder, here(), out=io.StringIO())
    finally:
        hold.communicate("")
    with pytest.raises(ValueError, match="holds the study 'mine', not 'other'"):
        conduct.conduct(Study("other", FAILING.steps), folder, here(), out=io.StringIO())


# Workers that are killed


@pytest.mark.slow
@posix
def test_a_killed_worker_costs_a_try(tmp_path, undisturbed):
    folder = tmp_path / "many"
    with futures.ThreadPoolExecutor(1) as thread:
        future = thread.submit(conduct.conduct, MANY, folder, "local", 2, io.StringIO(), 0.5)
        victim = running(folder, lambda: not future.done())
        before = complete_runs(folder)
        os.kill(victim["pid"], signal.SIGKILL)
        future.result()
    whole(folder, MANY)
    after = complete_runs(folder)
    assert (
        digests(folder) == undisturbed and before.items() <= after.items()
    )  # what was complete was not run again
    assert not alive_kernels(folder)


@pytest.mark.slow
@posix
def test_a_killed_study_goes_on(tmp_path, undisturbed):
    folder, path = tmp_path / "many", tmp_path / "many.yaml"
    written(MANY, path)
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
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    process = start()
    worker = running(folder, lambda: process.poll() is None)["pid"]
    process.kill()
    process.communicate()
    before = complete_runs(folder)
    time.sleep(4)
    assert (
        not Path(f"/proc/{worker}").exists() and "stopped" in batches.status(folder).state.tolist()
    )
    process = start()
    out = process.communicate(timeout=1800)[0]
    assert process.returncode == 0, out
    whole(folder, MANY)
    assert digests(folder) == undisturbed and before.items() <= complete_runs(folder).items()


def quiet():
    return os.environ | dict(DASK_DISTRIBUTED__DASHBOARD__LINK="", PYTHONUNBUFFERED="1")


@pytest.mark.slow
@posix
def test_a_dask_cluster_that_loses_a_worker(tmp_path, undisturbed):
    pytest.importorskip("distributed")
    folder, address = tmp_path / "many", tmp_path / "scheduler.json"
    log = open(tmp_path / "log.txt", "w")
    module = lambda *words: subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + words[0], *map(str, words[1:])],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=quiet(),
        cwd=tmp_path,
    )
    cluster = [
        module(
            "dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            0,
            "--no-dashboard",
            "--scheduler-file",
            address,
        )
    ]
    try:
        cluster += [
            module(
                "dask_worker",
                "--scheduler-file",
                address,
                "--nthreads",
                1,
                "--no-nanny",
                "--no-dashboard",
                "--host",
                "127.0.0.1",
                "--name",
                name,
                "--resources",
                "GPU=1",
            )
            for name in ("one", "two")
        ]
        end = time.monotonic() + 120
        while not address.exists() and time.monotonic() < end:
            time.sleep(0.1)
        where = json.loads(address.read_text())["address"].removeprefix("tcp://")
        from distributed import Client

        with Client(f"tcp://{where}", set_as_default=False) as client:
            client.wait_for_workers(2, timeout=120)
        out = io.StringIO()
        with futures.ThreadPoolExecutor(1) as thread:
            future = thread.submit(conduct.conduct, MANY, folder, f"dask://{where}", 0, out, 0.5)
            victim = running(folder, lambda: not future.done())["pid"]
            before = complete_runs(folder)
            assert victim in [p.pid for p in cluster[1:]]
            os.kill(victim, signal.SIGKILL)
            future.result()
        assert "2 workers with GPUs" in out.getvalue()
        whole(folder, MANY)
        assert digests(folder) == undisturbed and before.items() <= complete_runs(folder).items()
        kept = Kept(folder)
        assert {kept.note(j)["pid"] for j in kept.jobs()} <= {p.pid for p in cluster[1:]} | {
            victim
        } and Counter(kept.note(j)["state"] for j in kept.jobs())["done"] == 3
    finally:
        for p in cluster:
            p.kill()
        for p in cluster:
            p.wait()
        log.close()
