"Names, heads and prunable tensors of networks that people bring: wrapped, tied, frozen, towers"

import copy
import io
import pytest
import torch
import torchvision
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune as torch_prune
from torch.optim.swa_utils import AveragedModel
from rg_tickets.basics import generator
from rg_tickets.models.heads import check_head_names, declare_head, find_head, heads
from rg_tickets.models.names import (
    named_modules,
    named_parameters,
    plain_name,
    plain_tensors,
    set_state,
    state,
    tied,
    unwrap,
)
from rg_tickets.models.prunable import (
    GROUPINGS,
    PRESETS,
    Preset,
    describe,
    groups,
    prunable,
    replace_head,
    roles,
    table,
)
from rg_tickets.models.resnets import resnet


class Net(nn.Module):
    "A network with the given parts, and a forward pass that is a function of it and x"

    def __init__(self, forward=None, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.rule = forward

    def forward(self, x):
        return self.rule(self, x)


def chain(*layers):
    return nn.Sequential(*layers)


def linear(inputs=4, outputs=4):
    return nn.Linear(inputs, outputs, bias=False)


def language_model():
    "An embedding whose matrix is also the decoder's; the decoder comes first in the alphabet"
    net = Net(words=nn.Embedding(6, 4), body=linear(), decoder=linear(4, 6))
    net.rule = lambda m, x: m.decoder(m.body(m.words(x)))
    net.decoder.weight = net.words.weight
    return net


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- names and tensors


@pytest.mark.parametrize(
    "raw, plain",
    [
        ("_orig_mod.fc.weight", "fc.weight"),
        ("a._orig_mod.b._fsdp_wrapped_module.c", "a.b.c"),
        ("layers.0._checkpoint_wrapped_module.fc.weight", "layers.0.fc.weight"),
        ("_orig_mod", ""),
        ("parametrizations.weight.original", "weight"),
        ("x.parametrizations.weight_hh_l0.original", "x.weight_hh_l0"),
        ("x.parametrizations.weight.original0", "x.parametrizations.weight.original0"),
        ("module.fc.weight", "module.fc.weight"),
        ("fc.weight", "fc.weight"),
    ],
)
def test_plain_name(raw, plain):
    assert plain_name(raw) == plain and plain_name(plain) == plain


def test_state_of_a_plain_network_is_its_state_dict():
    "Digests of runs made before depend on it: the same names, order and tensors"
    for net in (resnet("cifar_resnet8"), torchvision.models.resnet18(), nn.LSTM(3, 4, 2)):
        theirs = net.state_dict(keep_vars=True)
        mine = state(net)
        assert list(mine) == list(theirs) and all(mine[k] is theirs[k] for k in mine)
        assert list(named_parameters(net)) == [k for k, _ in net.named_parameters()]


WRAPPERS = {
    "compile": torch.compile,
    "parallel": nn.DataParallel,
    "compiled parallel": lambda net: torch.compile(nn.DataParallel(net)),
    "parallel compiled": lambda net: nn.DataParallel(torch.compile(net)),
    "average": AveragedModel,
    "average of compiled parallel": lambda net: AveragedModel(nn.DataParallel(torch.compile(net))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_and_plain_are_one_network(wrap):
    "Names, heads, presets, roles and states agree, in memory and from a file"
    net = resnet("cifar_resnet8")
    wrapped = wrap(net)
    assert type(unwrap(wrapped)) is type(net) and unwrap(net) is net
    assert same(state(wrapped), state(net)) and heads(wrapped) == heads(net) == ("fc",)
    assert roles(wrapped) == roles(net)
    for preset in ("backbone", "open_lth", "cv_lth"):
        assert same(prunable(wrapped, preset), prunable(net, preset))
        assert str(describe(wrapped, preset)) == str(describe(net, preset))
    assert "conv1.weight" not in prunable(wrapped, "cv_lth")
    assert table(wrapped).equals(table(net))
    assert same(plain_tensors(wrapped.state_dict()), net.state_dict())
    fresh = resnet("cifar_resnet8", seed=1)
    set_state(fresh, wrapped.state_dict())
    assert same(state(fresh), state(net))
    other = wrap(resnet("cifar_resnet8", seed=2))
    set_state(other, net.state_dict())
    assert same(state(other), state(net))


def test_wrapped_parts_of_a_network():
    net = torchvision.models.vgg11(num_classes=2, init_weights=False).to("meta")
    plain = list(state(net))
    net.features = nn.DataParallel(net.features)
    net.classifier[0] = torch.compile(net.classifier[0])
    assert list(state(net)) == plain and heads(net) == ("classifier.6",)
    assert list(plain_tensors(net.state_dict(), net)) == plain
    assert net.state_dict().keys() != set(plain)
    assert [p for p, _ in named_modules(net)][:2] == ["", "features"]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_part_called_module_keeps_its_name(depth):
    "The word is also a name that people use; with the network at hand it is never lost"
    net = nn.ModuleDict(dict(module=nn.Sequential(linear(), linear())))
    file = {"module." * depth + k: t.clone() for k, t in net.state_dict().items()}
    assert list(state(net)) == ["module.0.weight", "module.1.weight"]
    assert same(plain_tensors(file, net), state(net))
    fresh = nn.ModuleDict(dict(module=nn.Sequential(linear(), linear())))
    set_state(nn.DataParallel(fresh), file)
    assert same(state(fresh), state(net))
    assert list(prunable(nn.DataParallel(net))) == ["module.0.weight"]


def test_a_name_in_the_middle_of_an_old_file():
    "The ImageNet script wraps `features` alone"
    net = nn.ModuleDict(dict(features=chain(linear()), classifier=linear()))
    file = {"features.module.0.weight": torch.ones(4, 4), "classifier.weight": torch.ones(4, 4)}
    set_state(net, file)
    assert all((t == 1).all() for t in state(net).values())


def test_files_of_two_networks_at_once_are_refused():
    a, b = torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError, match="two tensors are called fc"):
        plain_tensors({"fc": a, "_orig_mod.fc": b})
    assert list(plain_tensors({"fc": a, "_orig_mod.fc": a.clone()})) == ["fc"]
    assert list(plain_tensors({"module.fc": a, "conv": b})) == ["module.fc", "conv"]
    assert list(plain_tensors({"module.fc": a, "epoch": 3})) == ["fc"]
    assert plain_tensors({}) == {} and plain_tensors({"n_averaged": a}) == {"n_averaged": a}


class Two(nn.Module):
    "Two Parameters that are different objects and share their memory"

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.b = nn.Parameter(self.a.detach())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_by_storage(device):
    with torch.device(device):
        assert tied(language_model()) == {"decoder.weight": "words.weight"}
        assert tied(torch.compile(language_model())) == {"decoder.weight": "words.weight"}
        layer = linear()
        assert tied(nn.Sequential(layer, nn.ReLU(), layer)) == {"2.weight": "0.weight"}
        assert tied(Two()) == {"b": "a"}
        assert list(named_parameters(Two())) == list(state(Two())) == ["a"]
        assert tied(nn.Sequential(linear(), linear())) == {}
        shared = nn.BatchNorm1d(2)
        pair = nn.ModuleList([shared, shared])
        assert len(state(pair)) == 5 and len(pair.state_dict()) == 10


def test_ties_survive_in_files_of_torch():
    "A layer that is used twice is in a state_dict twice, and is one tensor there, too"
    layer, file = linear(), io.BytesIO()
    torch.save(nn.Sequential(layer, layer).state_dict(), file)
    file.seek(0)
    assert tied(torch.load(file)) == {"1.weight": "0.weight"}


def test_tied_tensors_of_transformers():
    small = dict(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=4, bos_token_id=0)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, eos_token_id=0))
    assert tied(gpt) == {"lm_head.weight": "transformer.wte.weight"}
    total = sum(p.numel() for p in gpt.parameters())
    assert sum(p.numel() for p in named_parameters(gpt).values()) == total


