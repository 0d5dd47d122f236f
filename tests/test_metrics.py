"""The metrics equal scikit-learn's and a plainly written PRO on every kind of map, and merge without loss."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline.metrics import LocalizationMetrics

COARSE = st.sampled_from([-2.0, -0.5, -0.0, 0.0, 0.25, 1.0, 3.0])  # few values: many ties, both zeros
FINE = st.floats(width=16, allow_nan=False, allow_infinity=False)  # all of float16, subnormals too


@st.composite
def batches(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)))
    maps = draw(hnp.arrays(np.float16, shape, elements=draw(st.sampled_from([COARSE, FINE]))))
    masks = draw(hnp.arrays(np.bool_, shape))
    masks[draw(st.integers(0, shape[0])) :] = False  # the tail of the batch is free of defects
    return maps, masks


def measured(maps, masks, scores=None, fpr_limit=0.3):
    metrics = LocalizationMetrics(fpr_limit)
    metrics.update(maps, masks, scores)
    return metrics


def plain_regions(mask):
    """Lists of (row, column), one per 8-connected region, by flood fill."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        region, queue = [], [left.pop()]
        while queue:
            y, x = queue.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            queue += near
        regions.append(region)
    return regions


def plain_pro_curve(maps, masks):
    regions = [(i, region) for i, mask in enumerate(masks) for region in plain_regions(mask)]
    fpr, pro = [0.0], [0.0]
    for threshold in sorted(set(maps.astype(float).ravel().tolist()), reverse=True):
        hit = maps >= threshold
        fpr.append(hit[~masks].sum() / (~masks).sum())
        pro.append(np.mean([np.mean([hit[i, y, x] for y, x in region]) for i, region in regions]))
    return fpr, pro


def plain_pro(maps, masks, limit):
    fpr, pro = plain_pro_curve(maps, masks)
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr[:-1], fpr[1:], pro[:-1], pro[1:], strict=True):
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
        elif x0 < limit:
            y_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            area += (limit - x0) * (y0 + y_limit) / 2
    return area / limit


def of_both_kinds(flags):
    """The flags, the first one turned where all are alike, of which nothing can be measured: to draw anew would take too long."""
    flags = flags.copy()
    if flags.all() or not flags.any():
        flags.flat[0] = not flags.flat[0]
    return flags


def assert_same(left, right, tolerance):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name] == pytest.approx(right[name], abs=tolerance, nan_ok=True), name


def some_batch(images=6, size=24, seed=0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((images, size, size), dtype=bool)
    masks[0, 2:9, 3:7] = masks[1, 10:20, 1:4] = masks[1, 2, 20] = masks[3, :5, :] = True
    return (rng.standard_normal(masks.shape) + 1.2 * masks).astype(np.float16), masks


def test_hand_computed_example():
    maps = np.array([[[0.9, 0.8, 0.1, 0.5], [0.7, 0.3, 0.2, 0.1]]])
    masks = np.array([[[1, 0, 0, 1], [1, 0, 0, 0]]])
    metrics = measured(maps, masks)
    values = metrics.compute()
    assert values["pixel_auroc"] == pytest.approx((5 + 4 + 4) / 15)  # normal pixels that each defect pixel beats
    assert values["pixel_ap"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    # Mean coverage is 1/4 until FPR 0.2 (the 0.8), there it rises to 1.
    assert values["pro_0.30"] == pytest.approx((0.2 * 0.25 + 0.1 * 1.0) / 0.3)
    assert (values["images"], values["regions"]) == (1, 2)
    curves = metrics.curves()
    assert curves["fpr"] == pytest.approx([0, 0, 0.2, 0.2, 0.2, 0.4, 0.6, 1.0])
    assert curves["tpr"] == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 1, 1, 1, 1])
    assert curves["pro"] == pytest.approx([0, 1 / 4, 1 / 4, 1 / 2, 1, 1, 1, 1])


