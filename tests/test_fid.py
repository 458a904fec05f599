"""FID against pytorch-fid with the same random weights, the formulas against plain ones, what is refused."""
import hashlib
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from scipy import linalg

from benchmarks import fid as fids
from benchmarks.fid_speed import random_weights
from common import fid
from common.errors import UserError, exit_status


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_weights()


@pytest.fixture(scope="module")
def net(state) -> fid.Inception:
    net = fid.Inception()
    net.load_state_dict(state)
    return net


@pytest.fixture(scope="module")
def reference(state):
    """pytorch_fid.fid_score, its network made with our random weights."""
    score = pytest.importorskip("pytorch_fid.fid_score", reason="the reference: pip install pytorch-fid")
    sqrtm = linalg.sqrtm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytorch_fid.inception.load_state_dict_from_url", lambda *_, **__: state)
        patch.setattr(score, "tqdm", lambda loader: loader)
        # It calls sqrtm(…, disp=False) for a pair, which SciPy deprecates in 1.17 and removes in 1.18.
        patch.setattr(linalg, "sqrtm", lambda a, disp=True: sqrtm(a) if disp else (sqrtm(a), None))
        yield score


@pytest.fixture(scope="module")
def theirs(reference):
    return reference.InceptionV3().eval()


def pictures(folder, n, seed, size=(40, 32), grey=False):
    """n PNGs of smooth random colours."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 1 if grey else 3, 4, 4, generator=g) ** (1 + seed)
    smooth = torch.nn.functional.interpolate(coarse, size[::-1], mode="bicubic").clamp(0, 1) * 255
    for i, image in enumerate(smooth.byte()):
        pixels = image[0] if grey else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("pictures")
    return pictures(top / "a", 5, 0), pictures(top / "grey", 4, 1, grey=True)


@pytest.fixture(scope="module")
def measured(net, folders):
    """The moments of both folders."""
    both = fid.Moments(), fid.Moments()
    for moments, folder in zip(both, folders, strict=True):
        for batch in fid.features(net, fids.read_images(fids.list_images(folder), 50)):
            moments.update(batch)
    return both


def distance(a, b):
    return fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


# ---------------------------------------------------------------------- the network

@pytest.mark.parametrize("shape", [(2, 3, 299, 299), (2, 3, 320, 200), (2, 1, 28, 28)])
def test_features_are_those_of_pytorch_fid(net, theirs, shape):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(shape[2]))
    expected = theirs(images.expand(-1, 3, -1, -1))[0].flatten(1)
    assert expected.shape == (shape[0], 2048) and expected.std(0).mean() > 1e-2  # not all the same
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().mean().item())


def test_the_network_keeps_out_of_the_way(state, net):
    before = torch.get_rng_state()
    made = fid.Inception()
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert made(images).isnan().all()  # no weights, no features
    with pytest.raises(RuntimeError, match="Missing key"):
        made.load_state_dict({k: v for k, v in state.items() if k != "Mixed_7c.branch_pool.bn.bias"})
    out = net(images)
    assert not out.requires_grad and not any(p.requires_grad for p in net.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(images), out) and out.dtype == torch.float32


def test_floats_are_rounded_to_the_bytes_of_a_file():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = pixels / 127.5 - 1 + (torch.rand(pixels.shape) - 0.5) * 0.9 / 127.5
    from_bytes, from_floats, outside, broken = fid.features(
        lambda x: x, [pixels, floats, torch.tensor([-1.5, 1.5]), torch.tensor([float("nan")])])
    assert torch.equal(from_bytes, from_floats) and from_bytes.max() == 1
    assert outside.tolist() == [0, 1] and broken.isnan().all()


# ---------------------------------------------------------------------- the whole pipeline

def test_folders_and_statistics_interchange_with_pytorch_fid(measured, reference, theirs, folders, tmp_path):
    stats = [reference.compute_statistics_of_path(str(f), theirs, 4, 2048, "cpu", 0) for f in folders]
    for moments, (mu, sigma) in zip(measured, stats, strict=True):
        np.testing.assert_allclose(moments.mean, mu, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moments.covariance, sigma, rtol=1e-3, atol=1e-5 * sigma.max())
    # sqrtm of 2048×2048 matrices of rank 4 and 3 is slow and rough; two of their features have full rank
    some = slice(None, None, 1100)
    ours = [part for m in measured for part in (m.mean[some], m.covariance[some, some])]
    expected = reference.calculate_frechet_distance(
        *(part for mu, sigma in stats for part in (mu[some], sigma[some, some])))
    assert fid.frechet_distance(*ours) == pytest.approx(expected, rel=1e-3)
    assert distance(*measured) == pytest.approx(fid.frechet_distance(*stats[0], *stats[1]), rel=1e-3)

    a, grey = measured
    ours = fids.Statistics(a.mean.numpy(), a.covariance.numpy(), a.count)
    ours.save(tmp_path / "ours.npz")
    mu, sigma = reference.compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 1, 2048, "cpu")
    assert np.array_equal(mu, a.mean) and np.array_equal(sigma, a.covariance)
    reference.save_fid_stats([str(folders[1]), str(tmp_path / "theirs.npz")], 4, "cpu", 2048, 0)
    loaded = fids.Statistics.load(tmp_path / "theirs.npz")
    assert loaded.count is None and fids.Statistics.load(tmp_path / "ours.npz").count == 5
    assert distance(a, loaded) == pytest.approx(distance(a, grey), rel=1e-3)


# ---------------------------------------------------------------------- the formulas

def test_moments_are_those_of_numpy_however_the_batches_fall():
    x = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7) + 1e6  # a large mean
    x[25:] += 1e3
    for sizes in ([50], [1] * 50, [3, 40, 7]):
        moments = fid.Moments()
        for part in torch.from_numpy(x).split(sizes):
            moments.update(part)
        assert moments.count == 50
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), rtol=1e-9)
    moments = fid.Moments()
    moments.update(torch.ones(1, 6))
    with pytest.raises(UserError, match="at least 2 images"):
        _ = moments.covariance
    with pytest.raises(UserError, match="after 1 good images"):
        moments.update(torch.tensor([[0.0] * 6, [float("inf")] * 6]))


def test_distance_at_2048_dimensions_is_that_of_the_matrix_square_root():
    rng = np.random.default_rng(0)
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (
        rng.normal(size=(2500, 2048)) * rng.uniform(0.1, 1, 2048), rng.normal(0.01, 0.6, (2500, 2048))))
    root = linalg.sqrtm(s1 @ s2)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(root).real
    assert fid.frechet_distance(m1, s1, torch.from_numpy(m2), torch.from_numpy(s2)) == pytest.approx(
        expected, rel=1e-6)


@pytest.mark.parametrize("a, b", [
    (np.r_[np.ones(30), np.zeros(70)], np.r_[np.zeros(20), 2 * np.ones(40), np.zeros(40)]),
    (np.r_[np.ones(30), np.zeros(70)], np.linspace(1, 2, 100)),
    (np.arange(1, 101.0) ** -4, np.arange(1, 101.0) ** -4 * 1.1),  # a broad range: no eigenvalue may be lost
    (np.zeros(100), np.ones(100)),
])
def test_distance_of_covariances_with_common_axes(a, b):
    axes, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 100)))
    s1, s2 = axes * a @ axes.T, axes * b @ axes.T
    mu, expected = np.ones(100), ((a ** 0.5 - b ** 0.5) ** 2).sum()
    assert fid.frechet_distance(mu, s1, mu, s2) == pytest.approx(expected, rel=1e-6)
    assert fid.frechet_distance(mu, s1, 0 * mu, s2) == pytest.approx(expected + 100, rel=1e-6)
    assert 0 <= fid.frechet_distance(mu, s2, mu, s2) < 1e-6


def test_kid_is_the_unbiased_estimate():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 5, generator=g), torch.randn(9, 5, generator=g) + 0.5
    a, b, before = x.double().numpy(), y.double().numpy(), torch.get_rng_state()

    def k(p, q):
        return (p @ q / 5 + 1) ** 3

    # subsets of all of the smaller set, and of a larger one that is all alike
    a[:] = a[0]
    expected = k(a[0], a[0]) + sum(k(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / 72 \
        - 2 * sum(k(a[0], q) for q in b) / 9
    mean, std = fids.kid(torch.from_numpy(a), y, subsets=3)
    assert mean == pytest.approx(expected, rel=1e-12) and std < 1e-9
    assert fids.kid(x, y, 20, 5, seed=1) == fids.kid(x, y, 20, 5, seed=1) != fids.kid(x, y, 20, 5, seed=2)
    # unbiased: the mean over many subsets is the estimate from all
    everything = fids.kid(x[:9], y, 1)[0]
    assert fids.kid(x[:9], y, 4000, 4)[0] == pytest.approx(everything, abs=0.15)
    assert torch.equal(torch.get_rng_state(), before)


def test_precision_and_recall_as_counted_one_by_one():
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(40, 6, generator=g), torch.randn(300, 6, generator=g) * 0.7 + 0.3

    def share(points, by):
        radii = [sorted((q - o).norm() for o in by)[3] for q in by]
        pairs = list(zip(by, radii, strict=True))
        return sum(any((p - q).norm() <= r for q, r in pairs) for p in points) / len(points)

    expected = share(fake[:60], real), share(real, fake[:60])
    assert fids.precision_recall(real, fake[:60]) == pytest.approx(expected)
    assert 0.1 < min(expected) < 0.95
    assert fids.precision_recall(real, real) == fids.precision_recall(fake, fake) == (1, 1)
    assert fids.precision_recall(real, fake + 100) == (0, 0)
    copies = torch.rand(30, 2048, generator=g).repeat(4, 1)
    shuffled = copies[torch.randperm(120, generator=g)]
    assert fids.precision_recall(copies, shuffled) == (1, 1)
    among = fids._squared_distances(copies.double(), shuffled.double())
    assert (among == 0).sum() == 30 * 4 * 4  # free of rounding noise: all radii are zero here
    with pytest.raises(UserError, match="more than k = 3"):
        fids.precision_recall(real, fake[:3])


# ---------------------------------------------------------------------- command line

@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    """The random weights as a file, and the beginning of its hash."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()[:8]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys, weights):
    """Runs benchmarks/fid.py in this process, offline, taking the random weights for the real ones."""
    def unplugged(*_, **__):
        raise URLError("unplugged")

    def run(*argv):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(torch.hub, "urlopen", unplugged)
        monkeypatch.setattr(fid, "SHA256", weights[1])
        monkeypatch.setattr(sys, "argv", ["fid", "--device", "cpu", *map(str, argv)])
        capsys.readouterr()
        return exit_status(fids.main), *capsys.readouterr()

    return run


