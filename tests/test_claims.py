"""Numbers in prose: each one is printed by a cell of its page, set in an experiment, or accounted for below.

Pages that teach may also use the numbers that their code sets, and whole numbers up to a dozen. Where a page states in
bold that something is the same, equal, preserved or not there, a number stands beside it."""

import copy, json, re
from pathlib import Path
import pytest

NBS = Path(__file__).parents[1] / "nbs"
PAGES = [*sorted(NBS.glob("5?_*.ipynb")), NBS / "index.ipynb"]
LESSONS = sorted(NBS.glob("[0-3]*.ipynb"))
CLAIMS = re.compile(
    r"\b(?:same|preserve[sd]?|equal|identical|unchanged|no (?:difference|effect|trend|growth)|cannot be told)\b",
    re.I,
)
RESULTS = [
    *PAGES,
    *(
        NBS / f"{o}.ipynb"
        for o in ("23a_dictionary", "30_flows", "30a_diagonal", "31_transfer", "32c_overlap")
    ),
]
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
    ("51_bert", "250"): "the pilot, which was not kept",
    ("51_bert", "25"): ".75 removed, an arithmetic schedule of bert_imp's variant",
    ("51_bert", "1.05"): "ratio of two distances by role, asserted in the cell above",
    ("56_scale", "19,144"): "prunable weights of a ResNet-8 of width 8, asked of `rates` there",
    ("56_scale", "7,360"): "64 x 40 + 3 x 40 x 40, the head apart",
    ("54_benchmarks", "768"): "pictures, set in a cell there",
    ("54_benchmarks", "54"): "prunable tensors of a ResNet-50",
    ("54_benchmarks", "65,000"): "2**16, tried and not kept",
    ("54_benchmarks", "262,000"): "2**18, `selection`'s chunk",
    ("00_basics", "256"): "bits of SHA-256",
    ("00a_figures", "2.3"): "the just noticeable difference in CIELAB, Mahy et al. 1994",
    ("00b_statistics", "2.5"): "t quantile over sqrt(3), asked for in the cell above",
    ("00b_statistics", "42"): "7 x 6 pairs",
    ("01_rg", "0.326"): "beta of the 3D Ising class, from the literature",
    ("01a_trajectories", "252"): "10 over 5",
    ("02_ising", "65,536"): "2**16",
    (
        "10_resnets",
        "269,722",
    ): "parameters without projections, He et al. 2016 as counted by others",
    ("12_prunable", "25.5"): "million weights of a ResNet-50 with its head",
    ("12_prunable", "23.4"): "the same without first convolution and head",
    ("12_prunable", "272,474"): "parameters of ResNet-20, tested in 10_resnets",
    ("12_prunable", "1,568"): "parameters of its BatchNorm, two per channel",
    ("12a_pretrained", "18"): "the depth of a ResNet",
    ("13a_embedded", "1797"): "pictures in scikit-learn's digits, tested there",
    ("13a_embedded", "17"): "grey levels of these",
    ("13a_embedded", "3.11"): "a version of matplotlib, and of Python",
    ("14a_voc", "0.1"): "the step of the recalls before 2010",
    ("16_text", "522"): "of the 30 522 word pieces of BERT",
    ("19_selection", "65,536"): "2**16",
    ("20_masks", "254"): "the largest round, one less than alive",
    ("22_train", "2.15"): "a version of torch",
    ("22_train", "48"): "pixels, the size at which torch crashes",
    ("22_train", "480"): "a step of the example",
    ("22a_rewind", "50"): "the depth of a ResNet",
    ("23b_replicas", "2.5"): "a bound that the cell for a GPU asserts",
    ("24_free", "85.5"): "million prunable weights of BERT-base, counted in 12_prunable",
    ("24_free", "576"): "64 x 3 x 3",
    ("24_free", ".66"): "range of the exponents, read off the table above",
    ("30_flows", "1.96"): "the normal quantile",
    ("30a_diagonal", "36"): "12 x 3",
    ("30a_diagonal", "24"): "12 x 2",
    ("30a_diagonal", "34"): "percent, from the ratios of the table above",
    ("31_transfer", "17.5"): "a quarter of 70",
    ("32_elastic", "18"): "the depth of a ResNet",
    ("32a_uniformity", ".89"): "8 / 9",
    ("32c_overlap", ".68"): "found in an exploration that is not kept",
    ("32c_overlap", ".001"): "the same exploration",
    ("33a_prediction", "120"): "5!",
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


def set_in_code(nb):
    "Numbers that the cells of a lesson set, and those one can count on one's fingers"
    code = [source(c) for c in nb["cells"] if c["cell_type"] == "code"]
    return [v for text in code for _, v, _ in numbers(text)] + list(range(13))


@pytest.mark.parametrize("path", [*PAGES, *LESSONS], ids=lambda p: p.stem)
def test_numbers_in_prose_are_computed(path, protocol):
    nb = json.loads(path.read_text(encoding="utf-8"))
    behind = protocol + (set_in_code(nb) if path in LESSONS else [])
    assert list(unfounded(nb, path.stem, behind)) == [], (
        "print it in a cell, or say in ACCOUNTED where it is from"
    )


def test_a_number_that_is_no_longer_computed_is_found(protocol):
    nb = json.loads((NBS / "52_elastic.ipynb").read_text(encoding="utf-8"))
    said = copy.deepcopy(nb)
    for c in nb["cells"]:
        c["outputs"] = []
    assert "8.5" in [n for n, _ in unfounded(nb, "52_elastic", protocol)]  # a blind choice's rank
    said["cells"].append(dict(cell_type="markdown", metadata={}, source=["The gap is 0.98765."]))
    assert [n for n, _ in unfounded(said, "52_elastic", protocol)] == ["0.98765"]


def test_nothing_is_accounted_for_in_vain():
    said = {
        (p.stem, n)
        for p in [*PAGES, *LESSONS]
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


def bare_claims(nb):
    "Bold statements, not terms, that something is the same or is not there, without a number"
    for cell in nb["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        for line in NOT_CLAIMS.sub(" ", source(cell)).splitlines():
            statements = [o for o in re.findall(r"\*\*(.+?)\*\*", line) if len(o.split()) > 3]
            if statements and CLAIMS.search(line) and not numbers(line):
                yield line


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_where_it_says_same_a_number_stands_beside_it(path):
    assert list(bare_claims(json.loads(path.read_text(encoding="utf-8")))) == []


def test_a_bare_claim_is_found():
    cell = dict(
        cell_type="markdown", metadata={}, source=["* **All flows are the same** everywhere."]
    )
    assert len(list(bare_claims(dict(cells=[cell])))) == 1
    cell["source"] = ["* **All flows are the same** within .01 [-.01, .02]."]
    assert list(bare_claims(dict(cells=[cell]))) == []