def overlapping(kind):
    block = torch.zeros(4, 4)
    pieces = {
        "one after the other": (block[:2], block[2:]),
        "columns": (block[:, :2], block[:, 2:]),
        "every other": (block[:, ::2], block[:, 1::2]),
        "in part": (block[:3], block[1:]),
        "inside": (block, block[1:2]),
        "transposed": (block, block.t()),
        "reshaped": (block, block.view(2, 8)),
        "rows and columns": (block[:1], block[:, 3:]),
    }
    a, b = pieces[kind]
    net = nn.Module()
    net.a, net.b = nn.Parameter(a), nn.Parameter(b)
    return net


@pytest.mark.parametrize("kind", ["one after the other", "columns", "every other"])
def test_a_storage_may_hold_several_tensors(kind):
    "As cuDNN's LSTMs do"
    net = overlapping(kind)
    assert tied(net) == {} and list(state(net)) == ["a", "b"]


@pytest.mark.parametrize(
    "kind", ["in part", "inside", "transposed", "reshaped", "rows and columns"]
)
def test_partly_overlapping_tensors_are_refused(kind):
    with pytest.raises(ValueError, match="a and b share part of their memory"):
        state(overlapping(kind))


def test_each_storage_is_written_once():
    "An alias that comes later, alphabetically or in state_dict order, cannot undo a mask"
    net = language_model()
    masked = {k: t.clone() for k, t in state(net).items()}
    masked["words.weight"][:, 1] = 0
    for given in (masked, {"decoder.weight": masked["words.weight"]} | masked):
        fresh = language_model()
        set_state(fresh, dict(sorted(given.items())))
        assert (
            fresh.decoder.weight[:, 1] == 0
        ).all() and fresh.words.weight is fresh.decoder.weight
    stale = masked | {"decoder.weight": net.decoder.weight.detach().clone()}
    before = {k: t.clone() for k, t in state(fresh).items()}
    with pytest.raises(ValueError, match="words.weight and decoder.weight are one tensor"):
        set_state(fresh, stale)
    assert same(state(fresh), before)
    nan = {k: torch.full_like(t, float("nan")) for k, t in net.state_dict().items()}
    set_state(fresh, nan)


def test_a_state_that_does_not_fit_changes_nothing():
    net = nn.Sequential(linear(), nn.BatchNorm1d(4))
    good = {k: t.clone() for k, t in state(net).items()}
    bad = {
        "is \\(2, 2\\), in the network it is \\(4, 4\\)": good | {"0.weight": torch.ones(2, 2)},
        "not given: 1.bias": {k: t for k, t in good.items() if k != "1.bias"},
        "not in the network: x": good | {"x": torch.ones(1)},
        "is torch.complex64": good | {"0.weight": torch.ones(4, 4, dtype=torch.complex64)},
        "is torch.float32, in the network it is torch.int64": good
        | {"1.num_batches_tracked": torch.tensor(1.5)},
        "given tensor is on the meta device": good | {"0.weight": torch.ones(4, 4, device="meta")},
    }
    for message, tensors in bad.items():
        with pytest.raises(ValueError, match=message):
            set_state(net, tensors)
        assert same(state(net), good)
    assert set_state(net, {"0.weight": torch.ones(4, 4), "x": good["1.bias"]}, strict=False) == (
        list(good)[1:],
        ["x"],
    )
    with pytest.raises(ValueError, match="the network is on the meta device"):
        set_state(copy.deepcopy(net).to("meta"), good)


class Odd(nn.Module):
    "Everything that a state_dict may hold besides plain parameters"

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("none", None)
        self.register_parameter("nothing", None)
        self.table = nn.Parameter(torch.eye(3).to_sparse())

    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        pass


def test_what_is_no_plain_tensor():
    net = Odd()
    assert list(state(net)) == ["table", "kept"]
    assert list(plain_tensors(net.state_dict())) == ["table", "kept"]
    with pytest.raises(ValueError, match="0.weight has no shape yet, its layer is lazy"):
        state(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="lazy: run one batch"):
        prunable(nn.Sequential(nn.LazyConv2d(3, 3), nn.Flatten(), linear()))
    seen = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    seen(torch.ones(2, 5))
    assert list(prunable(seen)) == ["0.weight"] and roles(seen)["1.bias"] == "bn_affine"


# ---------------------------------------------------------------- what is pruned


def only(layer, *names):
    "A network of the layer and a linear output: exactly these tensors of the layer are pruned"
    net = nn.ModuleDict(dict(layer=layer, out=linear()))
    net.head_names = ("out",)
    assert list(prunable(net)) == [f"layer.{n}" for n in names]
    assert list(prunable(net, "all")) == [*(f"layer.{n}" for n in names), "out.weight"]


def test_every_matrix_that_a_layer_multiplies_by():
    for dim in (1, 2, 3):
        only(getattr(nn, f"Conv{dim}d")(2, 2, 1), "weight")
        only(getattr(nn, f"ConvTranspose{dim}d")(2, 2, 1), "weight")
    only(nn.Linear(2, 2), "weight")
    only(nn.Bilinear(2, 2, 2), "weight")
    only(nn.MultiheadAttention(4, 2), "in_proj_weight", "out_proj.weight")
    qkv = "q_proj_weight", "k_proj_weight", "v_proj_weight"
    only(nn.MultiheadAttention(4, 2, kdim=3, vdim=5), *qkv, "out_proj.weight")
    for kind in (nn.RNN, nn.GRU, nn.LSTM):
        both = [f"weight_{a}_l0{b}" for b in ("", "_reverse") for a in ("ih", "hh")]
        only(kind(2, 3, bidirectional=True), *both)
    only(nn.LSTM(2, 3, proj_size=2), "weight_ih_l0", "weight_hh_l0", "weight_hr_l0")
    for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell):
        only(kind(2, 3), "weight_ih", "weight_hh")
    only(transformers.pytorch_utils.Conv1D(2, 3), "weight")
    only(torchvision.ops.DeformConv2d(2, 2, 1), "weight")
    only(type("Mine", (nn.Linear,), {})(2, 2), "weight")
    only(nn.TransformerEncoderLayer(4, 2, 8), *ENCODER_LAYER)


ENCODER_LAYER = [
    "self_attn.in_proj_weight",
    "self_attn.out_proj.weight",
    "linear1.weight",
    "linear2.weight",
]


def test_published_conventions_stay_as_they_are():
    "open_lth, cv_lth and BERT-Tickets prune what their code prunes, and nothing that we added"
    net = nn.ModuleDict(
        dict(
            conv1=nn.Conv2d(1, 2, 1),
            up=nn.ConvTranspose2d(2, 2, 1),
            rnn=nn.LSTM(2, 2),
            attention=nn.MultiheadAttention(4, 2),
            words=nn.Embedding(3, 2),
            fc=nn.Linear(2, 2),
        )
    )
    inside = ["conv1.weight", "attention.out_proj.weight", "fc.weight"]
    assert list(prunable(net, "open_lth")) == inside
    with pytest.raises(ValueError, match="every Conv2d but the first"):
        prunable(net, "cv_lth")
    assert describe(net, "open_lth").dense.keys() == {"not in preset 'open_lth'", "embedding"}
    mine = Preset((nn.LSTM,), "recurrent only")
    assert list(prunable(net, mine)) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert "not in the given preset" in describe(net, mine).dense


