"""The policy's weights on their way to engines and scorers: through shared memory, or Ray's object store.

Weights travel as *segments*: buffers in the safetensors format, laid out once and then rewritten in place. A segment's
header says which version it holds, so that no reader takes a half-written or a later one for what it was sent.
"""

import asyncio
import contextlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from actors.shared_memory import shared_folder
from ocrm_ray.errors import RunError, StaleWeightsError
from ocrm_ray.records import PolicyWeights

NUM_SEGMENTS = 2
"""One is read while the next one is written; more only while versions are held."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "BOOL": torch.bool}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BEFORE_VERSION = b'{"__metadata__":{"version":"'
_VERSION_DIGITS = 20
_VERSION = slice(8 + len(_BEFORE_VERSION), 8 + len(_BEFORE_VERSION) + _VERSION_DIGITS)
_BEING_WRITTEN = -1

# What Ray's object store gives is mapped read-only, and only read here.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


def header_of(tensors: Mapping[str, Tensor]) -> bytes:
    """Header of a segment for ``tensors``, still without a version; widest elements first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"version": f"{_BEING_WRITTEN:{_VERSION_DIGITS}}"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


class Segment:
    """A buffer [num_bytes] of uint8 that begins with a header; ``tensors`` are views into it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        data = 8 + int.from_bytes(buffer[:8].numpy().tobytes(), "little")
        entries = json.loads(buffer[8:data].numpy().tobytes())
        del entries["__metadata__"]
        self._data = buffer[data:]
        array = self._data.numpy()
        # each over a slice of the array: as views of one tensor they would count as tied when they are saved
        flat = {name: torch.from_numpy(array[slice(*entry["data_offsets"])]) for name, entry in entries.items()}
        self.tensors = {name: flat[name].view(_DTYPES[e["dtype"]]).view(e["shape"]) for name, e in entries.items()}

    def write(self, version: int, buckets: Iterable[Mapping[str, Tensor]]) -> None:
        """One copy of every tensor; until the last is there, the segment has no version that a reader could ask for."""
        self._stamp(_BEING_WRITTEN)
        missing = set(self.tensors)
        for bucket in buckets:
            for name, tensor in bucket.items():
                self.tensors[name].copy_(tensor)
            missing -= bucket.keys()
        assert not missing, f"not exported: {sorted(missing)}"
        self._stamp(version)

    def require(self, version: int) -> None:
        """StaleWeightsError unless the segment holds ``version``, all of it."""
        held = int(self.buffer[_VERSION].numpy().tobytes())
        if held != version:
            what = "half-written weights" if held == _BEING_WRITTEN else f"version {held}"
            raise StaleWeightsError(f"a segment holds {what} instead of version {version}: it was released too early")

    def checksum(self) -> int:
        """CRC-32 of the tensors' bytes."""
        return zlib.crc32(self._data.numpy().data)

    def _stamp(self, version: int) -> None:
        self.buffer[_VERSION] = torch.frombuffer(bytearray(b"%*d" % (_VERSION_DIGITS, version)), dtype=torch.uint8)


