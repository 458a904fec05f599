"""Networks against the report's numbers, and their parts against a formula written out."""
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import acgan_celeba as acgan
import cdcgan_iclevr as cdcgan
import dcgan_mnist as dcgan
import infogan_mnist as infogan
import sngan_iclevr as sngan
import vae_celeba as vae
from common.blocks import cached_spectral_norm, multi_hot
from tests.conftest import TINY

SCRIPTS = {name: importlib.import_module(name) for name in TINY}
NULL = 24
SETS = torch.tensor([[3, NULL, NULL], [0, 5, 23], [1, 2, NULL]])
# of a script, or a copy of its definitions, and its settings
BUILD = {
    "dcgan_mnist": lambda m, c: (m.Generator(c.net, c.latent_dim, c.hidden_dim),
                                 m.Discriminator(c.net, c.hidden_dim, c.d_norm)),
    "acgan_celeba": lambda m, c: (m.Generator(15, c.z_dim, c.ch, c.image_size, c.g_cond),
                                  m.Discriminator(15, c.ch, c.image_size, c.d_norm, c.d_cond)),
    "cdcgan_iclevr": lambda m, c: (m.Generator(24, c.z_dim, c.ch, c.image_size, c.g_cond),
                                   m.Discriminator(24, c.ch, c.image_size, c.d_cond, c.d_norm,
                                                   c.aux_weight > 0)),
    "sngan_iclevr": lambda m, c: (m.Generator(24, c.z_dim, c.ch, c.image_size, c.g_net),
                                  m.Discriminator(24, c.ch, c.image_size, c.d_net, c.d_norm, c.label_embed,
                                                  c.aux_weight > 0)),
}


def build(name: str, **fields) -> tuple:
    """G and D of a script, and its settings: TINY but for the fields given."""
    torch.manual_seed(0)
    cfg = SCRIPTS[name].Config(**TINY[name] | dict(precision="fp32") | fields)
    return *BUILD[name](SCRIPTS[name], cfg), cfg


def labels_of(name: str, n: int) -> list[torch.Tensor]:
    """What the networks of a script are given beside z or images."""
    if name == "acgan_celeba":
        return [torch.rand(n, 15).round()]
    return [] if name == "dcgan_mnist" else [torch.rand(n, 24).argsort(1)[:, :3]]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------- the report's numbers

def test_convolutions_are_the_report_s():
    for net, channels, normed in [
            (dcgan.Generator("conv", 100, 16), [100, 64, 32, 16, 1], slice(1, -1)),
            (dcgan.Discriminator("conv", 16), [1, 16, 32, 64, 1], slice(2, -1)),
            (infogan.Generator(74, 64, 64), [74, 512, 256, 128, 64, 1], slice(1, -1)),
            (infogan.Body(64, 64), [1, 64, 128, 256, 512], slice(2, None)),
            (acgan.Generator(15, 128, 32, 128, "input"), [512, 256, 128, 64, 32, 3], slice(0, -1)),
            (acgan.Discriminator(15, 32, 128, "batch", "concat"), [3, 32, 64, 128, 256, 512], slice(2, None)),
            (cdcgan.Generator(24, 100, 64, 64, "joint"), [124, 512, 256, 128, 64, 3], slice(1, -1)),
            (cdcgan.Discriminator(24, 64, 64, "plane", "batch", False), [4, 64, 128, 256, 512, 1],
             slice(2, -1)),
            (vae.encoder(128, 32, 128), [3, 32, 64, 128, 256, 512, 256], slice(1, -1)),
            (vae.decoder(128, 32, 128), [128, 512, 256, 128, 64, 32, 3], slice(1, -1))]:
        convs = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert [convs[0].in_channels, *(m.out_channels for m in convs)] == channels
        assert {m.kernel_size for m in convs} == {(4, 4)}
        assert [m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == channels[normed]
        assert {m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)} <= {0.2}
        if type(net).__module__ in ("torch.nn.modules.container", "infogan_mnist"):  # initialised elsewhere
            continue
        for module in [m for m in net.modules() if getattr(m, "weight", None) is not None]:
            norm = int(isinstance(module, nn.BatchNorm2d))
            assert module.weight.mean().item() == pytest.approx(norm, abs=0.02)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.5 if norm else 0.2)
            assert module.bias is None or not module.bias.any()


