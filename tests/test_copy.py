"""Networks and steps can be copied into anyone's code as they stand, with the imports that they use."""
import ast
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import dcgan_mnist
import sngan_iclevr
from tests.conftest import ROOT, TINY, flags

# what copied code may import; the rest of the project (runs, data, pictures, scores) may not be needed
ALLOWED = ("math", "contextlib", "itertools", "collections.abc", "torch", "torch.nn.functional",
           "torch.nn.utils.parametrizations", "common.losses", "common.blocks")
LOOP = """
torch.manual_seed(0)
{networks}
opt_g, opt_d = (torch.optim.Adam(net.parameters(), 1e-3) for net in (G, D))
before = [[p.clone() for p in net.parameters()] for net in (G, D)]
for _ in range(5):
    {steps}
    assert all(v.isfinite() for v in (d | g).values()), (d, g)
for net, weights in zip((G, D), before):
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), weights))
print("trained")
"""
OWN_IMAGES = {  # what README.md says to change for a folder of images
    "load_digits, 32": "load_faces, False", "Data, load_digits": "Data, load_faces",
    "    pairs: int = 5": """    image_size: int = 32
    crop: int = 0
    attributes: str = ""
    skip_bad_images: bool = False
    pairs: int = 5""",
    "nn.ConvTranspose2d(h, 1, 4, 2, 1)": "nn.ConvTranspose2d(h, 3, 4, 2, 1)",
    "nn.Conv2d(1, h, 4, 2, 1)": "nn.Conv2d(3, h, 4, 2, 1)",
}
DCGAN = dict(networks='G, D = Generator("conv", 8, 4), Discriminator("conv", 4)',
             steps="""fake = G(torch.randn(6, 8))
    d = d_step(D, opt_d, torch.rand(6, 1, 32, 32), fake)
    g = g_step(D, opt_g, torch.rand(6, 1, 32, 32), fake)""")
SNGAN = dict(networks="""from types import SimpleNamespace
cfg = SimpleNamespace(z_dim=8, flip_labels=0.1, add_noise=True, augment=0.1, loss="paired", aux_weight=1.0,
                      gamma=1.0)
G, D = Generator(24, 8, 2, 32), Discriminator(24, 2, 32, "cnn", "spectral", "linear")""",
             steps="""real, labels = torch.rand(6, 3, 32, 32), torch.randint(25, (6, 3))
    d = d_step(cfg, G, D, opt_d, real, labels)
    g = g_step(cfg, G, D, opt_g, real, labels)""")


def copied(module, names: list[str]) -> str:
    """The source of these definitions, and the allowed ones of the script's imports that they use."""
    definitions = "\n\n".join(inspect.getsource(getattr(module, name)) for name in names)
    used = {node.id for node in ast.walk(ast.parse(definitions)) if isinstance(node, ast.Name)}
    lines = []
    for node in ast.parse(inspect.getsource(module)).body:
        for alias in getattr(node, "names", []):
            path = getattr(node, "module", "") or alias.name
            if (alias.asname or alias.name) in used and {path, f"{path}.{alias.name}"} & set(ALLOWED):
                node.names = [alias]
                lines.append(ast.unparse(node))
    return "\n".join([*lines, definitions])


@pytest.mark.parametrize("module, names, code", [
    (dcgan_mnist, "Generator Discriminator d_step g_step", DCGAN),
    (sngan_iclevr, "init_xavier residual_conv SetEmbedding ConditionalBatchNorm UpBlock DownBlock "
     "widths Generator Discriminator d_step g_step adversarial perturbed", SNGAN)], ids=["dcgan", "sngan"])
def test_copied_networks_and_steps_train(tmp_path, module, names, code):
    text = copied(module, names.split()) + LOOP.format(**code)
    (tmp_path / "copied.py").write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "copied.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "trained\n", done.stderr


def test_dcgan_of_a_folder_of_images(tmp_path):
    (tmp_path / "mine").mkdir()
    for i in range(40):
        Image.new("RGB", (30 + i, 60), (6 * i, 0, 100)).save(tmp_path / "mine" / f"{i}.png")
    source = (ROOT / "dcgan_mnist.py").read_text(encoding="utf-8")
    for old, new in OWN_IMAGES.items():
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "dcgan_mine.py").write_text(source, encoding="utf-8")
    settings = flags(TINY["dcgan_mnist"] | dict(data="mine", iters=2, sample_every=1))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "dcgan_mine.py", *settings], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grid = np.asarray(Image.open(tmp_path / "runs" / "dcgan_mine" / "samples" / "step_0000002.png"))
    assert (grid[..., 0] != grid[..., 2]).any()  # in colour
