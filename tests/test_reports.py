"The verbs flow, audit, compare and predict, on small folders that are made here"

import json
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner
from rg_tickets.basics import generator
from rg_tickets.cli import app
from rg_tickets.hub import push_to_hub
from rg_tickets.masks import MaskHistory, Schedule, prune
from rg_tickets.reports import gaps_at
from rg_tickets.runs import Spec, execute
from rg_tickets.tickets import Ticket

NAMES = ("conv1", "layer1.0.conv1", "layer2.0.conv1")


def say(*words, code=0):
    "What a verb prints, if it ends with `code`"
    done = CliRunner().invoke(app, [str(o) for o in words])
    assert done.exit_code == code and (
        done.exception is None or isinstance(done.exception, SystemExit)
    ), (done.output, done.exception)
    return done.output


def refused(*words):
    "What a verb complains of; always something that `main` prints, in one line"
    done = CliRunner().invoke(app, [str(o) for o in words])
    assert isinstance(done.exception, (ValueError, OSError)), (done.output, done.exception)
    assert "\n" not in str(done.exception)
    return str(done.exception)


def table(task, sigma, seeds=range(3), control="imp", rounds=6):
    "A flow as a table, with exponents `sigma` of the magnitudes"
    rows = []
    for seed in seeds:
        rng, t = (
            np.random.default_rng([seed, *task.encode(), *control.encode()]),
            0.25 * np.arange(rounds),
        )
        for name, s in zip(NAMES, np.array(sigma) + 0.01 * rng.normal(size=3)):
            rows += [
                dict(
                    task=task,
                    model="net",
                    control=control,
                    seed=seed,
                    n=n,
                    t=u,
                    density=np.exp(-u),
                    metric=0.9,
                    loss=0.1,
                    tensor=f"{name}.weight",
                    count=100,
                    alive=50,
                    l1=np.exp(s * u),
                    l2=1.0,
                    largest=1.0,
                    smallest=0.1,
                )
                for n, u in enumerate(t)
            ]
    return pd.DataFrame(rows)


def write_pairs(at, seed=0, rank="trained", rounds=4):
    "Another program's run: (weights, mask) pairs; `initial` ranks by weights that training never touched"
    at.mkdir(parents=True)
    start = {
        f"layer{i}.0.conv1.weight": (4 - i) * torch.randn(8, 8, 3, 3, generator=generator(seed, i))
        for i in (1, 2, 3)
    }
    history = MaskHistory.dense(start)
    for n in range(rounds):
        w = {
            k: t + 0.5 * torch.randn(t.shape, generator=generator(seed, n, k))
            for k, t in start.items()
        }
        mask = history.mask(n)
        torch.save({k: t * mask[k] for k, t in w.items()}, at / f"weights_{n}.pt")
        torch.save(mask, at / f"mask_{n}.pt")
        prune(
            history,
            {k: t * mask[k] for k, t in (w if rank == "trained" else start).items()},
            Schedule(0.2).remove(sum(history.alive().values()), history.total),
        )
    torch.save(start, at.parent / "initial.pth")
    return at


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Flows of three tasks with three seeds each, as a study leaves them: A and B alike, C not"
    at = tmp_path_factory.mktemp("study")
    for task, sigma in dict(A=(0.2, 0.1, -0.1), B=(0.2, 0.1, -0.1), C=(0.2, -0.1, 0.1)).items():
        for seed in range(3):
            (at / f"{task}-{seed}").mkdir()
            table(task, sigma, [seed]).to_csv(at / f"{task}-{seed}/flow.csv", index=False)
    return at


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "A run of ours"
    return execute(
        Spec(width=4, rounds=3, recipe=dict(epochs=1), n_train=128, n_test=64, seed=5),
        tmp_path_factory.mktemp("real"),
        device="cpu",
    )


