"""FID against pytorch-fid with the same random weights, the formulas against plain ones, what is refused."""
import hashlib
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg

from common import fid
from common.files import UserError
from harness.cli import exit_status
from tools import fid as fids


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights in the layout of the weight file, such that features neither vanish nor explode."""
    g, state = torch.Generator().manual_seed(0), fid.Inception().state_dict()
    for key, value in state.items():
        noise = torch.randn(value.shape, generator=g)
        if value.ndim > 1:
            state[key] = noise * (2 / value[0].numel()) ** 0.5
        elif key.endswith(("bn.weight", "running_var")):
            state[key] = 1 + 0.3 * noise.clamp(-2, 2)
        else:
            state[key] = 0.3 * noise if value.is_floating_point() else torch.zeros_like(value)
    return state


@pytest.fixture(scope="module")
def reference(state):
    """pytorch_fid.fid_score, its network made with our random weights."""
    score, sqrtm = pytest.importorskip("pytorch_fid.fid_score"), linalg.sqrtm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytorch_fid.inception.load_state_dict_from_url", lambda *_, **__: state)
        patch.setattr(score, "tqdm", lambda loader: loader)
        patch.setattr(np, "savez_compressed", np.savez)  # compressing takes seconds
        # It calls sqrtm(…, disp=False) for a pair, which SciPy deprecates in 1.17 and removes in 1.18.
        patch.setattr(linalg, "sqrtm", lambda a, disp=True: sqrtm(a) if disp else (sqrtm(a), None))
        yield score


def pictures(folder, n, seed, grey=False):
    """n PNGs of smooth random colours, 40×32."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 1 if grey else 3, 4, 4, generator=g) ** (1 + seed)
    smooth = torch.nn.functional.interpolate(coarse, (32, 40), mode="bicubic").clamp(0, 1) * 255
    for i, image in enumerate(smooth.byte()):
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("pictures")
    return pictures(top / "a", 5, 0), pictures(top / "grey", 4, 1, grey=True)


# ---------------------------------------------------------------------- the network

def test_features_are_those_of_pytorch_fid_and_the_network_keeps_out_of_the_way(state, reference):
    theirs, before = reference.InceptionV3().eval(), torch.get_rng_state()
    net = fid.Inception()
    assert torch.equal(torch.get_rng_state(), before) and net(torch.ones(1, 1, 9, 9)).isnan().all()
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({k: v for k, v in state.items() if k != "Mixed_7c.branch_pool.bn.bias"})
    net.load_state_dict(state)
    for shape in ((2, 3, 299, 299), (2, 3, 320, 200), (2, 1, 28, 28)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(shape[2]), requires_grad=True)
        out, expected = net(images), theirs(images.expand(-1, 3, -1, -1))[0].detach().flatten(1)
        assert expected.shape == (2, 2048) and expected.std(0).mean() > 1e-2  # not all the same
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().mean().item())
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


# ---------------------------------------------------------------------- the formulas

def test_statistics_are_those_of_numpy_however_the_batches_fall():
    x = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7) + 1e6  # a large mean
    x[25:] += 1e3
    for sizes in ([50], [1] * 50, [3, 40, 7]):
        mean, covariance = fid.feature_stats(torch.from_numpy(x).split(sizes))
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-9)
    with pytest.raises(UserError, match="at least 2 images"):
        fid.feature_stats([torch.ones(1, 6)])
    with pytest.raises(UserError, match="NaN or infinite"):
        fid.feature_stats([torch.ones(2, 6), torch.tensor([[0.0] * 5 + [float("inf")]])])


def test_distance_is_that_of_the_matrix_square_root():
    rng = np.random.default_rng(0)
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (
        rng.normal(size=(500, 400)) * rng.uniform(0.1, 1, 400), rng.normal(0.01, 0.6, (500, 400))))
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2)).real
    found = fid.frechet_distance(m1, s1, torch.from_numpy(m2), torch.from_numpy(s2))
    assert found == pytest.approx(expected, rel=1e-6)


