"""TiDAR decoding for transformers: `model.generate` makes several tokens per forward pass, with the same distribution.

An exported folder holds this file as custom_generate/generate.py, which transformers loads where `from_pretrained` is
given `trust_remote_code=True`. It needs torch and transformers only. The block size B and the mask token are in
config.json under `tidar`.

A step is one forward pass. Its queries are the draft, B tokens that may follow the committed ones, and B groups of B
mask tokens. For B = 2 (rows are queries, columns keys):

              committed    draft   group 1  group 2
    draft 1   ■ ■ ■ … ■    ■ ·     · ·      · ·
    draft 2   ■ ■ ■ … ■    ■ ■     · ·      · ·
    group 1   ■ ■ ■ … ■    ■ ·     ■ ■      · ·        if draft 1 alone is accepted, this group drafts the next block
              ■ ■ ■ … ■    ■ ·     ■ ■      · ·
    group 2   ■ ■ ■ … ■    ■ ■     · ·      ■ ■        if both are accepted, this one
              ■ ■ ■ … ■    ■ ■     · ·      ■ ■

The logits of draft token i decide the token after it (the arg-max, or one drawn), and the draft is accepted as long as
it equals what was decided. So the output has the distribution of autoregressive decoding, whatever the masks predict.
Method: "Think in Diffusion, Talk in Autoregression", arXiv 2511.08923.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList, __version__
from transformers.generation import GenerateDecoderOnlyOutput, StopStringCriteria
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

# arguments and options that ask for another way of decoding, and the values that do not
REFUSED: dict[str, tuple] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "force_words_ids": (),
    "constraints": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "assistant_model": (),
    "prompt_lookup_num_tokens": (),
    "use_mtp": (False,),
    "guidance_scale": (1,),
    "negative_prompt_ids": (),
    "watermarking_config": (),
    "prefix_allowed_tokens_fn": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "token_healing": (False,),
    "inputs_embeds": (),
    "position_ids": (),
    "cache": (),
    "past_key_values": (),
    "cache_implementation": ("dynamic",),
    "prefill_chunk_size": (),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "synced_gpus": (False,),
    "custom_generate": (),
}
# logits processors that look at the scores alone: called once for all sequences and positions of a step
OF_SCORES = {
    f"{name}LogitsWarper" for name in ("Temperature", "TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta")
} | {"SuppressTokensLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization"}


@dataclass
class TidarOutput(GenerateDecoderOnlyOutput):
    """Result of `return_dict_in_generate=True`: `sequences`, and what each of them took.

    `n_tokens`: new tokens, with the end token. `n_forwards`: forward passes for them, with the prefill. Both `[batch]`.
    """

    n_tokens: Tensor | None = None
    n_forwards: Tensor | None = None


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    *,
    model: Any,
    streamer: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> Tensor | TidarOutput:
    """Arguments and result of transformers' `generate`, which prepares them. Raises ValueError for those of REFUSED.

    Prompts are padded on the left. A streamer and stopping criteria see one token of each sequence after another, as in
    plain decoding; so do logits processors where the batch is one sequence.
    """
    _refuse(options)
    _check(model)
    if inputs is None:
        inputs = options.pop("input_ids", None)
    device = model.device if inputs is None else inputs.device
    if options.get("attention_mask") is not None:
        options["attention_mask"] = options["attention_mask"].to(model.device)
    # transformers 5 does not hand the tokenizer on
    criteria = StoppingCriteriaList(stopping_criteria or [])
    configs = [found for found in (generation_config, model.generation_config) if found is not None]
    given = [options.get("stop_strings"), *(found.stop_strings for found in configs)]
    if stop_strings := next((found for found in given if found is not None), None):
        if tokenizer is None:
            raise ValueError(f"stop_strings = {stop_strings!r}: need the tokenizer: generate(..., tokenizer=tokenizer)")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
        options["stop_strings"] = None

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | TidarOutput:
        _refuse(vars(generation_config))
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        decoding = Decoding(model, input_ids, mask, logits_processor, stopping_criteria, generation_config, streamer)
        sequences, n_tokens, n_forwards = (result.to(device) for result in decoding.run())
        if not generation_config.return_dict_in_generate:
            return sequences
        return TidarOutput(sequences=sequences, n_tokens=n_tokens, n_forwards=n_forwards)  # type: ignore[arg-type]

    return GenerationMixin.generate(
        model,
        inputs if inputs is None else inputs.to(model.device).long(),
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=criteria,
        streamer=streamer,
        custom_generate=decode,
        **options,
    )


def _refuse(options: Mapping[str, Any]) -> None:
    for name, allowed in REFUSED.items():
        value = options.get(name)
        if value is not None and value not in allowed:
            shown = f"{name} = {value!r}" if isinstance(value, bool | int | float | str) else name
            raise ValueError(f"{shown}: is no part of TiDAR decoding, but of GenerationMixin.generate(model, ...)")


def _check(model: Any) -> None:
    if tuple(map(int, __version__.split(".")[:2])) < (4, 56):
        raise ValueError(f"transformers {__version__}: TiDAR decoding needs 4.56 or later")
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation = {attention!r}: takes no TiDAR mask: load with 'sdpa' or 'eager'")
    if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model):
        raise ValueError("FSDP, ZeRO-3: weights are sharded, and the ranks take different numbers of forward passes")
    if model.training and model.is_gradient_checkpointing:
        raise ValueError("gradient checkpointing disables the cache in training mode: call model.eval() first")


class SlotCache:
    """Keys and values of all layers, `[batch, n_kv_heads, slots, head_dim]`, in place of one of transformers' caches.

    slots: where those of the next forward pass are written, `[batch, queries]`. end: the slots that it sees.
    """

    slots: Tensor
    end: int

    def __init__(self) -> None:
        self.layers: dict[int, list[Tensor]] = {}

    def get_seq_length(self, *_: Any) -> int:
        return 0  # positions and mask are given

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        stored = self.layers.setdefault(layer, [new[:, :, :0] for new in (keys, values)])
        missing = self.end - stored[0].shape[2]
        if missing > 0:
            room = missing + self.end // 4 + 64
            stored[:] = [torch.cat([old, old.new_zeros(*old.shape[:2], room, old.shape[3])], dim=2) for old in stored]
        slots = self.slots.to(keys.device)[:, None, :, None]
        for old, new in zip(stored, (keys, values)):
            old.scatter_(2, slots.expand_as(new), new)
        return tuple(old[:, :, : self.end] for old in stored)


class Decoding:
    """One call of `generate`. A column is a token of each sequence, with the padding, as in the result.

    ids, mask: prompts and their attention mask, `[batch, columns]`.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        mask: Tensor,
        processors: Any,
        criteria: Any,
        config: GenerationConfig,
        streamer: Any,
    ):
        if not bool((mask[:, -1] == 1).all()):
            raise ValueError("attention_mask: is 0 at the end of a prompt: must be padded on the left")
        own = [type(found).__name__ for found in processors if not type(found).__module__.startswith("transformers.")]
        if own and len(ids) > 1:
            raise ValueError(f"logits_processor {own[0]}: is not of transformers, so it needs a batch of one sequence")
        self.model, self.decoder, self.head = model, model.base_model, model.get_output_embeddings()
        self.block, self.mask_token = model.config.tidar["block_size"], model.config.tidar["mask_token_id"]
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        self.by_scores = all(type(found).__name__ in OF_SCORES for found in processors)
        self.cache, self.n_forwards = SlotCache(), 0
        parameters = inspect.signature(self.decoder.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

        batch, self.shown = ids.shape
        self.limit, device = criteria.max_length or config.max_length, ids.device
        self.prompt, self.mask = ids, mask
        # tokens, some of which may turn out to follow an end token; and the forward pass that committed each
        self.ids = torch.cat([ids, ids.new_zeros(batch, self.limit + self.block - self.shown)], dim=1)
        self.passes = torch.zeros_like(self.ids)
        self.columns = torch.full((batch,), self.shown, device=device)  # that are committed, of each sequence
        self.padding = self.shown - mask.sum(dim=1)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.n_tokens = torch.zeros_like(self.columns)
        ends = [found.eos_token_id.tolist() for found in criteria if hasattr(found, "eos_token_id")]
        self.end_tokens = [token for tokens in ends for token in tokens]
        self.pad_token = self.end_tokens[0] if config.pad_token_id is None and self.end_tokens else config.pad_token_id
        self.draft = ids.new_zeros(batch, 0)
        # one number for each token to draw, so that a token does not depend on how many were accepted before it
        self.uniforms = None
        if config.do_sample:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.uniforms = torch.rand(batch, self.limit, dtype=dtype).to(device)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sequences with their prompts, their numbers of new tokens, and of forward passes."""
        self.prefill()
        while not self.show():
            self.step()
        if self.streamer is not None:
            self.streamer.end()
        last = self.prompt.shape[1] + self.n_tokens - 1
        return self.ids[:, : self.shown], self.n_tokens, self.passes.gather(1, last[:, None])[:, 0]

    def prefill(self) -> None:
        """The prompts and one group of masks after each: its first token and its first draft."""
        lengths = self.mask.sum(dim=1)
        order = self.mask.ne(1).long().argsort(dim=1, stable=True)  # the padding is moved after the prompt
        tokens = self.prompt.gather(1, order)[:, : int(lengths.max())]
        hidden = self.forward(tokens, torch.zeros_like(lengths), lengths[:, None])
        last = hidden.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))
        first, _ = self.decide(self.head(last), torch.full_like(self.prompt[:, :1], -1), self.columns[:, None])
        self.draft = torch.cat([first, self.head(hidden[:, tokens.shape[1] + 1 :]).argmax(dim=-1)], dim=1)

    def step(self) -> None:
        """Verifies the drafts, commits what is accepted and drafts the next blocks."""
        block, running = self.block, self.running()
        in_block = torch.arange(block, device=self.ids.device)
        columns = self.columns[:, None] + in_block
        lengths = self.columns - self.padding
        hidden = self.forward(self.draft, lengths, lengths[:, None] + 1 + in_block)
        for table, value in ((self.ids, self.draft), (self.passes, torch.full_like(self.draft, self.n_forwards))):
            table.scatter_(1, columns, torch.where(running[:, None], value, table.gather(1, columns)))
        chosen, accepted = self.decide(self.head(hidden[:, :block]), self.draft, columns + 1)
        self.columns = torch.where(running, self.columns + accepted, self.columns).clamp(max=self.limit)
        # the masks of the group after the accepted tokens, but the first, whose token is decided already
        rows = accepted[:, None] * block + in_block[1:]
        drafted = self.head(hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[2]))).argmax(dim=-1)
        self.draft = torch.cat([chosen.gather(1, accepted[:, None] - 1), drafted], dim=1)

    def forward(self, tokens: Tensor, first: Tensor, starts: Tensor) -> Tensor:
        """Hidden states of tokens `[batch, n]` from position `first` `[batch]` on, then of groups of masks.

        starts: the position of each group `[batch, groups]`, which sees what is before it and itself. The keys of
        tokens are in the slots of their positions; those of masks come after them, where later passes overwrite them.
        """
        (batch, n), groups, device = tokens.shape, starts.shape[1], tokens.device
        scratch = int(first.max()) + n
        masks = torch.arange(groups * self.block, device=device)
        clean = first[:, None] + torch.arange(n, device=device)
        masked = starts.repeat_interleave(self.block, dim=1)
        # the number of leading slots that each query sees, and the group of each query and slot
        seen = torch.cat([clean + 1, masked], dim=1)
        query_group = torch.cat([masks.new_full((n,), -1), masks // self.block])
        slot_group = torch.cat([masks.new_full((scratch,), -2), masks // self.block])
        sees = torch.arange(len(slot_group), device=device) < seen[:, :, None]
        sees = sees | (query_group[:, None] == slot_group)
        dtype = self.model.dtype
        additive = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)
        self.cache.slots = torch.cat([clean, (scratch + masks).expand(batch, -1)], dim=1)
        self.cache.end = len(slot_group)
        self.n_forwards += 1
        return self.decoder(
            input_ids=torch.cat([tokens, tokens.new_full((batch, len(masks)), self.mask_token)], dim=1),
            position_ids=torch.cat([clean, masked + masks % self.block], dim=1),
            attention_mask={"full_attention": additive[:, None]},
            use_cache=True,
            **{self.cache_name: self.cache},
        ).last_hidden_state

    def decide(self, logits: Tensor, draft: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The token after each draft token, `[batch, n]`, and how many draft tokens are accepted, `[batch]`.

        logits: `[batch, n, vocab]`. draft: -1 after a prompt. columns: of the tokens to decide, `[batch, n]`.
        """
        logits = logits.float().to(draft.device)
        if self.by_scores:
            scores = self.processors(draft.reshape(-1, 1), logits.flatten(0, 1)).view_as(logits)
            chosen = self.choose(scores, columns)
        else:
            chosen = self.decide_in_turn(logits, draft, columns)
        matches = draft[:, 1:] == chosen[:, :-1]
        return chosen, 1 + matches.long().cumprod(dim=1).sum(dim=1)

    def decide_in_turn(self, logits: Tensor, draft: Tensor, columns: Tensor) -> Tensor:
        """`decide` for processors that look at tokens: one after another, as far as the draft is accepted."""
        chosen, ends = torch.zeros_like(draft), draft.new_tensor(self.end_tokens)
        open_rows = self.running() & ~torch.isin(draft[:, 0], ends)
        for i in range(draft.shape[1]):
            # processors take the whole batch, with equally many tokens of each sequence
            for column in columns[open_rows, i].unique().tolist():
                scores = self.processors(self.ids[:, :column], logits[:, i])
                decided = self.choose(scores[:, None], columns[:, i : i + 1])[:, 0]
                chosen[:, i] = torch.where(open_rows & (columns[:, i] == column), decided, chosen[:, i])
            if i + 1 < draft.shape[1]:
                continues = (chosen[:, i] == draft[:, i + 1]) & ~torch.isin(chosen[:, i], ends)
                open_rows = open_rows & continues & (columns[:, i + 1] < self.limit)
        return chosen

    def choose(self, scores: Tensor, columns: Tensor) -> Tensor:
        """Arg-max or draw for each of `[batch, n, vocab]`: `[batch, n]`."""
        if self.uniforms is None:
            return scores.argmax(dim=-1)
        cumulative = scores.to(self.uniforms.dtype).softmax(dim=-1).cumsum(dim=-1)
        # inverse transform sampling: the first token whose cumulative probability exceeds the draw
        uniforms = self.uniforms.gather(1, columns.clamp(max=self.limit - 1))
        reached = uniforms[..., None] * cumulative[..., -1:]
        return torch.searchsorted(cumulative, reached, right=True).squeeze(-1).clamp(max=scores.shape[-1] - 1)

    def running(self) -> Tensor:
        """Sequences that are neither ended nor full."""
        return ~self.closed() & (self.columns < self.limit)

    def closed(self) -> Tensor:
        """Sequences that only padding follows. Without end tokens plain decoding extends all until all have ended."""
        return self.ended if self.end_tokens else torch.zeros_like(self.ended)

    def show(self) -> bool:
        """Shows each column that all sequences have reached to streamer and criteria. True once all have ended."""
        ready = int(self.columns.masked_fill(self.closed(), self.limit).min())
        while self.shown < ready:
            closed = self.closed()
            if self.end_tokens:
                self.ids[:, self.shown].masked_fill_(closed, self.pad_token)
            if self.streamer is not None:
                self.streamer.put(self.ids[:, self.shown].cpu())
            self.shown += 1
            self.n_tokens += ~closed
            self.ended = self.ended | self.criteria(self.ids[:, : self.shown], None)
            if bool(self.ended.all()):
                return True
        return False