def test_embeddings_and_own_parameters():
    net = nn.ModuleDict(dict(words=nn.Embedding(5, 4), bag=nn.EmbeddingBag(5, 4), out=linear()))
    net.scale, net.places = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(1, 3, 4))
    with pytest.raises(ValueError, match="nothing to prune"):
        prunable(net)
    assert list(prunable(net, "all")) == ["words.weight", "bag.weight", "out.weight"]
    why = {p.name: p.why for p in describe(net).parts}
    assert why["places"] == why["scale"] == "own parameter" and why["words.weight"] == "embedding"
    assert list(prunable(net, ["places", "words.weight"])) == ["places", "words.weight"]
    sparse = nn.ModuleDict(dict(words=nn.Embedding(5, 4, sparse=True), out=linear()))
    assert list(prunable(sparse, "all")) == ["out.weight"]
    assert describe(sparse, "all").dense.keys() == {"sparse gradients"}
    with pytest.raises(ValueError, match="words.weight has sparse gradients"):
        prunable(sparse, ["words.weight"])
    with pytest.raises(ValueError, match="0.bias has fewer than two dimensions"):
        prunable(nn.Sequential(nn.Linear(2, 2)), ["0.bias"])


def normed(kind):
    "A hidden layer whose weight is computed, and a plain output"
    layer, way = nn.Linear(4, 4), None
    if kind == "parametrize":
        parametrize.register_parametrization(layer, "weight", nn.Identity())
        way = "parametrize.remove_parametrizations(network.layer, 'weight')"
    elif kind == "weight_norm":
        parametrizations.weight_norm(layer)
        way = "parametrize.remove_parametrizations(network.layer, 'weight')"
    elif kind == "spectral_norm":
        parametrizations.spectral_norm(layer)
        way = "parametrize.remove_parametrizations(network.layer, 'weight')"
    elif kind == "old weight_norm":
        nn.utils.weight_norm(layer)
        way = "torch.nn.utils.remove_weight_norm(network.layer, 'weight')"
    elif kind == "old spectral_norm":
        nn.utils.spectral_norm(layer)
        way = "torch.nn.utils.remove_spectral_norm(network.layer, 'weight')"
    elif kind == "prune":
        torch_prune.l1_unstructured(layer, "weight", 0.5)
        way = "torch.nn.utils.prune.remove(network.layer, 'weight')"
    return nn.ModuleDict(dict(layer=layer, out=linear())), way


COMPUTED = (
    "parametrize",
    "weight_norm",
    "spectral_norm",
    "old weight_norm",
    "old spectral_norm",
    "prune",
)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_matrices_are_refused_and_the_way_back_works(kind):
    net, way = normed(kind)
    for preset in ("backbone", "open_lth", ["layer.weight"]):
        with pytest.raises(ValueError, match="layer.weight is computed in every forward") as e:
            prunable(net, preset)
        assert way in str(e.value)
    assert "cannot be pruned" in str(describe(net))
    assert list(prunable(net, ["out.weight"])) == ["out.weight"]
    net.requires_grad_(False).out.requires_grad_(True)
    assert list(prunable(net, "open_lth")) == ["out.weight"]  # what is frozen is not touched
    net.requires_grad_(True)
    eval(way if way.startswith("torch") else f"torch.nn.utils.{way}", {}, names(torch, net))
    assert list(prunable(net)) == ["layer.weight"]


def names(torch, network):
    return dict(torch=torch, network=network)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_head_is_left_alone():
    net = nn.ModuleDict(dict(layer=linear(), out=nn.utils.weight_norm(nn.Linear(4, 4))))
    assert heads(net) == ("out",) and list(prunable(net)) == ["layer.weight"]
    recurrent = nn.LSTM(2, 2, bidirectional=True)
    nn.utils.weight_norm(recurrent, "weight_hh_l0_reverse")
    net = nn.ModuleDict(dict(rnn=recurrent, out=nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="rnn.weight_hh_l0_reverse is computed") as e:
        prunable(net)
    assert "rnn.weight_hh_l0 is" not in str(e.value)


def test_complex_and_quantised_matrices_are_refused():
    net = nn.ModuleDict(dict(layer=linear().to(torch.complex64), out=linear()))
    with pytest.raises(ValueError, match="layer.weight is complex"):
        prunable(net)
    assert list(prunable(net, ["out.weight"])) == ["out.weight"]
    net = nn.ModuleDict(dict(layer=linear().to(torch.float8_e4m3fn), out=linear()))
    with pytest.raises(ValueError, match="layer.weight is quantised"):
        prunable(net)
    int8 = linear()
    int8.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="layer.weight is quantised"):
        prunable(nn.ModuleDict(dict(layer=int8, out=linear())))
    whole = torch.ao.quantization.quantize_dynamic(chain(linear(), linear()), {nn.Linear})
    with pytest.raises(ValueError, match="0 is quantised .* prune before it is quantised"):
        prunable(whole, "open_lth")


def test_frozen_parameters_are_left_dense_and_named():
    net = nn.ModuleDict(dict(a=linear(), b=linear(), out=linear()))
    net.a.requires_grad_(False)
    assert list(prunable(net)) == ["b.weight"]
    assert list(prunable(net, frozen="prune")) == ["a.weight", "b.weight"]
    assert "a.weight (frozen, 16 weights)" in str(describe(net))
    with pytest.raises(ValueError, match="a.weight is frozen .* in the list"):
        prunable(net, ["a.weight", "b.weight"])
    assert list(prunable(net, ["a.weight"], frozen="prune")) == ["a.weight"]
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="all 2 tensors .* are frozen .*frozen='prune'"):
        prunable(net)
    with pytest.raises(ValueError, match="all 1 tensors .* are frozen"):
        prunable(net, ["b.weight"])
    with pytest.raises(ValueError, match="unknown choice for frozen parameters 'leave'"):
        prunable(net, frozen="leave")


def test_tied_tensors_are_pruned_once_and_the_heads_stay_dense():
    net = language_model()
    assert list(prunable(net)) == ["body.weight"]
    assert list(prunable(net, "open_lth")) == ["words.weight", "body.weight"]
    assert list(prunable(net, ["decoder.weight"])) == ["words.weight"]
    assert "words.weight (tied to the head, 24 weights)" in str(describe(net))
    net = nn.ModuleDict(dict(a=linear(), b=linear(), out=linear()))
    net.out.weight = net.a.weight  # two linear layers, one of them the head
    assert list(prunable(net)) == ["b.weight"] and describe(net).weights == 32
    layer = linear()
    net = nn.ModuleDict(dict(a=layer, b=layer, out=linear()))
    assert list(prunable(net)) == ["a.weight"] and describe(net).pruned == 16
    first = nn.Conv2d(1, 1, 1)
    net = nn.ModuleDict(dict(conv1=first, again=first, conv2=nn.Conv2d(1, 1, 1), fc=linear()))
    assert list(prunable(net, "cv_lth")) == ["conv2.weight"]  # the first one under any name


def test_a_description_adds_up():
    net = torchvision.models.vit_b_16().to("meta")
    found = describe(net)
    assert (found.pruned, found.weights) == (85_524_480, 86_444_544)
    assert found.pruned == sum(p.numel() for p in prunable(net).values())
    assert (
        found.frame().weights.sum()
        == found.weights
        == sum(p.numel() for p in net.parameters() if p.dim() > 1)
    )
    assert {why: len(parts) for why, parts in found.dense.items()} == {
        "own parameter": 2,
        "head": 1,
    }
    assert str(describe(nn.ReLU())) == (
        "prunes 0 of 0 matrix weights (0.0%) in 0 tensors; head = none; left dense: nothing"
    )
    assert [p.why for p in describe(linear(), "all").parts] == [""]


