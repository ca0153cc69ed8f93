"The command line: a dry run refuses what a run refuses, quickly; a user's own notebook; Ctrl-C; logs"

import contextlib, functools, json, os, re, resource, signal, subprocess, sys, time
from pathlib import Path
import nbformat
import pytest
import torch
from killing import posix
from playing import play
from rg_tickets import notebooks
from rg_tickets.basics import generator, seeded
from rg_tickets.imp import imp
from rg_tickets.reports import flow_at
from rg_tickets.tasks.core import Resident, Task
from rg_tickets.train import Recipe
from test_batches import command

EXPERIMENTS = notebooks.experiments()
SCRIPT = Path(sys.executable).with_name("rg-tickets")
slow = pytest.mark.slow

# What no experiment can do: (parameters, what is said)
ALL = [
    ("scale=papre", "did you mean 'paper'?"),
    ("sedes=3", "did you mean 'seeds'?"),
    ("seeds=1", "too few"),
    ("seeds=-1", "too few"),
    ("seeds=3000000", "seeds=3000000 are too many"),
    ("seeds=2.5", "should be int, not float"),
    ("seeds=true", "should be int, not bool"),
    ("seeds=", "seeds= has no value"),
    ("rounds=1", "too few for a slope"),
    ("rounds=255 prune=0.01", "rounds=255: a history holds at most 254"),
    ("rounds=1000000000 prune=0.001", "a history holds at most 254"),
    ("prune=1.5", "prune rate 1.5 is not in (0, 1)"),
    ("prune=0", "prune rate 0 is not in (0, 1)"),
    ("prune=.9999 rounds=12", "12 rounds of "),
    ("n_train=-5", "n_train must be a whole number, 1 or more, not -5"),
    ("n_train=0", "n_train must be a whole number, 1 or more, not 0"),
    ("jobs=-2", "jobs must be a whole number, 0 or more, not -2"),
    ("jobs=two", "should be int, not str"),
    ("device=gpu9", "device 'gpu9' cannot be used here"),
]
PICTURES = [
    ("n_train=10000000", "has 1297 train samples"),
    ("width=0", "width must be a whole number, 1 or more, not 0"),
    ("epochs=0", "epochs must be positive"),
    ("epochs=1.5", "should be int, not float"),
]
TASKS = [
    ("tasks=", "tasks= has no value"),
    ("tasks=[]", "tasks=[] is empty"),
    ("tasks=digits8,digits8", "names 'digits8' twice"),
    ("tasks=3", "should be a list of str, not int"),
    ("tasks=digits8,none", "should be a list of str, not NoneType"),
    ("tasks=digit8", "did you mean 'digits8'?"),
    ("tasks=digits8/simcrl", "did you mean 'simclr'?"),
]
CONTROLS = [
    ("controls=untrained,random", "lack 'imp'"),
    ("controls=imp,untraned", "did you mean 'untrained'?"),
    ("controls=[]", "controls=[] is empty"),
    ("window=some", "unknown fit window"),
]
REWIND = [
    ("rewind=ini", "did you mean 'init'?"),
    ("rewind=step", "needs the step"),
    ("rewind=none epochs=20", "which trains nothing"),
    ("rewind=500it", "the rewind point is step 500, but the recipe ends at step"),
    ("rewind=500ep", "but the recipe ends at step"),
]
BERT = [
    ("model=tinny", "did you mean 'tiny'?"),
    ("n_train=10000000", "10000000"),
]
BAD = {
    "resnet_imp": [
        *PICTURES,
        *TASKS,
        *CONTROLS,
        *REWIND,
        ("model=cifar_resnet9", "unknown model"),
        ("model=resnet18 width=8", "width"),
        ("prune_type=pt_trans", "say which, source="),
        ("prune_type=pt_tran", "did you mean 'pt_trans'?"),
        ("prune_type=lt pretrained=w.pth", "or take pt_trans"),
        ("prune_type=rewind_lt", "but the recipe ends at step"),
        ("pretrained=w.pth", "is read by prune_type='pt_trans' only"),
        ("rewind=1ep prune_type=lt", "both say what to go back to"),
        ("scale=paper tasks=cifar11", "did you mean 'cifar10'?"),
    ],
    "resnet_pretrain": [
        *PICTURES,
        *TASKS,
        *CONTROLS,
        ("pretrained={'digit8':'w.pth'}", "did you mean 'digits8'?"),
        ("prune_type=pt_trans", "say which, source="),
        ("prune_type=lt pretrained={'digits8':'w.pth'}", "or take pt_trans"),
    ],
    "resnet_transfer": [
        *PICTURES,
        ("sources=digit8", "did you mean 'digits8'?"),
        ("targets=digit8", "did you mean 'digits8'?"),
        ("targets=[]", "targets=[] is empty"),
        ("extra=1", "should be a list of str"),
        ("at=3", "prunes 2 times"),
        ("at=0", "ask for rounds 1 to 2"),
        ("at=one", "should be a list of int"),
        ("kinds=ovn,dense", "lack 'own'"),
        ("kinds=own,transferred,unifrm", "did you mean 'uniform'?"),
        ("kinds=own,dense", "lack 'transferred'"),
        ("weights=sorce", "did you mean 'source'?"),
        ("keep=conv", "did you mean 'conv1'?"),
        ("prune_type=pt_trans", "say which, source="),
        ("window=some", "unknown fit window"),
        ("controls=untraned", "did you mean 'untrained'?"),
    ],
    "bert_imp": [
        *BERT,
        *CONTROLS,
        ("tasks=topik", "did you mean 'topic'?"),
        ("tasks=topic,topic", "names 'topic' twice"),
        ("variants=hart", "did you mean 'hard'?"),
        ("schedule=arithmetical", "did you mean 'arithmetic'?"),
        ("schedule=arithmetic prune=0.5", "would leave none"),
        ("lr=-1", "lr must be positive"),
        ("epochs=0", "epochs must be positive"),
    ],
    "bert_pretrain": [
        *BERT,
        ("task=topic", "has no masked words"),
        ("task=mml", "did you mean 'mlm'?"),
        ("lr=-1", "lr must be positive"),
    ],
    "bert_transfer": [
        *BERT,
        ("sources=topik", "did you mean 'topic'?"),
        ("targets=[]", "targets=[] is empty"),
        ("at=3", "prunes 2 times"),
        ("kinds=own", "lack 'transferred'"),
        ("kinds=own,transferred,dence", "did you mean 'dense'?"),
    ],
    "elastic_imp": [
        *PICTURES,
        *TASKS,
        *REWIND,
        ("seeds=2", "give 3 or more"),
        ("depths=8,14", "are too few for a slope"),
        ("depths=8,14,15", "unknown model"),
        ("depths=[]", "depths=[] is empty"),
        ("widths=0", "width must be a whole number, 1 or more"),
        ("random=15", "unknown model"),
    ],
    "elastic_transfer": [
        *PICTURES,
        *TASKS,
        *REWIND,
        ("depths=14,15 every=[] bridges=[]", "unknown residual network"),
        ("maps=interpolat", "did you mean 'interpolate'?"),
        ("maps=drop-tail", "none of the maps"),
        ("densities=1.5", "is no share of weights"),
        ("densities=0", "is no share of weights"),
        ("densities=0.001", "reaches densities from"),
        ("densities=[]", "densities=[] is empty"),
        ("every=14", "come in pairs"),
        ("bridges=14,56", "depth 56 of"),
        ("points=1", "a line has two ends"),
    ],
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def said(words, capsys, monkeypatch):
    "(exit status, the line on standard error) of a command that is refused"
    code, _, lines = command(words, capsys, monkeypatch)
    assert len(lines) == 1, lines
    return code, lines[0].removeprefix("rg-tickets: ")


def in_the_notebook(name, words):
    "What the notebook's own cells say to parameters, when they are executed for real"
    with pytest.raises((ValueError, OSError)) as e:
        play(name, Path("f"), **notebooks.parsed(name, words))
    return str(e.value)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_dry_run_refuses_what_a_run_refuses(name, capsys, monkeypatch, tmp_path):
    "Both, and the notebook itself, say the same, before anything is trained"
    wrong = []
    for text, expected in [*ALL, *BAD[name]]:
        words = text.split()
        run = said(["run", name, *words, "-f", "f"], capsys, monkeypatch)
        dry = said(["run", name, *words, "-f", "f", "--dry-run"], capsys, monkeypatch)
        if run != dry or run[0] != 2 or expected not in run[1]:
            wrong.append((text, expected, run, dry))
        if list(tmp_path.iterdir()):
            wrong.append((text, "something was written", [str(o) for o in tmp_path.rglob("*")]))
    assert not wrong, "\n".join(map(str, wrong))
    assert len(ALL) + len(BAD[name]) >= 22


@pytest.mark.parametrize(
    "name", [pytest.param(o, marks=[] if o == "resnet_imp" else slow) for o in EXPERIMENTS]
)
def test_the_notebook_itself_refuses_the_same(name, capsys, monkeypatch, tmp_path):
    "Also where nobody made a plan first, as with papermill; no ticket is made"
    wrong = []
    for text, _ in [*ALL, *BAD[name]]:
        words = text.split()
        dry = said(["run", name, *words, "-f", "f", "--dry-run"], capsys, monkeypatch)[1]
        if (found := in_the_notebook(name, words)) != dry:
            wrong.append((text, found, dry))
    assert not wrong, "\n".join(map(str, wrong))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("folder", ["file", "file/runs", "/proc/runs", "/dev/null/runs", "x" * 300])
def test_a_folder_that_cannot_be_written(name, folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = said(["run", name, "-f", folder], capsys, monkeypatch)
    dry = said(["run", name, "-f", folder, "--dry-run"], capsys, monkeypatch)
    assert run == dry and run[0] in (1, 2) and f"cannot write to {folder}" in run[1]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name, words, lacks",
    [
        ("resnet_imp", "scale=paper", "task 'cifar10' was not found"),
        ("resnet_imp", "prune_type=pt_trans pretrained=nowhere.pth", "nowhere.pth"),
        ("bert_imp", "scale=paper", "mnli"),
    ],
)
def test_what_is_missing(name, words, lacks, capsys, monkeypatch, tmp_path):
    "A plan says which data and weights are missing, and a run does not begin without them"
    code, line = said(["run", name, *words.split(), "-f", "f"], capsys, monkeypatch)
    if "rg_tickets[bert]" in line:
        pytest.skip("needs the extra bert, and the message says so")
    assert code == 2 and lacks in line and not list(tmp_path.iterdir())
    code, out, lines = command(["run", name, *words.split(), "--dry-run"], capsys, monkeypatch)
    told = out.partition("Not there yet, and needed before a run:")[2]
    assert not code and not lines and lacks.split("'")[1 if "'" in lacks else 0] in told


GOOD = {
    "resnet_imp": [
        "controls=imp",
        "rewind=1ep",
        "rewind=10it",
        "rewind=lr",
        "prune_type=pt",
        "prune_type=lt rounds=2",
        "tasks=digits8,mnist5k n_train=100 width=4",
        "model=cifar_resnet14 width=4 epochs=1",
        "tasks=digits8/permuted window=matching",
        "tasks=None rounds=none prune=.5",
        "seeds=3 n_train=64 epochs=1",
    ],
    "resnet_pretrain": ["tasks=digits8/moco controls=imp", "prune_type=lt", "window=matching"],
    "resnet_transfer": [
        "sources=digits8 targets=mnist5k",
        "kinds=own,transferred",
        "kinds=own,transferred,dense at=1,2",
        "keep=conv1 weights=source,target",
        "controls=[] window=shared",
    ],
    "bert_imp": ["tasks=topic variants=-", "legacy=true", "schedule=arithmetic prune=.2"],
    "bert_pretrain": ["legacy=true", "lr=0.01"],
    "bert_transfer": ["others=false", "kinds=own,transferred at=1"],
    "elastic_imp": ["random=[]", "widths=4,8", "deepest=26 epochs=2"],
    "elastic_transfer": ["every=[] bridges=[]", "maps=guided,drop-tail,interpolate", "further=.6"],
}


def test_every_experiment_has_good_parameters():
    assert set(GOOD) == set(BAD) == set(EXPERIMENTS) and sum(map(len, GOOD.values())) >= 30


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_dry_run_accepts_what_can_be_run(name, capsys, monkeypatch, tmp_path):
    for text in GOOD[name]:
        words = ["run", name, *text.split(), "-f", "f", "--dry-run"]
        code, out, lines = command(words, capsys, monkeypatch)
        assert not code and not lines and "Nothing was run" in out, (text, lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, text",
    [
        pytest.param(n, o, marks=[] if (n, i) == ("resnet_imp", 0) else slow, id=f"{n} {o}")
        for n in GOOD
        for i, o in enumerate(GOOD[n])
    ],
)
def test_what_a_dry_run_accepts_runs_to_its_end(name, text, tmp_path):
    scope = play(name, tmp_path / "f", jobs=1, **notebooks.parsed(name, text.split()))
    assert (tmp_path / "f" / "verdict.txt").stat().st_size and "prunes" in scope["printed"]


# How long a plan takes


def seconds(*words):
    "(CPU seconds, exit status, output) of a command in a process of its own"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took, done.returncode, done.stdout + done.stderr


SCALES = {name: ("smoke", "embedded", "paper") for name in EXPERIMENTS}
SCALES["resnet_imp"] += ("demo",)
QUICK = {("resnet_transfer", "paper"), ("bert_imp", "paper")}


@pytest.mark.parametrize(
    "name, scale",
    [pytest.param(n, s, marks=[] if (n, s) in QUICK else slow) for n in SCALES for s in SCALES[n]],
)
def test_every_scale_has_a_plan(name, scale, tell):
    "How long it takes is told, not tested: machines differ, and 54_benchmarks compares"
    took, code, said = seconds("run", name, "--dry-run", f"scale={scale}")
    tell(f"{name} {scale}: {took:.1f} s of processor time")
    assert code == 0 or "rg_tickets[bert]" in said


def test_a_plan_waits_for_nothing_it_does_not_need():
    "Half a second each, or seconds"
    slow_ones = ["scipy.stats", "scipy.optimize", "sklearn", "transformers", "jupyter_client"]
    code = f"import sys, rg_tickets.plans; print([m for m in {slow_ones} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        ("run resnet_imp seeds=3000000 --dry-run", "too many"),
        ("run resnet_imp seeds=1000 --dry-run", "2,000 runs"),
        ("run resnet_transfer seeds=1000 --dry-run", "at most 10,000"),
        ("run elastic_transfer seeds=1000 --dry-run", "at most 10,000"),
    ],
)
def test_a_plan_is_bounded(words, says):
    assert says in seconds(*words.split())[2]


