"""The linear model of Directions: each closed form against numbers, printed formulas and plain references.

Monte Carlo under a fixed seed is held to three standard errors. Property-based tests look at hundreds of
estimates of skewed losses, of which some are beyond three by chance; they are held to five.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from onmanifold.analysis.theory import (
    STRATEGIES,
    LinearModel,
    Setting,
    ascend,
    ascend_within,
    augmented_eigenvalues,
    compare,
    distribution_risk,
    distribution_risk_as_printed,
    expected_loss,
    fit_linear_model,
    gaussian_losses,
    image_risk_bounds,
    least_multiplier,
    line_saddle_on_average,
    line_saddle_within,
    linear_model,
    minimise_adversarial_loss,
    multiplier_of_radius,
    penalised_risk,
    perturbation_risk,
    random_spectrum,
    rank_risk,
    rank_risk_at_radius,
    risk_at_radius,
    saddle_eigenvalues,
    saddle_multiplier,
    saddle_ratio,
    saddle_residual,
    sample_source,
    sampled_distribution_risk,
    sampled_line_saddle_within,
    sampled_penalised_risk,
    sampled_perturbation_risk,
    sampled_risk_within,
    source_covariance,
    source_eigenvalues,
    stretch,
    train_adversarially,
    train_augmented,
    worst_perturbation,
    worst_within,
)
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.ppca import PPCA

SPECTRUM = (8.0, 4.0, 2.0, 1.0, 0.5, 0.12, 0.1, 0.08, 0.06, 0.04)
MODEL = linear_model(SPECTRUM, latent_size=5)
SOURCES = (*STRATEGIES, "data")


@st.composite
def models(draw, singular=True):
    """Two to six dimensions, any latent size, noise of maximum likelihood or less than the least latent's."""
    size = draw(st.integers(2, 6))
    logarithms = st.floats(np.log(0.05), np.log(5.0))
    spectrum = np.exp(draw(st.lists(logarithms, min_size=size, max_size=size)))
    spectrum = np.sort(spectrum)[::-1]
    latents = draw(st.integers(1, size))
    if singular and latents < size and draw(st.booleans()):
        return linear_model([*spectrum[:latents], *[0.0] * (size - latents)], latents, seed=3)
    share = draw(st.one_of(st.none(), st.floats(0.05, 0.9)))
    sigma = None if share is None else float(share * np.sqrt(spectrum[latents - 1]))
    return linear_model(spectrum, latents, sigma, draw(st.integers(0, 5)))


multipliers = st.floats(1.2, 30.0)


def in_eigenvectors(model, covariance):
    return model.basis.T @ covariance @ model.basis


# The model


@given(models(), st.sampled_from(STRATEGIES))
def test_strategies_have_the_printed_covariances(model, strategy):
    exact = in_eigenvectors(model, source_covariance(model, strategy))
    assert exact == pytest.approx(np.diag(source_eigenvalues(model, strategy)), abs=1e-6)


@given(models(singular=False))
def test_posterior_and_prior_samples_are_distributed_alike(model):
    top, noise = model.eigenvalues[: model.latent_size], model.noise_variance
    excess = top - noise
    printed = excess**2 / top + excess / top * noise + noise
    assert printed == pytest.approx(top)
    assert source_eigenvalues(model, "posterior") == pytest.approx(
        source_eigenvalues(model, "prior")
    )


@pytest.mark.parametrize("model", [MODEL, MODEL.flattened()], ids=["full", "rank q"])
@pytest.mark.parametrize("strategy", SOURCES)
def test_sampled_variances(model, strategy):
    squares = model.coordinates(sample_source(model, strategy, 20_000)) ** 2
    errors = squares.std(axis=0) / np.sqrt(len(squares))
    wanted = source_eigenvalues(model, strategy)
    assert (np.abs(squares.mean(axis=0) - wanted) <= 3 * errors + 1e-12).all()


def test_a_plane_leaves_the_strategies_alike():
    flat = MODEL.flattened()
    for strategy in STRATEGIES:
        assert source_eigenvalues(flat, strategy) == pytest.approx(flat.eigenvalues)
        assert distribution_risk(flat, strategy) == pytest.approx(0.0, abs=1e-12)


def test_a_sample_depends_on_its_number_alone():
    for source in SOURCES:
        many = sample_source(MODEL, source, 50, seed=4)
        assert np.array_equal(many[:7], sample_source(MODEL, source, 7, seed=4))


