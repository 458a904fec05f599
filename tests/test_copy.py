"""Networks and steps can be copied into anyone's code as they stand."""
import ast
import inspect
import os
import subprocess
import sys

import pytest

import dcgan_mnist
import sngan_iclevr
from tests.conftest import ROOT

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
DCGAN = dict(networks='G, D = Generator("conv", 8, 4), Discriminator("conv", 4)',
             steps="""fake = G(torch.randn(6, 8))
    d = d_step(D, opt_d, torch.rand(6, 1, 32, 32), fake)
    g = g_step(D, opt_g, fake)""")
SNGAN = dict(networks="""cfg = SimpleNamespace(z_dim=8, flip_labels=0.1, add_noise=True, relativistic=True)
G, D = Generator(24, 8, 2, 32), Discriminator(24, 2, 32, "linear")""",
             steps="""real, labels = torch.rand(6, 3, 32, 32), torch.randint(25, (6, 3))
    d = d_step(cfg, G, D, opt_d, real, labels)
    g = g_step(cfg, G, D, opt_g, real, labels)""")


@pytest.mark.parametrize("module, names, code", [
    (dcgan_mnist, "Generator Discriminator d_step g_step", DCGAN),
    (sngan_iclevr, "init_xavier residual_conv SetEmbedding ConditionalBatchNorm UpBlock DownBlock widths Generator "
     "Discriminator d_step g_step noisy", SNGAN),
])
def test_copied_networks_and_steps_train(tmp_path, module, names, code):
    source = inspect.getsource(module)
    body = ast.parse(source).body
    parts = [ast.get_source_segment(source, node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)
             and not ast.get_source_segment(source, node).startswith(("import evaluator", "from common.run"))]
    parts += [ast.get_source_segment(source, n) for n in body if getattr(n, "name", None) in names.split()]
    assert len(parts) > len(names.split())
    # a name used in an annotation only, which whoever copies a step deletes or keeps as they like
    text = "\n".join(["from __future__ import annotations", "from types import SimpleNamespace", *parts])
    (tmp_path / "copied.py").write_text(text + LOOP.format(**code), encoding="utf-8")
    done = subprocess.run([sys.executable, "copied.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "trained\n", done.stderr
