"""Image files keep what they carry: depth, alpha, pages, metadata. All files are made here."""

from __future__ import annotations

import itertools
import logging
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest

from fastcolor.imaging import files, tags
from fastcolor.imaging.files import Picture, decoded_size, read_picture, write_picture
from fastcolor.imaging.vips import ImageError, libvips

pyvips = pytest.importorskip("pyvips")
libvips()
STR, INT, BLOB = pyvips.GValue.gstr_type, pyvips.GValue.gint_type, pyvips.GValue.blob_type
SUFFIXES = (".jpg", ".png", ".tif", ".webp")
BEST = {".webp": {"lossless": True, "exact": True}, ".jpg": {"Q": 98, "subsample_mode": "off"}}
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6">Anna</r></x:xmpmeta>'
IPTC = b"\x1c\x02\x78\x00\x0bA caption !"  # dataset 2:120, 11 bytes


def smooth(height=40, width=60, channels=3, dtype=np.uint8, seed=0):
    """Waves: JPEG and WebP keep them within a few levels."""
    phase = np.random.default_rng(seed).uniform(0, 6, channels)
    y, x = np.mgrid[:height, :width]
    waves = np.sin(x[..., None] / 11 + y[..., None] / 17 + phase)
    top = np.iinfo(dtype).max
    return np.round((waves * 0.45 + 0.5) * top).astype(dtype)


def vips(pixels, space=None, **header):
    deep = pixels.dtype == np.uint16
    space = space or {1: "grey16" if deep else "b-w", 2: "grey16" if deep else "b-w"}.get(
        pixels.shape[2], "rgb16" if deep else "srgb"
    )
    image = pyvips.Image.new_from_array(pixels).copy(interpretation=space)
    for name, (kind, value) in header.items():
        image.set_type(kind, name.replace("_", "-"), value)
    return image


def difference(a, b):
    return np.abs(a.astype(float) - b.astype(float)).max()


def header(path):
    image = pyvips.Image.new_from_file(str(path))
    return {name: image.get(name) for name in image.get_fields()}


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "channels", "dtype"),
    [
        (s, c, d)
        for s, c, d in itertools.product(SUFFIXES, (1, 2, 3, 4), (np.uint8, np.uint16))
        if not (s == ".jpg" and c in (2, 4)) and not (d == np.uint16 and s in (".jpg", ".webp"))
    ],
)
def test_round_trip(tmp_path, suffix, channels, dtype):
    pixels = smooth(channels=channels, dtype=dtype)
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    vips(pixels).write_to_file(str(source), **BEST.get(suffix, {}))
    picture = read_picture(source)
    (page,), (alpha,) = picture.pages, picture.alpha
    colours = channels if channels in (1, 3) else channels - 1
    stored = 3 if suffix == ".webp" else colours  # WebP has no grey
    assert page.dtype == dtype and page.shape == (40, 60, stored)
    assert difference(page, pixels[..., :colours]) <= (4 if suffix == ".jpg" else 0)
    assert (alpha is None) == (channels in (1, 3))
    assert alpha is None or np.array_equal(alpha, pixels[..., -1])

    colored = np.broadcast_to(page, (40, 60, 3)) // 2
    write_picture(target, picture, [colored])
    again = read_picture(target)
    assert again.pages[0].dtype == dtype
    assert difference(again.pages[0], colored) <= (4 if suffix == ".jpg" else 0)
    assert alpha is None or np.array_equal(again.alpha[0], alpha)
    assert header(target)["icc-profile-data"] == pyvips.Image.profile_load("srgb")


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_sixteen_bits_are_rounded_for_formats_of_eight(tmp_path, suffix):
    deep = np.full((8, 8, 3), 40000, np.uint16)  # 155.6
    write_picture(tmp_path / f"a{suffix}", Picture(Path("deep"), [deep], [None], lossless=True), [deep])
    assert difference(read_picture(tmp_path / f"a{suffix}").pages[0], np.full((8, 8, 3), 156)) <= (suffix == ".jpg")


