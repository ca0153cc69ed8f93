"What the notebook `12a_pretrained` does not tell: torchvision's files from end to end, with a URL that needs no network, and files of torchvision networks"

import contextlib, hashlib, io, types
import pytest, torch, torchvision
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from rg_tickets.models.pretrained import PretrainedError, load_pretrained, read_weights
from rg_tickets.models.resnets import resnet

same = lambda a, b: a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def eighteen():
    return resnet("resnet18", classes=1000, seed=1)


@pytest.fixture
def hub(tmp_path):
    "An empty folder of downloads"
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub/checkpoints"
    torch.hub.set_dir(before)


@pytest.fixture
def offer(tmp_path, eighteen, monkeypatch):
    "Let torchvision offer a file of this disk as weights of every network"
    torch.save(eighteen.state_dict(), tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    path = tmp_path / f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)
    weights = types.SimpleNamespace(url=path.as_uri(), meta={"_file_size": 44.7})
    monkeypatch.setattr(
        torchvision.models,
        "get_model_weights",
        lambda name: types.SimpleNamespace(__members__={"V1": weights}),
    )
    return path


def test_torchvision_is_fetched_once_and_only_if_asked(hub, offer, eighteen):
    net = resnet("resnet18")
    start = {k: t.clone() for k, t in net.state_dict().items()}
    with pytest.raises(FileNotFoundError, match=r"(?s)45 MB.*download=True"):
        load_pretrained(net, "torchvision:V1")
    assert not hub.exists() and same(start, net.state_dict())
    with contextlib.redirect_stderr(io.StringIO()):
        receipt = load_pretrained(net, "torchvision:V1", download=True)
    assert (hub / offer.name).is_file() and set(receipt.kept) == {"fc.weight", "fc.bias"}
    offer.unlink()  # from now on the file on this machine has to do
    whole = resnet("resnet18", classes=1000)
    load_pretrained(whole, "torchvision:V1", head=True)
    assert same(whole.state_dict(), eighteen.state_dict())


def test_torchvision_file_is_whole(hub, offer):
    hub.mkdir(parents=True)
    (hub / offer.name).write_bytes(offer.read_bytes()[:-1])
    with pytest.raises(PretrainedError, match="SHA-256"):
        load_pretrained(resnet("resnet18"), "torchvision:V1")


def test_download_that_is_not_what_its_name_says_is_not_kept(hub, offer):
    offer.write_bytes(b"a captive portal")
    with (
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(OSError, match="could not be downloaded"),
    ):
        load_pretrained(resnet("resnet18"), "torchvision:V1", download=True)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize("stem, channels", [("imagenet", 3), ("cifar", 3), ("cifar", 1)])
def test_stems(eighteen, stem, channels):
    net = resnet("resnet18", stem=stem, in_channels=channels)
    own = net.conv1.weight.clone()
    receipt = load_pretrained(net, eighteen.state_dict())
    fits = (stem, channels) == ("imagenet", 3)
    assert ("conv1.weight" in receipt.taken) == fits and torch.equal(
        net.conv1.weight, eighteen.conv1.weight if fits else own
    )
    assert torch.equal(net.bn1.weight, eighteen.bn1.weight) and torch.equal(
        net.layer4[1].conv2.weight, eighteen.layer4[1].conv2.weight
    )


def test_torchvisions_own_networks_take_part(eighteen):
    theirs = torchvision.models.resnet18()
    load_pretrained(theirs, eighteen.state_dict(), head=True)
    assert same(theirs.state_dict(), eighteen.state_dict())


@pytest.mark.parametrize("wrong, right", [("resnet34", "resnet18"), ("resnet18", "resnet34")])
def test_neighbours_are_told_apart(wrong, right):
    with torch.device("meta"):
        state = resnet(right).state_dict()
    state = {k: torch.zeros(t.shape, dtype=t.dtype) for k, t in state.items()}
    with pytest.raises(PretrainedError, match=f"They look like those of a {right}"):
        load_pretrained(resnet(wrong), state)


