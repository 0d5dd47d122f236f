"""The embedded data set and the implanted defects: exact masks, separate crops, the same bytes every time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pipeline.errors import UserError
from pipeline.storage import Location
from pipeline.textures import DEFECTS, TEXTURES, implant, photograph, strips, write_dataset


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.png")}


def awkward_images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    half = np.zeros((48, 64, 3), np.uint8)
    half[:, 32:] = 255
    return {
        "brick": photograph("brick")[:128, :128],
        "grass, smallest": photograph("grass")[:32, :32],
        "gravel, upright": photograph("gravel")[:97, :33],
        "black": np.zeros((33, 70, 3), np.uint8),
        "white": np.full((64, 32, 3), 255, np.uint8),
        "grey": np.full((64, 64, 3), 128, np.uint8),
        "black and white": half,
        "colour noise": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
    }


@pytest.mark.parametrize("kind", DEFECTS)
def test_small_defects_lie_anywhere_and_change_the_image_inside_their_mask_only(kind: str) -> None:
    image, rng = photograph("brick")[:256, :320], np.random.default_rng(2)
    masks, whole = [], []
    for number in range(16):
        defective, mask = implant(image, kind, rng, size=0.2)
        assert np.array_equal(defective[~mask], image[~mask])
        assert np.count_nonzero(np.abs(defective.astype(int) - image).max(axis=2) >= 12) >= 10
        masks.append(mask)
        if number % 3 == 0:
            whole.append(implant(image, kind, rng)[1].sum())
    areas = np.array([mask.sum() for mask in masks])
    assert areas.min() > 0
    assert np.median(areas) < np.median(whole) / 6
    centres = np.array([np.argwhere(mask).mean(0) for mask in masks])
    assert {tuple(centre > [128, 160]) for centre in centres} == {(a, b) for a in (False, True) for b in (False, True)}


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_changes_the_image_inside_its_mask_only(kind: str) -> None:
    rng = np.random.default_rng(1)
    for name, image in awkward_images().items():
        for foreign in (None, image):
            before = image.copy()
            result, mask = implant(image, kind, rng, foreign_hwc_u8=foreign)
            change = np.abs(result.astype(int) - image).max(axis=2)
            where = f"{kind} on {name}"
            assert np.array_equal(image, before), where
            assert result.shape == image.shape, where
            assert result.dtype == np.uint8, where
            assert mask.shape == image.shape[:2], where
            assert mask.dtype == bool, where
            assert not change[~mask].any(), where
            assert np.count_nonzero(change[mask] >= 12) >= 10, where
            assert change[mask].mean() >= 12, where
            assert mask.mean() < 0.5, where


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_mask_holds_no_ground_without_a_change_nearby(kind: str) -> None:
    rng = np.random.default_rng(2)
    for name in TEXTURES:
        for _ in range(4):
            result, mask = implant(photograph(name)[100:228, 200:328], kind, rng)
            changed = (result != photograph(name)[100:228, 200:328]).any(axis=2)
            # Gaps of a few pixels, where old and new happen to agree, belong to the defect; no more.
            distance = ndimage.distance_transform_edt(~changed)
            assert np.percentile(distance[mask], 99) <= 3
            assert (changed & mask).sum() >= 0.75 * mask.sum()


def test_sizes_follow_the_image() -> None:
    def median_areas(side: int) -> dict[str, float]:
        rng, image = np.random.default_rng(4), photograph("brick")[:side, :side]
        return {kind: float(np.median([implant(image, kind, rng)[1].mean() for _ in range(7)])) for kind in DEFECTS}

    small, large = median_areas(64), median_areas(160)
    for kind in DEFECTS:
        assert 0.25 < small[kind] / large[kind] < 4, kind
    assert small["scratch"] < small["stain"]
    assert small["spot"] < small["stain"]


def test_grey_stays_grey_and_colour_may_be_tinted() -> None:
    rng = np.random.default_rng(5)
    colour = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in DEFECTS:
        result, _ = implant(photograph("grass")[:64, :64], kind, rng, foreign_hwc_u8=colour)
        assert (result == result[..., :1]).all(), kind
    base = np.broadcast_to(np.array([60, 110, 160], np.uint8), (64, 64, 3)).copy()
    stained, mask = implant(base, "stain", rng)
    shift = (stained.astype(int) - base)[mask].mean(axis=0)
    assert np.ptp(shift) > 1


@pytest.mark.parametrize("kind", DEFECTS)
def test_implanting_repeats_with_the_generator(kind: str) -> None:
    image = photograph("gravel")[:64, :80]
    first, first_mask = implant(image, kind, np.random.default_rng(6))
    again, again_mask = implant(image, kind, np.random.default_rng(6))
    other, _ = implant(image, kind, np.random.default_rng(7))
    assert np.array_equal(first, again)
    assert np.array_equal(first_mask, again_mask)
    assert not np.array_equal(first, other)


def test_a_foreign_texture_of_another_size_is_pasted() -> None:
    rng = np.random.default_rng(8)
    for shape in [(10, 200, 3), (300, 40, 3), (64, 64, 3)]:
        foreign = np.full(shape, 250, np.uint8)
        result, mask = implant(np.full((64, 64, 3), 100, np.uint8), "foreign_patch", rng, foreign_hwc_u8=foreign)
        assert result[mask].max() == 250


def test_implant_refuses_what_it_cannot_mark() -> None:
    rng = np.random.default_rng(9)
    image = photograph("brick")[:64, :64]
    with pytest.raises(ValueError, match="choose one of scratch"):
        implant(image, "crack", rng)
    for wrong in (image[:31], image[..., 0], image.astype(np.float32)):
        with pytest.raises(ValueError, match="expected"):
            implant(wrong, "spot", rng)


def test_photographs_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_: object, **__: object) -> None:
        raise AssertionError("a photograph was looked for on the network")

    monkeypatch.setattr("socket.socket", no_socket)
    photographs = [photograph(name) for name in TEXTURES]
    assert all(photo.shape == (512, 512, 3) for photo in photographs)
    assert all(photo.std() > 20 for photo in photographs)
    assert photograph("brick", min_side=640).shape == (640, 640, 3)


@pytest.mark.parametrize("image_size", [32, 128, 170, 171, 256])
def test_training_and_test_strips_share_no_pixel(image_size: int) -> None:
    # Numbered columns instead of a photograph: what each strip holds can be read off.
    columns = np.broadcast_to(np.arange(512), (512, 512))
    train, test = strips(np.stack([columns] * 3, axis=-1), image_size)
    train_columns = set(np.concatenate([strip.ravel() for strip in train]).tolist())
    assert train_columns.isdisjoint(test.ravel().tolist())
    assert all(strip.shape[1] >= image_size for strip in [*train, test])


def test_the_data_set_is_complete_and_its_crops_come_from_their_strips(tmp_path: Path) -> None:
    root = Location.parse(tmp_path / "data")
    write_dataset(root, textures=("brick",), image_size=64, train_images=5, test_normal=3, test_defective=8)
    files = tree(tmp_path / "data")
    expected = [f"brick/train/good/{i:03d}.png" for i in range(5)]
    expected += [f"brick/test/good/{i:03d}.png" for i in range(3)]
    kinds = ("scratch", "spot", "stain", "missing_texture", "foreign_patch")
    for kind, count in zip(kinds, [2, 2, 2, 1, 1], strict=True):
        expected += [f"brick/test/{kind}/{i:03d}.png" for i in range(count)]
        expected += [f"brick/ground_truth/{kind}/{i:03d}_mask.png" for i in range(count)]
    assert sorted(files) == sorted(expected)

    def is_cut_from(crop: np.ndarray, strip: np.ndarray) -> bool:
        windows = np.lib.stride_tricks.sliding_window_view(strip[..., 0], (64, 64))
        tops, lefts = np.nonzero(windows[:, :, 0, 0] == crop[0, 0, 0])
        return any(np.array_equal(windows[top, left], crop[..., 0]) for top, left in zip(tops, lefts, strict=True))

    train, test = strips(photograph("brick"), 64)
    for i in range(5):
        crop = read(tmp_path / f"data/brick/train/good/{i:03d}.png")
        assert crop.shape == (64, 64, 3)
        assert any(is_cut_from(crop, strip) for strip in train)
        assert not is_cut_from(crop, test)
    for i in range(3):
        assert is_cut_from(read(tmp_path / f"data/brick/test/good/{i:03d}.png"), test)
    for kind in kinds:
        mask = read(tmp_path / f"data/brick/ground_truth/{kind}/000_mask.png")
        assert mask.shape == (64, 64)
        assert set(np.unique(mask)) == {0, 255}


def test_the_data_set_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    def write(folder: str, textures: tuple[str, ...], seed: int = 0) -> dict[str, bytes]:
        root = Location.parse(tmp_path / folder)
        write_dataset(
            root,
            textures=textures,
            image_size=48,
            train_images=3,
            test_normal=2,
            test_defective=6,
            seed=seed,
        )
        return tree(tmp_path / folder)

    both, again = write("a", ("brick", "grass")), write("b", ("brick", "grass"))
    assert both == again
    alone = write("c", ("grass",))
    assert alone == {name: data for name, data in both.items() if name.startswith("grass/")}
    other = write("d", ("grass",), seed=1)
    assert other.keys() == alone.keys()
    assert all(other[name] != alone[name] for name in other)


def test_large_images_come_from_an_enlarged_photograph(tmp_path: Path) -> None:
    write_dataset(
        Location.parse(tmp_path),
        textures=("gravel",),
        image_size=300,
        train_images=1,
        test_normal=1,
        test_defective=1,
    )
    assert read(tmp_path / "gravel/train/good/000.png").shape == (300, 300, 3)
    assert read(tmp_path / "gravel/test/scratch/000.png").shape == (300, 300, 3)


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    root = Location.parse(tmp_path)
    with pytest.raises(UserError, match="marble given; choose from brick, grass, gravel"):
        write_dataset(root, textures=("brick", "marble"))
    with pytest.raises(UserError, match="nothing given"):
        write_dataset(root, textures=())
    with pytest.raises(UserError, match="at least 32 px"):
        write_dataset(root, image_size=16)
    assert not tree(tmp_path)