def test_distance_of_covariances_with_common_axes_and_any_rank():
    axes, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 100)))
    low, broad = np.r_[np.ones(30), np.zeros(70)], np.arange(1, 101.0) ** -4  # no eigenvalue may be lost
    for a, b in ((low, np.r_[np.zeros(20), 2 * np.ones(40), np.zeros(40)]), (low, np.linspace(1, 2, 100)),
                 (broad, broad * 1.1), (np.zeros(100), np.ones(100))):
        s1, s2 = axes * a @ axes.T, axes * b @ axes.T
        mu, expected = np.ones(100), ((a ** 0.5 - b ** 0.5) ** 2).sum()
        assert fid.frechet_distance(mu, s1, mu, s2) == pytest.approx(expected, rel=1e-6)
        assert fid.frechet_distance(mu, s1, 0 * mu, s2) == pytest.approx(expected + 100, rel=1e-6)
        assert 0 <= fid.frechet_distance(mu, s2, mu, s2) < 1e-6
        for sigma in (s1, s2):
            root = fid.psd_root(sigma)
            np.testing.assert_allclose(root @ root.T, sigma, atol=1e-9 * np.trace(sigma))


def test_kid_is_the_unbiased_estimate():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 5, generator=g), torch.randn(9, 5, generator=g) + 0.5
    same, b, before = x[:1].expand(12, 5), y.double().numpy(), torch.get_rng_state()
    k = (b @ b.T / 5 + 1) ** 3  # subsets of all of the smaller set, and of a larger one that is all alike
    across, within = (((same[:1] @ z.T).double().numpy() / 5 + 1) ** 3 for z in (y, same[:1]))
    expected = within.item() + (k.sum() - k.trace()) / 72 - 2 * across.mean()
    assert fids.kid(same, y, subsets=3) == pytest.approx((expected, 0), rel=1e-6, abs=1e-9)
    assert fids.kid(x, y, 20, 5, seed=1) == fids.kid(x, y, 20, 5, seed=1) != fids.kid(x, y, 20, 5, seed=2)
    # unbiased: the mean over many subsets is the estimate from all
    assert fids.kid(x[:9], y, 2000, 4)[0] == pytest.approx(fids.kid(x[:9], y, 1)[0], abs=0.15)
    assert torch.equal(torch.get_rng_state(), before)


def test_precision_and_recall_as_counted_one_by_one():
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(40, 6, generator=g), torch.randn(60, 6, generator=g) * 0.7 + 0.3

    def share(points, by):
        radii = [sorted((q - o).norm() for o in by)[3] for q in by]
        return np.mean([any((p - q).norm() <= r for q, r in zip(by, radii, strict=True)) for p in points])
    expected = share(fake, real), share(real, fake)
    assert fids.precision_recall(real, fake) == pytest.approx(expected) and 0.1 < min(expected) < 0.95
    many = torch.randn(300, 6, generator=g)  # more than are compared at once
    assert fids.precision_recall(real, real) == fids.precision_recall(many, many) == (1, 1)
    assert fids.precision_recall(real, fake + 100) == (0, 0)
    copies = torch.rand(30, 2048, generator=g).repeat(4, 1)
    shuffled = copies[torch.randperm(120, generator=g)]  # free of rounding noise: all radii are zero here
    assert fids.precision_recall(copies, shuffled) == (1, 1)
    with pytest.raises(UserError, match="more than k = 3"):
        fids.precision_recall(real, fake[:3])


# ---------------------------------------------------------------------- the command line

@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    """The file of the random weights, which are taken for the real ones."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
        yield path


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs tools/fid.py in this process, offline; returns its status, output and errors."""
    def unplugged(*_, **__):
        raise URLError("unplugged")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unplugged)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["fid", "--device", "cpu", *map(str, argv)])
        capsys.readouterr()
        return exit_status(fids.main), *capsys.readouterr()
    return run


