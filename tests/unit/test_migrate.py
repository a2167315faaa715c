"""The DeepSpeed script's files become a TOML file that trains the same recipe."""

import dataclasses
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from results import read_metrics

from tidar.config import Config, UserError, load_config, resolve_global_batch_size
from tidar.distributed import leave_world
from tidar.migrate import main, migrate
from tidar.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SCRIPT = {
    "data_dir": ["./train_data/sharegpt", "./train_data/ultrachat"],
    "ckpt_dir": "./tidar_checkpoints",
    "existing_model_path": None,
    "qwen_model_path": "Qwen/Qwen2.5-1.5B",
    "model_name": "tidar-1.5B",
    "logger_file": "training",
    "num_epochs": 100,
    "start_epoch": 0,
    "save_interval": 10,
    "max_len": 4096,
    "num_workers": 4,
    "run_mode": "train",
    "tidar_block_size": 8,
    "tidar_clean_ratio": 0.5,
    "ar_loss_weight": 1,
    "diffusion_loss_weight": 1,
}
FP16 = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 100,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-05, "betas": [0.9, 0.999], "eps": 1e-08, "weight_decay": 0.01}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 3e-06, "warmup_max_lr": 1e-05, "warmup_num_steps": 100, "total_num_steps": 10000},
    },
    "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
    },
    "wall_clock_breakdown": False,
}
BF16 = {key: value for key, value in FP16.items() if key != "fp16"} | {
    "train_batch_size": 512,
    "gradient_accumulation_steps": 2,
    "bf16": {"enabled": True},
}
# of both files, where they differ from the defaults
EXPECTED = {
    "job.dump_folder": "./tidar_checkpoints",
    "model.hf_path": "Qwen/Qwen2.5-1.5B",
    "data.source": "gumiho",
    "data.paths": ["./train_data/sharegpt", "./train_data/ultrachat"],
    "data.packing": False,
    "data.num_workers": 4,
    "training.seq_len": 2048,
    "training.local_batch_size": 4,
    "training.epochs": 100.0,
    "parallelism.fsdp_reshard_after_forward": "never",
    "optimizer.lr": 1e-5,
    "optimizer.beta2": 0.999,
    "optimizer.weight_decay": 0.01,
    "optimizer.decay_params": "all",
    "lr_scheduler.schedule": "WarmupDecayLR",
    "lr_scheduler.warmup_steps": 100,
    "lr_scheduler.total_steps": 10000,
    "lr_scheduler.warmup_min_lr_factor": 0.3,
    "validation.enable": False,
    "checkpoint.export_epochs": 10,
    "metrics.log_freq": 100,
}
FP16_EXPECTED = EXPECTED | {"training.global_batch_size": 32, "training.mixed_precision_param": "float16"}
BF16_EXPECTED = EXPECTED | {"training.global_batch_size": 512, "training.mixed_precision_param": "bfloat16"}


def changed(values: dict, **changes) -> dict:
    """A copy with other values; `scheduler__params__warmup_type` names a key of a section, ... takes a key away."""
    values = deepcopy(values)
    for name, value in changes.items():
        *sections, key = name.split("__")
        part = values
        for section in sections:
            part = part.setdefault(section, {})
        part[key] = value
        if value is ...:
            del part[key]
    return values


class Converted:
    """The output for two files, its warnings, and the options that it loads to."""

    def __init__(self, folder: Path, script: dict, deepspeed: dict):
        names = []
        for name, values in (("train_config.json", script), ("ds_config.json", deepspeed)):
            (folder / name).write_text(json.dumps(values))
            names.append(str(folder / name))
        self.text, self.warnings = migrate(*names)
        self.file = folder / "new.toml"
        self.file.write_text(self.text, encoding="utf-8")
        self.config = load_config(["--job.config_file", str(self.file)])
        self.words = " ".join(self.text.replace("\n# ", " ").split())


@pytest.fixture
def convert(tmp_path):
    return lambda script=SCRIPT, deepspeed=FP16: Converted(tmp_path, script, deepspeed)


def differences(config: Config) -> dict:
    """Options that are not the defaults."""
    found = {}
    for section in dataclasses.fields(Config):
        for name, value in vars(getattr(config, section.name)).items():
            if value != getattr(section.type(), name) and name != "config_file":
                found[f"{section.name}.{name}"] = value
    return found


def option(config: Config, name: str):
    section, _, name = name.partition(".")
    return getattr(getattr(config, section), name)


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


