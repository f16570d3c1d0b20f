"""Checkpoints: sharded, atomic, checksummed; written by one mesh, loaded into any other.

Idea    A tensor's record says which slice of which full tensor it is (sharding.py). A checkpoint is
        a set of such slices; a rank of any mesh takes the parts that overlap with its own.
Disk    step-00000100/rank-00003.safetensors  the slices that rank 3 wrote, keys "name[0:8,0:4]"
        step-00000100/manifest.json           the fields of class Manifest; manifest.sha256
        Safetensors and JSON only: nothing is unpickled. All ranks must share the folder.
Once    Every rank leaves a note of what it holds and reads the notes of all. So all work out the
        same owner of each distinct slice, the least loaded of its holders; only the owner writes.
Atomic  Written into step-00000100.partial, forced to disk, then renamed. When a step is saved
        again, the old one is called step-00000100.old meanwhile, and counts as complete.
Read    save -> _share_out -> _finish; then Manifest -> read_manifest -> load
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from picotron_lab.comm import Axis
from picotron_lab.config import ConfigError
from picotron_lab.sharding import Record

FORMAT = 1
FILE = "rank-{:05d}.safetensors"
COMPLETE = re.compile(r"step-(\d{8,})(\.old)?")

Piece = tuple[Record, Tensor]  # a tensor that holds record.slices of the full tensor record.name
Slices = Sequence[Sequence[int]]  # (start, stop) per dim


class CheckpointError(ConfigError):
    """A sentence about a checkpoint that cannot be written, read, or fitted to the model."""


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise CheckpointError(sentence)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds, with files as {name: [bytes, sha256]} and tensors as
    {name: {"shape": full shape, "dtype": "float32", "pieces": [[file, key, slices]]}}.
    """

    path: Path
    step: int
    meta: dict
    tensors: dict[str, dict]
    files: dict[str, list]


# ---- save


def save(folder: Path, step: int, pieces: list[Piece], meta: dict, world: Axis) -> Path:
    """Write checkpoint `step` into `folder`; every rank of `world` calls this. Returns its path.

    pieces   what this rank holds; equal slices on several ranks must hold equal values
    meta     JSON values; those of rank 0 are stored
    Raises CheckpointError when this rank cannot write, or some part of a tensor is on no rank.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    mine = {_key(r.name, r.slices): _checked(r, t) for r, t in pieces}
    held = [[r.name, r.shape, str(t.dtype)[6:], r.slices] for r, t in pieces if t.numel() > 0]
    try:
        if world.rank == 0:
            _begin(partial)
        world.barrier()
        tensors = _share_out(_exchange(partial / "holds", held, world))
        path = partial / FILE.format(world.rank)
        keys = [key for t in tensors.values() for file, key, _ in t["pieces"] if file == path.name]
        check = _write(path, {key: mine[key] for key in keys}) if keys else None
        checks = enumerate(_exchange(partial / "wrote", check, world))
        world.barrier()  # all have read the notes, which rank 0 removes
        if world.rank == 0:
            files = {FILE.format(rank): check for rank, check in checks if check}
            contents = {"step": step, "meta": meta, "tensors": tensors, "files": files}
            _finish(partial, final, {"format": FORMAT, **contents})
        world.barrier()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {final} could not be written ({error}): --save-dir must be a folder with "
            "room that all ranks share, such as --save-dir runs/mine."
        ) from None
    return final


def _begin(partial: Path) -> None:
    """Clear away what killed runs left, and make the folder."""
    for path in partial.parent.glob("step-*.partial"):
        shutil.rmtree(path)
    partial.mkdir(parents=True)


def _exchange(stem: Path, note: object, world: Axis) -> list:
    """Leave a note (JSON) beside those of the other ranks, and read them all."""
    paths = [stem.with_name(f"{stem.name}-{rank:05d}.json") for rank in range(world.size)]
    paths[world.rank].write_text(json.dumps(note))
    world.barrier()
    return [json.loads(path.read_text()) for path in paths]


def _share_out(notes: list[list]) -> dict[str, dict]:
    """The manifest's tensors. Largest slices first, each goes to its least loaded holder."""
    tensors: dict[str, dict] = {}
    holders: dict[tuple, list[int]] = defaultdict(list)
    for rank, note in enumerate(notes):
        for name, shape, dtype, slices in note:
            kind = {"shape": shape, "dtype": dtype, "pieces": []}
            known = tensors.setdefault(name, kind)
            _require(known == kind, f"{name} is {kind} on rank {rank}, but {known} on another one.")
            elements = math.prod(stop - start for start, stop in slices)
            holders[-elements, name, tuple(map(tuple, slices))].append(rank)
    load, stored = Counter(), Counter()  # elements by rank, by name
    for (elements, name, slices), ranks in sorted(holders.items()):
        owner = min(ranks, key=lambda rank: (load[rank], rank))
        load[owner] -= elements
        stored[name] -= elements
        tensors[name]["pieces"].append([FILE.format(owner), _key(name, slices), slices])
    for name, tensor in tensors.items():
        _require(stored[name] >= math.prod(tensor["shape"]), f"no rank gave all of {name}.")
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write one file and force it to disk; (bytes, sha256)."""
    save_file({k: t.contiguous().to("cpu", copy=True) for k, t in tensors.items()}, path)
    _force_to_disk(path)
    return path.stat().st_size, _sha256(path)


def _finish(partial: Path, final: Path, contents: dict) -> None:
    """Write the manifest, remove the notes, rename."""
    for note in partial.glob("*.json"):
        note.unlink()
    manifest, checksum = partial / "manifest.json", partial / "manifest.sha256"
    manifest.write_text(json.dumps(contents))
    checksum.write_text(_sha256(manifest))
    for path in (manifest, checksum, partial):
        _force_to_disk(path)
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    _force_to_disk(final.parent)
    shutil.rmtree(old, ignore_errors=True)


# ---- find and check


def all_complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, smallest step first."""
    paths = sorted(folder.glob("step-*/manifest.json"), reverse=True)  # .old first
    found = {int(m[1]): p.parent for p in paths if (m := COMPLETE.fullmatch(p.parent.name))}
    return [found[step] for step in sorted(found)]