def test_the_encoder_is_that_of_the_manifold():
    """Strategy 1 is decode(encode(x)) of the library's own P-PCA."""
    small = linear_model([0.01, 0.004, 0.0005, 0.0003], latent_size=2)
    model = LinearModel(small.eigenvalues, 2, small.noise_variance, small.basis, np.full(4, 0.5))
    manifold = PPCA((1, 2, 2), num_classes=1, latent_size=2, conditional=False).double()
    manifold.mean[0] = torch.from_numpy(model.mean)
    manifold.basis[0] = torch.from_numpy(model.basis[:, :2].copy())
    manifold.eigenvalues[0] = torch.from_numpy(model.eigenvalues[:2].copy())
    manifold.noise_variance[0] = model.noise_variance
    images = torch.from_numpy(model.sample(20, seed=1)).view(-1, 1, 2, 2)
    labels = torch.zeros(20, dtype=torch.int64)
    found = manifold.decode(manifold.encode(images, labels)).flatten(1).numpy()
    assert found == pytest.approx(sample_source(model, "encode", 20, seed=1), abs=1e-9)


def test_loss_is_the_density_of_scipy():
    points = MODEL.sample(100)
    for model in (MODEL, MODEL.flattened()):
        points = model.sample(100)
        scipys = multivariate_normal(model.mean, model.covariance, allow_singular=True)
        found = gaussian_losses(points, model.mean, model.covariance)
        assert found == pytest.approx(-scipys.logpdf(points))
    mean = expected_loss(MODEL.covariance, MODEL.covariance)
    assert mean == pytest.approx(
        multivariate_normal(MODEL.mean, MODEL.covariance).entropy(), abs=1e-9
    )


def test_loss_off_the_plane_is_infinite():
    flat = MODEL.flattened()
    points = flat.sample(3) + 0.1 * flat.basis[:, -1]
    assert np.isposinf(gaussian_losses(points, flat.mean, flat.covariance)).all()
    projected = gaussian_losses(points, flat.mean, flat.covariance, in_plane=True)
    assert projected == pytest.approx(gaussian_losses(flat.sample(3), flat.mean, flat.covariance))
    assert expected_loss(MODEL.covariance, flat.covariance) == np.inf


# The worst perturbation


@given(models(), multipliers, st.sampled_from(STRATEGIES))
@settings(max_examples=40, deadline=None)
def test_latent_perturbation_against_ascent(model, multiplier, strategy):
    points = sample_source(model, strategy, 5)
    closed = worst_perturbation(model, points, "latent", multiplier)
    assert closed == pytest.approx(ascend(model, points, "latent", multiplier), abs=1e-6)


@given(models(singular=False), multipliers)
@settings(max_examples=40, deadline=None)
def test_image_perturbation_against_ascent(model, scaled):
    multiplier = scaled / model.eigenvalues[-1]
    points = model.sample(5)
    closed = worst_perturbation(model, points, "image", multiplier)
    assert closed == pytest.approx(ascend(model, points, "image", multiplier), abs=1e-6)


def test_perturbation_is_as_printed():
    points, multiplier = MODEL.sample(4), 3.0
    weights, covariance = MODEL.generator, MODEL.covariance
    inverse = np.linalg.inv(multiplier * covariance - weights @ weights.T)
    printed = (points - MODEL.mean) @ (weights.T @ inverse).T
    assert worst_perturbation(MODEL, points, "latent", multiplier) == pytest.approx(printed)
    factors = stretch(MODEL, "latent", multiplier)[:5]
    top, noise = MODEL.eigenvalues[:5], MODEL.noise_variance
    assert factors == pytest.approx(1 + (top - noise) / ((multiplier - 1) * top + noise))
    image = stretch(MODEL, "image", 100.0)
    assert image == pytest.approx(1 + 1 / (100 * MODEL.eigenvalues - 1))


@pytest.mark.parametrize("space", ["latent", "image"])
@pytest.mark.parametrize("radius", [0.05, 0.5, 5.0])
def test_perturbation_of_a_radius(space, radius):
    points = MODEL.sample(20)
    found = worst_within(MODEL, points, space, radius)
    lengths = np.linalg.norm(found.perturbations, axis=1)
    assert lengths == pytest.approx(np.full(20, radius))
    assert (found.multipliers > least_multiplier(MODEL, space)).all()
    for point, wanted, multiplier in zip(points, *found, strict=True):
        again = worst_perturbation(MODEL, point[None], space, multiplier)[0]
        assert again == pytest.approx(wanted, abs=1e-7)
    ascended = ascend_within(MODEL, points, space, radius)
    assert found.perturbations == pytest.approx(ascended, abs=1e-6)