# Documented by DeepSpeed, or once so; what is not taken from the fixtures
OTHER_KEYS = {
    "managed_gradient_accumulation": True,
    "communication_data_type": "fp16",
    "seq_parallel_comm_data_type": "fp32",
    "gradient_allreduce_op": "mean",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "sparse_gradients": False,
    "disable_allgather": False,
    "bf16": {
        "enabled": False,
        "immediate_grad_update": True,
        "check_grad_overflow": False,
        "bf16_master_weights_and_grads": False,
        "bf16_optimizer_states": False,
    },
    "amp": {"enabled": False, "opt_level": "O1"},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "aio": {"block_size": 1048576},
    "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False, "profile": False},
    "memory_breakdown": False,
    "dump_state": False,
    "disable_python_gc": False,
    "autotuning": {"enabled": False},
    "elasticity": {"enabled": False, "max_train_batch_size": 2000},
    "flops_profiler": {"enabled": True, "profile_step": 1},
    "comms_logger": {"enabled": True},
    "tensorboard": {"enabled": True, "job_name": "x"},
    "wandb": {"enabled": True},
    "csv_monitor": {"enabled": False},
    "comet": {"enabled": False},
    "timers": {"throughput": {"enabled": True}},
    "data_efficiency": {"enabled": False},
    "curriculum_learning": {"enabled": False},
    "progressive_layer_drop": {"enabled": False},
    "sparse_attention": {"mode": "fixed"},
    "compression_training": {"weight_quantization": {}},
    "quantize_training": {"enabled": False},
    "hybrid_engine": {"enabled": False},
    "tensor_parallel": {"autotp_size": 1},
    "expert_parallel": {"enabled": False},
    "pipeline": {"stages": "auto"},
    "checkpoint": {"tag_validation": "Warn"},
    "nebula": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "dataloader_drop_last": False,
    "compile": {"deepcompile": False},
    "graph_harvesting": False,
    "use_data_before_expert_parallelism": False,
    "vocabulary_size": 151936,
    "optimizer": {
        "legacy_fusion": False,
        "params": {
            "bias_correction": True,
            "amsgrad": False,
            "adam_w_mode": True,
            "torch_adam": False,
            "set_grad_none": True,
        },
    },
    "scheduler": {"params": {"warmup_type": "cubic", "last_batch_iteration": -1}},
    "fp16": {
        "auto_cast": False,
        "initial_scale_power": 16,
        "consecutive_hysteresis": True,
        "fp16_master_weights_and_grads": False,
    },
    "zero_optimization": {
        "stage": 3,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
        "round_robin_gradients": False,
        "parameter_alignment": False,
        "compute_grad_norm": True,
        "ignore_unused_parameters": True,
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_prefetch_bucket_size": 5e8,
        "stage3_param_persistence_threshold": 1e6,
        "stage3_module_granularity_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_gather_fp16_weights_on_model_save": True,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
        "mics_shard_size": -1,
        "memory_efficient_linear": True,
        "log_trace_cache_warnings": False,
        "cpu_offload": True,
        "cpu_offload_param": True,
        "cpu_offload_use_pin_memory": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.3, "buffer_count": 4, "fast_init": False},
        "offload_param": {"device": "cpu", "nvme_path": "/local_nvme", "buffer_size": 1e8, "max_in_cpu": 1e9},
    },
}
SECTIONS = {
    "optimizer",
    "scheduler",
    "params",
    "fp16",
    "bf16",
    "zero_optimization",
    "offload_optimizer",
    "offload_param",
}


def merged(first: dict, second: dict) -> dict:
    both = deepcopy(first) | second
    return both | {key: merged(first[key], second[key]) for key in first if isinstance(second.get(key), dict)}


def leaves(values: dict, path: str = "") -> dict:
    """Keys and their values, those of converted sections with the section's name."""
    found = {}
    for key, value in values.items():
        is_section = key in SECTIONS and isinstance(value, dict)
        found |= leaves(value, f"{path}{key}.") if is_section else {path + key: value}
    return found


DOCUMENTED = merged(FP16, OTHER_KEYS)


@pytest.mark.parametrize("key", [*SCRIPT, *leaves(DOCUMENTED)])
def test_every_key_is_answered(every_key, key):
    value = (SCRIPT | leaves(DOCUMENTED))[key]
    assert f"{key} = {json.dumps(value)}" in every_key.words
    assert not any("not known" in warning for warning in every_key.warnings)


@pytest.fixture(scope="module")
def every_key(tmp_path_factory):
    return Converted(tmp_path_factory.mktemp("every_key"), SCRIPT, DOCUMENTED)


def test_placeholders_are_answered(convert):
    """Each number and switch of the recipe, "auto" at once, as in a file for Hugging Face's Trainer."""

    def auto(values: dict) -> dict:
        return {key: auto(value) if key in SECTIONS else "auto" for key, value in values.items()}

    deepspeed = auto(DOCUMENTED) | {"scheduler": auto(FP16["scheduler"]) | {"type": "WarmupDecayLR"}}
    deepspeed["optimizer"]["type"] = "AdamW"
    deepspeed["zero_optimization"] |= {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": None}
    converted = convert(SCRIPT, deepspeed)
    for key, value in leaves(deepspeed).items():
        if value == "auto":
            assert f'{key} = "auto", which only Hugging Face\'s Trainer fills in' in converted.words
    assert any("set training.global_batch_size by hand" in warning for warning in converted.warnings)
    expected = {
        "training.mixed_precision_param": "auto",
        "training.max_norm": 1.0,
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 0.0,
        "lr_scheduler.warmup_steps": 1000,
        "lr_scheduler.total_steps": -1,
    }
    assert {name: option(converted.config, name) for name in expected} == expected
    # one rate that is given stands for the other
    for key in ("optimizer__params__lr", "scheduler__params__warmup_max_lr"):
        assert convert(SCRIPT, changed(deepspeed, **{key: 2e-5})).config.optimizer.lr == 2e-5


def test_warnings_tell_what_is_left_to_do(convert):
    script = changed(SCRIPT, tidar_clean_ratio=0.75, existing_key=1, qwen_model_path=str(ROOT))
    deepspeed = changed(FP16, train_batch_size=..., gradient_accumulation_steps=2, fp16__gradient_cliping=1)
    ratio, batch, script_key, deepspeed_key = convert(script, deepspeed).warnings
    assert "train_config.json: tidar_clean_ratio = 0.75: is of tidar.pattern = tidar_split" in ratio
    assert "training.global_batch_size" in batch and "4 x 2 x devices" in batch
    assert "train_config.json: existing_key = 1: not known" in script_key
    assert "ds_config.json: fp16.gradient_cliping = 1: not known" in deepspeed_key


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