@posix
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "terminal"])
def test_a_study_file_that_is_none(kind, tmp_path):
    path = {"endless": "/dev/zero", "folder": str(tmp_path), "terminal": "/dev/tty"}.get(kind)
    if kind == "pipe":
        os.mkfifo(path := tmp_path / "pipe.yaml")
    _, code, said = seconds("study", str(path), "--dry-run")
    assert code == 2 and f"{path} is no regular file" in said


@slow
def test_a_grid_of_nearly_ten_thousand(tmp_path):
    "Distinct combinations have distinct names"
    from rg_tickets.batches import Step, Study

    grid = dict(prune=[i / 100_000 for i in range(1, 10_000)])
    made = Study("many", (Step("find", "resnet_imp", {}, grid),)).jobs()
    assert len({j.id for j in made}) == 9999 and all(
        len(j.id.rpartition("-")[2]) == 16 for j in made
    )


# A notebook of one's own

PARAMETERS = (
    "seeds = 2  # repetitions\nprune: float = 0.5  # share\nfolder: str = 'runs/mine'  # where\n"
)
PLANNED = """%matplotlib inline
from rg_tickets.notebooks import declared
given = declared("mine", globals())
from rg_tickets.runs import grid, trajectories, writable, write_text
from rg_tickets.specs import Spec
base = Spec(width=4, rounds=1, prune=prune, n_train=64, n_test=50, recipe=dict(epochs=1))
folder = writable(folder)
flow = trajectories(grid(base, seed=range(seeds)), folder, jobs=1, device="cpu")
write_text(folder / "verdict.txt", f"{len(flow.frame)} rows\\n")
"""


