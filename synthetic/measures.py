"""Measures of what images show: objects, attributes, digits, and what InfoGAN's codes control."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata


def count_objects(probabilities: torch.Tensor, labels: torch.Tensor, _groups: tuple = ()) -> dict[str, float]:
    """Accuracy as the i-CLEVR course defines it, and stricter views of it.
    probabilities [N, C]; labels [N, 3], ids padded with C. accuracy = requested objects found in the judge's
    top k, over all requested (k: number of objects requested in that image); "exact": share of images with
    all objects found; "accuracy_1" … "accuracy_3": by number of objects.
    """
    k = (labels < probabilities.shape[1]).sum(1)
    top = probabilities.topk(min(labels.shape[1], probabilities.shape[1])).indices
    in_top_k = torch.arange(top.shape[1]) < k[:, None]
    found = ((labels[:, :, None] == top[:, None, :]) & in_top_k[:, None, :]).any(2).sum(1)
    result = {"accuracy": (found.sum() / k.sum()).item(), "exact": (found == k).float().mean().item()}
    for number in range(1, labels.shape[1] + 1):
        if (k == number).any():
            result[f"accuracy_{number}"] = (found[k == number].sum() / k[k == number].sum()).item()
    return result


def decide(probabilities: torch.Tensor, groups: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Probabilities [N, A] → attributes [N, A] of 0 and 1: the likeliest of each group; without groups, each
    attribute from 0.5 on.
    """
    if not groups:
        return (probabilities >= 0.5).long()
    likeliest = [F.one_hot(probabilities[:, list(columns)].argmax(1), len(columns)) for columns in groups]
    return torch.cat(likeliest, 1)


def count_attributes(probabilities: torch.Tensor, labels: torch.Tensor | None,
                     groups: tuple[tuple[int, ...], ...]) -> dict:
    """Agreement with labels [N, A]: "accuracy" (mean over the groups or, without, the attributes), "exact"
    (share of images with all right), "by attribute" (accuracy of each attribute or group). {} without labels.
    """
    if labels is None:
        return {}
    agree = decide(probabilities, groups) == labels
    right = (torch.stack([agree[:, list(c)].all(1) for c in groups], 1) if groups else agree).double()
    exact = right.prod(1).mean().item()
    return {"accuracy": right.mean().item(), "exact": exact, "by attribute": right.mean(0)}


def count_digits(probabilities: torch.Tensor, labels: torch.Tensor | None = None, _groups=()) -> dict:
    """How evenly the ten digits occur: "TV", the total-variation distance of their shares to uniform; "chi2",
    Pearson's against uniform (9 degrees of freedom); "histogram", the shares [10]. With labels: "accuracy".
    """
    counts = probabilities.argmax(1).bincount(minlength=10).double()
    n = counts.sum()
    right = {} if labels is None else {"accuracy": (probabilities.argmax(1) == labels).float().mean().item()}
    return right | {"chi2": ((counts - n / 10).square().sum() / (n / 10)).item(),
                    "TV": ((counts / n - 0.1).abs().sum() / 2).item(), "histogram": counts / n}


def slant_and_width(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slant [N] and stroke width [N], in pixels of 28, of white-on-black digits [N, 1, S, S] in [-1, 1].

    Slant: the ink's lean to the right per unit of height, -μ11 / μ02 of its second moments. Width: ink over
    half the total variation, since a stroke of length l and width w has ink l·w and edges of length 2l. Both
    are NaN for an image without ink.
    """
    ink = images[:, 0].double() / 2 + 0.5
    at = torch.arange(ink.shape[-1], dtype=ink.dtype, device=ink.device)
    mass = ink.sum((1, 2))
    x, y = (ink.sum(1) * at).sum(1) / mass, (ink.sum(2) * at).sum(1) / mass
    x, y = at - x[:, None], at - y[:, None]
    slant = -torch.einsum("nyx,nx,ny->n", ink, x, y) / torch.einsum("nyx,ny->n", ink, y.square())
    padded = F.pad(ink, (1, 1, 1, 1))
    edge = ((padded[:, 1:, :-1] - padded[:, :-1, :-1]).square()
            + (padded[:, :-1, 1:] - padded[:, :-1, :-1]).square()).sqrt().sum((1, 2))
    return slant, 2 * mass / edge * 28 / ink.shape[-1]


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation [...] of [..., N] with [..., N]; 0 where one is constant or has a NaN."""
    a, b = (torch.from_numpy(rankdata(x.numpy(), axis=-1, nan_policy="propagate")) for x in (a, b))
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).nan_to_num(0)