def test_other_layers_are_the_report_s():
    G = sngan.Generator(24, 128, 64, 64, "resnet")
    plain = sngan.Generator(24, 128, 64, 64, "cnn")
    shapes = [conv.weight.shape[:2] for conv in (*plain.convs, *plain.layers[2::3])]
    assert shapes == [(512, 512), (513, 512), (512, 256), (256, 128), (128, 3)]
    D = sngan.Discriminator(24, 64, 64, "resnet", "none", "linear", False)
    assert [b.conv1.weight.shape[:2] for b in G.blocks] == [(512, 1024), (256, 512), (128, 256), (64, 128)]
    assert [b.conv2.out_channels for b in D.layers] == [64, 128, 256, 512, 1024]
    assert D.embed.weight.shape == (25, 1024) and D.join.weight.shape == (1024, 3 * 1024)
    Q = infogan.QHead(512, 10, 2)
    layers = [tuple(m.weight.shape) for m in Q.modules() if hasattr(m, "weight")]
    assert layers == [(100, 8192), (10, 100), (10, 10, 1, 1), (2, 10, 1, 1), (2, 10, 1, 1)]
    G, D = acgan.Generator(15, 128, 32, 128, "maps"), acgan.Discriminator(15, 32, 128, "batch", "concat")
    assert G.first.weight.shape == (512 * 4 * 4, 128 + 15)
    assert D.score.in_features == 512 * 4 * 4 + 15 and D.attributes.weight.shape == (15, 512 * 4 * 4)


@pytest.mark.parametrize("name, fields", [
    ("dcgan_mnist", {}), ("dcgan_mnist", dict(net="mlp")), ("dcgan_mnist", dict(net="mlp", d_norm="none")),
    ("acgan_celeba", {}), ("acgan_celeba", dict(d_norm="none", d_cond="projection", g_cond="input")),
    ("cdcgan_iclevr", {}),
    ("cdcgan_iclevr", dict(g_cond="objects", d_cond="projection", d_norm="none", aux_weight=1.0)),
    ("sngan_iclevr", {}), ("sngan_iclevr", dict(d_net="cnn", label_embed="sum", aux_weight=1.0)),
    ("sngan_iclevr", dict(g_net="cnn", d_net="cnn", d_norm="none")), ("sngan_iclevr", dict(d_norm="none")),
], ids=str)
def test_images_have_the_size_asked_for_and_each_kind_of_d_scores_them(name, fields):
    sizes = [{"image_size": size} for size in (32, 64, 128)]
    for size in [{}] if name == "dcgan_mnist" else sizes:
        G, D, cfg = build(name, **fields, **size)
        y, size = labels_of(name, 3), size.get("image_size", 32)
        x = G(torch.randn(3, cfg.z_dim if y else cfg.latent_dim), *y)
        assert x.shape == (3, 1 + 2 * bool(y), size, size) and x.abs().max() <= 1
        score, logits = D(x, *y) if name == "acgan_celeba" else (D(x, *y).view(3, -1)[:, 0], None)
        n = {"acgan_celeba": 15}.get(name, 24 if vars(cfg).get("aux_weight") else None)
        if "iclevr" in name and cfg.aux_weight:
            logits = D.classify(x)
        assert score.shape == (3,) and (logits is None if n is None else logits.shape == (3, n))
        assert any(map(parametrize.is_parametrized, D.modules())) == (cfg.d_norm == "spectral")
        batch_norms = any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in D.modules())
        assert batch_norms == (cfg.d_norm == "batch")


# ---------------------------------------------------------------------- spectral norm

@pytest.mark.parametrize("name, fields, free, layers", [
    ("sngan_iclevr", {}, "join", 15), ("sngan_iclevr", dict(d_net="cnn"), "join", 6),
    ("acgan_celeba", dict(d_norm="spectral"), "attributes", 5),
    ("acgan_celeba", dict(d_norm="spectral", d_cond="projection"), "attributes", 6)], ids=str)
