"""VAE on faces: its loss against torch.distributions, its reconstructions, and arithmetic with attributes."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Normal, kl_divergence

import vae_celeba
from common.datasets import Data, load_faces
from common.files import UserError
from tests.conftest import Reader, judge_of, rows_of, run_here, settings


def test_z_is_reparametrised_and_the_loss_is_its_parts_per_pixel_value():
    torch.manual_seed(0)
    vae, x, outputs, inputs = vae_celeba.VAE(4, 1, 32), torch.rand(8, 3, 32, 32), [], []
    vae.encoder.register_forward_hook(lambda *args: outputs.append(args[2].detach()))
    vae.decoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    vae.decoder.register_forward_hook(lambda *args: outputs.append(args[2].detach()))
    opt, cfg = torch.optim.Adam(vae.parameters()), vae_celeba.Config(kl_weight=0.5, precision="fp32")
    torch.manual_seed(1)
    found = vae_celeba.vae_step(vae, opt, x, cfg)
    (mean, log_variance), reconstruction = outputs[0].chunk(2, 1), outputs[1]
    kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    mse = (reconstruction - x).square().mean()
    torch.testing.assert_close((found["mse"], found["kl"]), (mse, kl), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["loss"], found["mse"] + 0.5 * found["kl"] / (3 * 32 * 32))
    assert opt.state.keys() == set(vae.parameters())  # all are updated
    torch.manual_seed(1)
    torch.testing.assert_close(inputs[0], torch.normal(mean, (log_variance / 2).exp()))


def test_scores_and_directions_are_of_the_checkpoint(here):
    folder = run_here("vae_celeba", iters=6, eval_every=3, precision="fp32")
    vae, data = vae_celeba.VAE(4, 1, 32), load_faces(settings(n_synthetic=300))
    vae.load_state_dict(torch.load(folder / "best.pt", weights_only=True)["vae"])
    vae.eval().requires_grad_(False)
    assert {"loss", "mse", "kl"} < rows_of(folder)[0].keys()
    x = data.test_images / 127.5 - 1
    mean, log_variance = vae.encode(x)
    scores = json.loads((folder / "scores.json").read_text())
    assert list(scores["summary"]) == ["FD (judge)", "FD of reconstructions", "MSE", "attributes kept",
                                       "attribute added"]
    best = scores["best"]
    assert best["attributes kept"][0] == pytest.approx(sum(best["by attribute"][0]) / 4)
    mse = (vae.decoder(mean) - x).square().mean().item()
    assert best["MSE"][0] == pytest.approx(mse, rel=1e-4)
    kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert best["KL, nats"][0] == pytest.approx(kl.item(), rel=1e-3)  # of 10⁻⁵ nats
    z, blue = vae.encode(data.images / 127.5 - 1)[0], data.labels[:, 4] == 1
    torch.testing.assert_close(vae_celeba.directions(vae, data)[4], z[blue].mean(0) - z[~blue].mean(0),
                               atol=1e-5, rtol=1e-4)
    with Image.open(folder / "interpolation.png") as i, Image.open(folder / "arithmetic.png") as a:
        assert i.width == 10 * 66 + 2 and a.height > 15 * 66 and a.width > 8 * 66 + 50  # labels on the left


def test_what_adding_an_attribute_does_is_counted():
    levels = torch.tensor([0, 255, 51, 204])  # -1, 1, -0.6, 0.6: the bright ones are 1.6 brighter on average
    images = levels[:, None, None, None].expand(-1, 3, 8, 8).byte()
    labels = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    test = torch.tensor([0, 20, 110, 140]).view(4, 1, 1, 1).expand(-1, 3, 8, 8).byte()
    data = Data("", "faces", "", images, labels, ("bright", "all"), "", test, torch.tensor([[0.0, 1.0]] * 4))
    # the latent is an image's mean; the judge finds the first attribute in images brighter than 0
    net = SimpleNamespace(parameters=lambda: iter([torch.zeros(1)]),
                          encode=lambda x: (x.mean((2, 3))[:, :1], torch.zeros(len(x), 1)),
                          decoder=lambda z: z[..., None, None].expand(-1, 3, 8, 8))
    judge = judge_of("faces", Reader(lambda x: F.pad(1.0 * (x.mean((2, 3))[:, :1] > 0), (0, 1), value=1)))
    shares = vae_celeba.add_attributes(net, data, judge)
    assert shares == {"bright": (0.25, 1.0)}  # all have the other: none lack it
    data.labels = labels.flip(1)  # now every training image is "bright": nothing to tell it by
    assert vae_celeba.add_attributes(net, data, judge) == {"bright": (0.25, 0.25)}


def test_a_folder_of_images_needs_no_table(here, capsys):
    (here / "my pictures").mkdir()
    for i in range(40):
        image = Image.new("RGB", (20 + i, 50 - i), (i, 100, 200))
        image.save(here / "my pictures" / (f"picture {i}.JPG" if i % 2 else f"{i}.png"))
    (here / "my pictures" / "notes.txt").write_text("not an image")
    folder = run_here("vae_celeba", iters=2, data="my pictures")
    assert "my pictures (my pictures), 36 training images" in (out := capsys.readouterr().out)
    assert "no judge and no scores: the images have no labels" in out
    assert (folder / "reconstructions.png").exists() and not (folder / "scores.json").exists()
    with pytest.raises(UserError, match="my pictures/list_attr_celeba.txt can't be read"):
        load_faces(settings(data="my pictures"))  # as the ACGAN does, which needs labels
