"""The DeepSpeed script's files become a TOML file that trains the same recipe."""

import json
import os
import subprocess
import sys

import pytest
from deepspeed_files import (
    BF16,
    BF16_EXPECTED,
    FP16,
    FP16_EXPECTED,
    ROOT,
    SCRIPT,
    Converted,
    changed,
    differences,
    option,
)
from results import read_metrics

from tidar.config import UserError, load_config, resolve_global_batch_size
from tidar.distributed import leave_world
from tidar.training.trainer import Trainer


@pytest.fixture
def convert(tmp_path):
    return lambda script=SCRIPT, deepspeed=FP16: Converted(tmp_path, script, deepspeed)


@pytest.mark.parametrize(
    "deepspeed, expected, devices, ran",
    [
        (FP16, FP16_EXPECTED, 8, "8 devices x 4 rows x 1 micro-batch; here the number of devices must divide 8 "),
        (BF16, BF16_EXPECTED, 64, "64 devices x 4 rows x 2 micro-batches; here the number of devices must divide 128 "),
    ],
)
def test_the_files_of_the_script(convert, deepspeed, expected, devices, ran):
    converted = convert(SCRIPT, deepspeed)
    assert differences(converted.config) == expected
    assert resolve_global_batch_size(converted.config, devices) == expected["training.global_batch_size"]
    with pytest.raises(UserError, match="must be a multiple of"):
        resolve_global_batch_size(converted.config, 7)
    assert ran in converted.words
    # what must not depend on the defaults
    for line in ("packing = false", 'decay_params = "all"', 'warmup_type = "log"', "enable = false"):
        assert f"\n{line}\n" in converted.text
    assert ("hysteresis = 2" in converted.text) == (deepspeed is FP16)
    (warning,) = converted.warnings
    assert 'qwen_model_path = "Qwen/Qwen2.5-1.5B": must be a local folder' in warning


@pytest.mark.parametrize("deepspeed, dtype", [(FP16, "float16"), (BF16, "bfloat16")])
def test_what_is_converted_trains(convert, tmp_path, capsys, deepspeed, dtype):
    options = (
        "--model.name debug --model.hf_path= --data.source python_source --data.paths --data.num_workers 0".split()
    )
    options += "--training.seq_len 32 --training.local_batch_size 2 --training.global_batch_size 4".split()
    options += "--training.epochs 0 --training.steps 2 --checkpoint.export_epochs 0 --metrics.log_freq 1".split()
    file = str(convert(SCRIPT, deepspeed).file)
    try:
        run = str(tmp_path / "run")
        trainer = Trainer(load_config(["--job.config_file", file, *options, "--job.dump_folder", run]))
        trainer.train()
    finally:
        leave_world()
    assert trainer.step == 2
    assert dtype in capsys.readouterr().out
    lines = read_metrics(tmp_path / "run")
    # DeepSpeed's rates: its schedule starts at -1 and is stepped after the optimizer
    assert [line["train/lr"] for line in lines] == pytest.approx([3e-6, 3e-6])


