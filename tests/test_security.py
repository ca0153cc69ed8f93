"""Files and words of strangers: nothing they hold is run, and nothing is written outside the folder that was asked for.

Tried elsewhere: hand-made pickles and traps inside the runs of other programs (test_archives.py), hostile YAML, folders and links of studies (test_batches.py),
folders of the Hub and the strings on their cards (test_hub.py)."""

import ast, io, json, os, pickle, sys, tarfile, time, types, zipfile
from pathlib import Path
import numpy as np
import pytest
import torch
from test_archives import Trap
from test_files import PROGRAMS as HOSTILE, as_zip
from test_hub import ticket
from rg_tickets import batches, cli, hub, reports
from rg_tickets.archives import read_module, read_run
from rg_tickets.executors import CLUSTER, cluster_file, team
from rg_tickets.models.berts import bert
from rg_tickets.models.pretrained import load_pretrained, read_weights
from rg_tickets.models.resnets import resnet
from rg_tickets.runs import Spec, execute
from rg_tickets.tasks.images import image_task
from rg_tickets.tasks.pieces import tokenizer
from rg_tickets.tickets import Ticket, load_tensors

LIB = Path(cli.__file__).parent
NASTY = """a b; touch SPRUNG; $(touch SPRUNG) # "); open('SPRUNG', 'w') #"""  # for a shell, and for Python
TINY = dict(n_train=64, n_test=50, width=4, rounds=1, recipe=dict(epochs=1))


@pytest.fixture(autouse=True)
def unsprung(tmp_path, monkeypatch):
    "Work in a folder below an empty one; no trap may leave anything in either"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    assert not list(tmp_path.rglob("*SPRUNG")) and [p.name for p in tmp_path.iterdir()] == ["here"]


# What stands in the package

RUNS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "pd.read_pickle",
    "pandas.read_pickle",
    "np.load",
    "numpy.load",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
    "__import__",
    "os.system",
    "os.popen",
    "os.execv",
    "runpy.run_path",
    "zipfile.ZipFile.extractall",
    "shutil.unpack_archive",
    "tarfile.open",
}
KNOWN = {  # what stands there, and why it may
    ("executors", "pickle.loads"): "bytes between a study and the processes that it started",
    ("plans", "exec"): "statements of a notebook that is installed with the package",
}


def risky(path):
    "Calls, base classes and arguments of a module that can run what a file holds"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            yield from (name for o in node.bases if (name := ast.unparse(o)) in RUNS)
        if not isinstance(node, ast.Call):
            continue
        said = {k.arg: ast.unparse(k.value) for k in node.keywords}
        name = ast.unparse(node.func)
        if name in RUNS and not (name == "torch.load" and said.get("weights_only") == "True"):
            yield name
        if name.endswith((".extractall", ".extract")):
            yield name
        for k, v in dict(shell="False", allow_pickle="False", trust_remote_code="False").items():
            if said.get(k, v) != v:
                yield f"{k}={said[k]}"


def test_what_could_run_code_in_the_package_is_known():
    found = {(p.stem, o) for p in LIB.rglob("*.py") for o in risky(p)}
    assert found == set(KNOWN)


def test_the_search_finds(tmp_path):
    (path := tmp_path / "here" / "a.py").write_text(
        "torch.load(f)\nnp.load(f, allow_pickle=True)\nsubprocess.run(x, shell=True)\nclass A(pickle.Unpickler): pass\ntorch.load(f, weights_only=True)\nnet.eval()\nAutoModel.from_pretrained(x, trust_remote_code=True)\n"
    )
    assert sorted(risky(path)) == [
        "allow_pickle=True",
        "np.load",
        "pickle.Unpickler",
        "shell=True",
        "torch.load",
        "trust_remote_code=True",
    ]


# Files that hold a program, in every place where a file is read


def trap():
    return Trap(os.system, "touch SPRUNG")


def as_bytes(write):
    write(f := io.BytesIO())
    return f.getvalue()


def tar(f):
    with tarfile.open(fileobj=f, mode="w") as t:
        info = tarfile.TarInfo("../SPRUNG")
        info.size = 1
        t.addfile(info, io.BytesIO(b"x"))


def slipped(f):
    "A file of torch with a member that wants to lie elsewhere"
    torch.save({"w": torch.zeros(2)}, f)
    with zipfile.ZipFile(f, "a") as z:
        z.writestr("../SPRUNG", "x")
        z.writestr("/SPRUNG", "x")


