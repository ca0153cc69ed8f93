"Files that go bad in every way one could think of, and what is made of them"

import io, json, random, tempfile, time
from collections import Counter
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import nn

try:
    import resource
except ImportError:
    resource = None  # on Windows
from rg_tickets.masks import MaskHistory, prune
from rg_tickets.tickets import Ticket, TicketError, digest, load_tensors, save_tensors
from rg_tickets.train import Recipe, optimizer, pack

KINDS = (
    "bit",
    "bits",
    "cut",
    "longer",
    "swap",
    "zeros",
    "garbage",
    "header",
    "empty",
    "huge",
    "dtype",
    "shape",
    "offsets",
    "other",
    "pickle",
    "torch",
)


def sound(kind, seed=0):
    "The bytes of a small ticket, or of a training put aside"
    g = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        if kind == "ticket":
            w = {
                "conv1.weight": torch.randn(4, 1, 3, 3, generator=g),
                "fc.weight": torch.randn(3, 4, generator=g),
                "count": torch.tensor(7),
            }
            history = MaskHistory.dense({"conv1.weight": w["conv1.weight"]})
            prune(history, w, {"conv1.weight": 9})
            Ticket(w, history, [dict(n=0)], dict(task="t", model="m", seed=seed)).save(path)
        else:
            net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
            opt = optimizer(net, Recipe())
            net(torch.randn(5, 4, generator=g)).sum().backward()
            opt.step()
            save_tensors(path, pack(net, opt), dict(n=2, step=16, loss=0.5, run=str(seed)), "state")
        return path.read_bytes()


def _header(whole, draw, kind):
    "The same tensors under a header that says something else about them, well-formed"
    size = int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8 : 8 + size])
    name = draw.choice([k for k in head if k != "__metadata__"])
    said = head[name]
    if kind == "huge":
        said["shape"] = [draw.choice([2**20, 2**40, 2**62])] * draw.randrange(1, 4)
        said["data_offsets"][1] = draw.choice([said["data_offsets"][1], 2**40, 2**62])
    if kind == "dtype":
        said["dtype"] = draw.choice(
            [
                o
                for o in (
                    "F32",
                    "I32",
                    "U32",
                    "F64",
                    "I64",
                    "U8",
                    "I8",
                    "BOOL",
                    "F16",
                    "BF16",
                    "F8_E4M3",
                    "F4",
                    "C64",
                )
                if o != said["dtype"]
            ]
        )
    if kind == "shape":
        said["shape"] = draw.choice(
            [
                o
                for o in ([*said["shape"], 1], said["shape"][::-1], [0], [-1], [], [[2]], "4", None)
                if o != said["shape"]
            ]
        )
    if kind == "offsets":
        said["data_offsets"] = draw.choice(
            [said["data_offsets"][::-1], [0, 4], [-8, 8], [0, len(whole)], [4, 2**64]]
        )
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


