"""What all tests share: no network, one thread, a small model and a small tokenizer."""

import os
import socket
import sys
from pathlib import Path

# Tests run on the CPU, also where there is a GPU. `python -m pytest --gpu tests/test_triton.py`
# runs the kernel's on it.
if "--gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels.py is imported below: its kernel runs on the CPU

from data.tokenizer import make_tokenizer  # noqa: E402
from data.town.documents import documents  # noqa: E402
from gpt import GPT, GPTConfig  # noqa: E402

torch.set_num_threads(1)  # the models are so small that a second thread only gets in the way


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="also run the tests that take long")
    parser.addoption("--gpu", action="store_true", help="let tests see the GPU")
    parser.addoption("--chain", type=Path, help="a folder of finished default runs, for --check")


def pytest_configure(config):
    config.addinivalue_line("markers", "reference: compares with libraries that may not be there")
    config.addinivalue_line("markers", "thorough: takes long; runs with --thorough")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--thorough"):
        for item in items:
            if "thorough" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="runs with --thorough"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection to another machine fails; loopback stays open."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}: tests run without a network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer("bpe", documents(300, seed="tests"), 500)


@pytest.fixture(scope="session")
def noted_chain(tmp_path_factory):
    """A folder in which all five stages have run, and what `run_chain` has noted of them."""
    from tiny_runs import run_chain

    out = tmp_path_factory.mktemp("out")
    return out, *run_chain(out)


@pytest.fixture(scope="session")
def chain(noted_chain):
    """A folder in which all five stages have run."""
    return noted_chain[0]


@pytest.fixture
def tiny():
    """A GPT with 2 layers and random weights, large enough that nothing is almost uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, context=24, n_layer=2, n_head=2, n_embd=16))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()
