"What the notebooks `34_archives` and `34a_audit` do not tell: hand-made pickles, odd tensors, formats of old torch, memory, and an audit by brute force"

import collections, math, os, pickle, sys, zipfile
import pytest, torch
from torch import nn
from torch.nn.utils import prune
from rg_tickets.archives import Archive, ArchiveError, read_module, read_run
from rg_tickets.audit import audit, findings, overlap
from rg_tickets.basics import generator
from rg_tickets.files import TorchFile
from rg_tickets.flows import Flow, exponents
from rg_tickets.masks import MaskHistory, Schedule, prune as coarse_grain
from rg_tickets.tickets import Ticket, apply

both = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


class Trap:
    def __init__(self, call, *args):
        self.how = (call, args)

    def __reduce__(self):
        return self.how


class Slots:
    "A trap in the setting of state rather than in a call"

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return (collections.OrderedDict, (), (None, {"items": self.inner}))


def as_zip(path, program):
    "A torch file whose data.pkl is `program`"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", program)
        z.writestr("archive/version", "3\n")
        z.writestr("archive/data/0", bytes(16))


def opened(path):
    try:
        return read_module(path)
    except ArchiveError as e:
        return e


PROGRAMS = {  # written by hand, as no honest pickler would
    "os.system": b"cos\nsystem\n(S'touch SPRUNG'\ntR.",
    "posix.system": b"cposix\nsystem\n(S'touch SPRUNG'\ntR.",
    "eval": b'cbuiltins\neval\n(S\'open("SPRUNG", "w")\'\ntR.',
    "__builtin__": b'c__builtin__\neval\n(S\'open("SPRUNG", "w")\'\ntR.',
    "instance": b"(S'touch SPRUNG'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch SPRUNG'\no.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch SPRUNG\x85R.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x0ctouch SPRUNG\x85R.",
    "below torch": b"ctorch._utils\n__builtins__\n(S'eval'\ntR.",
    "torch.load": b"ctorch\nload\n(S'other.pt'\ntR.",
    "runpy": b'crunpy\n_run_code\n(S\'open("SPRUNG", "w")\'\n}tR.',
    "newobj": b"\x80\x02csubprocess\nPopen\n(S'touch'\nS'SPRUNG'\nl\x85\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "build on ours": b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'f'\ncos\nsystem\ns\x86b(S'touch SPRUNG'\ntR.",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_hand_made_programs_do_nothing(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    as_zip("a.pt", program)
    (tmp_path / "b.pt").write_bytes(program)
    for name in ("a.pt", "b.pt"):
        assert isinstance(opened(name), ArchiveError)
    assert not (tmp_path / "SPRUNG").exists() and not {
        m for m in set(sys.modules) - before if not m.startswith("encodings")
    }  # zipfile needs one of those


def test_the_hand_made_programs_would_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "eval", "instance", "stack global"):
        pickle.loads(PROGRAMS[name])
        assert (tmp_path / "SPRUNG").exists(), name
        (tmp_path / "SPRUNG").unlink()


@both
@pytest.mark.parametrize(
    "call",
    [
        Trap(os.system, "touch SPRUNG"),
        Trap(eval, "open('SPRUNG', 'w')"),
        Trap(os.mkdir, "SPRUNG"),
        Slots(Trap(os.mkdir, "SPRUNG")),
    ],
    ids=["system", "eval", "mkdir", "state"],
)
def test_traps_inside_runs(call, zipped, tmp_path, monkeypatch):
    "A trap beside the weights of every kind of run: the weights are read, and nothing happens"
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Linear(4, 3))
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    net.payload = call
    net[0].payload = [call, {"x": call}]
    save = lambda thing, path: (
        path.parent.mkdir(parents=True, exist_ok=True),
        torch.save(thing, path, _use_new_zipfile_serialization=zipped),
    )
    save(net, tmp_path / "bert/checkpoint-5/model.pt")
    save({"0.weight_mask": net[0].weight_mask}, tmp_path / "bert/checkpoint-5/mask.pt")
    save(
        {"result": call, "state_dict": net.state_dict(), "init_weight": call, "optimizer": [call]},
        tmp_path / "cv/1checkpoint.pth.tar",
    )
    save({"state_dict": net.state_dict(), "callbacks": [call]}, tmp_path / "lightning/epoch=1.ckpt")
    for name in ("bert", "cv", "lightning"):
        ((w, m),) = read_run(tmp_path / name).rounds
        assert torch.equal(w["0.weight"], net[0].weight) and torch.equal(
            m["0.weight"], net[0].weight_mask.bool()
        ), name
    assert not (tmp_path / "SPRUNG").exists()


