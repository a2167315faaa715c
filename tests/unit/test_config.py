import dataclasses
from functools import partial

import pytest
import torch

from tidar.config import Config, UserError, load_config, make_dump_folder, resolve_global_batch_size, to_toml
from tidar.distributed import check_device_count
from tidar.kernels import choose_kernels
from tidar.models import size_config


def test_file_command_line_and_back(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('\ufeff[training]\nseq_len = 64\nsteps = 7\n[optimizer]\nlr = 1\n[data]\npaths = ["a b"]\n')
    config = load_config(
        ["--job.config_file", str(file), "--training.steps", "9", "--compile.enable=false", "--training.deterministic"]
    )
    assert (config.training.seq_len, config.training.steps, config.optimizer.lr) == (64, 9, 1.0)
    assert config.compile.enable is False and config.training.deterministic is True
    assert config.data.paths == ["a b"]
    assert config.job.dump_folder == "runs/mine"
    written = tmp_path / "config.toml"
    written.write_text(to_toml(config))
    again = load_config(["--job.config_file", str(written)])
    again.job.config_file = config.job.config_file
    assert again == config


def test_odd_texts_survive_the_file(tmp_path):
    config = Config()
    config.data.paths = ['quo"te', "back\\slash", "new\nline", "\x7f\x01", "smörgås 🍞"]
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(["--job.config_file", str(tmp_path / "config.toml")]).data.paths == config.data.paths


def test_help_lists_every_option_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as exit:
        load_config(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.type):
            assert f"--{section.name}.{field.name} " in text
            assert field.metadata["help"] in text
    assert "[0.95]" in text


BAD_FILES = {
    "a = " + "[" * 100_000: ["nested too deeply"],
    "[data]\npaths = " + "[" * 100_000 + "]" * 100_000: ["nested too deeply"],
    "[trainig]\nsteps = 1": ["unknown section [trainig]", "did you mean training?"],
    "[training]\nstep = 1": ["unknown option training.step", "did you mean training.steps?"],
    '[training]\nsteps = "many"': ['training.steps = "many": must be integer >= 0'],
    '[training]\nsteps = "5"': ['training.steps = "5": must be integer >= 0'],
    '[training]\nsteps = """a\nb\nc"""': ["training.steps = ", "must be integer >= 0"],
    '[training]\ndeterministic = "true"': ['training.deterministic = "true": must be true|false'],
    "[training]\nseed = -1": ["training.seed = -1: must be integer from 0 to 9223372036854775807"],
    '[job]\nconfig_file = "x"': ["job.config_file: is given on the command line only"],
    "[__class__]\na = 1": ["unknown section [__class__]"],
    "[training]\nsteps = 1.5": ["training.steps = 1.5: must be integer"],
    "[training]\nsteps = true": ["training.steps = true: must be integer"],
    "[training]\ndeterministic = 1": ["training.deterministic = 1: must be true|false"],
    "[optimizer]\nlr = 0": ["optimizer.lr = 0: must be number > 0"],
    "[optimizer]\nlr = inf": ["optimizer.lr = Infinity: must be number > 0"],
    "[lr_scheduler]\ndecay_type = 'step'": ['lr_scheduler.decay_type = "step": must be cosine|linear|constant'],
    "[compile]\nenable = 1": ["compile.enable = 1: must be auto|true|false"],
    "[data]\npaths = 'a'": ['data.paths = "a": must be list of texts'],
    "[tidar]\nblock_size = 0": ["tidar.block_size = 0: must be integer >= 1"],
    "[tidar]\nclean_ratio = 0": ["tidar.clean_ratio = 0: must be number > 0 and < 1"],
    "[tidar]\nclean_ratio = 1.0": ["tidar.clean_ratio = 1.0: must be number > 0 and < 1"],
    "[tidar]\ndiffusion_share = 1.1": ["tidar.diffusion_share = 1.1: must be number > 0 and <= 1"],
    "[tidar]\nblock_sizes = [4, 1.5]": ["tidar.block_sizes = [4, 1.5]: must be list of integers >= 1"],
    "[tidar]\nblock_sizes = [4, 65]\n[training]\nseq_len = 64": ["block_sizes = [4, 65]: must be at most"],
    "[tidar]\nblock_size = 65\n[training]\nseq_len = 64": ["block_size = 65: must be at most training.seq_len = 64"],
    "[tidar]\nar_loss_weight = 0\ndiffusion_loss_weight = 0": ["tidar.ar_loss_weight", "one of them must be above 0"],
    "[parallelism]\ngradient_reduction = 'step'\nfsdp_reshard_after_forward = 'always'": [
        "parallelism.gradient_reduction = step: keeps whole gradients"
    ],
    "[loss_scale]\nstart = 0.5": ["loss_scale.start = 0.5: must be at least loss_scale.minimum = 1.0"],
    "[lr_scheduler]\ntotal_steps = 9": ["lr_scheduler.total_steps = 9: must be at least"],
    "[training\nsteps = 1": ["is not TOML", "line 1"],
    "training = 3": ["training = 3: must be a section"],
    "\x00": ["is not TOML"],
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_bad_file(tmp_path, content):
    file = tmp_path / "bad.toml"
    file.write_text(content)
    message = refusal(lambda: load_config(["--job.config_file", str(file)]))
    names_file = not any(words in message for words in ("at most", "above 0", "at least", "keeps whole gradients"))
    for part in [str(file)] * names_file + BAD_FILES[content]:
        assert part in message


BAD_ARGUMENTS = {
    ("--job.config_file", "/no/such.toml"): "job.config_file = /no/such.toml: cannot be read (No such file or dir",
    ("--training.seqlen", "3"): "unknown option training.seqlen; did you mean training.seq_len?",
    ("--seq_len", "3"): "unknown option seq_len; did you mean training.seq_len?",
    ("--training.steps", "ten"): "training.steps = ten: must be integer >= 0",
    ("--training.global_batch_size", "0"): "training.global_batch_size = 0: must be integer >= 1, or -1",
    ("--validation.steps", "0"): "validation.steps = 0: must be integer >= 1, or -1",
    ("--optimizer.lr", "-1e-3"): "optimizer.lr = -1e-3: must be number > 0",
    ("--training.steps",): "argument --training.steps: expected one argument",
    ("--tidar.block_sizes", "4", "x"): 'tidar.block_sizes = ["4", "x"]: must be list of integers >= 1',
    ("steps=3",): "unexpected argument steps=3",
    ("--training.deterministic", "yes"): "training.deterministic = yes: must be true|false",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_bad_argument(arguments):
    assert BAD_ARGUMENTS[arguments] in refusal(lambda: load_config(list(arguments)))


def test_bad_batch_folder_and_machine(tmp_path, monkeypatch):
    config = load_config(["--training.local_batch_size", "4", "--training.global_batch_size", "20"])
    assert resolve_global_batch_size(config, 5) == 20
    message = refusal(lambda: resolve_global_batch_size(config, 2))
    assert "training.global_batch_size = 20: must be a multiple of 8" in message
    (tmp_path / "file").touch()
    config.job.dump_folder = str(tmp_path / "file" / "run")
    assert "cannot be written (Not a directory)" in refusal(lambda: make_dump_folder(config))
    config.job.dump_folder = str(tmp_path / "\udcff")
    assert "cannot be written" in refusal(lambda: make_dump_folder(config)) and len(list(tmp_path.iterdir())) == 1
    config.job.dump_folder = "nul\0"
    assert "cannot be written" in refusal(lambda: make_dump_folder(config))
    config.job.dump_folder = "/proc/run"
    assert "job.dump_folder = /proc/run" in refusal(lambda: make_dump_folder(config))
    assert "model.name = huge: must be one of debug" in refusal(lambda: size_config("huge"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_device_count(2)
    assert "NGPU = 3: this machine has 2 GPUs" in refusal(lambda: check_device_count(3))
    for backend in ("flex", "flash"):
        config = load_config(["--model.attention_backend", backend])
        choose = partial(choose_kernels, config, torch.device("cpu"), torch.float32)
        assert "has no backward pass" in refusal(choose)


def refusal(call) -> str:
    """The message of the UserError that `call` ends with: one or two lines."""
    with pytest.raises(UserError) as error:
        call()
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)
