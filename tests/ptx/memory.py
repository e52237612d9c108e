# SPDX-License-Identifier: Apache-2.0
"""The memories of the interpreted GPU: every access is checked, and those to global memory are counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptx.parser import PtxError

Array = NDArray[Any]
SECTOR = 32  # bytes that memory moves at least
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Between allocations, so that what lies behind one is not the beginning of another.
GAP = 4096
ALIGNMENT = 512
NOBODY, MANY = -1, -2
WHOLE_WARP = np.uint32(0xFFFFFFFF)
ROUNDINGS = 8  # in units of the last place


@dataclass
class Traffic:
    """Bytes of global memory that one or more launches moved.

    Attributes:
        read, written: what instructions asked for.
        read_sectors, written_sectors: in sectors, counted once per instruction of a warp; no cache.
        touched_read, touched_written: in sectors, counted once per launch; an ideal cache.
    """

    read: int = 0
    written: int = 0
    read_sectors: int = 0
    written_sectors: int = 0
    touched_read: int = 0
    touched_written: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def requested(self) -> int:
        return self.read + self.written

    @property
    def sectors(self) -> int:
        return SECTOR * (self.read_sectors + self.written_sectors)

    @property
    def touched(self) -> int:
        return SECTOR * (self.touched_read + self.touched_written)


class GlobalMemory:
    """A copy of the storages of some tensors, at the host's addresses: what is passed to a kernel needs no translation.
    Only elements of the tensors may be accessed.

    Accesses are by offset into `bytes`, where a storage keeps its alignment. What kernels wrote goes back with
    `write_back`.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = [tensor for tensor in tensors if tensor.numel()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self.places: dict[int, int] = {}  # address of a storage -> offset
        self.host: list[tuple[int, Array]] = []
        end = GAP
        for address, storage in storages.items():
            offset = -(-end // ALIGNMENT) * ALIGNMENT + address % ALIGNMENT
            content = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
            self.places[address] = offset
            self.host.append((offset, content))
            end = offset + content.size + GAP
        size = -(-end // ALIGNMENT) * ALIGNMENT
        self.bytes = np.full(size, 0xFF, np.uint8)
        for offset, content in self.host:
            self.bytes[offset : offset + content.size] = content
        owned = np.zeros(size, bool)
        for tensor in tensors:
            offset = self.places[tensor.untyped_storage().data_ptr()]
            _mark(owned[offset : offset + tensor.untyped_storage().nbytes()], tensor)
        # How many owned bytes come before each: an access is inside when all of its bytes are.
        self.owned_before = np.concatenate([[0], np.cumsum(owned)]).astype(np.int64)
        self.elements = {width: self.bytes.view(kind) for width, kind in UNSIGNED.items()}
        # By address; a storage at 0, of no bytes, so that there is one before every address.
        rows = sorted([(0, 0, 0), *((at, storages[at].nbytes(), offset) for at, offset in self.places.items())])
        self.starts = np.array([row[0] for row in rows], np.uint64)
        self.sizes, self.shifts = (np.array([row[column] for row in rows], np.int64) for column in (1, 2))

    def offsets(self, address: Array) -> NDArray[np.int64]:
        """Of addresses, -1 where no storage is."""
        place = np.searchsorted(self.starts, address, side="right") - 1
        offset = address.astype(np.int64) - self.starts[place].astype(np.int64)
        return np.where(offset < self.sizes[place], offset + self.shifts[place], -1)

    def write_back(self) -> None:
        for offset, content in self.host:
            changed = self.bytes[offset : offset + content.size]
            if not np.array_equal(content, changed):
                content[...] = changed


class Snapshot:
    """The content of the storages of some tensors, to be put back."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors if one.numel()}
        self.kept = [(storage, storage.clone()) for storage in storages.values()]

    def restore(self) -> None:
        for storage, content in self.kept:
            storage.copy_(content)


def _mark(owned: NDArray[np.bool_], tensor: Tensor) -> None:
    """Bytes of a tensor's elements in its storage."""
    if tensor.numel() == 0:
        return
    width = tensor.element_size()
    shape = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    strides = [stride * width for stride in tensor.stride() if stride]
    begin = owned[tensor.storage_offset() * width :]
    np.lib.stride_tricks.as_strided(begin, (*shape, width), (*strides, 1))[...] = True


class GlobalAccess:
    """Global memory as one launch sees it: checks, conflicts between blocks, traffic.

    Without fences or atomics nothing orders blocks: what one wrote, no other may touch, and what one read, no other
    may write.
    """

    def __init__(self, memory: GlobalMemory, threads_per_block: int, granule: int, ordered: bool) -> None:
        self.memory, self.threads_per_block, self.granule, self.ordered = memory, threads_per_block, granule, ordered
        self.traffic = Traffic()
        size = memory.bytes.size
        self.touched = {kind: np.zeros(size // SECTOR + 1, bool) for kind in ("read", "write")}
        if not ordered:
            self.writer = np.full(size // granule + 1, NOBODY, np.int32)
            self.reader = np.full(size // granule + 1, NOBODY, np.int32)

    def load(self, address: Array, width: int, count: int, threads: Array) -> Array:
        """Vectors of `count` elements of `width` bytes: [threads] -> [threads, count]."""
        offset = self.check(address, width * count, threads, "read")
        index = offset // width
        return self.memory.elements[width][index[:, None] + np.arange(count) if count > 1 else index[:, None]]

    def store(self, address: Array, values: Array, threads: Array) -> None:
        """Of [threads, count] elements."""
        width, count = values.dtype.itemsize, values.shape[1]
        index = self.check(address, width * count, threads, "write") // width
        self.memory.elements[width][index[:, None] + np.arange(count)] = values

    def check(self, address: Array, size: int, threads: Array, kind: str) -> NDArray[np.int64]:
        """Offsets of an access that is in bounds, aligned, and in conflict with no other block; it is counted."""
        offset = self.memory.offsets(address)
        inside = (offset >= 0) & (offset <= self.memory.bytes.size - size)
        before = self.memory.owned_before
        at = np.where(inside, offset, 0)
        inside &= before[at + size] - before[at] == size
        if not inside.all():
            raise PtxError(f"global {kind} out of bounds, {size} bytes, {self.who(threads[~inside][0])}")
        if (offset & (size - 1)).any():
            raise PtxError(
                f"misaligned global {kind} of {size} bytes, {self.who(threads[offset & (size - 1) != 0][0])}"
            )
        if not self.ordered:
            self.check_blocks(offset, size, threads, kind)
        self.count(offset, size, threads, kind)
        return offset

    def check_blocks(self, offset: NDArray[np.int64], size: int, threads: Array, kind: str) -> None:
        place = offset[:, None] // self.granule + np.arange(max(1, size // self.granule))
        block = (threads // self.threads_per_block)[:, None].astype(np.int32)
        writer, reader = self.writer[place], self.reader[place]
        conflict = (writer != NOBODY) & (writer != block)
        if kind == "write":
            conflict |= (reader != NOBODY) & (reader != block)
        if conflict.any():
            raise PtxError(f"race between blocks in global memory, {self.who(threads[conflict.any(1)][0])}")
        if kind == "write":
            self.writer[place] = block
        else:
            self.reader[place] = np.where((reader == NOBODY) | (reader == block), block, MANY)
            # Blocks that read one place by the same instruction overwrote each other.
            self.reader[place[self.reader[place] != block]] = MANY
        if kind == "write" and (self.writer[place] != block).any():
            raise PtxError(f"race between blocks in global memory, {self.who(threads[0])}")

    def count(self, offset: NDArray[np.int64], size: int, threads: Array, kind: str) -> None:
        sector = offset // SECTOR
        # One sector holds an aligned access; a warp's threads that share it are served at once.
        key = np.sort((threads.astype(np.int64) // 32) * (self.memory.bytes.size // SECTOR + 1) + sector)
        sectors = int(np.count_nonzero(key[1:] != key[:-1])) + 1
        fresh = self.touched[kind]
        before = int(np.count_nonzero(fresh[sector]))
        new = np.unique(sector[~fresh[sector]]).size if before < sector.size else 0
        fresh[sector] = True
        traffic = self.traffic
        if kind == "read":
            traffic.read += size * offset.size
            traffic.read_sectors += sectors
            traffic.touched_read += new
        else:
            traffic.written += size * offset.size
            traffic.written_sectors += sectors
            traffic.touched_written += new

    def who(self, thread: np.generic) -> str:
        return f"block {int(thread) // self.threads_per_block} thread {int(thread) % self.threads_per_block}"


class SharedMemory:
    """Shared memory of all blocks, filled with NaN, and who accessed it last.

    Two accesses to a place by different threads, one of them a write, need a barrier between them: bar.sync across
    warps, bar.warp.sync at least within one, of lanes that both belong to. A place that cp.async is filling belongs to
    nobody until the wait.
    """

    def __init__(self, blocks: int, threads_per_block: int, size: int, granule: int) -> None:
        self.threads_per_block, self.size, self.granule = threads_per_block, size, granule
        self.pitch = -(-max(size, 16) // 16) * 16
        self.bytes = np.full(blocks * self.pitch, 0xFF, np.uint8)
        self.elements = {width: self.bytes.view(kind) for width, kind in UNSIGNED.items()}
        places = blocks * self.pitch // granule
        self.barriers = np.zeros(blocks, np.int32)
        # How many barriers of its warp a thread has passed, and the lanes that were at the last one.
        self.warp_barriers = np.zeros(blocks * threads_per_block, np.int32)
        self.team = np.full(blocks * threads_per_block, WHOLE_WARP)
        # Thread of the last write, and how many barriers its block and it had passed.
        self.writer, self.write_epoch, self.write_warp_epoch = (np.full(places, NOBODY, np.int32) for _ in range(3))
        # The same of the last read, with warp (or MANY) and lanes of those that read since the barrier.
        self.read_warp, self.read_epoch, self.read_warp_epoch = (np.full(places, NOBODY, np.int32) for _ in range(3))
        self.read_lanes = np.zeros(places, np.uint32)
        self.filling = np.zeros(places, bool)
        self.any_filling = False

    def load(self, address: Array, width: int, count: int, threads: Array) -> Array:
        offset = self.check(address, width * count, threads, "read")
        index = offset // width
        return self.elements[width][index[:, None] + np.arange(count) if count > 1 else index[:, None]]

    def store(self, address: Array, values: Array, threads: Array) -> None:
        width, count = values.dtype.itemsize, values.shape[1]
        offset = self.check(address, width * count, threads, "write")
        index = offset[:, None] // width + np.arange(count)
        self.elements[width][index] = values
        # Threads that write one place by the same instruction must agree, but for roundings: where a product is fused
        # into the first step of a sum over lanes, its lanes do not have the same last bit.
        stored = self.elements[width][index]
        if (np.maximum(stored, values) - np.minimum(stored, values) > ROUNDINGS).any():
            raise PtxError("shared-memory race: threads write different values to one place by one instruction")

    def begin_filling(self, address: Array, size: int, threads: Array) -> None:
        """cp.async: from here on until `end_filling` the places must not be touched."""
        offset = self.check(address, size, threads, "write")
        self.filling[self.places(offset, size)] = True
        self.any_filling = True

    def end_filling(self, address: Array, values: Array, threads: Array) -> None:
        """The wait of the thread that had issued the copy."""
        size = values.dtype.itemsize * values.shape[1]
        offset = self.offsets(address, size, threads, "write")
        self.filling[self.places(offset, size)] = False
        self.any_filling = bool(self.filling.any())
        self.store(address, values, threads)

    def synchronise(self, blocks: Array) -> None:
        self.barriers[blocks] += 1

    def synchronise_lanes(self, threads: Array, lanes: Array) -> None:
        """Threads at a barrier of their warp, and the lanes that it is for."""
        self.warp_barriers[threads] += 1
        self.team[threads] = lanes

    def offsets(self, address: Array, size: int, threads: Array, kind: str) -> NDArray[np.int64]:
        offset = address.astype(np.int64)
        if ((offset < 0) | (offset > self.size - size)).any():
            raise PtxError(f"shared {kind} out of bounds: {size} bytes of {self.size}")
        if (offset & (size - 1)).any():
            raise PtxError(f"misaligned shared {kind} of {size} bytes")
        return offset + (threads // self.threads_per_block).astype(np.int64) * self.pitch

    def places(self, offset: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        return offset[:, None] // self.granule + np.arange(max(1, size // self.granule))

    def check(self, address: Array, size: int, threads: Array, kind: str) -> NDArray[np.int64]:
        offset = self.offsets(address, size, threads, kind)
        place = self.places(offset, size)
        if self.any_filling and self.filling[place].any():
            raise PtxError(f"shared {kind} of a place that cp.async is filling")
        thread = threads.astype(np.int32)[:, None]
        warp, lane = thread // 32, np.uint32(1) << (thread % 32).astype(np.uint32)
        epoch = self.barriers[thread // self.threads_per_block]
        warp_epoch, strangers = self.warp_barriers[thread], ~self.team[thread]

        writer = self.writer[place]
        recent = self.write_epoch[place] == epoch
        across = recent & (writer // 32 != warp)
        strange = np.uint32(1) << (writer % 32).astype(np.uint32) & strangers != 0
        within = recent & ~across & (writer != thread) & (strange | (self.write_warp_epoch[place] == warp_epoch))
        if kind == "write":
            recent = self.read_epoch[place] == epoch
            others = recent & (self.read_warp[place] != warp)
            across |= others
            readers = self.read_lanes[place] & ~lane
            same_epoch = (readers != 0) & (self.read_warp_epoch[place] == warp_epoch)
            within |= recent & ~others & (same_epoch | (readers & strangers != 0))
        if across.any() or within.any():
            who = "warps" if across.any() else "threads of a warp"
            raise PtxError(f"shared-memory race between {who}: no barrier since another")
        if kind == "read" and (writer == NOBODY).any():
            raise PtxError("shared read of a place that nobody has written")
        if kind == "write":
            self.writer[place] = thread
            self.write_epoch[place], self.write_warp_epoch[place] = epoch, warp_epoch
        else:
            self.note_readers(place, warp, lane, epoch, warp_epoch, strangers)
        return offset

    def note_readers(
        self, place: Array, warp: Array, lane: Array, epoch: Array, warp_epoch: Array, strangers: Array
    ) -> None:
        """The warp that has read since the last barrier of the block, or MANY, and its lanes since theirs."""
        recent = self.read_epoch[place] == epoch
        known = np.where(self.read_warp_epoch[place] == warp_epoch, WHOLE_WARP, strangers)
        self.read_lanes[place] = np.where(recent, self.read_lanes[place] & known, 0)
        np.bitwise_or.at(self.read_lanes, place, lane)
        self.read_warp[place] = np.where(~recent | (self.read_warp[place] == warp), warp, MANY)
        self.read_epoch[place], self.read_warp_epoch[place] = epoch, warp_epoch
        self.read_warp[place[(self.read_warp[place] != warp)]] = MANY
