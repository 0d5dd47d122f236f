"""Every published layout, from small trees of real files, and each mistake a user makes with them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from moto.server import ThreadedMotoServer

from pipeline.datasets import Layout, categories, detect_layout, labelled_records, records, training_records
from pipeline.errors import UserError
from pipeline.storage import Location

MVTEC = [
    "bottle/train/good/001.png",
    "bottle/train/good/000.png",
    "bottle/test/good/000.png",
    "bottle/test/crack/000.png",
    "bottle/test/crack/001.png",
    "bottle/ground_truth/crack/000_mask.png",
    "bottle/ground_truth/crack/001_mask.png",
    "bottle/readme.txt",
    "grid/train/good/000.png",
    "grid/test/good/000.png",
    "grid/test/bent/000.png",
    "grid/ground_truth/bent/000_mask.png",
]
BTAD = [
    "01/train/ok/0000.bmp",
    "01/test/ok/0010.bmp",
    "01/test/ko/0011.bmp",
    "01/ground_truth/ko/0011.png",
    "03/train/ok/0001.bmp",
    "03/test/ok/0012.bmp",
    "03/test/ko/0013.bmp",
    "03/ground_truth/ko/0013.bmp",
]
DTD = [
    "Blotchy_099/train/good/000.png",
    "Blotchy_099/test/good/000.png",
    "Blotchy_099/test/bad/000.png",
    "Blotchy_099/ground_truth/bad/000_mask.png",
]
VISA_TABLE = """object,split,label,image,mask
candle,train,normal,candle/Data/Images/Normal/0836.JPG,
candle,test,normal,candle/Data/Images/Normal/0007.JPG,
candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png
pcb1,train,normal,pcb1/Data/Images/Normal/0001.JPG,
"""


def grow(root: Path, paths: list[str]) -> Location:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return Location.parse(root)


def visa(root: Path, table: str = VISA_TABLE) -> Location:
    (root / "split_csv").mkdir(parents=True)
    (root / "split_csv/1cls.csv").write_text(table, encoding="utf-8-sig")
    return Location.parse(root)


def told(root: Location, layout: Layout, category: str) -> list[tuple[str, str, str, str | None]]:
    """(split, defect, image, mask) of each record, paths from the root."""
    return [
        (r.split, r.defect, r.image.relative_to(root), r.mask.relative_to(root) if r.mask else None)
        for r in records(root, layout, category)
    ]


def mistake(call: object, *arguments: object) -> str:
    assert callable(call)
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the layouts --------------------------------------------------------------------------------


def test_mvtec(tmp_path: Path) -> None:
    root = grow(tmp_path, MVTEC)
    assert detect_layout(root) == "mvtec"
    assert categories(root, "mvtec") == ["bottle", "grid"]
    assert told(root, "mvtec", "bottle") == [
        ("train", "good", "bottle/train/good/000.png", None),
        ("train", "good", "bottle/train/good/001.png", None),
        ("test", "crack", "bottle/test/crack/000.png", "bottle/ground_truth/crack/000_mask.png"),
        ("test", "crack", "bottle/test/crack/001.png", "bottle/ground_truth/crack/001_mask.png"),
        ("test", "good", "bottle/test/good/000.png", None),
    ]
    assert {r.category for r in records(root, "mvtec", "grid")} == {"grid"}
    assert [r.is_normal for r in labelled_records(root, "mvtec", "bottle")] == [False, False, True]


def test_btad(tmp_path: Path) -> None:
    root = grow(tmp_path, BTAD)
    assert detect_layout(root) == "btad"
    assert categories(root, "btad") == ["01", "03"]
    assert told(root, "btad", "01") == [
        ("train", "good", "01/train/ok/0000.bmp", None),
        ("test", "ko", "01/test/ko/0011.bmp", "01/ground_truth/ko/0011.png"),
        ("test", "good", "01/test/ok/0010.bmp", None),
    ]
    assert labelled_records(root, "btad", "03")[0].mask == root / "03/ground_truth/ko/0013.bmp"


def test_dtd_synthetic(tmp_path: Path) -> None:
    root = grow(tmp_path, DTD)
    assert detect_layout(root) == "dtd"
    assert categories(root, "dtd") == ["Blotchy_099"]
    assert told(root, "dtd", "Blotchy_099")[1:] == [
        ("test", "bad", "Blotchy_099/test/bad/000.png", "Blotchy_099/ground_truth/bad/000_mask.png"),
        ("test", "good", "Blotchy_099/test/good/000.png", None),
    ]


def test_visa(tmp_path: Path) -> None:
    root = visa(tmp_path)
    assert detect_layout(root) == "visa"
    assert categories(root, "visa") == ["candle", "pcb1"]
    assert told(root, "visa", "candle") == [
        ("train", "good", "candle/Data/Images/Normal/0836.JPG", None),
        ("test", "anomaly", "candle/Data/Images/Anomaly/000.JPG", "candle/Data/Masks/Anomaly/000.png"),
        ("test", "good", "candle/Data/Images/Normal/0007.JPG", None),
    ]


def test_folder_of_normal_images_only(tmp_path: Path) -> None:
    root = grow(tmp_path, ["screw/b.JPG", "screw/a.tif", "screw/notes.txt", "nut/c.webp"])
    assert detect_layout(root) == "folder"
    assert categories(root, "folder") == ["nut", "screw"]
    assert told(root, "folder", "screw") == [
        ("train", "good", "screw/a.tif", None),
        ("train", "good", "screw/b.JPG", None),
    ]
    assert len(training_records(root, "folder", "nut")) == 1


def test_folder_with_splits(tmp_path: Path) -> None:
    root = grow(
        tmp_path,
        [
            "screw/overview.png",
            "screw/train/a.png",
            "screw/train/camera 2/b.png",
            "screw/test/good/c.png",
            "screw/test/bent/d.png",
            "screw/test/bent/e.png",
            "screw/ground_truth/bent/d.bmp",
        ],
    )
    assert detect_layout(root) == "folder"
    assert told(root, "folder", "screw") == [
        ("train", "good", "screw/train/a.png", None),
        ("train", "good", "screw/train/camera 2/b.png", None),
        ("test", "bent", "screw/test/bent/d.png", "screw/ground_truth/bent/d.bmp"),
        ("test", "bent", "screw/test/bent/e.png", None),
        ("test", "good", "screw/test/good/c.png", None),
    ]


@pytest.mark.parametrize(
    ("layout", "paths"),
    [
        ("mvtec", ["train/good/0.png", "test/bent/0.png", "ground_truth/bent/0_mask.png"]),
        ("folder", ["train/0.png", "test/bent/0.png", "ground_truth/bent/0_mask.png"]),
    ],
)
def test_a_root_that_is_one_category(tmp_path: Path, layout: Layout, paths: list[str]) -> None:
    root = grow(tmp_path / "line 7", paths)
    assert detect_layout(root) == layout
    assert categories(root, layout) == ["line 7"]
    (test,) = labelled_records(root, layout, "line 7")
    assert (test.category, test.mask) == ("line 7", root / "ground_truth/bent/0_mask.png")
    assert len(training_records(root, layout, "line 7")) == 1


def test_a_root_full_of_images_is_one_category(tmp_path: Path) -> None:
    root = grow(tmp_path / "nuts", ["0.png", "1.png"])
    assert detect_layout(root) == "folder"
    assert categories(root, "folder") == ["nuts"]
    assert len(training_records(root, "folder", "nuts")) == 2


def test_a_category_may_be_named_as_its_root(tmp_path: Path) -> None:
    root = grow(tmp_path / "bottle", ["bottle/train/good/0.png", "cap/train/good/0.png"])
    assert categories(root, "mvtec") == ["bottle", "cap"]
    assert [r.image for r in records(root, "mvtec", "bottle")] == [root / "bottle/train/good/0.png"]


# --- what lies about in real folders -------------------------------------------------------------


def test_what_is_no_image_is_ignored(tmp_path: Path) -> None:
    root = grow(tmp_path, MVTEC)
    expected = told(root, "mvtec", "grid")
    grow(
        tmp_path,
        [
            "grid/train/good/.DS_Store",
            "grid/train/good/._000.png",
            "grid/train/good/Thumbs.db",
            "grid/train/good/.cache/1.png",
            "grid/test/bent/000.json",
            "grid/previews/000.png",
            "grid/sample.png",
            ".git/train/good/0.png",
            "__MACOSX/train/good/0.png",
            "paper/figure.png",
        ],
    )
    assert told(root, "mvtec", "grid") == expected
    assert categories(root, "mvtec") == ["bottle", "grid"]
    assert detect_layout(root) == "mvtec"


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "webp", "PNG", "JpEg"])
def test_image_suffixes(tmp_path: Path, suffix: str) -> None:
    root = grow(tmp_path, [f"a/train/good/0.{suffix}", f"a/test/x/1.{suffix}", f"a/ground_truth/x/1_mask.{suffix}"])
    assert len(training_records(root, "mvtec", "a")) == 1
    assert labelled_records(root, "mvtec", "a")[0].mask is not None


def test_names_with_dots_and_spaces_find_their_own_mask(tmp_path: Path) -> None:
    root = grow(
        tmp_path,
        [
            "a/train/good/0.png",
            "a/test/x/part.1 ü.png",
            "a/test/x/part.2 ü.png",
            "a/test/y/part.1 ü.png",
            "a/ground_truth/x/part.1 ü_mask.png",
            "a/ground_truth/x/part.2 ü_mask.png",
            "a/ground_truth/y/part.1 ü_mask.png",
        ],
    )
    for record in labelled_records(root, "mvtec", "a"):
        assert record.mask is not None
        image_path = record.image.relative_to(root / "a/test")
        assert record.mask.relative_to(root / "a/ground_truth") == image_path.replace(".png", "_mask.png")


def test_defective_training_images_are_not_trained_on(tmp_path: Path) -> None:
    root = grow(tmp_path, ["a/train/good/0.png", "a/train/bad/1.png"])
    assert [r.defect for r in records(root, "mvtec", "a")] == ["bad", "good"]
    assert [r.image.name for r in training_records(root, "mvtec", "a")] == ["0.png"]


# --- mistakes ------------------------------------------------------------------------------------


def test_missing_root(tmp_path: Path) -> None:
    root = Location.parse(tmp_path / "mvtek")
    for message in (
        mistake(detect_layout, root),
        mistake(categories, root, "mvtec"),
        mistake(records, root, "visa", "candle"),
    ):
        assert f"dataset {root} does not exist" in message


def test_no_layout_fits(tmp_path: Path) -> None:
    root = grow(tmp_path, ["docs/readme.txt"])
    message = mistake(detect_layout, root)
    assert "mvtec, btad, visa, dtd, folder" in message
    assert "--layout" in message
    assert "--layout" in mistake(categories, root, "mvtec")


def test_unknown_category(tmp_path: Path) -> None:
    root = grow(tmp_path / "set", MVTEC)
    message = mistake(records, root, "mvtec", "botle")
    assert "it has: bottle, grid" in message
    assert "did you mean 'bottle'?" in message
    assert "did you mean" not in mistake(records, root, "mvtec", "zzz")
    assert "it has: bottle, grid" in mistake(records, root, "mvtec", "set")
    assert "it has: candle, pcb1" in mistake(records, visa(tmp_path / "visa"), "visa", "x")
    mistake(records, root, "mvtec", "../set/bottle")


def test_empty_training_folder(tmp_path: Path) -> None:
    root = grow(tmp_path, ["a/train/good/.keep", "a/test/good/0.png"])
    message = mistake(training_records, root, "mvtec", "a")
    assert "'a'" in message
    assert "train/good" in message
    assert "train/ok" in mistake(training_records, root, "btad", "a")


def test_defects_without_masks(tmp_path: Path) -> None:
    root = grow(tmp_path, [path for path in MVTEC if not path.startswith("bottle/ground_truth")])
    message = mistake(labelled_records, root, "mvtec", "bottle")
    assert message.startswith("2 defective test images of 'bottle' have no mask")
    assert str(root / "bottle/test/crack/000.png") in message
    assert "ground_truth/crack/000_mask.png" in message
    assert len(training_records(root, "mvtec", "bottle")) == 2


def test_no_test_images(tmp_path: Path) -> None:
    root = grow(tmp_path, ["a/0.png"])
    assert "no test images" in mistake(labelled_records, root, "folder", "a")


@pytest.mark.parametrize("layout", ["mvtec", "folder"])
def test_test_images_without_label(tmp_path: Path, layout: Layout) -> None:
    root = grow(tmp_path, ["a/train/good/0.png", "a/test/1.png"])
    message = mistake(records, root, layout, "a")
    assert str(root / "a/test/1.png") in message
    assert "test/good" in message


def test_broken_visa_tables(tmp_path: Path) -> None:
    assert "split_csv/1cls.csv" in mistake(categories, grow(tmp_path / "none", ["a/0.png"]), "visa")
    columns = visa(tmp_path / "columns", "object,split,image\n")
    assert "lacks the columns label, mask" in mistake(categories, columns, "visa")
    split = visa(tmp_path / "split", VISA_TABLE.replace("test", "val"))
    assert "'val'" in mistake(records, split, "visa", "candle")
    outside = visa(tmp_path / "outside", VISA_TABLE.replace("candle/Data", "../Data"))
    assert "../Data" in mistake(records, outside, "visa", "candle")
    bare = visa(tmp_path / "bare", VISA_TABLE.replace("candle/Data/Masks/Anomaly/000.png", ""))
    assert "mask column" in mistake(labelled_records, bare, "visa", "candle")


# --- object storage and real data ----------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    moto = ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield f"http://{host}:{port}"
    moto.stop()


def test_s3_gives_the_same_records_in_few_requests(
    server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    requests.put(f"{server}/photos", timeout=10).raise_for_status()
    root = Location.parse("s3://photos/mvtec")
    many = [*MVTEC, *(f"bottle/test/kind {n}/0.png" for n in range(30))]
    for path in many:
        (root / path).write_bytes(b"")
    assert detect_layout(root) == "mvtec"
    assert categories(root, "mvtec") == ["bottle", "grid"]
    caplog.clear()
    with caplog.at_level("INFO", logger="werkzeug"):
        on_s3 = told(root, "mvtec", "bottle")
    seen = [line for line in caplog.messages if "HTTP/1.1" in line]
    assert 1 <= len(seen) <= 4
    assert on_s3 == told(grow(tmp_path, many), "mvtec", "bottle")


@pytest.mark.skipif("DEFECTMAP_MVTEC_ROOT" not in os.environ, reason="DEFECTMAP_MVTEC_ROOT is not set")
def test_real_mvtec() -> None:
    root = Location.parse(os.environ["DEFECTMAP_MVTEC_ROOT"])
    assert detect_layout(root) == "mvtec"
    assert "bottle" in categories(root, "mvtec")
    assert len(training_records(root, "mvtec", "bottle")) == 209
    test = labelled_records(root, "mvtec", "bottle")
    assert Counter(r.defect for r in test) == {
        "good": 20,
        "broken_large": 20,
        "broken_small": 22,
        "contamination": 21,
    }
    masks = {r.mask for r in test if r.mask}
    assert len(masks) == 63
    assert all(mask.is_file() for mask in masks)