@pytest.fixture
def refuses(call, tmp_path):
    def check(*argv, message):
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        status, out, error = call(*argv)
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert message in error and "FID:" not in out
        assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}

    return check


def test_the_command_line(call, folders, measured, weights):
    a, grey = folders
    expected = f"FID: {distance(*measured):.6f} (N = 5 and 4)\n"
    assert call("--save-stats", a, "a.npz", "--fid-weights", weights[0])[0] == 0
    assert call("a.npz", grey, "--fid-weights", weights[0]) == (0, expected, "")
    assert call("a.npz", "a.npz") == (0, "FID: 0.000000 (N = 5 and 5)\n", "")  # needs no weights
    status, out, _ = call(grey, grey, "--fid-weights", weights[0], "--kid", "--pr")
    assert status == 0 and "\nKID: " in out and "(100 subsets of 4)\nprecision: 1.0000, recall: 1.0000" in out


def test_bad_folders(refuses, folders, weights, tmp_path):
    a = folders[0]
    refuses("nowhere", a, message="nowhere can't be read (FileNotFoundError")
    (tmp_path / "empty").mkdir()
    refuses(a, "empty", message="empty has no images, at least 2")
    one = pictures(tmp_path / "one", 1, 0)
    refuses(one, a, message="one has 1 image, at least 2")
    sizes = pictures(tmp_path / "sizes", 3, 0)
    Image.new("RGB", (8, 9)).save(sizes / "2.png")
    refuses(a, sizes, message="0.png has (40, 32) pixels, 2.png (8, 9)")
    for name, damage in (("header", lambda b: b"no image"), ("pixels", lambda b: b[: len(b) // 2])):
        corrupt = pictures(tmp_path / name, 3, 0)
        (corrupt / "1.png").write_bytes(damage((corrupt / "1.png").read_bytes()))
        refuses(corrupt, a, "--fid-weights", weights[0], message="1.png can't be read (")
    (corrupt / "1.png").unlink()
    (corrupt / "1.png").symlink_to("nowhere")  # part of the folder is not measured without a word
    refuses(corrupt, a, message="1.png can't be read (FileNotFoundError")


def test_the_files_measured_are_images_by_name_and_by_content(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "some", 4, 0)
    (folder / "2.png").rename(folder / "2.PNG")
    Image.open(folder / "3.png").save(folder / "3.Jpeg")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"left by a file manager")
    assert [p.name for p in fids.list_images(folder)] == ["0.png", "1.png", "2.PNG", "3.Jpeg", "3.png"]
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    Image.new("RGB", (40, 32)).save(folder / "0.png", format="EPS")
    with pytest.raises(UserError, match="0.png can't be read .Unidentified"):
        next(fids.read_images([folder / "0.png"], 1))
    assert not started


@pytest.mark.parametrize("image", [
    Image.new("RGBA", (40, 32), (9, 8, 7, 0)), Image.fromarray(np.full((32, 40), 999, np.uint16)),
    Image.new("P", (40, 32), 3)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_pixels_are_those_that_pytorch_fid_reads(tmp_path, reference, image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    expected = reference.ImagePathDataset([tmp_path / "x.png"], np.array)[0]
    assert np.array_equal(next(fids.read_images([tmp_path / "x.png"], 1))[0].permute(1, 2, 0), expected)


def test_bad_statistics(refuses, folders, tmp_path):
    eye, good = np.eye(3), tmp_path / "good.npz"
    indefinite, skewed = eye + 2 * eye[[1, 0, 2]], eye + np.eye(3, k=1) / 2
    np.savez(good, mu=np.zeros(3), sigma=eye)
    for message, arrays in (("it should be .npz statistics", {"mu": np.zeros(3)}),
                            ("NaN or infinite", {"mu": np.zeros(3), "sigma": eye * np.nan}),
                            ("the shapes are (3,) and (4, 4)", {"mu": np.zeros(3), "sigma": np.eye(4)}),
                            ("the shapes are (0,)", {"mu": np.zeros(0), "sigma": np.zeros((0, 0))}),
                            ("OverflowError", {"mu": np.zeros(3), "sigma": eye, "n": np.inf}),
                            ("of -5 images", {"mu": np.zeros(3), "sigma": eye, "n": -5}),
                            ("3 and 4 dimensions", {"mu": np.zeros(4), "sigma": np.eye(4)}),
                            ("not a covariance", {"mu": np.zeros(3), "sigma": indefinite}),
                            ("not a covariance", {"mu": np.zeros(3), "sigma": skewed}),
                            ("could not convert string", {"mu": np.array(["x"] * 3), "sigma": eye})):
        np.savez(tmp_path / "bad.npz", **arrays)
        refuses("good.npz", "bad.npz", message=message)
    whole = good.read_bytes()
    at = whole.index(b"PK\1\2")  # the central directory, whose flags and compression follow
    encrypted, unknown = (whole[:i] + bytes([x]) + whole[i + 1:] for i, x in ((at + 8, 1), (at + 10, 99)))
    header = whole.replace(b"'fortran_order'", b"(((((((((((((((")
    huge = whole.replace(b"(3,), }        ", b"(3000000000000,)}")
    for content in (b"", b"no zip at all", whole[:-30], whole[:60], encrypted, unknown, header, huge):
        (tmp_path / "bad.npz").write_bytes(content)
        refuses("bad.npz", "good.npz", message="bad.npz can't be read (")
    refuses("missing.npz", "good.npz", message="missing.npz can't be read")
    refuses("good.npz", folders[0], message="3 and 2048 dimensions can't be compared")
    refuses("good.npz", folders[0], "--kid", message="need two folders")


def test_bad_weights(refuses, folders, weights, tmp_path):
    (tmp_path / "cut.pth").write_bytes(weights[0].read_bytes()[:-9])
    refuses(*folders, "--fid-weights", "cut.pth", message="cut.pth can't be read (ValueError: its SHA-256 is")
    refuses(*folders, "--fid-weights", "missing.pth", message="missing.pth can't be read (FileNotFoundError")
    refuses(*folders, message="(URLError: <urlopen error unplugged>): it should be the FID Inception")
    (tmp_path / "hub" / "checkpoints" / fid.URL.rsplit("/", 1)[1]).write_bytes(b"something else")
    refuses(*folders, message="its SHA-256 is")


def test_bad_options(refuses, folders, tmp_path):
    a = folders[0]
    (tmp_path / "taken.npz").write_bytes(b"")
    refuses("--save-stats", a, "taken.npz", message="exists and is not overwritten")
    refuses("--save-stats", a, "no/where.npz", message="is not in an existing folder")
    refuses("--save-stats", *folders, message="takes a folder of images and the .npz to write")
    refuses(*folders, "--batch-size", "0", message="--batch-size 0: must be at least 1")
    refuses(*folders, "--batch", "3", message="unrecognized arguments: --batch 3 (see --help)")
    refuses(*folders, "--device", "cuda:99", message="cuda:99 is not available")
