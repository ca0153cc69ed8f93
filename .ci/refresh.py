"""Re-run notebooks in place and store their outputs: python .ci/refresh.py nbs/20_masks.ipynb ...

Cells marked `#| eval: false`, and cells marked `#| slow` or `#| cuda`, are left as they are, outputs included
(`--force slow` runs those too). Figures are stored as PNG at 80 dpi with 256 colours, then the notebook is cleaned."""

import argparse
import base64
import io
import os
import sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb, process_write
from nbdev.config import get_config
from nbdev.process import extract_directives
from PIL import Image


def smaller(png):
    "A base64 PNG with a palette of 256 colours, half the size"
    image, out = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    if image.mode == "P":
        return png
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def shrink(nb):
    "Make the figures of a notebook smaller, in place"
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller("".join(data["image/png"]))


def refresh(path, force=()):
    "Execute the notebook at `path` in its own folder and write the outputs back"
    path = Path(path).absolute()
    flags = set(get_config().tst_flags.split()) - set(force)

    def skip(cell):
        if cell.cell_type != "code":
            return True
        directives = extract_directives(cell, remove=False)
        return directives.get("eval:", [""])[0].lower() == "false" or bool(
            flags & directives.keys()
        )

    nb = read_nb(path)
    for cell in nb.cells:
        if not skip(cell):
            cell.outputs = []  # a cell that prints nothing any more would keep what it printed before
    sys.path.insert(0, str(get_config().config_path))
    with working_directory(path.parent):
        shell = CaptureShell(path, mpl_format="png")
        shell.run_cell(
            "import matplotlib as _m; _m.rcParams.update({'figure.dpi': 80, 'savefig.bbox': 'tight'}); del _m"
        )
        shell.run_all(nb, exc_stop=True, preproc=skip)
    shrink(nb)
    write_nb(nb, path)
    process_write(
        warn_msg=f"could not clean {path}",
        proc_nb=lambda nb: clean_nb(nb, allowed_cell_metadata_keys=["tags"], clean_ids=True),
        f_in=path,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+")
    parser.add_argument("--force", nargs="*", default=[], choices=["slow", "cuda"])
    args = parser.parse_args()
    os.environ["IN_TEST"] = "1"
    for notebook in args.notebooks:
        refresh(notebook, args.force)