def test_perturbation_of_a_radius_beats_a_general_solver():
    model, radius = linear_model([2.0, 1.0, 0.3], 2, seed=5), 0.7
    precision = np.linalg.inv(model.covariance)
    for point in model.sample(5):
        wanted = worst_within(model, point[None], "image", radius).perturbations[0]

        def loss(moved, away=point - model.mean):
            return 0.5 * (away + moved) @ precision @ (away + moved)

        limit = {"type": "ineq", "fun": lambda moved: radius**2 - moved @ moved}
        starts = np.random.default_rng(0).normal(size=(6, 3))
        best = min(
            minimize(lambda moved: -loss(moved), start, constraints=limit).fun for start in starts
        )
        assert loss(wanted) == pytest.approx(-best, abs=1e-6)


@pytest.mark.parametrize("slope", [1e-5, 1e-12, 1e-17, 1e-200])
def test_perturbation_with_hardly_a_slope_in_the_most_curved_direction(slope):
    model = linear_model([2.0, 0.5], 1, seed=None)
    found = worst_within(model, np.array([[0.1, slope]]), "image", 1.0)
    assert np.linalg.norm(found.perturbations) == pytest.approx(1.0)
    assert found.perturbations[0, 1] > 0.99


def test_perturbation_without_slope_in_the_most_curved_direction():
    """The hard case: what is left of the radius goes there, and L is the curvature."""
    model = linear_model([2.0, 0.5], 1, seed=None)
    found = worst_within(model, np.array([[0.1, 0.0], [0.0, 0.0]]), "image", 1.0)
    assert found.multipliers == pytest.approx([2.0, 2.0])
    assert np.linalg.norm(found.perturbations, axis=1) == pytest.approx([1.0, 1.0])
    # Stationary along the first direction: 0.1 / 2 + moved / 2 = 2 moved.
    assert found.perturbations[0, 0] == pytest.approx(0.05 / 1.5)


@given(models(), st.floats(0.05, 3.0), st.sampled_from(STRATEGIES))
@settings(max_examples=60, deadline=None)
def test_one_multiplier_for_a_mean_square_radius(model, radius, source):
    assume((source_eigenvalues(model, source) * model.gains("latent")).max() > 1e-9)
    multiplier = multiplier_of_radius(model, "latent", radius, source)
    # The mean square of the printed perturbation, direction by direction.
    gains, variances = model.gains("latent"), source_eigenvalues(model, source)
    rooms = multiplier * model.eigenvalues - gains
    moving = gains > 0
    length = (gains[moving] * variances[moving] / rooms[moving] ** 2).sum()
    assert np.sqrt(length) == pytest.approx(radius, rel=1e-6)


def test_too_small_a_multiplier_has_no_maximum():
    assert least_multiplier(MODEL, "latent") == pytest.approx(1 - 0.08 / 8)
    assert least_multiplier(MODEL, "image") == pytest.approx(25.0)
    assert least_multiplier(MODEL.flattened(), "image") == np.inf
    assert perturbation_risk(MODEL, "latent", 0.9, "prior") == np.inf
    assert perturbation_risk(MODEL, "image", 20.0, "data") == np.inf
    with pytest.raises(InputError, match="no maximum"):
        worst_perturbation(MODEL, MODEL.sample(2), "image", 20.0)


# Excess risks


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", [MODEL, MODEL.flattened()], ids=["full", "rank q"])
def test_latent_risks_against_monte_carlo(model, strategy):
    for closed, sampled in (
        (perturbation_risk, sampled_perturbation_risk),
        (penalised_risk, sampled_penalised_risk),
    ):
        found = sampled(model, "latent", 4.0, strategy, 20_000, 0)
        assert abs(found.value - closed(model, "latent", 4.0, strategy)) <= 3 * found.standard_error
    found = sampled_distribution_risk(model, strategy, 20_000, 0)
    wanted = distribution_risk(model, strategy)
    assert abs(found.value - wanted) <= 3 * found.standard_error + 1e-9


