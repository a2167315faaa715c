import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def without_gpu(request, monkeypatch):
    """Only what is marked gpu runs there: the rest asks for exactness that is promised on the CPU."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
