"Tickets, states and notes that were damaged: refused in a sentence, or made good for; never believed"

import json, random, shutil, time
from pathlib import Path
import pytest
from damage import KINDS, damaged, read_all
from killing import CASES, QUICK, content, posix, processes
from rg_tickets import batches, runs
from rg_tickets.batches import Kept, Step, Study
from rg_tickets.tickets import Ticket, TicketError, load_tensors, save_tensors


@pytest.mark.slow  # `test_properties` reads three hundred of them
@posix
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(),
    reason="needs /proc to know how much memory a process has",
)
def test_two_thousand_damaged_files_are_refused(tell):
    here, there = processes.Pipe()
    process = processes.Process(target=read_all, args=(2000, 7, 2**28, there), daemon=True)
    process.start()
    there.close()
    try:
        assert here.poll(300), "a file made the reader hang"
    finally:
        process.kill() if process.is_alive() and not here.poll(0) else None
    seen, bad, slowest, grew = here.recv()
    process.join()
    tell(
        f"2000 damaged files, {sum(seen.values())} refused by name: {dict(seen)}; slowest {1000 * slowest:.0f} ms, memory grew by {grew:.0f} MiB of the 256 it had"
    )
    assert not bad, bad[:5]
    assert sum(seen.values()) == 2000 and set(seen) == set(KINDS) and grew < 64


class Cut(Exception):
    "A run that stops here"


def run(name, folder, cut=None, seed=0):
    "A small run of that policy, its state put aside after every epoch; `cut`: (round, step) to stop at. Its folder"
    spec = runs.Spec(
        **QUICK
        | CASES[name]
        | dict(
            seed=seed, recipe=dict(CASES[name].get("recipe", {}), epochs=5 if name == "step" else 3)
        )
    )
    real, imp = runs.note, runs.imp

    def note(home, n, step, *rest):
        real(home, n, step, *rest)
        if (n, step) == cut:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "note", note)
        patch.setattr(runs, "imp", lambda *args, **kwargs: imp(*args, **kwargs, checkpoint_every=0))
        try:
            runs.execute(spec, folder, device="cpu")
        except Cut:
            assert cut
    return Path(folder) / spec.id


def state_of(home, n, step, **more):
    "The run's own state under a header that says another round or step"
    tensors, header = load_tensors(home / "state.safetensors", "state")
    save_tensors(home / "state.safetensors", tensors, header | dict(n=n, step=step) | more, "state")


@pytest.mark.parametrize(
    "name",
    [
        "imp",
        "carried",
        pytest.param("oneshot", marks=pytest.mark.slow),
        pytest.param("step", marks=pytest.mark.slow),
    ],
)
def test_a_run_never_goes_on_from_a_bad_state(name, tmp_path, tell):
    "It comes to the bytes of the run that was left alone, or it says that it cannot"
    want, draw, outcome = content(run(name, tmp_path / "alone")), random.Random(name), {}
    cut = dict(oneshot=(0, 4), step=(1, 8)).get(
        name, (1, 4)
    )  # an epoch is two steps; what is reported has not been put aside yet
    home = run(name, tmp_path / "begun", cut)
    theirs = (run(name, tmp_path / "theirs", cut, seed=1) / "state.safetensors").read_bytes()
    mine = (home / "state.safetensors").read_bytes()
    bad = {
        "theirs": theirs,
        "the ticket": (home / "ticket.safetensors").read_bytes(),
        "missing": None,
    } | {f"{kind} {i}": data for i in range(4) for kind, data in [damaged(mine, draw, theirs)]}
    before = (home / "ticket.safetensors").read_bytes()
    for i, (what, data) in enumerate(
        [*bad.items(), ("of a later round", "later"), ("whole", mine)]
    ):
        place = tmp_path / str(i) / home.name
        shutil.copytree(home, place)
        state = place / "state.safetensors"
        if data is None:
            state.unlink()
        elif data == "later":
            state_of(place, 2, 6)
        else:
            state.write_bytes(data)
        try:
            run(name, place.parent)
            outcome[what] = "made good for"
            assert content(place) == want, what
        except TicketError as e:
            outcome[what] = "refused"
            assert (
                "has lost its state.safetensors" in str(e)
                and str(place) in str(e)
                and (place / "ticket.safetensors").read_bytes() == before
            )
    assert outcome["whole"] == "made good for" and set(list(outcome.values())[:-1]) == {
        "refused" if name == "carried" else "made good for"
    }
    tell(f"{name}: {len(outcome) - 1} bad states, all {outcome['theirs']}")


