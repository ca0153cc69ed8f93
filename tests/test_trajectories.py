"The one estimator of paths: exact on what is known, honest about chance, and not fooled by curves"

import numpy as np
import pytest
import torch
from scipy import stats

from rg_tickets.statistics import rejection_rate
from rg_tickets.trajectories import (
    dmd,
    local_exponents,
    log_ratios,
    log_slopes,
    run_slopes,
    shuffle_test,
    slope_weights,
    spectrum_distance,
    spectrum_of,
    trajectory_distance,
)

T8 = 0.25 * np.arange(8)


def power_laws(sigma=(0.3, 0.0, -0.5), runs=5, noise=0.03, seed=0):
    rng = np.random.default_rng(seed)
    z = np.array(sigma) * T8[:, None] + noise * rng.normal(size=(runs, 8, len(sigma)))
    return np.exp(z)


# Slopes


def test_a_line_is_scipys_line():
    x = power_laws()
    ours = run_slopes(x, T8)
    for r in range(5):
        for i in range(3):
            peer = stats.linregress(T8, np.log(x[r, :, i]))
            found = [ours[k][r, i] for k in ("sigma", "fit_error", "r2")]
            np.testing.assert_allclose(found, [peer.slope, peer.stderr, peer.rvalue**2], rtol=1e-8)


def test_weights_are_the_slope():
    x = power_laws()
    ok = np.ones(x.shape, bool)
    c = slope_weights(np.broadcast_to(T8, (5, 8)), ok)
    np.testing.assert_allclose((c * np.log(x)).sum(1), run_slopes(x, T8)["sigma"], rtol=1e-10)
    np.testing.assert_allclose((c * T8[:, None]).sum(1), 1.0)


def test_a_dead_component_is_left_out_only_if_asked():
    x = power_laws(noise=0.0)
    x[0, 5:, 2] = 0.0
    x[1, 2:, 1] = np.nan
    with pytest.raises(ValueError, match=r"x\[run 0, round 5, component 2\] is 0.0"):
        run_slopes(x, T8)
    line = run_slopes(x, T8, missing="skip")
    assert line["points"][0].tolist() == [8, 8, 5] and line["points"][1].tolist() == [8, 2, 8]
    assert np.isnan(line["sigma"][1, 1]) and np.isnan(line["rms"][1, 1])
    np.testing.assert_allclose(line["sigma"][0], [0.3, 0.0, -0.5], atol=1e-12)
    assert log_slopes(x, T8, missing="skip").slope.notna().all()  # the other runs have a line
    steps = local_exponents(x, T8, missing="skip")
    assert steps.sigma.notna().all()


@pytest.mark.parametrize("bad", [np.inf, -1.0])
def test_what_has_no_logarithm_is_never_skipped(bad):
    x = power_laws()
    x[2, 1, 0] = bad
    for missing in ("refuse", "skip"):
        with pytest.raises(ValueError, match="run 2, round 1, component 0"):
            run_slopes(x, T8, missing=missing)


def test_odd_shapes_are_refused():
    for x, t, says in (
        (np.ones(8), T8, r"give \[runs, rounds, d\]"),
        (np.ones((2, 2, 3)), T8[:2], "at least 3 rounds"),
        (np.ones((2, 8, 3)), T8[::-1], "increasing"),
        (np.ones((2, 8, 3)), T8[:7], "one RG time per round"),
    ):
        with pytest.raises(ValueError, match=says):
            log_slopes(x, t)
    with pytest.raises(ValueError, match="did you mean 'skip'"):
        run_slopes(power_laws(), T8, missing="skp")


def test_runs_may_have_times_of_their_own():
    t = np.stack([T8, 2 * T8])
    x = np.exp(0.7 * t)[..., None]
    np.testing.assert_allclose(run_slopes(x, t)["sigma"], 0.7)
    assert local_exponents(x, t).sigma.to_numpy() == pytest.approx(0.7)


