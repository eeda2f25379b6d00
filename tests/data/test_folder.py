"""Image folders, and what lies in them in practice (fault T21)."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data import open_set
from fastkd.data.decode import decode, eval_transform
from fastkd.errors import InputError


def picture(seed=0, h=12, w=12, channels=3):
    array = np.random.default_rng(seed).integers(0, 256, (h, w, channels), np.uint8)
    return Image.fromarray(array if channels > 1 else array[..., 0])


def write(root, classes=("a", "b"), n=3, h=12, w=12, end=".png"):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            picture(100 * k + i, h, w).save(root / name / f"{i}{end}")
    return root


def fails(spec, words, **more):
    with pytest.raises(InputError) as caught:
        open_set(str(spec), **more)
    assert words in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def bomb(h=60_000, w=60_000):
    """A PNG that claims 3.6 billion pixels in a few hundred bytes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\x00" * 1000)) + chunk(b"IEND", b"")


def test_class_folders_are_sorted_and_pixels_are_kept(tmp_path):
    write(tmp_path, ("b", "a", "C"))
    found = open_set(str(tmp_path))
    assert found.class_names == ["C", "a", "b"] and found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.images.shape == (9, 12, 12, 3) and found.mean is None
    assert np.array_equal(found.images[3].numpy(), np.asarray(picture(100)))  # first of 'a', not resized
    assert found.name == tmp_path.name


def test_train_and_val_sub_folders(tmp_path):
    write(tmp_path / "train", n=4)
    write(tmp_path / "val", n=2)
    assert len(open_set(str(tmp_path), "train")) == 8
    test = open_set(str(tmp_path), "test")
    assert len(test) == 4 and "val" in test.notes[0]
    write(tmp_path / "test", n=1)
    assert len(open_set(str(tmp_path), "test")) == 2


def test_missing_split(tmp_path):
    write(tmp_path / "train")
    fails(tmp_path, "no test or val sub-folder")


def test_flat_folder_says_that_train_is_everything(tmp_path):
    write(tmp_path)
    assert any("all of its images" in note for note in open_set(str(tmp_path), "train").notes)


def test_deeper_folders_count_for_their_class(tmp_path):
    write(tmp_path)
    (tmp_path / "a" / "images").mkdir()
    picture(7).save(tmp_path / "a" / "images" / "x.png")
    assert open_set(str(tmp_path)).labels.tolist() == [0] * 4 + [1] * 3


