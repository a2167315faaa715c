import json
import math
import resource

import torch

from tidar.config import load_config
from tidar.evaluation.scores import accepted_prefixes
from tidar.models import size_config
from tidar.models.flops import useful_flops
from tidar.models.huggingface import decoder_config
from tidar.patterns import Targets
from tidar.training.progress import Progress
from tidar.training.reporting.metrics import MetricWriter


def test_accepted_prefixes_equal_the_loops():
    for _ in range(100):
        block_size = int(torch.randint(1, 6, ()))
        n_blocks = 30
        is_target = torch.rand(n_blocks, block_size) > 0.6 * torch.rand(())
        correct = torch.rand(n_blocks, block_size) > 0.3
        expected = []
        for block in range(n_blocks):
            if is_target[block].all():
                length = 0
                while length < block_size and correct[block, length]:
                    length += 1
                expected.append(length)
        index = torch.arange(n_blocks * block_size)[is_target.flatten()]
        targets = Targets(index, index, index.float(), index % block_size)
        assert accepted_prefixes(targets, correct.flatten()[index], block_size).tolist() == expected


def test_steps_of_epochs_are_those_of_exact_fractions():
    for epochs, rows, size, steps in (("1.1", 700, 10, 77), ("0.1", 30, 3, 1), ("2", 31, 12, 6), ("1.01", 700, 10, 71)):
        progress = Progress(rows, 0, torch.device("cpu"))
        assert progress.steps_of(load_config(["--training.epochs", epochs]).training, size) == steps


def test_useful_flops_by_hand():
    config = decoder_config(size_config("debug") | {"vocab_size": 258})
    layer = 192 * (192 + 64 + 64 + 192) + 3 * 192 * 512
    assert useful_flops(config, positions=10, scored=3, allowed_pairs=40) == (
        6 * 4 * layer * 10 + 6 * 258 * 192 * 3 + 4 * 12 * 40 * 6 * 32
    )


def test_metrics_that_cannot_be_written_end_nothing(tmp_path, capsys):
    writer = MetricWriter(tmp_path, enabled=True, log=print)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writer.opened(1, validates_again=False):
        writer.write(1, {"a": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size, hard))
        try:
            writer.write(2, {"a": 2.0})
            assert "warning: metrics cannot be written (File too large)" in capsys.readouterr().out
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.write(3, {"a": 3.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_metrics_of_repeated_steps_are_written_once(tmp_path):
    writer = MetricWriter(tmp_path, enabled=True, log=print)
    with writer.opened(1, validates_again=False):
        for step in range(1, 6):
            writer.write(step, {"train/batch_loss": step / 3})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('garbage\n\0\0\n3\n{"loss": 1}\n{"step": 6, "train/ba')  # killed while writing
    writer = MetricWriter(tmp_path, enabled=True, log=print)
    with writer.opened(4, validates_again=False):
        writer.write(4, {"train/batch_loss": 0.5, "train/grad_norm": math.nan})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "train/batch_loss": step / 3} for step in (1, 2, 3)] + [
        {"step": 4, "train/batch_loss": 0.5, "train/grad_norm": None}
    ]
    assert list((tmp_path / "tb").iterdir())
