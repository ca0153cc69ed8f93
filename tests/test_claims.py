"Numbers in prose: each one in the result pages and the index is printed by a cell there, set in an experiment, or accounted for below"

import copy, json, re
from pathlib import Path
import pytest

NBS = Path(__file__).parents[1] / "nbs"
PAGES = [*sorted(NBS.glob("5?_*.ipynb")), NBS / "index.ipynb"]
NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?(?!\w)")
NOT_CLAIMS = re.compile(
    r"\b(?:19|20)\d\d\b|`[^`]*`|\]\([^)]*\)|```.*?```|\$[^$]*\$", re.S
)  # years, code, links, formulas
ACCOUNTED = {  # (page, number) -> where it is from
    ("50_resnet", "78"): "wall time, read off the log of the run",
    (
        "50_resnet",
        "77,000",
    ): "prunable weights of a ResNet-8 of width 16, tested in 12_prunable's table",
    ("50_resnet", "5,040"): "7!, all orders of seven tasks",
    ("51_bert", "250"): "the pilot, which was not kept",
    ("51_bert", "25"): ".75 removed, an arithmetic schedule of bert_imp's variant",
    ("51_bert", "1.05"): "ratio of two distances by role, asserted in the cell above",
    ("56_scale", "19,144"): "prunable weights of a ResNet-8 of width 8, asked of `rates` there",
    ("56_scale", "7,360"): "64 x 40 + 3 x 40 x 40, the head apart",
    ("54_benchmarks", "768"): "pictures, set in a cell there",
    ("54_benchmarks", "54"): "prunable tensors of a ResNet-50",
    ("54_benchmarks", "65,000"): "2**16, tried and not kept",
    ("54_benchmarks", "262,000"): "2**18, `selection`'s chunk",
}
ALWAYS = {
    "95": "the level of every interval",
    "3.10": "min_python",
    "3.13": "the newest Python that is tested",
}


def numbers(text):
    "(as written, absolute value, digits after the point) of each number"
    found = [m.group().replace("−", "-").rstrip(".,") for m in NUMBER.finditer(text)]
    return [
        (s.lstrip("+-"), abs(float(s.replace(",", ""))), len(s.partition("e")[0].partition(".")[2]))
        for s in found
        if s not in ("", "-", "+")
    ]


def source(cell):
    return "".join(cell["source"])


def printed(nb):
    "Everything the cells of a notebook print"
    outputs = [o for c in nb["cells"] if c["cell_type"] == "code" for o in c.get("outputs", [])]
    return "\n".join(
        "".join(o.get("text", []))
        + "".join("".join(v) for k, v in o.get("data", {}).items() if k.startswith("text/"))
        for o in outputs
    )


@pytest.fixture(scope="module")
def protocol():
    "Numbers that experiments set"
    code = [
        source(c)
        for p in (NBS / "experiments").glob("*.ipynb")
        for c in json.loads(p.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    ]
    return [
        v
        for text in [*code, (NBS.parent / "rg_tickets" / "studies.py").read_text(encoding="utf-8")]
        for _, v, _ in numbers(text)
    ]


def unfounded(nb, name, protocol):
    "Numbers of the prose that nothing stands behind, each with some words around it; a share may be told in percent"
    behind = [v for _, v, _ in numbers(printed(nb))] + protocol
    for cell in nb["cells"]:
        if cell["cell_type"] != "markdown" or "links" in cell["metadata"].get("tags", []):
            continue
        for written, value, digits in numbers(NOT_CLAIMS.sub(" ", source(cell))):
            if written in ALWAYS or (name, written) in ACCOUNTED:
                continue
            if not any(
                abs(value - v * k) <= 0.5 * 10.0**-digits + 1e-9 for v in behind for k in (1, 100)
            ):
                yield written, source(cell)[:60]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_numbers_in_prose_are_computed(path, protocol):
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert list(unfounded(nb, path.stem, protocol)) == [], (
        "print it in a cell, or say in ACCOUNTED where it is from"
    )


def test_a_number_that_is_no_longer_computed_is_found(protocol):
    nb = json.loads((NBS / "52_elastic.ipynb").read_text(encoding="utf-8"))
    said = copy.deepcopy(nb)
    for c in nb["cells"]:
        c["outputs"] = []
    assert [n for n, _ in unfounded(nb, "52_elastic", protocol)] == [
        "8.5"
    ]  # the mean rank of a blind choice
    said["cells"].append(dict(cell_type="markdown", metadata={}, source=["The gap is 0.98765."]))
    assert [n for n, _ in unfounded(said, "52_elastic", protocol)] == ["0.98765"]


def test_nothing_is_accounted_for_in_vain():
    said = {
        (p.stem, n)
        for p in PAGES
        for c in json.loads(p.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "markdown"
        for n, _, _ in numbers(NOT_CLAIMS.sub(" ", source(c)))
    }
    assert ACCOUNTED.keys() <= said and ALWAYS.keys() <= {n for _, n in said}


@pytest.mark.parametrize("path", sorted((NBS / "results").glob("*.csv")), ids=lambda p: p.stem)
def test_every_table_is_read_by_a_page(path):
    "A table in nbs/results that no notebook reads would be a claim that nobody can check"
    families = {"elastic_long_": "elastic_", "elastic_": ""}
    names = {path.stem} | {path.stem.removeprefix(k) for k in families if path.stem.startswith(k)}
    text = "\n".join(
        source(c)
        for p in NBS.glob("*.ipynb")
        for c in json.loads(p.read_text(encoding="utf-8"))["cells"]
    )
    assert any(re.search(rf"[\"'/}}]{re.escape(n)}(?:[\"']|\.csv)", text) for n in names)
