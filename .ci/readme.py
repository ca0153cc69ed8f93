"""Build README.md from nbs/index.ipynb: python .ci/readme.py [--check]

Hidden cells and links to neighbours are dropped, directive lines removed, figures written to nbs/figures/. With --check nothing is written and the
exit status says whether README.md is current."""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\S+?)(?::|\s|$)\s*(.*)$")


def split(source):
    "The directives a cell begins with, and what follows them"
    lines = source.splitlines()
    n = next(
        (i for i, line in enumerate(lines) if line.strip() and not DIRECTIVE.match(line)),
        len(lines),
    )
    return {m[1]: m[2].strip() for m in map(DIRECTIVE.match, lines[:n]) if m}, "\n".join(lines[n:])


def visible(cells):
    "The cells a reader of the README sees"
    for cell in cells:
        if cell.cell_type == "raw" or "links" in cell.metadata.get("tags", []):
            continue
        if cell.cell_type == "code":
            directives, cell.source = split(cell.source)
            if directives.keys() & {"hide", "default_exp"} or not (cell.source or cell.outputs):
                continue
            if directives.get("echo") == "false":
                cell.metadata["transient"] = {"remove_source": True}
        yield cell


def build():
    "The text of README.md, and its figures as path -> bytes"
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    nb.metadata["language_info"] = {
        "name": "python"
    }  # the cleaner takes it out; without it code blocks have no language
    nb.cells = list(visible(nb.cells))
    text, resources = MarkdownExporter(exclude_input_prompt=True).from_notebook_node(
        nb, {"output_files_dir": "nbs/figures", "unique_key": "index"}
    )
    text = re.sub(r"\]\((?!\w+:|#|\.\./)([^()]+\.ipynb)", r"](nbs/\1", text).replace(
        "](../", "]("
    )  # the notebook is in nbs/, README.md above it
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip() + "\n"
    return (
        "<!-- built from nbs/index.ipynb by .ci/readme.py; edit the notebook -->\n\n" + text,
        resources["outputs"],
    )


def main(check):
    text, figures = build()
    files = {ROOT / "README.md": text.encode(), **{ROOT / k: v for k, v in figures.items()}}
    stale = [
        str(p.relative_to(ROOT))
        for p, content in files.items()
        if not p.exists() or p.read_bytes() != content
    ]
    if check:
        return f"not current: {', '.join(stale)}; run: python .ci/readme.py" if stale else 0
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    sys.exit(main(parser.parse_args().check))