def latest(folder: Path) -> Path | None:
    """The complete checkpoint of the largest step; None where there is none."""
    return (all_complete(folder) or [None])[-1]


def read_manifest(path: Path, files: Iterable[str] | None = ()) -> Manifest:
    """What the checkpoint at `path` holds, after checking bytes and sha256 of `files` (None: all).

    Raises CheckpointError: what is damaged, and which checkpoint beside it is the newest good one.
    """
    manifest, fault = _inspect(path, files)
    if manifest is None:
        good = next((p for p in reversed(all_complete(path.parent)) if _inspect(p, None)[0]), None)
        advice = f"use the newest good one, --resume {good}" if good else "no other one is good"
        raise CheckpointError(f"{fault}; {advice}.")
    return manifest


def verify(manifest: Manifest, files: Iterable[str] | None = None) -> None:
    """Check bytes and sha256 of `files` (None: all) as read_manifest does."""
    read_manifest(manifest.path, files)


def _inspect(path: Path, files: Iterable[str] | None) -> tuple[Manifest | None, str]:
    """(manifest, "") if it and `files` (None: all) are whole; else (None, what is wrong)."""
    if path.suffix == ".partial":
        return None, f"checkpoint {path} is half-written"
    at = path / "manifest.json"
    try:
        contents = json.loads(at.read_text())
        whole = (path / "manifest.sha256").read_text() == _sha256(at)
        if not whole or contents.pop("format") != FORMAT:
            return None, f"{at} is damaged or not of format {FORMAT}"
        manifest = Manifest(path, **contents)
        for file in manifest.files if files is None else files:
            at = path / file
            if manifest.files[file] != [at.stat().st_size, _sha256(at)]:
                return None, f"{at} is damaged: its size or sha256 has changed"
    except OSError as error:
        return None, f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError) as error:
        return None, f"{at} is damaged ({error})"
    return manifest, ""


# ---- load


def load(manifest: Manifest, pieces: list[Piece], check: bool = True) -> None:
    """Fill the given tensors in place, however the stored ones were cut; floats may change width.

    Checks the files it needs, unless `check` is off, and reads only the parts it needs. Raises
    CheckpointError for a damaged file, and for a tensor that is missing or does not fit.
    """
    plan: dict[str, list[tuple]] = defaultdict(list)
    for record, tensor in pieces:
        target, missing = _checked(record, tensor), torch.ones(tensor.shape, dtype=torch.bool)
        for file, key, slices in _fitting(manifest, record, tensor.dtype):
            part, into = _overlap(slices, record.slices)
            if missing[into].numel() > 0:
                plan[file].append((key, part, target[into]))
                missing[into] = False
        _require(not missing.any(), f"{manifest.path} lacks part of {record.name} {record.slices}.")
    if check:
        verify(manifest, plan)
    for file, parts in plan.items():
        with safe_open(manifest.path / file, "pt") as opened:
            for key, part, into in parts:
                into.copy_(opened.get_slice(key)[part])


def read_full(manifest: Manifest, name: str) -> Tensor:
    """A full tensor in its stored dtype, on the CPU. Checks no file: call `verify` once before."""
    _require(name in manifest.tensors, f"{manifest.path} holds no tensor {name}.")
    stored = manifest.tensors[name]
    full = torch.empty(stored["shape"], dtype=getattr(torch, stored["dtype"]))
    whole = Record(name, tuple(full.shape), tuple((0, n) for n in full.shape))
    load(manifest, [(whole, full)], check=False)
    return full


def _fitting(manifest: Manifest, record: Record, dtype: torch.dtype) -> list:
    """The stored pieces of a tensor, if its shape and dtype allow to load them."""
    name, path, shape = record.name, manifest.path, list(record.shape)
    stored = manifest.tensors.get(name, {"shape": "none"})
    _require(stored["shape"] == shape, f"{name} has shape {shape} here, but {stored['shape']} in "
             f"{path}: resume with the model and optimizer that it was saved from.")  # fmt: skip
    saved = getattr(torch, stored["dtype"])
    castable = saved == dtype or (saved.is_floating_point and dtype.is_floating_point)
    _require(castable, f"{name} is {dtype} here, but {saved} in {path}: only floats can be cast.")
    return stored["pieces"]


def _checked(record: Record, tensor: Tensor) -> Tensor:
    """The tensor, if it has the shape that its record claims."""
    shape, slices = tuple(tensor.shape), record.slices
    good = shape == tuple(stop - start for start, stop in slices)
    _require(good, f"{record.name} has shape {shape}, but its record says slices {slices}.")
    return tensor.detach()


def _overlap(held: Slices, wanted: Slices) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What two slices of one tensor share: as an index into the one, and into the other."""
    part, into = [], []
    for (a, b), (start, stop) in zip(held, wanted, strict=True):
        low = max(a, start)
        high = max(low, min(b, stop))
        part.append(slice(low - a, high - a))
        into.append(slice(low - start, high - start))
    return tuple(part), tuple(into)


def _key(name: str, slices: Slices) -> str:
    return f"{name}[{','.join(f'{start}:{stop}' for start, stop in slices)}]"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _force_to_disk(path: Path) -> None:
    """Of a file its contents, of a folder its names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
