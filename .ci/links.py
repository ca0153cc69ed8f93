"""Put links to the notebook before, the contents and the notebook after at the top and the bottom of every notebook: python .ci/links.py [--check]

The reading order is the numbers', then the experiments by family. The two cells carry the tag `links`; with --check nothing is written and the
exit status says whether they are current."""

import argparse
import os
import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parent.parent / "nbs"
EXPERIMENTS = [
    f"{family}_{what}"
    for family in ("resnet", "bert", "elastic")
    for what in ("pretrain", "imp", "transfer")
]


def order():
    "All notebooks, as they are read"
    rank = {name: i for i, name in enumerate(EXPERIMENTS)}
    chapters = sorted(p for p in NBS.glob("*.ipynb") if p.stem != "index")
    experiments = sorted(
        (NBS / "experiments").glob("*.ipynb"), key=lambda p: (rank.get(p.stem, len(rank)), p.stem)
    )
    return [
        NBS / "index.ipynb",
        *chapters,
        *experiments,
        *sorted((NBS / "experiments" / "reports").glob("*.ipynb")),
    ]


def links(before, here, after):
    "One line of Markdown"
    to = lambda path, text: f"[{text}]({Path(os.path.relpath(path, here.parent)).as_posix()})"
    parts = [
        before and to(before, f"← {before.stem}"),
        here.stem != "index" and to(NBS / "index.ipynb", "contents"),
        after and to(after, f"{after.stem} →"),
    ]
    return " &nbsp;·&nbsp; ".join(p for p in parts if p)


def linked(nb, text):
    "The notebook with its links below the title and at the end"
    cells = [c for c in nb.cells if "links" not in c.metadata.get("tags", [])]
    title = next(
        i for i, c in enumerate(cells) if c.cell_type == "markdown" and c.source.startswith("# ")
    )
    cell = lambda where: nbformat.v4.new_markdown_cell(
        text, id=f"links-{where}", metadata=dict(tags=["links"])
    )
    nb.cells = [*cells[: title + 1], cell("above"), *cells[title + 1 :], cell("below")]
    return nb


def main(check):
    chain = order()
    stale = []
    for before, here, after in zip([None, *chain], chain, [*chain[1:], None]):
        old = here.read_text(encoding="utf-8")
        nb = linked(nbformat.reads(old, 4), links(before, here, after))
        new = nbformat.writes(nb).rstrip("\n") + "\n"
        if new == old:
            continue
        stale.append(str(here.relative_to(NBS.parent)))
        if not check:
            here.write_text(new, encoding="utf-8")
    if check:
        return (
            f"links are not current in {', '.join(stale)}; run: python .ci/links.py" if stale else 0
        )
    print(f"{len(stale)} of {len(chain)} notebooks changed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    sys.exit(main(parser.parse_args().check))