def test_flow_of_a_run_of_ours(real, tmp_path):
    said = say("flow", real, "-o", tmp_path / "f.csv", "--plot", tmp_path / "f.png")
    assert (
        "1 run of 1 system, rounds 0 to 3" in said
        and "layer3.0" in said
        and "one seed" in said
        and "untrained null" in said
    )
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    again = say("flow", tmp_path / "f.csv")
    assert again.splitlines()[:6] == said.splitlines()[:6]  # what -o writes is read back
    alone = say("flow", real / "ticket.safetensors")
    assert alone.splitlines()[2] == said.splitlines()[2]  # the ticket knows its flow
    Ticket.load(real / "ticket.safetensors").push_to_hub(tmp_path / "shared")
    assert say("flow", tmp_path / "shared").splitlines()[2] == said.splitlines()[2]
    assert pd.read_csv(tmp_path / "f.csv").seed.unique().tolist() == [5]
    assert "stage" not in said and "encoder" not in say("flow", real, "--by", "stage")


def test_flow_of_a_study(study, tmp_path):
    said = say("flow", study, "--plot", tmp_path / "f.pdf", "--window", "matching")
    assert (
        "9 runs of 3 systems" in said
        and "seeds" in said
        and "one seed" not in said
        and (tmp_path / "f.pdf").exists()
    )


def test_flow_of_an_archive(tmp_path):
    at = write_pairs(tmp_path / "theirs")
    said = say(
        "flow", at, "--seed", 3, "--task", "digits", "--model", "cnn", "-o", tmp_path / "f.csv"
    )
    f = pd.read_csv(tmp_path / "f.csv")
    assert (
        f[["task", "model", "seed"]].drop_duplicates().values.tolist() == [["digits", "cnn", 3]]
        and "rounds 0 to 3" in said
    )
    assert "nothing is" not in said and "after=True" in refused(
        "flow", at, "--kind", "cv_lth", "--after"
    )
    late = say("flow", at, "--after")
    assert late.splitlines()[2] != said.splitlines()[2]  # another mask was in force


def test_audit(tmp_path):
    at = write_pairs(tmp_path / "honest")
    said = say(
        "audit",
        at,
        "--initial",
        tmp_path / "initial.pth",
        "--rate",
        0.2,
        "-o",
        tmp_path / "a.csv",
        "--plot",
        tmp_path / "a.png",
    )
    assert (
        "Nothing was found against this run" in said
        and len(pd.read_csv(tmp_path / "a.csv")) == 4
        and (tmp_path / "a.png").exists()
    )
    assert "could not be seen" in say("audit", at) and "guessed" in say("audit", at)
    fake = write_pairs(tmp_path / "fake", rank="initial")
    said = say(
        "audit", fake, "--initial", tmp_path / "initial.pth", "-o", tmp_path / "b.csv", code=1
    )
    assert "one-shot look-alike" in said and "Found:" in said and (tmp_path / "b.csv").exists()
    say("audit", at, "--rate", 0.3, code=1)  # the counts are not those of 30 %


def test_compare(study, tmp_path):
    said = say("compare", study, "-o", tmp_path / "c.csv", "--plot", tmp_path / "c.png")
    assert (
        "C: stands alone" in said
        and "A: cannot be told from B" in said
        and (tmp_path / "c.png").exists()
        and set(pd.read_csv(tmp_path / "c.csv").kind) >= {"errors", "pearson"}
    )
    said = say("compare", study / "A-0", study / "C-0")
    assert "One run of each" in said
    assert "give more seeds" in refused(
        "compare", study / "A-0", study / "C-0", "--plot", tmp_path / "d.png"
    )
    said = say(
        "compare",
        *(f"{name}={study}/{run}" for name, run in zip("XXYY", ("A-0", "A-1", "C-0", "C-1"))),
    )
    assert "X" in said and "standard errors" in said
    said = say("compare", with_null(tmp_path), "--against", "untrained")
    assert "2 systems" in said and "untrained" not in said


