import json
import math

import numpy as np
import pytest
import torch
from skimage.metrics import (
    normalized_root_mse,
    peak_signal_noise_ratio,
    structural_similarity,
)

from applications.errors import InputError
from applications.files import write_json
from applications.mri.evaluation.metrics import Convention, Scores, mean_scores, score


def pair(shape=(2, 12, 10)):
    rng = np.random.default_rng(0)
    reference = rng.random(shape)
    return reference, np.abs(reference + 0.1 * rng.standard_normal(shape))


def ssim_by_hand(u, v, peak):
    """Wang et al. 2004, equation 13, with sample (co)variances over each full 7 x 7 window."""
    values = []
    for row in range(u.shape[0] - 6):
        for column in range(u.shape[1] - 6):
            a, b = (x[row : row + 7, column : column + 7].ravel() for x in (u, v))
            covariance = np.cov(a, b, ddof=1)
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            values.append(
                (2 * a.mean() * b.mean() + c1)
                * (2 * covariance[0, 1] + c2)
                / (a.mean() ** 2 + b.mean() ** 2 + c1)
                / (covariance[0, 0] + covariance[1, 1] + c2)
            )
    return np.mean(values)


def test_the_scores_are_those_of_the_formulas():
    u, v = pair()
    u[1] *= 0.3  # the peak is that of the volume, not of the slice
    found = score(u, v)
    assert found.psnr == pytest.approx(
        10 * math.log10(u.max() ** 2 / np.mean((u - v) ** 2)), rel=1e-12
    )
    assert found.nmse == pytest.approx(
        np.linalg.norm(u - v) ** 2 / np.linalg.norm(u) ** 2, rel=1e-12
    )
    by_hand = np.mean([ssim_by_hand(a, b, u.max()) for a, b in zip(u, v, strict=True)])
    assert found.ssim == pytest.approx(by_hand, rel=1e-10)


def test_scores_of_slices_have_a_range_of_their_own():
    u, v = pair((3, 12, 10))
    u[1] *= 0.3
    found = score(u, v, Convention.SLICE)
    psnr, ssim, nmse = zip(
        *(
            (
                10 * math.log10(a.max() ** 2 / np.mean((a - b) ** 2)),
                ssim_by_hand(a, b, a.max()),
                np.linalg.norm(a - b) ** 2 / np.linalg.norm(a) ** 2,
            )
            for a, b in zip(u, v, strict=True)
        ),
        strict=True,
    )
    assert found.psnr == pytest.approx(np.mean(psnr), rel=1e-12)
    assert found.ssim == pytest.approx(np.mean(ssim), rel=1e-10)
    assert found.nmse == pytest.approx(np.mean(nmse), rel=1e-12)
    assert found.convention == "slice"
    assert abs(found.psnr - score(u, v).psnr) > 0.5  # conventions are not to be mixed
    assert score(u[:1], v[:1], Convention.SLICE).psnr == score(u[:1], v[:1]).psnr


def test_scores_are_those_of_scikit_image():
    u, v = pair((3, 20, 18))
    u[1] *= 0.3
    volume, slices = score(u, v), score(u, v, Convention.SLICE)
    assert volume.psnr == pytest.approx(peak_signal_noise_ratio(u, v, data_range=u.max()))
    expected = [
        peak_signal_noise_ratio(a, b, data_range=a.max()) for a, b in zip(u, v, strict=True)
    ]
    assert slices.psnr == pytest.approx(np.mean(expected))
    for found, ranges in ((volume, [u.max()] * 3), (slices, [a.max() for a in u])):
        expected = [
            structural_similarity(a, b, data_range=r) for a, b, r in zip(u, v, ranges, strict=True)
        ]
        assert found.ssim == pytest.approx(np.mean(expected))
    # scikit-image takes the root, normalised by the Euclidean norm.
    assert volume.nmse == pytest.approx(normalized_root_mse(u, v) ** 2)
    expected = [normalized_root_mse(a, b) ** 2 for a, b in zip(u, v, strict=True)]
    assert slices.nmse == pytest.approx(np.mean(expected))