def test_spectral_norm_reaches_one_on_every_layer_of_d_but_one(name, fields, free, layers):
    """Each layer was initialised before it was wrapped, which would lose it."""
    _, D, _ = build(name, **fields, ch=4)
    kinds = nn.Conv2d, nn.Linear, nn.Embedding
    weighted = {key: m for key, m in D.named_modules() if isinstance(m, kinds)}
    assert len(weighted) == layers and not parametrize.is_parametrized(weighted.pop(free))
    for module in weighted.values():
        raw = module.parametrizations.weight.original
        if name == "acgan_celeba":
            assert raw.std().item() == pytest.approx(0.02, rel=0.3)
        else:  # Glorot & Bengio 2010, eq. 16, times √2 in branches
            fan = (raw.shape[0] + raw.shape[1]) * raw[0, 0].numel()
            bound = math.sqrt((2 if raw[0, 0].numel() > 1 else 1) * 6 / fan)
            assert 0.8 * bound < raw.abs().max() <= bound
    for _ in range(60):
        with cached_spectral_norm(D):
            pass
    for module in weighted.values():
        assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


# ---------------------------------------------------------------------- SNGAN's blocks

def randomised(net: nn.Module) -> nn.Module:
    """Batch norms and label tables away from their initial values, null rows kept."""
    for module in net.modules():
        if isinstance(module, sngan.ConditionalBatchNorm):
            nn.init.normal_(module.gamma, 1, 0.3)
            nn.init.normal_(module.beta, 0, 0.3)
            for table in (module.gain, module.bias):
                nn.init.normal_(table.weight[:NULL], 0, 0.5)
    return net


def test_conditional_batch_norm_is_its_formula():
    norm, x = randomised(sngan.ConditionalBatchNorm(5, 24)), torch.randn(4, 5, 3, 3)
    ids = torch.tensor([[1, 2, 3], [4, 5, NULL], [6, NULL, NULL], [NULL, NULL, NULL]])
    out, plain = norm(x, ids), F.batch_norm(x, None, None, training=True)
    for b in range(4):
        gain, bias = norm.gamma.clone(), norm.beta.clone()
        for i in ids[b].tolist():
            if i != NULL:
                gain, bias = gain + norm.gain.weight[i], bias + norm.bias.weight[i]
        torch.testing.assert_close(out[b], plain[b] * gain[:, None, None] + bias[:, None, None])


def test_up_block_is_the_paper_s_order_of_layers():
    block, x, ids = randomised(sngan.UpBlock(6, 4, 24)), torch.randn(3, 6, 4, 4), torch.randint(25, (3, 3))
    up = nn.Upsample(scale_factor=2)
    h = block.conv1(up(F.leaky_relu(block.bn1(x, ids), 0.01)))
    expected = block.conv2(F.leaky_relu(block.bn2(h, ids), 0.01)) + block.shortcut(up(x))
    torch.testing.assert_close(block(x, ids), expected)
    assert expected.shape == (3, 4, 8, 8)


@pytest.mark.parametrize("first", [False, True])
def test_down_block_is_the_paper_s_order_of_layers(first):
    block = sngan.DownBlock(3, 8, spectral_norm, first=first).eval()  # eval: no power iteration
    x = torch.randn(2, 3, 8, 8)
    h = block.conv2(F.leaky_relu(block.conv1(x if first else F.leaky_relu(x, 0.01)), 0.01))
    expected = F.avg_pool2d(h, 2) + F.avg_pool2d(block.shortcut(x), 2)
    torch.testing.assert_close(block(x), expected)
    assert block.conv1.out_channels == (8 if first else 3)


# ---------------------------------------------------------------------- labels in G and in D