def with_null(at):
    "Two tasks and the null of each"
    pd.concat(
        [
            table("A", (0.2, 0.1, -0.1)),
            table("B", (0.2, -0.1, 0.1)),
            *(table(o, (0.1, 0, 0), control="untrained") for o in "AB"),
        ]
    ).to_csv(at / "null.csv", index=False)
    return at / "null.csv"


def test_compare_archives(tmp_path):
    for seed in range(4):
        write_pairs(tmp_path / f"r{seed}", seed)
    said = say(
        "compare", f"a={tmp_path}/r0", f"a={tmp_path}/r1", f"b={tmp_path}/r2", f"b={tmp_path}/r3"
    )
    assert "4 runs of 2 systems" in said and "standard errors" in said
    assert "given twice" in refused(
        "compare", f"a={tmp_path}/r0", f"a={tmp_path}/r0", tmp_path / "r1"
    )
    assert "r0" in say("compare", tmp_path / "r0", tmp_path / "r1")  # called by their folders


def test_predict(study, tmp_path):
    table("mine", (0.2, 0.1, -0.1), range(2), rounds=3).to_csv(
        tmp_path / "mine.csv", index=False
    )  # a short flow
    said = say(
        "predict",
        "--target",
        tmp_path / "mine.csv",
        "--candidates",
        study,
        "-o",
        tmp_path / "p.csv",
        "--plot",
        tmp_path / "p.png",
        "--rounds",
        2,
    )
    p = pd.read_csv(tmp_path / "p.csv")
    assert (
        p.candidate.iloc[-1] == "C"
        and list(p) == ["candidate", "distance"]
        and "no probability" in said
        and (tmp_path / "p.png").exists()
    )
    said = say(
        "predict",
        "--target",
        tmp_path / "mine.csv",
        "--candidates",
        study / "A-0",
        study / "C-0",
        "--candidates",
        study / "A-1",
    )
    assert "A" in said and "C" in said and " B " not in said
    pd.DataFrame(
        [
            dict(
                source=a,
                target=b,
                gap=0.0 if {a, b} == {"A", "B"} else 0.1,
                transferable={a, b} == {"A", "B"},
            )
            for a in "ABC"
            for b in "ABC"
            if a != b
        ]
    ).to_csv(tmp_path / "gaps.csv", index=False)
    said = say(
        "predict",
        "--target",
        tmp_path / "mine.csv",
        "--candidates",
        study,
        "--transfers",
        tmp_path / "gaps.csv",
        "-o",
        tmp_path / "q.csv",
    )
    q = pd.read_csv(tmp_path / "q.csv").set_index("candidate").probability
    assert q["C"] < q["A"] and "6 transfers" in said
    assert "needs the columns" in refused(
        "predict",
        "--target",
        tmp_path / "mine.csv",
        "--candidates",
        study,
        "--transfers",
        tmp_path / "mine.csv",
    )
    assert "holds 3 systems" in refused(
        "predict", "--target", study, "--candidates", tmp_path / "mine.csv"
    )
    assert "needs three rounds" in refused(
        "predict", "--target", tmp_path / "mine.csv", "--candidates", study, "--rounds", 1
    )


@pytest.mark.parametrize(
    "verb",
    [
        ["flow"],
        ["audit"],
        ["compare"],
        ["predict", "--target"],
        ["predict", "--candidates", "x", "--target"],
    ],
)
def test_bad_paths(verb, tmp_path, study, real):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.csv").write_bytes(b"\xff\x00\x01")
    (tmp_path / "some.csv").write_text("a,b\n1,2\n")
    (tmp_path / "cut.safetensors").write_bytes((real / "ticket.safetensors").read_bytes()[:-9])
    rest = ["--candidates", study] if verb == ["predict", "--target"] else []
    for path in ("nowhere", "empty", "junk.csv", "some.csv", "cut.safetensors"):
        assert refused(*verb, tmp_path / path, *rest)