def own(source, parameters=PARAMETERS, path="mine.ipynb"):
    "Write a notebook; its path"
    cells = [nbformat.v4.new_code_cell(o) for o in (parameters, source)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return f"./{path}"


def test_ones_own_notebook(capsys, monkeypatch, tmp_path):
    "Parameters are checked as for ours, it is planned, it runs, and its folder has a status"
    mine = own(PLANNED)
    for word, says in [("seed=3", "did you mean 'seeds'?"), ("seeds=x", "should be int, not str")]:
        for more in ([], ["--dry-run"]):
            code, line = said(["run", mine, word, *more], capsys, monkeypatch)
            assert code == 2 and says in line
    for more in ([], ["--dry-run"]):
        code, line = said(["run", mine, "prune=1.5", *more], capsys, monkeypatch)
        assert (code, line.split(":")[0]) == (2, "prune rate 1.5 is not in (0, 1)")
    code, out, _ = command(["run", mine, "seeds=3", "--dry-run"], capsys, monkeypatch)
    assert not code and "3 runs" in out and [p.name for p in tmp_path.iterdir()] == ["mine.ipynb"]
    code, out, _ = command(["run", mine, "seeds=1", "prune=0.25"], capsys, monkeypatch)
    assert not code and "4,804" in out and "18 rows" in out
    home = tmp_path / "runs" / "mine"
    told = nbformat.read(home / "notebook.ipynb", 4).metadata["rg_tickets"]["parameters"]
    assert told == dict(seeds=1, prune=0.25, folder="runs/mine")
    code, out, _ = command(["status", home], capsys, monkeypatch)
    assert not code and "digits8 imp seed 0  done" in out and "1 run: 1 done" in out
    code, out, _ = command(["show", home], capsys, monkeypatch)
    assert not code and "prune: 0.25" in out and "18 rows" in out


OWN = {
    "no work": ("x = 1", "cannot be planned: it imports none of trajectories"),
    "a mistake": ("from rg_tickets.runs import trajectories\n1 / 0", "ZeroDivisionError"),
    "another language": ("from rg_tickets.runs import trajectories\nx =", "a cell is no Python"),
    "a script": ("%%bash\necho hello", "cannot be planned"),
}


@pytest.mark.parametrize("case", OWN)
def test_a_notebook_that_cannot_be_planned(case, capsys, monkeypatch):
    source, says = OWN[case]
    code, out, lines = command(["run", own(source), "--dry-run"], capsys, monkeypatch)
    assert not code and not lines and says in out


@pytest.mark.parametrize(
    "text, says",
    [
        ("{}", "is no notebook of Jupyter"),
        ("[" * 100_000, "is no notebook of Jupyter"),
        ("\0", "is no notebook of Jupyter"),
        (None, "there is no notebook ./odd.ipynb"),
    ],
    ids=["empty", "deep", "binary", "missing"],
)
def test_a_file_that_is_no_notebook(text, says, capsys, monkeypatch):
    if text is not None:
        Path("odd.ipynb").write_text(text)
    for more in ([], ["--dry-run"]):
        code, line = said(["run", "./odd.ipynb", *more], capsys, monkeypatch)
        assert code == 2 and says in line


def test_parameters_that_are_no_plain_values(capsys, monkeypatch):
    mine = own("x = 1", "import os\nhome = os.getcwd()\n")
    code, line = said(["run", mine], capsys, monkeypatch)
    assert code == 2 and "line 2 of its parameters: parameter home has no plain default" in line


# Logs and Ctrl-C


def stopped(words, folder, mark):
    "(exit status, standard error) of a command that is stopped by Ctrl-C when `mark` is there"
    process = subprocess.Popen(
        [SCRIPT, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"RG_TICKETS_PROGRESS": "on"},
    )
    end = time.monotonic() + 300
    while not list(folder.glob(mark)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, err


def workers_of(folder):
    "Processes whose command line or open notebook names a folder"
    found = []
    for p in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in p.read_bytes():
                found.append(p.parent.name)
    return found


LONG = ["epochs=40", "rounds=12", "jobs=2"]
STUDY = f"""study: mine
steps:
  - name: find
    experiment: resnet_imp
    parameters: {{scale: smoke, epochs: 40, rounds: 12, jobs: 2}}
"""
STOPPED = {
    "run": (["run", "resnet_imp", *LONG, "-f", "f"], "*/rounds.csv"),
    "before the first round": (["run", "resnet_imp", *LONG, "-f", "f"], ".notebook.lock"),
    "demo": (["demo", "-f", "f"], "*/rounds.csv"),
    "study": (["study", "mine.yaml", "-f", "f"], "find/*/rounds.csv"),
}


@posix
@pytest.mark.parametrize(
    "case", [pytest.param(o, marks=[] if o == "run" else slow) for o in STOPPED]
)
def test_ctrl_c_ends_in_one_sentence(case, tmp_path, monkeypatch):
    words, mark = STOPPED[case]
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))  # told by the environment of all workers
    (tmp_path / "tmp").mkdir()
    Path("mine.yaml").write_text(STUDY)
    code, err = stopped(words, tmp_path / "f", mark)
    said = [o for o in err.splitlines() if o.strip()]
    assert code == 130, err
    assert said[-1].startswith("rg-tickets: stopped. Finished rounds are kept"), err
    for line in said[:-1]:  # clean lines of progress, and nothing else
        assert " done" in line or line.startswith("all runs: "), err
    end = time.monotonic() + 10
    while workers_of(tmp_path / "tmp") and time.monotonic() < end:
        time.sleep(0.2)
    assert not workers_of(tmp_path / "tmp")


