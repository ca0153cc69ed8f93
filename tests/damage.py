"Files that go bad in every way one could think of, and what is made of them"

import io, json, random, tempfile, time
from collections import Counter
from pathlib import Path
import torch
from torch import nn

try:
    import resource
except ImportError:
    resource = None  # on Windows
from rg_tickets.masks import MaskHistory, prune
from rg_tickets.tickets import Ticket, TicketError, load_tensors, save_tensors
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