def test_our_own_runs_cannot_be_audited(real, study):
    for path in (real, study, real / "flow.csv", real / "ticket.safetensors"):
        assert "trained weights of each round" in refused("audit", path)


def test_places_that_cannot_be_written(study, tmp_path):
    assert "as .png, .pdf or .svg" in refused("flow", study, "--plot", tmp_path / "f.txt")
    assert "could not write" in refused("flow", study, "-o", "/dev/null/f.csv")
    assert "did you mean 'block'?" in refused(
        "flow", study, "--by", "blok"
    ) and "did you mean 'untrained'?" in refused(
        "compare", with_null(tmp_path), "--against", "untraind"
    )


def test_runs_without_accuracies(tmp_path):
    "Pairs of weights and masks know no accuracy: their tables are read back, and what needs one says so"
    for seed in range(2):
        write_pairs(tmp_path / f"r{seed}", seed)
        say("flow", tmp_path / f"r{seed}", "--task", "ab"[seed], "-o", tmp_path / f"{seed}.csv")
    tables = [tmp_path / "0.csv", tmp_path / "1.csv"]
    assert "rounds 0 to 3" in say("flow", tables[0]) and "systems" in say("compare", *tables)
    pd.concat([pd.read_csv(p).assign(seed=s) for p in tables for s in (0, 1)]).to_csv(
        tmp_path / "all.csv", index=False
    )
    for words in (
        ["compare", tmp_path / "all.csv", "--window", "shared"],
        ["flow", tmp_path / "all.csv", "--window", "matching"],
    ):
        assert "those of the dense network are not known" in refused(*words)
    begun = pd.read_csv(tmp_path / "all.csv").query("n > 0").assign(metric=0.9)
    begun.to_csv(tmp_path / "begun.csv", index=False)
    for verb in (["compare", "--window", "shared"], ["flow", "--window", "matching"]):
        assert "the first round here is 1" in refused(*verb, tmp_path / "begun.csv")


def test_what_an_archive_has_to_say_is_printed(tmp_path):
    at = write_pairs(tmp_path / "theirs")
    names = {p: p.name.replace(p.stem[-1], str(9 - int(p.stem[-1]))) for p in at.iterdir()}
    for p, name in names.items():
        p.rename(at / f"new_{name}")
    for p in at.iterdir():
        p.rename(at / p.name.removeprefix("new_"))
    for verb in ("flow", "audit"):
        assert "Note: rounds are in the order of their densities, not of their names" in say(
            verb, at
        )
    other = write_pairs(tmp_path / "other", seed=1)
    for n, p in enumerate(sorted(other.glob("mask_*"))):
        masks = torch.load(p)
        dense = {"layer9.weight": torch.ones(3, 3, dtype=torch.bool)}
        torch.save(masks | dense, p)
        weights = torch.load(other / f"weights_{n}.pt")
        torch.save(weights | {"layer9.weight": torch.rand(3, 3) / 100}, other / f"weights_{n}.pt")
    assert "Left dense in all rounds, and not ranked: layer9.weight." in say("audit", other)


def test_seeds_in_one_folder_are_refused_in_one_line(tmp_path):
    for seed in range(2):
        write_pairs(tmp_path / f"runs/{seed}", seed)
    for verb in ("flow", "audit", "compare"):
        assert "holds several runs, 0, 1" in refused(verb, tmp_path / "runs")


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no table of transfers"),
        ("source,target,gap\n", "a heading and no rows"),
        ("source,target,gap,transferable\na,b,far,True\n", "line 2: gap is 'far'"),
        ("source,target,gap\na,b,0.1\n", "no column transferable"),
        ("source,target,metric\na,b,0.9\n", "no column model, kind, weights"),
        ("target,gap\nb,0.1\n", "needs the columns source, target"),
    ],
)
def test_odd_tables_of_transfers(text, says, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=says) as e:
        gaps_at(tmp_path / "t.csv")
    assert "t.csv" in str(e.value)
