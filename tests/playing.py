"Experiment notebooks executed in this process: their cells as they stand, without a kernel"

import contextlib, io
import matplotlib.pyplot as plt
from rg_tickets import notebooks


def play(name, folder, **given):
    "Execute the cells of an experiment; its names, as they are in the end"
    given = notebooks.checked(name, dict(given, folder=str(folder)))
    scope = {"__name__": "__main__", "display": lambda *values: None}
    scope |= {k: v[1] for k, v in notebooks.parameters(name).items()} | given
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            for i, cell in enumerate(notebooks.notebook(name)["cells"]):
                tagged = "parameters" in cell["metadata"].get("tags", [])
                if cell["cell_type"] == "code" and not tagged:
                    source = "".join(cell["source"])
                    exec(compile(source, f"<{name}, cell {i}>", "exec"), scope)
    finally:
        plt.close("all")
    return scope | {"printed": printed.getvalue()}