PUBLISHED = {14: 174_128, 20: 270_896, 32: 464_432, 44: 657_968, 56: 851_504, 110: 1_722_416}


@pytest.mark.parametrize("depth, weights", PUBLISHED.items())
def test_published_counts_of_open_lth(depth, weights):
    with torch.device("meta"):
        net = resnet(f"cifar_resnet{depth}")
    assert sum(p.numel() for p in prunable(net, "open_lth").values()) == weights


def test_published_counts_of_other_code():
    with torch.device("meta"):
        net = resnet("resnet50", classes=1000)
        bert = transformers.BertModel(transformers.BertConfig())
    count = lambda *args: sum(p.numel() for p in prunable(*args).values())
    assert count(net, "open_lth") == 25_502_912
    assert count(net, "cv_lth") == 23_445_504 and len(prunable(net, "cv_lth")) == 52
    assert count(net) == 25_502_912 - 2048 * 1000
    assert count(bert, "bert_tickets") == 85_524_480 == count(bert)
    assert len(prunable(bert, "bert_tickets")) == 73 and len(prunable(bert, "encoder")) == 72
    assert not any("embeddings" in n or "LayerNorm" in n for n in prunable(bert))


def test_what_was_asked_for_and_what_there_is():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2))
    assert list(prunable(net, ["2.weight", "0.weight"])) == ["0.weight", "2.weight"]
    assert list(prunable(net, Preset((nn.Linear,), "mine", head=True))) == ["2.weight", "3.weight"]
    assert prunable(net)["0.weight"] is net[0].weight
    messages = {
        "did you mean 'backbone'": (net, "backbones"),
        "unknown weight tensor '2.wieght'; did you mean '2.weight'": (net, ["2.wieght"]),
        "it has 1 Linear, its head is \\('',\\), and the preset takes": (linear(),),
        "the six matrices of each layer": (net, "bert_tickets"),
        "the list of names is empty": (net, []),
        "it has no parameters": (nn.ReLU(),),
        "tensor names; 1 have no known layer, e.g. 'a'": (Two(),),
    }
    for message, args in messages.items():
        with pytest.raises(ValueError, match=message):
            prunable(*args)
    assert list(prunable(linear(), "all")) == ["weight"]
    assert set(PRESETS) == {"backbone", "open_lth", "cv_lth", "bert_tickets", "encoder", "all"}