def code_effects(make: Callable[..., torch.Tensor], z_dim: int, n_categories: int, n_continuous: int,
                 g: torch.Generator, n_paths: int = 200, steps: int = 11) -> dict[str, float]:
    """Effect of each of InfoGAN's continuous codes on slant and stroke width.

    make(z, category, continuous) → images. On each path one code goes from -1 to 1 in `steps`; noise,
    category and the other codes are fixed. Returns means over the paths: "code 1 ~ slant", Spearman's
    correlation along the path, and "code 1: change of slant" from end to end (a correlation can be high
    although the change is tiny); and "a code ~ slant" and "~ width", absolute correlations with slant and
    width matched one-to-one to codes so that their sum is largest (0 where no code is left).
    """
    effects = {}
    for c in range(n_continuous):
        z, other = (torch.rand(n_paths, d, generator=g) * 2 - 1 for d in (z_dim, n_continuous))
        category = torch.arange(n_paths) % n_categories
        measured = []
        for value in torch.linspace(-1, 1, steps):
            codes = other.clone()
            codes[:, c] = value
            measured.append(torch.stack(slant_and_width(make(z, category, codes).cpu())))
        for name, values in zip(("slant", "width"), torch.stack(measured, 2), strict=True):
            rho = spearman(torch.arange(steps).expand(n_paths, -1), values)
            effects[f"code {c + 1} ~ {name}"] = rho.mean().item()
            effects[f"code {c + 1}: change of {name}"] = (values[:, -1] - values[:, 0]).nanmean().item()
    return effects | match_codes(effects, n_continuous)


def match_codes(effects: dict[str, float], n_continuous: int) -> dict[str, float]:
    """Match "code K ~ slant" and "code K ~ width" one-to-one, so that one code can't earn both."""
    factors = ("slant", "width")
    strength = torch.tensor([[abs(effects[f"code {c + 1} ~ {name}"]) for name in factors]
                             for c in range(n_continuous)]).view(-1, 2)
    matched = dict(zip(*linear_sum_assignment(strength.T.numpy(), maximize=True), strict=True))
    return {f"a code ~ {name}": strength[matched[k], k].item() if k in matched else 0.0
            for k, name in enumerate(factors)}


def match(shares: torch.Tensor) -> tuple[list[int], float]:
    """Match InfoGAN's categories one-to-one to digits so that they agree most often.

    shares [K, 10] of each category's images that show each digit → the digit of each category (-1: none is
    left), and the share of all images that agrees, "code → digit".
    """
    rows, columns = linear_sum_assignment(shares.numpy(), maximize=True)
    digit = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return [digit.get(k, -1) for k in range(len(shares))], (shares[rows, columns].sum() / len(shares)).item()


def category_digits(make: Callable[..., torch.Tensor], judge, n: int, z_dim: int, n_categories: int,
                    n_continuous: int, g: torch.Generator) -> dict:
    """What digits InfoGAN's categories are, by `n` images of make(z, category, continuous) in all.

    judge: an evaluator.Judge. Returns "shares" [K, 10] and "code → digit", as match() has them.
    """
    category, read = torch.arange(n) % n_categories, []
    for part in category.split(judge.kind.at_once):
        z, continuous = (torch.rand(len(part), d, generator=g) * 2 - 1 for d in (z_dim, n_continuous))
        read.append(judge(make(z, part, continuous)).argmax(1).cpu())
    counts = torch.zeros(n_categories, 10)
    counts.index_put_((category, torch.cat(read)), torch.ones(1), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return {"code → digit": match(shares)[1], "shares": shares}
