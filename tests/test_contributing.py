"CONTRIBUTING.md and the releases it tells of: tests, commands and names that it mentions are there, and all files name one version"

import re
from configparser import ConfigParser
from pathlib import Path
import yaml
import rg_tickets

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_test_file_is_on_the_map():
    assert set(re.findall(r"`(test_\w+)`", TEXT)) == {
        p.stem for p in (ROOT / "tests").glob("test_*.py")
    }


def test_what_it_names_is_there():
    for name in re.findall(r"`(\d\da?_\w+)`", TEXT):
        assert (ROOT / "nbs" / f"{name}.ipynb").is_file(), name
    for name in re.findall(r"(?:\.ci|nbs|tests)/\w+(?:\.\w+)?", TEXT):
        assert (ROOT / name).exists(), name
    options = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    for name in re.findall(r"`(--(?:slow|cuda|kills))", TEXT):
        assert f'"{name}"' in options, name
    code = "\n".join(
        p.read_text(encoding="utf-8")
        for p in (ROOT / "rg_tickets").rglob("*.py")
        if p.name != "_modidx.py"
    )
    for name in "EMBEDDED TASKS Source Pictures MODELS head_names PRESETS Preset GROUPINGS SCORES CONTROLS Control Schedule declared Spec grid trajectories write_csv from_loaders lookup replacing generator seeded".split():
        assert name in TEXT and re.search(rf"\b{name}\b", code), name


def test_one_version():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    version = config["DEFAULT"]["version"]
    assert (
        rg_tickets.__version__
        == version
        == yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    )
    assert (
        re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
        == version
    )


def test_it_is_short():
    assert (
        len(TEXT.splitlines()) <= 80
        and max(map(len, TEXT.split("## Release")[0].splitlines())) < 700
    )
