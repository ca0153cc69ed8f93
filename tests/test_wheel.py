"What a user gets: sdist and wheel, installed into an empty environment far from this tree, and every verb tried there. Needs packages from pip's index, some minutes and 3 GB"

import json, os, re, signal, subprocess, sys, tarfile, time, venv, zipfile
import nbformat
import pandas as pd
import pytest
from test_repository import EXPERIMENTS, LIB, MODULES, ROOT, call, tracked

pytestmark = pytest.mark.slow
CLEAN = {
    k: v
    for k, v in os.environ.items()
    if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "JUPYTER_PATH")
}
NAMES = [p.stem for p in EXPERIMENTS]
STUDIES = sorted(p.stem for p in (ROOT / "nbs" / "experiments").glob("*.yaml"))
TINY = dict(seeds=2, rounds=2, width=4, n_train=64, epochs=1, device="cpu", jobs=1)
WORDS = [f"{k}={v}" for k, v in TINY.items()]
STUDY = f"""study: tiny
steps:
  - {{name: find, experiment: resnet_imp, parameters: {json.dumps(TINY | dict(tasks=["digits8"], controls=["imp"]))}}}
  - {{name: move, experiment: resnet_transfer, parameters: {json.dumps(TINY | dict(sources=["digits8"], targets=["digits8/permuted"], controls=[], at=[2]))}, needs: find}}
  - {{name: tell, experiment: report, after: [find, move], folder: .}}
"""


