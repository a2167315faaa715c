"""Held-out prompts, decoded at each validation with the live weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from tidar.data import PackedRows
from tidar.decoding import Engine, Method
from tidar.decoding.load import end_token_ids
from tidar.decoding.prompts import end_tokens
from tidar.distributed import OneDevice, Sharded, World
from tidar.evaluation import decode, held_out_prompts, n_new_tokens
from tidar.models import Decoder
from tidar.models.huggingface import read_config_json
from tidar.training.batches import Batches
from tidar.training.inputs import Inputs
from tidar.training.plan import RunPlan


@dataclass(frozen=True)
class DecodedPrompts:
    """Counts of all ranks: `tokens` new ones in `forwards` forward passes. sample: text of this rank's first prompt and
    what was decoded after it; None where the rank has no prompt. gathering: seconds until the weights were whole.
    """

    prompts: int
    tokens: int
    forwards: int
    sample: tuple[str, str] | None
    seconds: float
    gathering: float

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards


class HeldOutPrompts:
    """The prompts that `tidar.evaluate` decodes, assigned to the ranks in turn.

    Each rank decodes its own with a whole copy of the weights in the compute dtype: a decoding step is short, and would
    spend its time on gathering them again. On one device without FSDP2 the run's own copy is used.
    """

    @staticmethod
    def of(
        plan: RunPlan, batches: Batches, inputs: Inputs, write_assets: Callable[[Path], None], world: World
    ) -> "HeldOutPrompts | None":
        """None where validation decodes none. write_assets: writes a model without its weights."""
        validation = plan.config.validation
        if not validation.enable or not validation.generate_prompts:
            return None
        with TemporaryDirectory() as folder:
            # as tidar.evaluate finds them in a checkpoint
            assets = Path(folder) / "assets"
            write_assets(assets)
            ends = end_token_ids(assets, read_config_json(assets))
        return HeldOutPrompts(plan, batches.held_out_rows, inputs, ends, world)

    def __init__(self, plan: RunPlan, rows: PackedRows, inputs: Inputs, ends: list[int], world: World):
        """rows: held-out ones. ends: the model's end tokens."""
        config = plan.config
        self.decoder, self.tokenizer, self.ends, self.device = plan.decoder, inputs.tokenizer, ends, world.device
        self.method = Method(config.tidar.pattern, config.tidar.block_size, inputs.spec.mask_token_id)
        prompts = held_out_prompts(rows, config.validation.generate_prompts)
        self.n_prompts, self.prompts = len(prompts), prompts[world.rank :: world.size]
        self.n_new = n_new_tokens(config.training.seq_len)

    def decode(
        self,
        parallel: Sharded | OneDevice,
        check: Callable[[], None],
        heartbeat: Callable[[], None],
        wait_for_all: Callable[[], None],
    ) -> DecodedPrompts:
        """All ranks call it. check: called by all before the first step; what it raises interrupts the decoding.
        heartbeat: called after each step. wait_for_all: before the first one, and once this rank is done.
        """
        check()
        wait_for_all()
        started = time.perf_counter()
        with torch.device("meta"):
            model = Decoder(self.decoder)
        model.load_state_dict(parallel.whole_parameters(), assign=True)
        gathering = time.perf_counter() - started
        # shapes change with each validation, so that a graph would not be used again
        engine = Engine(model.eval(), self.method, end_token_ids=self.ends, graph=False)
        stops = end_tokens(engine, self.tokenizer)
        decoded, texts = decode(engine, self.prompts, heartbeat, max_new_tokens=self.n_new, stop_token_ids=stops)
        wait_for_all()
        counts = torch.tensor([decoded.tokens, decoded.forwards], device=self.device)
        dist.all_reduce(counts)
        tokens, forwards = counts.tolist()
        sample = (self._text(self.prompts[0]), self._text(texts[0])) if texts else None
        return DecodedPrompts(self.n_prompts, tokens, forwards, sample, time.perf_counter() - started, gathering)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens) if self.tokenizer else " ".join(map(str, tokens))