PROGRAMS = {
    "pickle": lambda f: pickle.dump(trap(), f),
    "torch": lambda f: torch.save({"w": torch.zeros(2), "x": trap()}, f),
    "old torch": lambda f: torch.save(
        {"w": torch.zeros(2), "x": trap()}, f, _use_new_zipfile_serialization=False
    ),
    "npz": lambda f: np.savez(f, w=np.array([trap()], dtype=object)),
    "npy": lambda f: np.save(f, np.array([trap()], dtype=object), allow_pickle=True),
    "tar": tar,
    "zip": slipped,
}


def folder_of(path, *names):
    "A folder with the file under names that a run of another program has"
    for name in names:
        (to := path.parent / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    return path.parent / "run"


READERS = {
    "ticket": Ticket.load,
    "state": lambda p: load_tensors(p, "state"),
    "weights": read_weights,
    "network": lambda p: load_pretrained(resnet("cifar_resnet8", width=4), p),
    "archive": read_module,
    "hub": lambda p: hub.from_pretrained(folder_of(p, hub.FILE)),
    "table": lambda p: reports.flow_at(folder_of(p, "flow.csv") / "flow.csv"),
    "transfers": lambda p: reports.gaps_at(folder_of(p, "gaps.csv") / "gaps.csv"),
    "study": lambda p: batches.read(p),
    "cluster": cluster_file,
    "open_lth": lambda p: list(
        read_run(
            folder_of(
                p,
                "level_0/main/mask.pth",
                "level_0/main/model_ep0_it0.pth",
                "level_0/main/model_ep1_it0.pth",
            )
        ).rounds
    ),
    "pairs": lambda p: list(read_run(folder_of(p, "weights_0.pt", "mask_0.pt"), "pairs").rounds),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_no_reader_runs_a_program(program, ending, unsprung):
    path = unsprung / f"file.{ending}"
    path.write_bytes(as_bytes(PROGRAMS[program]))
    quiet = set()
    for name, read in READERS.items():
        try:
            read(path)
            quiet.add(name)
        except (ValueError, OSError):
            pass
        assert not (unsprung / "SPRUNG").exists() and not (unsprung.parent / "SPRUNG").exists(), (
            name
        )
    assert quiet <= {
        "archive",
        "weights",
        "open_lth",
        "pairs",
    }  # which find the tensors beside the trap, or beside members that nobody unpacks


@pytest.mark.parametrize("program", HOSTILE)
def test_no_reader_believes_a_number(program, unsprung):
    "Files that claim a thousand times what they hold: an error of ours that names the file, at once"
    path = unsprung / "file.pt"
    for zipped in (True, False):
        as_zip(path, HOSTILE[program]) if zipped else path.write_bytes(HOSTILE[program])
        for name in ("ticket", "weights", "archive", "hub"):
            started = time.monotonic()
            with pytest.raises((ValueError, OSError)) as e:
                READERS[name](path)
            assert time.monotonic() - started < 20 and str(unsprung) in str(e.value), name
            assert len(str(e.value)) < 2000


def test_the_programs_would_work(unsprung):
    opened = {
        "pickle": pickle.load,
        "torch": lambda f: torch.load(f, weights_only=False),
        "npz": lambda f: np.load(f, allow_pickle=True)["w"],
        "tar": lambda f: tarfile.open(fileobj=f).extractall(
            "deep/er", **({"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {})
        ),
    }
    Path("deep/er").mkdir(parents=True)
    for name, load in opened.items():
        load(io.BytesIO(as_bytes(PROGRAMS[name])))
        made = Path("deep/SPRUNG" if name == "tar" else "SPRUNG")
        assert made.exists(), name
        made.unlink()


@pytest.mark.parametrize("name", ["ticket", "state", "dense"])
def test_a_run_among_planted_files(name, unsprung):
    "A run that finds a program where its own ticket, state or dense weights should be"
    spec = Spec(**TINY, **(dict(prune_type="pt") if name == "dense" else {}))
    (unsprung / spec.id).mkdir()
    (unsprung / spec.id / f"{name}.safetensors").write_bytes(as_bytes(PROGRAMS["torch"]))
    try:
        execute(spec, unsprung, device="cpu")
    except ValueError as e:
        assert "is not opened" in str(e)


def test_pictures_that_are_pickles(unsprung):
    "torchvision's CIFAR files are pickles: only those that have the published checksum are opened"
    for kind, names in {
        "cifar10": (
            "data_batch_1",
            "data_batch_2",
            "data_batch_3",
            "data_batch_4",
            "data_batch_5",
            "test_batch",
            "batches.meta",
        ),
        "cifar100": ("train", "test", "meta"),
    }.items():
        home = (
            unsprung
            / "data"
            / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[kind]
        )
        home.mkdir(parents=True)
        for o in names:
            (home / o).write_bytes(pickle.dumps(trap()))
        with pytest.raises(OSError):
            image_task(kind, root=str(unsprung / "data"))


def test_a_checkpoint_that_brings_code(unsprung):
    "`auto_map` in config.json and in tokenizer_config.json names classes of a file beside it; pytorch_model.bin is a pickle"
    home, evil = unsprung / "bert", "open('SPRUNG', 'w')\nraise SystemExit('run')\n"
    bert("tiny").bert.config.save_pretrained(home)
    facts = json.loads((home / "config.json").read_text())
    brought = dict(
        auto_map={
            k: f"evil.{k}"
            for k in ("AutoConfig", "AutoModel", "AutoModelForPreTraining", "AutoTokenizer")
        },
        custom_pipelines={"x": {"impl": "evil.P"}},
        architectures=["evil.AutoModel"],
        tokenizer_class="evil.AutoTokenizer",
    )
    for name in ("evil.py", "modeling_bert.py", "setup.py"):
        (home / name).write_text(evil)
    (home / "config.json").write_text(json.dumps(facts | brought))
    (home / "tokenizer_config.json").write_text(json.dumps(brought))
    (home / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])
    )
    (home / "pytorch_model.bin").write_bytes(as_bytes(PROGRAMS["torch"]))
    with pytest.raises(ValueError, match="cannot read a BERT"):
        bert("folder", folder=home)
    from transformers import BertForPreTraining

    BertForPreTraining(bert("tiny").bert.config).save_pretrained(unsprung / "whole")
    (home / "model.safetensors").write_bytes(
        (unsprung / "whole" / "model.safetensors").read_bytes()
    )
    assert bert("folder", folder=home).bert.config.hidden_size == facts["hidden_size"]
    assert tokenizer(home)("a b")["input_ids"] == [2, 5, 6, 3] and "evil" not in sys.modules


def test_a_cluster_file_with_objects(unsprung):
    (unsprung / "c.yaml").write_text(
        "workers: !!python/object/apply:os.system ['touch SPRUNG']\ncores: 1\nmemory: 1GB\n"
    )
    with pytest.raises(ValueError, match="could not determine a constructor"):
        cluster_file("c.yaml")


# Paths

OUT = {"up": "../away", "absolute": "{}/away", "far": "x/../../away", "link": "link"}


@pytest.mark.parametrize("key", ["folder", "id"])
@pytest.mark.parametrize("case", OUT)
def test_the_folder_of_a_study_names_no_place_outside(case, key, unsprung, capsys, monkeypatch):
    "study.json of somebody else: its jobs claim a folder outside, with a run and a table in it"
    study, away = unsprung / "study", unsprung / "away"
    (away / "run").mkdir(parents=True)
    study.mkdir()
    (study / "link").symlink_to(away)
    for name in ("run/rounds.csv", "gaps.csv"):
        (away / name).write_text("secret\n1\n")
    for name, text in {
        "run/config.json": "{}",
        "job.json": '{"state": "done"}',
        "verdict.txt": "secret",
        "error.txt": "secret",
    }.items():
        (away / name).write_text(text)
    job = dict(
        id="a",
        step="a",
        experiment="report",
        parameters={},
        folder="a",
        needs=[],
        after=[],
        grid={},
    ) | {key: OUT[case].format(unsprung)}
    (study / "study.json").write_text(json.dumps(dict(study="study", jobs=[job])))
    before = {p: p.stat().st_mtime_ns for p in away.rglob("*")}
    for words in (
        ["status", study],
        ["show", study / job["id"]],
        ["collect", study],
        ["collect", study, "--table", "gaps"],
    ):
        code, out, err = told(words, capsys, monkeypatch)
        assert "secret" not in out + err, words
        if words[0] == "collect":
            assert code == 2 and len(err.splitlines()) == 1, words
    assert {p: p.stat().st_mtime_ns for p in away.rglob("*")} == before


def test_a_plan_names_no_place_outside(unsprung, capsys, monkeypatch):
    "plan.json of somebody else: ids of runs that lead out are not followed to anything but a note of progress"
    study = batches.study_of(dict(study="study", steps=[dict(name="a", experiment="report")]))
    kept = batches.Kept(unsprung / "study")
    kept.keep(study, study.jobs())
    (kept.folder / "a").mkdir()
    (kept.folder / "a/plan.json").write_text(
        json.dumps([dict(id="../../away", label="x", rounds=3)])
    )
    kept.write(study.jobs()[0], state="running", began=0)
    code, out, err = told(["status", kept.folder], capsys, monkeypatch)
    assert code == 0 and sorted(p.name for p in unsprung.iterdir()) == ["study"]


def test_what_a_ticket_says_of_itself_is_no_path(unsprung):
    "Task, model and names of tensors that look like paths"
    odd = ticket(task="../../SPRUNG", model="/SPRUNG", control="../SPRUNG")
    odd.weights = {f"../../{k}": t for k, t in odd.weights.items()}
    odd.history.died = {f"../../{k}": d for k, d in odd.history.died.items()}
    hub.push_to_hub(odd, unsprung / "give")
    back = hub.from_pretrained(unsprung / "give")
    assert sorted(p.name for p in (unsprung / "give").iterdir()) == [
        "README.md",
        "flow.png",
        "ticket.safetensors",
    ] and set(back.weights) == set(odd.weights)
    reports.flow_report(reports.flow_at(unsprung / "give" / hub.FILE))
    assert [p.name for p in unsprung.iterdir()] == ["give"]


@pytest.mark.parametrize("where", ["../away", "/etc", "a/../../away", "~root", "a:b", "a\0b"])
def test_a_subfolder_of_a_repository_stays_in_it(where, unsprung):
    (unsprung / "give").mkdir()
    if where != "~root":
        with pytest.raises(ValueError, match="leads out"):
            hub.push_to_hub(ticket(), unsprung / "give", where)
    else:
        hub.push_to_hub(ticket(), unsprung / "give", where)
        assert (unsprung / "give" / "~root" / hub.FILE).is_file()


# Words


def told(words, capsys, monkeypatch):
    "(exit status, output, errors) of `rg-tickets words...`, in this process"
    monkeypatch.setattr(sys, "argv", ["rg-tickets", *map(str, words)])
    with pytest.raises(SystemExit) as e:
        cli.main()
    return (e.value.code or 0, *capsys.readouterr())


def test_the_nasty_words_would_work(unsprung):
    os.system(f"echo {NASTY}")
    Path("SPRUNG").unlink()
    exec(f'len("{NASTY}")')
    Path("SPRUNG").unlink()


def test_parameters_reach_neither_a_shell_nor_the_code_of_a_notebook(unsprung, capsys, monkeypatch):
    "A run in a folder, and with a parameter, whose names are programs; papermill writes both into the notebook"
    tiny = "tasks=digits8 controls=imp seeds=2 rounds=2 width=4 n_train=64 epochs=1 device=cpu jobs=1".split()
    code, out, err = told(
        ["run", "resnet_imp", f"data={NASTY}", *tiny, "-f", unsprung / NASTY], capsys, monkeypatch
    )
    assert code == 0 and len(list((unsprung / NASTY).glob("*/ticket.safetensors"))) == 2, err
    assert [p.name for p in unsprung.iterdir()] == [NASTY]
    told(
        ["flow", unsprung / NASTY, "-o", f"{NASTY}.csv", "--plot", f"{NASTY}.png"],
        capsys,
        monkeypatch,
    )
    assert sorted(p.name for p in unsprung.iterdir()) == sorted(
        [NASTY, f"{NASTY}.csv", f"{NASTY}.png"]
    )


@pytest.mark.parametrize(
    "words",
    [
        ["run", "resnet_imp", "prune=__import__('os').system('touch SPRUNG')"],
        ["run", "resnet_imp", f"seeds={NASTY}"],
        ["run", NASTY],
        ["list", NASTY],
        ["study", NASTY],
        ["study", "elastic", "--executor", f"dask://h:1;{NASTY}", "-f", "x"],
        ["study", "elastic", "--executor", f"slurm:{NASTY}", "-f", "x"],
        ["flow", NASTY],
        ["audit", NASTY, "--kind", NASTY],
        ["collect", NASTY],
    ],
    ids=lambda o: " ".join(o)[:30],
)
def test_words_are_not_run(words, capsys, monkeypatch):
    code, out, err = told(words, capsys, monkeypatch)
    assert code == 2 and "Traceback" not in err


def test_a_batch_job_holds_nothing_of_a_study(unsprung, monkeypatch):
    "The script of a batch job is made of the cluster file, whose lines are meant for a shell; what a study says goes to the workers as data"
    given = []

    def cluster(**kwargs):
        given.append(kwargs)
        return types.SimpleNamespace(scale=lambda jobs: None, close=lambda: None)

    def client(*args, **kwargs):
        return types.SimpleNamespace(
            cluster=None,
            close=lambda: None,
            get_executor=lambda **kw: types.SimpleNamespace(shutdown=lambda **k: None),
        )

    monkeypatch.setitem(sys.modules, "dask_jobqueue", types.SimpleNamespace(SLURMCluster=cluster))
    monkeypatch.setitem(sys.modules, "distributed", types.SimpleNamespace(Client=client))
    Path(f"{NASTY}.yaml").write_text(CLUSTER)
    with team(f"slurm:{NASTY}.yaml", 3) as workers:
        assert workers.about == "3 batch jobs of Slurm"
    wanted = cluster_file(f"{NASTY}.yaml")
    wanted.pop("workers")
    assert given == [wanted]
