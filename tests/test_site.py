"The site that .ci/site.py makes: everything a reader should see is there, every link leads somewhere, nothing comes from elsewhere"

import html, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import nbformat
import pytest

for needed in ("nbconvert", "latex2mathml"):
    pytest.importorskip(needed, reason=f"{needed} is missing: pip install -e '.[dev]'")
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p.relative_to(ROOT / "nbs")
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not {"runs", ".ipynb_checkpoints"} & set(p.parts)
)
DIRECTIVE = re.compile(r"^#\s*\|.*$", re.M)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, ".ci/site.py", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


class Reader(HTMLParser):
    "Links, anchors and loaded things of a page"

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.loaded, self.tags = [], set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if "id" in attrs:
            self.ids.add(attrs["id"])
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        if attrs.get("rel") != "canonical" and tag != "a":
            self.loaded += [attrs[k] for k in ("src", "href") if k in attrs]


def words(text):
    return "".join(text.split())


def visible(path):
    return [
        c
        for c in nbformat.read(ROOT / "nbs" / path, 4).cells
        if c.cell_type != "raw" and "links" not in c.metadata.get("tags", [])
    ]


def hidden(c):
    return c.cell_type == "code" and re.search(r"^#\s*\|\s*(hide|default_exp)\b", c.source, re.M)


def page(site, path):
    return (site / path.with_suffix(".html")).read_text(encoding="utf-8")


def test_every_link_and_image_leads_somewhere(site):
    pages = {p.resolve(): Reader(p) for p in site.rglob("*.html")}
    assert len(pages) == len(NOTEBOOKS)
    count = 0
    for p, reader in pages.items():
        for target in [
            o for o in reader.links + reader.loaded if not re.match(r"(https?|mailto|data):", o)
        ]:
            name, _, anchor = target.partition("#")
            to = (p.parent / unquote(name)).resolve() if name else p
            assert to.is_file() and to.is_relative_to(site.resolve()), (
                f"{p.name}: {target} leads nowhere"
            )
            assert not anchor or unquote(anchor) in pages[to].ids, (
                f"{p.name}: {target} has no such place"
            )
            count += 1
    print(f"{len(pages)} pages, {count} links")


def test_nothing_is_fetched_from_elsewhere(site):
    for p in site.rglob("*.html"):
        reader = Reader(p)
        assert "script" not in reader.tags and not [
            o for o in reader.loaded if re.match(r"https?:|//", o)
        ], p.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_is_lost(path, site):
    text = page(site, path)
    plain = words(html.unescape(re.sub("<[^>]*>", "", text)))
    shown = [
        c
        for c in visible(path)
        if not hidden(c)
        and (c.cell_type == "markdown" or DIRECTIVE.sub("", c.source).strip() or c.outputs)
    ]
    assert text.count("<section") == len(shown)
    figures = 0
    for c in shown:
        if c.cell_type == "markdown":
            continue
        if "echo: false" not in c.source:
            assert words(DIRECTIVE.sub("", c.source)) in plain, c.source[:80]
        figures += sum("image/png" in o.get("data", {}) for o in c.outputs)
        for o in c.outputs:
            if o.output_type == "stream":
                assert words(re.sub(r"\x1b\[[\d;]*\w", "", o.text)) in plain, o.text[:80]
    assert text.count('src="data:image/png') == figures
    assert not re.search(r"#\s*\|\s*(export|hide|default_exp|slow|cuda|eval|echo)\b", plain), (
        "a directive is shown"
    )
    for c in visible(path):
        if hidden(c) and len(source := words(DIRECTIVE.sub("", c.source))) > 20:
            assert source not in plain, "a hidden cell is shown"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_formulas_are_set(path, site):
    "As many as there are, and none with a command that was not understood"
    prose = "\n".join(
        re.sub(r"```.*?```|``.*?``|`[^`\n]*`", "", c.source, flags=re.S)
        for c in visible(path)
        if c.cell_type == "markdown"
    )
    set_ = re.findall(r"<math\b.*?</math>", page(site, path), re.S)
    assert len(set_) >= len(re.findall(r"\$\$.+?\$\$|\$[^$]+?\$", prose, re.S))
    assert not [m for m in set_ if "\\" in re.sub("<[^>]*>", "", m)]


def test_a_broken_link_is_refused(tmp_path):
    "The builder itself can fail"
    (tmp_path / ".ci").mkdir()
    (tmp_path / "nbs").mkdir()
    for name in ("site.py", "site.css", "links.py", "readme.py"):
        (tmp_path / ".ci" / name).write_bytes((ROOT / ".ci" / name).read_bytes())
    (tmp_path / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A\n[b](b.ipynb)")]),
        tmp_path / "nbs" / "index.ipynb",
    )
    done = subprocess.run(
        [sys.executable, ".ci/site.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode and "the link to b.ipynb leads nowhere" in done.stderr
