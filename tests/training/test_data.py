from __future__ import annotations

import numpy as np
import pytest
import pyvips
import torch

from fastcolor.imaging.find import find_images
from fastcolor.training.data import (
    GREY,
    DataError,
    EpochSampler,
    InOrder,
    PhotoCrops,
    Problems,
    check_headers,
    find_photos,
    make_loader,
    split,
)


def test_split_is_seeded_and_disjoint(photos):
    files, none = find_photos(photos)
    assert files == find_images(photos) and len(files) == 12 and none == []
    train, val = split(files, 0.25, seed=1)
    assert len(train) == 9 and sorted(train + val) == files
    assert split(files, 0.25, seed=1) == (train, val) and split(files, 0.25, seed=2) != (train, val)
    assert (
        [len(part) for part in split(files[:2], 0.01, 0)] == [len(part) for part in split(files[:2], 0.99, 0)] == [1, 1]
    )


def test_given_train_and_val(photos):
    (photos / "train").mkdir()
    (photos / "val").mkdir()
    for i, path in enumerate(find_images(photos)):
        path.rename(photos / ("val" if i < 2 else "train") / path.name)
    train, val = find_photos(photos)
    assert (len(train), len(val)) == (10, 2)
    for path in val:
        path.unlink()
    with pytest.raises(DataError, match="val: no images in it"):
        find_photos(photos)


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        find_photos(tmp_path / "none")
    with pytest.raises(DataError, match="no images"):
        find_photos(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="is a file"):
        find_photos(tmp_path / "a.jpg")


def test_bad_headers_are_named(photos):
    (photos / "empty.jpg").touch()
    (photos / "text.png").write_text("hello")
    pyvips.Image.black(40, 40).write_to_file(str(photos / "grey.png"))
    problems = Problems()
    good = check_headers(find_images(photos), problems)
    assert len(good) == 12 and problems.counts() == {"unreadable": 2, "greyscale": 1}
    assert problems.reasons[str(photos / "grey.png")] == GREY
    assert "the file is empty" in problems.reasons[str(photos / "empty.jpg")]
    assert "text.png" in problems.reasons[str(photos / "text.png")]


def test_problems_found_late_are_replaced_and_named(photos):
    """Truncated files and grey pictures stored as RGB: the next good file takes their place, always the same one."""
    files = find_images(photos)
    jpeg = next(f for f in files if f.suffix == ".jpg")
    jpeg.write_bytes(jpeg.read_bytes()[:600])
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (40, 40, 1), dtype=np.uint8), 3, 2)
    png = next(f for f in files if f.suffix == ".png")
    pyvips.Image.new_from_array(grey).write_to_file(str(png))
    crops = PhotoCrops(files, 32)
    for bad, why in ((jpeg, "premature end"), (png, "greyscale")):
        index = files.index(bad)
        crop, failed = crops[None, index]
        assert failed[0][0] == str(bad) and why in failed[0][1]
        following = next(i for i in range(index + 1, 99) if files[i % len(files)] not in (jpeg, png)) % len(files)
        assert np.array_equal(crop, crops[None, following][0])


def test_nothing_usable(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match="1 files in a row could not be used; the first: .*a.jpg"):
        PhotoCrops([tmp_path / "a.jpg"], 32)[None, 0]


def test_crops_depend_on_the_key_alone(photos):
    crops = PhotoCrops(find_images(photos), 32, seed=5)
    first = crops[0, 3][0]
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    crops[1, 4]
    assert np.array_equal(crops[0, 3][0], first)
    assert not np.array_equal(crops[1, 3][0], first)
    assert not np.array_equal(PhotoCrops(crops.files, 32, seed=6)[0, 3][0], first)


@pytest.mark.parametrize("source", [(40, 40), (400, 700), (33, 90), (20, 20), (1, 1)])
def test_any_source_size(tmp_path, source):
    """Larger, smaller, shrunk while decoding: always size × size, and the middle stays the middle."""
    pixels = np.zeros((*source, 3), np.uint8)
    pixels[..., 0] = 200
    pixels[:, : source[1] // 2, 2] = 200
    pyvips.Image.new_from_array(pixels).write_to_file(str(tmp_path / "a.jpg"), Q=95)
    crops = PhotoCrops([tmp_path / "a.jpg"], 32)
    middle, failed = crops[None, 0]
    assert middle.shape == (32, 32, 3) and not failed
    if source[1] > 1:
        assert middle[:, :12, 2].mean() > 150 and middle[:, 20:, 2].mean() < 50
    assert crops[7, 0][0].shape == (32, 32, 3)


def test_sixteen_bits_and_alpha(tmp_path):
    color = pyvips.Image.new_from_array(np.full((40, 40, 4), (40000, 10000, 5000, 65535), np.uint16))
    color.copy(interpretation="rgb16").write_to_file(str(tmp_path / "a.png"))
    crop, failed = PhotoCrops([tmp_path / "a.png"], 32)[None, 0]
    assert not failed and np.abs(crop[0, 0].astype(int) - (155, 39, 19)).max() <= 1


def test_sampler_resumes_in_the_middle():
    sampler = EpochSampler(10, seed=3)
    sampler.epoch = 4
    whole = list(sampler)
    assert sorted(i for _, i in whole) == list(range(10)) and all(e == 4 for e, _ in whole)
    sampler.start = 6
    assert list(sampler) == whole[6:] and len(sampler) == 4
    sampler.epoch, sampler.start = 5, 0
    assert list(sampler) != whole


def test_workers_give_the_same_batches(photos):
    files = find_images(photos)
    batches = []
    for workers in (0, 2):
        loader = make_loader(PhotoCrops(files, 32), EpochSampler(len(files), 0), 5, workers, False)
        batches.append([batch.rgb for batch in loader])
    assert [len(b) for b in batches[0]] == [5, 5, 2]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    assert list(InOrder(3)) == [(None, 0), (None, 1), (None, 2)]