def test_a_file_leaves_no_mark_on_the_reader(tmp_path):
    "State set on our own functions and classes by one file is not there for the next"
    good = nn.Linear(2, 2)
    torch.save(good, tmp_path / "good.pt")
    for name in ("build on ours", "newobj"):
        as_zip(tmp_path / "bad.pt", PROGRAMS[name])
        opened(tmp_path / "bad.pt")
    as_zip(tmp_path / "bad.pt", b"\x80\x02cos\nsystem\nN}S'__setstate__'\nNs\x86b.")
    opened(tmp_path / "bad.pt")  # an attribute on the stand-in's class
    assert torch.equal(read_module(tmp_path / "good.pt")["weight"], good.weight)


TENSOR = "ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ{}tR"  # storage '0' has 4 floats


@pytest.mark.parametrize(
    "view",
    [
        "I0\n(I100000000\nt(I0\nt",
        "I3\n(I4\nt(I1\nt",
        "I-1\n(I2\nt(I1\nt",
        "I0\n(I2\nt(I-1\nt",
        "I0\n(I-2\nt(I1\nt",
        "I0\n(I2\nt(I9\nt",
        "S'a'\n(I2\nt(I1\nt",
        "N(I2\ntN",
    ],
)
def test_tensors_stay_within_their_storage(view, tmp_path):
    as_zip(tmp_path / "a.pt", f"(S'w'\n{TENSOR.format(view)}d.".encode())
    with pytest.raises(ArchiveError, match="cannot be read"):
        read_module(tmp_path / "a.pt")


def test_the_hand_made_tensor_would_work(tmp_path):
    as_zip(
        tmp_path / "a.pt",
        f"(S'w'\n{TENSOR.format('I0' + chr(10) + '(I2' + chr(10) + 'I2' + chr(10) + 't(I2' + chr(10) + 'I1' + chr(10) + 't')}d.".encode(),
    )
    assert torch.equal(read_module(tmp_path / "a.pt")["w"], torch.zeros(2, 2))


@both
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    ],
)
def test_every_type_and_view_is_read(dtype, zipped, tmp_path):
    base = torch.arange(24).to(dtype)
    tensors = {
        "plain": base,
        "view": base.view(4, 6)[1:3, ::2],
        "turned": base.view(4, 6).T,
        "scalar": base[5],
        "none": base[:0],
        "again": base,
    }
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_module(tmp_path / "a.pt")
    for k, t in tensors.items():
        assert found[k].dtype == dtype and torch.equal(found[k], t), k


def test_modules_that_hold_each_other(tmp_path):
    "Shared and circular modules are read once; a tower of shared ones does not take for ever"
    net = nn.Sequential(nn.Linear(2, 2))
    net._modules["self"] = net
    net._modules["twice"] = net[0]
    torch.save(net, tmp_path / "a.pt")
    assert list(read_module(tmp_path / "a.pt")) == ["0.weight", "0.bias"]
    tower = nn.Linear(1, 1)
    for _ in range(60):
        tower, below = nn.Module(), tower
        tower._modules.update(a=below, b=below)
    torch.save(tower, tmp_path / "b.pt")
    assert len(read_module(tmp_path / "b.pt")) == 2


@both
def test_only_what_is_wanted_is_read(zipped, tmp_path):
    torch.save(
        {
            "state_dict": {"a_orig": torch.ones(4), "a_mask": torch.ones(4)},
            "optimizer": torch.ones(10**6),
        },
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=zipped,
    )
    file, sizes = TorchFile(tmp_path / "a.pt"), []
    inner = file.bytes
    file.bytes = lambda *place: sizes.append(len(raw := inner(*place))) or raw
    file.read(file.content["state_dict"])
    assert sizes == [16, 16]