def test_roles():
    "The head's own normalisation is the head's; LayerNorm is among the weights; once per tensor"
    net = nn.ModuleDict(
        dict(body=nn.Linear(4, 4), norm=nn.LayerNorm(4), batch=nn.BatchNorm1d(4), out=linear())
    )
    net["out"] = chain(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    net.head_names = ("out",)
    kind = {k: r for k, r in roles(net).items()}
    assert {r for k, r in kind.items() if k.startswith("out.")} == {"head"}
    assert kind["norm.weight"] == kind["body.bias"] == "weights"
    assert kind["batch.weight"] == "bn_affine" and kind["batch.running_var"] == "bn_stats"
    assert list(kind) == list(state(net))
    assert roles(language_model()) == {"words.weight": "weights", "body.weight": "weights"}


# ---------------------------------------------------------------- heads


def penalty(net):
    "A loss that multiplies matrices with themselves"
    return sum((p @ p.t()).pow(2).sum() for p in net.parameters() if p.dim() == 2)


def flow(net, *inputs):
    "find_head with the sum of all outputs as a loss; nothing of the network may change"
    before = {k: t.clone() for k, t in state(net).items()}
    modes, generator = [m.training for m in net.modules()], torch.get_rng_state()
    head = find_head(net, lambda: total(net(*inputs)))
    assert same(state(net), before) and [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    return head


def total(output):
    "Sum of all numbers that have a gradient"
    if isinstance(output, torch.Tensor):
        return output.sum() if output.requires_grad else 0
    return sum(total(o) for o in (output.values() if hasattr(output, "values") else output))


def test_a_hidden_layer_called_fc():
    net = Net(lambda m, x: m.out(m.fc(x).relu()), fc=nn.Linear(8, 64), out=nn.Linear(64, 2))
    with pytest.raises(ValueError, match="'fc' \\(Linear 8 -> 64\\) or 'out' \\(Linear 64 -> 2\\)"):
        heads(net)
    with pytest.raises(ValueError, match="ambiguous"):
        prunable(net)
    assert len(prunable(net, "open_lth")) == 2  # here the head does not matter
    assert flow(net, torch.ones(1, 8)) == ("out",)
    assert declare_head(net, lambda: net(torch.ones(1, 8)).sum()) == heads(net) == ("out",)
    assert list(prunable(net)) == ["fc.weight"]


def two_heads():
    net = Net(body=nn.Linear(4, 8), left=nn.Linear(8, 2), right=nn.Linear(8, 3))
    net.rule = lambda m, x: (m.left(m.body(x)), m.right(m.body(x)))
    return net


def test_several_heads():
    net, x = two_heads(), torch.ones(1, 4)
    with pytest.raises(ValueError, match="'left' .* or 'right'"):
        heads(net)
    assert flow(net, x) == ("left", "right")
    assert find_head(net, lambda: net(x)[0].sum()) == ("left",)  # a task that uses one of them
    declare_head(net, lambda: total(net(x)))
    assert list(prunable(net)) == ["body.weight"]
    assert {k: r for k, r in roles(net).items() if r == "head"}.keys() == {
        "left.weight",
        "left.bias",
        "right.weight",
        "right.bias",
    }


def test_towers_have_two_ends():
    "Their outputs are compared, and neither is behind the other"
    tower = lambda: chain(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    net = Net(lambda m, x: (m.left(x) * m.right(x)).sum(), left=tower(), right=tower())
    with pytest.raises(ValueError, match="'left.2' .* or 'right.2'"):
        heads(net)
    assert flow(net, torch.ones(1, 4)) == ("left.2", "right.2")
    siamese = Net(lambda m, x: (m.net(x) - m.net(-x)).pow(2), net=tower())
    assert heads(siamese) == flow(siamese, torch.ones(1, 4)) == ("net.2",)


def test_a_residual_stream_without_a_last_layer_is_ambiguous():
    net = Net(lambda m, x: x + m.b(x + m.a(x)) + m.a(x), a=linear(), b=linear())
    with pytest.raises(ValueError, match="'a' .* or 'b'"):
        flow(net, torch.ones(1, 4))
    chained = Net(lambda m, x: (m.a(x), m.b(m.a(x))), a=linear(), b=linear())
    with pytest.raises(ValueError, match="ambiguous"):
        flow(chained, torch.ones(1, 4))


def test_the_flow_where_layers_are_not_called():
    "Functional use of a matrix, own parameters, attention's output, lists and dicts of outputs"
    x = torch.ones(1, 3, 4)
    use = Net(lambda m, x: F.linear(m.body(x), m.out.weight), body=linear(), out=linear())
    assert flow(use, x) == ("out",)
    words = Net(
        lambda m, x: F.linear(m.body(m.words(x)), m.words.weight),
        words=nn.Embedding(5, 4),
        body=linear(),
    )
    assert flow(words, torch.zeros(1, 2, dtype=torch.long)) == ("words",)
    assert find_head(words, lambda: words(torch.zeros(1, 2, dtype=torch.long)).sum()) == ("words",)
    attention = Net(
        lambda m, x: m.mix(m.body(x), x, x)[0],
        body=linear(),
        mix=nn.MultiheadAttention(4, 2, batch_first=True),
    )
    assert flow(attention, x) == ("mix.out_proj",)
    recurrent = Net(
        lambda m, x: m.rnn(m.body(x)), body=linear(), rnn=nn.LSTM(4, 2, batch_first=True)
    )
    assert flow(recurrent, x) == ("rnn",)
    packed = Net(
        lambda m, x: m.rnn(nn.utils.rnn.pack_sequence([m.body(x)[0]]))[0],
        body=linear(),
        rnn=nn.GRU(4, 2),
    )
    assert find_head(packed, lambda: packed(x).data.sum()) == ("rnn",)
    with_dict = Net(lambda m, x: {"y": [m.b(m.a(x))]}, a=linear(), b=linear())
    assert find_head(with_dict, lambda: total(with_dict(x)["y"])) == ("b",)


class Own(nn.Module):
    "A matrix that is a plain parameter, at the output"

    def __init__(self):
        super().__init__()
        self.body, self.inner = nn.Linear(4, 4), nn.Module()
        self.inner.matrix = nn.Parameter(torch.ones(4, 2))

    def forward(self, x):
        return self.body(x) @ self.inner.matrix


def test_an_own_parameter_may_be_the_head():
    net = Own()
    assert flow(net, torch.ones(1, 4)) == ("inner",)
    declare_head(net, lambda: net(torch.ones(1, 4)).sum())
    assert list(prunable(net)) == ["body.weight"]


def raw(*shape):
    return nn.Parameter(torch.randn(shape, generator=generator(0, f"raw {shape}")))


def mixed(m, x):
    "Experts in one stack, of which two are used"
    return m.body(x) @ m.w[0] + m.body(x) @ m.w[1]


RAW_HEADS = {  # forward pass -> (own parameters, the head)
    "matmul": (lambda m, x: m.body(x) @ m.w, dict(w=(4, 2)), ("w",)),
    "linear": (lambda m, x: F.linear(m.body(x), m.w), dict(w=(2, 4)), ("w",)),
    "einsum": (lambda m, x: torch.einsum("bi,io->bo", m.body(x), m.w), dict(w=(4, 2)), ("w",)),
    "tensordot": (lambda m, x: torch.tensordot(m.body(x), m.w, 1), dict(w=(4, 2)), ("w",)),
    "addmm": (lambda m, x: torch.addmm(m.c, m.body(x), m.w), dict(w=(4, 2), c=(1, 2)), ("w",)),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.c, m.body(x)[None], m.w),
        dict(w=(1, 4, 2), c=(1, 1, 2)),
        ("w",),
    ),
    "conv": (lambda m, x: F.conv1d(m.body(x)[:, None], m.w), dict(w=(2, 1, 4)), ("w",)),
    "bilinear": (lambda m, x: F.bilinear(m.body(x), x, m.w), dict(w=(2, 4, 4)), ("w",)),
    "vector": (lambda m, x: m.body(x) @ m.w, dict(w=(4,)), ("w",)),
    "low rank": (lambda m, x: m.body(x) @ (m.u @ m.v), dict(u=(4, 1), v=(1, 4)), ("u", "v")),
    "cosine": (
        lambda m, x: F.linear(F.normalize(m.body(x)), F.normalize(m.w)),
        dict(w=(3, 4)),
        ("w",),
    ),
    "masked": (lambda m, x: m.body(x) @ (m.w * torch.ones(4, 2)), dict(w=(4, 2)), ("w",)),
    "experts": (mixed, dict(w=(2, 4, 2)), ("w",)),
}


@pytest.mark.parametrize("kind", RAW_HEADS)
def test_a_head_that_is_a_parameter_is_that_parameter_alone(kind):
    rule, shapes, head = RAW_HEADS[kind]
    net, x = Net(rule, body=linear(), **{k: raw(*s) for k, s in shapes.items()}), torch.ones(3, 4)
    assert flow(net, x) == head
    declare_head(net, lambda: total(net(x)))
    assert heads(net) == head and list(prunable(net)) == ["body.weight"]
    assert all(net.get_parameter(k).dim() < 2 or k in str(describe(net)) for k in shapes)
    assert {k for k, r in roles(net).items() if r == "head"} == set(head)


def test_a_parameter_in_a_list_is_told_from_its_neighbours():
    own = nn.ParameterList([raw(4, 4) for _ in range(12)])
    net = Net(lambda m, x: (m.body(x) @ m.own[10]).relu() @ m.own[1], body=linear(), own=own)
    assert flow(net, torch.ones(1, 4)) == ("own.1",)  # and own.10 is not below it
    declare_head(net, lambda: net(torch.ones(1, 4)).sum())
    assert [p.name for p in describe(net).dense["head"]] == ["own.1"]
    named = Net(
        lambda m, x: m.body(x) @ m.own["a"],
        body=linear(),
        own=nn.ParameterDict(dict(a=raw(4, 2), b=raw(4, 2))),
    )
    assert flow(named, torch.ones(1, 4)) == ("own.a",)


def test_a_parameter_that_shares_its_memory_is_known_by_it():
    net = Net(lambda m, x: m.body(x) @ m.out, body=linear(), last=linear())
    net.out = nn.Parameter(net.last.weight.data)
    assert flow(net, torch.ones(1, 4)) == ("out",)
    declare_head(net, lambda: net(torch.ones(1, 4)).sum())
    assert {k: len(o) for k, o in describe(net).dense.items()} == {"head": 1}
    net.rule = lambda m, x: m.last(x).relu() @ m.out
    with pytest.raises(ValueError, match="tied to an inner layer"):
        flow(net, torch.ones(1, 4))


def autoencoder():
    return Net(
        lambda m, x: F.linear(m.encoder(x).relu(), m.encoder.weight.t()), encoder=nn.Linear(4, 2)
    )


def test_a_head_that_is_tied_to_an_inner_layer_is_for_the_user_to_declare():
    x = torch.ones(1, 4)
    own = Net(lambda m, x: (m.body(x) @ m.w).relu() @ m.w.t(), body=linear(), w=raw(4, 2))
    for net, name in ((autoencoder(), "encoder.weight"), (own, "w")):
        with pytest.raises(ValueError, match=f"tied to an inner layer: .* is {name}, by which"):
            declare_head(net, lambda: net(x).sum())
    net = autoencoder()
    net.head_names = ("encoder",)  # both advices of the message
    assert declare_head(net, lambda: net(x).sum()) == ("encoder",)
    assert describe(net).dense.keys() == {"head"}
    net.head_names = ()
    assert declare_head(net, lambda: net(x).sum()) == () and list(prunable(net)) == [
        "encoder.weight"
    ]


def test_experts_in_stacks_are_left_dense_and_said_by_name():
    config = transformers.MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    net = transformers.MixtralForCausalLM(config)
    stacks = [k for k, p in net.named_parameters() if p.dim() == 3]
    said = str(describe(net))
    assert len(stacks) == 4 and all(k in said for k in stacks)
    many = nn.ModuleList(nn.ParameterList([raw(4, 4)]) for _ in range(12))
    assert "net.{0-11}.0 (12 tensors)" in str(describe(nn.ModuleDict(dict(net=many, a=linear()))))


def test_penalties_on_weights_are_no_part_of_the_flow():
    net, x = Net(lambda m, x: m.b(m.a(x)), a=linear(), b=linear()), torch.ones(1, 4)
    w = net.a.weight
    assert find_head(net, lambda: net(x).sum() + (w @ w.t() - torch.eye(4)).pow(2).sum()) == ("b",)
    vector = torch.ones(4)  # as in power iteration: these may be data
    loss = lambda: net(x).sum() + (w @ vector).pow(2).sum()
    with pytest.raises(ValueError, match="ambiguous: .*'a' .* or 'b'") as found:
        declare_head(net, loss)
    assert "let a batch decide" not in str(found.value)
    net.head_names = ("b",)  # what the message says
    assert declare_head(net, loss) == ("b",) and list(prunable(net)) == ["a.weight"]


@pytest.mark.parametrize(
    "names, says",
    [
        (("",), "has '', which is the whole network, so that nothing would be pruned"),
        (("a.wieght",), "has 'a.wieght', .*did you mean 'a.weight'"),
        (("nothing",), "has 'nothing', which is no module or parameter .*'a', 'b'"),
        ((nn.Linear(1, 1),), "has Linear.*Give names as in named_modules"),
        ((["a"],), r"has \['a'\], which is no module"),
    ],
)
def test_head_names_that_name_nothing_are_refused(names, says):
    net = nn.ModuleDict(dict(a=linear(), b=linear()))
    net.head_names = names
    for check in (heads, check_head_names, prunable, lambda net: declare_head(net, lambda: 1 / 0)):
        with pytest.raises(ValueError, match=says):
            check(net)
    layer = linear()
    layer.head_names = ("",)
    assert heads(layer) == ("",)  # a network of one layer
    net.head_names = ("b.weight",)
    assert heads(net) == ("b.weight",) and list(prunable(net)) == ["a.weight"]


class Cube(torch.autograd.Function):
    "A product that autograd knows nothing about"

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


def test_the_flow_through_odd_graphs():
    x = torch.ones(1, 4)
    custom = Net(lambda m, x: Cube.apply(m.a(x), m.b.weight), a=linear(), b=linear())
    assert flow(custom, x) == ("b",)
    point = lambda again: (
        lambda m, x: torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=again)
    )
    for again in (False, True):
        part = point(again)
        net = Net(lambda m, x: m.b(part(m, x)), a=linear(), b=linear())
        assert flow(net, x.clone().requires_grad_(True)) == ("b",)
    whole = Net(
        lambda m, x: torch.utils.checkpoint.checkpoint(
            lambda y: m.b(m.a(y)), x, use_reentrant=True
        ),
        a=linear(),
        b=linear(),
    )
    with pytest.raises(ValueError, match="no matrix of Net was met"):
        flow(whole, x.clone().requires_grad_(True))
    cast = Net(lambda m, x: m.b(m.a(x)), a=linear(), b=linear())
    with torch.autocast("cpu", torch.bfloat16):
        assert flow(cast, x) == ("b",)
    normed = Net(lambda m, x: m.b(m.a(x)), a=linear(), b=parametrizations.weight_norm(linear()))
    assert flow(normed, x) == ("b",)
    decayed = lambda: cast(x).sum() + sum(p.pow(2).sum() for p in cast.parameters())
    assert find_head(cast, decayed) == ("b",)
    assert find_head(cast, lambda: cast(x).sum() + penalty(cast)) == ("b",)
    wide = Net(
        lambda m, x: m.out(m.deep(x)) + m.wide(x.long()),
        deep=nn.Embedding(3, 4),
        wide=nn.Embedding(3, 1),
        out=linear(4, 1),
    )
    assert find_head(wide, lambda: wide(x.long()).sum()) == ("out",)  # a look-up is no product
    again = Net(lambda m, x: m.out(m.a(m.a(x))) + m.out(x), a=linear(), out=linear())
    assert flow(again, x) == ("out",)


