"""README.md of an exported model: the card that the Hugging Face hub shows. Nothing in it is guessed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tidar.models.huggingface.config_json import ARCHITECTURES

# what a run's validation measures, as a card explains it
FIGURES = {
    "val/loss": "weighted mean of the losses",
    "val/ar_loss": "autoregressive loss, nats per token",
    "val/diffusion_loss": "diffusion loss, nats per token",
    "val/accuracy": "accuracy of the autoregressive arg-max",
    "val/accuracy_diff": "accuracy of the drafts",
    "val/accepted_prefix": "correct drafts at the start of a block",
    "val/tokens_per_forward": "tokens per forward pass, greedy decoding of held-out prompts",
}

WITH_TOKENIZER = """\
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0]))"""

WITHOUT_TOKENIZER = """\
prompt = torch.tensor([[72, 101, 108, 108, 111]])  # token ids: the model comes without a tokenizer
output = model.generate(prompt, max_new_tokens=100, return_dict_in_generate=True)
print(output.sequences[0].tolist())"""

TIDAR = """\
```python
{imports}

folder = "..."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
{sample}
print(output.n_tokens / output.n_forwards)  # tokens per forward pass
```

`custom_generate/generate.py` drafts a block of tokens and verifies it in one forward pass. The output has the
distribution of plain decoding. It needs transformers 4.56 or later, and `sdpa` or `eager` attention. Beam search and
assistants are refused; `transformers.GenerationMixin.generate(model, ...)` decodes plainly.

Without `trust_remote_code` the folder is an ordinary {architecture}, one token per forward pass, for transformers,
vLLM, SGLang and others. (transformers 4 runs the file of a local folder without asking.)
"""

PLAIN = """\
The folder is an ordinary {architecture}, for transformers, vLLM, SGLang and others.
"""


def model_card(
    config: Mapping[str, Any], decodes: bool, has_tokenizer: bool, step: int | None, figures: Mapping[str, float]
) -> str:
    """config: config.json, with the section `tidar`. decodes: whether the folder has custom_generate/generate.py.

    step: of the run, None if unknown. figures: what was measured then, by the names of FIGURES and others.
    """
    method, architecture = config["tidar"], ARCHITECTURES[config["model_type"]]
    base = method.get("base", {})
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- tidar"]
    front += ["- custom_generate"] if decodes else []
    front += [f"base_model: {base['model']}"] if "model" in base else []
    front += [f"{name}: {value}" for name, value in base.items() if name != "model"]
    about = {
        "base model": base.get("model"),
        "pattern": method.get("pattern"),
        "block size": method.get("block_size"),
        "mask token": method.get("mask_token_id"),
        "steps trained": step,
    }
    rows = [f"| {name} | {value} |" for name, value in about.items() if value is not None]
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if not has_tokenizer:
        imports = "import torch\nfrom transformers import AutoModelForCausalLM"
    sample = WITH_TOKENIZER if has_tokenizer else WITHOUT_TOKENIZER
    use = TIDAR.format(imports=imports, sample=sample, architecture=architecture) if decodes else None
    parts = [
        "\n".join([*front, "---"]),
        f"# {base['model']} with TiDAR" if "model" in base else f"# {architecture} with TiDAR",
        "Trained as in [TiDAR: Think in Diffusion, Talk in Autoregression](https://arxiv.org/abs/2511.08923).",
        "\n".join(["| | |", "| --- | --- |", *rows]),
        "## Use",
        (use or PLAIN.format(architecture=architecture)).rstrip(),
    ]
    if shown := [f"| {text} | {figures[name]:.4f} |" for name, text in FIGURES.items() if name in figures]:
        parts += ["## Measured", f"Held-out data, step {step}:"]
        parts += ["\n".join(["| | |", "| --- | --- |", *shown])]
    return "\n\n".join(parts) + "\n"


def describe_base(folder: Path) -> dict[str, str]:
    """What is known of the model in a folder: its name on the hub and its licence, as front matter names them.

    The name is that of a hub cache; the licence stands in the front matter of its README.md.
    """
    found = {}
    name = re.fullmatch(r".*/models--([^/]+)/snapshots/[^/]+", str(folder.absolute()))
    if name and name[1].count("--") == 1:
        found["model"] = name[1].replace("--", "/")
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    if front := re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL):
        lines = re.findall(r"^(license(?:_name|_link)?): *([\w./:+-]+) *$", front[1], re.MULTILINE)
        found |= dict(lines)
    return found