def damaged(whole, draw, other=b""):
    "(kind, bytes) of a file that was `whole` before one of many things happened to it; never the file itself. `other`: another file of ours, whose header it may get"
    data, kind = bytearray(whole), draw.choice([k for k in KINDS if other or k != "other"])
    i = draw.randrange(len(data))
    if kind == "bit":
        data[i] ^= 1 << draw.randrange(8)
    if kind == "bits":
        for j in draw.sample(range(len(data)), 20):
            data[j] ^= 1 << draw.randrange(8)
    if kind == "cut":
        del data[i:]
    if kind == "longer":
        data += draw.randbytes(draw.randrange(1, 50))
    if kind == "swap":
        data = data[i:] + data[:i] if i else data + b"x"
    if kind == "zeros":
        data[i : i + 40] = bytes(len(data[i : i + 40])) if any(data[i : i + 40]) else b"x" * 40
    if kind == "garbage":
        data = bytearray(draw.randbytes(draw.randrange(300)))
    if kind == "header":
        data[:8] = draw.choice([0, 7, 2**20, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
    if kind == "empty":
        data.clear()
    if kind in ("huge", "dtype", "shape", "offsets"):
        data = _header(whole, draw, kind)
    if kind == "other":
        j, k = (8 + int.from_bytes(o[:8], "little") for o in (whole, other))
        data = other[:k] + whole[j:]
    if kind == "pickle":
        data = b"\x80\x04" + draw.randbytes(20)
    if kind == "torch":
        torch.save({"weight": torch.ones(2)}, f := io.BytesIO())
        data = f.getvalue()
    return kind, bytes(data)


def read_all(count, seed, spare, pipe):
    "In a process with `spare` bytes of memory left to it: read `count` damaged files; tell outcomes, the slowest, and by how much memory grew"
    draw, seen, slowest, bad = random.Random(seed), Counter(), 0.0, []
    files = {(kind, seed): sound(kind, seed) for kind in ("ticket", "state") for seed in (0, 1)}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for i in range(count):
            what = ("ticket", "state")[i % 2]
            whole = files[what, 0]
            kind, data = damaged(
                whole, draw, draw.choice([o for o in files.values() if o != whole])
            )
            path.write_bytes(data)
            began = time.monotonic()
            try:
                Ticket.load(path) if what == "ticket" else load_tensors(path, "state")
                bad.append(f"file {i}: {what}, {kind}, was read")
            except TicketError as e:
                seen[kind] += 1
                bad += [] if str(path) in str(e) and len(str(e)) < 700 else [f"file {i}: {e}"]
            except BaseException as e:
                bad.append(f"file {i}: {what}, {kind}, {type(e).__name__}: {e}")
            slowest = max(slowest, time.monotonic() - began)
    pipe.send(
        (seen, bad, slowest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    )


def forge(path, tensors=None, text=None, note=None, **facts):
    "Write a small ticket with a valid checksum, other facts or tensors in it, or another text"
    w = {"weights/a": torch.arange(1.0, 7).view(2, 3), "weights/b": torch.zeros(2)}
    tensors = w | {"died/a": torch.tensor([[1, 2, 255]] * 2, dtype=torch.uint8)} | (tensors or {})
    tensors = {k: t for k, t in tensors.items() if t is not None}
    facts = dict(prunings=2, rounds=[], about={}, threshold=0.5) | facts
    text = json.dumps({k: v for k, v in facts.items() if v != "left out"}) if text is None else text
    said = dict(kind="ticket", format=1, sha256=digest(tensors, "ticket" + text), header=text)
    save_file(tensors, path, {"rg_tickets": json.dumps(said) if note is None else note(said)})


def forge_list(path, count, values="F32"):
    "Write a file that lists `count` empty tensors, under a header of ours"
    note = json.dumps(dict(kind="ticket", format=1, sha256="0" * 64, header="{}"))
    entry = f'{{"dtype":"{values}","shape":[0],"data_offsets":[0,0]}}'
    listed = ",".join(f'"weights/{i}":{entry}' for i in range(count))
    head = f'{{"__metadata__":{{"rg_tickets":{json.dumps(note)}}},{listed}}}'.encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head)


def forge_header(path, head, size=None):
    "Write a file with this header, of the length that it says"
    path.write_bytes((len(head) if size is None else size).to_bytes(8, "little") + head)


DEEP, ONE = "[" * 10**5, torch.ones(2, 3)
LATE = torch.tensor([[1, 2, 7]] * 2, dtype=torch.uint8)
FORGED = {  # what is wrong -> (what `forge` is told, what the error says)
    "about is null": (dict(about=None), "`about` is None, not an object"),
    "about is a list": (dict(about=[1]), "`about` is .1., not an object"),
    "about is a text": (dict(about="m"), "`about` is m, not an object"),
    "facts nested 100,000 deep": (dict(text='{"about": ' + DEEP + "}"), "nested too deeply"),
    "facts that are not JSON": (dict(text="about"), "the facts in .* cannot be read"),
    "facts that are a list": (dict(text="[]"), "it is no object"),
    "facts that are null": (dict(text="null"), "it is no object"),
    "a number of 5,000 digits": (dict(text='{"prunings": ' + "1" * 5000 + "}"), "cannot be read"),
    "a key twice": (dict(text='{"prunings": 1, "prunings": 2}'), "a key occurs twice"),
    "a key twice, deep down": (dict(text='{"about": {"a": 1, "a": 2}}'), "a key occurs twice"),
    "no prunings": (dict(prunings="left out"), "its header lacks prunings"),
    "no about": (dict(about="left out"), "its header lacks about"),
    "prunings is true": (dict(prunings=True), "its number of prunings is True, not a whole"),
    "prunings is 2.0": (dict(prunings=2.0), "its number of prunings is 2.0"),
    "prunings is negative": (dict(prunings=-1), "its number of prunings is -1"),
    "prunings is 255": (dict(prunings=255), "its number of prunings is 255"),
    "prunings is a list": (dict(prunings=[2]), "its number of prunings is"),
    "rounds is null": (dict(rounds=None), "its rounds are not a list of objects"),
    "rounds is an object": (dict(rounds={"0": {}}), "its rounds are not a list of objects"),
    "rounds of numbers": (dict(rounds=[{}, 1]), "its rounds are not a list of objects"),
    "threshold is a text": (dict(threshold="0.5"), "its threshold is 0.5, not a number"),
    "threshold is true": (dict(threshold=True), "its threshold is True, not a number"),
    "threshold is null": (dict(threshold=None), "its threshold is None, not a number"),
    "threshold is nan": (dict(threshold=float("nan")), "its threshold is nan"),
    "threshold is inf": (dict(threshold=float("inf")), "its threshold is inf"),
    "threshold is too large for a float": (dict(threshold=10**400), "its threshold is 10"),
    "head is a text": (dict(about={"head": "fc"}), "its head is fc, not a list of names"),
    "head of numbers": (dict(about={"head": [1]}), "its head is .1., not a list of names"),
    "tied is a list": (dict(about={"tied": ["a"]}), "its tied tensors are"),
    "tied to nothing": (dict(about={"tied": {"c": "d"}}), "the tied tensor c has weights of its"),
    "tied to a list": (dict(about={"tied": {"c": ["a"]}}), "the tied tensor c has weights of its"),
    "tied and there": (
        dict(about={"tied": {"b": "a"}}),
        "the tied tensor b has weights of its own",
    ),
    "nan": (
        dict(tensors={"weights/a": ONE * float("nan")}),
        "a has a mask and weights that are no",
    ),
    "inf": (dict(tensors={"weights/a": ONE / 0}), "a has a mask and weights that are not finite"),
    "int64": (dict(tensors={"weights/a": ONE.long()}), "a has a mask and weights of torch.int64"),
    "bool": (dict(tensors={"weights/a": ONE.bool()}), "a has a mask and weights of torch.bool"),
    "complex": (dict(tensors={"weights/a": ONE * 1j}), "a has a mask and weights of torch.complex"),
    "float8": (
        dict(tensors={"weights/a": ONE.to(torch.float8_e4m3fn)}),
        "a has a mask and weights of torch.float8_e4m3fn",
    ),
    "pruned after the last round": (
        dict(tensors={"died/a": LATE}),
        "a has weights pruned after the last of 2 prunings",
    ),
    "a mask without weights": (dict(tensors={"weights/a": None}), "a is no mask of its weights"),
    "a mask of another shape": (
        dict(tensors={"died/a": LATE.flatten()}),
        "a is no mask of its weights",
    ),
    "a mask of another type": (dict(tensors={"died/a": ONE}), "a is no mask of its weights"),
    "a tensor that is neither": (dict(tensors={"more/a": ONE}), "it has more/a"),
    "two tensors, one plain name": (
        dict(tensors={"weights/_orig_mod.a": ONE}),
        "two of its tensors have one name",
    ),
    "a name of 100,000 letters": (dict(tensors={"died/" + "n" * 10**5: LATE}), "nnn... is no mask"),
    "a note nested 100,000 deep": (dict(note=lambda said: DEEP), "its header cannot be read"),
    "a note that is no object": (dict(note=lambda said: "3"), "its header cannot be read"),
    "a note whose parts are numbers": (
        dict(note=lambda said: json.dumps(said | dict(header=3))),
        "its header cannot be read",
    ),
    "a kind of 100,000 letters": (
        dict(note=lambda said: json.dumps(said | dict(kind="k" * 10**5))),
        "kkk... file, not a ticket file",
    ),
    "another format": (
        dict(note=lambda said: json.dumps(said | dict(format=[2]))),
        "is written in format .2., this version of rg_tickets reads format 1",
    ),
    "format true": (
        dict(note=lambda said: json.dumps(said | dict(format=True))),
        "is written in format True",
    ),
}


def read_forged(folder, spare, pipe):
    "In a process with `spare` bytes of memory: read files made to be costly; tell what was wrong"
    folder, bad = Path(folder), []
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))
    for path in sorted(folder.iterdir()):
        began = time.process_time()
        try:
            Ticket.load(path)
            bad.append(f"{path.name} was read")
        except TicketError as e:
            bad += [] if str(path) in str(e) and len(str(e)) < 700 else [f"{path.name}: {e}"]
        except BaseException as e:
            bad.append(f"{path.name}: {type(e).__name__}: {e}")
        if (seconds := time.process_time() - began) > 60:
            bad.append(f"{path.name} took {seconds:.1f} s")
    pipe.send(bad)
