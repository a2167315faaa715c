"""Converts the files of the DeepSpeed script: python -m tidar.migrate train_config.json ds_config.json > new.toml

Writes the options of tidar.train that train the same recipe. Each key of both files becomes an option, or a
comment that says why it has no effect here. What cannot be trained the same way is an error.
"""

import io
import json
import math
import os
import sys
import tempfile
from typing import Any

from tidar.config import ArgumentParser, UserError, load_config, print_lines, user_errors_exit
from tidar.migration import (
    DEEPSPEED_REASONS,
    REQUIRED,
    SCRIPT_REASONS,
    Keys,
    Recipe,
    by_path,
    is_text,
    read_json,
    shown,
)

# at the top of every file
INTRODUCTION = [
    "Start it: CONFIG_FILE=new.toml NGPU=8 ./run_train.sh",
    "What this trainer does differently, on purpose:",
    "- The script's mask of autoregressive targets was off by one; here it is the target token's own bit of loss_mask.",
    "- The script never scored token id 0; here every target token counts.",
    "- The script averaged the losses of each micro-batch and device, and then these means. Here each mean runs over "
    "all target tokens of the step; in float16 the loss scale multiplies that.",
    "- The order of samples and all random draws depend on training.seed, and differ from the script's.",
    "- max_len counted both halves of a row, clean and masked; training.seq_len counts one.",
]


