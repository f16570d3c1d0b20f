"""Checkpoints: any slicing in, any slicing out, each slice written once, and no damage unseen."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from picotron_lab import checkpoint
from picotron_lab.checkpoint import CheckpointError, all_complete, latest, load, read_manifest, save
from picotron_lab.lab import run_ranks
from picotron_lab.sharding import Record

META = {"steps": 7, "lr": 0.1, "names": ["a", None]}


def full_tensors(shift=0):
    """{name: full tensor}; every element differs from every other one of its tensor."""
    return {
        "everywhere": torch.arange(35).reshape(7, 5) + shift,
        "rows": (torch.arange(39.0).reshape(13, 3) + shift).bfloat16(),
        "columns": torch.linspace(-1, 1, 6 * 8, dtype=torch.float64).reshape(6, 8) + shift,
        "blocks": torch.randn(9, 7, generator=torch.Generator().manual_seed(3)) + shift,
        "adamw.exp_avg/rows": torch.arange(39.0).reshape(13, 3) / 7 + shift,
        "scalar": torch.tensor(2.5 + shift),
    }


def piece(name, full, *slices):
    slices = slices or tuple((0, n) for n in full.shape)
    part = full[tuple(slice(a, b) for a, b in slices)]
    return Record(name, tuple(full.shape), tuple(slices)), part


def four_ranks(rank, full):
    """What rank 0..3 holds: replicas, uneven rows, columns over 2 x 2 ranks, blocks."""
    rows = [(0, 5), (5, 6), (6, 6), (6, 13)][rank]  # rank 2 holds none
    columns = [(0, 4), (4, 8)][rank // 2]
    block = [(0, 4), (4, 9)][rank // 2], [(0, 2), (2, 7)][rank % 2]
    return [
        piece("everywhere", full["everywhere"]),
        piece("rows", full["rows"], rows, (0, 3)),
        piece("adamw.exp_avg/rows", full["adamw.exp_avg/rows"], rows, (0, 3)),
        piece("columns", full["columns"].T.contiguous().T, (0, 6), columns),
        piece("blocks", full["blocks"], *block),
        piece("scalar", full["scalar"]),
    ]


def save_four(folder, step=100, shift=0, world=lambda axis: axis):
    def main(axis):
        held = four_ranks(axis.rank, full_tensors(shift))
        return save(folder, step, held, META | {"rank": axis.rank}, world(axis))

    return run_ranks(main, 4)


def assert_holds(path, expected):
    manifest = read_manifest(path)
    assert set(manifest.tensors) == set(expected)
    for name, tensor in expected.items():
        stored = checkpoint.read_full(manifest, name)
        assert stored.dtype == tensor.dtype and torch.equal(stored, tensor)


# ---- any mesh to any mesh

CUTS = {1: [0, 1], 2: [0, 0.2, 1], 3: [0, 0.1, 0.7, 1]}  # uneven, and unlike those of four_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_four_ranks_to_other_slicings(tmp_path, ranks, dim):
    path = save_four(tmp_path)[3]
    full = full_tensors()

    def main(axis):
        wanted = []
        for name, tensor in full.items():
            slices = [(0, n) for n in tensor.shape]
            if slices:
                edges = [int(tensor.shape[dim] * part) for part in CUTS[ranks]]
                slices[dim] = edges[axis.rank], edges[axis.rank + 1]
            wanted.append(piece(name, tensor, *slices))
        loaded = [(record, torch.full_like(tensor, -99)) for record, tensor in wanted]
        load(read_manifest(path), loaded)
        for (_, tensor), (_, expected) in zip(loaded, wanted, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
        return {record.name: tensor.numel() for record, tensor in loaded}

    sizes = run_ranks(main, ranks)
    assert sum(size["blocks"] for size in sizes) == 63  # nothing was left out


def test_loads_into_parameters_and_strided_views(tmp_path, device):
    full = {name: tensor.to(device) for name, tensor in full_tensors().items()}
    path = run_ranks(lambda axis: save(tmp_path, 1, four_ranks(axis.rank, full), {}, axis), 4)[0]
    parameter = torch.nn.Parameter(torch.zeros(9, 7, device=device))
    transposed = torch.zeros(8, 6, dtype=torch.float64, device=device).T
    wanted = [piece(name, full[name])[0] for name in ("blocks", "columns")]
    load(read_manifest(path), list(zip(wanted, [parameter, transposed], strict=True)))
    assert parameter.requires_grad and parameter.is_leaf
    assert torch.equal(parameter, full["blocks"]) and torch.equal(transposed, full["columns"])


def test_two_slices_of_one_tensor_and_two_names_of_one_storage(tmp_path):
    """A rank of ZeRO may hold the end of one row and the start of the next."""
    full = torch.arange(12.0).reshape(3, 4)
    flat = full.flatten()  # both pieces are views of one storage

    def main(axis):
        pieces = [((0, 1), (0, 4), flat[:4]), ((1, 2), (0, 2), flat[4:6])]
        if axis.rank == 1:
            pieces = [((1, 2), (2, 4), flat[6:8]), ((2, 3), (0, 4), flat[8:])]
        held = [(Record("w", (3, 4), (rows, cols)), x.view(1, -1)) for rows, cols, x in pieces]
        tied = [piece("tied", full), piece("too", full)]
        return save(tmp_path, 1, held + tied * (axis.rank == 0), {}, axis)

    assert_holds(run_ranks(main, 2)[0], {"w": full, "tied": full, "too": full})


def test_floats_are_cast_as_torch_casts_them_and_integers_are_not(tmp_path):
    manifest, full = read_manifest(save_four(tmp_path)[0]), full_tensors()
    for name in ("rows", "columns", "blocks"):
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            loaded = torch.zeros(full[name].shape, dtype=dtype)
            load(manifest, [(piece(name, full[name])[0], loaded)])
            assert torch.equal(loaded, full[name].to(dtype))
    with pytest.raises(CheckpointError, match="everywhere is torch.float32 here, but torch.int64"):
        load(manifest, [(piece("everywhere", full["everywhere"])[0], torch.zeros(7, 5))])


# ---- what lies on disk


def test_each_distinct_slice_is_written_once(tmp_path):
    path = save_four(tmp_path)[0]
    assert path == tmp_path / "step-00000100"
    keys = [key for file in path.glob("*.safetensors") for key in load_file(file)]
    expected = {"everywhere[0:7,0:5]", "columns[0:6,0:4]", "columns[0:6,4:8]", "scalar[]"}
    rows = {f"rows[{rows},0:3]" for rows in ("0:5", "5:6", "6:13")}
    expected |= rows | {f"adamw.exp_avg/{key}" for key in rows}
    expected |= {f"blocks[{r},{c}]" for r in ("0:4", "4:9") for c in ("0:2", "2:7")}
    assert sorted(keys) == sorted(expected)


@pytest.mark.parametrize("seed", range(6))  # whichever rank is the fastest
def test_eight_equal_replicas_are_spread_over_their_four_holders(tmp_path, seed):
    held = [piece(f"w{i}", torch.full((4, 4), float(i))) for i in range(8)]
    read = run_ranks(lambda a: read_manifest(save(tmp_path, 1, held, {}, a)), 4, seed=seed)[0]
    assert [len(load_file(read.path / file)) for file in sorted(read.files)] == [2, 2, 2, 2]


def test_the_manifest_says_what_was_saved(tmp_path):
    manifest = read_manifest(save_four(tmp_path)[0])
    assert manifest.step == 100 and manifest.meta == META | {"rank": 0}
    rows = manifest.tensors["rows"]
    assert rows["shape"] == [13, 3] and rows["dtype"] == "bfloat16"
    left = {path.name for path in manifest.path.iterdir()}
    assert left == {"manifest.json", "manifest.sha256", *manifest.files}
    for name, (size, sha256) in manifest.files.items():
        data = (manifest.path / name).read_bytes()
        assert [size, sha256] == [len(data), hashlib.sha256(data).hexdigest()]


def test_latest_is_the_largest_complete_step(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    for step in (20, 100, 3):
        save_four(tmp_path, step)
    (tmp_path / "step-00000500.partial").mkdir()
    (tmp_path / "step-00000600").mkdir()  # without a manifest
    assert all_complete(tmp_path) == [tmp_path / f"step-00000{n}" for n in ("003", "020", "100")]
    assert latest(tmp_path) == tmp_path / "step-00000100"


# ---- crashes and full disks


class Dies:
    """A world that ends at its n-th barrier: between any two phases of a save."""

    def __init__(self, axis, at, end):
        self.rank, self.size, self.axis, self.left, self.end = axis.rank, axis.size, axis, at, end

    def barrier(self):
        self.left -= 1
        if self.left == 0 and self.rank == 1:
            self.end()
        self.axis.barrier()


def fail():
    raise RuntimeError("power cut")


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [100, 200])
def test_a_save_that_dies_leaves_the_previous_checkpoint(tmp_path, at, step):
    """step 100: the previous checkpoint is that of the same step."""
    save_four(tmp_path, 100)
    with pytest.raises(RuntimeError, match="power cut"):
        save_four(tmp_path, step, 5, lambda axis: Dies(axis, at, fail))
    assert (tmp_path / f"step-{step:08d}.partial").exists()
    assert_holds(latest(tmp_path), full_tensors())
    assert_holds(save_four(tmp_path, step, 5)[0], full_tensors(5))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-00000100", f"step-{step:08d}"}


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_save(tmp_path):
    save_four(tmp_path, 100)
    code = (
        "import os, signal; from pathlib import Path; import tests.test_checkpoint as t; "
        "end = lambda: os.kill(os.getpid(), signal.SIGKILL); "
        f"t.save_four(Path({str(tmp_path)!r}), 200, 5, lambda axis: t.Dies(axis, 3, end))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "step-00000200.partial").glob("*.safetensors"))
    assert_holds(latest(tmp_path), full_tensors())
    assert_holds(save_four(tmp_path, 200, 5)[0], full_tensors(5))


def test_a_crash_before_the_last_rename_leaves_the_old_one_complete(tmp_path, monkeypatch):
    save_four(tmp_path, 100)
    rename = Path.rename

    def stuck(self, target):
        if self.suffix == ".partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stuck)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save_four(tmp_path, 100, 5)
    assert_holds(latest(tmp_path), full_tensors())
    assert_holds(save_four(tmp_path, 100, 5)[0], full_tensors(5))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000100"]


def test_a_crash_after_the_last_rename_leaves_the_new_one_complete(tmp_path):
    save_four(tmp_path, 100)[0].rename(tmp_path / "step-00000100.old")
    save_four(tmp_path / "new", 100, 5)[0].rename(tmp_path / "step-00000100")
    assert all_complete(tmp_path) == [tmp_path / "step-00000100"]
    assert_holds(latest(tmp_path), full_tensors(5))
    assert_holds(save_four(tmp_path, 100, 9)[0], full_tensors(9))
    assert not (tmp_path / "step-00000100.old").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/step-00000100 could not be .*--save-dir"):
        save_four(tmp_path / "file")


@pytest.mark.parametrize("before", [0, 2, 4, 6])
def test_a_full_disk_is_named_and_the_previous_checkpoint_stays(tmp_path, monkeypatch, before):
    save_four(tmp_path, 100)
    fsync, calls = os.fsync, []

    def full_disk(handle):
        calls.append(handle)
        if len(calls) > before:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(CheckpointError, match="step-00000200 could not be .*No space left"):
            save_four(tmp_path, 200, 5)
    assert len(calls) == before + 1
    assert_holds(latest(tmp_path), full_tensors())
    assert_holds(save_four(tmp_path, 200, 5)[0], full_tensors(5))


# ---- damage: one sentence, which names the file and the newest good checkpoint


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size - 8)


def load_everything(path):
    pieces = [(piece(n, t)[0], torch.zeros_like(t)) for n, t in full_tensors().items()]
    load(read_manifest(path), pieces)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("file", ["rank-00002.safetensors", "manifest.json"])
def test_damage_is_refused_by_name_and_the_newest_good_one_offered(tmp_path, damage, file):
    oldest, good, bad_too, bad = (save_four(tmp_path, step)[0] for step in (1, 2, 3, 4))
    flip(bad_too / "rank-00001.safetensors")
    damage(bad / file)
    with pytest.raises(CheckpointError) as caught:
        load_everything(bad)
    sentence = str(caught.value)
    words = "cannot be read (No such file" if damage is Path.unlink else "is damaged"
    assert f"{bad / file} {words}" in sentence
    assert sentence.endswith(f"use the newest good one, --resume {good}.")
    for path in (oldest, good):
        (path / "manifest.sha256").unlink()
    with pytest.raises(CheckpointError, match="no other one is good"):
        load_everything(bad)


def test_only_the_files_that_are_read_are_checked(tmp_path):
    path = save_four(tmp_path)[0]
    manifest, full = read_manifest(path), full_tensors()
    files = {key: file for t in manifest.tensors.values() for file, key, _ in t["pieces"]}
    assert files["rows[5:6,0:3]"] != files["rows[6:13,0:3]"]
    flip(path / files["rows[5:6,0:3]"])
    record, expected = piece("rows", full["rows"], (7, 12), (0, 2))
    load(manifest, [(record, loaded := torch.zeros_like(expected))])
    assert torch.equal(loaded, expected)
    with pytest.raises(CheckpointError, match="size or sha256 has changed"):
        checkpoint.verify(manifest)


def test_a_half_written_or_absent_checkpoint_is_refused(tmp_path):
    good = save_four(tmp_path)[0]
    half = tmp_path / "step-00000200.partial"
    half.mkdir()
    (half / "manifest.json").write_text((good / "manifest.json").read_text())
    with pytest.raises(CheckpointError, match=f"is half-written; .*--resume {good}\\."):
        read_manifest(half)
    with pytest.raises(CheckpointError, match=f"No such file.*--resume {good}\\."):
        read_manifest(tmp_path / "step-00000300")
    with pytest.raises(CheckpointError, match="no other one is good"):
        read_manifest(tmp_path / "nowhere" / "step-00000300")


def test_a_pickle_in_place_of_tensors_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = save_four(tmp_path)[0]
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        torch.save({"rows": Bomb()}, path / name)
        data = (path / name).read_bytes()
        manifest["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
    (path / "manifest.json").write_text(text := json.dumps(manifest))
    (path / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(SafetensorError):
        load_everything(path)
    assert not (tmp_path / "exploded").exists()


# ---- a checkpoint and a model that do not fit each other


def test_a_missing_or_differently_shaped_tensor_is_named(tmp_path):
    manifest = read_manifest(save_four(tmp_path)[0])
    with pytest.raises(CheckpointError, match=r"other has shape \[2\] here, but none in .*step-"):
        load(manifest, [piece("other", torch.zeros(2))])
    with pytest.raises(CheckpointError, match=r"rows has shape \[3, 13\] here, but \[13, 3\] in"):
        load(manifest, [piece("rows", torch.zeros(3, 13))])
    with pytest.raises(CheckpointError, match="holds no tensor other"):
        checkpoint.read_full(manifest, "other")
    wrong = Record("rows", (13, 3), ((0, 2), (0, 3)))
    with pytest.raises(CheckpointError, match=r"rows has shape \(1, 3\), but its record says"):
        load(manifest, [(wrong, torch.zeros(1, 3))])


def two_ranks(folder, *pieces):
    run_ranks(lambda axis: save(folder, 1, [pieces[axis.rank]], {}, axis), 2)


def test_what_the_ranks_give_must_fit_together_when_saved(tmp_path):
    full = torch.zeros(4, 2)
    with pytest.raises(CheckpointError, match="no rank gave all of w"):
        two_ranks(tmp_path, piece("w", full, (0, 2), (0, 2)), piece("w", full, (2, 3), (0, 2)))
    with pytest.raises(CheckpointError, match="w is .*float64.* on rank 1, but .*float32"):
        two_ranks(tmp_path, piece("w", full), piece("w", full.double()))
    assert latest(tmp_path) is None


def test_a_gap_between_overlapping_pieces_is_found_when_loading(tmp_path):
    full = torch.zeros(4)  # 0:3 and 1:3 are five elements, but element 3 is not among them
    two_ranks(tmp_path, piece("w", full, (0, 3)), piece("w", full, (1, 3)))
    manifest = read_manifest(latest(tmp_path))
    with pytest.raises(CheckpointError, match=r"lacks part of w \(\(2, 4\),\)"):
        load(manifest, [piece("w", full, (2, 4))])
