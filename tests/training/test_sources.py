from __future__ import annotations

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import pyvips
from conftest import landscape
from typer.testing import CliRunner

from fastcolor.cli import app
from fastcolor.imaging.find import find_images
from fastcolor.imaging.vips import ImageError
from fastcolor.training import sources
from fastcolor.training.data import GREY, DataError, PhotoCrops, Problems, check_headers, find_photos
from fastcolor.training.sources import PACK, PackError, list_pack, list_tars, open_photo, pack


def tar_of(files, path, root):
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, str(file.relative_to(root)))
        for name, content in (("notes.txt", b"text"), (".hidden.jpg", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def crops_of(files, epoch=None, size=32):
    crops = PhotoCrops(files, size)
    return [crops[epoch, i][0] for i in range(len(files))]


def test_tar_members_are_the_files(photos, tmp_path):
    files = find_images(photos)
    shards = tmp_path / "shards"
    shards.mkdir()
    tars = [tar_of(files[:5], shards / "0.tar", photos), tar_of(files[5:], shards / "1.tar", photos)]
    members, none = find_photos(shards)
    assert none == [] and members == list_tars(tars) and len(members) == 12
    assert [m.name for m in members] == [f.name for f in files]
    assert check_headers(members, Problems()) == members
    for epoch in (None, 3):
        for a, b in zip(crops_of(files, epoch), crops_of(members, epoch), strict=True):
            assert np.array_equal(a, b)
    again = pickle.loads(pickle.dumps(PhotoCrops(members, 32)))  # as workers get it
    assert np.array_equal(again[None, 4][0], crops_of(files)[4])


def test_large_photos_of_a_tar_are_decoded_small(tmp_path):
    (tmp_path / "in").mkdir()
    pyvips.Image.new_from_array(landscape(0, 512, 640)).write_to_file(str(tmp_path / "in" / "a.jpg"))
    (member,) = list_tars([tar_of([tmp_path / "in" / "a.jpg"], tmp_path / "a.tar", tmp_path)])
    assert open_photo(member, shrink=8).width == 80 and open_photo(member).width == 640


def test_more_tars_than_files_may_be_open(photos, tmp_path):
    file = find_images(photos)[0]
    members = [list_tars([tar_of([file], tmp_path / f"{i:03d}.tar", photos)])[0] for i in range(300)]
    before = len(os.listdir("/dev/fd"))
    for _ in range(2):
        assert all(open_photo(m).width == 64 for m in members)
    assert len(os.listdir("/dev/fd")) <= before + 256


def test_tar_errors(photos, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match="a.tar: not a readable, uncompressed tar file"):
        find_photos(shards)
    path = tar_of(find_images(photos)[:1], shards / "a.tar", photos)
    (member,) = list_tars([path])
    path.write_bytes(path.read_bytes()[:600])
    sources._opened.cache_clear()
    with pytest.raises(ImageError, match=r"a\.tar!a/01\.jpg|a\.tar!b/c/00\.png"):
        open_photo(member).copy_memory()


def test_pack_holds_the_pixels(photos, tmp_path):
    files = find_images(photos)
    (photos / "broken.jpg").write_bytes(files[0].read_bytes()[:100])
    pyvips.Image.black(40, 40).write_to_file(str(photos / "grey.png"))
    result = pack({"all": find_images(photos)}, photos, tmp_path / "out", size=40, shard_bytes=20_000)
    assert result.finished and result.photos == 12
    assert result.left_out["grey.png"] == GREY and "broken.jpg" in result.left_out and len(result.left_out) == 2
    packed = list_pack(tmp_path / "out")["all"]
    assert [str(p).split("!")[2] for p in packed] == [str(f.relative_to(photos)) for f in files]
    for path, file in zip(packed, files, strict=True):
        image = open_photo(path)
        assert min(image.width, image.height) == 40
        direct = pyvips.Image.new_from_file(str(file)).resize(40 / 48).numpy()
        assert np.abs(image.numpy().astype(int) - direct).max() <= 1
    found, none = find_photos(tmp_path / "out")
    assert found == packed and none == [] and check_headers(found, Problems()) == found


def test_small_photos_stay_and_crops_are_those_of_the_files(photos, tmp_path):
    files = find_images(photos)
    pack({"train": files[2:], "val": files[:2]}, photos, tmp_path / "out", size=48)
    train, val = find_photos(tmp_path / "out")
    assert (len(train), len(val)) == (10, 2)
    for epoch in (None, 5):
        for a, b in zip(crops_of(files[2:], epoch), crops_of(train, epoch), strict=True):
            assert np.array_equal(a, b)


def test_pack_goes_on_after_an_interruption(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_BATCH", 3)
    files = find_images(photos)
    pack({"all": files}, photos, tmp_path / "whole", size=40, shard_bytes=10_000)
    seen = 0

    def advance():
        nonlocal seen
        seen += 1

    half = pack({"all": files}, photos, tmp_path / "out", 40, 10_000, 1, advance, lambda: seen >= 5)
    assert not half.finished and 0 < half.photos < 12
    with pytest.raises(PackError, match="not finished; run fastcolor pack again"):
        list_pack(tmp_path / "out")
    with pytest.raises(PackError, match="holds a pack of other photos or of another size"):
        pack({"all": files}, photos, tmp_path / "out", 44, 10_000)
    with pytest.raises(PackError, match="holds a pack of other photos"):
        pack({"all": files[::-1]}, photos, tmp_path / "out", 40, 10_000)
    rest = pack({"all": files}, photos, tmp_path / "out", 40, 10_000)
    assert rest.finished and rest.photos == 12
    for a, b in zip(*(list_pack(tmp_path / x)["all"] for x in ("whole", "out")), strict=True):
        assert np.array_equal(open_photo(a).numpy(), open_photo(b).numpy())
    (tmp_path / "out" / "all" / "00000.bin").unlink()
    with pytest.raises(DataError, match="00000.bin: missing from the pack"):
        find_photos(tmp_path / "out")


def test_stopped_before_the_first_shard_of_a_split(photos, tmp_path):
    files = find_images(photos)
    at_once = pack({"all": files}, photos, tmp_path / "a", 40, stopped=lambda: True)
    assert not at_once.finished and at_once.photos == 0
    seen = 0

    def advance():
        nonlocal seen
        seen += 1

    splits = {"train": files[:6], "val": files[6:]}
    between = pack(splits, photos, tmp_path / "b", 40, advance=advance, stopped=lambda: seen >= 6)
    assert not between.finished and between.photos == 6
    assert pack(splits, photos, tmp_path / "b", 40).finished and len(list_pack(tmp_path / "b")["val"]) == 6


def test_tars_and_images_side_by_side(photos, tmp_path):
    files = find_images(photos)
    tar_of(files[:5], photos / "more.tar", photos)
    assert len(find_photos(photos)[0]) == 17


def test_pack_of_another_version(tmp_path):
    (tmp_path / PACK).write_text(json.dumps({"version": 99}))
    with pytest.raises(PackError, match="version 99, expected 1"):
        list_pack(tmp_path)
    (tmp_path / PACK).write_text("[]")
    with pytest.raises(PackError, match="not the head of a pack"):
        list_pack(tmp_path)


def test_command(photos, tmp_path):
    pyvips.Image.black(40, 40).write_to_file(str(photos / "grey.png"))
    result = CliRunner().invoke(app, ["pack", str(photos), str(tmp_path / "out"), "--size", "40"])
    assert result.exit_code == 0, result.output
    assert "12 photos" in result.output and "left out 1 of 13 photos" in result.output
    assert len(find_photos(tmp_path / "out")[0]) == 12
    result = CliRunner().invoke(app, ["pack", str(tmp_path / "none"), str(tmp_path / "out")])
    assert result.exit_code == 1 and "no such folder" in result.output