class WeightExporter:
    """The trainer's side. ``release`` and ``send`` may run beside ``export``."""

    def __init__(self, folder: Path | None, tensors: Mapping[str, Tensor], checksum: bool) -> None:
        """``tensors`` give the layout, on whatever device. ``folder``: in shared memory, for segments; None: by the
        object store."""
        self._folder = folder
        self._header = header_of(tensors)
        self._num_bytes = len(self._header) + sum(tensor.nbytes for tensor in tensors.values())
        self._checksum = checksum
        self._free = [self._create() for _ in range(NUM_SEGMENTS if folder else 1)]
        self._held: dict[int, tuple[Path, Segment]] = {}

    def export(self, version: int, buckets: Iterable[Mapping[str, Tensor]]) -> PolicyWeights:
        """Copy the tensors, bucket after bucket, to where readers find them until the version is released."""
        assert version not in self._held, f"version {version} is exported already"
        path, segment = self._held[version] = self._free.pop() if self._free else self._create()
        segment.write(version, buckets)
        weights = PolicyWeights(version, path, self._num_bytes, segment.checksum() if self._checksum else None)
        if self._folder is not None:
            return weights
        import ray

        weights = replace(weights, reference=ray.put(segment.buffer.numpy()))
        self.release(weights)
        return weights

    def release(self, weights: PolicyWeights) -> None:
        """Nobody reads ``weights`` any more; again: no effect."""
        if weights.version in self._held:
            self._free.append(self._held.pop(weights.version))

    def close(self) -> None:
        """Remove every segment, held or not."""
        for path, _ in (*self._free, *self._held.values()):
            path.unlink(missing_ok=True)

    def send(self, weights: PolicyWeights) -> None:
        """The trainer's part of getting ``weights`` into engines: here they read for themselves."""

    def _create(self) -> tuple[Path, Segment]:
        if self._folder is None:
            path, buffer = Path("object-store"), torch.zeros(self._num_bytes, dtype=torch.uint8)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            # a name that no earlier trainer of this run has used: readers keep their mappings
            descriptor, name = tempfile.mkstemp(prefix="policy-", suffix=".safetensors", dir=self._folder)
            os.close(descriptor)
            path, buffer = Path(name), _new_file(Path(name), self._num_bytes)
        buffer[: len(self._header)] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        return path, Segment(buffer)


class WeightReader:
    """Reads weights where they lie; mappings stay open from one publish to the next, so no page is faulted in twice."""

    def __init__(self) -> None:
        self._segments: dict[Path, Segment] = {}

    @contextlib.contextmanager
    def read(self, weights: PolicyWeights) -> Iterator[dict[str, Tensor]]:
        """The tensors, valid inside the context. StaleWeightsError, also at its end, if they are not ``weights``."""
        segment = self._segment(weights)
        segment.require(weights.version)
        if weights.checksum is not None and segment.checksum() != weights.checksum:
            raise StaleWeightsError(f"version {weights.version} at {weights.path} differs from its checksum")
        yield segment.tensors
        segment.require(weights.version)

    def _segment(self, weights: PolicyWeights) -> Segment:
        if weights.reference is not None:
            import ray

            return Segment(torch.from_numpy(ray.get(weights.reference)))
        if weights.path not in self._segments:
            name, size = str(weights.path), weights.path.stat().st_size
            # not shared: what is written to these views by mistake stays in this process
            self._segments[weights.path] = Segment(torch.from_file(name, shared=False, size=size, dtype=torch.uint8))
        return self._segments[weights.path]


class LocalCopy:
    """This node's copy of weights in the object store, for an engine's processes, which cannot reach it: one file."""

    def __init__(self) -> None:
        self._folder = contextlib.ExitStack()
        self._path: Path | None = None
        self._buffer = torch.empty(0)

    async def fetch(self, weights: PolicyWeights) -> PolicyWeights:
        """``weights`` at a path of this node, unless they come by NCCL; what was fetched before is gone."""
        if weights.reference is None or weights.nccl is not None:
            return weights
        array = await weights.reference
        if self._path is None:
            self._path = self._folder.enter_context(shared_folder("engine")) / "policy.safetensors"
            self._buffer = _new_file(self._path, weights.num_bytes)
        await asyncio.to_thread(self._buffer.copy_, torch.from_numpy(array))
        return replace(weights, path=self._path, reference=None)

    def close(self) -> None:
        """Remove the file."""
        self._folder.close()


def _new_file(path: Path, num_bytes: int) -> Tensor:
    """A file [num_bytes] mapped as uint8, every page of it in place. RunError where there is no room for it."""
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            raise RunError(f"{path.parent}: no room for weights of {num_bytes >> 20} MiB: enlarge it") from error
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8).zero_()
