"""Scores by hand, judges of both origins, and what is refused."""
import numpy as np
import pytest
import scipy
import torch
import torchvision
from torch import nn

import evaluator
from common import fid
from common.datasets import Data, load_faces, load_iclevr, to_float
from common.errors import NotFinite, UserError
from synthetic.digits import render
from tests.conftest import Reader, get_judge, judge_of, settings

CPU = torch.device("cpu")


def course_checkpoint(path, n_classes=24):
    """A file laid out as the i-CLEVR course's evaluator loads it."""
    net = torchvision.models.resnet18(weights=None)
    net.fc = nn.Sequential(nn.Linear(512, n_classes), nn.Sigmoid())
    torch.save({"model": net.state_dict()}, path)
    return net.eval()


def test_count_objects_by_hand():
    labels = torch.tensor([[3, 24, 24], [1, 2, 24], [5, 6, 7], [0, 8, 9]])
    scores = torch.zeros(4, 24)
    scores[0, [3, 4]] = torch.tensor([0.2, 0.1])  # 1 of 1, however unsure
    scores[1, [1, 9, 2]] = torch.tensor([0.9, 0.8, 0.7])  # top 2 are 1 and 9: 1 of 2
    scores[2, [7, 6, 5]] = torch.tensor([0.9, 0.8, 0.7])  # 3 of 3
    scores[3, [1, 2, 9]] = 1.0  # 1 of 3
    result = evaluator.count_objects(scores, labels)
    assert result["accuracy"] == pytest.approx(6 / 9)
    assert result["exact"] == pytest.approx(2 / 4)
    assert result["accuracy_1"] == 1 and result["accuracy_2"] == 0.5
    assert result["accuracy_3"] == pytest.approx(4 / 6)
    few = evaluator.count_objects(torch.tensor([[0.1, 0.9]] * 2), torch.tensor([[0, 2, 2], [0, 1, 2]]))
    assert few == {"accuracy": pytest.approx(2 / 3), "exact": 0.5, "accuracy_1": 0, "accuracy_2": 1}


def test_score_sets_means_over_draws_of_z():
    sets = {"one": torch.tensor([[0, 24, 24], [1, 24, 24]])}
    used = []

    def sample(z, labels):
        used.append(z.clone())
        return z[:, :1, None, None] * torch.ones(1, 3, 64, 64)

    # finds object 1 in bright images, object 0 in dark ones
    bright = Reader(lambda x: nn.functional.one_hot((x[:, 0, 0, 0] > 0).long(), 24).float())
    judge = judge_of("scenes", bright)
    state = torch.get_rng_state()
    result = evaluator.score_sets(sample, 4, judge, sets, draws=6, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    right = torch.stack([(z[:, 0] > 0).long() == torch.tensor([0, 1]) for z in used]).float().mean(1)
    assert result["accuracy one"] == pytest.approx((right.mean().item(), right.std().item()))
    assert right.std() > 0 and not torch.equal(used[0], used[1])
    first = [z.clone() for z in used]
    used.clear()
    evaluator.score_sets(sample, 4, judge, sets, draws=6, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, used, strict=True))


def test_the_course_s_checkpoint_is_used_as_it_is(tmp_path):
    net = course_checkpoint(tmp_path / "checkpoint.pth")
    judge = get_judge(data_of(24), judge=tmp_path / "checkpoint.pth")
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(judge(x), net(x))
    assert "not known" in judge.title and judge.held_out is None
    assert judge(torch.zeros(2, 3, 32, 32)).shape == (2, 24)  # brought to 64×64


def data_of(n_classes):
    return settings(classes=tuple(map(str, range(n_classes))), kind="scenes")