# Each changes the fp16 recipe, or the script's own file, and says which options follow
CHANGES = [
    ({"data_dir": "one"}, {}, {"data.paths": ["one"]}),
    (
        {"existing_model_path": "old.pt", "start_epoch": 40},
        {},
        {"checkpoint.initial_load_path": "old.pt", "tidar.mask_token_id": 151643, "training.epochs": 60.0},
    ),
    ({"max_len": 4097}, {}, {"training.seq_len": 2048}),
    ({"ckpt_dir": ..., "tidar_block_size": ..., "num_workers": ...}, {}, {"job.dump_folder": "runs/new"}),
    ({}, {"train_batch_size": ...}, {"training.global_batch_size": -1, "training.local_batch_size": 4}),
    ({}, {"gradient_accumulation_steps": ...}, {"training.global_batch_size": 32, "training.local_batch_size": 4}),
    ({}, {"train_micro_batch_size_per_gpu": ...}, {"training.global_batch_size": 32, "training.local_batch_size": 1}),
    ({}, {"gradient_clipping": ...}, {"training.max_norm": 0.0}),
    ({}, {"optimizer": {"type": "adam"}}, {"optimizer.weight_decay": 0.0, "optimizer.beta2": 0.999}),
    ({}, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, {"optimizer.weight_decay": 0.01}),
    (
        {},
        {"scheduler": ...},
        {"lr_scheduler.schedule": "warmup", "lr_scheduler.warmup_steps": 0, "lr_scheduler.decay_type": "constant"},
    ),
    (
        {},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": [0], "warmup_type": "linear"}}},
        {"optimizer.lr": 1e-5, "lr_scheduler.warmup_steps": 1000, "lr_scheduler.warmup_type": "linear"},
    ),
    ({}, {"scheduler__params__warmup_max_lr": ...}, {"optimizer.lr": 1e-3, "lr_scheduler.warmup_min_lr_factor": 0.003}),
    (
        {},
        {"scheduler__params__warmup_max_lr": [6e-6]},
        {"optimizer.lr": 6e-6, "lr_scheduler.warmup_min_lr_factor": 0.5},
    ),
    (
        {},
        {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 1e4, "warmup_min_ratio": 0.1}}},
        {
            "optimizer.lr": 1e-5,
            "lr_scheduler.total_steps": 10000,
            "lr_scheduler.min_lr_factor": 1e-4,
            "lr_scheduler.warmup_min_lr_factor": 0.1,
        },
    ),
    ({}, {"fp16": ...}, {"training.mixed_precision_param": "float32"}),
    ({}, {"fp16": ..., "bfloat16": {"enabled": True}}, {"training.mixed_precision_param": "bfloat16"}),
    ({}, {"fp16__loss_scale": 0.5}, {"loss_scale.dynamic": False, "loss_scale.start": 0.5}),
    ({}, {"fp16__initial_scale_power": 12}, {"loss_scale.dynamic": True, "loss_scale.start": 4096.0}),
    (
        {},
        {"zero_optimization": ...},
        {"parallelism.data_parallel_replicate_degree": -1, "parallelism.data_parallel_shard_degree": 1},
    ),
    (
        {},
        {"zero_optimization__stage": 1},
        {"parallelism.fsdp_reshard_after_forward": "never", "parallelism.gradient_reduction": "step"},
    ),
    ({}, {"zero_optimization": True}, {"parallelism.gradient_reduction": "step"}),
    (
        {},
        {"zero_optimization__stage": 3},
        {"parallelism.fsdp_reshard_after_forward": "always", "parallelism.gradient_reduction": "micro_batch"},
    ),
    ({}, {"zero_optimization__cpu_offload": True}, {"training.enable_cpu_offload": True}),
    ({}, {"zero_optimization__offload_optimizer": {"device": "nvme"}}, {"training.enable_cpu_offload": True}),
    ({}, {"zero_optimization__offload_optimizer": {"device": "none"}}, {"training.enable_cpu_offload": False}),
]


@pytest.mark.parametrize("script, deepspeed, expected", CHANGES)
def test_other_recipes(convert, script, deepspeed, expected):
    config = convert(changed(SCRIPT, **script), changed(FP16, **deepspeed)).config
    assert {name: option(config, name) for name in expected} == expected


def test_the_command(tmp_path):
    for name, values in (("train_config.json", SCRIPT), ("ds_config.json", FP16)):
        (tmp_path / name).write_text(json.dumps(values))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-X", "importtime", "-m", "tidar.migrate", "train_config.json", "ds_config.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# Converted by tidar.migrate from train_config.json and ds_config.json.\n")
    assert "CONFIG_FILE=new.toml NGPU=8 ./run_train.sh" in done.stdout
    assert "warning: train_config.json: qwen_model_path" in done.stderr
    assert " tidar.config" in done.stderr and " torch" not in done.stderr  # it has to answer at once
    done = subprocess.run([*command[:1], *command[3:5], "--help"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and b"train_config.json" in done.stdout