@both
def test_cut_and_flipped_files(zipped, tmp_path):
    "A damaged file is refused, or the tensors are what they were (zip compares checksums; the old format has none)"
    net = nn.Sequential(nn.Linear(8, 8))
    torch.save(net, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "a.pt").read_bytes()
    for n in torch.randint(0, len(content) - 1, (60,), generator=generator(0, "cut")).tolist():
        (tmp_path / "b.pt").write_bytes(content[:n])
        assert isinstance(opened(tmp_path / "b.pt"), ArchiveError), n
    for n in torch.randint(0, 8 * len(content), (150,), generator=generator(0, "flip")).tolist():
        b = bytearray(content)
        b[n // 8] ^= 1 << n % 8
        (tmp_path / "b.pt").write_bytes(b)
        found = opened(tmp_path / "b.pt")
        if zipped and not isinstance(found, ArchiveError):
            assert all(torch.equal(t, net.state_dict()[k]) for k, t in found.items()), n


def test_elastic_suffixes_and_pretraining(tmp_path):
    for n in range(2):
        at = tmp_path / f"level_{n}/main"
        at.mkdir(parents=True)
        m = {"w": torch.tensor([1, 1, 1, 1 - n], dtype=torch.int32)}
        torch.save(m, at / "mask.pth")
        for e, k in ((2, 218), (10, 0)):
            torch.save(
                {"w": torch.arange(4.0) * m["w"] + e * m["w"]}, at / f"model_ep{e}_it{k}.pth"
            )
            torch.save({"w": torch.zeros(4)}, at / f"model_ep{e}_it{k}_elastic.pth")
    (tmp_path / "level_pretrain").mkdir()
    run = read_run(tmp_path)
    assert [w["w"].tolist() for w, _ in run.rounds] == [
        [10.0, 11.0, 12.0, 13.0],
        [10.0, 11.0, 12.0, 0.0],
    ] and run.start()["w"].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert run.notes == ["levels of a pre-training are left out"] and run.ticket().history.alive(
        1
    ) == {"w": 3}


def test_simclr_takes_the_last_training_too(tmp_path):
    for e in (10, 20):
        torch.save(
            {
                "state_dict": {
                    "module.w_orig": torch.ones(4) * e,
                    "module.w_mask": torch.tensor([1.0, 1.0, 1.0, e == 10]),
                }
            },
            tmp_path / f"model_pruned{e}.pt",
        )
    for e in (1, 20, 30):
        torch.save(
            {
                "state_dict": {
                    "module.w_orig": torch.ones(4) * e,
                    "module.w_mask": torch.tensor([1.0, 1.0, 0.0, 0.0]),
                }
            },
            tmp_path / f"model_{e}.pt",
        )
    run = read_run(tmp_path)
    assert (
        run.n == [1, 2, 3]
        and [int(m["w"].sum()) for _, m in run.rounds] == [4, 3, 2]
        and run.rounds[2][0]["w"].tolist() == [30.0, 30.0, 0.0, 0.0]
    )


def test_a_run_that_ends_with_nothing(tmp_path):
    "BERT-Tickets' last mask prunes everything: the ticket is that of the round before"
    for k, m in ((5, [1.0, 1.0, 0.0]), (10, [0.0, 0.0, 0.0])):
        at = tmp_path / f"checkpoint-{k}"
        at.mkdir()
        net = nn.Linear(3, 1, bias=False)
        if k == 10:
            prune.custom_from_mask(net, "weight", torch.tensor([[1.0, 1.0, 0.0]]))
        torch.save(net, at / "model.pt")
        torch.save({"weight_mask": torch.tensor([m])}, at / "mask.pt")
    ticket = read_run(tmp_path).ticket({"weight": torch.ones(1, 3)})
    assert ticket.history.rounds == 1 and ticket.history.alive() == {"weight": 2}


@pytest.mark.parametrize("trial", range(5))
def test_overlap_by_brute_force(trial):
    g = generator(trial, "test")
    score = torch.rand(200, generator=g)
    gone = torch.rand(200, generator=g) < 0.3
    k = int(gone.sum())
    smallest = set(score.argsort()[:k].tolist())
    assert overlap(score, gone)[0] == pytest.approx(
        len(smallest & set(gone.nonzero().flatten().tolist())) / k
    )


@pytest.mark.parametrize(
    "rule, rate, rounds", [("geometric", 0.2, 12), ("geometric", 0.5, 5), ("arithmetic", 0.1, 9)]
)
def test_our_own_masks_are_always_in_order(rule, rate, rounds):
    "Masks by `20_masks` on moving weights: no complaint, and the schedule is found"
    g = generator(0, "test")
    start = {k: torch.randn(s, generator=g) for k, s in dict(a=(40, 30), b=(600,)).items()}
    schedule = Schedule(rate, rule)
    history, run = MaskHistory.dense(start), []
    for n in range(rounds):
        m = history.mask(n)
        w = {k: (t + torch.randn(t.shape, generator=g)) * m[k] for k, t in start.items()}
        run.append((w, m))
        if n < rounds - 1:
            coarse_grain(history, w, schedule.remove(sum(history.alive().values()), history.total))
    table = audit(run, start)
    assert (
        findings(table) == []
        and table.attrs["schedule"] == str(schedule)
        and set(table.verdict[1:]) == {"count as scheduled; ranked by the trained weights"}
    )


# Which round is which


def a_run(rounds=5, seed=0, shapes=None):
    "Rounds (weights, masks) of a run by magnitude"
    g = generator(seed, "run")
    start = {
        k: torch.randn(s, generator=g) for k, s in (shapes or dict(a=(20, 30), b=(600, 1))).items()
    }
    history, out = MaskHistory.dense(start), []
    for n in range(rounds):
        m = history.mask(n)
        out.append(
            ({k: (t + 0.3 * torch.randn(t.shape, generator=g)) * m[k] for k, t in start.items()}, m)
        )
        if n < rounds - 1:
            alive = sum(history.alive().values())
            coarse_grain(history, out[-1][0], Schedule(0.2).remove(alive, history.total))
    return out


def density(masks):
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def orig_and_mask(weights, masks):
    return {f"{k}_orig": t for k, t in weights.items()} | {
        f"{k}_mask": m.float() for k, m in masks.items()
    }


NAMINGS = {  # round, density -> name of a file
    "percent left": lambda n, d: f"{100 * d:.1f}_model.pth.tar",
    "whole percent": lambda n, d: f"{round(100 * d)}.pth",
    "percent pruned": lambda n, d: f"pruned_{100 - 100 * d:.1f}.pt",
    "words": lambda n, d: f"{'edcba'[n]}.pt",
    "backwards": lambda n, d: f"model_{9 - n}.pt",
    "steps": lambda n, d: f"step_{5000 * n}.pt",
    "rounds": lambda n, d: f"round{n}.pt",
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("layout", ["masks", "zeros", "pairs"])
def test_rounds_are_in_the_order_of_their_densities(layout, naming, tmp_path):
    rounds = a_run()
    for n, (w, m) in enumerate(rounds):
        name = NAMINGS[naming](n, density(m))
        if layout == "pairs" and naming == "words":
            pytest.skip("pairs have numbers")
        if layout == "pairs":
            torch.save(w, tmp_path / f"weights_{name}"), torch.save(m, tmp_path / f"mask_{name}")
        else:
            torch.save(w if layout == "zeros" else orig_and_mask(w, m), tmp_path / name)
    for p in tmp_path.glob("*.tar"):
        p.rename(p.with_suffix(".pt"))
    run = read_run(tmp_path)
    assert run.n == [0, 1, 2, 3, 4]
    for (w, m), (w2, m2) in zip(rounds, run.rounds):
        assert all(torch.equal(m2[k], m[k]) and torch.equal(w2[k], w[k]) for k in m)
    densities = run.flow().frame.groupby("n").density.first()
    assert densities.is_monotonic_decreasing and densities[0] == 1
    moved = naming in ("percent left", "whole percent", "words", "backwards")
    assert any("not of their names" in o for o in run.notes) == moved, run.notes


def test_names_that_contradict_one_density_are_told(tmp_path):
    "Numbered pairs with one mask in the wrong place stay in the order of their numbers"
    rounds = a_run()
    for n, (w, m) in enumerate(rounds):
        torch.save(w, tmp_path / f"weights_{n}.pt")
        torch.save(rounds[1][1] if n == 3 else m, tmp_path / f"mask_{n}.pt")
    run = read_run(tmp_path)
    assert run.n == [0, 1, 2, 3, 4] and any(
        "contradict each other" in o or "contradict" in o for o in run.notes
    )
    assert any("NOT NESTED" in o for o in findings(audit(run)))
    with pytest.raises(ArchiveError, match="`audit` tells more"):
        run.ticket(rounds[0][0])


def test_the_first_round_decides_what_is_round_0(tmp_path):
    for first, n, said in ((1, [0, 1, 2], True), (0, [0, 1, 2], False)):
        at = tmp_path / str(n[0]) / str(first)
        at.mkdir(parents=True)
        for i, (w, m) in enumerate(a_run(3), first):
            torch.save(w, at / f"weights_{i}.pt"), torch.save(m, at / f"mask_{i}.pt")
        run = read_run(at)
        assert run.n == n and any("it is round 0" in o for o in run.notes) == said
    at = tmp_path / "pruned"
    at.mkdir()
    for i, (w, m) in enumerate(a_run(4)[1:]):
        torch.save(w, at / f"weights_{i}.pt"), torch.save(m, at / f"mask_{i}.pt")
    assert read_run(at).n == [1, 2, 3]  # begins pruned: it has no round 0


# Seeds


def one_shot(seed, share=0.3):
    "A network pruned once, of its own initialisation"
    w = {
        k: torch.randn(s, generator=generator(seed, k))
        for k, s in dict(a=(20, 30), b=(600, 1)).items()
    }
    edge = torch.cat([t.abs().flatten() for t in w.values()]).quantile(share)
    return {k: t * (t.abs() > edge) for k, t in w.items()}, {
        k: t.abs() > edge for k, t in w.items()
    }


def test_seeds_are_not_rounds(tmp_path):
    dense = lambda seed: a_run(1, seed)[0]
    for i in range(3):
        for name, make in dict(pruned=one_shot, dense=dense).items():
            at = tmp_path / name / str(i)
            at.mkdir(parents=True)
            w, m = make(i)
            torch.save(w, at / "weights.pt"), torch.save(m, at / "mask.pt")
        at = tmp_path / "runs" / str(i)
        at.mkdir(parents=True)
        for n, (w, m) in enumerate(a_run(4, i)):
            torch.save(w, at / f"weights_{n}.pt"), torch.save(m, at / f"mask_{n}.pt")
        (tmp_path / "flat").mkdir(exist_ok=True)
        torch.save(orig_and_mask(*one_shot(i)), tmp_path / f"flat/seed{i}.pt")
        (tmp_path / "zeros").mkdir(exist_ok=True)
        torch.save(one_shot(i)[0], tmp_path / f"zeros/{i}.pth")
        (tmp_path / "both").mkdir(exist_ok=True)
        for n, (w, m) in enumerate(a_run(3, i)):
            torch.save(orig_and_mask(w, m), tmp_path / f"both/seed{i}_round{n}.pt")
    says = dict(
        pruned="neither mask was made from the other",
        dense="all 3 masks of .* are the same",
        runs="holds several runs, 0, 1, 2",
        flat="neither mask was made from the other",
        both="neither mask was made from the other",
        zeros="neither was made from the other",
    )
    for name, text in says.items():
        with pytest.raises(ArchiveError, match=text) as e:
            read_run(tmp_path / name)
        assert "Flow.join" in str(e.value) and "rg-tickets compare" in str(e.value)
    flows = [read_run(tmp_path / f"runs/{i}").flow(seed=i) for i in range(3)]
    e = exponents(Flow.join(*flows), by="tensor", window="all")
    assert (e.seeds == 3).all() and e[["sigma", "low", "high"]].notna().all(axis=None)


def test_seeds_of_other_layouts_are_named(tmp_path):
    for i in range(2):
        folder = tmp_path / f"bert/{i}/checkpoint-5"
        folder.mkdir(parents=True)
        net = nn.Sequential(nn.Linear(3, 2))
        (
            torch.save(net, folder / "model.pt"),
            torch.save({"0.weight_mask": torch.eye(3)[:2]}, folder / "mask.pt"),
        )
        level = tmp_path / f"lth/replicate_{i}/level_0/main"
        level.mkdir(parents=True)
    with pytest.raises(ArchiveError, match="holds several runs, 0, 1"):
        read_run(tmp_path / "bert")
    with pytest.raises(ArchiveError, match="holds 2 runs: name one of replicate_0, replicate_1"):
        read_run(tmp_path / "lth")


# Masks and tensors


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.bool,
    ],
)
def test_masks_of_any_type_mask(dtype, tmp_path):
    rounds = a_run(3)
    asked = Archive(
        "mine", [(w, {k: o.to(dtype) for k, o in m.items()}) for w, m in rounds], [0, 1, 2]
    )
    plain = Archive("mine", rounds, [0, 1, 2])
    assert asked.measured() == plain.measured()
    assert audit(asked).verdict.tolist() == audit(plain).verdict.tolist()
    assert audit(asked.rounds).verdict.tolist() == audit(rounds).verdict.tolist()
    bad = {k: o.to(dtype) * (1 if dtype == torch.bool else 2) for k, o in rounds[1][1].items()}
    if dtype != torch.bool:
        with pytest.raises(ArchiveError, match="round 1 of this run: the mask of a, b holds other"):
            Archive("mine", [rounds[0], (rounds[1][0], bad)], [0, 1]).measured()