def test_refused_judges(tmp_path):
    course_checkpoint(tmp_path / "23.pth", 23)
    torch.save({"weights": 1}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    state = torch.load(tmp_path / "23.pth", weights_only=True)["model"]
    state = {k: v for k, v in state.items() if not k.startswith("layer3")}
    state["fc.0.weight"], state["fc.0.bias"] = torch.zeros(24, 512), torch.zeros(24)
    torch.save({"model": state}, tmp_path / "part.pth")
    for name, message in (("23.pth", "23 classes, the data has 24"), ("other.pth", "should be a judge"),
                          ("text.pth", "should be a judge"), ("part.pth", "should be a ResNet-18"),
                          ("none.pth", "FileNotFoundError")):
        with pytest.raises(UserError, match=message) as error:
            get_judge(data_of(24), judge=tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert get_judge(data_of(24), judge="none") is None
    with pytest.raises(UserError, match="there is no judge"):
        evaluator.get_judge(settings(judge="none", fid_weights="weights.pth"), data_of(24), CPU)


@pytest.fixture(scope="module")
def digits():
    images, labels, _ = render(1400)
    return Data("digits", "digits", "", images[:1000], labels[:1000], tuple("0123456789"), "x", images[1000:],
                labels[1000:])


@pytest.mark.parametrize("kind, width, steps, least", [  # by chance 0.1, 0.1 and 0.73
    ("scenes", 8, 60, 0.2), ("digits", 16, 150, 0.8), ("faces", 8, 80, 0.85)])
def test_judges_learn_are_kept_and_leave_random_states_alone(digits, monkeypatch, kind, width, steps, least):
    faces = settings(attributes="blonde hair,black hair,with glasses", n_synthetic=400)
    data = {"scenes": lambda: load_iclevr(settings(n_scenes=30)), "digits": lambda: digits,
            "faces": lambda: load_faces(faces)}[kind]()
    state = torch.get_rng_state()
    judge = get_judge(data, width, steps)
    assert torch.equal(torch.get_rng_state(), state)
    images, labels, held_out, their_labels = data.split()
    learnt, found = judge(to_float(images)), judge(to_float(held_out))
    assert judge.kind.measure(learnt, labels, data.groups)["accuracy"] > least
    accuracy = judge.kind.measure(found, their_labels, data.groups)["accuracy"]
    assert judge.held_out["accuracy"] == pytest.approx(accuracy)
    assert judge.title == f"{judge.kind.name} of width {width}, held-out accuracy {accuracy:.4f}"
    monkeypatch.setattr(evaluator, "train_judge", None)
    assert torch.equal(get_judge(data, width, steps)(to_float(held_out)), found)


def test_too_few_scenes_for_a_judge_are_refused(iclevr):
    with pytest.raises(UserError, match="fewer than 10 scenes"):
        evaluator.train_judge(load_iclevr(settings(data=str(iclevr))), 8, 2, CPU)


def test_augmentation_moves_whole_images():
    torch.manual_seed(0)
    x = torch.zeros(300, 3, 32, 32)
    x[:, :, 8, 5] = 1
    y = evaluator.augment(x, mirror=True)
    at = y[:, 0].flatten(1).argmax(1)
    rows, cols = at // 32, at % 32
    assert y.shape == x.shape and set(rows.tolist()) == set(range(6, 11))
    assert set(cols.tolist()) == set(range(3, 8)) | set(range(24, 29))  # 5 or, mirrored, 26; ± 2
    cols = evaluator.augment(x, mirror=False)[:, 0].flatten(1).argmax(1) % 32
    assert set(cols.tolist()) == set(range(3, 8))  # a mirrored digit is none
    torch.testing.assert_close(y.amax(1) > 0.5, y.amin(1) > 0.5)  # all three channels alike


# ------------------------------------------------------------------------------------------------- digits

def test_features_are_what_the_last_layer_takes(digits):
    torch.manual_seed(0)
    judge = judge_of("digits", evaluator.DigitNet(10, 8).eval())
    x = digits.images[:300] / 127.5 - 1
    found, features = judge.with_features(x)
    assert features.shape == (300, 16) and not features.requires_grad
    torch.testing.assert_close(judge.net.fc(features), found)
    torch.testing.assert_close(found.sum(1), torch.ones(300))
    assert torch.equal(judge(x), found) and not judge.net.fc._forward_pre_hooks


def test_score_digits_by_hand(digits):
    """The judge reads the class from the first pixel, and two features from the next ones."""
    net = Reader(lambda x: nn.functional.one_hot((x[:, 0, 0, 0] * 9).round().long().clamp(0), 10).float(),
                 lambda x: x[:, 0, 0, 1:3])
    net.size, made = 32, []
    judge = judge_of("digits", net)

    def sample(n, g):
        x = torch.rand(n, 1, 32, 32, generator=g)
        x[:, 0, 0, 0] = (x[:, 0, 0, 0] ** 2 * 10).floor() / 9
        made.append(x)
        return x, None

    real = torch.randint(0, 256, (700, 1, 32, 32), generator=torch.Generator().manual_seed(5)).byte()
    state = torch.get_rng_state()
    result = evaluator.score(sample, judge, 1200, 2, 3, real=judge.moments(real))
    assert torch.equal(torch.get_rng_state(), state)
    draws = [torch.cat(made[:3]), torch.cat(made[3:])]  # 500 + 500 + 200 each
    rows = []
    for x in draws:
        assert len(x) == 1200
        counts = (x[:, 0, 0, 0] * 9).round().long().bincount(minlength=10).double()
        a, b = (real[:, 0, 0, 1:3].double() / 127.5 - 1).numpy(), x[:, 0, 0, 1:3].double().numpy()
        cross = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        fd = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * cross)
        tv = 0.5 * abs(counts / 1200 - 0.1).sum().item()
        rows.append((fd, scipy.stats.chisquare(counts).statistic, tv))
    for name, column in zip(("FD (judge)", "chi2", "TV"), np.array(rows).T, strict=True):
        assert result[name] == pytest.approx((column.mean(), column.std(ddof=1)), rel=1e-5), name
    assert sum(result["histogram"][0]) == pytest.approx(1)
    one = evaluator.score(sample, judge, 1200, 1, 3, real=judge.moments(real))
    assert one["FD (judge)"] == (pytest.approx(rows[0][0], rel=1e-5), 0.0)  # the first draw again


def test_real_digits_are_near_and_noise_is_far(digits):
    torch.manual_seed(0)
    judge = judge_of("digits", evaluator.DigitNet(10, 8).eval())
    real = judge.moments(digits.test_images)
    near = evaluator.score(digits.training_sample, judge, 400, 1, 0, real=real)
    far = evaluator.score(lambda n, g: (torch.rand(n, 1, 28, 28, generator=g), None), judge, 400, 1, 0,
                          real=real)
    assert 0 < near["FD (judge)"][0] < 0.1 * far["FD (judge)"][0]
    with pytest.raises(NotFinite, match="not finite"):
        evaluator.score(lambda n, g: (torch.full((n, 1, 28, 28), torch.nan), None), judge, 400, 1, 0)


def test_fid_is_the_distance_of_inception_s_features(digits):
    def net(x):  # the network itself is held against pytorch-fid's in test_fid.py
        assert 0 <= x.min() and x.max() <= 1
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)
    net.fc = nn.Linear(1, 1)
    fakes = digits.images[:300] / 127.5 - 1
    mean, std = evaluator.score_fid(lambda n, g: (fakes[torch.randint(300, (n,), generator=g)], None), net,
                                    digits.test_images, 250, 2, 0)
    g = torch.Generator().manual_seed(0)
    values = []
    for _ in range(2):
        x = torch.cat([fakes[torch.randint(300, (n,), generator=g)] for n in (100, 100, 50)]) / 2 + 0.5
        a, b = fid.Moments(), fid.Moments()
        a.update(net(digits.test_images / 255)), b.update(net(x))
        values.append(fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance))
    assert (mean, std) == pytest.approx((np.mean(values), np.std(values, ddof=1)), rel=1e-4)