def test_image_risk_against_monte_carlo():
    found = sampled_perturbation_risk(MODEL, "image", 100.0, "data", 20_000)
    wanted = perturbation_risk(MODEL, "image", 100.0, "data")
    assert abs(found.value - wanted) <= 3 * found.standard_error
    assert wanted == pytest.approx(0.5 * ((1 + 1 / (100 * MODEL.eigenvalues - 1)) ** 2 - 1).sum())


@given(models(), multipliers, st.sampled_from(STRATEGIES), st.integers(0, 100))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_risks_of_random_spectra(model, multiplier, strategy, seed):
    found = sampled_perturbation_risk(model, "latent", multiplier, strategy, 4000, seed)
    wanted = perturbation_risk(model, "latent", multiplier, strategy)
    assert abs(found.value - wanted) <= 5 * found.standard_error + 1e-9
    found = sampled_distribution_risk(model, strategy, 4000, seed)
    wanted = distribution_risk(model, strategy)
    assert abs(found.value - wanted) <= 5 * found.standard_error + 1e-9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_logarithm_of_theorem_2_is_too_much(strategy):
    """With either sign of the logarithm the printed form is many standard errors off."""
    found = sampled_distribution_risk(MODEL, strategy, 20_000)
    derived = distribution_risk(MODEL, strategy)
    logarithm = distribution_risk_as_printed(MODEL, strategy) - derived
    for printed in (derived + logarithm, derived - logarithm):
        assert abs(found.value - printed) > 6 * found.standard_error


def test_corollary_3_is_of_order_q_over_l():
    flat = MODEL.flattened()
    for strategy in STRATEGIES:
        exact = perturbation_risk(flat, "latent", 7.0, strategy)
        assert exact == pytest.approx(rank_risk(5, 7.0)) == pytest.approx(5 * 13 / 72)
    for multiplier in (1e2, 1e4, 1e6):
        risk = rank_risk(5, multiplier)
        assert risk * multiplier / 5 == pytest.approx(1.0, rel=2 / multiplier)
        # As printed, risk L² / q would stay bounded; it is L.
        assert risk * multiplier**2 / 5 > 0.99 * multiplier
    other = linear_model([1.0, 0.9, 0.03, 0.02, 0.01, *[0.0] * 5], 5)
    shape = perturbation_risk(other, "latent", 7.0, "prior")
    assert shape == pytest.approx(rank_risk(5, 7.0))


def test_risk_of_rank_q_by_radius():
    flat, radius = MODEL.flattened(), 0.5
    on_average = risk_at_radius(flat, "latent", radius, "prior")
    assert on_average == pytest.approx(np.sqrt(5) * radius + radius**2 / 2)
    found = sampled_risk_within(flat, "latent", radius, "prior", 5000)
    each = rank_risk_at_radius(5, radius)
    assert abs(found.value - each) <= 3 * found.standard_error
    assert each < on_average
    assert risk_at_radius(MODEL, "image", 0.0, "data") == 0.0


@given(models(singular=False), multipliers)
def test_bounds_of_theorem_4(model, scaled):
    multiplier = scaled / model.eigenvalues[-1]
    risk = perturbation_risk(model, "image", multiplier, "data")
    bounds = image_risk_bounds(model, multiplier)
    assert bounds.low * (1 - 1e-9) <= risk <= bounds.high * (1 + 1e-9)
    assert 1 / scaled <= bounds.low <= (1 / scaled) / (1 - 1 / scaled) ** 2


def test_singular_data_are_infinitely_vulnerable_in_image_space():
    flat = MODEL.flattened()
    assert perturbation_risk(flat, "image", 1e9, "data") == np.inf
    assert penalised_risk(flat, "image", 1e9, "data") == np.inf
    assert risk_at_radius(flat, "image", 1e-6, "data") == np.inf
    assert multiplier_of_radius(flat, "image", 0.1, "data") == np.inf
    assert sampled_risk_within(flat, "image", 1e-3, "data", 10).value == np.inf
    assert sampled_perturbation_risk(flat, "image", 1e9, "data", 10).value == np.inf
    assert image_risk_bounds(flat, 5.0).low == np.inf
    assert np.isfinite(perturbation_risk(flat, "latent", 2.0, "prior"))
    # Data in a plane and a generator with noise: its samples leave the plane.
    noisy = linear_model([2.0, 1.0, 0.0], 2, sigma=0.1)
    assert distribution_risk(noisy, "prior") == np.inf
    assert sampled_distribution_risk(noisy, "prior", 10).value == np.inf
    assert np.isfinite(distribution_risk(noisy, "encode"))
    found = sampled_perturbation_risk(noisy, "latent", 3.0, "prior", 5000)
    wanted = perturbation_risk(noisy, "latent", 3.0, "prior")
    assert abs(found.value - wanted) <= 3 * found.standard_error