def test_the_flow_in_frozen_and_switched_networks():
    x = torch.ones(2, 4)
    net = chain(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8), nn.Linear(8, 2))
    net[1].eval(), net[3].requires_grad_(False)
    assert flow(net, x) == ("4",)
    net[4].requires_grad_(False)
    assert flow(net, x) == ("4",)  # a fixed output is the output nevertheless
    net.requires_grad_(False)
    for find in (find_head, declare_head):
        with pytest.raises(ValueError, match="no gradient \\(8 of 8 parameters are frozen\\)"):
            find(Net(lambda m, x: m.net(x), net=net), lambda: net(x).sum())
    net.requires_grad_(True)
    net[0].weight.grad = torch.ones(8, 4)
    with torch.no_grad():
        assert find_head(net, lambda: net(x).sum()) == ("4",)
    assert (net[0].weight.grad == 1).all()
    fails = lambda: net(x).sum() / 0 + torch.ones(2) @ torch.ones(3)
    before = net[1].num_batches_tracked.clone()
    with pytest.raises(RuntimeError):
        find_head(net.train(), fails)
    assert net[1].num_batches_tracked == before and not net[0]._forward_hooks


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_flow_in_wrapped_networks(wrap):
    net = wrap(Net(lambda m, x: m.out(m.fc(x)), fc=nn.Linear(4, 8), out=nn.Linear(8, 2)))
    assert declare_head(net, lambda: net(torch.ones(1, 4)).sum()) == heads(net) == ("out",)
    assert unwrap(net).head_names == ("out",)


def test_what_the_network_says_comes_first():
    net = two_heads()
    net.head_names = "left"
    assert heads(net) == declare_head(net, None) == ("left",)
    parallel = nn.DataParallel(two_heads())
    parallel.head_names = ("module.right",)
    assert heads(parallel) == ("right",)
    net.head_names = ()
    assert heads(net) == () and len(prunable(net)) == 3
    net.head_names = ("lefd",)
    with pytest.raises(ValueError, match="did you mean 'left'"):
        heads(net)
    inside = Net(net=resnet("cifar_resnet8"))
    assert heads(inside) == ("net.fc",)


SMALL = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
SMALL |= dict(vocab_size=20)


def roberta():
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=20)
    return transformers.RobertaForSequenceClassification(config)


def distilbert():
    config = transformers.DistilBertConfig(
        dim=8, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=20
    )
    return transformers.DistilBertForSequenceClassification(config)


@pytest.mark.parametrize(
    "make, head",
    [(roberta, ("classifier",)), (distilbert, ("pre_classifier", "classifier"))],
)
def test_a_model_of_transformers_has_one_head_however_it_is_held(make, head):
    "A part of an own module, compiled, or twice for two towers"
    net = make()
    matrices = list(prunable(net))
    assert heads(net) == heads(torch.compile(net)) == head
    held = Net(lambda m, x: m.net(x).logits, net=net)
    assert heads(held) == tuple(f"net.{n}" for n in head)
    assert list(prunable(held)) == [f"net.{n}" for n in matrices]
    assert list(prunable(torch.compile(net))) == matrices
    x = torch.ones(1, 5, dtype=torch.long)
    assert declare_head(held, lambda: held(x).sum()) == tuple(f"net.{n}" for n in head)
    towers = nn.ModuleDict(dict(a=make(), b=make()))
    assert heads(towers) == tuple(f"{side}.{n}" for side in "ab" for n in head)


