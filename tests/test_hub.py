"Tickets to and from the Hub: what is opened, what a stranger's strings can do, and the real client without a network"

import os, re, subprocess, sys
from dataclasses import replace
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from rg_tickets.hub import HubError, card, from_pretrained, push_to_hub, write
from rg_tickets.masks import MaskHistory
from rg_tickets.tickets import Ticket, TicketError, apply, digest


def ticket(**about):
    "A small ticket of three rounds, nobody's in particular"
    g = torch.Generator().manual_seed(0)
    w = {
        "layer1.0.conv1.weight": torch.randn(4, 3, 3, 3, generator=g),
        "layer2.0.conv1.weight": torch.randn(8, 4, 3, 3, generator=g),
    }
    died = {k: torch.randint(0, 4, t.shape, generator=g).to(torch.uint8) for k, t in w.items()}
    died = {
        k: torch.where(d == 0, torch.tensor(255, dtype=torch.uint8), d) for k, d in died.items()
    }
    rounds = [
        dict(
            n=n,
            time=0.3 * n,
            density=0.75**n,
            loss=0.1,
            threshold=0.1,
            metrics=dict(loss=0.2, accuracy=0.9),
            tensors=[
                dict(
                    tensor=k,
                    count=t.numel(),
                    alive=t.numel() - n,
                    l1=10.0 - n * i,
                    l2=1.0,
                    largest=1.0,
                    smallest=0.1,
                )
                for i, (k, t) in enumerate(w.items())
            ],
        )
        for n in range(4)
    ]
    return Ticket(
        w,
        MaskHistory(died, 3),
        rounds,
        dict(task="a task", model="a network", control="imp", seed=3) | about,
    )


def test_there_and_back_in_a_folder(tmp_path):
    t = ticket()
    assert push_to_hub(t, tmp_path / "a", note="Of mine.") == tmp_path / "a"
    back = from_pretrained(tmp_path / "a")
    assert (
        digest(back.weights) == digest(t.weights)
        and digest(back.history.died) == digest(t.history.died)
        and back.rounds == t.rounds
        and back.about == t.about
    )
    assert (tmp_path / "a/flow.png").read_bytes()[:4] == b"\x89PNG" and sorted(
        p.name for p in (tmp_path / "a").iterdir()
    ) == ["README.md", "flow.png", "ticket.safetensors"]
    page = (tmp_path / "a/README.md").read_text()
    assert "Of mine." in page and "from_pretrained('./a')" in page and "network = ..." in page


def test_only_the_ticket_is_opened(tmp_path):
    push_to_hub(ticket(), tmp_path)
    for name in ("config.json", "pytorch_model.bin", "modeling.py", "__init__.py", "adapter.pkl"):
        (tmp_path / name).write_text("raise SystemExit('run')")
    opened, on = [], True
    sys.addaudithook(
        lambda event, args: (
            opened.append(os.path.basename(str(args[0])))
            if on and event in ("open", "import", "exec") and str(tmp_path) in str(args[0])
            else None
        )
    )
    from_pretrained(tmp_path)
    on = False
    assert set(opened) <= {"ticket.safetensors"}


NASTY = [
    "---\nlicense: mit\n---\n# x",
    "<script>alert(1)</script>",
    "`code` | cell |\n| row",
    "![x](http://a/b.png)",
    "{{ jinja }}",
    "x" * 10**5,
    "\x00\x1b[31m",
    "{a: &b [*b]}",
    "!!python/object/apply:os.system ['true']",
]


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize(
    "field", ["task", "model", "control", "rewind", "recipe", "versions", "archive"]
)
def test_strings_of_strangers_stay_strings(text, field):
    page = card(ticket(**{field: {text: text} if field in ("recipe", "versions") else text}))
    front = yaml.safe_load(page.split("\n---\n")[0])
    assert (
        front["license"] == "unknown"
        and front["library_name"] == "rg_tickets"
        and len(page) < 10_000
    )
    assert "<script" not in page and all(
        isinstance(v, (str, int, float)) for v in front["rg_tickets"].values()
    )  # safe_load refuses tags of objects
    body = re.sub(
        r"```.*?```|`[^`\n]*`", "", page.split("\n---\n", 1)[1], flags=re.S
    )  # what is not code
    assert "http://a" not in body and "{{" not in body and body.count("\n# ") == 1


def test_odd_rounds_have_a_card(tmp_path):
    t = ticket()
    for rounds in (
        [],
        [{}],
        [{"n": 0, "accuracy": 0.9}],
        [dict(t.rounds[0], tensors=[])],
        [dict(r, metrics={}) for r in t.rounds],
        t.rounds[:1],
    ):
        write(replace(t, rounds=rounds), tmp_path / "a")
    for rounds in ("odd", [1, 2]):
        assert "owner/name" in card(replace(t, rounds=rounds))
        with pytest.raises(TicketError, match="its rounds are not a list of objects"):
            write(replace(t, rounds=rounds), tmp_path / "b")


