"What the notebooks `34_archives` and `34a_audit` do not tell: hand-made pickles, odd tensors, formats of old torch, memory, and an audit by brute force"

import collections, os, pickle, sys, zipfile
import pytest, torch
from torch import nn
from torch.nn.utils import prune
from rg_tickets.archives import ArchiveError, read_module, read_run
from rg_tickets.audit import audit, findings, overlap
from rg_tickets.basics import generator
from rg_tickets.files import TorchFile
from rg_tickets.masks import MaskHistory, Schedule, prune as coarse_grain

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