def test_progress_in_a_log_file(tmp_path):
    "One line for each round, whole"
    words = ["run", "resnet_imp", "jobs=1", "seeds=2", "rounds=2", "controls=imp", "-f", "f"]
    done = subprocess.run(
        [SCRIPT, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"RG_TICKETS_PROGRESS": "on"},
    )
    lines = done.stderr.splitlines()
    rounds = [f"digits8 imp seed {s}: round {n} of 2 done" for s in (0, 1) for n in range(3)]
    assert done.returncode == 0, done.stderr
    assert [o for o in lines if not o.startswith("all runs: ")] == rounds, lines
    assert lines[-1].startswith("all runs: 6 of 6 rounds, ")
    assert "prunes 19,144 of 19,464 matrix weights" in done.stdout
    shown = subprocess.run([SCRIPT, "status", "f"], capture_output=True, text=True)
    assert "2 runs: 2 done" in shown.stdout
    home = next((tmp_path / "f").glob("digits8-imp-seed0-*"))
    shown = subprocess.run([SCRIPT, "show", home], capture_output=True, text=True).stdout
    assert "pruning: prunes 19,144 of 19,464 matrix weights" in shown
    assert json.loads((home / "config.json").read_text())["rounds"] == 2


# What a newcomer asks of a folder


