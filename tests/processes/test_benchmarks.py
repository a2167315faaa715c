"""The benchmarks run anywhere: with the debug model on a CPU."""

import json
import sys
from argparse import Namespace

import faulty
import forks
import pytest
import torch
from results import read_metrics
from runs import train_run

from tidar import train
from tidar.benchmarks import attention, matmul, profile, train_step
from tidar.benchmarks.baseline import _loss
from tidar.benchmarks.cases import WARM_UP, first_batches, running
from tidar.config import load_config


@pytest.fixture
def run(call):
    """Calls a benchmark; returns what it prints."""

    def run(benchmark, *arguments: str) -> str:
        code, output, error = call(benchmark.main, *arguments)
        assert code == 0, error
        return output

    return run


SMALL = ("--training.seq_len", "32", "--training.local_batch_size", "2", "--data.num_workers", "0")


def test_train_step_measures_a_case_its_baseline_and_its_start(tmp_path, run, call, monkeypatch, smaller_debug):
    """Its start by a process that notes its command: one without caches, then one with what that has left there."""
    starting = tmp_path / "starting"
    starting.write_text(
        f"#!{sys.executable} -S\n"
        "import json, os, sys\n"
        "cache = os.environ['TORCHINDUCTOR_CACHE_DIR']\n"
        f"print(json.dumps([sys.argv[1:], os.path.exists(cache)]), file=open({str(tmp_path / 'started')!r}, 'a'))\n"
        "os.makedirs(cache, exist_ok=True)\n"
        "print('model ...\\nstep 1/1  loss ...', flush=True)\n"
    )
    starting.chmod(0o755)
    monkeypatch.setattr("tidar.benchmarks.train_step.sys.executable", str(starting))
    monkeypatch.setattr(train_step, "OVERHEAD_PAIRS", 2)
    output = run(train_step, "--case", "debug", *SMALL, "--steps", "2", "--baseline", "--overhead", "--start")
    (result,) = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    assert result["case"] == "debug" and result["torch"] == torch.__version__
    assert result["ratio"] == result["tokens_per_second"] / result["baseline_tokens_per_second"]
    assert 64 * 1e3 / result["step_ms_max"] <= result["tokens_per_second"] < 64 * 1e5
    assert {"overhead", "peak_gib", "start_cold_s", "start_warm_s"} < result.keys()
    started = [json.loads(line) for line in (tmp_path / "started").read_text().splitlines()]
    assert [(words[:3], cached) for words, cached in started] == [
        (["-u", "-m", "tidar.train"], n) for n in (False, True)
    ]
    first, second = (words[3:] for words, _ in started)
    assert load_config(first).job.dump_folder != load_config(second).job.dump_folder
    code, log, _ = call(train.main, *first)
    assert code == 0 and "\nstep 1/1 " in log
    title, row = output.splitlines()[-2:]
    assert title.split()[0] == "case" and row.split()[0] == "debug" and len(title) == len(row)


def test_train_step_on_two_ranks(tmp_path):
    """One of them prints, and a device's tokens are those of its rows, or its part of the rows that it shares."""
    shared = "debug --parallelism.context_parallel_degree 2"
    (tmp_path / "a.txt").write_text("a text without end " * 1000)
    text = "--data.source", "text", "--data.tokenizer", "bytes", "--data.paths", str(tmp_path / "a.txt")
    arguments = "--case", "debug", shared, *SMALL, *text, "--steps", "1"
    code, output = forks.call(forks.torchrun, 2, faulty.measure_steps, *arguments, log=tmp_path / "log")
    assert code == 0, output
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [(result["case"], result["ngpu"]) for result in results] == [("debug", 2), (shared, 2)]
    for result, tokens in zip(results, (64, 32)):
        assert result["tokens_per_second"] * result["step_ms"] / 1e3 == pytest.approx(tokens)
    assert output.count("GPUs") == 1


@pytest.mark.parametrize("benchmark", [train_step, profile])
def test_a_run_that_is_stopped_is_not_measured(call, smaller_debug, benchmark):
    code, _, error = call(benchmark.main, "--case", "debug", *SMALL, "--checkpoint.max_wall_minutes", "1e-9")
    assert code == 1 and error == "error: stopped by checkpoint.max_wall_minutes: the case is not measured\n"


def test_a_case_that_fails_leaves_the_others(tmp_path, monkeypatch, capfd):
    """Processes that print results until one is at fault: the next ones begin after it. Rates stand beside one's."""
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import json, sys\n"
        "for case in sys.argv[sys.argv.index('--case') + 1 :]:\n"
        "    if case == 'bad':\n"
        "        print('error: rank 1: out of memory')\n"
        "        sys.exit('error: rank 1 has died')\n"
        "    print('its log')\n"
        "    print(json.dumps({'case': case, 'ngpu': int(sys.argv[1]), 'tokens_per_second': 9 - int(sys.argv[1])}))\n"
        "print('its table')\n"
    )
    monkeypatch.setattr(train_step, "launcher", lambda ngpu: [sys.executable, "-S", str(fake), str(ngpu)])
    asked = Namespace(steps=2, start=False, baseline=False, overhead=False)
    cases = ["a", "bad", "b", "bad"]
    results = [result for ngpu in (1, 2) for result in train_step.measure_on(ngpu, cases, asked, [])]
    assert [result["case"] for result in results] == cases * 2
    assert [result.get("error") for result in results] == [None, "rank 1: out of memory"] * 4
    printed = capfd.readouterr().out
    assert printed.count("its log") == 4 and "its table" not in printed
    lines = [line.split() for line in train_step.table(results).splitlines()[1:]]
    assert [line for line in lines if line[0] in "ab"] == [
        ["a", "1", "8"], ["a", "2", "7", "87.5%"], ["b", "1", "8"], ["b", "2", "7", "87.5%"]
    ]  # fmt: skip