@pytest.fixture
def refuses(call, tmp_path):
    def check(*argv, message):
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        status, out, error = call(*argv)
        assert (status, error.count("\n"), error.count("error: ")) == (2, 1, 1), error
        assert message in error and "FID:" not in out
        assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    return check


def test_folders_and_statistics_interchange_with_pytorch_fid(call, reference, folders, weights):
    (a, grey), use = folders, ("--fid-weights", weights)
    for folder in folders:
        reference.save_fid_stats([str(folder), f"{folder.name}.npz"], 4, "cpu", 2048, 0)
    assert call("--save-stats", a, "ours.npz", *use)[1].endswith("wrote ours.npz (N = 5)\n")
    ours, *theirs = (fids.Statistics.load(Path(f"{name}.npz")) for name in ("ours", "a", "grey"))
    np.testing.assert_allclose(ours.mean, theirs[0].mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.covariance, theirs[0].covariance, rtol=1e-3,
                               atol=1e-5 * theirs[0].covariance.max())
    mu, sigma = reference.compute_statistics_of_path("ours.npz", None, 1, 2048, "cpu")
    assert np.array_equal(mu, ours.mean) and np.array_equal(sigma, ours.covariance)
    # sqrtm of 2048×2048 matrices of rank 4 and 3 is slow and rough; two of their features have full rank
    few = [part for s in theirs for part in (s.mean[::1100], s.covariance[::1100, ::1100])]
    assert fid.frechet_distance(*few) == pytest.approx(reference.calculate_frechet_distance(*few), rel=1e-3)
    expected = fid.frechet_distance(mu, sigma, theirs[1].mean, theirs[1].covariance)
    assert call("ours.npz", "grey.npz") == (0, f"FID: {expected:.6f} (N = 5 and unknown)\n", "")  # no weights
    status, out, error = call("ours.npz", grey, *use)
    assert (status, error) == (0, "") and out.endswith(" (N = 5 and 4)\n")
    assert float(out.split()[1]) == pytest.approx(expected, rel=1e-3)


def test_the_command_line_adds_kid_precision_and_recall(call, folders, monkeypatch):
    def net(x):
        return x[:, :, ::16, ::20].flatten(1)
    monkeypatch.setattr(fids, "load_inception", lambda *_: net)
    a, grey = (torch.cat([*fid.features(net, fids.read_images(fids.list_images(folder), 2))])
               for folder in folders)
    (mean, std), (precision, recall) = fids.kid(a, grey), fids.precision_recall(grey, a)
    status, out, _ = call(*folders, "--kid", "--pr", "--batch-size", 3)
    assert status == 0 and precision != recall
    assert out.splitlines()[1:] == [f"KID: {mean:.6f} ± {std:.6f} (100 subsets of 4)",
                                    f"precision: {precision:.4f}, recall: {recall:.4f} (k = 3, B is real)"]


def test_bad_folders(refuses, folders, weights, tmp_path):
    a, bad, one = folders[0], pictures(tmp_path / "bad", 3, 0), pictures(tmp_path / "one", 1, 0)
    (tmp_path / "empty").mkdir()
    refuses("nowhere", a, message="nowhere can't be read (FileNotFoundError")
    refuses(a, "empty", message="empty has no images, at least 2")
    refuses(one, a, message="one has 1 image, at least 2")
    (bad / "1.png").write_bytes((bad / "1.png").read_bytes()[:100])
    refuses(bad, a, "--fid-weights", weights, message="1.png can't be read (")
    Image.new("RGB", (40, 32)).save(bad / "1.png", format="EPS")  # Pillow gives it to Ghostscript
    refuses(bad, a, message="1.png can't be read (UnidentifiedImageError")
    Image.new("RGB", (8, 9)).save(bad / "1.png")
    refuses(a, bad, message="0.png has (40, 32) pixels, 1.png (8, 9)")
    (bad / "1.png").unlink()
    (bad / "1.png").symlink_to("nowhere")  # part of the folder is not measured without a word
    refuses(bad, a, message="1.png can't be read (FileNotFoundError")


