"""Build a site from the notebooks as they are committed: python .ci/site.py [FOLDER]   (_site by default)

A page for each notebook, the index first. Nothing is executed, and a reader's browser fetches nothing from elsewhere: formulas are MathML,
figures lie in their page, there is no script. Hidden cells are left out, directive lines too; links between notebooks become links between pages."""

import os
import re
import shutil
import sys
from configparser import ConfigParser
from html import escape, unescape
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from links import NBS, order
from nbconvert.filters import Highlight2HTML, ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from readme import split, visible

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "0": "Theory",
    "1": "Networks and tasks",
    "19": "Pruning",
    "3": "Flows",
    "39": "Running studies",
    "5": "Results",
    "e": "Experiments",
}  # each begins at a name
BIG = re.compile(
    r"\\[bB]igg?[lr]?\\([lr])(?=angle|floor|ceil|Vert)"
)  # latex2mathml knows \Big( but not \Big\langle
WORDS = r"(?:ln|exp|a?r?sinh|a?r?cosh|tanh|coth|sin|cos|max|min)"
MENDED = [
    (' xmlns=""', ""),
    ("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>"),
    (
        r'<mo(?: stretchy="false")?>(&#x0007C;|&#x02016;)</mo>',
        r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>',
    ),
    (
        rf'<mi>({WORDS})</mi>(?=<mo stretchy="false">&#x00028;)',
        r'<mo lspace="0.12em" rspace="0">\1</mo>',
    ),
    (rf"<mi>({WORDS})</mi>", r'<mo lspace="0.12em" rspace="0.167em">\1</mo>'),
]  # what it sets badly: ~, |x|, ln x
code = Highlight2HTML(pygments_lexer="python")


def settings():
    "What settings.ini says"
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def group(path):
    return [title for start, title in GROUPS.items() if str(path) >= start][-1]


def page(path):
    return path.with_suffix(".html")


def relative(to, path):
    return Path(os.path.relpath(to, path.parent)).as_posix()


def mathml(tex, display="inline"):
    "A formula"
    text = convert(
        BIG.sub(lambda m: rf"\{dict(l='left', r='right')[m[1]]}\{m[1]}", tex),
        display=display,
        xmlns="",
    )
    for old, new in MENDED:
        text = re.sub(old, new, text)
    return text


class Renderer(IPythonRenderer):
    "Markdown as Jupyter has it, with formulas in MathML"

    def __init__(self):
        super().__init__(escape=False, anchor_link_text="#")

    def inline_math(self, body):
        return mathml(body)

    def block_math(self, body):
        return f'<span class="formula">{mathml(body, "block")}</span>'

    def latex_environment(self, name, body):
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")


def markdown(text):
    "Markdown as HTML; a formula stays with the comma after it"
    return re.sub(
        r"(<math(?:(?!</math>).)*</math>[.,;:)?]+)",
        r'<span class="whole">\1</span>',
        MarkdownWithMath(renderer=Renderer()).render(text),
        flags=re.S,
    )


def output(o, title):
    "One output of a cell, in the richest form that can be shown"
    if o.output_type in ("stream", "error"):
        return f"<pre>{ansi2html(o.text if o.output_type == 'stream' else chr(10).join(o.traceback))}</pre>"
    if "image/png" in o.data:
        return f'<img src="data:image/png;base64,{o.data["image/png"].strip()}" alt="figure of {escape(title)}">'
    if "text/html" in o.data:
        return re.sub("<style.*?</style>", "", o.data["text/html"], flags=re.S)
    if "text/markdown" in o.data:
        return markdown(o.data["text/markdown"])
    return f"<pre>{ansi2html(o.data['text/plain'])}</pre>"


