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
from fastcolor.training.sources import PACK, PackError, class_of, list_pack, list_tars, open_photo, pack, read_pixels


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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder in which a tar file of one image counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_INDEXED", 1)
    return tmp_path / "cache" / "fastcolor" / "tars"


def never(*_):
    raise AssertionError("the tar file was read again")


def test_the_list_of_a_tar_is_kept(photos, tmp_path, monkeypatch, cache):
    files = find_images(photos)
    files[0] = files[0].rename(files[0].with_name("a\nbé \udcff!1:2!.PNG"))
    files[2].with_suffix(".cls").write_text("17\n")
    tar = tar_of([*files, files[2].with_suffix(".cls")], tmp_path / "a.tar", photos)
    first = list_tars([tar])
    assert len(first) == 12 and sum("!17/" in str(p) for p in first) == 1 and len(list(cache.iterdir())) == 1
    monkeypatch.setattr(sources, "_read_members", never)
    assert list_tars([tar]) == first
    monkeypatch.chdir(tmp_path)  # by another name it is the same file
    assert [str(p) for p in list_tars(["a.tar"])] == [str(p).removeprefix(f"{tmp_path}/") for p in first]


def test_another_tar_under_the_name_is_read_anew(photos, tmp_path, cache):
    files = find_images(photos)
    tar = tar_of(files[:5], tmp_path / "a.tar", photos)
    before, stood = list_tars([tar]), tar.stat()
    os.replace(tar_of(files[5:8], tmp_path / "b.tar", photos), tar)
    assert [p.name for p in list_tars([tar])] == [f.name for f in files[5:8]]
    tar_of(files[:5], tar, photos)
    renamed = files[0].with_name("zz" + files[0].name[2:])  # as many bytes, and the old time
    os.rename(files[0], renamed)
    tar_of([renamed, *files[1:5]], tar, photos)
    os.utime(tar, ns=(stood.st_atime_ns, stood.st_mtime_ns))
    assert tar.stat().st_size == stood.st_size
    assert [p.name for p in list_tars([tar])] == [renamed.name, *(p.name for p in before[1:])]