@pytest.fixture
def begin_imp(tmp_path):
    "A folder that was given to `imp` itself"
    x = torch.randn(96, 8, generator=generator(0, "x"))
    y = (x[:, 0] > 0).long()
    task = Task("toy", Resident(x[:64], y[:64], x[64:], y[64:]))
    with seeded(0, "init"):
        network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 2))
    how = dict(prune=0.3, recipe=Recipe(epochs=1), device="cpu", folder=tmp_path / "own")
    return functools.partial(imp, task, network, 2, **how)


def test_a_folder_that_was_given_to_imp(begin_imp, tmp_path, capsys, monkeypatch):
    "Rounds, accuracy and density are shown; also of many in one folder; and how to go on"
    last = list(begin_imp())[-1]
    table = r"(?m)^ *2 +\S+ +0\.4922 +\S+ +" + f"{last.metrics['accuracy']:.4g}"
    code, out, lines = command(["show", "own"], capsys, monkeypatch)
    assert not code and not lines and re.search(table, out), out
    assert "rg-tickets flow own" in out and 'rg_tickets.reports.flow_at("own")' in out
    for folder in ("own", "."):
        code, out, lines = command(["status", folder], capsys, monkeypatch)
        assert not code and not lines and "1 run: 1 done" in out
        assert "round 2 of 2" in out and "density 0.4922" in out and "accuracy" in out
    code, out, _ = command(["collect", "own"], capsys, monkeypatch)
    assert not code and len(out.splitlines()) == 4
    told = flow_at("own").frame  # as `show` says
    assert sorted(set(told.n)) == [0, 1, 2] and told.alive.sum() == 128 + 90 + 63
    assert not command(["flow", "own"], capsys, monkeypatch)[0]