def test_risk_vanishes_with_the_multiplier():
    for strategy in STRATEGIES:
        assert perturbation_risk(MODEL, "latent", 1e12, strategy) == pytest.approx(0, abs=1e-10)
    assert perturbation_risk(MODEL, "image", 1e14, "data") == pytest.approx(0, abs=1e-10)


# Saddle points


@given(models(), st.floats(0.2, 30.0), st.sampled_from(STRATEGIES))
def test_latent_saddle_is_as_printed_and_consistent(model, multiplier, strategy):
    changed, gains = source_eigenvalues(model, strategy), model.gains("latent")
    found = saddle_eigenvalues(model, "latent", multiplier, strategy)
    apart = changed > 1e-12
    s, w = changed[apart], gains[apart]
    root = np.sqrt(1 + 4 * w / (multiplier * s))
    assert found[apart] == pytest.approx((2 * s + 4 * w / multiplier + 2 * s * root) / 4)
    residual = saddle_residual(model, "latent", multiplier, strategy, found)
    assert residual[apart] / found[apart] == pytest.approx(0 * s, abs=1e-6)
    assert found[~model.leading] == pytest.approx(changed[~model.leading])


@given(models(), st.floats(0.2, 300.0))
def test_image_saddle_is_as_printed_and_consistent(model, multiplier):
    found = saddle_eigenvalues(model, "image", multiplier, "data")
    values = model.eigenvalues
    printed = values / 2 + 1 / multiplier + np.sqrt(values / multiplier + values**2 / 4)
    assert found == pytest.approx(printed)
    residual = saddle_residual(model, "image", multiplier, "data", found)
    assert residual / found == pytest.approx(np.zeros(len(found)), abs=1e-6)


@given(models(), st.floats(0.5, 30.0), st.sampled_from(STRATEGIES))
@settings(max_examples=25, deadline=None)
def test_latent_training_ends_at_the_saddle(model, multiplier, strategy):
    # A latent that hardly moves anything beside much noise settles too slowly to wait for.
    gains = model.gains("latent")[: model.latent_size]
    assume((gains > 0.05 * model.eigenvalues[: model.latent_size]).all())
    closed = saddle_eigenvalues(model, "latent", multiplier, strategy)
    trained = train_adversarially(model, "latent", multiplier, strategy).covariance
    assert in_eigenvectors(model, trained) == pytest.approx(np.diag(closed), abs=1e-6)
    searched = minimise_adversarial_loss(model, "latent", multiplier, strategy)
    assert searched == pytest.approx(closed, rel=1e-6, abs=1e-9)


@given(models(), st.floats(2.0, 300.0))
@settings(max_examples=25, deadline=None)
def test_image_training_ends_at_the_saddle(model, multiplier):
    closed = saddle_eigenvalues(model, "image", multiplier, "data")
    trained = train_adversarially(model, "image", multiplier, "data").covariance
    assert in_eigenvectors(model, trained) == pytest.approx(np.diag(closed), abs=1e-6)
    searched = minimise_adversarial_loss(model, "image", multiplier, "data")
    assert searched == pytest.approx(closed, rel=1e-6, abs=1e-9)


@given(st.integers(0, 10_000), st.sampled_from(STRATEGIES), st.floats(1.5, 20.0))
@settings(max_examples=30, deadline=None)
def test_neither_side_of_the_game_gains_by_moving(seed, strategy, multiplier):
    model = linear_model([3.0, 1.0, 0.4, 0.2], 4, sigma=0.3, seed=1)
    draws = np.random.default_rng(seed)
    values = saddle_eigenvalues(model, "latent", multiplier, strategy)
    covariance = (model.basis * values) @ model.basis.T
    weights, points = model.generator, source_covariance(model, strategy)
    answer = weights.T @ np.linalg.inv(multiplier * covariance - weights @ weights.T)

    def worth(against, matrix):
        moved = np.eye(4) + weights @ matrix
        penalty = multiplier / 2 * np.trace(matrix @ points @ matrix.T)
        return expected_loss(moved @ points @ moved.T, against) - penalty

    value = worth(covariance, answer)
    assert worth(covariance, answer + 0.1 * draws.normal(size=(4, 4))) <= value + 1e-9
    factor = np.eye(4) + 0.1 * draws.normal(size=(4, 4))
    assert worth(factor @ covariance @ factor.T, answer) >= value - 1e-9


