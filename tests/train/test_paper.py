"""The reduced form of the paper's table, its corpus, and what it counts."""

import dataclasses
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import forks
import numpy as np
import pytest

from tidar.benchmarks.paper import __main__ as paper
from tidar.benchmarks.paper import corpus as corpora
from tidar.benchmarks.paper.corpus import Extent, Package, divide, find_packages, read_texts, stamp
from tidar.benchmarks.paper.decoding import (
    GREEDY,
    LEAST_LOOP,
    LEAST_REPEATS,
    LONGEST_PERIOD,
    LOOKED_UP,
    SAMPLED,
    counts,
    loop_start,
    ratio_error,
)
from tidar.benchmarks.paper.findings import FINDINGS, IDEAS, Result, idea_row, lookup_row
from tidar.benchmarks.paper.report import write_report
from tidar.benchmarks.paper.runs import RUNS, run_config, select
from tidar.config import UserError, load_config
from tidar.data import Corpus


def test_loops():
    """Against a plain search for a unit that follows itself."""
    rng, found = random.Random(0), set()

    def loops_from(text: list[int], start: int, period: int) -> bool:
        end = start + max(LEAST_REPEATS * period, LEAST_LOOP)
        return end + period <= len(text) and text[start:end] == text[start + period : end + period]

    for _ in range(100):
        unit = [rng.randrange(3) for _ in range(rng.randint(1, 40))]
        text = [rng.randrange(50) for _ in range(rng.randint(0, 60))] + unit * rng.randint(0, 9)
        text = (text + [rng.randrange(50) for _ in range(rng.randint(0, 9))])[:256]
        starts = (s for s in range(len(text)) for p in range(1, LONGEST_PERIOD + 1) if loops_from(text, s, p))
        expected = next(starts, len(text))
        assert loop_start(text) == expected
        found.add(expected < len(text))
    assert found == {True, False}


def test_a_loop_adds_neither_tokens_nor_forwards():
    looping = SimpleNamespace(tokens=[1, 2, 3] + [7] * 60, accepted=[1, 1, 1] + [4] * 15, n_forwards=19)
    plain = SimpleNamespace(tokens=[1, 2, 3, 4], accepted=[3, 1], n_forwards=3)
    found = counts([looping, plain])
    assert found["tokens_per_forward"] == (3 + 4) / (1 + 3 + 1 + 2) and found["whole_texts"] == 67 / 22
    assert found["looped"] == 60 / 67


def test_errors_of_ratios_are_those_of_resampled_prompts():
    rng = np.random.default_rng(0)
    forwards = rng.integers(20, 200, 300)
    first, second = (np.stack([forwards * rng.uniform(1, 3, 300), forwards], axis=1) for _ in range(2))
    second = 0.8 * first * [1.3, 1] + 0.2 * second  # two models that find the same prompts hard
    chosen = rng.integers(0, 300, (4000, 300))
    ratios = [(one[:, 0][chosen].sum(axis=1) / one[:, 1][chosen].sum(axis=1)) for one in (first, second)]
    assert ratio_error(first) == pytest.approx(ratios[0].std(), rel=0.06)
    assert ratio_error(first, second) == pytest.approx((ratios[1] / ratios[0]).std(), rel=0.06)
    assert ratio_error(first, second) < 0.5 * ratio_error(second) and ratio_error(first, first) == 0