def test_runs_that_stop_early_are_done(begin_imp, capsys, monkeypatch):
    list(begin_imp(min_density=0.8))
    out = command(["status", "own"], capsys, monkeypatch)[1]
    assert "round 1 of 2" in out and "1 run: 1 done" in out


def test_a_run_of_ones_own_that_goes_on(begin_imp, capsys, monkeypatch):
    begun = begin_imp()
    next(begun)
    assert "running" in command(["status", "own"], capsys, monkeypatch)[1]
    begun.close()
    assert "stopped" in command(["status", "own"], capsys, monkeypatch)[1]
    assert "stopped" in command(["show", "own"], capsys, monkeypatch)[1]


def test_a_damaged_ticket_is_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "ticket.safetensors").write_bytes(b"\xff" * 99)
    for verb in ("status", "show", "collect"):
        code, line = said([verb, "own"], capsys, monkeypatch)
        assert code == 2 and "ticket.safetensors" in line


@pytest.mark.parametrize("verb", ["status", "show", "collect"])
def test_a_folder_of_nothing(verb, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("text")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for path, says in {
        "nowhere": "nowhere does not exist: give the folder of a study, an experiment or a run",
        "file": "file is a file: give its folder",
        "runs": "it has no study.json, no plan.json and no ticket.safetensors",
    }.items():
        code, line = said([verb, path], capsys, monkeypatch)
        assert code == 2 and says in line
    (tmp_path / "runs" / "mine" / "plan.json").write_text("[]")
    assert "folders in it that have: mine" in said([verb, "runs"], capsys, monkeypatch)[1]
