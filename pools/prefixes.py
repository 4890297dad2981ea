"""Prefixes: which instances hold the beginning of a prompt in their KV cache, approximately. Pure.

A prompt's JSON is cut into blocks of ``BLOCK_BYTES``; each block's hash goes on from the one before, so that a block's
hash stands for everything up to it. A later turn of a conversation, or another request behind the same system prompt,
begins with the same bytes and so with the same hashes. No text is kept and no tokenizer is asked.

The index remembers which instance was given which blocks, the latest first to stay: so many blocks as the instance's
KV cache holds, so many in all, so many instances for a block. It is a guess: an engine evicts by its own rules. A wrong
guess costs what routing without it would cost.
"""

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

BLOCK_BYTES = 512  # about 128 tokens of text
LONGEST_BLOCKS = 64  # of a prompt that are looked at: 32 KiB, about 8,000 tokens
BYTES_PER_TOKEN = 4
INDEX_BLOCKS = 200_000  # in all, over every instance: some 60 MB
LEAST_BLOCKS = 256  # of an instance, however many there are
BLOCK_HOLDERS = 8  # instances remembered for a block, the latest: enough to choose from, and a bound on looking up


class Prefix(NamedTuple):
    """The beginning of a prompt: hashes of its whole blocks, and the share of the prompt that one block is."""

    blocks: tuple[int, ...]
    block_share: float

    def cached_tokens(self, blocks: int, input_tokens: int) -> float:
        """Tokens in the first ``blocks`` blocks of a prompt of ``input_tokens``; the last token is never cached."""
        return min(blocks * self.block_share * input_tokens, input_tokens - 1.0)


def prefix_of(model: str, body: bytes, key: bytes) -> Prefix | None:
    """The prefix of the prompt that begins at ``key`` in a JSON body; None for one shorter than a block.

    Whatever follows the prompt in the body is taken for part of it, which only makes the last block differ.
    """
    start = body.find(key)
    if start < 0:
        return None
    prompt = memoryview(body)[start:]
    whole = min(len(prompt) // BLOCK_BYTES, LONGEST_BLOCKS)
    if not whole:
        return None
    blocks, running = [], crc32(model.encode())
    for end in range(BLOCK_BYTES, whole * BLOCK_BYTES + 1, BLOCK_BYTES):
        running = crc32(prompt[end - BLOCK_BYTES : end], running)
        blocks.append(running)
    return Prefix(tuple(blocks), BLOCK_BYTES / len(prompt))


class PrefixIndex:
    """Which blocks each instance was given."""

    def __init__(self) -> None:
        self._blocks: dict[str, dict[int, None]] = {}  # of each instance, the latest last
        self._holders: dict[int, dict[str, None]] = {}  # of each block, the latest last

    def match(self, blocks: Sequence[int]) -> Mapping[str, int]:
        """How many of the first blocks each instance holds, of those that hold any."""
        found: dict[str, int] = {}
        for depth, block in enumerate(blocks):
            holders = self._holders.get(block)
            if holders is None:
                break
            for instance_id in holders:
                if found.get(instance_id, 0) == depth:
                    found[instance_id] = depth + 1
        return found

    def add(self, instance_id: str, blocks: Sequence[int], kv_capacity_tokens: int) -> None:
        """An instance is given these blocks, and so holds them; beyond its capacity it forgets the oldest."""
        held = self._blocks.setdefault(instance_id, {})
        for block in blocks:
            held.pop(block, None)
            held[block] = None
            holders = self._holders.setdefault(block, {})
            holders.pop(instance_id, None)
            holders[instance_id] = None
            if len(holders) > BLOCK_HOLDERS:
                oldest = next(iter(holders))
                del holders[oldest], self._blocks[oldest][block]
        share = max(INDEX_BLOCKS // len(self._blocks), LEAST_BLOCKS)
        most = min(kv_capacity_tokens * BYTES_PER_TOKEN // BLOCK_BYTES, share)
        while len(held) > most:
            self._drop(instance_id, next(iter(held)))

    def keep(self, instance_ids: Container[str]) -> None:
        """Forget all other instances: they are gone, or asleep without their cache."""
        for instance_id in [known for known in self._blocks if known not in instance_ids]:
            for block in list(self._blocks[instance_id]):
                self._drop(instance_id, block)
            del self._blocks[instance_id]

    def __len__(self) -> int:
        """Blocks remembered, over all instances."""
        return sum(map(len, self._blocks.values()))

    def _drop(self, instance_id: str, block: int) -> None:
        del self._blocks[instance_id][block]
        holders = self._holders[block]
        del holders[instance_id]
        if not holders:
            del self._holders[block]