def convert_script(script: Keys, recipe: Recipe) -> None:
    """Converts train_config.json."""
    folders = script.values.get("data_dir")
    folders = [folders] if isinstance(folders, str) else folders
    if not isinstance(folders, list) or not folders or not all(is_text(folder) and folder for folder in folders):
        script.refuse("data_dir", "a folder or a list of folders")
    recipe.convert(script, "data_dir", "data.paths", folders)
    recipe.set("data.source", "gumiho", "the script's .ckpt files, with input_ids and loss_mask")
    recipe.set("data.packing", False, "as in the script: one document a row, truncated and padded; true is faster")
    recipe.set("validation.enable", False, "as in the script; true holds out validation.share of the documents")

    model = script.take("qwen_model_path", str) or script.refuse("qwen_model_path", "a folder")
    local = "must be a local folder, or an id of the Hugging Face hub (ORG/NAME), which is downloaded"
    missing = [] if os.path.isdir(model) else ["there was no such folder when this file was written"]
    recipe.convert(script, "qwen_model_path", "model.hf_path", model, local, *missing)
    recipe.warnings += [f"{script.file}: qwen_model_path = {shown(model)}: {local}"] if missing else []
    start = script.take("existing_model_path", str)
    if start:
        kinds = "a Hugging Face folder, or a file of torch.save; zero_to_fp32.py makes one of a DeepSpeed checkpoint"
        recipe.convert(script, "existing_model_path", "checkpoint.initial_load_path", start, kinds)
        recipe.set("tidar.mask_token_id", 151643, "the script's models were trained with <|endoftext|> as the mask")
    else:
        free = "the mask token is the first free id, while the script took <|endoftext|>"
        recipe.leave(script.said("existing_model_path"), free)

    epochs = script.take("num_epochs", int, minimum=1) or script.refuse("num_epochs", "integer >= 1")
    first = script.take("start_epoch", int, 0, minimum=0)
    if first >= epochs:
        script.refuse("start_epoch", f"less than num_epochs = {epochs}")
    counted = [script.said("start_epoch", 0)]
    if first:
        counted.append("the script loaded only weights and counted on from start_epoch: these epochs remained")
        counted += [] if start else ["without existing_model_path they start from the base model"]
    recipe.convert(script, "num_epochs", "training.epochs", epochs - first, *counted)
    length = script.take("max_len", int, minimum=4) or script.refuse("max_len", "integer >= 4")
    halves = "counted both halves" + ("; the odd position is dropped" if length % 2 else "")
    recipe.convert(script, "max_len", "training.seq_len", length // 2, halves)

    ratio = script.take("tidar_clean_ratio", float, 0.5)
    split = "of tidar.pattern = tidar_split; the pattern tidar doubles a row, and has as many masked as clean positions"
    recipe.convert(script, "tidar_clean_ratio", "tidar.clean_ratio", ratio, split)
    recipe.warnings += [f"{script.file}: tidar_clean_ratio = {ratio}: is {split}"] if ratio != 0.5 else []
    if script.values.get("run_mode") not in (None, "train"):
        script.refuse("run_mode", '"train"')
    recipe.leave(script.said("run_mode", "train"), "tidar.train trains")
    exports = "Hugging Face folders; checkpoints to resume from are saved every checkpoint.interval steps"
    for key, kind, name, *comments in (
        ("ckpt_dir", str, "job.dump_folder"),
        ("save_interval", int, "checkpoint.export_epochs", exports),
        ("num_workers", int, "data.num_workers"),
        ("tidar_block_size", int, "tidar.block_size"),
        ("ar_loss_weight", float, "tidar.ar_loss_weight"),
        ("diffusion_loss_weight", float, "tidar.diffusion_loss_weight"),
    ):
        if key in script.values:
            section, _, option = name.partition(".")
            recipe.carry(script, key, kind, name, getattr(getattr(recipe.config, section), option), *comments)


def convert_batch(deepspeed: Keys, recipe: Recipe) -> None:
    """Converts the batch sizes, of which two or three are given."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, rows, micro_batches = (deepspeed.take(name, int, minimum=1) for name in names)
    if total is None and rows is None and not any(map(deepspeed.is_auto, names[:2])):
        deepspeed.refuse(names[0], f"integer >= 1, or {names[1]} must be")
    said = [deepspeed.said(names[2], "it follows" if total and rows else 1)]
    if total is None:
        is_guess = rows is None or (micro_batches or 1) > 1
        rows = rows or recipe.config.training.local_batch_size
        advice = f"one micro-batch on each device; DeepSpeed's step is {rows} x {micro_batches or 1} x devices rows"
        if is_guess:
            recipe.warnings.append(f"{deepspeed.file}: set training.global_batch_size by hand: {advice}")
        recipe.convert(deepspeed, names[0], "training.global_batch_size", -1, advice)
    else:
        if total % ((rows or 1) * (micro_batches or 1)):
            sizes = [f"{name} = {size}" for name, size in zip(names[1:], (rows, micro_batches)) if size]
            deepspeed.refuse(names[0], f"a multiple of {' x '.join(sizes)}")
        ran = ""
        if rows is None:
            rows = 1
            said.append(f"DeepSpeed's is {total // (micro_batches or 1)} / devices, so raise it for speed")
            recipe.warnings.append(f"{deepspeed.file}: {names[1]} has no value: local_batch_size = 1; {said[-1]}")
        elif micro_batches:
            ran = f"ran on {total // rows // micro_batches} devices x {rows} rows x {micro_batches} micro-batch"
            ran += "es; here " if micro_batches > 1 else "; here "
        needs = f"{ran}the number of devices must divide {total // rows} = global_batch_size / local_batch_size, and "
        needs += "micro-batches make up the rest; for another number lower local_batch_size"
        recipe.convert(deepspeed, names[0], "training.global_batch_size", total, needs)
    recipe.convert(deepspeed, names[1], "training.local_batch_size", rows, *said)


def convert_optimizer(deepspeed: Keys, recipe: Recipe) -> None:
    """Converts AdamW's options, with the defaults of DeepSpeed's FusedAdam."""
    optimizer = deepspeed.section("optimizer")
    kind = (optimizer.take("type", str) or "").lower()
    if kind not in ("adam", "adamw"):
        optimizer.refuse("type", "Adam or AdamW")
    params = optimizer.section("params")
    decoupled = params.take("adam_w_mode", bool, True) or kind == "adamw"
    # torch's own AdamW decays by default
    weight_decay = params.take("weight_decay", float, 0.01 if decoupled and params.take("torch_adam", bool) else 0.0)
    if weight_decay and not decoupled:
        params.refuse("adam_w_mode", f"true where weight_decay = {weight_decay}: weight decay is decoupled here")
    convert_schedule(deepspeed, params, recipe)
    betas = params.values.get("betas")
    betas = [0.9, 0.999] if betas is None or params.is_auto("betas") else betas
    if not isinstance(betas, list) or [type(beta) in (int, float) and 0 <= beta < 1 for beta in betas] != [True] * 2:
        params.refuse("betas", "two numbers from 0 to below 1")
    for name, beta in zip(("optimizer.beta1", "optimizer.beta2"), betas):
        recipe.convert(params, "betas", name, beta)
    recipe.carry(params, "eps", float, "optimizer.eps", 1e-8)
    recipe.convert(params, "weight_decay", "optimizer.weight_decay", weight_decay, optimizer.said("type"))
    recipe.set("optimizer.decay_params", "all", "the script decayed all parameters")


def convert_schedule(deepspeed: Keys, optimizer: Keys, recipe: Recipe) -> None:
    """Converts the peak learning rate and the schedule. optimizer: the optimizer's params."""
    scheduler = deepspeed.section("scheduler")
    kind = scheduler.take("type", str)
    lr = optimizer.take("lr", float)
    highest = 1e-3 if lr is None else lr
    if kind is None:
        recipe.convert(optimizer, "lr", "optimizer.lr", highest)
        recipe.set("lr_scheduler.schedule", "warmup", deepspeed.said("scheduler", "a constant rate"))
        recipe.set("lr_scheduler.warmup_steps", 0)
        recipe.set("lr_scheduler.decay_type", "constant")
        return
    if kind not in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        scheduler.refuse("type", "WarmupLR, WarmupDecayLR or WarmupCosineLR")
    params = scheduler.section("params")
    recipe.convert(scheduler, "type", "lr_scheduler.schedule", kind, "the rate of every step is DeepSpeed's")
    lowest = "lr_scheduler.warmup_min_lr_factor"
    if kind == "WarmupCosineLR":
        recipe.convert(optimizer, "lr", "optimizer.lr", highest)
        recipe.carry(params, "warmup_min_ratio", float, lowest, 0.0)
    else:
        # the script has one group of parameters: a list of rates has one item
        for key in ("warmup_min_lr", "warmup_max_lr"):
            if isinstance(params.values.get(key), list) and len(params.values[key]) == 1:
                params.values[key] = params.values[key][0]
        if kind == "WarmupDecayLR" and not params.is_auto("warmup_max_lr"):
            highest = 1e-3
        highest = params.take("warmup_max_lr", float, highest)
        loser = [f"takes precedence over {optimizer.said('lr')}"] if "lr" in optimizer.values else []
        recipe.convert(params, "warmup_max_lr", "optimizer.lr", highest, *loser)
        share = params.take("warmup_min_lr", float, 0.0) / highest
        recipe.convert(params, "warmup_min_lr", lowest, share, f"as a share of {highest}", otherwise=0)
    recipe.carry(params, "warmup_num_steps", int, "lr_scheduler.warmup_steps", 1000)
    form = params.take("warmup_type", str, "log")
    slow = "DeepSpeed's warm-up is logarithmic, unless it is linear: the square root of its steps does half of the rise"
    slow += "" if form in ("log", "linear") else "; DeepSpeed takes log for a type that it does not know"
    recipe.convert(params, "warmup_type", "lr_scheduler.warmup_type", "linear" if form == "linear" else "log", slow)
    if kind == "WarmupLR":
        return
    total = params.take("total_num_steps", int, -1, minimum=1)
    if total == -1 and not params.is_auto("total_num_steps"):
        params.refuse("total_num_steps", "integer >= 1")
    last = "the last step of the run"
    recipe.convert(params, "total_num_steps", "lr_scheduler.total_steps", total, otherwise=last)
    if kind == "WarmupCosineLR":
        recipe.carry(params, "cos_min_ratio", float, "lr_scheduler.min_lr_factor", 1e-4)


def convert_precision(deepspeed: Keys, recipe: Recipe) -> None:
    """Converts the compute dtype and the loss scale of fp16."""
    if "bfloat16" in deepspeed.values and "bf16" in deepspeed.values:
        deepspeed.refuse("bfloat16", "left out where bf16, its other name, is given")
    fp16, bf16 = deepspeed.section("fp16"), deepspeed.section("bfloat16" if "bfloat16" in deepspeed.values else "bf16")
    half, brain = (section.take("enabled", bool, False) for section in (fp16, bf16))
    if half and brain:
        bf16.refuse("enabled", "false where fp16.enabled = true")
    unknown = fp16.is_auto("enabled") or bf16.is_auto("enabled")
    kind = "float16" if half else "bfloat16" if brain else "auto" if unknown else "float32"
    otherwise = "bfloat16 on CUDA" if kind == "auto" else False
    said = [section.said("enabled", otherwise) for section in (fp16, bf16)]
    recipe.set("training.mixed_precision_param", kind, *said)
    if bf16.take("bf16_optimizer_states", bool, False):
        rounded = "rounded stochastically here"
        recipe.convert(bf16, "bf16_optimizer_states", "optimizer.state_dtype", "bfloat16", rounded)
    constant = fp16.take("loss_scale", float, 0.0, minimum=0) if half else None
    if constant:
        recipe.convert(fp16, "loss_scale", "loss_scale.dynamic", False)
        recipe.convert(fp16, "loss_scale", "loss_scale.start", constant)
        recipe.set("loss_scale.minimum", min(constant, recipe.config.loss_scale.minimum))
    elif half:
        recipe.convert(fp16, "loss_scale", "loss_scale.dynamic", True)
        start = 2.0 ** fp16.take("initial_scale_power", int, 16, minimum=0, maximum=127)
        recipe.convert(fp16, "initial_scale_power", "loss_scale.start", start, "2 to the power of it", otherwise=16)
        recipe.carry(fp16, "loss_scale_window", int, "loss_scale.window", 1000)
        spent = "overflows before the scale halves, as in DeepSpeed: restored only when the scale doubles"
        recipe.carry(fp16, "hysteresis", int, "loss_scale.hysteresis", 2, spent)
        recipe.carry(fp16, "min_loss_scale", float, "loss_scale.minimum", 1.0)
        # overflows in a row until the scale has fallen from its start to its minimum
        falls = math.ceil(math.log2(start) - math.log2(recipe.config.loss_scale.minimum))
        falls += recipe.config.loss_scale.hysteresis
        if falls >= recipe.config.training.max_steps_skipped:
            recipe.set("training.max_steps_skipped", falls, "DeepSpeed stops once the scale cannot be halved again")


def convert_zero(deepspeed: Keys, recipe: Recipe) -> None:
    """Converts the ZeRO stage and offloading."""
    if isinstance(deepspeed.values.get("zero_optimization"), bool):  # an old form
        deepspeed.values["zero_optimization"] = {"stage": int(deepspeed.values["zero_optimization"])}
    zero = deepspeed.section("zero_optimization")
    stage = zero.take("stage", int, 0, minimum=0, maximum=3)
    held = ["nothing is", "optimizer state is", "optimizer state and gradients are", "all state is"][stage]
    said = f"{held} sharded"
    recipe.convert(zero, "stage", "parallelism.data_parallel_shard_degree", -1 if stage else 1, said, otherwise=0)
    if stage == 0:
        recipe.set("parallelism.data_parallel_replicate_degree", -1)
    else:
        reshard, gathered = ("always", "freed after the forward pass") if stage == 3 else ("never", "kept gathered")
        recipe.set("parallelism.fsdp_reshard_after_forward", reshard, f"parameters are {gathered}")
        when = "step" if stage == 1 else "micro_batch"
        recipe.set("parallelism.gradient_reduction", when, f"gradients are reduced once a {when.replace('_', '-')}")

    offloads = []
    for new, old, lowest in (("offload_optimizer", "cpu_offload", 1), ("offload_param", "cpu_offload_param", 3)):
        section = zero.section(new)
        device = section.take("device", str, "none")
        if device not in ("none", "cpu", "nvme"):
            section.refuse("device", "none, cpu or nvme")
        if zero.take(old, bool, False) or device != "none":
            if stage < lowest:
                zero.refuse(new if device != "none" else old, f"left out where stage is less than {lowest}")
            offloads.append(zero.said(old) if device == "none" else section.said("device"))
        if new in zero.values and device == "none":
            recipe.leave(zero.said(new), "nothing to offload")
        if device == "nvme":
            recipe.warnings.append(f"{deepspeed.file}: {section.name('device')} = nvme: the host's memory is used")
    if offloads:
        whole = "FSDP2 offloads parameters, gradients and optimizer state together, to the host's memory; needs CUDA"
        recipe.set("training.enable_cpu_offload", True, *offloads, whole)


def check_required(deepspeed: Keys) -> None:
    """Raises UserError for values that cannot be trained the same way."""
    for name, (only, advice) in REQUIRED.items():
        *path, key = name.split(".")
        values: Any = deepspeed.values
        for section in path:
            values = values.get(section)
            values = values if isinstance(values, dict) else {}
        # as JSON, where true is not 1
        if values.get(key) not in (None, "auto") and json.dumps(values[key]) != json.dumps(only):
            allowed = "left out" if only is None else shown(only)
            Keys(deepspeed.file, values, tuple(path)).refuse(key, f"{allowed}: {advice}")


def migrate(train_config: str, ds_config: str) -> tuple[str, list[str]]:
    """The TOML file for both JSON files, and warnings. Raises UserError for what cannot be trained the same way."""
    script, deepspeed = Keys(train_config, read_json(train_config)), Keys(ds_config, read_json(ds_config))
    recipe = Recipe()
    check_required(deepspeed)
    convert_script(script, recipe)
    convert_batch(deepspeed, recipe)
    convert_precision(deepspeed, recipe)
    convert_zero(deepspeed, recipe)
    convert_optimizer(deepspeed, recipe)
    # DeepSpeed does not clip by default, Hugging Face's Trainer does
    max_norm = 1.0 if deepspeed.is_auto("gradient_clipping") else 0.0
    recipe.carry(deepspeed, "gradient_clipping", float, "training.max_norm", max_norm)
    if "steps_per_print" in deepspeed.values:
        recipe.carry(deepspeed, "steps_per_print", int, "metrics.log_freq", recipe.config.metrics.log_freq)
    recipe.leave_rest(script, by_path(SCRIPT_REASONS))
    required = {tuple(name.split(".")): advice for name, (_, advice) in REQUIRED.items()}
    recipe.leave_rest(deepspeed, required | by_path(DEEPSPEED_REASONS))
    text = recipe.toml([f"Converted by tidar.migrate from {train_config} and {ds_config}.", *INTRODUCTION])
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "new.toml")
        with open(file, "w", encoding="utf-8") as output:
            output.write(text)
        try:
            load_config(["--job.config_file", file])
        except UserError as error:
            raise UserError(f"{script.file}, {deepspeed.file}: as converted: {error}") from None
    return text, recipe.warnings


def main() -> None:
    parser = ArgumentParser(prog="python -m tidar.migrate", description=__doc__.split("\n\n")[1])
    parser.add_argument("train_config", metavar="train_config.json", help="the script's own options")
    parser.add_argument("ds_config", metavar="ds_config.json", help="DeepSpeed's")
    with user_errors_exit():
        arguments = parser.parse_args()
        text, warnings = migrate(arguments.train_config, arguments.ds_config)
        for warning in warnings:
            print_lines(f"warning: {warning}", file=sys.stderr)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        print(text, end="")


if __name__ == "__main__":
    main()