def test_a_page_of_somebody_else_is_kept(tmp_path):
    for text in ("# A project", "---\nlibrary_name: transformers\n---\n# A model", "---", ""):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(ValueError, match="not a ticket's card"):
            push_to_hub(ticket(), tmp_path)
        assert (tmp_path / "README.md").read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_a_link_instead_of_the_card_is_replaced_and_not_followed(tmp_path):
    push_to_hub(ticket(), tmp_path / "a")
    (tmp_path / "a/README.md").rename(tmp_path / "far.md")
    (tmp_path / "a/README.md").symlink_to(tmp_path / "far.md")
    before = (tmp_path / "far.md").read_text()
    push_to_hub(ticket(), tmp_path / "a", note="New.")
    assert (tmp_path / "far.md").read_text() == before and "New." in (
        tmp_path / "a/README.md"
    ).read_text()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/sub").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="leads out"):
        from_pretrained(tmp_path / "b", "sub")


def test_damaged(tmp_path):
    push_to_hub(ticket(), tmp_path)
    path = tmp_path / "ticket.safetensors"
    whole = path.read_bytes()
    for data in (
        b"",
        whole[:-3],
        whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    ):
        path.write_bytes(data)
        with pytest.raises(TicketError):
            from_pretrained(tmp_path)


@pytest.mark.slow  # the client tries again, and waits
def test_the_real_client_without_a_network(tmp_path, monkeypatch):
    "A closed port of this machine in place of the Hub"
    api = HfApi(endpoint="http://127.0.0.1:9", token="hf_none")
    real = api.hf_hub_download
    monkeypatch.setattr(
        api,
        "hf_hub_download",
        lambda *args, **kwargs: real(*args, cache_dir=tmp_path, **kwargs),
        raising=False,
    )
    with pytest.raises(HubError, match="cannot be reached"):
        from_pretrained("me/digits", api=api)
    with pytest.raises(HubError, match="cannot be reached"):
        push_to_hub(ticket(), "me/digits", api=api)


@pytest.mark.slow
def test_the_real_client_told_to_stay_offline(tmp_path):
    code = "from rg_tickets.hub import *\ntry: from_pretrained('me/digits')\nexcept HubError as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert "HF_HUB_OFFLINE" in done.stdout, done.stderr


class Tied(torch.nn.Module):
    "An embedding that is also the decoder, and a layer that is used twice"

    head_names = ("score",)

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 6)
        self.body = torch.nn.Linear(6, 6)
        self.again = self.body
        self.decoder = torch.nn.Linear(6, 9, bias=False)
        self.decoder.weight = self.embed.weight
        self.score = torch.nn.Linear(6, 2)


@pytest.mark.parametrize(
    "wrap",
    [lambda o: o, torch.compile, torch.nn.DataParallel],
    ids=["plain", "compiled", "parallel"],
)
def test_a_tied_network_there_and_back(wrap, tmp_path):
    "What is pruned is zero under every name, and the card says which names are one tensor"
    net = Tied()
    kept = {
        "embed.weight": net.embed.weight.abs() > 0.7,
        "body.weight": net.body.weight.abs() > 0.2,
    }
    died = {k: torch.where(m, 255, 1).to(torch.uint8) for k, m in kept.items()}
    made = Ticket.of(
        wrap(net), MaskHistory(died, 1), about=dict(task="words", model="a tied network")
    )
    push_to_hub(made, tmp_path / "a")
    back = from_pretrained(tmp_path / "a")
    assert digest(back.weights) == digest(made.weights) and back.about == made.about
    fresh = wrap(Tied())
    inner = getattr(fresh, "_orig_mod", getattr(fresh, "module", fresh))
    apply(back, fresh)
    assert torch.equal(inner.decoder.weight != 0, kept["embed.weight"])
    assert torch.equal(inner.again.weight != 0, kept["body.weight"]) and inner.again is inner.body
    assert inner.decoder.weight is inner.embed.weight
    page = (tmp_path / "a/README.md").read_text()
    assert "| head, left dense | `score` |" in page and "decoder.weight is embed.weight" in page


ODD = [
    None,
    3,
    "x",
    [],
    {},
    [None],
    {"a": None},
    {"a": {"b": 1}},
    [["x"]],
    "|`<b>`\n---\n",
    float("nan"),
    True,
]


@pytest.mark.parametrize("odd", ODD, ids=map(repr, ODD))
def test_odd_facts_have_a_card(odd):
    "A ticket that was put together by hand may say anything of itself"
    for field in (
        "head",
        "tied",
        "task",
        "seed",
        "prune",
        "recipe",
        "versions",
        "archive",
        "model",
    ):
        page = card(ticket(**{field: odd}))
        front = yaml.safe_load(page.split("\n---\n")[0])
        assert front["library_name"] == "rg_tickets" and "## Load" in page and "<b>" not in page


@pytest.mark.parametrize(
    "odd",
    [
        {"l1": "x"},
        {"l1": None},
        {"l1": -1.0},
        {"count": [1]},
        {"alive": float("inf")},
        {"tensor": None},
    ],
)
def test_odd_measurements_have_a_card(odd):
    t = ticket()
    rounds = [dict(r, tensors=[o | odd for o in r["tensors"]]) for r in t.rounds]
    assert "## Load" in card(replace(t, rounds=rounds))
    assert "## Load" in card(replace(t, rounds=t.rounds + t.rounds))  # every round twice