@pytest.mark.parametrize("net", ["resnet", "cnn"])
def test_labels_are_a_set_to_sngan_s_g(net):
    G, z = randomised(sngan.Generator(24, 9, 4, 32, net)).eval(), torch.randn(1, 9)
    image = G(z, torch.tensor([[1, 9, NULL]]))
    for other in ([2, 9, NULL], [1, 10, NULL], [1, 9, 3], [1, NULL, NULL]):
        assert (G(z, torch.tensor([other])) - image).abs().max() > 1e-3
    z = z.roll(3, 1) if net == "cnn" else z  # each object keeps its third
    torch.testing.assert_close(G(z, torch.tensor([[NULL, 1, 9]])), image)


@pytest.mark.parametrize("net, label_embed", [("resnet", "linear"), ("resnet", "sum"), ("cnn", "sum")])
def test_sngan_s_score_is_its_formula_and_null_labels_add_exactly_zero(net, label_embed):
    D = sngan.Discriminator(24, 4, 32, net, "spectral", label_embed, True).eval()
    x = torch.randn(3, 3, 32, 32)
    h, vectors = D.layers(x), D.embed(SETS)
    h = F.leaky_relu(h).sum((2, 3)) if net == "resnet" else h.flatten(1)
    assert torch.equal(vectors.any(2), SETS < NULL)
    label = vectors.sum(1)
    if label_embed == "linear":  # where the order counts
        label = torch.einsum("nkf,okf->no", vectors, D.join.weight.unflatten(1, (3, -1)))
    torch.testing.assert_close(D(x, SETS), D.linear(h)[:, 0] + (label * h).sum(1))
    assert torch.equal(D(x, torch.full((3, 3), NULL)), D.linear(h)[:, 0])


def test_sngan_s_objects_have_a_third_of_z_each_and_one_of_them_is_in_front_at_each_place():
    G, inputs = sngan.Generator(24, 6, 4, 32, "cnn").eval(), []
    G.layers.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    z = torch.tensor([[5.0, 1, 9, 1, 9, 1], [-1, 0, 3, 0, 2, 0], [0, 1, 4, 0, 9, 0]])
    G(z, SETS)
    order = [[0], [2, 0, 1], [1, 0]]  # largest first number first; those of absent objects don't count
    for i, ranks in enumerate(order):
        maps = G.first(z[i, :2 * len(ranks)].view(-1, 2)).unflatten(1, (-1, 4, 4))
        for norm, conv in zip(G.norms, G.convs, strict=True):
            ids = torch.stack([SETS[i, :len(ranks)], 24 + torch.tensor(ranks)])
            gain, bias = (e.weight[ids].sum(0)[..., None, None] for e in (norm.gain, norm.bias))
            maps = norm.norm(maps) * (1 + gain) + bias
            maps = conv(F.leaky_relu(maps))
        share = maps[:, :1].exp() / maps[:, :1].exp().sum(0)
        torch.testing.assert_close(inputs[0][i], (share * maps[:, 1:]).sum(0))
    assert sngan.Generator(24, 8, 4, 32, "cnn")(torch.randn(3, 8), SETS).shape == (3, 3, 32, 32)


def test_cdcgan_s_labels_join_z_together_or_each_a_third_of_it_with_one_object_in_front():
    z = torch.tensor([[5.0, 1, 9, 1, 9, 1], [-1, 0, 3, 0, 2, 0], [0, 1, 4, 0, 9, 0]])
    order = [[0], [2, 0, 1], [1, 0]]  # largest first number first; those of absent objects don't count
    for cond in ("joint", "objects"):
        G, inputs = cdcgan.Generator(24, 6, 4, 64, cond).eval(), []
        nn.init.normal_(G.first[-1].weight)  # so that shares differ
        G.layers.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        G(z, SETS)
        for i, ranks in enumerate(order):
            parts = [torch.cat([z[i, 2 * k:2 * k + 2], torch.eye(25)[SETS[i, k]], torch.eye(3)[rank]])
                     for k, rank in enumerate(ranks)]
            if cond == "joint":
                parts = [torch.cat([z[i], multi_hot(SETS[i:i + 1], 24)[0]])]
            maps = G.first(torch.stack(parts)[..., None, None])
            if cond == "objects":
                maps = maps[:, :1].exp() / maps[:, :1].exp().sum(0) * maps[:, 1:]
            torch.testing.assert_close(inputs[0][i], maps.sum(0))
    assert cdcgan.Generator(24, 8, 4, 32, "objects")(torch.randn(3, 8), SETS).shape == (3, 3, 32, 32)