def test_rank_q_grows_by_one_number():
    assert saddle_ratio(4.0) == pytest.approx(1.4571, abs=5e-5)
    assert saddle_ratio(4.0) == pytest.approx(0.5 + 0.25 + np.sqrt(0.5))
    flat = MODEL.flattened()
    for strategy in STRATEGIES:
        found = saddle_eigenvalues(flat, "latent", 4.0, strategy)
        assert found == pytest.approx(1.4571067811865 * flat.eigenvalues)
    equal = linear_model([2.0] * 3 + [0.0] * 2, 3)
    assert saddle_eigenvalues(equal, "latent", 4.0, "encode") == pytest.approx(
        [2.9142135623731] * 3 + [0.0] * 2
    )


def test_saddles_at_the_ends_of_the_multiplier():
    for strategy in STRATEGIES:
        found = saddle_eigenvalues(MODEL, "latent", 1e12, strategy)
        assert found == pytest.approx(source_eigenvalues(MODEL, strategy), rel=1e-5)
    assert saddle_eigenvalues(MODEL, "image", 1e14, "data") == pytest.approx(
        MODEL.eigenvalues, rel=1e-5
    )
    # Image training lifts a plane's missing directions to 1 / L; latent training leaves them.
    flat = MODEL.flattened()
    assert saddle_eigenvalues(flat, "image", 50.0, "data")[5:] == pytest.approx([0.02] * 5)
    assert (saddle_eigenvalues(flat, "latent", 4.0, "prior")[5:] == 0).all()


def test_what_training_makes_larger():
    latent = saddle_eigenvalues(MODEL, "latent", 4.0, "prior") / source_eigenvalues(MODEL, "prior")
    image = saddle_eigenvalues(MODEL, "image", 100.0, "data") / MODEL.eigenvalues
    assert (np.diff(latent[:5]) < 0).all()
    assert latent[5:] == pytest.approx(np.ones(5))
    assert (np.diff(image) > 0).all()


@pytest.mark.parametrize(("space", "source"), [("latent", "prior"), ("image", "data")])
@pytest.mark.parametrize("radius", [0.01, 0.5, 20.0])
def test_multiplier_of_a_radius_at_the_saddle(space, source, radius):
    multiplier = saddle_multiplier(MODEL, space, radius, source)
    values = saddle_eigenvalues(MODEL, space, multiplier, source)
    gains, variances = MODEL.gains(space), source_eigenvalues(MODEL, source)
    rooms = multiplier * values - gains
    length = (gains * variances / rooms**2).sum()
    assert np.sqrt(length) == pytest.approx(radius, rel=1e-6)


def test_theorem_6_solves_the_modified_problem_not_equation_4():
    variance, radius = 2.0, 0.5
    line = linear_model([variance], 1, seed=None)
    multiplier = saddle_multiplier(line, "image", radius, "data")
    found = saddle_eigenvalues(line, "image", multiplier, "data")[0]
    assert (
        found
        == pytest.approx(line_saddle_on_average(variance, radius))
        == pytest.approx((np.sqrt(variance) + radius) ** 2)
    )
    sampled = sampled_line_saddle_within(variance, radius, 40_000)
    assert abs(sampled.value - line_saddle_within(variance, radius)) <= 3 * sampled.standard_error
    assert abs(sampled.value - found) > 6 * sampled.standard_error


# Finite samples


def test_fit_is_maximum_likelihood():
    points = MODEL.sample(40, seed=2)
    fitted = fit_linear_model(points, 3)
    assert fitted.covariance == pytest.approx(np.cov(points.T, bias=True))
    assert fitted.mean == pytest.approx(points.mean(0))
    assert fitted.noise_variance == pytest.approx(fitted.eigenvalues[3:].mean())
    few = fit_linear_model(points[:4], 3)
    assert few.rank == 3
    assert few.noise_variance == 0