@pytest.mark.parametrize("runs", [3, 5])
def test_intervals_of_a_fixed_window_cover_as_they_say(runs):
    def misses(rng):
        own = 0.3 + 0.02 * rng.normal(size=(runs, 1, 1))
        x = np.exp(own * T8[:, None] + 0.02 * rng.normal(size=(runs, 8, 1)))
        o = log_slopes(x, T8)
        return not o.low[0] < 0.3 < o.high[0]

    missed, error = rejection_rate(misses, 600, name=f"cover {runs}")
    assert abs(missed - 0.05) < 4 * error


# Distances


def test_distance_does_not_know_magnitudes_from_shares():
    A, B = power_laws(seed=1), power_laws(seed=2)
    share = lambda x: x / x.sum(-1, keepdims=True)
    assert trajectory_distance(A, B) == pytest.approx(trajectory_distance(share(A), share(B)))
    assert trajectory_distance(A, A) == 0.0
    np.testing.assert_allclose(log_ratios(A).sum(-1), 0.0, atol=1e-12)


def test_few_runs_cannot_tell():
    far = power_laws((0.9, 0.0, -0.5), runs=3)
    found = shuffle_test(power_laws(runs=3), far)
    assert found.verdict == "cannot tell" and found.smallest_p == 0.1 and found.p == 0.1
    paired = shuffle_test(power_laws(runs=4), power_laws((0.9, 0, 0), runs=4), paired=True)
    assert (paired.labellings, paired.smallest_p, paired.verdict) == (16, 0.125, "cannot tell")
    with pytest.raises(ValueError, match="3 and 5 runs cannot be paired"):
        shuffle_test(power_laws(runs=3), power_laws(), paired=True)


@pytest.mark.parametrize("paired", [False, True])
def test_the_shuffle_test_keeps_its_level(paired):
    def rejects(rng):
        start = 0.1 * rng.normal(size=(6, 1, 3)) if paired else 0.0
        a, b = (np.exp(start + 0.05 * rng.normal(size=(6, 8, 3))) for _ in range(2))
        return shuffle_test(a, b, paired=paired, draws=300).p <= 0.05

    rate, error = rejection_rate(rejects, 300, name=f"shuffle {paired}")
    assert rate <= 0.05 + 3 * error
    far = shuffle_test(power_laws(runs=6), power_laws((0.5, 0, -0.5), runs=6), paired=paired)
    assert far.verdict == "apart"


def test_spectra_are_paired_at_the_least_cost():
    assert spectrum_distance([3.0, 1.0, 2.0], [1.0, 2.0, 3.5]) == pytest.approx(0.5 / 3)
    assert spectrum_distance([1 + 1j, 1 - 1j], [1 - 1j, 1 + 1j]) == 0.0
    assert spectrum_distance([1.0, 3.0], [2.0]) == pytest.approx(1.0)
    x = power_laws()
    assert spectrum_distance(dmd(x, bootstrap=0), spectrum_of(x)) == pytest.approx(0.0, abs=1e-12)


# Coupling


def path(kind, rng, runs=6, rounds=10):
    "Trajectories of three parts: straight, curved, or coupled"
    n = np.arange(rounds)[:, None]
    scatter = 0.1 * rng.normal(size=(runs, 1, 3))
    scatter = scatter + 0.005 * rng.normal(size=(runs, rounds, 3)).cumsum(1)
    rate, bend = np.array([0.08, 0.02, -0.05]), np.array([-0.004, 0.003, -0.006])
    if kind != "coupled":
        return np.exp(rate * n + (bend * n**2 if kind == "curved" else 0) + scatter)
    T = np.array([[0.95, 0.1, 0.0], [0.0, 0.9, 0.1], [0.1, 0.0, 0.85]])
    z = [0.3 * rng.normal(size=(runs, 3))]
    for _ in range(rounds - 1):
        z.append(z[-1] @ T.T + 0.01 * rng.normal(size=(runs, 3)))
    return np.exp(np.stack(z, 1))


@pytest.mark.parametrize("kind", ["straight", "curved"])
def test_uncoupled_paths_are_not_called_coupled(kind):
    rejects = lambda rng: dmd(path(kind, rng), bootstrap=0).coupled
    rate, error = rejection_rate(rejects, 200, name=kind)
    assert rate <= 0.05 + 3 * error