def do(*words, cwd, code=0, **kwargs):
    "(stdout, stderr) of a command in a clean environment"
    done = subprocess.run(
        [str(o) for o in words], cwd=cwd, env=CLEAN, capture_output=True, text=True, **kwargs
    )
    assert done.returncode == code, (
        words,
        done.returncode,
        done.stdout[-2000:],
        done.stderr[-2000:],
    )
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def dists(tmp_path_factory):
    "(sdist, wheel built from it, wheel built from the tree, wheel built from the unpacked sdist)"
    at = tmp_path_factory.mktemp("dists")
    tree = at / "tree"
    if call(
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "-d",
        at / "probe",
        "setuptools",
        cwd=at,
    ).returncode:
        pytest.skip("pip reaches no packages here")
    for p in tracked():
        (tree / p).parent.mkdir(parents=True, exist_ok=True)
        (tree / p).write_bytes((ROOT / p).read_bytes())
    build = lambda where, to, *words: do(
        sys.executable, "-m", "build", *words, "-o", at / to, where, cwd=at
    )
    build(tree, "both")
    build(tree, "direct", "--wheel")
    (sdist,) = (at / "both").glob("*.tar.gz")
    with tarfile.open(sdist) as t:
        t.extractall(
            at / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    build(next((at / "unpacked").iterdir()), "unpacked_built", "--wheel")
    return sdist, *(next((at / o).glob("*.whl")) for o in ("both", "direct", "unpacked_built"))


@pytest.fixture(scope="module")
def site(dists, tmp_path_factory):
    "An environment with the wheel and what it asks for, and nothing else"
    at = tmp_path_factory.mktemp("far")
    began = time.monotonic()
    venv.create(at / "venv", with_pip=True)
    do(at / "venv/bin/python", "-m", "pip", "install", "-q", f"{dists[1]}[embedded]", cwd=at)
    print(f"\ninstalled in {time.monotonic() - began:.0f} s")
    return at / "venv" / "bin"


@pytest.fixture(scope="module")
def home(site, tmp_path_factory):
    "An empty folder to work in, with a run and a study done by the installed command"
    at = tmp_path_factory.mktemp("home")
    (at / "tiny.yaml").write_text(STUDY)
    for words in (
        ["run", "resnet_imp", "--scale", "smoke", "tasks=digits8", *WORDS],
        ["study", "tiny.yaml"],
    ):
        began = time.monotonic()
        out, err = do(site / "rg-tickets", *words, cwd=at)
        (at / f"{words[0]}.txt").write_text(out)
        print(f"\n{words[0]}: {time.monotonic() - began:.0f} s")
        assert "Traceback" not in out + err and "Warning" not in out + err, err
    return at


DRIVE = """import contextlib, io, json, sys
from rg_tickets import cli
said = []
for words in json.load(sys.stdin):
    out, err, sys.argv = io.StringIO(), io.StringIO(), ["rg-tickets", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: cli.main(); code = 0
        except SystemExit as e: code = e.code or 0
    said.append((code, out.getvalue(), err.getvalue()))
json.dump(said, open(sys.argv[0] + ".json", "w"))
"""


def ask(site, at, *commands):
    "(exit status, stdout, stderr) of commands, one after another in one process of the installed package, which saves the time of its start"
    do(
        site / "python",
        "-c",
        DRIVE,
        cwd=at,
        input=json.dumps([[str(o) for o in c] for c in commands]),
    )
    return json.loads((at / "rg-tickets.json").read_text())


def test_sdist_holds_what_a_release_needs(dists):
    with tarfile.open(dists[0]) as t:
        names = {n.partition("/")[2] for n in t.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "CITATION.cff",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "settings.ini",
        "setup.py",
    } <= names
    assert {f"nbs/experiments/{p.name}" for p in EXPERIMENTS} | {
        p.relative_to(ROOT).as_posix() for p in LIB.rglob("*.py")
    } <= names
    assert not [n for n in names if n.startswith(("tests", ".", "nbs/experiments/runs"))]


def test_tree_and_sdist_give_one_wheel(dists):
    def content(path):
        with zipfile.ZipFile(path) as z:
            return {n: z.read(n) for n in z.namelist() if not n.endswith("RECORD")}

    first, *others = map(content, dists[1:])
    for o in others:
        assert sorted(k for k in first | o if first.get(k) != o.get(k)) == []
    assert not [n for n in first if re.search(r"(^|/)(tests?|nbs|runs|\.ci)(/|$)", n)]


def test_an_empty_environment_is_enough(site, tmp_path):
    assert "No broken requirements" in do(site / "python", "-m", "pip", "check", cwd=tmp_path)[0]
    modules = [
        "rg_tickets",
        *("rg_tickets." + ".".join(p.relative_to(LIB).with_suffix("").parts) for p in MODULES),
    ]
    check = f"""import importlib, sys, warnings
warnings.simplefilter("error", SyntaxWarning)
for m in {modules}: assert importlib.import_module(m).__file__.startswith({str(site.parent)!r}), m
assert not [p for p in sys.path if p.startswith({str(ROOT)!r})] and not {{"nbdev", "fastcore", "execnb", "pytest"}} & set(sys.modules)
from rg_tickets import batches, notebooks
assert notebooks.experiments() == {NAMES} and batches.studies() == {STUDIES}
for name in [*notebooks.experiments(), "report"]: assert notebooks.parameters(name)
for name in batches.studies(): assert batches.read(name).jobs()"""
    out, err = do(site / "python", "-c", check, cwd=tmp_path)
    assert not out and not err and not any(tmp_path.iterdir())


VERBS = {
    "list",
    "run",
    "demo",
    "study",
    "status",
    "show",
    "collect",
    "flow",
    "audit",
    "compare",
    "predict",
}  # each is tried below


def test_every_verb_helps(site, tmp_path):
    began = time.monotonic()
    out, _ = do(site / "rg-tickets", "--help", cwd=tmp_path)
    print(f"\nhelp: {time.monotonic() - began:.2f} s")
    assert set(re.findall(r"^  ([a-z]+)  ", out.split("Commands:")[1], re.M)) == VERBS
    for verb in VERBS:
        out, err = do(site / "rg-tickets", verb, "--help", cwd=tmp_path)
        assert out.startswith(f"Usage: rg-tickets {verb}") and not err
    assert do(site / "rg-tickets", "--version", cwd=tmp_path)[0].split() == [
        "rg_tickets",
        re.search(r'"(.+)"', (LIB / "__init__.py").read_text())[1],
    ]


def test_run_and_study_leave_what_they_promise(home):
    assert {"notebook.ipynb", "exponents.csv", "flow.csv", "flow.png", "verdict.txt"} <= {
        p.name for p in (home / "runs/resnet_imp").iterdir()
    }
    assert (
        len(list((home / "runs/resnet_imp").glob("*/ticket.safetensors"))) == 4
        and "What was found" in (home / "run.txt").read_text()
    )
    assert (
        "3 done" in (home / "study.txt").read_text()
        and "move: Of 1 transfers" in (home / "runs/tiny/verdict.txt").read_text()
    )
    nb = nbformat.read(home / "runs/resnet_imp/notebook.ipynb", 4)
    assert nb.metadata["rg_tickets"]["commit"] is None  # no checkout is near
    assert sorted(p.name for p in home.iterdir() if p.suffix != ".txt") == ["runs", "tiny.yaml"]


PAIRS = """import torch
g = torch.Generator().manual_seed(0); m = torch.ones(40, 30, dtype=torch.bool)
for n in range(3):
    w = torch.randn(40, 30, generator=g) * m; torch.save({"body.weight": w}, f"pairs/weights_{n}.pt"); torch.save({"body.weight": m.clone()}, f"pairs/mask_{n}.pt")
    m &= w.abs() > w.abs()[m].sort().values[round(.2 * int(m.sum())) - 1]
"""


def test_questions(site, home):
    folder, table = (
        home / "runs/tiny",
        pd.read_csv(home / "runs/resnet_imp/flow.csv").query("control == 'imp'"),
    )
    for i, name in enumerate("ab"):
        table.assign(
            task=name,
            l1=table.l1
            * (1 + 0.02 * (i + 1) * table.n * (1 + table.seed) * table.tensor.str.len() % 0.7),
        ).to_csv(home / f"{name}.csv", index=False)  # two tasks that are not alike
    (home / "pairs").mkdir()
    do(site / "python", "-c", PAIRS, cwd=home)
    asked = [
        (["list"], "cifar_resnet8"),
        (["list", "resnet_imp"], "seeds : int"),
        (["study", "--list"], "embedded"),
        (["study", "tiny.yaml", "--dry-run"], "3 notebooks"),
        (["study", "elastic", "--dry-run"], "needs imp"),
        (["run", "resnet_imp", "--dry-run", *WORDS, "-o", "plan.csv"], "Nothing was run"),
        (["status", folder], "3 done"),
        (["show", folder / "move"], "state: done"),
        (["show", next(folder.glob("find/*-imp-seed0-*"))], "accuracy"),
        (["collect", folder, "-o", "rounds.csv"], "rows: rounds.csv"),
        (["collect", folder, "--table", "gaps"], "transferred"),
        (["flow", "runs/resnet_imp", "-o", "flow.csv", "--plot", "flow.png"], "relevant"),
        (["audit", "pairs", "-o", "audit.csv", "--plot", "audit.png"], "Nothing was found against"),
        (["compare", "a.csv", "b.csv"], "2 systems"),
        (["predict", "--target", "a.csv", "--candidates", "b.csv"], "b "),
    ]
    for (words, says), (code, out, err) in zip(asked, ask(site, home, *(w for w, _ in asked))):
        assert code == 0 and says in out and not err, (words, code, out, err)
    assert all(
        (home / o).stat().st_size
        for o in ("plan.csv", "rounds.csv", "flow.csv", "flow.png", "audit.csv", "audit.png")
    )
    ((code, out, err),) = ask(site, home, ["audit", "pairs", "--rate", ".5"])
    assert code == 1 and "FEWER REMOVED" in out


MISTAKES = {
    "list resnet_inp": "did you mean 'resnet_imp'?",
    "run resnet_inp": "did you mean 'resnet_imp'?",
    "run resnet_imp sedes=3": "did you mean 'seeds'?",
    "run resnet_imp seeds=many": "should be int",
    "run resnet_imp seeds": "parameter=value",
    "study embeded": "did you mean 'embedded'?",
    "study none.yaml": "cannot read the study none.yaml",
    "study elastic --executor dusk": "did you mean 'dask'?",
    "study elastic --dry-run --executor dusk": "did you mean 'dask'?",
    "status none": "not the folder of a study",
    "show none": "neither a run nor a job",
    "collect none": "not the folder of a study",
    "flow none": "no folder of a run here",
    "audit none": "no folder of a run here",
    "compare none nor": "no folder of a run here",
    "predict --target none --candidates nor": "no folder of a run here",
}


def test_a_mistake_is_one_line_and_exit_status_2(site, tmp_path):
    for words, (code, out, err) in zip(MISTAKES, ask(site, tmp_path, *map(str.split, MISTAKES))):
        assert (
            code == 2
            and not out
            and len(err.splitlines()) == 1
            and err.startswith("rg-tickets: ")
            and MISTAKES[words] in err
            and "Errno" not in err
        ), (words, code, out, err)
    assert [p.name for p in tmp_path.iterdir()] == ["rg-tickets.json"]
    for words in (["rnu"], ["run"], ["run", "resnet_imp", "--sclae", "smoke"], ["predict"]):
        out, err = do(site / "rg-tickets", *words, cwd=tmp_path, code=2)
        assert "Error: " in err and "Traceback" not in err
    out, err = do(
        site / "rg-tickets", "run", "resnet_imp", "scale=smok", "-f", "f", cwd=tmp_path, code=1
    )
    assert "did you mean 'smoke'?" in err.splitlines()[-1] and "Traceback" not in err


def test_plain_papermill(site, tmp_path):
    where, _ = do(
        site / "python",
        "-c",
        "from importlib.resources import files; print(files('rg_tickets.experiments') / 'resnet_imp.ipynb')",
        cwd=tmp_path,
    )
    given = [o for k, v in (TINY | dict(folder="out", scale="smoke")).items() for o in ("-p", k, v)]
    do(site / "papermill", where.strip(), "out.ipynb", *given, "--no-progress-bar", cwd=tmp_path)
    assert (
        len(list((tmp_path / "out").glob("*/ticket.safetensors"))) == 4
        and (tmp_path / "out/verdict.txt").stat().st_size
        and nbformat.read(tmp_path / "out.ipynb", 4).metadata.papermill.exception is None
    )


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_demo_begins_and_is_stopped(site, tmp_path):
    "`.ci/run` runs it to its end; here Ctrl-C comes when the first round is on the disk"
    demo = subprocess.Popen(
        [site / "rg-tickets", "demo", "-j", "1"],
        cwd=tmp_path,
        env=CLEAN,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 600
    while (
        not list(tmp_path.glob("runs/demo/*/ticket.safetensors"))
        and demo.poll() is None
        and time.monotonic() < end
    ):
        time.sleep(0.2)
    assert demo.poll() is None, demo.communicate()
    os.killpg(demo.pid, signal.SIGINT)
    out, err = demo.communicate(timeout=120)
    assert (
        demo.returncode == 130
        and "glyphs" in out
        and "stopped. Finished rounds are kept" in err
        and "Traceback" not in err
    ), err
