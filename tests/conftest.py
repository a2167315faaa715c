import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when imported; the suite has a core for each worker

import pytest

# what takes seconds to import is imported below: the process that gives the tests to the workers needs none of it

# CUDA devices that tests with a mark need
MARKS = {"gpu": 1, "gpu2": 2}


def pytest_collection_modifyitems(items):
    import torch
    import uneven  # noqa: F401  (registers the source)

    available = torch.cuda.device_count()
    for item in items:
        needed = needed_gpus(item)
        if needed > available:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices"))


def needed_gpus(item) -> int:
    return max((number for mark, number in MARKS.items() if item.get_closest_marker(mark)), default=0)


@pytest.fixture(autouse=True)
def seed():
    import torch

    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def without_gpu(request, monkeypatch):
    """Only what is marked for GPUs runs there: the rest asks for exactness that is promised on the CPU."""
    if not needed_gpus(request.node):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def call(monkeypatch, capfd):
    """Calls the main() of a command with arguments, without a process of its own. Exit code, stdout and stderr."""

    def call(main, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def ranks():
    """Processes that train together, as many of them as a run wants."""
    from rank_pool import RankPool

    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def uneven_data(tmp_path_factory) -> str:
    """Options that train on the source "uneven", prepared."""
    from tidar.config import load_config
    from tidar.training.inputs import load_inputs

    folder = tmp_path_factory.mktemp("uneven")
    options = "--data.source uneven --validation.enable false --job.dump_folder"
    load_inputs(load_config([*options.split(), str(folder)]))
    return f"--data.source prepared --data.paths {folder / 'data' / 'training'} --data.num_workers 0"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory, uneven_data) -> str:
    """Options that train a model of three small layers on these data, in less time than the debug model."""
    from small_models import make_model

    folder = tmp_path_factory.mktemp("small")
    make_model("qwen3", tie_word_embeddings=False, num_hidden_layers=3).save_pretrained(folder)
    return f"{uneven_data} --model.hf_path {folder}"


@pytest.fixture
def smaller_debug(monkeypatch) -> None:
    """Gives the debug model a shape that learns as much in a sixth of the time, in this process."""
    from tidar.models.sizes import SIZES

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setitem(SIZES, "debug", SIZES["debug"] | shape)
