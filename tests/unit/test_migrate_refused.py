"""Files of the DeepSpeed script that cannot be converted, and hostile texts in them."""

import json
from pathlib import Path

import pytest
from deepspeed_files import FP16, FP16_EXPECTED, SCRIPT, Converted, changed, differences, merged

from tidar.migrate import main


@pytest.fixture
def convert(tmp_path):
    return lambda script=SCRIPT, deepspeed=FP16: Converted(tmp_path, script, deepspeed)


REFUSED = [
    ({"data_dir": ...}, {}, "data_dir is missing: must be a folder or a list of folders"),
    ({"data_dir": ["a", 1]}, {}, 'data_dir = ["a", 1]: must be a folder or a list of folders'),
    ({"qwen_model_path": "half a pair \ud83c"}, {}, r'qwen_model_path = "half a pair \ud83c": must be text'),
    ({"start_epoch": 100}, {}, "start_epoch = 100: must be less than num_epochs = 100"),
    ({"run_mode": "eval"}, {}, 'run_mode = "eval": must be "train"'),
    ({"max_len": "4096"}, {}, 'max_len = "4096": must be integer >= 4'),
    ({"tidar_clean_ratio": 1}, {}, "= 1: becomes tidar.clean_ratio = 1.0: must be number > 0 and < 1"),
    ({"max_len": 8}, {}, "tidar.block_size = 8: must be at most training.seq_len = 4"),
    ({"num_workers": -1}, {}, "num_workers = -1: becomes data.num_workers = -1: must be integer >= 0"),
    ({}, {"train_batch_size": 30}, "train_batch_size = 30: must be a multiple of train_micro_batch_size_per_gpu = 4"),
    ({}, {"train_batch_size": ..., "train_micro_batch_size_per_gpu": ...}, "train_batch_size is missing"),
    ({}, {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps = 0: must be integer >= 1"),
    ({}, {"train_batch_size": True}, "train_batch_size = true: must be integer >= 1"),
    ({}, {"gradient_clipping": -1}, "gradient_clipping = -1: becomes training.max_norm = -1.0: must be number >= 0"),
    ({}, {"optimizer": ...}, "optimizer.type is missing: must be Adam or AdamW"),
    ({}, {"optimizer__type": "OneBitAdam"}, 'optimizer.type = "OneBitAdam": must be Adam or AdamW'),
    ({}, {"optimizer__type": "Adam", "optimizer__params__adam_w_mode": False}, "adam_w_mode = false: must be true"),
    ({}, {"optimizer__params__amsgrad": True}, "optimizer.params.amsgrad = true: must be false"),
    ({}, {"optimizer__params__bias_correction": False}, "optimizer.params.bias_correction = false: must be true"),
    ({}, {"optimizer__params__betas": [0.9]}, "optimizer.params.betas = [0.9]: must be two numbers"),
    ({}, {"optimizer__params__lr": "1e-5"}, 'optimizer.params.lr = "1e-5": must be number'),
    ({}, {"scheduler__type": "OneCycle"}, 'scheduler.type = "OneCycle": must be WarmupLR, WarmupDecayLR or'),
    (
        {},
        {"scheduler__params__total_num_steps": ...},
        "scheduler.params.total_num_steps is missing: must be integer >= 1",
    ),
    ({}, {"scheduler__params__warmup_max_lr": [1, 2]}, "scheduler.params.warmup_max_lr = [1, 2]: must be number"),
    ({}, {"scheduler__params__warmup_max_lr": 0}, "warmup_max_lr = 0: becomes optimizer.lr = 0.0: must be number > 0"),
    ({}, {"bf16__enabled": True}, "bf16.enabled = true: must be false where fp16.enabled = true"),
    ({}, {"amp__enabled": True}, "amp.enabled = true: must be false: use fp16 or bf16"),
    ({}, {"fp16__loss_scale": -1}, "fp16.loss_scale = -1: must be number >= 0"),
    ({}, {"zero_optimization__stage": 4}, "zero_optimization.stage = 4: must be integer from 0 to 3"),
    ({}, {"zero_optimization__offload_param": {"device": "cpu"}}, "must be left out where stage is less than 3"),
    ({}, {"zero_optimization": 2}, "zero_optimization = 2: must be a section: {...}"),
    ({}, {"elasticity__enabled": True}, "elasticity.enabled = true: must be false"),
]


def refusal(capsys, monkeypatch, *files: Path) -> str:
    monkeypatch.setattr("sys.argv", ["migrate", *map(str, files)])
    with pytest.raises(SystemExit) as exit:
        main()
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (1, "")
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") <= 2
    return err


@pytest.mark.parametrize("script, deepspeed, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_be_trained_the_same_way_is_refused(tmp_path, capsys, monkeypatch, script, deepspeed, message):
    files = tmp_path / "train_config.json", tmp_path / "ds_config.json"
    for file, values, changes in zip(files, (SCRIPT, FP16), (script, deepspeed)):
        file.write_text(json.dumps(changed(values, **changes)))
    error = refusal(capsys, monkeypatch, *files)
    assert message in error
    assert str(files[0] if script else files[1]) in error


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", "is not JSON"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": 1, "a": 2}', 'a key is given twice in "a", "a"'),
        (b"\xff", "is not JSON"),
        (b"[]", "holds []: must hold an object"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"train_batch_size": 1e999}', "train_batch_size = Infinity: must be integer"),
        (b'{"train_batch_size": 1' + b"0" * 30 + b"}", "must be integer"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_files_that_are_not_json(tmp_path, capsys, monkeypatch, text, message):
    script, odd = tmp_path / "train_config.json", tmp_path / "o\ndd.json"
    script.write_text(json.dumps(SCRIPT))
    if text is not None:
        odd.write_bytes(text)
    error = refusal(capsys, monkeypatch, script, odd)
    assert message in error and r"o\ndd.json" in error


ODD = [
    "quo\"te'",
    "back\\slash",
    "new\nline",
    '"\n[optimizer]\nlr = 5 #',
    "\r\x00\x01\x7f\x85\u2028\u202e",
    "smörgås 🍞",
]


@pytest.mark.parametrize("odd", ODD)
def test_odd_texts_survive_and_inject_nothing(convert, odd):
    script = changed(SCRIPT, data_dir=[odd], ckpt_dir=odd, qwen_model_path=odd, model_name=odd)
    deepspeed = merged(FP16, {odd: odd, "fp16": {odd: odd}, "tensorboard": {odd: [odd]}, "wandb": odd})
    converted = convert(script, deepspeed)
    expected = FP16_EXPECTED | {"data.paths": [odd], "job.dump_folder": odd, "model.hf_path": odd}
    assert differences(converted.config) == expected
    assert all(warning.isprintable() for warning in converted.warnings)
    assert sum("not known" in warning for warning in converted.warnings) == 2
    for line in converted.text.split("\n"):
        assert not line or line.startswith(("# ", "[")) or " = " in line