def test_json_has_null_for_the_psnr_of_a_perfect_image_and_no_nan(tmp_path):
    u, _ = pair()
    path = tmp_path / "scores.json"
    write_json(path, {"scores": [vars(score(u, u)), vars(score(u, u, Convention.SLICE))]})

    def refuse(word):
        pytest.fail(f"{word} is no JSON")

    first, second = json.loads(path.read_text(), parse_constant=refuse)["scores"]
    assert (first["psnr"], first["nmse"], first["convention"]) == (None, 0.0, "fastmri")
    assert (second["psnr"], second["nmse"], second["convention"]) == (None, 0.0, "slice")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"psnr": math.nan})
    assert path.read_bytes() == before


def test_tensors_and_arrays_score_the_same_and_the_unit_does_not_matter():
    u, v = pair()
    assert score(torch.from_numpy(u), torch.from_numpy(v)) == score(u, v)
    scaled = score(1e-5 * u, 1e-5 * v)
    expected = score(u, v)
    assert scaled.psnr == pytest.approx(expected.psnr, rel=1e-9)
    assert scaled.ssim == pytest.approx(expected.ssim, rel=1e-9)
    assert scaled.nmse == pytest.approx(expected.nmse, rel=1e-9)


def test_a_perfect_image_has_infinite_psnr():
    u, _ = pair()
    found = score(u, u)
    assert (found.psnr, found.nmse) == (math.inf, 0.0)
    assert found.ssim == pytest.approx(1.0)


def test_scores_are_averaged_one_by_one_and_print_as_a_line():
    found = mean_scores([Scores(30.0, 0.8, 0.02), Scores(34.0, 0.9, 0.01)])
    assert found.psnr == 32.0
    assert found.ssim == pytest.approx(0.85)
    assert found.nmse == pytest.approx(0.015)
    assert str(found) == "PSNR 32.00 dB, SSIM 0.8500, NMSE 0.0150 (fastmri)"
    with pytest.raises(InputError, match="at least one volume"):
        mean_scores([])
    mixed = [Scores(30.0, 0.8, 0.02), Scores(34.0, 0.9, 0.01, Convention.SLICE)]
    with pytest.raises(InputError, match="of one convention, got fastmri, slice; score again"):
        mean_scores(mixed)


def test_an_empty_slice_has_no_score_by_slices_and_is_named():
    u, v = pair((3, 12, 10))
    u[1] = 0
    assert score(u, v).psnr > 0
    with pytest.raises(InputError, match="positive maximum, got 0, slice 1; leave it out"):
        score(u, v, Convention.SLICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, v: (u, v[:, :-1]), r"must have the shape \(2, 12, 10\) .* got \(2, 11, 10\)"),
        (lambda u, v: (u, np.where(v == v.max(), np.nan, v)), "reconstruction must be finite"),
        (lambda u, v: (np.where(u == u.max(), np.inf, u), v), "reference must be finite"),
        (lambda u, v: (0 * u, v), "reference must have a positive maximum, got 0"),
        (lambda u, v: (u[0], v[0]), r"must have shape \(slices, rows, columns\)"),
        (lambda u, v: (u[:, :6], v[:, :6]), r"at least 7, got \(2, 6, 10\)"),
        (lambda u, v: (u, v.astype(complex)), "reconstruction must be real"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        score(*change(*pair()))


def test_the_score_over_the_object_leaves_air_out():
    u = np.full((1, 16, 16), 0.02)
    u[:, 4:12, 4:12] = 1.0
    v = u.copy()
    v[:, 4:12, 4:12] += 0.1
    v[:, :4] += 0.5
    found = score(u, v)
    assert found.object_psnr == pytest.approx(20)
    assert found.psnr == pytest.approx(-10 * np.log10((64 * 0.01 + 64 * 0.25) / 256))
    both = mean_scores([found, score(u, u + 0.01)])
    assert both.object_psnr == pytest.approx(30)
    assert mean_scores([found, Scores(30.0, 0.8, 0.02)]).object_psnr is None
