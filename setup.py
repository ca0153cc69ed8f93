"Everything here is read from settings.ini, the one place for names, versions and requirements."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib = cfg["lib_name"]
experiments = f"{lib}.experiments"  # parameterised notebooks, shipped as package data

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Programming Language :: Python :: 3",
    ],
    packages=find_packages(include=[lib, f"{lib}.*"]) + [experiments],
    package_dir={experiments: "nbs/experiments"},
    package_data={experiments: ["*.ipynb", "*.yaml", "reports/*.ipynb"]},
    include_package_data=False,
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={
        extra: cfg[f"{extra}_requirements"].split()
        for extra in ("embedded", "bert", "text", "dask", "lab", "dev")
    },
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