def test_against_a_diagonal_map_alone_a_curve_would_pass_for_coupling():
    "Why there are three competitors"
    found = [
        dmd(path("curved", np.random.default_rng(i)), bootstrap=0).gains_on("diagonal")
        for i in range(100)
    ]
    assert np.mean(found) > 0.3


def test_a_coupled_path_is_found():
    found = [dmd(path("coupled", np.random.default_rng(i)), bootstrap=0).coupled for i in range(60)]
    assert np.mean(found) > 0.8


def oneshot_ratios(seeds=5):
    "The null flow of small networks: trained once, then pruned along the schedule"
    from rg_tickets.imp import imp
    from rg_tickets.tasks.images import image_task
    from rg_tickets.train import Recipe

    task, paths = image_task("digits8"), []
    for seed in range(seeds):
        torch.manual_seed(seed)
        sizes = (256, 40, 40, 10)
        layers = [
            o for i, j in zip(sizes, sizes[1:]) for o in (torch.nn.Linear(i, j), torch.nn.ReLU())
        ]
        net = torch.nn.Sequential(torch.nn.Flatten(), *layers[:-1])
        rounds = list(
            imp(task, net, rounds=9, recipe=Recipe(epochs=3), seed=seed, control="oneshot")
        )
        paths.append([[t["l1"] for t in r.tensors] for r in rounds])
    x = np.array(paths)
    return x[..., :-1] / x[..., -1:]


def test_one_shot_pruning_has_no_coupling():
    "Nothing is retrained, so nothing can feed anything"
    x = oneshot_ratios()
    for ridge in (0.0, 0.01):
        found = dmd(x, bootstrap=0, ridge=ridge)
        assert found.coupled is False
        assert min(found.error_quadratic, found.error_timed) < found.error_full


# Eigenvalues


def linear(T, rng, runs=12, rounds=10, noise=0.02, blur=0.0):
    x = [1 + rng.random((runs, len(T)))]
    for _ in range(rounds - 1):
        x.append(x[-1] @ T.T + noise * rng.normal(size=(runs, len(T))))
    x = np.stack(x, 1)
    return x + blur * rng.normal(size=x.shape)


c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
TURNED = np.array([[c, -s], [s, c]]) @ np.diag([1.2, 0.8]) @ np.array([[c, s], [-s, c]])


@pytest.mark.parametrize("blur, lagged", [(0.0, False), (0.1, True)])
def test_intervals_of_eigenvalues_cover_as_they_say(blur, lagged):
    def misses(rng):
        x = linear(TURNED, rng, blur=blur)
        f = dmd(x, log=False, bootstrap=50, lagged=lagged)
        return not f.low[1] < 0.8 < f.high[1]

    missed, error = rejection_rate(misses, 200, name=f"eigenvalues {lagged}")
    assert missed <= 0.05 + 4 * error


def test_noise_of_the_recording_biases_least_squares_and_not_instruments():
    x = [linear(TURNED, np.random.default_rng(i), blur=0.1) for i in range(40)]
    plain, lagged = (
        np.mean([spectrum_of(o, log=False, lagged=k)[1].real for o in x]) for k in (False, True)
    )
    assert plain < 0.75 and abs(lagged - 0.8) < 0.02


def test_exact_maps_are_found_exactly():
    x = linear(TURNED, np.random.default_rng(0), noise=0.0)
    for lagged in (False, True):
        f = dmd(x, log=False, bootstrap=0, lagged=lagged)
        np.testing.assert_allclose(f.T, TURNED, atol=1e-9)
        np.testing.assert_allclose(f.eigenvalues, [1.2, 0.8], atol=1e-9)
    assert dmd(x[:1], log=False, bootstrap=0).coupled is None


def test_two_rounds_at_one_time_are_a_line_and_no_step():
    t = np.array([0.0, 0.0, 1.0, 2.0])
    x = np.exp(0.4 * t)[:, None]
    assert run_slopes(x, t)["sigma"].item() == pytest.approx(0.4)
    assert np.isnan(run_slopes(x, np.zeros(4))["sigma"]).all()
    steps = local_exponents(np.stack([x, x]), t).sigma
    assert np.isnan(steps[0]) and steps[1] == pytest.approx(0.4)