def test_the_files_measured_and_their_pixels_are_those_of_pytorch_fid(tmp_path, reference):
    folder = pictures(tmp_path / "some", 4, 0)
    (folder / "2.png").rename(folder / "2.PNG")
    Image.open(folder / "3.png").save(folder / "3.Jpeg")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"left by a file manager")
    assert [p.name for p in fids.list_images(folder)] == ["0.png", "1.png", "2.PNG", "3.Jpeg", "3.png"]
    exif = Image.Exif()
    exif[0x0112] = 6  # not turned
    for image in (Image.new("RGBA", (40, 32), (9, 8, 7, 0)), Image.new("P", (40, 32), 3),
                  Image.fromarray(np.full((32, 40), 999, np.uint16))):
        image.save(folder / "0.png", exif=exif)
        expected = reference.ImagePathDataset([folder / "0.png"], np.array)[0]
        assert np.array_equal(next(fids.read_images([folder / "0.png"], 1))[0].permute(1, 2, 0), expected)


def test_bad_statistics(refuses, folders, tmp_path):
    eye, good = np.eye(3), tmp_path / "good.npz"
    np.savez(good, mu=np.zeros(3), sigma=eye)
    for message, mu, sigma in (("NaN or infinite", np.zeros(3), eye * np.nan),
                               ("the shapes are (3,) and (4, 4)", np.zeros(3), np.eye(4)),
                               ("3 and 4 dimensions", np.zeros(4), np.eye(4)),
                               ("not a covariance", np.zeros(3), eye + 2 * eye[[1, 0, 2]]),
                               ("not a covariance", np.zeros(3), eye + np.eye(3, k=1) / 2)):
        np.savez(tmp_path / "bad.npz", mu=mu, sigma=sigma)
        refuses("good.npz", "bad.npz", message=message)
    for message, arrays in (("it should be .npz statistics", {}), ("of -5 images", {"sigma": eye, "n": -5})):
        np.savez(tmp_path / "bad.npz", mu=np.zeros(3), **arrays)
        refuses("good.npz", "bad.npz", message=message)
    for content in (b"", b"no zip at all", good.read_bytes()[:-30]):
        (tmp_path / "bad.npz").write_bytes(content)
        refuses("bad.npz", "good.npz", message="bad.npz can't be read (")
    refuses("missing.npz", "good.npz", message="missing.npz can't be read")
    refuses("good.npz", folders[0], message="3 and 2048 dimensions can't be compared")
    refuses("good.npz", folders[0], "--kid", message="need two folders")


def test_bad_weights_and_options(refuses, folders, weights, tmp_path):
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:-9])
    (tmp_path / "taken.npz").write_bytes(b"")
    for arguments, message in (
            ([*folders, "--fid-weights", "cut.pth"], "cut.pth can't be read (ValueError: its SHA-256 is"),
            ([*folders, "--fid-weights", "missing.pth"], "missing.pth can't be read (FileNotFoundError"),
            (folders, "(URLError: <urlopen error unplugged>): it should be the FID Inception"),
            (["--save-stats", folders[0], "taken.npz"], "exists and is not overwritten"),
            (["--save-stats", folders[0], "no/where.npz"], "is not in an existing folder"),
            (["--save-stats", *folders], "takes a folder of images and the .npz to write"),
            ([*folders, "--batch-size", "0"], "--batch-size 0: must be at least 1"),
            ([*folders, "--device", "cuda:99"], "--device cuda:99 is not available ("),
            ([*folders, "--batch", "3"], "unrecognized arguments: --batch 3 (see --help)")):
        refuses(*arguments, message=message)
    (tmp_path / "hub" / "checkpoints" / fid.URL.rsplit("/", 1)[1]).write_bytes(b"something else")
    refuses(*folders, message="its SHA-256 is")