class Twice(nn.Module):
    "A tied matrix, and a layer in two places"

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 20)
        self.other = nn.Linear(20, 20, bias=False)
        self.other.weight = self.first.weight
        self.layer = nn.Linear(16, 2)
        self.again = self.layer


def twice(kind, seed=0):
    "(network, weights, masks) pruned once"
    torch.manual_seed(seed)
    net = Twice()
    masks = {
        k: (net.get_parameter(k).abs() > 0.05).detach() for k in ("first.weight", "layer.weight")
    }
    return net, masks


@pytest.mark.parametrize(
    "alias", [(), ("other.weight", "again.weight")], ids=["first", "all names"]
)
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("whole", [True, False], ids=["module", "state_dict"])
def test_a_tensor_with_two_names_is_counted_once(whole, wrapper, alias, tmp_path):
    net, masks = twice(0)
    with torch.no_grad():
        for k, m in masks.items():
            net.get_parameter(k).mul_(m)
    first = dict(zip(("other.weight", "again.weight"), masks))
    all_masks = masks | {k: masks[first[k]] for k in alias}
    dense = {k: torch.ones_like(m) for k, m in all_masks.items()}
    for n, m in enumerate((dense, all_masks)):
        thing = {f"{wrapper}{k}": t for k, t in net.state_dict().items()}
        torch.save(net if whole else thing, tmp_path / f"weights_{n}.pt")
        torch.save(
            {f"{'' if whole else wrapper}{k}": o.int() for k, o in m.items()},
            tmp_path / f"mask_{n}.pt",
        )
    run = read_run(tmp_path)
    for _, m in run.rounds:
        assert list(m) == ["first.weight", "layer.weight"]
    facts = run.measured()
    assert sum(t["count"] for t in facts[0]["tensors"]) == 432
    assert findings(audit(run)) == []
    ticket = run.ticket(
        {k: t.clone() for k, t in net.state_dict().items()}
        | {
            "other.weight": net.first.weight.detach(),
            "first.weight": net.first.weight.detach(),
            "again.weight": net.layer.weight.detach(),
            "layer.weight": net.layer.weight.detach(),
            "again.bias": net.layer.bias.detach(),
            "layer.bias": net.layer.bias.detach(),
        }
    )
    assert ticket.about["tied"]["other.weight"] == "first.weight"
    ticket.save(tmp_path / "t.safetensors")
    fresh = Twice()
    apply(Ticket.load(tmp_path / "t.safetensors"), fresh)
    assert torch.equal(fresh.other.weight == 0, ~masks["first.weight"])


