"""Every notebook as a reader meets it: opened in JupyterLab in a browser, run with Run All Cells, looked at.

Asked for with `--slow`; skipped where Playwright (`pip install -e '.[lab]'`) or a Chromium is missing. A Chromium comes from the
distribution (`apt-get install chromium`) or from `playwright install chromium`; CHROMIUM names another one. With `--screenshots DIR` each
notebook is photographed there in JupyterLab's light and dark theme. Cells marked `#| slow` and `#| eval: false` are left out, as
`.ci/refresh.py` leaves them out, and those marked `#| cuda` where there is no GPU. All of it takes half an hour to an hour on two cores."""

import json, os, re, secrets, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import nbformat
import pytest
import torch

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is missing: pip install -e '.[lab]'"
)
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p.relative_to(ROOT / "nbs")
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not {"runs", ".ipynb_checkpoints"} & set(p.parts)
)
LEFT_OUT = re.compile(
    r"^#\s*\|\s*(slow|eval:\s*false%s)\b" % ("" if torch.cuda.is_available() else "|cuda"), re.M
)
SIZE = dict(width=1400, height=1800)
FIGURE, OUTER = ".jp-OutputArea-output img", ".jp-WindowedPanel-outer"
BAR, LABEL = ".jp-OutputArea-output .widget-hprogress", ".jp-OutputArea-output .widget-html"
SETTINGS = {
    "notebook-extension/tracker": {
        "windowingMode": "none"
    },  # every cell is in the page, not only those in view
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
}
ENV = {
    k: v for k, v in os.environ.items() if k not in ("RG_TICKETS_PROGRESS", "MPLBACKEND")
}  # a reader has neither
pytestmark = pytest.mark.slow


def prepared(path, to):
    "Copy a notebook, with the cells that are left out made raw; how many figures the others show as committed"
    nb = nbformat.read(path, 4)
    for c in nb.cells:
        if c.cell_type == "code" and LEFT_OUT.search(c.source):
            c.cell_type = "raw"
            c.pop("outputs")
            c.pop("execution_count")
    to.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, to)
    return sum(
        "image/png" in o.get("data", {})
        for c in nb.cells
        if c.cell_type == "code"
        for o in c.outputs
    )


