"The scripts of the page `36_bring_your_own`, each run as a user would: a file, a fresh process"

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "nbs" / "36_bring_your_own.ipynb"
EXPECTED = {  # title of the section -> what the script has to print
    "A torchvision network, and loaders with workers": [
        r"prunes 11,166,912 of 11,167,936 matrix weights .* in 20 tensors\nhead = fc\n",
        r"round  2 .* density 40.96%",
    ],
    "Networks of transformers": [
        rf"{name} .* density 40.96% .* {metric} "
        for name, metric in [
            ("BERT", "accuracy"),
            ("DistilBERT", "accuracy"),
            ("ViT", "accuracy"),
            ("GPT-2", "minus_loss"),
        ]
    ],
    "Two heads and three columns": [r"round  3 ", r"head: \('sign', 'value'\)"],
    "A criterion of one's own": [r"magnitude +round  6 ", r"snip +round  6 "],
    "Only the analysis": [r"a\.weight .* irrelevant", r"b\.weight .* +relevant"],
    "A ticket in a loop of one's own": [r"network (0\.\d{4})\n.*ticket  \1"],
}


def scripts():
    "Title of each section -> its script"
    found, title = {}, None
    for cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        titles = re.findall(r"^## (.*)$", text, re.M)
        if cell["cell_type"] == "markdown" and titles:
            title = titles[-1]
        elif cell["cell_type"] == "code" and text.startswith("import "):
            found[title] = text
    return found


def test_every_section_has_its_script():
    assert list(scripts()) == list(EXPECTED)


@pytest.mark.parametrize("title", list(EXPECTED))
def test_script_runs_as_a_file_of_its_own(title, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(scripts()[title] + "\n", encoding="utf-8")
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "loss_type" not in done.stderr  # a warning of transformers about its configuration
    for pattern in EXPECTED[title]:
        assert re.search(pattern, done.stdout), (pattern, done.stdout)


def test_a_transformers_user_writes_no_adapter():
    text = scripts()["Networks of transformers"]
    assert not re.search(r"forward|\blambda batch\b|split=|objective=|judge=", text)
