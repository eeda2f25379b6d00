"""Sets with a label for each pixel: NYUv2 and CamVid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data import dense, open_set
from fastkd.data.image_set import IGNORE
from fastkd.errors import ConfigError, InputError
from tests.data.test_folder import bomb


def pair(folder, image, label, h=48, w=64, values=14, seed=0, mode="L"):
    """A picture and labels in blocks of 8 x 8, so that nothing is lost where the size is halved."""
    rng = np.random.default_rng(seed)
    for path in (folder / image, folder / label):
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (h, w, 3), np.uint8)
    y = np.repeat(np.repeat(rng.integers(0, values, (h // 8, w // 8), np.uint8), 8, 0), 8, 1)
    Image.fromarray(pixels).save(folder / image)
    picture = Image.fromarray(y)
    if mode == "P":
        picture.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    picture.save(folder / label)
    return pixels, y


def nyuv2(folder, n=3, images="nyu_test_rgb", labels="nyuv2_test_class13", **more):
    return [pair(folder, f"{images}/nyu_rgb_{i:04d}.png", f"{labels}/new_nyu_class13_{i:04d}.png", seed=i, **more) for i in (5, 2, 11)[:n]]


def camvid(folder, split="test", n=2, **more):
    more = {"values": 12, **more}
    return [pair(folder, f"{split}/0001TP_{i:06d}.png", f"{split}annot/0001TP_{i:06d}.png", seed=i, **more) for i in range(n)]


def fails(spec, words, **more):
    with pytest.raises(InputError) as caught:
        open_set(spec, **more)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_nyuv2_pairs_by_number_and_ignores_zero(tmp_path):
    five, two, eleven = nyuv2(tmp_path)
    found = open_set(f"nyuv2:{tmp_path}", size=24)  # the shorter side stays 48: nothing is resized
    assert found.images.shape == (3, 48, 64, 3) and found.labels.shape == (3, 48, 64) and found.labels.dtype == torch.int64
    for i, (pixels, y) in enumerate((two, five, eleven)):
        assert np.array_equal(found.images[i].numpy(), pixels)
        assert np.array_equal(found.labels[i].numpy(), np.where(y == 0, IGNORE, y.astype(int) - 1))
    assert found.dense and found.classes == 13 and found.class_names[0] == "bed" and found.class_names[12] == "window"
    assert (found.mean, found.std, found.flip, found.pad) == ((0.5,) * 3, (0.5,) * 3, True, 3)
    assert "published test set of nyuv2 has 654" in found.notes[0]


@pytest.mark.parametrize(
    ("images", "labels"), [("train", "train_labels_13"), ("train", "nyuv2-meta-data/train_labels_13"), ("nyu_train_rgb", "train_labels")]
)
def test_the_other_names_of_its_folders(tmp_path, images, labels):
    nyuv2(tmp_path, images=images, labels=labels)
    assert len(open_set(f"nyuv2:{tmp_path}", "train", size=8)) == 3


@pytest.mark.parametrize("mode", ["L", "P"])
def test_camvid_pairs_by_name_and_ignores_void(tmp_path, mode):
    written = camvid(tmp_path / "CamVid", mode=mode)
    camvid(tmp_path / "CamVid", "train", n=1)
    found = open_set(f"camvid:{tmp_path}", size=24)
    assert np.array_equal(found.labels.numpy(), np.stack([np.where(y == 11, IGNORE, y) for _, y in written]))
    assert found.classes == 11 and found.class_names[8] == "car"
    assert len(open_set(f"camvid:{tmp_path}/CamVid", "train", size=24)) == 1


def test_the_shorter_side_is_twice_the_crop_and_labels_are_never_mixed(tmp_path):
    (pixels, y), *_ = camvid(tmp_path, h=96, w=128)
    found = open_set(f"camvid:{tmp_path}", size=24, channels=1)
    assert found.images.shape == (2, 48, 64, 1) and "resized to 48 x 64" in found.notes[1]
    assert np.array_equal(found.labels[0].numpy(), np.where(y == 11, IGNORE, y)[::2, ::2])
    standard = open_set(f"camvid:{tmp_path}")
    assert standard.images.shape == (2, 256, 341, 3)  # as the published pipeline: 256 x 341 of 3 : 4
    shrunk = Image.fromarray(pixels).resize((341, 256), Image.Resampling.BILINEAR)
    assert np.array_equal(standard.images[0].numpy(), np.asarray(shrunk))


def test_upright_pictures(tmp_path):
    camvid(tmp_path, h=64, w=48)
    assert open_set(f"camvid:{tmp_path}", size=12).images.shape == (2, 32, 24, 3)


def test_a_part_of_a_dense_set_is_drawn_by_seed(tmp_path):
    nyuv2(tmp_path)
    found = open_set(f"nyuv2:{tmp_path}", size=24)
    part = found.subset(2, seed=1)
    assert len(part) == 2 and torch.equal(part.labels, found.subset(2, seed=1).labels) and "drawn with seed 1" in part.notes[-1]
    rows = [next(i for i in range(3) if torch.equal(found.images[i], image)) for image in part.images]
    assert rows == sorted(rows) and all(torch.equal(found.labels[i], label) for i, label in zip(rows, part.labels, strict=True))
    with pytest.raises(ConfigError, match="labels for pixels"):
        found.per_class(1)


def test_missing_folders_and_partners(tmp_path):
    fails(f"nyuv2:{tmp_path}", "nyu_test_rgb")
    nyuv2(tmp_path)
    (tmp_path / "nyuv2_test_class13" / "new_nyu_class13_0002.png").unlink()
    fails(f"nyuv2:{tmp_path}", "number 2")
    (tmp_path / "nyu_test_rgb" / "nyu_rgb_0005.png").rename(tmp_path / "nyu_test_rgb" / "room.png")
    fails(f"nyuv2:{tmp_path}", "end in no number")
    fails(f"camvid:{tmp_path}", "no folder 'test'")
    camvid(tmp_path)
    (tmp_path / "testannot" / "0001TP_000001.png").unlink()
    fails(f"camvid:{tmp_path}", "has no label picture")
    for file in (tmp_path / "test").iterdir():
        file.unlink()
    fails(f"camvid:{tmp_path}", "has no pictures")


def test_label_pictures_that_are_none(tmp_path):
    camvid(tmp_path)
    label = tmp_path / "testannot" / "0001TP_000001.png"
    Image.new("RGB", (64, 48)).save(label)
    fails(f"camvid:{tmp_path}", "kind RGB")
    Image.new("L", (32, 48)).save(label)
    fails(f"camvid:{tmp_path}", "is 48 x 32")
    Image.new("L", (64, 48), 13).save(label)
    fails(f"camvid:{tmp_path}", "holds the value 13")
    Image.new("L", (64, 48), 255).save(label)
    assert (open_set(f"camvid:{tmp_path}").labels[1] == IGNORE).all()
    label.write_bytes(bomb())
    fails(f"camvid:{tmp_path}", "decompression bomb")
    label.write_bytes(b"no picture")
    fails(f"camvid:{tmp_path}", "1 of 2 images could not be read")


def test_pictures_of_several_sizes_or_damaged(tmp_path):
    camvid(tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "test" / "0001TP_000001.png")
    fails(f"camvid:{tmp_path}", "expected one size")
    (tmp_path / "test" / "0001TP_000000.png").write_bytes(b"")
    fails(f"camvid:{tmp_path}", "damaged, or no picture")


def test_more_than_fits_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    camvid(tmp_path)
    monkeypatch.setattr(dense, "_LIMIT", 1 << 19)
    monkeypatch.setattr(dense, "each", lambda *a: pytest.fail("decoded"))
    fails(f"camvid:{tmp_path}", "use a smaller size")
