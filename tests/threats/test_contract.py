"""What every threat model promises to any attack, whatever the attack does with it."""

import pytest
import torch

from onmanifold.foundation.errors import InputError
from onmanifold.threats import ImageBall, JointBall, LatentBall, TransformationBall

COUNT = 9


def around(threat, batch, dtype=torch.float64):
    images, labels, codes, _ = batch
    return threat.around(images.to(dtype), labels, None if codes is None else codes.to(dtype))


def far_away(region, scale=50.0):
    generator = torch.Generator().manual_seed(0)
    return {
        name: scale * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in region.zero().items()
    }


def assert_inside(region, variables, tolerance):
    images = region.render(variables)
    assert images.min() >= -tolerance
    assert images.max() <= 1 + tolerance
    for name, size in region.size(variables).items():
        assert (size <= region.balls[name].radius * (1 + tolerance) + tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_variables_are_the_image_itself(threat_name, threat, batch, dtype):
    if threat_name in ("fog", "snow"):
        pytest.skip("the centre of what is drawn is even fog and even snow")
    good = batch(COUNT)
    region = around(threat, good, dtype)
    rendered = region.render(region.zero())
    assert rendered.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(rendered, good.images.to(dtype), rtol=0, atol=tolerance)
    assert all((size == 0).all() for size in region.size(region.zero()).values())


@pytest.mark.parametrize("start", ["zero", "uniform", "distance"])
def test_radius_0_leaves_only_the_image(make_threat, batch, start):
    good = batch(COUNT)
    region = around(make_threat(0.0), good)
    for variables in (region.random(start, 0, good.indices), region.project(far_away(region))):
        torch.testing.assert_close(region.render(variables), good.images, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [0.5, 20.0])
def test_random_and_projected_points_are_inside(make_threat, batch, dtype, factor):
    good = batch(COUNT)
    region = around(make_threat(factor), good, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for start in ("uniform", "distance"):
        variables = region.random(start, 0, good.indices)
        assert all(tensor.dtype == dtype for tensor in variables.values())
        assert_inside(region, variables, tolerance)
        again = region.project(variables)
        for name, tensor in variables.items():
            torch.testing.assert_close(again[name], tensor, rtol=0, atol=tolerance)
    assert_inside(region, region.project(far_away(region)), tolerance)


def test_a_projected_far_point_is_on_the_border(make_threat, batch):
    # Small radii, so that no box is in the way.
    region = around(make_threat(1e-3), batch(COUNT))
    moved = {name: tensor.abs() for name, tensor in far_away(region).items()}
    projected = region.project(moved)
    for name, size in region.size(projected).items():
        if name != "image":  # a pixel at 1 cannot go up
            torch.testing.assert_close(size, region.balls[name].radius)


@pytest.mark.parametrize("start", ["uniform", "distance"])
def test_starts_depend_on_seed_and_index_alone(threat, batch, start):
    good = batch(COUNT)
    everything = around(threat, good).random(start, 3, good.indices, restart=1)
    rows = torch.tensor([4, 1, 7])
    few = around(threat, type(good)(*(part if part is None else part[rows] for part in good)))
    some = few.random(start, 3, good.indices[rows], restart=1)
    narrow = around(threat, good, torch.float32).random(start, 3, good.indices, restart=1)
    other_seed = around(threat, good).random(start, 4, good.indices, restart=1)
    other_restart = around(threat, good).random(start, 3, good.indices, restart=2)
    for name, tensor in everything.items():
        torch.testing.assert_close(some[name], tensor[rows], rtol=0, atol=1e-14)
        torch.testing.assert_close(narrow[name].double(), tensor, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(other_seed[name], tensor, atol=1e-4)
        assert not torch.allclose(other_restart[name], tensor, atol=1e-4)


def test_kept_samples_see_the_same_region(threat, batch):
    good = batch(COUNT)
    region = around(threat, good)
    variables = region.random("uniform", 0, good.indices)
    mask = torch.arange(COUNT) % 3 == 1
    kept = region.keep(mask)
    few = {name: tensor[mask] for name, tensor in variables.items()}
    expected = region.render(variables)[mask]
    torch.testing.assert_close(kept.render(few), expected, rtol=0, atol=1e-14)
    far = far_away(region)
    projected = kept.project({name: tensor[mask] for name, tensor in far.items()})
    for name, tensor in region.project(far).items():
        torch.testing.assert_close(projected[name], tensor[mask], rtol=0, atol=1e-14)
    twice = kept.keep(torch.tensor([False, True, False]))
    last = {name: tensor[1:2] for name, tensor in few.items()}
    torch.testing.assert_close(twice.render(last), expected[1:2], rtol=0, atol=1e-14)


def test_a_samples_image_does_not_depend_on_its_batch(threat, batch):
    good = batch(64)
    region = around(threat, good)
    variables = region.random("uniform", 0, good.indices)
    together = region.render(variables)
    for row in (0, 31, 63):
        mask = torch.arange(64) == row
        alone = region.keep(mask).render({n: t[mask] for n, t in variables.items()})
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-14)


def test_gradients_through_render(threat, batch):
    good = batch(2)
    region = around(threat, good)
    variables = region.random("uniform", 1, good.indices)
    names = list(variables)

    def render(*tensors):
        return region.render(dict(zip(names, tensors, strict=True)))

    # Away from 0 and 1, where a joint perturbation is clipped, and from the image itself, where bilinear
    # interpolation has its corners.
    leaves = [(0.9 * variables[name]).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(render, leaves, eps=1e-7, atol=1e-5)


def test_ascending_raises_a_linear_function_the_most(threat, batch):
    good = batch(COUNT)
    region = around(threat, good)
    zero = region.zero()
    gradients = far_away(region, scale=1.0)
    steps = {name: 1e-4 * (1 + place) for place, name in enumerate(zero)}
    moved = region.ascend(zero, gradients, steps)
    for name, ball in region.balls.items():
        gain = (moved[name] * gradients[name]).flatten(1).sum(1)
        dual = {"linf": 1, "l2": 2, "l1": float("inf")}[ball.norm]
        most = steps[name] * torch.linalg.vector_norm(gradients[name].flatten(1), dual, dim=1)
        if ball.norm == "l1" and name == "image":
            most = gain  # pixels at 0 and 1 have no room; see test_geometry
        torch.testing.assert_close(gain, most)
        assert (gain > 0).all()


def test_one_radius_per_sample(make_threat, batch):
    shares = torch.linspace(0, 1, COUNT, dtype=torch.float64)
    good = batch(COUNT)
    together = around(make_threat(shares), good)
    far = far_away(together)
    projected = together.project(far)
    for row in range(COUNT):
        part = slice(row, row + 1)
        one = type(good)(*(field if field is None else field[part] for field in good))
        alone = around(make_threat(shares[row].item()), one)
        point = alone.project({name: tensor[part] for name, tensor in far.items()})
        for name, tensor in point.items():
            torch.testing.assert_close(tensor[0], projected[name][row], rtol=0, atol=1e-12)
    few = type(good)(*(field if field is None else field[:4] for field in good))
    with pytest.raises(InputError, match=r"radius: found 9 values for 4 samples"):
        around(make_threat(shares), few)


def test_codes_are_the_encoders_where_none_are_given(plane, images):
    good = images(5, on_manifold=True)
    threat = LatentBall(plane, "linf", 0.3)
    region = threat.around(good.images, good.labels)
    torch.testing.assert_close(region.chart.latents, good.codes, rtol=0, atol=1e-12)
    variables = region.random("uniform", 0, good.indices)
    given = threat.around(good.images, good.labels, good.codes)
    torch.testing.assert_close(
        region.render(variables), given.render(variables), rtol=0, atol=1e-12
    )
    expected = plane.decode(good.codes + variables["latent"])
    torch.testing.assert_close(given.render(variables), expected, rtol=0, atol=1e-14)


def test_latents_stay_in_the_box(plane, images):
    good = images(20, on_manifold=True)
    for box, limit in (("manifold", 1.0), (0.9, 0.9), (None, None)):
        region = LatentBall(plane, "linf", 5.0, box=box).around(
            good.images, good.labels, good.codes
        )
        latents = good.codes + region.project(far_away(region))["latent"]
        far = latents.abs().max().item()
        assert far == pytest.approx(limit) if limit else far > 4


def test_a_code_outside_the_box_may_stay_but_not_go_further(plane, images):
    good = images(4, on_manifold=True)
    codes = good.codes.clone()
    codes[0, 0] = 1.5
    region = LatentBall(plane, "linf", 0.7).around(good.images, good.labels, codes)
    assert (region.project(region.zero())["latent"] == 0).all()
    up, down = (torch.full_like(codes, value) for value in (9.0, -9.0))
    assert region.project({"latent": up})["latent"][0, 0] == 0
    torch.testing.assert_close(
        region.project({"latent": down})["latent"][0, 0], torch.tensor(-0.7).double()
    )


def test_only_the_chosen_levels_move(plane, images):
    good = images(6, on_manifold=True)
    region = LatentBall(plane, "linf", 0.2, levels=(2, 0)).around(
        good.images, good.labels, good.codes
    )
    variables = region.random("uniform", 0, good.indices)
    assert variables["latent"].shape == (6, 3)
    moved = plane.encode(region.render(variables), good.labels) - good.codes
    columns = [0, 1, 5]
    torch.testing.assert_close(moved[:, columns], variables["latent"], rtol=0, atol=1e-12)
    assert moved[:, 2:5].abs().max() < 1e-12


def test_without_the_residual_attacks_start_from_the_reconstruction(squashed, images):
    good = images(6)
    codes = squashed.encode(good.images, good.labels)
    reconstruction = squashed.decode(codes)
    assert (reconstruction - good.images).abs().amax() > 0.3
    region = LatentBall(squashed, "l2", 0.5).around(good.images, good.labels, codes)
    torch.testing.assert_close(region.render(region.zero()), reconstruction, rtol=0, atol=1e-14)


def test_the_residual_is_added_and_clipped(squashed, images):
    good = images(6)
    codes = squashed.encode(good.images, good.labels)
    region = LatentBall(squashed, "l2", 0.5, keep_residual=True).around(good.images, good.labels)
    variables = region.random("uniform", 0, good.indices)
    moved = codes.clone()
    moved[:, :6] += variables["latent"]
    expected = squashed.decode(moved) + good.images - squashed.decode(codes)
    assert expected.max() > 1  # so that the clipping is seen
    torch.testing.assert_close(region.render(variables), expected.clamp(0, 1), rtol=0, atol=1e-12)


def test_a_joint_perturbation_is_both_at_once(plane, images):
    good = images(6, on_manifold=True)
    threat = JointBall(ImageBall("linf", 0.9), LatentBall(plane, "l2", 0.4))
    region = threat.around(good.images, good.labels, good.codes)
    variables = region.random("uniform", 0, good.indices)
    assert set(variables) == {"image", "latent"}
    expected = plane.decode(good.codes + variables["latent"]) + variables["image"]
    assert expected.max() > 1
    torch.testing.assert_close(region.render(variables), expected.clamp(0, 1), rtol=0, atol=1e-12)


def spot(row, column):
    image = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    image[0, 0, row, column] = 1
    return image


@pytest.mark.parametrize(
    ("place", "units", "fields", "found"),
    [
        # Half the width of 9 pixels is 4: a translation of 0.25 looks one pixel further.
        (0, 1.0, {"translation": 0.25}, (4, 3)),
        (1, 1.0, {"translation": 0.25}, (3, 4)),
        (0, -0.5, {"translation": 0.5}, (4, 5)),
        (5, 1.0, {"rotation": torch.pi / 2}, (4, 4)),
    ],
)
def test_transformations_move_a_spot(place, units, fields, found):
    threat = TransformationBall(radius=1.0, **fields)
    image = spot(4, 4)
    region = threat.around(image, torch.tensor([0]))
    variables = region.zero()
    variables["transformation"][0, place] = units
    moved = region.render(variables)
    torch.testing.assert_close(moved, spot(*found), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("place", "source", "target"),
    [
        # Disentangling eq. 6 maps the output's coordinates to the input's. At the output's right middle
        # (x, y) = (1, 0) a shear_y of 1 reads (1, 1); at its lower middle (0, 1) a shear_x of 1 reads (1, 1);
        # a quarter turn reads (0, 1) at (1, 0); a scale of 1/2 reads (1/2, 0) at (1, 0).
        (3, (8, 8), (4, 8)),
        (2, (8, 8), (8, 4)),
        (5, (8, 4), (4, 8)),
        (4, (4, 6), (4, 8)),
    ],
)
def test_shear_rotation_and_scale_have_the_papers_signs(place, source, target):
    units = -1.0 if place == 4 else 1.0
    threat = TransformationBall(radius=1.0, shear=1.0, rotation=torch.pi / 2, scale=0.5)
    region = threat.around(spot(*source), torch.tensor([0]))
    variables = region.zero()
    variables["transformation"][0, place] = units
    moved = region.render(variables)
    torch.testing.assert_close(moved[0, 0][target], torch.tensor(1.0).double(), rtol=0, atol=1e-12)


def test_transformations_stay_in_their_half_ranges(images):
    good = images(5)
    for norm in ("linf", "l2", "l1"):
        region = TransformationBall(radius=9.0, norm=norm).around(good.images, good.labels)
        moved = region.project({"transformation": far_away(region)["transformation"]})
        assert moved["transformation"].abs().max() <= 1
