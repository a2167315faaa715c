import pytest
import torch
from rank_pool import RankPool


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


@pytest.fixture(scope="session")
def ranks():
    """Four processes that train together, as many of them as a run wants."""
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def uneven_data(tmp_path_factory, ranks) -> str:
    """Options that train on the source "uneven", prepared."""
    folder = tmp_path_factory.mktemp("uneven")
    options = "--data.source uneven --validation.enable false --training.steps 0 --job.dump_folder"
    ranks.run(1, *options.split(), str(folder))
    return f"--data.source prepared --data.paths {folder / 'data' / 'training'} --data.num_workers 0"