@settings(max_examples=100, deadline=None)
@given(batch=batches(), limit=st.integers(1, 100).map(lambda percent: percent / 100))
@example(batch=(np.zeros((2, 3, 3), np.float16), np.eye(3, dtype=bool)[None].repeat(2, 0)), limit=0.3)  # constant
@example(batch=(-np.arange(18, dtype=np.float16).reshape(2, 3, 3), np.arange(18).reshape(2, 3, 3) == 4), limit=1.0)
def test_pixel_metrics_equal_the_references(batch, limit):
    maps, masks = batch[0], of_both_kinds(batch[1])
    assume(masks.size > 1)
    values = measured(maps, masks, fpr_limit=limit).compute()
    truth, scores = masks.ravel(), maps.astype(float).ravel()
    assert values["pixel_auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    assert values["pixel_ap"] == pytest.approx(average_precision_score(truth, scores), abs=1e-9)
    assert values[f"pro_{limit:.2f}"] == pytest.approx(plain_pro(maps, masks, limit), abs=1e-9)
    assert values["regions"] == sum(len(plain_regions(mask)) for mask in masks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-1.5, 0.0, 0.1, 0.1 + 1e-12, 7.0]), st.booleans()), min_size=2, max_size=20))
def test_image_metrics_equal_the_reference_at_float64(rows):
    scores, anomalous = (np.array(column) for column in zip(*rows, strict=True))
    anomalous = of_both_kinds(anomalous)
    masks = np.zeros((len(rows), 2, 2), dtype=np.uint8)
    masks[anomalous, 0, 1] = 1
    values = measured(np.zeros(masks.shape, np.float32), masks, scores).compute()
    assert values["image_auroc"] == pytest.approx(roc_auc_score(anomalous, scores), abs=1e-9)
    assert values["image_ap"] == pytest.approx(average_precision_score(anomalous, scores), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_image_scores_default_to_the_maximum_of_each_map(batch):
    maps, masks = batch
    assert_same(measured(maps, masks).compute(), measured(maps, masks, maps.max(axis=(1, 2))).compute(), 0)


@settings(max_examples=60, deadline=None)
@given(batch=batches(), data=st.data())
def test_merging_any_partition_equals_the_whole(batch, data):
    maps, masks = batch
    owner = data.draw(hnp.arrays(np.int64, len(maps), elements=st.integers(0, 2)))
    merged = LocalizationMetrics()
    for part in range(3):  # some parts are empty
        merged.merge(measured(maps[owner == part], masks[owner == part]))
    whole = measured(maps, masks)
    assert_same(merged.compute(), whole.compute(), 1e-12)
    assert merged.reasons() == whole.reasons()


def test_a_batch_of_many_chunks_equals_its_images_one_by_one():
    maps, masks = some_batch(images=20, size=192)
    maps, masks = maps[::-1], masks[::-1]  # the defects come last
    single = LocalizationMetrics()
    for image in range(len(maps)):
        single.update(maps[image : image + 1], masks[image : image + 1])
    values = measured(maps, masks).compute()
    assert_same(single.compute(), values, 1e-12)
    assert values["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.astype(float).ravel()), abs=1e-9)


def test_images_of_different_sizes_share_one_result():
    small, small_mask = np.array([[[3.0, 1.0]]]), np.array([[[True, False]]])
    large, large_mask = np.array([[[2.0, 0.0], [5.0, 4.0]]]), np.array([[[False, False], [True, False]]])
    metrics = measured(small, small_mask)
    metrics.update(large, large_mask)
    assert metrics.compute()["pixel_auroc"] == pytest.approx((3 + 4) / 8)  # 3 beats all but the 4
    assert metrics.compute()["regions"] == 2


def test_diagonal_pixels_are_one_region_but_images_are_never_joined():
    diagonal = np.eye(4, dtype=bool)
    assert measured(np.zeros((2, 4, 4), np.float16), np.stack([diagonal, diagonal])).compute()["regions"] == 2


def test_a_large_region_does_not_hide_a_small_one():
    masks = np.zeros((1, 10, 10), dtype=bool)
    masks[0, :5] = masks[0, 9, 9] = True
    maps = np.where(masks, 1.0, np.linspace(0.1, 0.5, 100).reshape(1, 10, 10))
    maps[0, 9, 9] = 0.0  # the single-pixel region is missed entirely
    values = measured(maps, masks).compute()
    assert values["pro_0.30"] == pytest.approx(0.5)
    assert values["pixel_auroc"] == pytest.approx(50 / 51)


@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f2", ">f4"])
def test_wider_and_foreign_floats_are_compared_at_float16(dtype):
    maps, masks = some_batch()
    jitter = maps.astype(np.float64) * (1 + 1e-5)  # less than half a float16 step (2^-12 relative)
    given_maps = (maps if dtype == ">f2" else jitter).astype(dtype)
    assert measured(given_maps, masks).compute() == measured(maps, masks).compute()


def test_strided_views_count_like_copies():
    maps, masks = some_batch()
    turned, turned_masks = maps.transpose(0, 2, 1)[:, ::2], masks.transpose(0, 2, 1)[:, ::2]
    assert measured(turned, turned_masks).compute() == measured(turned.copy(), turned_masks.copy()).compute()


def test_perfect_maps_reach_exactly_one():
    _, masks = some_batch()
    values = measured(masks + np.linspace(0, 0.5, masks.size).reshape(masks.shape), masks).compute()
    assert values == dict.fromkeys(list(values)[:5], 1.0) | {"images": 6, "regions": 4}


def test_full_pro_of_single_pixel_regions_is_the_auroc():
    maps = np.random.default_rng(1).standard_normal((3, 20, 20)).astype(np.float16)
    masks = np.zeros(maps.shape, dtype=bool)
    masks[:, ::4, ::4] = True
    values = measured(maps, masks, fpr_limit=1.0).compute()
    assert values["pro_1.00"] == pytest.approx(values["pixel_auroc"], abs=1e-12)


@pytest.mark.parametrize(
    ("mask", "pixel_reason", "image_reason"),
    [
        (np.zeros((2, 2, 2)), "no mask has a defect pixel", "no image is anomalous"),
        (np.ones((2, 2, 2)), "no mask has a normal pixel", "no image is normal"),
        (np.eye(2)[None].repeat(2, 0), None, "no image is normal"),
    ],
)
def test_undefined_metrics_are_nan_with_a_reason(mask, pixel_reason, image_reason):
    metrics = measured(np.arange(8.0).reshape(2, 2, 2), mask.astype(np.uint8))
    values, reasons = metrics.compute(), metrics.reasons()
    assert {name for name in values if math.isnan(values[name])} == reasons.keys()
    assert reasons["image_auroc"] == reasons["image_ap"] == image_reason
    for name in ("pixel_auroc", "pixel_ap", "pro_0.30"):
        assert reasons.get(name) == pixel_reason
    assert (metrics.curves()["fpr"].size == 0) == (pixel_reason is not None)


def test_defined_metrics_need_no_reason():
    metrics = measured(*some_batch())
    assert metrics.reasons() == {}
    names = ["pixel_auroc", "pixel_ap", "pro_0.30", "image_auroc", "image_ap", "images", "regions"]
    assert list(metrics.compute()) == names


def test_no_image_at_all_is_an_error():
    metrics = measured(np.zeros((0, 4, 4)), np.zeros((0, 4, 4), dtype=bool))
    for result in (metrics.compute, metrics.reasons, metrics.curves):
        with pytest.raises(ValueError, match="no image was added"):
            result()


def test_curves_are_points_of_the_exact_curves():
    maps, masks = some_batch()
    curves = measured(maps, masks).curves(points=50)
    fpr, pro = plain_pro_curve(maps, masks)
    exact = {(round(x, 9), round(y, 9)) for x, y in zip(fpr, pro, strict=True)}
    points = list(zip(curves["fpr"], curves["pro"], strict=True))
    assert 40 <= len(points) <= 50
    assert {(round(x, 9), round(y, 9)) for x, y in points} <= exact
    for name in ("fpr", "tpr", "pro"):
        assert curves[name][[0, -1]] == pytest.approx([0, 1])
        assert (np.diff(curves[name]) >= 0).all()
        assert curves[name].dtype == np.float64
    area = np.dot(np.diff(curves["fpr"]), curves["tpr"][1:] + curves["tpr"][:-1]) / 2
    assert area == pytest.approx(measured(maps, masks).compute()["pixel_auroc"], abs=0.01)


def test_two_points_are_the_ends_and_fewer_are_refused():
    metrics = measured(*some_batch())
    assert [list(metrics.curves(2)[name]) for name in ("fpr", "tpr")] == [[0, 1], [0, 1]]
    with pytest.raises(ValueError, match="points is 1"):
        metrics.curves(1)


def test_a_copy_from_read_only_shared_memory_still_updates_and_merges():
    maps, masks = some_batch()
    buffers: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(measured(maps[:2], masks[:2]), protocol=5, buffer_callback=buffers.append)
    copy = pickle.loads(packed, buffers=[bytes(buffer.raw()) for buffer in buffers])
    copy.update(maps[2:4], masks[2:4])
    copy.merge(measured(maps[4:], masks[4:]))
    assert_same(copy.compute(), measured(maps, masks).compute(), 1e-12)


def test_size_does_not_grow_with_the_pixels():
    maps, masks = some_batch()
    metrics = measured(maps, masks)
    before = len(pickle.dumps(metrics))
    for _ in range(20):
        metrics.update(maps, masks)
    assert len(pickle.dumps(metrics)) - before < 20 * len(maps) * 10  # a score and a label per image
    assert before < 2e6


def test_merge_of_different_limits_is_refused():
    with pytest.raises(ValueError, match=r"cannot merge fpr_limit 0\.1 into 0\.3"):
        LocalizationMetrics(0.3).merge(LocalizationMetrics(0.1))


@pytest.mark.parametrize("limit", [0, -0.1, 1.01, 0.305, float("nan"), float("inf")])
def test_limits_out_of_range_or_not_whole_hundredths_are_refused(limit):
    with pytest.raises(ValueError, match="fpr_limit is"):
        LocalizationMetrics(limit)


MAPS, MASKS = np.zeros((2, 3, 3), dtype=np.float32), np.zeros((2, 3, 3), dtype=bool)


def with_last(array, value):
    changed = array.copy()
    changed[-1, -1, -1] = value
    return changed


@pytest.mark.parametrize(
    ("maps", "masks", "scores", "message"),
    [
        (MAPS[0], MASKS[0], None, r"maps have shape \(3, 3\)"),
        (MAPS[:, :0], MASKS[:, :0], None, r"maps have shape \(2, 0, 3\)"),
        (MAPS.astype(np.uint8), MASKS, None, "maps have dtype uint8"),
        (with_last(MAPS, np.nan), MASKS, None, "NaN in 1 pixels"),
        (with_last(MAPS.astype(np.float16), -np.nan), MASKS, None, "NaN in 1 pixels"),
        (with_last(MAPS, 65520), MASKS, None, "beyond the float16 range"),
        (with_last(MAPS.astype(np.float64), -1e300), MASKS, None, "beyond the float16 range"),
        (with_last(MAPS.astype(np.float16), np.inf), MASKS, None, "beyond the float16 range"),
        (MAPS, MASKS[:1], None, r"masks have shape \(1, 3, 3\) but maps \(2, 3, 3\)"),
        (MAPS, MASKS.astype(np.float32), None, "masks have dtype float32"),
        (MAPS, with_last(MASKS.astype(np.uint8), 255), None, "masks hold values from 0 to 255"),
        (MAPS, with_last(MASKS.astype(np.int8), -1), None, "masks hold values from -1 to 0"),
        (MAPS, MASKS, [1.0], r"scores have shape \(1,\)"),
        (MAPS, MASKS, [1.0, np.nan], "score of image 1 of the batch is not finite"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(maps, masks, scores, message):
    metrics = measured(*some_batch())
    before = pickle.dumps(metrics)
    with pytest.raises(ValueError, match=message):
        metrics.update(maps, masks, scores)
    assert pickle.dumps(metrics) == before


def test_the_largest_float16_is_accepted_with_its_rounding():
    maps = np.array([[[65519.0, 65504.0, -65519.0, -65504.0]]], dtype=np.float32)
    masks = np.array([[[True, False, False, True]]])
    assert measured(maps, masks).compute()["pixel_auroc"] == pytest.approx((0.5 + 1 + 0 + 0.5) / 4)