@pytest.mark.parametrize(("size", "h", "w"), [(32, 40, 60), (64, 80, 60), (224, 300, 500), (224, 100, 90), (64, 64, 65), (31, 47, 33)])
def test_eval_transform_is_resize_and_centre_crop(size, h, w):
    """Against the formula written out with torch's own antialiased bilinear filter: at most one level off, by rounding."""
    source = picture(1, h, w)
    short = int(size * 256 / 224 + 0.5) if size >= 64 else size
    new_h, new_w = (short, short * w // h) if h <= w else (short * h // w, short)
    x = torch.from_numpy(np.asarray(source).copy()).permute(2, 0, 1)[None].double()
    x = torch.nn.functional.interpolate(x, (new_h, new_w), mode="bilinear", antialias=True, align_corners=False)
    top, left = round((new_h - size) / 2), round((new_w - size) / 2)
    expected = x[0, :, top : top + size, left : left + size].permute(1, 2, 0)
    ours = torch.from_numpy(np.asarray(eval_transform(source, size)).copy()).double()
    assert ours.shape == (size, size, 3) and (ours - expected).abs().max() <= 1.01


def test_size_is_the_pictures_own_or_224(tmp_path):
    write(tmp_path, h=20, w=20)
    assert open_set(str(tmp_path)).images.shape[1] == 20
    assert open_set(str(tmp_path), size=16).images.shape[1:] == (16, 16, 3)
    picture(9, 20, 24).save(tmp_path / "a" / "other.png")
    assert open_set(str(tmp_path)).images.shape[1] == 224


@pytest.mark.fault("T21")
def test_every_kind_of_picture_becomes_rgb(tmp_path):
    write(tmp_path)
    place = tmp_path / "b"
    for file in place.iterdir():
        file.unlink()
    gray = picture(5, channels=1)
    gray.save(place / "0_gray.png")
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(place / "1_16bit.png")
    rgba = picture(6).convert("RGBA")
    rgba.putalpha(gray)
    rgba.save(place / "2_alpha.png")
    picture(6).convert("CMYK").save(place / "3_cmyk.jpg", quality=95)
    picture(6).convert("P").save(place / "4_palette.png")
    gray.convert("1").save(place / "5_bits.png")
    gray.convert("LA").save(place / "6_gray_alpha.png")
    images = open_set(str(tmp_path)).images[3:].numpy()
    assert len(images) == 7
    for i in (0, 1, 6):
        assert np.array_equal(images[i], np.repeat(np.asarray(gray)[..., None], 3, 2)), i
    assert np.array_equal(images[2], np.asarray(picture(6)))  # colour as stored, transparency dropped
    assert np.abs(images[3].astype(int) - np.asarray(picture(6))).mean() < 40  # JPEG of noise
    assert set(np.unique(images[5])) == {0, 255}
    one = open_set(str(tmp_path), channels=1)
    assert one.images.shape[3] == 1 and np.array_equal(one.images[4, ..., 0].numpy(), np.asarray(gray))


@pytest.mark.fault("T21")
def test_unreadable_images_are_counted_listed_and_left_out(tmp_path):
    write(tmp_path, n=100)
    whole = io.BytesIO()
    picture(3, 60, 60).save(whole, "JPEG")
    (tmp_path / "a" / "0_truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "b" / "no_image.png").write_bytes(b"<html>not found</html>")
    found = open_set(str(tmp_path), size=12)
    assert len(found) == 200 and found.labels.tolist() == [0] * 100 + [1] * 100
    assert np.array_equal(found.images[0].numpy(), np.asarray(picture(0)))  # the gap was closed, rows still fit
    assert np.array_equal(found.images[100].numpy(), np.asarray(picture(100)))
    note = next(note for note in found.notes if "could not be read" in note)
    assert "2 of 202" in note and "0_truncated.jpg" in note and "no_image.png" in note
    (tmp_path / "b" / "empty.png").write_bytes(b"")
    fails(tmp_path, "3 of 203 images could not be read, more than 1 %", size=12)


@pytest.mark.fault("T21")
def test_other_files_are_skipped_and_said(tmp_path):
    write(tmp_path)
    (tmp_path / "a" / "readme.txt").write_text("hello")
    (tmp_path / "a" / ".DS_Store").write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / "list.txt").write_text("hello")
    found = open_set(str(tmp_path))
    assert len(found) == 6 and found.class_names == ["a", "b"]
    assert any("1 files" in note and "readme.txt" in note for note in found.notes)


@pytest.mark.fault("T21")
@pytest.mark.parametrize("side", [60_000, 9_000])
def test_bomb_is_refused(tmp_path, side):
    write(tmp_path, n=200)
    (tmp_path / "a" / "bomb.png").write_bytes(bomb(side, side))
    fails(tmp_path, "decompression bomb")  # while sizes are looked up
    fails(tmp_path, "decompression bomb", size=12)  # while decoding


@pytest.mark.fault("T21")
def test_symlink_loops_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    fails(tmp_path, "loop")
    (tmp_path / "a" / "up").unlink()
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    fails(tmp_path, "leads to itself")
    (tmp_path / "a" / "self").unlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    fails(tmp_path, "leads to itself")


def test_links_that_do_not_loop_are_followed_and_broken_ones_counted(tmp_path):
    write(tmp_path / "set")
    write(tmp_path / "elsewhere", ("x",), n=2)
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere" / "x", target_is_directory=True)
    assert len(open_set(str(tmp_path / "set"))) == 8
    (tmp_path / "set" / "a" / "broken.png").symlink_to(tmp_path / "nothing.png")
    fails(tmp_path / "set", "broken.png")


@pytest.mark.fault("T21")
def test_empty_one_class_no_classes(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no class sub-folders")
    write(tmp_path / "one", ("only",))
    fails(tmp_path / "one", "one class sub-folder ('only')")
    for name in ("x", "y"):
        (tmp_path / "bare" / name).mkdir(parents=True)
    fails(tmp_path / "bare", "no images")
    (tmp_path / "flat").mkdir()
    picture().save(tmp_path / "flat" / "x.png")
    fails(tmp_path / "flat", "no class sub-folders")
    (tmp_path / "file.txt").write_text("x")
    fails(tmp_path / "file.txt", "is no folder")


@pytest.mark.fault("T21")
def test_class_without_images_keeps_its_number(tmp_path):
    write(tmp_path, ("a", "c"))
    (tmp_path / "b").mkdir()
    found = open_set(str(tmp_path))
    assert found.class_names == ["a", "b", "c"] and set(found.labels.tolist()) == {0, 2} and found.classes == 3
    assert any("1 classes have no images: b" in note for note in found.notes)
    (tmp_path / "d").mkdir()
    (tmp_path / "e").mkdir()
    fails(tmp_path, "most sub-folders have no images")


def test_a_folder_of_another_set_says_what_it_looks_like(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(b"")
    fails(tmp_path, "write cifar10:")


@pytest.mark.fault("T19")
def test_archives_are_not_opened(tmp_path):
    """T19: a tar with `..` and links cannot write anything, because no archive is ever unpacked."""
    import tarfile

    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        info = tarfile.TarInfo("../../outside.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    before = sorted(os.listdir(tmp_path.parent))
    fails(tmp_path / "set.tar", "archive")
    assert sorted(os.listdir(tmp_path.parent)) == before and os.listdir(tmp_path) == ["set.tar"]


@pytest.mark.fault("T19")
def test_class_names_that_are_no_utf8_or_hold_control_characters(tmp_path):
    write(tmp_path, ("ok",))
    for name in (b"bad\xe9", b"line\nbreak", b"x" * 250):
        place = os.path.join(os.fsencode(tmp_path), name)
        try:
            os.mkdir(place)
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
        picture().save(os.fsdecode(os.path.join(place, b"0.png")))
    found = open_set(str(tmp_path))
    assert found.class_names == ["bad�", "line�break", "ok", "x" * 250]
    "".join(found.class_names).encode("utf-8")


def test_too_large_for_memory_is_said_before_decoding(tmp_path):
    write(tmp_path)
    from fastkd.data import folder, image_set

    limit = image_set.check_memory.__defaults__
    assert limit == (8 << 30,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "check_memory", lambda n, size, channels, name: image_set.check_memory(n, size, channels, name, limit=1000))
        patch.setattr(folder, "decode_all", lambda *a: pytest.fail("decoded"))
        fails(tmp_path, "GiB")


def test_progress_reaches_the_end(tmp_path):
    seen = []
    open_set(str(write(tmp_path)), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6)


def test_narrow_picture_does_not_explode():
    with pytest.raises(ValueError, match="too narrow"):
        eval_transform(Image.new("RGB", (1, 8000)), 224)


def test_jpeg_equals_pillow():
    whole = io.BytesIO()
    picture(3, 64, 64).save(whole, "JPEG")
    assert np.array_equal(decode(whole.getvalue(), "x", 64, 3), np.asarray(Image.open(whole).convert("RGB")))