def test_cdcgan_s_labels_are_a_plane_beside_the_image_or_a_projection():
    x, inputs, hot = torch.randn(3, 3, 64, 64), [], multi_hot(SETS, 24)
    D = cdcgan.Discriminator(24, 4, 64, "plane", "batch", False)
    D.layers.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    D(x, SETS)
    linear = D.plane[0]
    assert linear.weight.shape == (64 * 64, 24) and torch.equal(inputs[0][:, :3], x)
    torch.testing.assert_close(inputs[0][:, 3], (hot @ linear.weight.T + linear.bias).view(3, 64, 64))
    D = cdcgan.Discriminator(24, 4, 64, "projection", "none", True)
    h = D.layers(x)
    expected = D.last(h).flatten() + torch.einsum("ny,fy,nf->n", hot, D.embed.weight, h.flatten(1))
    torch.testing.assert_close(D(x, SETS), expected)


@pytest.mark.parametrize("cond", ["maps", "input"])
def test_acgan_s_attributes_enter_every_layer_of_g_as_maps_and_only_the_first_as_input(cond):
    G, z, inputs = acgan.Generator(15, 4, 2, 64, cond), torch.randn(6, 4), []
    y, = labels_of("acgan_celeba", 6)
    for layer in (G.first, *G.convs):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    G(z, y)
    assert torch.equal(inputs[0], torch.cat([z, y], 1))
    for h, width in zip(inputs[1:], (32, 16, 8, 4), strict=True):
        assert h.shape[1] == width + (15 if cond == "maps" else 0)
        assert torch.equal(h[:, width:], y[:, :h.shape[1] - width, None, None].expand(-1, -1, *h.shape[2:]))


@pytest.mark.parametrize("cond", ["concat", "projection"])
def test_acgan_s_concat_shifts_the_score_and_projection_weighs_the_features(cond):
    D, x, features = acgan.Discriminator(15, 2, 64, "batch", cond), torch.randn(5, 3, 64, 64), []
    y, = labels_of("acgan_celeba", 5)
    D.attributes.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    (one, logits), (other, again) = D(x, y), D(x, y.roll(1, 1))
    assert torch.equal(logits, again)  # the attributes' logits are of the features alone
    if cond == "concat":
        torch.testing.assert_close(other - one, (y.roll(1, 1) - y) @ D.score.weight[0, -15:])
    else:
        projection = torch.einsum("na,fa,nf->n", y, D.embed.weight, features[0])
        torch.testing.assert_close(one, D.score(features[0])[:, 0] + projection)


@pytest.mark.parametrize("name, fields, net", [
    ("acgan_celeba", dict(d_cond="projection"), "score"), ("sngan_iclevr", {}, "linear"),
    ("cdcgan_iclevr", dict(d_cond="projection", d_norm="none"), "last"),
    ("sngan_iclevr", dict(d_net="cnn"), "linear")], ids=str)
def test_projection_is_summed_in_fp32_under_autocast(name, fields, net):
    """Of many products of both signs, bf16 would keep two digits."""
    _, D, _ = build(name, **fields | dict(ch=8))
    x, y, seen = torch.randn(4, 3, 32, 32), labels_of(name, 4), {}
    for key in (net, "embed", "join"):
        if isinstance(module := getattr(D, key, None), nn.Module):
            module.register_forward_hook(lambda _m, given, out, key=key: seen.update({key: (given[0], out)}))
    with torch.autocast("cpu", torch.bfloat16):
        score = D(x, *y)[0] if name == "acgan_celeba" else D(x, *y)
    (h, alone), vector = seen[net], seen.get("join", seen["embed"])[1]
    assert h.dtype == torch.bfloat16
    expected = alone.flatten().double() + (vector.double() * h.flatten(1).double()).sum(1)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-6)