def test_two_masks_for_one_tensor_are_refused(tmp_path):
    net, masks = twice(0)
    torch.save(net.state_dict(), tmp_path / "weights_0.pt")
    torch.save(masks | {"other.weight": ~masks["first.weight"]}, tmp_path / "mask_0.pt")
    with pytest.raises(
        ArchiveError, match="first.weight and other.weight are one tensor, and there are two"
    ):
        read_run(tmp_path).measured()


def test_strange_buffers_are_passed_over(tmp_path):
    "Complex, eight-bit, quantised and sparse buffers beside the weights"
    rounds = a_run(3)
    strange = {
        "freqs": torch.ones(3, dtype=torch.complex64),
        "scale": torch.ones(3).to(torch.float8_e4m3fn),
        "sparse": torch.ones(3).to_sparse(),
        "meta": torch.ones(3, device="meta"),
    }
    for n, (w, m) in enumerate(rounds):
        torch.save({"net": orig_and_mask(w, m) | strange, "epoch": n}, tmp_path / f"{n}.pt")
    for (_, m), (_, m2) in zip(rounds, read_run(tmp_path).rounds):
        assert all(torch.equal(m[k], m2[k]) for k in m)
    torch.save(
        {"a_orig": torch.ones(2, 2).to_sparse(), "a_mask": torch.ones(2, 2)}, tmp_path / "0.pt"
    )
    with pytest.raises(ArchiveError, match="0.pt: a_orig cannot be read, it is sparse"):
        list(read_run(tmp_path).rounds)


