"""What the paper found, and whether the small models show it; ideas beyond it, and what they gain."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar.benchmarks.paper.decoding import LOOKUP, ratio_error, read_evaluation
from tidar.benchmarks.paper.runs import MAIN, RUNS, is_finished, trained

# an idea is worth it from this gain in tokens per forward on, at an autoregressive loss that is at most so much higher
GAIN, SAME_LOSS = 0.05, 0.005
CLOSE = 0.05  # relative difference that is small: of quality
ROBUST = 0.1  # the same, of tokens per forward


@dataclass
class Result:
    """Of a run that is finished and evaluated. training: see `trained`. evaluation: see `read_evaluation`."""

    training: dict[str, Any]
    evaluation: dict[str, Any]

    def score(self, name: str) -> float | None:
        """A scalar of validation, under full masking where the run can be decoded."""
        return (self.training | self.evaluation.get("scores", {})).get(f"val/{name}")

    def decoded(self, how: str, name: str = "tokens_per_forward") -> float | None:
        return self.evaluation["decoding"].get(how, {}).get(name)

    def gain(self, base: "Result", how: str, own: str | None = None) -> tuple[float, float]:
        """Relative gain in tokens per forward pass over another run, and its standard error over their prompts.

        how: how both are decoded; own: how this one is, where that differs.
        """
        decoded = [base.evaluation["decoding"][how], self.evaluation["decoding"][own or how]]
        ratio = decoded[1]["tokens_per_forward"] / decoded[0]["tokens_per_forward"]
        return ratio - 1, ratio_error(*(one["by_text"] for one in decoded))

    def judged(self, how: str) -> float | None:
        return self.evaluation.get("judged", {}).get(how)

    @property
    def ar_loss(self) -> float:
        return self.score("ar_loss") or float("nan")

    @property
    def greedy(self) -> float:
        return self.decoded("greedy") or float("nan")

    @property
    def sampled(self) -> float:
        return self.decoded("temperature 1") or float("nan")


def read_results(folder: Path) -> dict[str, Result]:
    """Of the runs that are finished and evaluated, in the order of RUNS."""
    found = {name: read_evaluation(folder, name) for name in RUNS if is_finished(folder, name)}
    return {name: Result(trained(folder, name), one) for name, one in found.items() if one}


Results = dict[str, Result]


@dataclass(frozen=True)
class Finding:
    """claim: of the paper. needs: the runs that it is judged by. check: whether it held, and the figures."""

    claim: str
    needs: tuple[str, ...]
    check: Callable[[Results], tuple[bool, str]]

    def row(self, results: Results) -> list[str]:
        missing = [name for name in self.needs if name not in results]
        if missing:
            return [self.claim, "not measured", f"needs {', '.join(missing)}"]
        held, figures = self.check(results)
        return [self.claim, "held" if held else "**not held**", figures]


def _grows(results: Results) -> tuple[bool, str]:
    ordered = [results[name] for name in ("tidar-4", MAIN, "tidar-16")]
    greedy, sampled = [one.greedy for one in ordered], [one.sampled for one in ordered]
    figures = f"B = 4, 8, 16: greedy {_join(greedy)}, temperature 1 {_join(sampled)}"
    return greedy == sorted(greedy) and sampled == sorted(sampled), figures


def _full_beats_random(results: Results) -> tuple[bool, str]:
    pairs = [(MAIN, "random-8"), ("tidar-8-seed-2", "random-8-seed-2")]
    pairs = [pair for pair in pairs if all(name in results for name in pair)]
    means, texts = [], []
    for how in ("greedy", "temperature 1"):
        full, random = ([results[pair[i]].decoded(how) or 0.0 for pair in pairs] for i in (0, 1))
        gains = [results[full].gain(results[random], how) for full, random in pairs]
        means.append(sum(gain for gain, _ in gains) / len(gains))
        texts.append(f"{how} {_join(full)} to {_join(random)} ({', '.join(_percent(*gain) for gain in gains)})")
    return min(means) > 0, f"{'; '.join(texts)}; seeds: {len(pairs)}"


def _same_ar_loss(results: Results) -> tuple[bool, str]:
    causal, tidar = results["causal-more"].ar_loss, results[MAIN].ar_loss
    return tidar <= 1.01 * causal, f"{tidar:.4f} to {causal:.4f} ({tidar / causal - 1:+.2%})"


def _lossless(results: Results) -> tuple[bool, str]:
    decodable = [one for one in results.values() if "equal_float32" in one.evaluation]
    exact = sum(one.evaluation["equal_float32"] == 1 for one in decodable)
    rounded = sum(one.evaluation["equal"] for one in decodable) / len(decodable)
    n_prompts = decodable[0].evaluation["exact_prompts"]
    figures = f"float32: all {n_prompts} texts equal for {exact} of {len(decodable)} models"
    return exact == len(decodable), f"{figures}; in the run's dtype {rounded:.0%} of the texts"


def _robust_to_weights(results: Results) -> tuple[bool, str]:
    names = ("ar-heavy-8", MAIN, "diffusion-heavy-8")
    greedy = [results[name].greedy for name in names]
    losses = [f"{results[name].ar_loss:.4f}" for name in names]
    figures = f"1:0.3, 1:1, 0.3:1: greedy {_join(greedy)}, AR loss {', '.join(losses)}"
    return max(greedy) <= (1 + ROBUST) * min(greedy), figures


def _trust(results: Results) -> tuple[bool, str]:
    main = results[MAIN]
    hows = ("temperature 1", "temperature 1, trust diffusion")
    ar, diffusion = main.ar_loss, main.score("diffusion_loss_at/0") or float("nan")
    figures = f"held-out loss {ar:.4f} to {diffusion:.4f} ({diffusion / ar - 1:+.1%}, first position of blocks)"
    judged = [main.judged(how) for how in hows]
    if None not in judged:
        figures += f"; loss of sampled texts under the causal model {_join(judged)}"
    figures += f"; greedy tokens per forward {main.greedy:.2f} to {main.decoded('greedy, trust diffusion') or 0:.2f}"
    return abs(diffusion / ar - 1) <= CLOSE, figures


def _continued(results: Results) -> tuple[bool, str]:
    continued, scratch = results[MAIN], results["scratch-8"]
    figures = f"AR loss {continued.ar_loss:.4f} to {scratch.ar_loss:.4f}"
    held = continued.ar_loss < scratch.ar_loss and continued.greedy >= (1 - ROBUST) * scratch.greedy
    return held, f"{figures}, greedy {continued.greedy:.2f} to {scratch.greedy:.2f}"


def _percent(gain: float, error: float) -> str:
    return f"{gain:+.1%} ± {error:.1%}"


def _join(values: Any) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


FINDINGS = (
    Finding("tokens per forward grow with B", ("tidar-4", MAIN, "tidar-16"), _grows),
    Finding(
        "full masking beats random masking (5.49 to 5.22 in the paper, +5 %)", (MAIN, "random-8"), _full_beats_random
    ),
    Finding(
        "continued by TiDAR, the AR loss is that of continued causal training (here: at most 1 % more)",
        ("causal-more", MAIN),
        _same_ar_loss,
    ),
    Finding("greedy TiDAR output is greedy autoregressive output", (MAIN,), _lossless),
    Finding(
        f"robust to the loss weights (here: tokens per forward differ by at most {ROBUST:.0%})",
        ("ar-heavy-8", MAIN, "diffusion-heavy-8"),
        _robust_to_weights,
    ),
    Finding(f"trusting AR or diffusion changes quality little (here: loss by {CLOSE:.0%})", (MAIN,), _trust),
    Finding(
        "an AR model becomes a TiDAR model by continued training (here, after as many steps in all: lower AR loss than "
        f"from scratch, tokens per forward at most {ROBUST:.0%} fewer)",
        (MAIN, "scratch-8"),
        _continued,
    ),
)
# idea -> the run that it is compared with
IDEAS = {
    "positions-8": MAIN,
    "positions-light-8": MAIN,
    "own-text-8": "more-8",
    "own-text-light-8": "more-8",
    "own-text-quarter-8": "more-8",
    "own-samples-8": "more-8",
    "offset-8": MAIN,
    "mixed-8": MAIN,
    "share-8": MAIN,
}


def lookup_row(results: Results) -> list[str]:
    """About drafts from the text itself, which change decoding alone."""
    title = f"`{MAIN}` with `lookup` {LOOKUP}: where the text repeats itself, drafts are what followed before"
    other = "the same without"
    main = results.get(MAIN)
    if not main or not main.decoded("greedy, lookup"):
        return [title, other, "", "", "", f"not measured: needs {MAIN}"]
    gains = [main.gain(main, how, f"{how}, lookup") for how in ("greedy", "temperature 1")]
    return [title, other, *(_percent(*gain) for gain in gains), "the same", "yes" if gains[0][0] >= GAIN else "no"]


def idea_row(name: str, results: Results) -> list[str]:
    """About an idea: what it is compared with, gains, and whether it is worth it."""
    other = IDEAS[name]
    missing = [one for one in (name, other) if one not in results]
    title = f"`{name}`: {RUNS[name].about}"
    if missing:
        return [title, f"`{other}`", "", "", "", f"not measured: needs {', '.join(missing)}"]
    idea, base = results[name], results[other]
    gains = [idea.gain(base, how) for how in ("greedy", "temperature 1")]
    loss = idea.ar_loss / base.ar_loss - 1
    worth = gains[0][0] >= GAIN and loss <= SAME_LOSS
    return [title, f"`{other}`", *(_percent(*gain) for gain in gains), f"{loss:+.2%}", "yes" if worth else "no"]