class Site:
    "The pages, and what they link to"

    def __init__(self, folder):
        self.folder, self.settings, self.paths = (
            Path(folder),
            settings(),
            [p.relative_to(NBS) for p in order()],
        )
        self.cells = {p: nbformat.read(NBS / p, 4).cells for p in self.paths}
        self.titles = {
            p: re.search(
                r"^# (.+)", "\n".join(c.source for c in cells if c.cell_type == "markdown"), re.M
            )[1]
            for p, cells in self.cells.items()
        }
        self.names = {p.stem: p for p in self.paths if p.stem != "index"}

    def link(self, path, target):
        "Where a link of the notebook at `path` leads; files of nbs/ that are no notebooks go along, others are shown where the source is"
        name, _, anchor = target.partition("#")
        if re.match(r"\w+:", target) or not name:
            return target
        full = Path(os.path.normpath((NBS / path).parent / name))
        if not full.exists():
            raise ValueError(f"{path}: the link to {target} leads nowhere")
        if full.is_dir() or not full.is_relative_to(NBS):
            return f"{self.settings['git_url']}/blob/{self.settings['branch']}/{full.relative_to(ROOT).as_posix()}"
        to = full.relative_to(NBS)
        if to.suffix == ".ipynb":
            to = page(to)
        else:
            (self.folder / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(full, self.folder / to)
        return relative(to, path) + ("#" + anchor if anchor else "")

    def named(self, path, text):
        "Markdown in which names of notebooks are links to them"
        to = lambda m: (
            f"[{m[0]}]({relative(self.names[m[1]], path)})"
            if m[1] in self.names and m[1] != path.stem
            else m[0]
        )
        return re.sub(r"(?<![\[`])`(\w+)`(?![\]`])", to, text)

    def cell(self, path, c):
        "One cell, in a section of its own; nothing if it is hidden"
        exported = c.cell_type == "code" and "export" in split(c.source)[0]
        if "links" in c.metadata.get("tags", []) or not list(visible([c])):
            return ""
        if c.cell_type == "markdown":
            return f'<section class="text">{markdown(self.named(path, c.source))}</section>\n'
        source = "" if c.metadata.get("transient") else code(c.source)
        outputs = "".join(
            f'<div class="output">{output(o, self.titles[path])}</div>' for o in c.outputs
        )
        return f'<section class="code{" export" * exported}">{source}{outputs}</section>\n'

    def content(self, path):
        "The notebook as HTML"
        text = "".join(self.cell(path, c) for c in self.cells[path])
        text = re.sub(
            r'(<(?:a|img)\b[^>]*?\b(?:href|src)=")(?!data:)([^"]*)',
            lambda m: m[1] + escape(self.link(path, unescape(m[2]))),
            text,
        )
        return re.sub(r"(<table.*?</table>)", r'<div class="table">\1</div>', text, flags=re.S)

    def sidebar(self, path):
        "All pages by group, the present group open"
        parts = {}
        for p in self.paths[1:]:
            number = re.match(r"(?:(\d+[a-z]?)_)?", p.name)[1] or ""
            link = f'<a href="{relative(page(p), path)}"{" aria-current=page" * (p == path)}><span>{number}</span>{escape(self.titles[p])}</a>'
            parts.setdefault(group(p), []).append(link)
        shown = lambda g: " open" * (path.stem == "index" or group(path) == g)
        return "".join(
            f"<details{shown(g)}><summary>{g}</summary>{''.join(links)}</details>"
            for g, links in parts.items()
        )

    def near(self, path):
        "Links to the pages before and after"
        i = self.paths.index(path)
        before, after = (
            self.paths[k] if 0 <= k < len(self.paths) else None for k in (i - 1, i + 1)
        )
        to = lambda p, rel, text: (
            f'<a rel="{rel}" href="{relative(page(p), path)}">{escape(text)}</a>'
            if p
            else "<span></span>"
        )
        return to(before, "prev", before and f"← {self.titles[before]}") + to(
            after, "next", after and f"{self.titles[after]} →"
        )

    def page(self, path):
        "A whole page"
        s, home = self.settings, relative(".", path)
        title = s["title"] if path.stem == "index" else f"{self.titles[path]} · {s['title']}"
        return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>
<meta name="description" content="{escape(s["description"])}"><link rel="stylesheet" href="{home}/site.css">
<link rel="canonical" href="{s["doc_host"]}{s["doc_baseurl"]}/{page(path).as_posix()}"></head>
<body>
<input type="checkbox" id="menu"><label for="menu">☰ <b>{s["title"]}</b></label>
<nav><a class="home" href="{home}/index.html">{s["title"]}</a>{self.sidebar(path)}</nav>
<main>
{self.content(path)}<footer><div>{self.near(path)}</div>
<p>Made from <a href="{s["git_url"]}/blob/{s["branch"]}/nbs/{path.as_posix()}">{path.name}</a>. Code with a blue edge is the package itself.</p></footer>
</main></body></html>
"""

    def write(self):
        "Everything, into the folder, which is emptied first"
        if (
            self.folder.exists()
            and any(self.folder.iterdir())
            and not (self.folder / "site.css").exists()
        ):
            raise SystemExit(
                f"{self.folder} holds something that is not a site; choose another folder"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        for p in self.paths:
            to = self.folder / page(p)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(self.page(p), encoding="utf-8")
        light, dark = (
            HtmlFormatter(style=style).get_style_defs(".highlight")
            for style in ("default", "github-dark")
        )
        css = Path(__file__).with_name("site.css").read_text(encoding="utf-8")
        (self.folder / "site.css").write_text(
            f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{css}", encoding="utf-8"
        )


if __name__ == "__main__":
    Site(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_site").write()