def test_other_files_in_the_folder_are_left_out(tmp_path):
    rounds = a_run(3)
    for n, (w, m) in enumerate(rounds):
        torch.save(orig_and_mask(w, m), tmp_path / f"{n}.pt")
    net = nn.Linear(2, 2)
    torch.save(torch.optim.Adam(net.parameters()).state_dict(), tmp_path / "optimizer.pt")
    torch.save(torch.get_rng_state(), tmp_path / "rng_state.pth")
    run = read_run(tmp_path)
    assert len(run.rounds) == 3 and any(
        "left out: optimizer.pt, rng_state.pth" in o for o in run.notes
    )
    for p in tmp_path.glob("[0-9].pt"):
        torch.save(rounds[int(p.stem)][0], p)
    run = read_run(tmp_path)
    assert len(run.rounds) == 3 and any(
        "left out: optimizer.pt, rng_state.pth" in o for o in run.notes
    )


def test_an_embedding_with_a_row_of_zeros_was_not_pruned(tmp_path):
    padding = torch.randn(9, 4)
    padding[0] = 0
    for n, (w, m) in enumerate(a_run(3)):
        torch.save(w | {"embed.weight": padding + 0.1 * n * (padding != 0)}, tmp_path / f"{n}.pt")
    run = read_run(tmp_path)
    assert run.n == [0, 1, 2] and all(list(m) == ["a", "b"] for _, m in run.rounds)


