"Options, markers and surroundings of the whole suite"

import contextlib
import os
import signal

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    RG_TICKETS_PROGRESS="off",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)  # before torch; children inherit them
import socket
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "No test may use the network; processes of this machine may talk to each other"

    def only_here(function):
        def checked(address, *args, **kwargs):
            host = address[0] if isinstance(address, tuple) else address
            if host not in (
                None,
                "",
                "localhost",
                "127.0.0.1",
                "::1",
                "0.0.0.0",
                socket.gethostname(),
            ):
                raise OSError(f"the network was used: {host}")
            return function(address, *args, **kwargs)

        return checked

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, only_here(getattr(socket, name)))


@pytest.fixture
def ends():
    "A block in which nothing may go on for ever: a minute of processor time stops it with an error"

    @contextlib.contextmanager
    def watched(seconds=60):
        def stop(*_):
            raise TimeoutError(f"it goes on after {seconds} s of processor time")

        before = signal.signal(signal.SIGVTALRM, stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)

    return watched if hasattr(signal, "setitimer") else contextlib.nullcontext


@pytest.fixture
def tell(request):
    "Print past pytest's capture"

    def say(text):
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n  {text}")

    return say


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what takes minutes")
    parser.addoption("--cuda", action="store_true", help="also run what needs a GPU")
    parser.addoption(
        "--kills",
        type=int,
        default=10,
        metavar="N",
        help="how often test_kill.py kills the run with the default policy (10)",
    )
    parser.addoption(
        "--screenshots",
        metavar="DIR",
        help="test_lab.py photographs the notebooks in JupyterLab, into this folder",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")
    config.addinivalue_line("markers", "cuda: needs a GPU; runs with --cuda")


def pytest_collection_modifyitems(config, items):
    why = {
        "slow": None if config.getoption("--slow") else "slow: asked for with --slow",
        "cuda": "cuda: asked for with --cuda"
        if not config.getoption("--cuda")
        else None
        if torch.cuda.is_available()
        else "cuda: torch sees no GPU here",
    }
    for item in items:
        for name, reason in why.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
