"Options, markers and surroundings of the whole suite"
import os
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", RG_TICKETS_PROGRESS="off", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")  # before torch; children inherit them
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what takes minutes")
    parser.addoption("--cuda", action="store_true", help="also run what needs a GPU")
    parser.addoption("--kills", type=int, default=10, metavar="N", help="how often test_kill.py kills the run with the default policy (10)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")
    config.addinivalue_line("markers", "cuda: needs a GPU; runs with --cuda")


def pytest_collection_modifyitems(config, items):
    why = {"slow": None if config.getoption("--slow") else "slow: asked for with --slow",
           "cuda": "cuda: asked for with --cuda" if not config.getoption("--cuda") else None if torch.cuda.is_available() else "cuda: torch sees no GPU here"}
    for item in items:
        for name, reason in why.items():
            if reason and item.get_closest_marker(name): item.add_marker(pytest.mark.skip(reason=reason))