def test_fid_is_not_measured_where_its_weights_cannot_be_had(monkeypatch, capsys):
    def no_network(weights, device):
        raise UserError("no network")
    assert evaluator.get_inception("none", CPU) is None and not capsys.readouterr().out
    assert evaluator.get_inception("auto", CPU) is None
    assert "not measured on a CPU" in capsys.readouterr().out
    monkeypatch.setattr(evaluator, "load_inception", no_network)
    assert evaluator.get_inception("auto", torch.device("cuda")) is None
    assert "FID: not measured: no network" in capsys.readouterr().out
    with pytest.raises(UserError):  # named, so it must be there
        evaluator.get_inception("weights.pth", torch.device("cuda"))


# ------------------------------------------------------------------------------------------------- faces

def test_attributes_are_counted_by_hand():
    groups = ((0, 1, 2), (3, 4))
    read = torch.tensor([[.2, .1, .3, .4, .6],  # third, second
                         [.9, .8, .7, .1, .0],  # first, first: more than one above a half
                         [.1, .2, .1, .3, .2]])
    labels = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 0, 1, 0], [0, 1, 0, 1, 0]])
    assert evaluator.decide(read, groups).tolist() == [[0, 0, 1, 0, 1], [1, 0, 0, 1, 0], [0, 1, 0, 1, 0]]
    found = evaluator.count_attributes(read, labels, groups)
    assert found["accuracy"] == pytest.approx(5 / 6) and found["exact"] == pytest.approx(2 / 3)
    assert found["by attribute"].tolist() == pytest.approx([2 / 3, 1])
    assert evaluator.decide(read, ()).tolist() == [[0, 0, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    found = evaluator.count_attributes(read, labels, ())
    right = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 0, 0, 1], [1, 0, 1, 0, 1]])
    assert found["accuracy"] == pytest.approx(right.double().mean().item()) and found["exact"] == 0
    assert found["by attribute"].tolist() == pytest.approx(right.double().mean(0).tolist())