def test_bare_steps_have_the_rows_of_the_reported_ones(monkeypatch):
    """Turn by turn, and are not reported."""
    monkeypatch.setattr(train_step, "OVERHEAD_PAIRS", 2)
    rows, reported = {}, []

    class Recorded(train_step.Alternating):
        def on_micro_batch(self, trainer, micro_batch, loss, scores):
            rows.setdefault(self.turn_of(trainer.step + 1), []).append(micro_batch.input_ids)
            return loss

        def after_step(self, trainer):
            super().after_step(trainer)
            reported.extend([trainer.step] * (trainer.throughput.steps == 0))

    times = Recorded(log_freq=3)
    options = [*SMALL, "--metrics.log_freq", "3", "--validation.enable", "false", "--training.steps", str(times.steps)]
    with running(options, times) as trainer:
        trainer.train()
        assert abs(times.overhead(trainer)) < 1
    turns = range(times.first_turn, times.first_turn + 4)
    assert all(len(rows[turn]) == times.turn == 12 for turn in turns) and min(turns) * 12 > WARM_UP + 1
    for turn in turns[::2]:
        assert torch.stack(rows[turn]).equal(torch.stack(rows[turn + 1]))
        assert [step for step in reported if times.turn_of(step) == turn] == [12 * turn + i for i in (0, 3, 6, 9)]
    assert not any(times.turn_of(step) % 2 == 0 for step in reported)


def test_the_baselines_micro_batches_have_the_losses_of_the_whole():
    """A plain mean over the targets of each loss, of rows in parts of any number."""
    with running("--training.seq_len 32 --training.local_batch_size 3 --data.num_workers 0".split()) as trainer:
        (batch,) = first_batches(trainer, 1)
    logits = torch.randn(*batch.rows.input_ids.shape, 300, dtype=torch.float64)
    kept = [(logits.flatten(0, 1)[targets.index], targets.labels) for targets in batch.rows.targets.values()]
    expected = sum(torch.nn.functional.cross_entropy(*pair) for pair in kept) / 2
    for size in (1, 2, 3):
        parts = [_loss(logits[start : start + size], batch.rows, start) for start in range(0, 3, size)]
        assert torch.isclose(sum(parts).double(), expected, rtol=1e-5)


def test_profile_reports_every_kind_and_its_floor(run):
    output = run(profile, *SMALL, "--steps", "2")
    table = output[output.index("kind ") :].split("\n\n")[0].splitlines()[1:]
    times = {line[:22].strip(): [float(number) for number in line[22:].split()[:2]] for line in table}
    assert min(*times["matmuls"], *times["attention forward"], *times["norm and elementwise"]) > 0
    *parts, whole = times.values()
    assert sum(floor for _, floor in parts) - whole[1] < 0.1
    assert "aten::mm" in output


def test_training_writes_traces(tmp_path):
    options = "--training.seq_len 32 --training.local_batch_size 2 --training.steps 7 --validation.enable false"
    options += " --checkpoint.enable false --data.num_workers 0 --metrics.log_freq 7"
    options += f" --profiling.enable_profiling --profiling.profile_freq 3 --job.dump_folder {tmp_path}"
    train_run(options.split())
    traces = sorted(path.name for path in (tmp_path / "profile_traces").iterdir())
    assert traces == ["step-3-rank-0.json.gz", "step-6-rank-0.json.gz"]
    assert len(read_metrics(tmp_path)) == 1


def test_matmuls_are_those_of_the_decoder(run):
    _, _, *lines = run(matmul, *SMALL, "--only", "down", "d_gate_up").splitlines()
    assert [line.split()[:6] for line in lines] == [
        ["down", "128", "x", "512", "x", "192"],
        ["d_gate_up", "1024", "x", "128", "x", "192"],
    ]
    assert all(float(line.split("torch ")[1].split()[0]) > 0 for line in lines)


@pytest.mark.long
def test_ways_to_share_a_row_have_one_result(tmp_path):
    """Torch's context parallelism and ours: FlexAttention forward and SDPA, on a CPU."""
    arguments = *SMALL, "--training.seq_len", "256"
    code, output = forks.call(forks.torchrun, 2, faulty.share_attention, *arguments, log=tmp_path / "log")
    assert code == 0, output
    rows = [line.split() for line in output.splitlines() if line.startswith(("ours", "torch,"))]
    assert len(rows) == 6 and all(float(row[-1]) < 1e-6 for row in rows), output
    # of torch both halves travel
    assert [round(float(row[-2]) / float(rows[0][-2])) for row in rows] == [1, 2, 2] * 2


def test_attention_compares_masks(run):
    output = run(attention, *SMALL)
    rows = [line.split() for line in output.splitlines() if line.startswith("sdpa")]
    assert len(rows) == 3 and all(float(number) > 0 for row in rows for number in row[-4:-3])
    assert "flash    model.attention_backend = flash: has no backward pass without CUDA" in output