@pytest.mark.parametrize("generated", [0, 40, 5000])
def test_training_with_generated_data(generated):
    points = MODEL.sample(60, seed=3)
    fitted = fit_linear_model(points, 5)
    wanted = augmented_eigenvalues(fitted, 60, generated)
    found = train_augmented(points, fitted, generated)
    assert found.mean == pytest.approx(fitted.mean, abs=1e-6)
    assert in_eigenvectors(fitted, found.covariance) == pytest.approx(np.diag(wanted), abs=1e-6)
    assert wanted.sum() == pytest.approx(fitted.eigenvalues.sum())


def test_finite_samples_under_latent_training():
    points = MODEL.sample(60, seed=3)
    fitted = fit_linear_model(points, 5)
    shift = MODEL.mean - fitted.mean
    new = MODEL.covariance + np.outer(shift, shift)
    for strategy in STRATEGIES:
        closed = np.diag(saddle_eigenvalues(fitted, "latent", 4.0, strategy))
        trained = train_adversarially(fitted, "latent", 4.0, strategy).covariance
        assert in_eigenvectors(fitted, trained) == pytest.approx(closed, abs=1e-6)
        # Encoding new points instead: the theorem needs strategy 3, which encodes none.
        encoded = source_covariance(fitted, strategy, new)
        trained = train_adversarially(fitted, "latent", 4.0, strategy, encoded).covariance
        off = np.abs(in_eigenvectors(fitted, trained) - closed).max()
        assert off < 1e-6 if strategy == "prior" else off > 0.1


# The table


def test_comparison_confirms_all_but_what_is_listed():
    table = compare(Setting(MODEL))
    wrong = table[~table.agrees]
    new = wrong.quantity.str.contains("new points")
    assert set(zip(wrong[~new].theorem, wrong[~new]["form"], strict=True)) == {
        ("Theorem 2", "printed"),
        ("Corollary 3", "printed"),
        ("Theorem 4", "printed"),
        ("Theorem 6", "printed"),
    }
    assert new.sum() == 4
    right = table[table.agrees]
    sampled = right["standard error"] > 0
    assert (right.difference.abs() <= 3 * right["standard error"])[sampled].all()
    exact = right[~sampled & ~right.quantity.str.contains("falls")]
    finite = exact[np.isfinite(exact["closed form"])]
    assert len(finite) > 30
    assert (finite.difference.abs() <= 1e-6 * finite["closed form"].abs().clip(lower=1)).all()


@pytest.mark.parametrize(
    ("spectrum", "latents", "sigma"),
    [
        ([4.0, 2.0, 1.0, 0.0, 0.0], 3, None),
        ([4.0, 2.0, 1.0, 0.0, 0.0], 2, None),
        ([3.0, 0.0, 0.0], 2, None),
        ([1.0, 1.0, 1.0], 3, None),
        ([2.0], 1, None),
        ([3.0, 1.0, 0.5, 0.2], 2, 0.0),
    ],
)
def test_comparison_of_singular_and_other_edges(spectrum, latents, sigma):
    table = compare(Setting(linear_model(spectrum, latents, sigma), samples=2000))
    assert not table.difference.isna().any()
    kept = (table["form"] != "printed") & ~table.quantity.str.contains("new points")
    assert table[kept].agrees.all()


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear_model([1.0, -1.0], 1), "eigenvalues"),
        (lambda: linear_model([0.0, 0.0], 1), "first above 0"),
        (lambda: linear_model([1.0, 0.5], 3), "latent_size: expected from 1 to 2, found 3"),
        (lambda: linear_model([1.0, 0.5], 2, sigma=0.9), "noise_variance: expected from 0 to 0.5"),
        (
            lambda: LinearModel(np.ones(2), 1, 0.5, np.ones((2, 2)), np.zeros(2)),
            "orthogonal",
        ),
        (lambda: MODEL.sample(0), "count"),
        (lambda: saddle_eigenvalues(MODEL, "image", 0.0, "data"), "multiplier"),
        (lambda: worst_within(MODEL, MODEL.sample(1), "image", -1.0), "radius"),
        (lambda: fit_linear_model(np.ones(3), 1), "points"),
    ],
)
def test_wrong_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_random_spectrum_is_within_its_range():
    spectrum = random_spectrum(3, dimensions=50)
    assert list(spectrum) == sorted(spectrum, reverse=True)
    assert 0.05 <= spectrum[-1] < 0.2
    assert 2.0 < spectrum[0] <= 5.0
    assert spectrum != random_spectrum(4, dimensions=50)
