"Files of torch.save read without being obeyed: what is found, and what hostile files cost"

import io, os, pickle, struct, subprocess, sys, zipfile
import pytest, torch
from torch import nn
from rg_tickets.files import (
    FileError,
    Pickle,
    TorchFile,
    find_tensors,
    read_safetensors,
    read_text,
    tensor_at,
)

both = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
TENSOR = (
    "ctorch._utils\n_rebuild_tensor_v2\n"
    "((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ{}tR"
)


def as_zip(path, program, storages={"0": bytes(16)}):
    "A torch file whose data.pkl is `program`"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", program)
        for key, raw in storages.items():
            z.writestr(f"archive/data/{key}", raw)
    return path


def read(path):
    "All tensors of a file"
    file = TorchFile(path)
    return file.read(find_tensors(file.content)[0])


def saved(thing, path, zipped=True):
    torch.save(thing, path, _use_new_zipfile_serialization=zipped)
    return path


@both
@pytest.mark.parametrize(
    "key", ["net", "model", "module", "network", "ema", "model_state", "weights"]
)
def test_the_usual_containers(key, zipped, tmp_path):
    net = nn.Linear(3, 2)
    for held in (net.state_dict(), net):
        path = saved({"epoch": 3, key: held, "optimizer": {"state": {}}}, tmp_path / "a.pt", zipped)
        assert all(torch.equal(t, net.state_dict()[k]) for k, t in read(path).items())


def test_containers_within_containers_and_the_first_of_two(tmp_path):
    a, b = nn.Linear(3, 2).state_dict(), nn.Linear(3, 2).state_dict()
    for held in (
        {"checkpoint": {"run": {"model": a}}},
        {"model": a, "ema": b},
        {"state_dict": a, "init_weight": b, "mask": None},
        {"loss": torch.tensor(0.5), "student": a},
        {"model": {"name": "linear"}, "net": a},
        {"model": a, "teacher": b},
    ):
        found = read(saved(held, tmp_path / "a.pt"))
        assert torch.equal(found["weight"], a["weight"]), held.keys()
    with pytest.raises(FileError, match="several sets of tensors, under 'one', 'two'"):
        find_tensors(TorchFile(saved({"one": a, "two": b}, tmp_path / "a.pt")).content)
    content = TorchFile(tmp_path / "a.pt").content
    assert list(find_tensors(content, inside="two")[0]) == ["weight", "bias"]


@both
def test_strange_tensors_do_not_stand_in_the_way(zipped, tmp_path):
    net = nn.Linear(2, 2)
    net.register_buffer("z", torch.ones(2, dtype=torch.complex64))
    net.register_buffer("f8", torch.ones(2).to(torch.float8_e5m2))
    net.register_buffer("s", torch.ones(2).to_sparse())
    net.register_buffer("m", torch.ones(2, device="meta"))
    for thing in (net, net.state_dict()):
        file = TorchFile(saved(thing, tmp_path / "a.pt", zipped))
        named = find_tensors(file.content)[0]
        odd = {k for k, t in named.items() if t.odd}
        assert odd == {"s", "m"}
        found = file.read({k: t for k, t in named.items() if k not in odd})
        assert torch.equal(found["weight"], net.weight) and torch.equal(found["z"], net.z)
        assert torch.equal(found["f8"].float(), net.f8.float())
        with pytest.raises(FileError, match="s cannot be read, it is sparse"):
            file.read({"s": named["s"]})


