from __future__ import annotations

from fastcolor.imaging.find import find_images


def test_order_hidden_files_and_suffixes(tmp_path):
    for name in ("b/2.JPG", "a.png", "b/1.tif", ".hidden/x.png", ".x.png", "notes.txt", "c/d/e.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(p.relative_to(tmp_path)) for p in find_images(tmp_path)] == [
        "a.png",
        "b/1.tif",
        "b/2.JPG",
        "c/d/e.webp",
    ]


def test_links_are_followed_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").touch()
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "0.png").touch()
    (folder / "up").symlink_to(tmp_path / "photos")
    (folder / "one").symlink_to(tmp_path / "elsewhere")
    (folder / "two").symlink_to(tmp_path / "elsewhere")
    assert [p.name for p in find_images(folder)] == ["0.png", "1.png"]