def chromium(playwright):
    "A browser: the one named, the distribution's, or Playwright's own"
    found = (
        os.environ.get("CHROMIUM")
        or shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    try:
        return playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
    except sync_api.Error as e:
        pytest.skip(
            f"no Chromium can be started: apt-get install chromium, or name one in CHROMIUM ({str(e).splitlines()[0]})"
        )


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        b = chromium(p)
        yield b
        b.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, browser):
    "JupyterLab on a copy of nbs/: (address, folder, figures of each notebook)"
    home = tmp_path_factory.mktemp("lab")
    nbs = home / "nbs"
    shutil.copytree(
        ROOT / "nbs",
        nbs,
        ignore=shutil.ignore_patterns("runs", "*.ipynb", "__pycache__", ".ipynb_checkpoints"),
    )
    figures = {p: prepared(ROOT / "nbs" / p, nbs / p) for p in NOTEBOOKS}
    for name, value in SETTINGS.items():
        (f := home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings").parent.mkdir(
            parents=True, exist_ok=True
        )
        f.write_text(json.dumps(value))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, log = secrets.token_hex(8), open(home / "log", "w")
    env = ENV | {
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
    }
    options = {
        "ServerApp.root_dir": nbs,
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "IdentityProvider.token": token,
        "LabApp.user_settings_dir": home / "settings",
        "LabApp.workspaces_dir": home / "workspaces",
    }
    lab = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--expose-app-in-browser",
            *(f"--{k}={v}" for k, v in options.items()),
        ],
        cwd=nbs,
        env=env,
        stdout=log,
        stderr=log,
    )
    try:
        for _ in range(120):
            assert lab.poll() is None, (home / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab?token={token}", nbs, figures
    finally:
        lab.terminate()
        lab.wait(30)
        log.close()


@pytest.fixture(scope="module")
def page(server, browser, request):
    "A window of JupyterLab, with the folder for its photographs"
    page = browser.new_page(viewport=SIZE)
    page.set_default_timeout(120_000)
    page.goto(server[0])
    page.wait_for_function("window.jupyterapp")
    page.evaluate(
        "jupyterapp.restored.then(() => jupyterapp.commands.execute('application:toggle-left-area'))"
    )
    folder = request.config.getoption("--screenshots")
    page.folder = folder and Path(folder)
    return page


OPEN = """async path => {
    const app = window.jupyterapp, panel = await app.commands.execute('docmanager:open', {path, factory: 'Notebook'});
    window.panel = panel; await panel.context.ready; await panel.sessionContext.ready; await panel.revealed;
}"""
STATE = """() => ({status: panel.sessionContext.session?.kernel?.status,
                   pending: [...panel.node.querySelectorAll('.jp-InputPrompt')].filter(o => o.textContent.includes('*')).length})"""
CLOSE = "async () => { await panel.context.save(); await panel.sessionContext.shutdown(); panel.dispose(); }"
ERRORS = """panel.content.widgets.flatMap(c => c.model.outputs?.toJSON() ?? []).filter(o => o.output_type == 'error').map(o => `${o.ename}: ${o.evalue}`)"""
SIDES = "s => [...panel.node.querySelectorAll(s)].map(o => Math.min(o.naturalWidth ?? 999, o.getBoundingClientRect().width, o.getBoundingClientRect().height))"
TEXTS = r"s => [...panel.node.querySelectorAll(s)].map(o => o.textContent.replace(/\s+/g, ' '))"
HEIGHT = "panel.content.widgets.at(-1).node.getBoundingClientRect().bottom - panel.content.widgets[0].node.getBoundingClientRect().top"


class Open:
    "A notebook in the window"

    def __init__(self, page, path):
        self.page, self.path = page, path

    def __enter__(self):
        self.page.evaluate(OPEN, self.path.as_posix())
        self.page.wait_for_function(
            "panel.sessionContext.session?.kernel?.status == 'idle'", timeout=120_000
        )
        return self

    def start(self):
        "Run All Cells, through the menu"
        for item in ("Run", "Run All Cells"):
            self.page.get_by_role("menuitem", name=item, exact=True).click()

    def wait(self, seconds=900):
        "Until nothing runs or waits any more"
        end, idle = time.monotonic() + seconds, 0
        while idle < 3:  # between two cells the kernel is idle for a moment
            time.sleep(0.5)
            state = self.page.evaluate(STATE)
            assert state["status"] not in ("dead", "autorestarting", "restarting", None), (
                f"the kernel of {self.path} is {state['status']}"
            )
            assert time.monotonic() < end, f"{self.path} still runs after {seconds} s: {state}"
            idle = idle + 1 if state == dict(status="idle", pending=0) else 0

    def texts(self, selector):
        return self.page.evaluate(TEXTS, selector)

    def errors(self):
        return self.page.evaluate(ERRORS)

    def sides(self, selector):
        return self.page.evaluate(
            SIDES, selector
        )  # the shorter one of each, in pixels as shown; 0 for an image that could not be read

    def __exit__(self, *error):
        self.page.evaluate(CLOSE)

    def photograph(self, name):
        "The notebook from top to bottom in both themes, in pieces; light is what is left on"
        if not self.page.folder:
            return
        for theme in ("Dark", "Light"):
            self.page.evaluate(
                "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})",
                f"JupyterLab {theme}",
            )
            self.page.wait_for_function(
                "theme => document.body.dataset.jpThemeName == theme", arg=f"JupyterLab {theme}"
            )
            for i, y in enumerate(
                range(0, max(int(self.page.evaluate(HEIGHT)) - 200, 1), SIZE["height"] - 200)
            ):
                self.page.evaluate(
                    "([s, y]) => panel.node.querySelector(s).scrollTo(0, y)", [OUTER, y]
                )
                time.sleep(0.3)
                self.page.screenshot(path=self.page.folder / f"{name}-{theme.lower()}-{i:02}.png")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_in_jupyterlab(path, page, server):
    _, folder, committed = server
    with Open(page, path) as o:
        began = time.monotonic()
        o.start()
        o.wait()
        took = time.monotonic() - began
        assert not (wrong := o.errors()), wrong[0]
        odd = [
            t[:200]
            for t in o.texts(".jp-OutputArea-output")
            if re.search(r"<[^<>]+ at 0x[0-9a-f]+>", t)
        ]
        assert not odd, f"an object is shown as its address, end the cell with a semicolon: {odd}"
        seen = o.sides(FIGURE)
        o.photograph(path.stem)
    assert len(seen) >= committed[path] and all(side > 50 for side in seen), (
        f"{committed[path]} figures are committed, seen: {seen}"
    )
    nb = nbformat.read(folder / path, 4)
    nbformat.validate(nb)  # as JupyterLab saved it
    done = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    assert all(c.execution_count for c in done) and not [
        o for c in done for o in c.outputs if o.output_type == "error"
    ]
    print(f"{path}: {took:.0f} s, {len(seen)} figures")


STUDY = """from rg_tickets.runs import Spec, trajectories
flow = trajectories([Spec("digits8", width=8, rounds=4, seed=s, recipe=dict(epochs=4)) for s in range(2)], "runs/bars", {jobs}, device="cpu")
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_progress_bars_are_seen(jobs, page, server):
    "Widgets that move while runs are made, here or in other processes, and are full in the end"
    path = Path(f"bars{jobs}.ipynb")
    shutil.rmtree(server[1] / "runs" / "bars", ignore_errors=True)
    python = dict(name="python3", display_name="python3", language="python")
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(STUDY.format(jobs=jobs))],
            metadata=dict(kernelspec=python),
        ),
        server[1] / path,
    )
    with Open(page, path) as o:
        o.start()
        page.wait_for_function(
            "s => ['all', 'digits8'].every(word => [...panel.node.querySelectorAll(s)].some(o => o.textContent.includes(word)))",
            arg=LABEL,
        )
        boxes = o.sides(BAR)
        assert len(boxes) >= 2 and min(boxes) > 10, boxes
        o.photograph(f"bars{jobs}-in-flight")
        o.wait(300)
        words = o.texts(LABEL)
        assert any("all runs: 10 of 10 rounds 100%" in w for w in words) and not any(
            "digits8" in w for w in words
        ), words
        assert not o.errors() and not [
            w for w in o.texts(".jp-OutputArea-output") if "Error displaying widget" in w
        ]
        o.photograph(f"bars{jobs}-done")


def test_what_the_command_line_ran_opens(page, server):
    "The notebook that `rg-tickets run` leaves: shown as it is, without a question, with its figures; JupyterLab keeps what is noted in it"
    folder = server[1] / "runs" / "made"
    file = folder / "notebook.ipynb"
    command = [
        Path(sys.executable).with_name("rg-tickets"),
        "run",
        "resnet_imp",
        "scale=smoke",
        "jobs=1",
        "-f",
        folder,
    ]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = nbformat.read(file, 4)
    nbformat.validate(before)
    with Open(page, file.relative_to(server[1])) as o:
        assert page.locator(".jp-Dialog").count() == 0 and not o.errors()
        assert len(o.sides(FIGURE)) >= 2 and min(o.sides(FIGURE)) > 50
        o.photograph("resnet_imp-by-command")
    after = nbformat.read(file, 4)
    nbformat.validate(after)
    assert (
        all(after.metadata[k] == before.metadata[k] for k in ("rg_tickets", "papermill"))
        and after.cells == before.cells
    )