def test_faces_are_scored_with_their_requested_labels():
    """The judge reads three attributes from the first pixel's channels, two features from the next one's."""
    net = Reader(lambda x: x[:, :, 0, 0] / 2 + 0.5, lambda x: x[:, :2, 0, 1])
    net.size, requested, made = 8, [], []
    judge = judge_of("faces", net)

    def sample(n, g):
        x, y = torch.rand(n, 3, 8, 8, generator=g) * 2 - 1, torch.randint(2, (n, 3), generator=g)
        x[:, :, 0, 0] = torch.where(torch.rand(n, 3, generator=g) < 0.8, y * 2.0 - 1, 1.0 - y * 2)
        made.append(x), requested.append(y)
        return x, y

    real = torch.randint(0, 256, (300, 3, 8, 8), generator=torch.Generator().manual_seed(5)).byte()
    moments, state = judge.moments(real), torch.get_rng_state()
    result = evaluator.score(sample, judge, 600, 2, 3, (), moments)
    assert torch.equal(torch.get_rng_state(), state) and [len(x) for x in made] == [250, 250, 100] * 2
    values = []
    for draw in range(2):
        x, y = torch.cat(made[3 * draw:3 * draw + 3]), torch.cat(requested[3 * draw:3 * draw + 3])
        right = ((x[:, :, 0, 0] > 0).long() == y).double()
        ours = fid.Moments()
        ours.update(x[:, :2, 0, 1].double())
        fd = evaluator.distance(moments, ours)
        values.append((fd, right.mean().item(), right.prod(1).mean().item()))
    for name, column in zip(("FD (judge)", "accuracy", "exact"), np.array(values).T, strict=True):
        assert result[name] == pytest.approx((column.mean(), column.std(ddof=1)), rel=1e-4), name
    assert 0.75 < result["accuracy"][0] < 0.85 and result["accuracy"][1] > 0
    assert len(result["by attribute"][0]) == 3
    alone = evaluator.score(lambda n, g: (sample(n, g)[0], None), judge, 600, 2, 3, real=moments)
    assert list(alone) == ["FD (judge)"] and alone["FD (judge)"] == pytest.approx(result["FD (judge)"])


def test_names_of_attributes_and_groups():
    data = Data("", "faces", "", torch.zeros(1, 3, 8, 8), torch.zeros(1, 4), ("a", "b", "c", "d"), "",
                groups=((0, 1, 2), (3,)))
    assert evaluator.attribute_names(data) == ["a … c", "d … d"]
    data.groups = ()
    assert evaluator.attribute_names(data) == ["a", "b", "c", "d"]