@both
def test_ties_are_kept(zipped, tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    net[1].weight = net[0].weight
    net.append(net[2])
    found = read(saved(net.state_dict(), tmp_path / "a.pt", zipped))
    assert found["0.weight"].data_ptr() == found["1.weight"].data_ptr()
    assert found["2.0.weight"].data_ptr() == found["3.0.weight"].data_ptr()
    named, holder = find_tensors(TorchFile(saved(net, tmp_path / "a.pt", zipped)).content)
    assert (
        "3.0.weight" not in named and tensor_at(holder, "3.0.weight").key == named["2.0.weight"].key
    )
    for name in ("3.0.nothing", "9.weight", "", "....", "0", "weight"):
        assert tensor_at(holder, name) is None


def test_expanded_tensors_are_read(tmp_path):
    mask = torch.ones(1).expand(1000)
    assert torch.equal(read(saved({"m": mask}, tmp_path / "a.pt"))["m"], mask)


def test_bools_are_zeros_and_ones(tmp_path):
    "A byte of 2 in a mask is a one, and counts once"
    view = TENSOR.format("I0\n(I4\nt(I1\nt").replace("FloatStorage", "BoolStorage")
    path = as_zip(tmp_path / "a.pt", f"(S'm'\n{view}d.".encode(), {"0": bytes([2, 255, 0, 1])})
    assert read(path)["m"].sum() == 3


PROGRAMS = {  # what each costs Python's own machine
    "a memo of 10^9": b"\x80\x02}r\xff\xff\xff\x3f.",
    "a memo beyond": b"}p99999999999999999999\n.",
    "a negative memo": b"}p-1\n.",
    "a doubled key": b"\x80\x02}(K\x01K\x02\x86" + b"2\x86" * 80 + b"K\x03u.",
    "a doubled set": b"\x80\x04\x8f(K\x01K\x02\x86" + b"2\x86" * 80 + b"\x90.",
    "a doubled frozenset": b"\x80\x04(K\x01K\x02\x86" + b"2\x86" * 80 + b"\x91.",
    "a doubled list": b"\x80\x02}X\x01\x00\x00\x00w" + b"]" + b"(2e" * 80 + b"s.",
    "a text of 2^40": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
    "bytes of 2^40": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "a frame of 2^62": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
    "a long of 2^31": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"x.",
    "a number of 100,000 digits": b"I" + b"9" * 100_000 + b"\n.",
    "deep lists": b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuples": b"\x80\x02N" + b"\x85" * 300_000 + b".",
    "no end": b"\x80\x02" + b"N0" * 100_000,
    "an empty stack": b"\x80\x020.",
    "a mark that is not there": b"\x80\x02Nt.",
    "an extension": b"\x80\x02\x82\x01.",
    "a buffer": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_hostile_programs_cost_nothing(program, tmp_path, ends):
    for path in (as_zip(tmp_path / "a.pt", program), tmp_path / "b.pt"):
        if path.name == "b.pt":
            path.write_bytes(program)
        try:
            with ends():
                assert find_tensors(TorchFile(path).content)[0] == {}
        except FileError as e:
            assert str(path) in str(e)


SETTER = """
import resource, sys
from rg_tickets.archives import read_module
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for path in sys.argv[1:]:
    try: read_module(path)
    except ValueError as e: print("refused")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_hostile_programs_fit_into_little_memory(tmp_path):
    "All of them within 256 MiB more than the package takes"
    paths = [as_zip(tmp_path / f"{i}.pt", o) for i, o in enumerate(PROGRAMS.values())]
    done = subprocess.run(
        [sys.executable, "-c", SETTER, *paths], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("refused") == len(PROGRAMS), done.stderr[-2000:]


def test_keys_that_hash_alike_cost_nothing(tmp_path, ends):
    "Whole numbers a multiple of 2^61 - 1 apart have one hash, and a dictionary of them is slow"
    keys = b"".join(pickle.dumps(k * (2**61 - 1), 2)[2:-1] + b"N" for k in range(1, 40_000))
    path = as_zip(tmp_path / "a.pt", b"\x80\x02}(" + keys + b"u.")
    with ends():
        assert find_tensors(TorchFile(path).content)[0] == {}


def test_towers_of_modules(tmp_path):
    "Sixty layers of shared modules have 2^60 names; a name has a bounded length"
    tower = nn.Linear(1, 1)
    for _ in range(60):
        tower, below = nn.Module(), tower
        tower._modules.update(a=below, b=below)
    assert len(read(saved(tower, tmp_path / "a.pt"))) == 2
    long = nn.Module()
    long._modules["x" * 2000] = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="a name of more than"):
        read(saved(long, tmp_path / "a.pt"))


def test_dictionaries_of_dictionaries_are_looked_into_once(tmp_path, ends):
    inner = {f"k{i}": 1 for i in range(10)}
    for _ in range(3):
        inner = {f"k{i}": inner for i in range(3000)}
    path = saved(inner, tmp_path / "a.pt")
    with ends():
        assert find_tensors(TorchFile(path).content)[0] == {}


def test_many_views_of_one_storage_are_bounded(tmp_path):
    one = torch.zeros(200_000)
    views = {f"v{i}": one[i:] for i in range(2000)}
    with pytest.raises(FileError, match="much larger than the file"):
        read(saved(views, tmp_path / "a.pt"))
    assert len(read(saved({"a": one, "b": one, "c": one[5:]}, tmp_path / "b.pt"))) == 3


# Archives that lie


def zipped_bytes(thing=None):
    torch.save(thing or {"w": torch.ones(1000)}, f := io.BytesIO())
    return f.getvalue()


def rewritten(path, change):
    "A zip archive of torch with its members changed: name -> bytes"
    with zipfile.ZipFile(io.BytesIO(zipped_bytes())) as z:
        members = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        change(z, members)
    return path


def test_bombs_and_twins(tmp_path):
    def compressed(z, members):
        for name, raw in members.items():
            z.writestr(name, raw)
        z.writestr("archive/data/9", bytes(10**8), zipfile.ZIP_DEFLATED)

    def twice(z, members):
        for name, raw in members.items():
            z.writestr(name, raw)
        with pytest.warns(UserWarning):
            z.writestr(list(members)[0], b"N.")

    def two_roots(z, members):
        for name, raw in members.items():
            z.writestr(name, raw)
        z.writestr("other/data.pkl", b"N.")

    def comment(z, members):
        for name, raw in members.items():
            z.writestr(name, raw)
        z.comment = b"x" * 100

    for change, says in (
        (compressed, "does not compress"),
        (twice, "two members of the archive have one name"),
        (two_roots, "2 programs"),
        (comment, "comment"),
    ):
        with pytest.raises(FileError, match=says):
            read(rewritten(tmp_path / "a.pt", change))
    assert torch.equal(
        read(rewritten(tmp_path / "a.pt", lambda z, m: [z.writestr(*o) for o in m.items()]))["w"],
        torch.ones(1000),
    )


def test_overlapping_members(tmp_path):
    "A thousand entries of the directory that share the bytes of one member"
    raw = zipped_bytes({"w": torch.ones(10**5)})
    end = raw.rindex(b"PK\5\6")
    if raw[end - 20 : end - 16] == b"PK\6\7":
        raw = raw[: end - 76] + raw[end:]
        end -= 76
    total, size, start = struct.unpack("<HLL", raw[end + 10 : end + 20])
    directory = raw[start : start + size]
    entry_at = directory.rindex(b"PK\1\2")
    clones = b"".join(directory[entry_at:].replace(b"archive", b"%07d" % i, 1) for i in range(1000))
    forged = raw[:start] + directory + clones
    tail = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, total + 1000, total + 1000, size + len(clones), start, 0
    )
    (tmp_path / "a.pt").write_bytes(forged + tail)
    with pytest.raises(FileError, match="overlap|same offset|Overlapped|cannot be read"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("trial", range(3))
def test_any_byte_may_be_wrong(trial, tmp_path):
    "A flipped bit or a cut is refused, or harms nothing; no other error, no delay"
    g = torch.Generator().manual_seed(trial)
    thing = {"state_dict": nn.Linear(9, 9).state_dict(), "epoch": 3}
    for zipped in (True, False):
        whole = saved(thing, tmp_path / "a.pt", zipped).read_bytes()
        for _ in range(60):
            b = bytearray(whole)
            for at in torch.randint(0, len(b), (3,), generator=g).tolist():
                b[at] = int(torch.randint(0, 256, (1,), generator=g))
            (tmp_path / "b.pt").write_bytes(
                b[: int(torch.randint(1, len(b) + 1, (1,), generator=g))]
            )
            try:
                read(tmp_path / "b.pt")
            except FileError:
                pass
            (tmp_path / "b.pt").write_bytes(b)
            try:
                read(tmp_path / "b.pt")
            except FileError:
                pass


def test_old_files_that_claim_large_storages(tmp_path):
    whole = saved({"w": torch.ones(4)}, tmp_path / "a.pt", False).read_bytes()
    at = len(whole) - 16 - 8
    (tmp_path / "a.pt").write_bytes(whole[:at] + (2**50).to_bytes(8, "little") + whole[at + 8 :])
    with pytest.raises(FileError, match="in the middle of a tensor"):
        read(tmp_path / "a.pt")


# Other files


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}"[:1],
        (2**40).to_bytes(8, "little") + b"{}",
        (2**63 + 5).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (20).to_bytes(8, "little") + b'{"w":{"dtype":"F32"}',
        (50_000).to_bytes(8, "little") + b'{"a":' * 10_000,
    ],
)
def test_safetensors_that_claim_too_much(header, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(header)
    with pytest.raises(FileError, match="a.safetensors cannot be read as a safetensors file"):
        read_safetensors(tmp_path / "a.safetensors")


def test_texts(tmp_path):
    (tmp_path / "a").write_text("ä, 1")
    assert read_text(tmp_path / "a") == "ä, 1"
    with pytest.raises(FileError, match="a has more than 2 bytes"):
        read_text(tmp_path / "a", most=2)


def test_nothing_is_imported(tmp_path):
    "The names of classes are text"
    before = set(sys.modules)
    machine = Pickle()
    machine.run(io.BytesIO(b"ctabnanny\ncheck\n(S'x'\ntR."))
    assert list(machine.asked) == ["tabnanny.check"] and "tabnanny" not in set(sys.modules) - before
