"""Images and views of them: what is held out, what a view shows, the same step the same batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from training.data.config_worlds import HubImagesConfig, SmallImagesConfig, Source, ViewsConfig
from training.data.corpus import DataError
from training.data.galleries import SHAPES, digits, font_files, glyphs, shapes
from training.data.hub_images import HubImagesData
from training.data.small_images import SmallImagesData
from training.data.views import draw_views, show
from training.evaluation.probes import accuracy, logistic_probe, nearest_accuracy

PLAIN = ViewsConfig(area=[1.0, 1.0], rotate=0.0, shift=0.0, jitter=[0.0] * 4, cutout=0.0, noise=0.0)


def seen(images: torch.Tensor, config: ViewsConfig, v: int = 2, seed: int = 0) -> torch.Tensor:
    n, c, size, _ = images.shape
    drawn = draw_views(config, np.random.default_rng(seed), n, v, config.area, size, c)
    return show(images, *(torch.from_numpy(x) for x in drawn))


def changed(**fields) -> ViewsConfig:
    return dataclasses.replace(PLAIN, **fields)


@pytest.mark.parametrize("gallery", [digits(32, 0), glyphs(32, 0), shapes(32, 0, 400)])
def test_galleries_hold_out_some_of_every_class(gallery) -> None:
    assert gallery.images.dtype == np.uint8 and gallery.images.shape[1:] == (1, 32, 32)
    assert 0.2 < gallery.held.mean() < 0.4
    for part in (False, True):
        images, labels = gallery.part(part)
        assert set(labels) == set(range(len(gallery.names)))
        assert (images.reshape(len(images), -1).max(axis=1) > 100).all(), "nothing is empty"


def test_held_out_glyphs_are_of_other_fonts_and_shapes_look_like_their_class() -> None:
    gallery = glyphs(32, 0)
    by_font = gallery.held.reshape(len(font_files()), -1)
    assert (by_font == by_font[:, :1]).all()
    assert not np.array_equal(glyphs(32, 1).held, gallery.held)
    drawn = shapes(32, 0, 800)
    filled = {
        name: drawn.images[drawn.labels == i, 0, 16, 16].mean() for i, name in enumerate(SHAPES)
    }
    assert filled["ring"] < 5 and filled["frame"] < 5 < 100 < min(filled["disc"], filled["cross"])


def test_a_view_that_changes_nothing_is_the_image() -> None:
    images = torch.rand(3, 2, 16, 16)
    torch.testing.assert_close(seen(images, PLAIN), images[:, None].expand(-1, 2, -1, -1, -1))


def test_views_show_parts_and_mirror() -> None:
    images = torch.arange(16.0).expand(1, 1, 16, 16) / 16  # brightness is where one looks, in x
    mirrored = seen(images, changed(flip=1.0), v=1)
    torch.testing.assert_close(mirrored[0, 0], images[0].flip(-1))
    parts = seen(images, changed(area=[0.25, 0.25]), v=200)[0, :, 0]
    width = (parts[..., -1] - parts[..., 0]).mean() * 16
    assert width.item() == pytest.approx(7.5, abs=0.3), "half as wide"
    assert parts.mean(dim=(1, 2)).std() > 0.1, "anywhere in the image"
    smaller = seen(torch.ones(1, 1, 16, 16), changed(area=[4.0, 4.0]), v=1)
    assert smaller.mean().item() == pytest.approx(0.25, abs=0.02), "black around it"


def test_light_changes_as_it_says() -> None:
    images = torch.rand(8, 3, 16, 16) * 0.4 + 0.3
    grey = seen(images, changed(grey=1.0))
    torch.testing.assert_close(grey[:, :, 0], grey[:, :, 2])
    solar = seen(images, changed(solarise=1.0))[:, 0]
    torch.testing.assert_close(solar, torch.where(images >= 0.5, 1 - images, images))
    bright = seen(images, changed(jitter=[0.3, 0.0, 0.0, 0.0], jitter_share=1.0))
    ratio = bright / images[:, None]
    assert (ratio.flatten(2).std(-1) < 0.05).all() and ratio.mean(dim=(2, 3, 4)).std() > 0.05
    hue = seen(images, changed(jitter=[0.0, 0.0, 0.0, 0.5], jitter_share=1.0))
    torch.testing.assert_close(hue.mean(2), images[:, None].mean(2).expand(-1, 2, -1, -1))
    assert not torch.allclose(hue[:, 0], images)
    blurred = seen(torch.rand(4, 1, 64, 64), changed(blur=1.0))
    assert 0 < blurred.std() < 0.28, "less contrast from pixel to pixel"


def test_holes_and_noise_are_as_large_as_they_say() -> None:
    ones = torch.ones(200, 1, 32, 32)
    holes = 1 - seen(ones, changed(cutout=0.5)).mean()
    assert 0.03 < holes < 0.25
    noise = seen(ones, changed(noise=0.2)) - 1
    assert noise.flatten(2).std(-1).max() < 0.25 and noise.std() > 0.05


def small(**fields) -> SmallImagesConfig:
    return SmallImagesConfig(batch_size=16, **fields)


def test_a_step_has_one_batch_and_processes_share_it() -> None:
    config = small(sources=[Source.digits, Source.shapes], views=ViewsConfig(local_count=2))
    whole = SmallImagesData(config, seed=3).batch(7)
    again = SmallImagesData(config, seed=3).batch(7)
    halves = [SmallImagesData(config, seed=3, rank=r, world=2).batch(7) for r in range(2)]
    assert whole["local_noise"].shape == (16, 2, 1, 16, 16)
    for name, rows in whole.items():
        assert np.array_equal(rows, again[name])
        assert np.array_equal(rows, np.concatenate([half[name] for half in halves]))
    assert not np.array_equal(whole["where"], SmallImagesData(config, seed=3).batch(8)["where"])


def test_nothing_held_out_is_trained_on() -> None:
    data = SmallImagesData(small(), seed=0)
    exam = data.exam()
    trained = {row.tobytes() for row in data.images(np.arange(data.count))}
    assert {row.tobytes() for row in exam.images} == trained
    twins = [row for row in exam.other_images if row.tobytes() in trained]
    assert len(twins) < 3, "scans that are alike to the pixel"


def write_photographs(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, colour in (("blue", 2), ("red", 0)):
            (folder / split / label).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 60, (20, 30, 3), dtype=np.uint8)
                pixels[..., colour] += 150
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")


def test_folders_of_files_are_read_by_number(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_photographs(tmp_path / "photographs")
    config = HubImagesConfig(
        dataset="imagefolder", folder=str(tmp_path / "photographs"), image_field="image",
        image_size=16, batch_size=4, exam=16,
    )  # fmt: skip
    data = HubImagesData(config, seed=0)
    assert data.names == ("blue", "red") and data.count == 12
    batch = data.batch(2)
    assert batch["images"].shape == (4, 3, 16, 16)
    exam = data.exam()
    brightest = exam.other_images.mean(axis=(2, 3)).argmax(axis=1)
    assert np.array_equal(brightest, np.where(exam.other_labels == 0, 2, 0))


def test_a_data_set_that_cannot_be_had_is_one_sentence(monkeypatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=r"uoft-cs/cifar10 has no part `train` .*small_images"):
        HubImagesData(HubImagesConfig(), seed=0)


def test_probes_find_what_is_there_and_nothing_where_there_is_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    centres = torch.randn(4, 8, generator=generator)
    z = centres[labels] * 3 + torch.randn(400, 8, generator=generator)
    known, asked, truth = z[:200], z[200:], labels[200:]
    assert accuracy(logistic_probe(known, labels[:200], 4)(asked), truth) > 0.95
    assert nearest_accuracy(known, labels[:200], asked, truth) > 0.9
    shuffled = labels[:200][torch.randperm(200, generator=generator)]
    assert accuracy(logistic_probe(known, shuffled, 4)(asked), truth) < 0.45
    assert nearest_accuracy(torch.ones(4, 3), torch.arange(4), torch.ones(9, 3), truth[:9]) < 0.5