def test_a_whole_stage_too_much_is_another_architecture(eighteen):
    "ResNet-18's first three stages fit a CIFAR ResNet-14 of width 64 exactly"
    with pytest.raises(PretrainedError, match=r"layer4\.0\.conv1\.weight: not in the network"):
        load_pretrained(resnet("cifar_resnet14", width=64), eighteen.state_dict())


def test_prunings_of_torch_in_every_wrapper(tmp_path):
    net = resnet("cifar_resnet8", width=4)
    w = net.layer1[0].conv1.weight.detach()
    mask = (torch.arange(w.numel()).reshape(w.shape) % 2).float()
    state = {k: t for k, t in net.state_dict().items() if k != "layer1.0.conv1.weight"} | {
        "layer1.0.conv1.weight_orig": w,
        "layer1.0.conv1.weight_mask": mask,
    }
    for prefix in ("", "module.", "encoder_q.", "module.encoder_q."):
        torch.save({"state_dict": {prefix + k: t for k, t in state.items()}}, tmp_path / "x.pth")
        fresh = resnet("cifar_resnet8", width=4, seed=5)
        load_pretrained(fresh, tmp_path / "x.pth", head=True)
        assert torch.equal(fresh.layer1[0].conv1.weight, w * mask)


def test_no_other_error_escapes(tmp_path):
    "Bytes of any kind are refused with the one error"
    g = torch.Generator().manual_seed(0)
    for start in (
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x04\x95",
        b"\x08\0\0\0\0\0\0\0{",
        b"\x05\0\0\0\0\0\0\0{}   ",
    ):
        for n in (0, 1, 10, 1000):
            for suffix in (".pth", ".safetensors"):
                path = tmp_path / f"x{suffix}"
                path.write_bytes(start + bytes(torch.randint(0, 256, (n,), generator=g).tolist()))
                with pytest.raises(PretrainedError):
                    read_weights(path)


def test_safetensors_of_another_program(tmp_path):
    net = resnet("cifar_resnet8", width=4, seed=1)
    save_file(net.state_dict(), tmp_path / "x.safetensors", {"format": "pt"})
    fresh = resnet("cifar_resnet8", width=4)
    load_pretrained(fresh, str(tmp_path / "x.safetensors"), head=True)
    assert same(fresh.state_dict(), net.state_dict())


# Tied tensors, wrappers, containers


def small_bert(seed=0, tie=True):
    "A small BERT for masked language modelling"
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    return BertForMaskedLM(
        BertConfig(
            **sizes, intermediate_size=24, max_position_embeddings=20, tie_word_embeddings=tie
        )
    )


def small_gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=2)
    )


wrappers = pytest.mark.parametrize(
    "wrap",
    [lambda o: o, torch.compile, nn.DataParallel, AveragedModel],
    ids=["plain", "compiled", "parallel", "averaged"],
)


@wrappers
@pytest.mark.parametrize("make", [small_bert, small_gpt2], ids=["bert", "gpt2"])
@pytest.mark.parametrize("form", ["torch", "safetensors", "memory"])
def test_tied_language_models(make, wrap, form, tmp_path):
    "Embedding and decoder come as one, from files that name one of them or both"
    there, here = make(1), make(2)
    state = wrap(there).state_dict()
    if form == "torch":
        torch.save({"net": state}, tmp_path / "a.pt")
    if form == "safetensors":
        first = {}
        for k, t in state.items():
            first.setdefault((t.data_ptr(), t.shape), k)
        save_file({k: state[k].clone() for k in first.values()}, tmp_path / "a.safetensors")
    source = dict(torch=tmp_path / "a.pt", safetensors=tmp_path / "a.safetensors", memory=state)[
        form
    ]
    tie = here.get_output_embeddings().weight is here.get_input_embeddings().weight
    receipt = load_pretrained(wrap(here) if form == "memory" else here, source, head=True)
    if form == "memory" and wrap is AveragedModel:
        return  # AveragedModel holds a copy
    assert tie and here.get_output_embeddings().weight is here.get_input_embeddings().weight
    assert same(there.state_dict(), here.state_dict())
    assert len(receipt.taken) + len(receipt.kept) < len(here.state_dict())