def test_a_base_model_of_transformers_inside_an_own_module():
    "What is beside the base model is the head if it is one layer; of several the data's last"
    config = transformers.BertConfig(**SMALL)
    base = lambda: transformers.BertModel(config)
    net = Net(bert=base(), drop=nn.Dropout(), out=nn.Linear(8, 2))
    assert heads(net) == ("out",) and len(prunable(net)) == 7
    rule = lambda m, x: m.out(m.hidden(m.bert(x).pooler_output))
    net = Net(rule, bert=base(), hidden=nn.Linear(8, 8), out=nn.Linear(8, 2))
    assert heads(net) == ("out",)
    assert find_head(net, lambda: net(torch.ones(1, 3, dtype=torch.long)).sum()) == ("out",)
    both = Net(net=roberta(), after=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'net.classifier' .* or 'after'"):
        heads(both)


def test_layers_of_a_sequential_follow_each_other():
    assert heads(chain(nn.Linear(4, 4), chain(nn.Linear(4, 4), nn.Linear(4, 3)))) == ("1.1",)
    lenet = nn.ModuleDict(dict(conv1=nn.Conv2d(1, 6, 5), conv2=nn.Conv2d(6, 16, 5)))
    lenet.update(dict(fc1=nn.Linear(400, 120), fc2=nn.Linear(120, 84), fc3=nn.Linear(84, 10)))
    assert heads(lenet) == ("fc3",)
    tagger = nn.ModuleDict(dict(words=nn.Embedding(5, 4), rnn=nn.LSTM(4, 8, bidirectional=True)))
    tagger["tags"] = nn.Linear(16, 3)
    assert heads(tagger) == ("tags",)
    assert heads(nn.ModuleDict(dict(words=nn.Embedding(5, 4)))) == ()
    assert heads(linear()) == ("",) and heads(nn.ReLU()) == ()


def test_a_new_head_for_another_task():
    net = torchvision.models.vgg11(num_classes=10, init_weights=False).to("meta")
    assert replace_head(net, 3).classifier[6].out_features == 3 and heads(net) == ("classifier.6",)
    wrapped = torch.compile(resnet("cifar_resnet8"))
    assert replace_head(wrapped, 3) is wrapped and unwrap(wrapped).fc.out_features == 3
    inner = nn.ModuleDict(dict(body=linear(), out=torch.compile(linear())))
    assert replace_head(inner, 3)["out"].out_features == 3
    held = Net(net=roberta())
    held.head_names = ("net.classifier.out_proj",)
    assert replace_head(held, 5).net.num_labels == 5 == held.net.config.num_labels
    with pytest.raises(ValueError, match="the head of BertModel is empty, not one nn.Linear"):
        replace_head(transformers.BertModel(transformers.BertConfig(**SMALL)), 3)
    with pytest.raises(ValueError, match="not one nn.Linear below it"):
        replace_head(linear(), 3)
    with pytest.raises(ValueError, match="the head of SqueezeNet is 'classifier.1' \\(Conv2d\\)"):
        replace_head(torchvision.models.squeezenet1_1().to("meta"), 3)


# ---------------------------------------------------------------- groups

TOWERS = {
    "two towers": ["left.layers.0.weight", "right.layers.0.weight"],
    "one inside": ["layers.0.weight", "extra.layers.0.weight"],
    "encoder and decoder": ["encoder.layers.0.fc1.weight", "decoder.layers.0.fc1.weight"],
    "t5": [
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight",
        "encoder.block.1.layer.0.SelfAttention.q.weight",
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
    ],
    "u-net": ["down.layer1.0.conv1.weight", "up.layer1.0.conv1.weight"],
    "list of towers": ["towers.0.layers.0.weight", "towers.1.layers.0.weight"],
    "two embeddings": ["a.embeddings.word.weight", "b.embeddings.word.weight"],
    "two poolers": ["a.pooler.dense.weight", "b.pooler.dense.weight"],
    "two outputs": ["fc.weight", "head.weight", "classifier.weight", "qa_outputs.weight"],
    "a part called as a label": ["conv1.weight", "stem.weight", "fc.weight", "pooler.weight"],
    "stages of stages": [f"stages.{i}.layers.0.conv.weight" for i in range(3)],
    "blocks of layers": [f"layers.0.blocks.{i}.fc.weight" for i in range(3)],
}


@pytest.mark.parametrize("by", [g for g in GROUPINGS if g not in ("stage", "role")])
@pytest.mark.parametrize("names", TOWERS.values(), ids=TOWERS)
def test_groups_never_merge_different_parts(names, by):
    found = groups(names, by)
    assert len(set(found.values())) == len(names) and list(found) == names


def test_coarse_groups_keep_towers_apart():
    "A stage joins layers, a role joins the queries of all layers; neither joins two towers"
    parts = "attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"
    for prefix in ("{}", "{}.encoder", "towers.{}.encoder", "{}.bert.encoder"):
        sides = [prefix.format(o) for o in ("0", "1") if prefix != "{}"] or ["a", "b"]
        names = [f"{s}.layer.{i}.{p}.weight" for s in sides for i in (0, 1, 10) for p in parts]
        role, stage = groups(names, "role"), groups(names, "stage")
        assert len(set(role.values())) == 8 and len(set(stage.values())) == 2
        side = {n: next(s for s in sides if n.startswith(f"{s}.")) for n in names}
        for found in (role, stage):
            owners = {g: {side[n] for n in names if found[n] == g} for g in found.values()}
            assert all(len(o) == 1 for o in owners.values())
        assert all(g.replace(" ", ".").startswith(side[n]) for n, g in stage.items())
    t5 = groups(TOWERS["t5"], "stage")
    assert set(t5.values()) == {"encoder", "decoder"}
    assert len(set(groups(TOWERS["encoder and decoder"], "stage").values())) == 2
    convs = [f"{s}.layer{i}.0.{c}.weight" for s in "ab" for i in (1, 2) for c in ("conv1", "conv2")]
    assert set(groups(convs, "role").values()) == {"a conv1", "a conv2", "b conv1", "b conv2"}
    assert set(groups(convs, "stage").values()) == {"a layer1", "a layer2", "b layer1", "b layer2"}
    short = [f"{s}.layer{i}.0.downsample.0.weight" for s in "ab" for i in (1, 2)]
    assert set(groups(short, "role").values()) == {"a shortcut", "b shortcut"}


def test_labels_of_our_own_networks_have_no_prefix():
    "Tables of results are read by them"
    net = prunable(resnet("cifar_resnet8"), "open_lth")
    blocks = ["stem", "layer1.0", "layer2.0", "layer3.0", "head"]
    assert list(dict.fromkeys(groups(net).values())) == blocks
    body = [f"backbone.body.{n}" for n in net if n.startswith("layer")]
    assert list(dict.fromkeys(groups(body).values())) == blocks[1:-1]
    layer = "bert.encoder.layer.{}.attention.self.query.weight"
    names = [layer.format(i) for i in (0, 1)] + ["bert.pooler.dense.weight", "classifier.weight"]
    assert list(groups(names).values()) == ["layer 0", "layer 1", "pooler", "head"]
    assert list(groups(names, "role").values()) == ["query", "query", "pooler", "head"]
    assert list(groups(names, "stage").values()) == ["encoder", "encoder", "pooler", "head"]
    assert list(groups(names, "part").values())[:2] == ["layer 0 query", "layer 1 query"]


def test_a_rule_that_needs_the_prefix_has_it_everywhere():
    "One sublayer of T5 that happens to be the only one with its number is no exception"
    found = groups(["encoder.block.0.layer.2.wi.weight", *TOWERS["t5"]])
    assert found["encoder.block.0.layer.2.wi.weight"] == "encoder.block.0 layer 2"
    assert groups(["encoder.block.0.layer.2.wi.weight"]) == {
        "encoder.block.0.layer.2.wi.weight": "layer 2"
    }


def test_own_rules_are_taken_at_their_word():
    names = ["left.layers.0.weight", "right.layers.0.weight", "all.weight"]
    assert list(groups(names, ((r"layers", "all"),)).values()) == ["all", "all", "all.weight"]
    with pytest.raises(ValueError, match="did you mean 'block'"):
        groups(names, "blocks")


def test_groups_of_vgg_are_its_layers():
    "Only the last of the layers called classifier is the output"
    net = torchvision.models.vgg11().to("meta")
    assert len(set(groups(prunable(net)).values())) == len(prunable(net)) == 10


# ---------------------------------------------------------------- architectures

VISION = {  # torchvision's name -> (weights pruned, tensors, head, share of matrix weights dense)
    "alexnet": (56_994_496, 7, "classifier.6", 0.0670),
    "vgg11": (128_755_392, 10, "classifier.6", 0.0308),
    "resnet18": (11_166_912, 20, "fc", 0.0438),
    "resnet50": (23_454_912, 53, "fc", 0.0803),
    "densenet121": (6_870_208, 120, "classifier", 0.1297),
    "squeezenet1_1": (719_552, 25, "classifier.1", 0.4157),
    "mobilenet_v2": (2_189_760, 52, "classifier.1", 0.3689),
    "mobilenet_v3_small": (1_501_832, 53, "classifier.3", 0.4054),
    "efficientnet_b0": (3_956_192, 81, "classifier.1", 0.2445),
    "shufflenet_v2_x1_0": (1_237_424, 56, "fc", 0.4528),
    "googlenet": (9_912_768, 61, "aux1.fc2, aux2.fc2, fc", 0.2366),
    "inception_v3": (24_307_040, 96, "AuxLogits.fc, fc", 0.1038),
    "regnet_y_400mf": (3_870_784, 85, "fc", 0.1021),
    "convnext_tiny": (27_756_000, 58, "classifier.2", 0.0272),
    "vit_b_16": (85_524_480, 49, "heads.head", 0.0106),
    "swin_t": (27_431_424, 52, "head", 0.0280),
    "maxvit_t": (30_245_056, 150, "classifier.5", 0.0176),
    "video.r3d_18": (33_156_672, 20, "fc", 0.0061),
    "segmentation.fcn_resnet50": (35_251_392, 55, "classifier.4, aux_classifier.4", 0.0005),
}
LANGUAGE = {  # model of transformers, as its own default config builds it -> the same
    "BertModel": (85_524_480, 73, "", 0.2180),
    "BertForSequenceClassification": (85_524_480, 73, "classifier", 0.2180),
    "BertForQuestionAnswering": (84_934_656, 72, "qa_outputs", 0.2191),
    "BertForMaskedLM": (84_934_656, 72, "cls", 0.2233),
    "RobertaForSequenceClassification": (84_934_656, 72, "classifier", 0.3179),
    "DistilBertForSequenceClassification": (42_467_328, 36, "pre_classifier, classifier", 0.3651),
    "AlbertForSequenceClassification": (218_628_096, 8, "classifier", 0.0176),
    "ElectraForSequenceClassification": (9_469_952, 73, "classifier", 0.2990),
    "GPT2LMHeadModel": (84_934_656, 48, "lm_head", 0.3168),
    "GPT2ForSequenceClassification": (84_934_656, 48, "score", 0.3168),
    "LlamaForCausalLM": (6_476_005_376, 224, "lm_head", 0.0389),
    "OPTForCausalLM": (84_934_656, 72, "lm_head", 0.3212),
    "T5ForConditionalGeneration": (44_040_192, 96, "lm_head", 0.2719),
    "T5EncoderModel": (18_874_368, 36, "", 0.4657),
    "BartForConditionalGeneration": (352_321_536, 192, "lm_head", 0.1320),
    "WhisperForConditionalGeneration": (17_049_600, 66, "proj_out", 0.5479),
    "ViTForImageClassification": (85_524_480, 73, "classifier", 0.0018),
    "SwinForImageClassification": (27_431_424, 76, "classifier", 0.0009),
    "ResNetForImageClassification": (23_454_912, 53, "classifier", 0.0002),
}
SHAPES = {"inception_v3": (2, 3, 299, 299), "video.r3d_18": (2, 3, 8, 64, 64)}
OPTIONS = dict.fromkeys(("googlenet", "inception_v3", "vgg11"), dict(init_weights=False))
OPTIONS["segmentation.fcn_resnet50"] = dict(weights_backbone=None, aux_loss=True)


def facts(net):
    found = describe(net)
    tensors = sum(p.pruned for p in found.parts)
    return found.pruned, tensors, ", ".join(found.head), round(1 - found.pruned / found.weights, 4)


@pytest.mark.parametrize("name", VISION)
def test_architectures_of_torchvision(name):
    "The head as the data flows, on the meta device: no weights, no computation"
    module, _, short = name.rpartition(".")
    place = getattr(torchvision.models, module) if module else torchvision.models
    net = getattr(place, short)(**OPTIONS.get(name, {})).to("meta")
    x = torch.zeros(SHAPES.get(name, (2, 3, 224, 224)), device="meta")
    head = find_head(net, lambda: total(net(x)))
    if len(head) == 1:
        assert heads(net) == head  # names say the same
    else:
        with pytest.raises(ValueError, match="ambiguous"):
            heads(net)
    net.head_names = head
    assert facts(net) == VISION[name]
    assert len(set(groups(prunable(net), "tensor").values())) == VISION[name][1]


@pytest.mark.parametrize("name", LANGUAGE)
def test_architectures_of_transformers(name):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        net = kind(kind.config_class())
    assert facts(net) == LANGUAGE[name]
    held = Net(net=net)
    assert facts(held)[:2] == LANGUAGE[name][:2] or not heads(net)


def test_experts_and_weight_norm_of_transformers_are_named():
    "Parameters that transformers' own code multiplies by are left dense; wav2vec's norm is refused"
    config = transformers.MixtralConfig(**SMALL, num_local_experts=2, num_key_value_heads=2)
    with torch.device("meta"):
        found = describe(transformers.MixtralForCausalLM(config))
        hubert = transformers.HubertForCTC(transformers.HubertConfig())
    assert any(p.name.endswith("experts.down_proj") for p in found.dense["own parameter"])
    with pytest.raises(ValueError, match="pos_conv_embed.conv.weight is computed .* parametrize"):
        prunable(hubert)


@pytest.mark.parametrize("kind", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_heads_of_detectors(kind):
    "A detector has several outputs: names cannot tell, the losses do"
    make = getattr(torchvision.models.detection, kind)
    net = make(weights_backbone=None, num_classes=3, min_size=64, max_size=64)
    with pytest.raises(ValueError, match="ambiguous"):
        heads(net)
    target = dict(boxes=torch.tensor([[1.0, 1, 40, 40]]), labels=torch.tensor([1]))
    outputs = find_head(net, lambda: total(net([torch.rand(3, 64, 64)], [target])))
    last = [name.rpartition(".")[2] for name in outputs]
    if kind.startswith("faster"):
        assert last == ["cls_logits", "bbox_pred", "cls_score", "bbox_pred"]
    else:
        assert last == ["cls_logits", "bbox_reg"]


# ---------------------------------------------------------------- distributed wrappers


def test_distributed_data_parallel_and_checkpoint_wrapper(tmp_path):
    import torch.distributed as dist
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = chain(linear(), linear())
        net = nn.parallel.DistributedDataParallel(plain)
        assert unwrap(net) is plain and same(state(net), state(plain))
        assert heads(net) == flow(net, torch.ones(1, 4)) == ("1",)
        assert list(prunable(torch.compile(net))) == ["0.weight"]
    finally:
        dist.destroy_process_group()
    net = chain(checkpoint_wrapper(linear()), linear())
    assert list(state(net)) == ["0.weight", "1.weight"] and list(prunable(net)) == ["0.weight"]
    assert flow(net, torch.ones(1, 4).requires_grad_(True)) == ("1",)