def test_a_run_whose_ticket_is_damaged_says_what_to_do(tmp_path):
    home = run("imp", tmp_path, (1, 4))
    path, draw = home / "ticket.safetensors", random.Random(3)
    whole = path.read_bytes()
    for _ in range(10):
        path.write_bytes(damaged(whole, draw)[1])
        left = {p.name: p.read_bytes() for p in home.iterdir() if p.suffix == ".safetensors"}
        with pytest.raises(TicketError, match=f"delete {home} and start again"):
            run("imp", tmp_path)
        assert {
            p.name: p.read_bytes() for p in home.iterdir() if p.suffix == ".safetensors"
        } == left
    path.write_bytes(whole)
    assert len(Ticket.load(run("imp", tmp_path) / "ticket.safetensors").rounds) == 3


def spoilt(text, draw):
    "A note that went bad"
    kind, i = (
        draw.choice(["bit", "cut", "key", "value", "type", "garbage"]),
        draw.randrange(len(text)),
    )
    data = bytearray(text.encode())
    if kind == "bit":
        data[i] ^= 1 << draw.randrange(8)
    if kind == "cut":
        del data[i:]
    if kind == "garbage":
        data = bytearray(draw.randbytes(30))
    if kind == "type":
        data = draw.choice(
            [b"[]", b"{}", b"null", b"3", b'"x"', b"[[]]", b"[null]", b'[{"id": 3}]']
        )
        return data
    if kind in ("key", "value"):
        given = json.loads(text)
        place = given[0] if isinstance(given, list) else given
        if kind == "key" and "jobs" in place and draw.random() < 0.7:
            place = place["jobs"][0]
        k = draw.choice(list(place))
        v = place.pop(k)
        place |= (
            {k[:-1]: v} if kind == "key" else {k: draw.choice([None, [], {}, "x", 7, -1.0, [[1]]])}
        )
        data = json.dumps(given).encode()
    return bytes(data)


def test_damaged_notes_break_nothing(tmp_path, tell):
    "status, and the start of a study, over notes of all kinds that went bad: a table, or a sentence"

    class Planned:
        id, rounds = "run", 3

    kept = Kept(tmp_path)
    mine = Study(
        "mine", (Step("find", "resnet_imp"), Step("tell", "report", after=("find",), folder="."))
    )
    kept.keep(mine, mine.jobs())
    find, end = kept.jobs()
    runs_ = kept.runs(find)
    (runs_ / "run").mkdir(parents=True)
    kept.write(find, state="running", seen={}, before={"run": 0.5}, began=time.time() - 60)
    kept.write(end, state="done", seen=kept.seen(end), token="t", began=1.0, ended=5.0, took=4.0)
    runs.plan(runs_, [Planned])
    runs.note(runs_ / "run", 1, 3, 6, 3)
    draw, outcome = random.Random(0), {"read": 0, "refused": 0}
    notes = [
        tmp_path / "study.json",
        kept.home(find) / "job.json",
        kept.home(end) / "job.json",
        runs_ / "plan.json",
        runs_ / "run" / "progress.json",
    ]
    texts = {p: p.read_text() for p in notes}
    with batches.alone(tmp_path, ".study.lock"):
        for i in range(200):
            p = notes[i % 5]
            p.write_bytes(spoilt(texts[p], draw))
            try:
                batches.lines(batches.status(tmp_path))
                kept.keep(mine, mine.jobs())
                [kept.done(j) for j in mine.jobs()]
                outcome["read"] += 1
            except (ValueError, FileNotFoundError) as e:
                outcome["refused"] += 1
                assert str(tmp_path) in str(e), (p, p.read_bytes(), e)
            p.write_text(texts[p])
    tell(
        f"200 damaged notes: {outcome['read']} times what they said was done without, {outcome['refused']} times said to be damaged"
    )
    assert outcome["read"] > 120