def test_the_corpus_is_a_function_of_the_packages(tmp_path):
    packages = []
    for n in range(40):
        folder = tmp_path / f"package{n}"
        folder.mkdir()
        (folder / "one.py").write_text(f"x = {n}\n" * 10)
        packages.append(Package(folder.name, [folder / "one.py"], 60))
    packages.sort(key=lambda package: package.rank)
    training, held_out = divide(packages, Extent(held_out=0.1))
    assert sum(package.n_bytes for package in held_out) == 240 and len(training) + len(held_out) == 40
    assert (training, held_out) == divide(packages, Extent(held_out=0.1))
    # held-out files are not trained on, also where another package vendors them; others are skipped and counted
    vendored = tmp_path / training[0].name
    for name, content in (
        ("copy.py", held_out[0].files[0].read_bytes()),
        ("latin.py", "é".encode("latin-1")),
        ("empty.py", b""),
        ("table.py", b"1\n" * 2**20),
    ):
        (vendored / name).write_bytes(content)
        training[0].files.append(vendored / name)
    texts = read_texts(training, held_out)
    assert len(texts.training) == len(training) and len(texts.held_out) == len(held_out)
    assert sorted(texts.skipped.values()) == [1, 1, 1, 1]
    before = stamp(training, held_out)
    vendored.joinpath("one.py").write_text("y = 1\n")
    assert read_texts(training, held_out).digest != texts.digest and stamp(training, held_out) != before
    with pytest.raises(UserError, match="too few to hold any out"):
        divide(packages[:1], Extent())
    assert {"stdlib/json", "torch"} <= {package.name for package in find_packages()}


def test_every_run_is_one_of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr("tidar.benchmarks.paper.runs.last_step", lambda folder, name: folder / name)
    for run in RUNS.values():
        config = run_config(run, tmp_path, paper.FULL)
        continued = bool(run.starts_from)
        steps = {"": 1500 if run.name == "scratch-8" else 900, "causal": 600, "tidar-8": 300}[run.starts_from]
        assert (config.training.steps, bool(config.checkpoint.initial_load_path)) == (steps, continued)
        # runs that are compared see the same rows at the same learning rate
        seed = 2 if run.name.endswith("seed-2") else {"": 0, "causal": 1, "tidar-8": 3}[run.starts_from]
        assert (config.training.seed, config.optimizer.lr) == (seed, 7.5e-4 if continued else 1.5e-3)
        assert list(RUNS).index(run.starts_from or run.name) <= list(RUNS).index(run.name)
    assert {name for finding in FINDINGS for name in finding.needs} | {*IDEAS, *IDEAS.values()} <= set(RUNS)
    assert [run.name for run in select(["own-text-8"])] == ["causal", "tidar-8", "own-text-8"]