def test_jpeg_keeps_full_chroma_and_drops_alpha_with_one_warning(tmp_path, caplog):
    vips(smooth(channels=4)).write_to_file(str(tmp_path / "a.png"))
    picture = read_picture(tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        write_picture(tmp_path / "a.jpg", picture, picture.pages)
    assert [r.message.count("alpha") for r in caplog.records] == [1]
    assert header(tmp_path / "a.jpg")["jpeg-chroma-subsample"] == "4:4:4"
    # not blended with a background: what is under the transparent parts stays
    assert difference(read_picture(tmp_path / "a.jpg").pages[0], picture.pages[0]) <= 4


@pytest.mark.parametrize(
    ("name", "options", "pages"),
    [
        ("bit.tif", {"bitdepth": 1, "compression": "ccittfax4"}, 1),
        ("bit.png", {"bitdepth": 1}, 1),
        ("palette.png", {"palette": True}, 3),
    ],
)
def test_few_bits(tmp_path, name, options, pages):
    pixels = (smooth(channels=pages) > 128).astype(np.uint8) * 255
    vips(pixels).write_to_file(str(tmp_path / name), **options)
    picture = read_picture(tmp_path / name)
    assert np.array_equal(picture.pages[0], pixels)
    write_picture(tmp_path / f"out-{name}", picture, [smooth()])
    assert np.array_equal(read_picture(tmp_path / f"out-{name}").pages[0], smooth())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_pixel(tmp_path, suffix):
    vips(np.full((1, 1, 1), 77, np.uint8)).write_to_file(str(tmp_path / f"a{suffix}"))
    picture = read_picture(tmp_path / f"a{suffix}")
    write_picture(tmp_path / f"b{suffix}", picture, [np.full((1, 1, 3), 99, np.uint8)])
    assert difference(read_picture(tmp_path / f"b{suffix}").pages[0], np.full((1, 1, 3), 99)) <= 1


# --- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_wide_gamut_profile_is_applied(tmp_path, dtype):
    pixels = smooth(dtype=dtype) // 2 + np.iinfo(dtype).max // 4  # inside both gamuts
    depth = 8 * pixels.itemsize
    wide = vips(pixels).icc_transform("p3", input_profile="srgb", depth=depth)
    assert difference(wide.numpy(), pixels) > 0.02 * np.iinfo(dtype).max
    wide.write_to_file(str(tmp_path / "wide.tif"))
    page = read_picture(tmp_path / "wide.tif").pages[0]
    assert page.dtype == dtype and difference(page, pixels) <= (3 if depth == 8 else 200)


def grey_profile(gamma: float) -> bytes:
    """An ICC 2.4 profile of a grey device with a pure power curve."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + b"\0\0"
    white = b"XYZ " + struct.pack(">Iiii", 0, 0xF6D6, 0x10000, 0xD32D)
    name = b"desc" + struct.pack(">II", 0, 5) + b"grey\0" + bytes(78) + b"\0"
    text = b"text" + bytes(4) + b"none"
    body, table, at = b"", b"", 128 + 4 + 4 * 12
    for tag, data in ((b"desc", name), (b"cprt", text), (b"wtpt", white), (b"kTRC", curve)):
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = bytearray(128)
    struct.pack_into(">I", head, 0, at + len(body))
    head[8:12] = b"\x02\x40\0\0"
    head[12:24] = b"mntrGRAYXYZ "
    struct.pack_into(">12H", head, 24, 2020, 1, 1, 0, 0, 0, *struct.unpack(">2H", b"acsp"), 0, 0, 0, 0)
    head[36:40] = b"acsp"
    struct.pack_into(">iii", head, 68, 0xF6D6, 0x10000, 0xD32D)
    return bytes(head) + struct.pack(">I", 4) + table + body


@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg"])
def test_grey_profile_is_applied(tmp_path, suffix):
    grey = np.tile(np.arange(256, dtype=np.uint8), (16, 1))[..., None]
    image = vips(grey, icc_profile_data=(BLOB, grey_profile(1.0)))
    image.write_to_file(str(tmp_path / f"linear{suffix}"), **BEST.get(suffix, {}))
    page = read_picture(tmp_path / f"linear{suffix}").pages[0]
    v = np.arange(256) / 255
    srgb = np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055) * 255
    assert difference(page[8, 8:], np.repeat(srgb[8:, None], page.shape[2], 1)) <= 2
    assert page.shape[2] == 1 or np.ptp(page.astype(int), axis=2).max() <= 1


def test_cmyk_jpeg(tmp_path):
    pixels = smooth() // 4 + 90
    vips(pixels).icc_transform("cmyk", input_profile="srgb").write_to_file(str(tmp_path / "press.jpg"), Q=100)
    assert header(tmp_path / "press.jpg")["bands"] == 4
    page = read_picture(tmp_path / "press.jpg").pages[0]
    assert page.shape == (40, 60, 3)
    assert difference(page, pixels) < 25 and np.abs(page.astype(int) - pixels).mean() < 6


def test_broken_profile_is_passed_over(tmp_path):
    vips(smooth(), icc_profile_data=(BLOB, b"no profile at all" * 20)).write_to_file(str(tmp_path / "a.tif"))
    assert np.array_equal(read_picture(tmp_path / "a.tif").pages[0], smooth())


# --- metadata ---------------------------------------------------------------------------------------------------------


def full_file(path, orientation=1, dtype=np.uint8, height=200, width=300):
    """A file with EXIF, XMP, IPTC and 300 × 150 dpi, as a camera or a scanner writes it."""
    picture = Picture(Path("made here"), [smooth(height, width, 3, dtype)], [None], resolution=(300 / 25.4, 150 / 25.4))
    exif = {
        271: tags.Tag(2, b"Zeiss Ikon\0"),
        274: tags.Tag(3, struct.pack("<H", orientation)),
        315: tags.Tag(2, b"Anna\0"),
        tags._EXIF: {
            0x9003: tags.Tag(2, b"1931:01:02 00:00:00\0"),
            0x927C: tags.Tag(7, b"maker's own notes"),
            40962: tags.Tag(4, struct.pack("<I", width)),
            40963: tags.Tag(4, struct.pack("<I", height)),
        },
        tags._GPS: {1: tags.Tag(2, b"N\0"), 2: tags.Tag(5, struct.pack("<6I", 48, 1, 8, 1, 0, 1))},
    }
    resources = tags._resource(0x040C, b"a grey thumbnail") + tags._resource(0x0404, IPTC)
    picture.metadata = tags.Metadata(
        tags._block(exif | tags._resolution_tags(*picture.resolution)), XMP, tags.fresh_photoshop(resources)
    )
    write_picture(path, picture, picture.pages)
    if path.suffix == ".tif" and orientation != 1:
        data = bytearray(path.read_bytes())
        with open(path, "rb") as file:
            reader = tags._Reader(file)
            at, _ = next(reader.chain())
            where = next(where for tag, _, _, where, _ in reader.fields(at) if tag == 274)
        struct.pack_into("<H", data, where, orientation)
        path.write_bytes(data)
    return picture


@pytest.mark.parametrize(("source", "target"), list(itertools.product(SUFFIXES, SUFFIXES)))
def test_metadata_goes_from_every_format_to_every_format(tmp_path, source, target):
    a, b, c = tmp_path / f"a{source}", tmp_path / f"b{target}", tmp_path / "c.jpg"
    full_file(a)
    picture = read_picture(a)
    write_picture(b, picture, picture.pages)
    write_picture(c, read_picture(b), picture.pages)  # what a reader of EXIF in JPEG sees
    fields = header(c)
    assert fields["exif-ifd0-Artist"].startswith("Anna ") and fields["exif-ifd0-Make"].startswith("Zeiss Ikon ")
    assert fields["exif-ifd2-DateTimeOriginal"].startswith("1931:01:02")
    assert fields["exif-ifd2-MakerNote"].startswith("17 bytes")
    assert fields["exif-ifd3-GPSLatitude"].startswith("48/1 8/1 0/1")
    assert fields["xmp-data"] == XMP.replace(b'"6"', b'"1"')
    if ".png" not in (source, target) and ".webp" not in (source, target):  # these have no place for IPTC
        assert IPTC in fields["iptc-data"]
    written = read_picture(b)
    np.testing.assert_allclose(written.resolution, (300 / 25.4, 150 / 25.4), rtol=2e-3)
    if target == ".tif":
        with_libvips = header(b)
        assert with_libvips["xmp-data"].startswith(b"<x:xmpmeta") and with_libvips["bits-per-sample"] == 8


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_library_reads_it(tmp_path, suffix):
    image = pytest.importorskip("PIL.Image")
    full_file(tmp_path / "a.jpg", orientation=6)
    picture = read_picture(tmp_path / "a.jpg")
    write_picture(tmp_path / f"b{suffix}", picture, picture.pages)
    with image.open(tmp_path / f"b{suffix}") as opened:
        opened.load()
        exif = opened.getexif()
        assert opened.size == (200, 300)
        assert (exif[271], exif[315], exif.get(274, 1)) == ("Zeiss Ikon", "Anna", 1)
        inner, gps = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
        assert inner[0x9003] == "1931:01:02 00:00:00" and inner[0x927C] == b"maker's own notes"
        assert (inner[40962], inner[40963]) == (200, 300)
        assert gps[1] == "N" and [float(n) for n in gps[2]] == [48, 8, 0]
        assert opened.info["icc_profile"] == pyvips.Image.profile_load("srgb")
        if suffix != ".webp":
            assert [round(float(n)) for n in opened.info["dpi"]] == [150, 300]
        if suffix == ".tif":
            assert opened.tag_v2[33723] == IPTC


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_resolution_is_invented(tmp_path, suffix):
    vips(smooth()).write_to_file(str(tmp_path / f"a{suffix}"), keep=0)
    picture = read_picture(tmp_path / f"a{suffix}")
    picture.resolution = None  # libvips invented one when it wrote
    write_picture(tmp_path / f"b{suffix}", picture, picture.pages)
    again = read_picture(tmp_path / f"b{suffix}")
    assert again.resolution is None
    assert again.metadata.exif is None


@pytest.mark.parametrize(("suffix", "orientation"), list(itertools.product(SUFFIXES, (1, 2, 3, 5, 6, 8))))
def test_orientation_is_applied_once(tmp_path, suffix, orientation):
    made = full_file(tmp_path / f"a{suffix}", orientation).pages[0]
    upright = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        8: lambda x: np.rot90(x),
    }[orientation](made)
    picture = read_picture(tmp_path / f"a{suffix}")
    assert picture.pages[0].shape == upright.shape
    assert np.abs(picture.pages[0].astype(int) - upright).mean() < 2
    write_picture(tmp_path / f"b{suffix}", picture, [upright])
    again = read_picture(tmp_path / f"b{suffix}")
    assert np.abs(again.pages[0].astype(int) - upright).mean() < 2
    fields = header(tmp_path / f"b{suffix}")
    assert fields.get("orientation", 1) == 1
    assert b'tiff:Orientation="1"' in again.metadata.xmp
    x, y = (150, 300) if orientation >= 5 else (300, 150)
    np.testing.assert_allclose(again.resolution, (x / 25.4, y / 25.4), rtol=2e-3)
    if suffix != ".tif":
        assert fields["exif-ifd0-Orientation"].startswith("1 ")
        assert fields["exif-ifd2-PixelXDimension"].startswith(f"{upright.shape[1]} ")


def test_a_large_turned_file_is_read(tmp_path):
    # larger than what libvips buffers of a file that it reads from top to bottom
    pixels = smooth(3000, 400, 1)
    vips(pixels, orientation=(INT, 6)).write_to_file(str(tmp_path / "a.png"))
    assert np.array_equal(read_picture(tmp_path / "a.png").pages[0], np.rot90(pixels, -1))


def test_big_endian_tiff_with_private_tags(tmp_path):
    """A directory written by hand, most significant byte first, as scanners write it."""
    pixels = (np.arange(12).reshape(3, 4) * 5000).astype(">u2")
    name, artist, private = b"Box 7, no. 12\0", b"Anna\0", struct.pack(">2I", 7, 70000)
    rows, extra, at = [], b"", 8 + pixels.nbytes + 2 + 12 * 12 + 4

    def row(tag, kind, count, value):
        nonlocal extra
        if isinstance(value, bytes):
            value, extra = at + len(extra), extra + value + bytes(len(value) % 2)
        rows.append(
            struct.pack(">HHI", tag, kind, count)
            + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        )

    row(256, 3, 1, 4), row(257, 3, 1, 3), row(258, 3, 1, 16), row(259, 3, 1, 1), row(262, 3, 1, 1)
    row(269, 2, len(name), name), row(273, 4, 1, 8), row(277, 3, 1, 1), row(278, 3, 1, 3)
    row(279, 4, 1, pixels.nbytes), row(315, 2, len(artist), artist), row(65001, 4, 2, private)
    data = struct.pack(">2sHI", b"MM", 42, 8 + pixels.nbytes) + pixels.tobytes()
    (tmp_path / "a.tif").write_bytes(data + struct.pack(">H", len(rows)) + b"".join(rows) + bytes(4) + extra)
    picture = read_picture(tmp_path / "a.tif")
    assert picture.compression == "none" and np.array_equal(picture.pages[0][..., 0], pixels)
    write_picture(tmp_path / "b.tif", picture, [np.repeat(picture.pages[0], 3, 2)])
    (page,) = tags.read_pages(tmp_path / "b.tif")
    assert (page[269].data, page[315].data) == (name, artist)
    assert page[65001] == tags.Tag(4, struct.pack("<2I", 7, 70000))
    assert page[tags.COMPRESSION].first() == 1


def test_texts_of_a_png(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Kästchen", "Straße, 1931")  # Latin-1, as the format says
    info.add_itxt("Title", "Žižkov")
    info.add_text("Raw profile type exif", "an orientation among others")
    image.fromarray(smooth()).save(tmp_path / "a.png", pnginfo=info)
    picture = read_picture(tmp_path / "a.png")
    write_picture(tmp_path / "b.png", picture, picture.pages)
    with image.open(tmp_path / "b.png") as opened:
        opened.load()
        assert opened.text == {"Kästchen": "Straße, 1931", "Title": "Žižkov"}


def test_exif_too_long_for_jpeg_and_broken_exif(tmp_path, caplog):
    picture = Picture(Path("a"), [smooth()], [None])
    picture.metadata.exif = tags._block({270: tags.Tag(2, b"x" * 70000)})
    write_picture(tmp_path / "a.jpg", picture, picture.pages)
    assert "does not fit" in caplog.text
    assert read_picture(tmp_path / "a.jpg").metadata.exif is None
    write_picture(tmp_path / "a.png", picture, picture.pages)
    assert read_picture(tmp_path / "a.png").metadata.exif == picture.metadata.exif
    for cut in range(0, 60, 7):
        assert tags.upright_exif(picture.metadata.exif[:cut], 1, 1, False) is None or cut > 20
        tags.exif_resolution(picture.metadata.exif[:cut])


# --- pages, compression -----------------------------------------------------------------------------------------------


def many_pages(path, count=3, **options):
    pages = [smooth(20, 30, 3, seed=i) for i in range(count)]
    roll = vips(np.concatenate(pages))
    roll.set_type(INT, "page-height", 20)
    roll.write_to_file(str(path), **options)
    return pages


@pytest.mark.parametrize("big", [False, True])
def test_pages_of_a_tiff(tmp_path, big, monkeypatch):
    pages = many_pages(tmp_path / "a.tif", compression="lzw", bigtiff=big)
    notes = [
        {270: tags.Tag(2, f"page {i}, recto\0".encode()), 34377: tags.Tag(7, tags._resource(1028, IPTC))}
        for i in range(3)
    ]
    tags.append_tags(tmp_path / "a.tif", notes, resolution=False)
    picture = read_picture(tmp_path / "a.tif")
    assert np.array_equal(picture.pages, pages)
    monkeypatch.setattr(files, "_CLASSIC_TIFF", 100 if big else 1 << 30)
    write_picture(tmp_path / "b.tif", picture, [255 - p for p in pages])
    assert (tmp_path / "b.tif").read_bytes()[2] == (43 if big else 42)
    again = read_picture(tmp_path / "b.tif")
    assert np.array_equal(again.pages, [255 - p for p in pages])
    assert [p[270].data for p in again.metadata.pages] == [n[270].data for n in notes]
    assert again.compression == "lzw" and again.resolution is None
    assert len(read_picture(tmp_path / "b.tif", max_pages=2).pages) == 2
    with pytest.raises(ImageError, match="holds one page"):
        write_picture(tmp_path / "b.png", picture, picture.pages)


def test_pages_of_unequal_size_and_thumbnails(tmp_path):
    """Two files chained by hand: their second page is another picture, or a smaller copy when its tag says so."""
    for name, height in (("one", 20), ("two", 10)):
        vips(smooth(height, 30)).write_to_file(str(tmp_path / f"{name}.tif"), compression="none")
    first = bytearray((tmp_path / "one.tif").read_bytes())
    second = (tmp_path / "two.tif").read_bytes()
    for reduced, name in ((0, "unequal.tif"), (1, "thumbnail.tif")):
        with open(tmp_path / "one.tif", "rb") as file:
            reader = tags._Reader(file)
            at, _ = next(reader.chain())
            end = reader.end(at)
        with open(tmp_path / "two.tif", "rb") as file:
            reader = tags._Reader(file)
            at, _ = next(reader.chain())
            stored = {t: tags._Stored(k, n, w) for t, k, n, _, w in reader.fields(at)}
        place = len(first) + len(first) % 2
        base = place + 4096
        # offsets of the second file move: its pixels are appended, and few fields point anywhere
        stored[273] = tags._Stored(4, 1, struct.pack("<I", base + int.from_bytes(stored[273].word, "little")))
        stored[254] = tags._Stored(4, 1, struct.pack("<I", reduced))
        rows = {t: v for t, v in stored.items() if t not in (258, 282, 283, 339)}
        rows[258] = tags.Tag(3, struct.pack("<3H", 8, 8, 8))
        data = first[:end] + struct.pack("<I", place) + first[end + 4 :]
        data = data.ljust(place, b"\0") + tags._pack(rows, place)
        (tmp_path / name).write_bytes(data.ljust(base, b"\0") + second)
    with pytest.raises(ImageError, match=r"unequal.tif: its pages differ in size \(page 1 is 30×20, page 2 30×10\)"):
        read_picture(tmp_path / "unequal.tif")
    assert len(read_picture(tmp_path / "thumbnail.tif").pages) == 1


def test_pages_of_unlike_depth_and_alpha_are_written_as_the_richest(tmp_path):
    pages, alpha = [smooth(dtype=np.uint16), smooth()], [None, smooth(channels=1)[..., 0]]
    write_picture(tmp_path / "a.tif", Picture(Path("a"), pages, alpha), pages)
    again = read_picture(tmp_path / "a.tif")
    assert np.array_equal(again.pages, [pages[0], pages[1].astype(np.uint16) * 257])
    assert again.alpha[0].min() == 65535 and np.array_equal(again.alpha[1], alpha[1].astype(np.uint16) * 257)


@pytest.mark.parametrize("lossless", [True, False])
def test_animated_webp(tmp_path, lossless):
    roll = vips(np.concatenate([smooth(20, 30, 4, seed=i) for i in range(3)]))
    roll.set_type(INT, "page-height", 20)
    roll.set_type(pyvips.GValue.array_int_type, "delay", [40, 50, 60])
    roll.set_type(INT, "loop", 2)
    roll.webpsave(str(tmp_path / "a.webp"), lossless=lossless, exact=True)
    picture = read_picture(tmp_path / "a.webp")
    assert len(picture.pages) == 3 and picture.pages[0].shape == (20, 30, 3) and picture.lossless == lossless
    write_picture(tmp_path / "b.webp", picture, picture.pages)
    again = read_picture(tmp_path / "b.webp")
    assert (again.delays, again.loop, again.lossless) == ([40, 50, 60], 2, lossless)
    for mask, new in zip(picture.alpha, again.alpha, strict=True):
        assert np.array_equal(mask, new)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("none", 1), ("lzw", 5), ("deflate", 8), ("packbits", 32773), ("jpeg", 7), ("ccittfax4", 8)],
)
def test_tiff_compression_is_kept(tmp_path, given, kept):
    pixels = smooth(channels=1 if "fax" in given else 3)
    options = {"bitdepth": 1} if "fax" in given else {}
    vips(pixels).write_to_file(str(tmp_path / "a.tif"), compression=given, **options)
    write_picture(tmp_path / "b.tif", read_picture(tmp_path / "a.tif"), [smooth()])
    assert tags.read_pages(tmp_path / "b.tif")[0][tags.COMPRESSION].first() == kept
    assert difference(read_picture(tmp_path / "b.tif").pages[0], smooth()) <= (6 if given == "jpeg" else 0)


def test_decoded_size(tmp_path):
    many_pages(tmp_path / "a.tif")
    assert decoded_size(tmp_path / "a.tif") == 3 * 20 * 30 * 3
    assert decoded_size(tmp_path / "a.tif", channels=3) == 3 * 20 * 30 * 6


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cut_off_files(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    vips(noise).write_to_file(str(tmp_path / f"a{suffix}"))
    data = (tmp_path / f"a{suffix}").read_bytes()
    for share in (0.02, 0.5, 0.98):
        (tmp_path / f"cut{suffix}").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError, match=f"cut{suffix}: (broken or cut off|not a readable image)"):
            read_picture(tmp_path / f"cut{suffix}")


def test_bad_input(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("dear diary")
    pyvips.Image.black(5, 5).cast("float").write_to_file(str(tmp_path / "float.tif"))
    for name, why in (
        ("missing.jpg", "No such file"),
        ("", "is a folder"),
        ("empty.jpg", "the file is empty"),
        ("text.png", "not a known file format"),
        ("float.tif", "8 or 16 bits"),
    ):
        with pytest.raises(ImageError, match=why) as caught:
            read_picture(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_unwritable_targets(tmp_path):
    picture = Picture(Path("a"), [smooth()], [None])
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="b.png: cannot be written"):
        write_picture(tmp_path / "file" / "b.png", picture, picture.pages)
    with pytest.raises(ImageError, match="cannot write .gif"):
        write_picture(tmp_path / "b.gif", picture, picture.pages)
    with pytest.raises(ValueError, match="pages"):
        write_picture(tmp_path / "b.png", picture, [smooth(5, 5)])
    wide = np.zeros((1, 17000, 3), np.uint8)
    with pytest.raises(ImageError, match="too large for .webp"):
        write_picture(tmp_path / "b.webp", Picture(Path("a"), [wide], [None]), [wide])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_no_half_file(tmp_path, suffix, exists):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    target = tmp_path / f"a{suffix}"
    if exists:
        target.write_bytes(b"what stood here")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        with pytest.raises(ImageError, match="cannot be written .*File too large"):
            write_picture(target, Picture(Path("a"), [noise], [None], compression="none"), [noise])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"what stood here"] if exists else [])


def test_a_rewritten_file_is_read_anew(tmp_path):
    for level in (10, 200):
        vips(np.full((5, 5, 3), level, np.uint8)).write_to_file(str(tmp_path / "a.webp"), lossless=True)
        assert read_picture(tmp_path / "a.webp").pages[0].max() == level