# Hostile and odd files


def level(root, n, masks=None, weights=None):
    at = root / f"level_{n}/main"
    at.mkdir(parents=True)
    masks = {"w": torch.ones(4, dtype=torch.int32)} if masks is None else masks
    torch.save(masks, at / "mask.pth")
    for e in (0, 9):
        torch.save(
            {"w": torch.arange(4.0)} if weights is None else weights, at / f"model_ep{e}_it0.pth"
        )
    return at


@pytest.mark.parametrize("number", ["300000000", "999999999999", "9" * 13, "9" * 200])
def test_levels_far_apart_are_refused_at_once(number, tmp_path, ends):
    level(tmp_path, 0), level(tmp_path, number)
    with ends(), pytest.raises(ArchiveError, match=str(tmp_path)) as e:
        read_run(tmp_path)
    assert len(str(e.value)) < 1000
    assert "level_1, level_2, level_3" in str(e.value) or "no round reaches" in str(e.value)


@pytest.mark.parametrize("layout", ["checkpoint-{}", "{}checkpoint.pth.tar", "weights_{}.pt"])
def test_numbers_of_other_layouts_far_apart(layout, tmp_path, ends):
    for n in (0, 10**11, "9" * 60):
        p = tmp_path / layout.format(n)
        p.mkdir() if layout == "checkpoint-{}" else torch.save({"w": torch.ones(2, 2)}, p)
        torch.save({"w": torch.ones(2, 2)}, tmp_path / f"mask_{n}.pt")
    with ends(), pytest.raises(ArchiveError):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "logger",
    [
        b"test_accuracy,50,high\n",
        b"test_loss,50,\n",
        b"\xff\xfe\x00",
        b"test_accuracy,1," + b"9" * 5000 + b"x",
    ],
)
def test_an_odd_logger_is_named(logger, tmp_path):
    (level(tmp_path, 0) / "logger").write_bytes(logger)
    with pytest.raises(ArchiveError, match="logger"):
        read_run(tmp_path).measured()


