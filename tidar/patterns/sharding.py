"""The model positions of a row divided over ranks, derived from the pattern's mask: what context parallelism deals."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tidar.config import UserError
from tidar.patterns.base import KeyRange, MaskMod, ModelBatch, Pattern, Share, Targets, key_ranges
from tidar.patterns.checks import probe_ids

# positions of a tile of attention: what FlexAttention skips or computes as a whole
TILE = 128
# chunks of a part for each rank, where they are of whole tiles: with 8, work differed by 1.3 % at most in 40 packed
# rows of 65536 tokens, with 2 by up to 16 %; more chunks need more slots for blocks that straddle their ends
MOST_CHUNKS = 8


class RowSharding:
    """How the model positions of a row of `seq_len` tokens are dealt to `n_ranks`.

    A part of the row (see `Pattern.parts`) is private where it consists of blocks that see themselves and are seen by
    nothing else, such as the noisy half of `tidar`; keys and values of the other parts are shared with all ranks. That
    is known of masks that are made of ranges; a row of one part is shared whichever mask it has.
    Each part is divided into as many chunks, `n_chunks` for each rank, which are dealt so that all ranks have about
    equally much to do in this row, whatever documents it has. A private block is where its first position is. A rank's
    positions are those of the shared parts, then those of the private parts: all shapes are static, and unused slots
    see only themselves.
    """

    def __init__(self, pattern: Pattern, name: str, seq_len: int, n_ranks: int, multiple: int = 1):
        """name: of the pattern, for messages. multiple: of which private slots, if any, make the number of positions.

        Raises UserError where a row cannot be divided.
        """
        self.n_ranks, self.block_size = n_ranks, pattern.block_size
        self.pattern, self.about = pattern, f"tidar.pattern = {name}"
        if seq_len % (2 * n_ranks):
            raise UserError(
                f"training.seq_len = {seq_len}: must be a multiple of {2 * n_ranks}, twice "
                f"parallelism.context_parallel_degree = {n_ranks}"
            )
        self.parts = pattern.parts(seq_len)
        self.private = self._private_parts(seq_len)
        for part, length in self.parts.items():
            if part not in self.private and length % (2 * n_ranks):
                raise UserError(
                    f"{self.about}: cannot be sharded for parallelism.context_parallel_degree = {n_ranks}: "
                    f"part {part}, whose keys others see, has {length} positions, no multiple of {2 * n_ranks}"
                )
        # the lengths of the shared parts
        self.shared = [length for part, length in self.parts.items() if part not in self.private]
        lengths = (seq_len, *self.shared)
        fits = (n for n in (MOST_CHUNKS, 4) if all(length % (n * n_ranks * TILE) == 0 for length in lengths))
        self.n_chunks = next(fits, 2)
        # the slots of a rank for each private part
        self.slots = {part: self._n_slots(self.parts[part]) for part in self.parts if part in self.private}
        for part in list(self.slots)[-1:]:
            self.slots[part] += -self.n_positions % multiple

    @property
    def n_positions(self) -> int:
        """Positions of each rank, unused slots included."""
        return self.n_shared // self.n_ranks + sum(self.slots.values())

    @property
    def n_shared(self) -> int:
        """Positions of a row whose keys and values all ranks see."""
        return sum(self.shared)

    @property
    def n_keys(self) -> int:
        """Keys of each rank: the shared ones of all ranks, and its own private ones."""
        return self.n_shared + sum(self.slots.values())

    def share(self, batch: ModelBatch, rank: int) -> ModelBatch:
        """A rank's positions and targets of rows. Raises UserError where a block cannot be dealt."""
        length = batch.input_ids.shape[1]
        ranges = key_ranges(self.pattern.mask_mod(batch.documents))
        blocks = private_blocks(ranges) if ranges is not None and self.private else None
        owner = self._owners(ranges, len(batch.input_ids))
        positions = self._positions(rank, owner, blocks)
        at = positions.clamp(min=0)
        position_ids = batch.position_ids.gather(1, at) * (positions >= 0)
        slot = torch.full((len(positions), length + 1), -1)
        slot.scatter_(1, torch.where(positions < 0, length, positions), torch.arange(positions.shape[1]).expand_as(at))
        targets = {loss: _own_targets(target, slot, length, at.shape[1]) for loss, target in batch.targets.items()}
        dealt = self._dealt_keys(owner)
        order = dealt.flatten().argsort().view(len(positions), -1)
        own_ranges = None if ranges is None else self._ranges(ranges, positions)
        share = Share(length, positions, own_ranges, self.n_keys, order, dealt)
        input_ids = batch.input_ids.gather(1, at)
        return replace(batch, input_ids=input_ids, position_ids=position_ids, targets=targets, share=share)

    def _private_parts(self, seq_len: int) -> set[str]:
        ids = probe_ids(seq_len)
        rows = self.pattern.layout(torch.zeros_like(ids), ids, torch.ones(ids.shape), [0, 1])
        ranges = key_ranges(self.pattern.mask_mod(rows.documents))
        if ranges is None and len(self.parts) == 1:
            return set()
        if ranges is None:
            raise UserError(
                f"{self.about}: cannot be sharded for parallelism.context_parallel_degree = {self.n_ranks}: its "
                f"mask_mod does not say which keys of its parts {', '.join(self.parts)} other ranks need",
                "it must be made by in_range or in_either (docs/patterns.md)",
            )
        start, end = private_blocks(ranges)
        found, first = set(), 0
        for part, length in self.pattern.parts(ids.shape[1]).items():
            own = slice(first, first + length)
            low, high = start[:, own], end[:, own]
            inside = (low >= first) & (high <= first + length) & (high - low <= self.block_size)
            if inside.all():
                found.add(part)
            first += length
        return found

    def _chunk(self, length: int) -> int:
        return -(-length // (self.n_chunks * self.n_ranks))

    def _n_slots(self, length: int) -> int:
        # the last block of a chunk may end in the next one
        slots = self.n_chunks * (self._chunk(length) + self.block_size - 1)
        if slots > 2 * TILE:
            slots += -slots % TILE
        return min(slots, length)

    def _owners(self, ranges: list[KeyRange] | None, batch: int) -> Tensor:
        """The rank of each chunk, the same in all parts, `[batch, chunks]`."""
        length = sum(self.parts.values())
        # of a mask that is not made of ranges nothing is known; it is taken to be causal
        pairs = torch.arange(length).expand(batch, -1) if ranges is None else sum(end - start for start, end in ranges)
        work = torch.zeros(batch, self.n_chunks * self.n_ranks, dtype=torch.long)
        for part in pairs.split(list(self.parts.values()), dim=1):  # type: ignore[union-attr]
            chunk = self._chunk(part.shape[1])
            work += F.pad(part, (0, work.shape[1] * chunk - part.shape[1])).view(*work.shape, chunk).sum(dim=2)
        return torch.tensor([self._deal(row) for row in work.tolist()])

    def _deal(self, work: list[int]) -> list[int]:
        """The rank of each chunk. The largest go first, each to the rank with the least work of those that lack one."""
        owner, load, left = [0] * len(work), [0] * self.n_ranks, [self.n_chunks] * self.n_ranks
        for chunk in sorted(range(len(work)), key=work.__getitem__, reverse=True):
            rank = min((rank for rank in range(self.n_ranks) if left[rank]), key=load.__getitem__)
            owner[chunk], load[rank], left[rank] = rank, load[rank] + work[chunk], left[rank] - 1
        return owner

    def _dealt(self, owner: Tensor, rank: int, length: int) -> Tensor:
        """A rank's indices in a shared part of so many positions, `[batch, length / ranks]`."""
        chunks = (owner == rank).nonzero()[:, 1].view(len(owner), -1, 1)
        size = self._chunk(length)
        return (chunks * size + torch.arange(size)).flatten(1)

    def _dealt_keys(self, owner: Tensor) -> Tensor:
        """See `Share`."""
        columns = [torch.empty(len(owner), 0, dtype=torch.long)]
        for rank in range(self.n_ranks):
            columns += [self._dealt(owner, rank, length) + sum(self.shared[:i]) for i, length in enumerate(self.shared)]
        keys = torch.cat(columns, dim=1)
        return (keys + torch.arange(len(keys))[:, None] * keys.shape[1]).T.contiguous()

    def _positions(self, rank: int, owner: Tensor, blocks: KeyRange | None) -> Tensor:
        columns: dict[bool, list[Tensor]] = {False: [], True: []}
        first = 0
        for part, length in self.parts.items():
            is_private = part in self.private
            if is_private:
                assert blocks
                start = blocks[0][:, first : first + length].long() - first
                if (start < 0).any():
                    raise UserError(
                        f"{self.about}: cannot be sharded for parallelism.context_parallel_degree: part {part} is not "
                        "made of blocks that see themselves and are seen by nothing else"
                    )
                owns = owner.gather(1, start // self._chunk(length)) == rank
                mine = [self._padded(row.nonzero()[:, 0] + first, self.slots[part]) for row in owns]
                columns[True].append(torch.stack(mine))
            else:
                columns[False].append(self._dealt(owner, rank, length) + first)
            first += length
        return torch.cat(columns[False] + columns[True], dim=1)

    def _padded(self, positions: Tensor, slots: int) -> Tensor:
        if len(positions) > slots:
            raise UserError(
                f"{self.about}: cannot be sharded for parallelism.context_parallel_degree = {self.n_ranks}: its blocks "
                f"have more than the block_size = {self.block_size} positions that it states"
            )
        return F.pad(positions, (0, slots - len(positions)), value=-1)

    def _ranges(self, ranges: list[KeyRange], positions: Tensor) -> Tensor:
        """See `Share`."""
        is_shared = torch.cat([torch.full((n,), part not in self.private) for part, n in self.parts.items()])
        # keys before each bound: shared ones, in the row's order
        key = F.pad(is_shared.cumsum(dim=0), (1, 0)).int()
        own_key = torch.arange(positions.shape[1], dtype=torch.int32) + self.n_keys - self.n_positions
        at, used = positions.clamp(min=0), positions >= 0
        in_private = ~is_shared[at] | ~used
        found = []
        for number, bounds in enumerate(ranges):
            start, end = (bound.gather(1, at) for bound in bounds)
            is_own = in_private & (start <= at) & (at < end) & used
            before = own_key - (at - start).int()
            start, end = (
                torch.where(is_own, before, key[start.long()]),
                torch.where(is_own, before + end - start, key[end.long()]),
            )
            nothing = own_key if number == 0 else torch.zeros_like(own_key)
            start, end = torch.where(used, start, nothing), torch.where(used, end, nothing + (number == 0))
            found.append(torch.stack([start, end]))
        return torch.stack(found).int()


def private_blocks(ranges: list[KeyRange]) -> KeyRange:
    """Bounds of each position's private block, -1 where it is in none; both `[batch, positions]` int32.

    A block is private where all its positions see the whole of it by one range, and nothing else sees any of it.
    """
    first = ranges[0][0]
    at = torch.arange(first.shape[1], dtype=torch.int32, device=first.device).expand_as(first)
    start, end = at, at
    seen = torch.zeros(first.shape[0], first.shape[1] + 1, dtype=torch.int32, device=first.device)
    for low, high in ranges:
        seen.scatter_add_(1, low.long(), torch.ones_like(at)).scatter_add_(1, high.long(), -torch.ones_like(at))
        contains = (low <= at) & (at < high)
        start, end = torch.where(contains, low, start), torch.where(contains, high, end)
    seen = seen.cumsum(dim=1)[:, :-1]
    as_first = (start.gather(1, start.long()) == start) & (end.gather(1, start.long()) == end)
    # of the positions of a block, only its first may be the first of one
    agrees = as_first & (_count(start == at, start, end) == 1) & (seen == end - start)
    is_private = (end > start) & (_count(agrees, start, end) == end - start)
    return torch.where(is_private, start, -1), torch.where(is_private, end, -1)


def _count(flags: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """How many flags are true from `start` to `end`, end excluded."""
    before = F.pad(flags.cumsum(dim=1), (1, 0))
    return before.gather(1, end.long()) - before.gather(1, start.long())


def shared_mask_mod(mask_mod: MaskMod, positions: Tensor) -> MaskMod:
    """The mask of the queries at `positions`, `[batch, queries]`, over all keys of the row."""

    def of_positions(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask_mod(b, h, positions[b, q], k)

    return of_positions


def _own_targets(targets: Targets, slot: Tensor, length: int, n_positions: int) -> Targets:
    """The targets whose positions have a slot. slot: of each position, -1 for none, `[batch, length + 1]`."""
    row = targets.index // length
    own = slot[row, targets.index % length]
    kept = own >= 0
    columns = {name: column[kept] for name, column in vars(targets).items()}
    return Targets(**columns | {"index": (row * n_positions + own)[kept]})