def test_an_embedding_is_no_head_because_it_is_tied_to_one():
    "Without the head, the embedding of a tied model comes from the file"
    there, here = small_bert(1), small_bert(2)
    receipt = load_pretrained(here, there.state_dict())
    assert torch.equal(
        here.bert.embeddings.word_embeddings.weight, there.bert.embeddings.word_embeddings.weight
    )
    assert "bert.embeddings.word_embeddings.weight" in receipt.taken
    assert any(k.startswith("cls.") for k in receipt.kept)


def test_a_file_of_an_untied_model_is_refused_by_a_tied_one():
    apart = small_bert(1, tie=False)
    with torch.no_grad():
        apart.cls.predictions.decoder.weight.add_(1)
    here = small_bert(2)
    start = {k: t.clone() for k, t in here.state_dict().items()}
    with pytest.raises(PretrainedError, match="the network has one tensor for both"):
        load_pretrained(here, apart.state_dict(), head=True)
    assert same(start, here.state_dict())


def test_a_backbone_and_a_model_with_a_head_find_each_other(tmp_path):
    "BertModel's file has no `bert.`, and a file of BertForMaskedLM has it"
    there, here = small_bert(1), small_bert(2)
    receipt = load_pretrained(here, there.bert.state_dict())
    assert receipt.kind == "weights of its 'bert'"
    assert same(there.bert.encoder.state_dict(), here.bert.encoder.state_dict())
    bare = small_bert(3).bert
    load_pretrained(bare, there.state_dict(), head=True)
    assert same(there.bert.encoder.state_dict(), bare.encoder.state_dict())


def test_a_network_whose_part_is_called_module(tmp_path):
    "`module.` is taken off where a wrapper put it, and kept where it is a name"
    own = lambda: nn.ModuleDict(dict(module=nn.Linear(3, 3), out=nn.Linear(3, 2)))
    a, b = own(), own()
    for state in (a.state_dict(), nn.DataParallel(a).state_dict()):
        torch.save(state, tmp_path / "a.pt")
        load_pretrained(b, tmp_path / "a.pt", head=True)
        assert same(a.state_dict(), b.state_dict())


@pytest.mark.parametrize(
    "key",
    [
        "net",
        "state_dict",
        "model",
        "module",
        "network",
        "ema",
        "model_state",
        "weights",
        "odd_name",
    ],
)
def test_containers(key, tmp_path):
    net = resnet("cifar_resnet8", width=4, seed=1)
    torch.save(
        {"epoch": 7, key: net.state_dict(), "optimizer": {"state": {}, "param_groups": []}},
        tmp_path / "a.pt",
    )
    assert same(read_weights(tmp_path / "a.pt"), net.state_dict())


def test_numbers_of_numpy_are_plain_data(tmp_path):
    "Scores and epochs as NumPy writes them do not make a file more than data"
    import argparse
    import numpy as np

    net = resnet("cifar_resnet8", width=4, seed=1)
    beside = dict(
        ep=np.int64(3), acc=np.float64(0.9), args=argparse.Namespace(lr=0.1), rng=np.arange(5)
    )
    torch.save(dict(state_dict=net.state_dict(), **beside), tmp_path / "a.pt")
    assert same(read_weights(tmp_path / "a.pt"), net.state_dict())


def test_strange_tensors_are_named_only_if_they_are_wanted(tmp_path):
    net = resnet("cifar_resnet8", width=4, seed=1)
    state = net.state_dict() | {
        "freqs": torch.ones(2, dtype=torch.complex64),
        "cache": torch.ones(2).to_sparse(),
    }
    torch.save(state, tmp_path / "a.pt")
    assert same(
        {k: t for k, t in read_weights(tmp_path / "a.pt").items() if k != "freqs"}, net.state_dict()
    )
    torch.save(net.state_dict() | {"bn1.weight": torch.ones(4).to_sparse()}, tmp_path / "b.pt")
    with pytest.raises(PretrainedError, match="bn1.weight: it is sparse"):
        load_pretrained(resnet("cifar_resnet8", width=4), tmp_path / "b.pt")