@pytest.mark.parametrize("content", [b"", b"no index", b"PK\x03\x04 half a zip"], ids=repr)
def test_a_broken_list_is_read_anew(photos, tmp_path, cache, content):
    tar = tar_of(find_images(photos), tmp_path / "a.tar", photos)
    first = list_tars([tar])
    (index,) = cache.iterdir()
    whole = index.read_bytes()
    index.write_bytes(content)
    assert list_tars([tar]) == first and len(index.read_bytes()) == len(whole)
    index.write_bytes(whole[: len(whole) // 2] + whole[len(whole) // 2 + 9 :])
    assert list_tars([tar]) == first


def test_without_a_cache_folder_tars_are_listed_all_the_same(photos, tmp_path, monkeypatch, cache):
    tar = tar_of(find_images(photos), tmp_path / "a.tar", photos)
    (tmp_path / "cache").write_text("a file, in which no folder can be made")
    assert len(list_tars([tar])) == 12
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nobody's home
    monkeypatch.chdir(tmp_path / "photos")
    assert len(list_tars([tar])) == 12 and not (tmp_path / "photos" / "~").exists()


def test_short_tars_are_not_kept(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(list_tars([tar_of(find_images(photos), tmp_path / "a.tar", photos)])) == 12
    assert not (tmp_path / "cache").exists()


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
    result = pack({"all": find_images(photos)}, photos, tmp_path / "out", size=40, shard_bytes=20_000)
    assert result.finished and (result.photos, result.grey) == (12, 0)
    assert list(result.left_out) == ["broken.jpg"]
    packed = list_pack(tmp_path / "out")["all"]
    assert [str(p).split("!")[2] for p in packed] == [str(f.relative_to(photos)) for f in files]
    for path, file in zip(packed, files, strict=True):
        image = open_photo(path)
        assert min(image.width, image.height) == 40
        direct = pyvips.Image.new_from_file(str(file)).resize(40 / 48).numpy()
        assert np.abs(image.numpy().astype(int) - direct).max() <= 1
    found, none = find_photos(tmp_path / "out")
    assert found == packed and none == [] and check_headers(found, Problems()) == found


def add_grey(photos):
    """One that its header calls grey, one that only its pixels do."""
    grey = pyvips.Image.new_from_array(np.arange(64, 192, dtype=np.uint8).reshape(8, 16).repeat(6, 0))
    grey.write_to_file(str(photos / "a" / "one_band.png"))
    grey.bandjoin([grey, grey]).copy(interpretation="srgb").write_to_file(str(photos / "three_bands.png"))


def test_pack_keeps_and_marks_pictures_without_colour(photos, tmp_path):
    add_grey(photos)
    files, out = find_images(photos), tmp_path / "out"
    result = pack({"all": files}, photos, out, size=40, shard_bytes=20_000)
    assert (result.photos, result.grey, result.left_out) == (14, 2, {})
    packed, problems = list_pack(out)["all"], Problems()
    colour = check_headers(packed, problems)
    assert [str(p).split("!")[2] for p in colour] == [
        str(f.relative_to(photos)) for f in files if f.stem not in ("one_band", "three_bands")
    ]
    assert problems.counts() == {"greyscale": 2}
    assert check_headers(packed, Problems(), grey=True) == packed  # as --task classify asks
    (one,) = (p for p in packed if p.name == "one_band.png")
    pixels = read_pixels(one, 32, grey=True)
    assert pixels.shape == (48, 16, 3) and np.ptp(pixels, axis=2).max() == 0
    with pytest.raises(ImageError, match=GREY):
        read_pixels(one, 32)
    (other,) = (p for p in packed if str(p).endswith("!three_bands.png"))
    assert [class_of(p, out) for p in (one, other)] == ["a", ""]


def test_a_pack_of_before_goes_on_without_colourless_pictures(photos, tmp_path):
    """Version 1 marked nothing, since it had nothing to mark."""
    add_grey(photos)
    files, out = find_images(photos), tmp_path / "out"
    assert not pack({"all": files}, photos, out, 40, stopped=lambda: True).finished
    head = json.loads((out / PACK).read_text())
    (out / PACK).write_text(json.dumps({**head, "version": 1}))
    result = pack({"all": files}, photos, out, 40)
    assert result.finished and result.photos == 12 and set(result.left_out.values()) == {GREY}
    index = out / "all" / "00000.npz"
    np.savez(index, **{k: v for k, v in np.load(index).items() if k != "grey"})
    packed = list_pack(out)["all"]
    assert len(packed) == 12 and check_headers(packed, Problems()) == packed


@pytest.mark.parametrize(
    ("name", "left", "message"),
    [
        ("bin", None, "00000.bin: missing from the pack; remove"),
        ("bin", 100, "00000.bin: has 100 bytes, expected [0-9]{5}; remove"),
        ("npz", 100, "00000.npz: broken"),
    ],
)
def test_a_pack_with_a_broken_shard_is_not_called_whole(photos, tmp_path, name, left, message):
    files, out = find_images(photos), tmp_path / "out"
    pack({"all": files}, photos, out, 40)
    file = out / "all" / f"00000.{name}"
    content = file.read_bytes()
    file.unlink() if left is None else file.write_bytes(content[:left])
    for again in (lambda: list_pack(out), lambda: pack({"all": files}, photos, out, 40)):
        with pytest.raises(PackError, match=message):
            again()
    file.write_bytes(content)
    assert len(list_pack(out)["all"]) == 12


def test_two_do_not_pack_into_one_folder(photos, tmp_path):
    files, inside = find_images(photos), []

    def advance():
        if not inside:
            with pytest.raises(PackError, match="out: process .* is at work there; wait for it, or choose"):
                pack({"all": files}, photos, tmp_path / "out", 40)
            inside.append(True)

    assert pack({"all": files}, photos, tmp_path / "out", 40, advance=advance).finished and inside


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
    with pytest.raises(PackError, match="version 99, expected 2 at most"):
        list_pack(tmp_path)
    (tmp_path / PACK).write_text("[]")
    with pytest.raises(PackError, match="not the head of a pack"):
        list_pack(tmp_path)


@pytest.mark.parametrize("change", [{"size": 8}, {"shard_bytes": 0}], ids=str)
def test_pack_options_out_of_range(photos, tmp_path, change):
    (name,) = change
    with pytest.raises(PackError, match=f"{name} must be"):
        pack({"all": find_images(photos)}, photos, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_command(photos, tmp_path):
    pyvips.Image.black(40, 40).write_to_file(str(photos / "grey.png"))
    (photos / "broken.png").write_text("no image")
    result = CliRunner().invoke(app, ["pack", str(photos), str(tmp_path / "out"), "--size", "40"])
    assert result.exit_code == 0, result.output
    assert "13 photos, 1 of them without colour" in result.output and "left out 1 of 14 photos" in result.output
    assert len(find_photos(tmp_path / "out")[0]) == 13
    result = CliRunner().invoke(app, ["pack", str(tmp_path / "none"), str(tmp_path / "out")])
    assert result.exit_code == 1 and "no such folder" in result.output