def result(ar_loss: float, tokens: int) -> Result:
    """Of a run that decodes two prompts with so many tokens in 100 forward passes."""
    decoded = {"tokens_per_forward": tokens / 100, "error": 0.1, "whole_texts": 1.0, "looped": 0.0}
    decoded["by_text"] = [(tokens // 2, 40), (tokens - tokens // 2, 60)]
    looked_up = decoded | {"by_text": [(3 * n // 2, passes) for n, passes in decoded["by_text"]]}
    looked_up["tokens_per_forward"] = 1.5 * decoded["tokens_per_forward"]
    decoding = dict.fromkeys([*GREEDY, *SAMPLED], decoded) | dict.fromkeys(LOOKED_UP, looked_up)
    evaluation = {"decoding": decoding, "judged": dict.fromkeys(SAMPLED, 1.0), "seconds": 1.0}
    evaluation |= {"equal": 0.5, "equal_float32": 1.0, "exact_prompts": 16, "speed": {"ar": 1.0, "tidar": 2.0}}
    training = {"steps": 9, "seconds": 1.0, "tokens_per_second": 1.0, "val/ar_loss": ar_loss}
    training |= {f"val/{name}_at/{k}": 1.02 * ar_loss for name in ("diffusion_loss", "accuracy_diff") for k in range(8)}
    return Result(training, evaluation)


def test_findings(tmp_path, monkeypatch):
    """Of results made up, in which each holds, and each fails for its reason; and of some of the runs."""
    results = {name: result(2.0, 300) for name in RUNS}
    results |= {"tidar-4": result(2.0, 250), "tidar-16": result(2.0, 350), "random-8": result(2.0, 270)}
    results |= {"random-8-seed-2": result(2.0, 290), "scratch-8": result(2.1, 310), "causal-more": result(1.99, 0)}
    results |= {"own-text-8": result(2.009, 315), "offset-8": result(2.011, 330)}
    assert [finding.row(results)[1] for finding in FINDINGS] == ["held"] * len(FINDINGS)
    assert idea_row("own-text-8", results)[-1] == "yes" and idea_row("offset-8", results)[-1] == "no"
    assert [cell[:6] for cell in lookup_row(results)[2:]] == ["+50.0%", "+50.0%", "the sa", "yes"]
    main = results["tidar-8"]
    before = {how: one for how, one in main.evaluation["decoding"].items() if how not in LOOKED_UP}
    older = {"tidar-8": dataclasses.replace(main, evaluation=main.evaluation | {"decoding": before})}
    assert lookup_row(older)[-1] == lookup_row({})[-1] == "not measured: needs tidar-8"
    for number, worse in enumerate(
        (
            {"tidar-16": result(2.0, 299)},
            {"random-8": result(2.0, 340)},
            {"causal-more": result(1.97, 0)},
            {"tidar-8": dataclasses.replace(main, evaluation=main.evaluation | {"equal_float32": 0.9})},
            {"ar-heavy-8": result(2.0, 331)},
            {"tidar-8": dataclasses.replace(main, training=main.training | {"val/ar_loss": 1.9})},
            {"scratch-8": result(2.1, 340)},
            {"scratch-8": result(1.9, 310)},
        )
    ):
        assert FINDINGS[min(number, 6)].row(results | worse)[1] == "**not held**", number
    corpus = {"files": {"training": 9, "held_out": 1}, "tokens": {"training": 9, "held_out": 1}, "packages": 2}
    corpus |= {"held_out_packages": ["a"], "vocabulary": 9, "digest": "d", "skipped": {}}
    rng = random.Random(0)
    for share in (0, 0.5, 0.5, 0.5, 1):
        some = {name: one for name, one in results.items() if rng.random() < share or share == 1}
        monkeypatch.setattr("tidar.benchmarks.paper.report.read_results", lambda folder, some=some: some)
        report = write_report(tmp_path, corpus, paper.FULL, 60.0).read_text()
        assert f"{len(some)} of {len(RUNS)} runs" in report and ("not measured" in report) == (len(some) < len(RUNS))


def test_a_run_that_fails_takes_along_those_that_continue_it(tmp_path, monkeypatch):
    done: set[str] = set()

    def work(one, *_) -> bool:
        if one.name == "causal":
            raise UserError("no such data")
        done.add(one.name)
        return True

    monkeypatch.setattr(paper, "work", work)
    for name in ("is_done", "is_finished"):
        monkeypatch.setattr(paper, name, lambda folder, name: name in done)
    failed: dict[str, str] = {}
    runs = select(["own-text-8", "scratch-8"])
    deadline = time.monotonic() + 20
    assert paper.work_on(runs, tmp_path, paper.SMOKE, deadline, lambda _: None, failed) == "the other runs are done"
    assert failed == {"causal": "no such data"} and done == {"scratch-8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


def test_the_reduced_form_trains_decodes_and_reports(folder, monkeypatch, capsys):
    """Three runs, one of which starts from another one's weights and text; then the same call does nothing."""
    arguments = ["--output", str(folder), "--only", "smoke", "causal", "own-text-quarter-8"]
    paper.main([*arguments, "--time_limit", "0.00001"])
    assert "stopped at causal" in capsys.readouterr().out and not (folder / "runs").exists()
    paper.main(arguments)
    report = (folder / "report.md").read_text()
    names = ["tidar-8", "own-text-quarter-8"]
    losses, decoding = report.split("## Losses")[1].split("## Decoding")
    assert re.findall(r"^\| `(.*?)` \| \d\.\d{4} \|", losses, re.MULTILINE) == ["causal", *names]
    assert re.findall(r"^\| `(.*?)` \| \d\.\d{3} ±", decoding, re.MULTILINE) == names
    config = load_config(["--job.config_file", str(folder / "runs" / "own-text-quarter-8" / "config.toml")])
    tokens = [
        weight * Corpus.open(Path(path), verify=False).meta["tokens"]
        for path, weight in zip(config.data.paths, config.data.weights)
    ]
    assert tokens[1] / sum(tokens) == pytest.approx(0.25, rel=1e-4)
    for name in names:
        found = json.loads((folder / "runs" / name / "evaluation.json").read_text())
        assert found["equal_float32"] == found["equal"] == 1
        assert found["judged"]["ar, temperature 1"] == found["judged"]["temperature 1"] > 0
        decoded = found["decoding"]["greedy"]
        assert 16 / 17 <= decoded["tokens_per_forward"] == decoded["tokens"] / decoded["forwards"] <= 16 / 3
    assert re.search(r"greedy TiDAR output is greedy autoregressive output \| held \|", report)
    for picture in ("tokens_per_forward", "accuracy_by_position"):
        assert len(ElementTree.parse(folder / "pictures" / f"{picture}.svg").getroot()) > 10
    monkeypatch.setattr(paper, "train", None)
    monkeypatch.setattr(paper, "evaluate", None)
    monkeypatch.setattr(corpora, "read_texts", None)
    paper.main(arguments)
    assert (folder / "report.md").read_text() == report


def test_processes_share_the_runs(tmp_path):
    """One is stopped in the middle of a run, and killed while another one waits for that run's weights."""
    folder, logs = tmp_path / "paper", [tmp_path / "first", tmp_path / "second"]
    arguments = ["--output", str(folder), "--only", "smoke", "causal", "causal-more", "scratch-8"]

    def done(name: str) -> bool:
        return (folder / "runs" / name / "evaluation.json").exists()

    first = forks.start(paper.main, arguments, log=logs[0])
    while not (folder / "runs" / "causal" / "outcome.json").exists():
        assert first.is_alive(), logs[0].read_text()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    second = forks.start(paper.main, arguments, log=logs[1])
    try:
        while not done("scratch-8"):
            assert second.is_alive(), logs[1].read_text()
            time.sleep(0.1)
        second.join(2 * paper.POLL)
        assert second.is_alive() and not done("causal") and not (folder / "runs" / "causal-more").exists()
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        second.join(60)
    assert second.exitcode == 0, logs[1].read_text()
    begun = [re.findall("^=== (.*?):", log.read_text(), re.MULTILINE) for log in logs]
    assert begun == [["causal"], ["scratch-8", "causal", "causal-more"]]
    assert "tokens/s" not in logs[1].read_text().split("=== ")[0]  # the corpus is there already
    assert (folder / "report.md").read_text().count("| `causal") >= 2 and "3 of" in (folder / "report.md").read_text()
    assert "judged" in json.loads((folder / "runs" / "causal" / "evaluation.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only tidar-9", "--only tidar-9: must be of smoke, causal"),
        ("--time_limit 0", "--time_limit 0.0: must be above 0"),
        ("--only causal", "holds the results of another corpus"),
    ],
)
def test_bad_input(folder, arguments, message, call, monkeypatch):
    monkeypatch.setattr(corpora, "find_packages", lambda: find_packages()[:60])
    code, _, error = call(paper.main, "--output", folder, *arguments.split())
    assert code == 1 and message in error and len(error.splitlines()) <= 2


def test_a_run_that_was_begun_with_other_options_is_refused(folder, call, monkeypatch):
    monkeypatch.setitem(
        RUNS, "causal", RUNS["causal"].__class__("causal", "", "--tidar.pattern causal --optimizer.lr 1")
    )
    code, _, error = call(paper.main, "--output", folder, "--only", "smoke", "causal")
    assert code == 1 and "was trained with lr = 0.001, and now it is lr = 1.0" in error