def test_loggers_that_are_only_unusual(tmp_path):
    at = level(tmp_path, 0)
    (at / "logger").write_text(
        "train_loss,1,oops\nno commas\n\ntest_accuracy,5,0.5\ntest_accuracy,9,0.75\n"
    )
    assert read_run(tmp_path).measured()[0]["metrics"]["accuracy"] == 0.75
    (at / "logger").write_text("")
    assert math.isnan(read_run(tmp_path).measured()[0]["metrics"]["accuracy"])


@pytest.mark.parametrize(
    "text",
    [
        "* pruning_fraction => 1e400",
        " * pruning_fraction => 7\n",
        "* " * 10**5,
        "\x00",
        "\n" * 10**6,
    ],
    ids=["huge", "seven", "stars", "nul", "lines"],
)
def test_odd_hparams_claim_nothing(text, tmp_path):
    (level(tmp_path, 0) / "hparams.log").write_text(text)
    assert read_run(tmp_path).claims == {}


def test_pipes_and_links_in_a_folder(tmp_path):
    "A FIFO is no file of weights, and is not waited for"
    for n, (w, m) in enumerate(a_run(2)):
        torch.save(w, tmp_path / f"weights_{n}.pt"), torch.save(m, tmp_path / f"mask_{n}.pt")
    os.mkfifo(tmp_path / "weights_2.pt"), os.mkfifo(tmp_path / "2checkpoint.pth.tar")
    with pytest.raises((ArchiveError, FileNotFoundError)):
        read_run(tmp_path, "cv_lth")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(read_run(tmp_path, "pairs").rounds) == 2


def test_seeds_of_different_densities_are_no_rounds(tmp_path):
    "Three networks pruned once, by 20, 40 and 60 percent"
    for i, share in enumerate((0.2, 0.4, 0.6)):
        (tmp_path / str(i)).mkdir()
        w, m = one_shot(i, share)
        torch.save(w, tmp_path / f"{i}/weights.pt"), torch.save(m, tmp_path / f"{i}/mask.pt")
    with pytest.raises(ArchiveError, match="neither mask was made from the other"):
        read_run(tmp_path)


def test_a_run_that_regrows_a_little_is_read_and_audited(tmp_path):
    "What is not nested is the audit's to tell"
    rounds = a_run()
    rounds[3][1]["a"].view(-1)[(~rounds[2][1]["a"]).view(-1).nonzero()[:3]] = True
    for n, (w, m) in enumerate(rounds):
        torch.save(w, tmp_path / f"weights_{n}.pt"), torch.save(m, tmp_path / f"mask_{n}.pt")
    assert any("NOT NESTED: 3 weights" in o for o in findings(audit(read_run(tmp_path))))
