"""Scores by hand; judges that are trained, bundled or named; splits; the command that trains judges."""
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
import torchvision
from torch import nn
from torch.nn.functional import one_hot

import evaluator
from common.datasets import Data, load_faces, load_iclevr, to_float
from common.fid import feature_stats, frechet_distance
from common.files import UserError
from harness.cli import NotFinite
from synthetic import scenes
from synthetic.digits import render
from synthetic.measures import decide
from tests.conftest import Reader, get_judge, judge_of, make_iclevr, run_here, settings
from tools import train_judge

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    images, labels, _ = render(1400)
    return Data("digits", "digits", "", images[:1000], labels[:1000], tuple("0123456789"), "x", images[1000:],
                labels[1000:])


# ---------------------------------------------------------------------- judges

def test_judges_that_are_named(tmp_path, monkeypatch):
    """The i-CLEVR course's checkpoint is used as it is; what does not fit is refused in one line."""
    data, net = settings(classes=scenes.OBJECTS, domain="scenes"), torchvision.models.resnet18(weights=None)
    net.fc = nn.Sequential(nn.Linear(512, 24), nn.Sigmoid())
    torch.save({"model": net.eval().state_dict()}, tmp_path / "course.pth")
    judge = get_judge(data, judge=tmp_path / "course.pth")
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(judge(x), net(x))
    assert judge.title == "ResNet-18 of width 64, held-out accuracy not known" and judge.held_out is None
    assert judge(torch.zeros(2, 3, 32, 32)).shape == (2, 24)  # brought to 64×64
    vgg, state = evaluator.VGG(24, 8).eval(), torch.get_rng_state()
    torch.save({"model": vgg.state_dict(), "net": "VGG"}, tmp_path / "vgg.pth")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # whose random states are left alone, too
    torch.testing.assert_close(get_judge(data, judge=tmp_path / "vgg.pth")(x), vgg(x))
    assert torch.equal(torch.get_rng_state(), state)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("layer3")}
    torch.save({"model": state}, tmp_path / "part.pth")
    torch.save({"model": {"fc.0.weight": torch.zeros(23, 512)}}, tmp_path / "23.pth")
    torch.save({"weights": 1}, tmp_path / "other.pth")
    torch.save({"model": net.state_dict(), "net": "DigitNet"}, tmp_path / "digits.pth")
    torch.save({"model": net.state_dict(), "net": "VGG"}, tmp_path / "no_vgg.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    for name, message in (("23.pth", "23 classes, the data has 24"), ("other.pth", "should be a judge"),
                          ("text.pth", "should be a judge"), ("part.pth", "should be a ResNet-18"),
                          ("digits.pth", "should be a judge"), ("no_vgg.pth", "should be a VGG"),
                          ("none.pth", "FileNotFoundError")):
        with pytest.raises(UserError, match=message) as error:
            get_judge(data, judge=tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert get_judge(data, judge="none") is get_judge(settings(classes=())) is None
    with pytest.raises(UserError, match="there is no judge"):
        evaluator.get_judge(settings(judge="none", fid_weights="weights.pth"), data, CPU)


@pytest.mark.parametrize("domain, net, width, steps, least", [  # by chance 0.1, 0.1 and 0.73
    ("scenes", "ResNet18", 8, 60, 0.2), ("digits", "DigitNet", 16, 70, 0.8), ("faces", "VGG", 16, 60, 0.85)])
def test_judges_learn_are_kept_and_leave_random_states_alone(digits, monkeypatch, domain, net, width, steps,
                                                             least):
    faces = settings(attributes="blonde hair,black hair,with glasses", n_synthetic=300)
    data = {"scenes": lambda: load_iclevr(settings(n_scenes=30)), "digits": lambda: digits,
            "faces": lambda: load_faces(faces)}[domain]()
    kind, moved, seeds, seed = evaluator.KINDS[domain], set(), [], torch.manual_seed
    state, move, network = torch.get_rng_state(), evaluator.random_translate, getattr(evaluator, net)
    monkeypatch.setattr(evaluator, "random_translate", lambda x, *how: moved.add(how) or move(x, *how))
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))

    def get() -> evaluator.Judge:
        return evaluator.auto_judge(settings(judge_width=width, judge_steps=steps), data, CPU, network)
    judge = get()
    assert torch.equal(torch.get_rng_state(), state) and type(judge.net) is network
    assert moved == {(1 / 16,)} and seeds == [kind.nets.index(network)]  # two judges start apart
    images, labels, held_out, their_labels = evaluator.split(data)
    learnt, found = judge(to_float(images)), judge(to_float(held_out))
    assert judge.kind.measure(learnt, labels, data.groups)["accuracy"] > least
    accuracy = judge.kind.measure(found, their_labels, data.groups)["accuracy"]
    assert judge.held_out["accuracy"] == pytest.approx(accuracy)
    assert judge.title == f"{network.title} of width {width}, held-out accuracy {accuracy:.4f}"
    monkeypatch.setattr(evaluator, "train_judge", None)
    assert torch.equal(get()(to_float(held_out)), found)


@pytest.mark.parametrize("net", [evaluator.ResNet18, evaluator.VGG, evaluator.DigitNet])
def test_networks_have_the_features_said(net):
    kind = "digits" if net is evaluator.DigitNet else "scenes"
    judge, channels = judge_of(kind, net(7, 12).eval()), 1 if kind == "digits" else 3
    probabilities, features = judge.with_features(torch.rand(2, channels, 40, 40))
    assert probabilities.shape == (2, 7) and features.shape == (2, 12 * net.features)


def test_features_are_what_the_last_layer_takes_and_noise_is_far_from_digits(digits):
    torch.manual_seed(0)
    judge = judge_of("digits", evaluator.DigitNet(10, 8).eval())
    found, features = judge.with_features(to_float(digits.images[:300]))
    assert features.shape == (300, 16) and not features.requires_grad
    torch.testing.assert_close(judge.net.fc(features), found)
    torch.testing.assert_close(found.sum(1), torch.ones(300))
    assert torch.equal(judge(to_float(digits.images[:300])), found) and not judge.net.fc._forward_pre_hooks

    def fd(sample) -> float:
        real = judge.stats(digits.test_images)
        return evaluator.score(sample, judge, 400, 1, 0, real=real)["FD (judge)"][0]
    noise = fd(lambda n, g: (torch.rand(n, 1, 28, 28, generator=g), None))
    assert 0 < fd(lambda n, g: (digits.random_images(n, g), None)) < 0.1 * noise
    with pytest.raises(NotFinite, match="not finite"):
        fd(lambda n, g: (torch.full((n, 1, 28, 28), torch.nan), None))


# ---------------------------------------------------------------------- bundled judges

def test_every_bundled_judge_is_of_todays_renderer_small_and_good():
    files = sorted(evaluator.BUNDLED.glob("*.pt"))
    assert [path.stem for path in files] == sorted(train_judge.BUNDLED)
    assert sum(path.stat().st_size for path in files) < 7e6
    for path in files:
        content, spec = torch.load(path, weights_only=True), train_judge.BUNDLED[path.stem]
        scenery = "scenes" in path.stem or "clevr" in path.stem
        assert content["held_out"]["accuracy"] >= (0.96 if scenery else 0.99)
        assert path.stem in content["command"] and path.stem.endswith(f"-{spec.net.__name__.lower()}")
        weight = content["model"]["fc.0.weight"]
        assert (content["net"], weight.shape[1]) == (spec.net.__name__, spec.width * spec.net.features)
        if not isinstance(spec.source, str):
            code = hashlib.sha1(repr(Path(spec.source.__file__).read_text()).encode())
            assert content["origin"] == code.hexdigest()[:12], f"train {path.stem} anew"
    nets = {}  # of each set: all that its kind of data needs, so that no run trains a judge
    for name, spec in train_judge.BUNDLED.items():
        nets.setdefault(name.rsplit("-", 1)[0], set()).add(spec.net)
    assert all(found in [{*kind.nets} for kind in evaluator.KINDS.values()] for found in nets.values())


def test_a_bundled_judge_reads_its_own_set_and_others_get_their_own(tmp_path, monkeypatch, capsys):
    data = load_iclevr(settings(n_scenes=10, image_size=64))
    images, labels, _ = scenes.render(30, 64, seed=3)
    for net in (evaluator.ResNet18, evaluator.VGG):
        judge = evaluator.auto_judge(None, data, CPU, net)
        assert f"synthetic-scenes-64-{net.__name__.lower()}.pt" in capsys.readouterr().out
        assert type(judge.net) is net and "held-out accuracy 0.9" in judge.title
        assert evaluator.count_objects(judge(to_float(images)), labels)["accuracy"] > 0.95
    assert type(get_judge(data).net) is evaluator.VGG  # which reports
    capsys.readouterr()
    for other in (load_iclevr(settings(n_scenes=10, image_size=32)), replace(data, fingerprint="other code"),
                  load_faces(settings(n_synthetic=40, image_size=64, attributes="blue eyes"))):
        get_judge(other)
        assert "training a judge" in capsys.readouterr().out
    whole = (evaluator.BUNDLED / "synthetic-scenes-64-vgg.pt").read_bytes()
    (tmp_path / "synthetic-scenes-64-vgg.pt").write_bytes(whole[:len(whole) // 2])
    monkeypatch.setattr(evaluator, "BUNDLED", tmp_path)
    with pytest.raises(UserError, match="synthetic-scenes-64-vgg.pt can't be read.*git checkout") as error:
        get_judge(data)
    assert "\n" not in str(error.value)


def test_without_images_no_judge_is_trained():
    data = Data.from_metadata(load_iclevr(settings(n_scenes=10)).metadata())  # of a run whose data are gone
    with pytest.raises(UserError, match="images"):
        get_judge(data)


@pytest.fixture
def call(monkeypatch):
    def call(arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["train_judge.py", *arguments.split(), "--device", "cpu"])
        train_judge.main()
    return call


def test_the_command_trains_a_judge_and_tests_it_on_others(call, monkeypatch, capsys):
    monkeypatch.setattr(train_judge, "load", lambda *args, load=train_judge.load: load(*args, n=60))
    call("digits --data synthetic --judge-width 8 --judge-steps 2 --also synthetic")
    assert "11 test images of synthetic digits: accuracy 0." in capsys.readouterr().out
    call("faces --data synthetic --image-size 32 --judge-width 8 --judge-steps 2")
    trained = sorted(path.name.split("-")[2] for path in Path("data", "judges").glob("faces-*"))
    assert trained == ["resnet18", "vgg"]  # both that a script needs
    for arguments, message in (("scenes --also mnist", "--also is for digits"),
                               ("digits --judge-steps 0", "at least 1"), ("mnist-31", "invalid choice")):
        with pytest.raises(UserError, match=message):
            call(arguments)


@pytest.mark.parametrize("name", ["synthetic-scenes-64-vgg", "synthetic-digits-32-digitnet",
                                  "synthetic-faces-64-resnet18", "i-clevr-64-vgg"])
def test_the_command_bundles_a_judge_of_half_precision(name, call, tmp_path, monkeypatch):
    spec, (domain, source) = train_judge.BUNDLED[name], (name.split("-")[1], "synthetic")
    if isinstance(spec.source, str):
        domain, source = "scenes", str(make_iclevr(tmp_path / "scenes", 12))
    spec = replace(spec, n=40, width=8, steps=2, source=spec.source if source == "synthetic" else source)
    monkeypatch.setitem(train_judge.BUNDLED, name, spec)
    monkeypatch.setattr(evaluator, "BUNDLED", tmp_path / "judges")
    call(name)
    content = torch.load(tmp_path / "judges" / f"{name}.pt", weights_only=True)
    assert {x.dtype for x in content["model"].values()} == {torch.float16, torch.int64}
    judge = evaluator.auto_judge(None, train_judge.load(domain, source, spec.size, n=40), CPU, spec.net)
    assert judge.held_out == content["held_out"]


# ---------------------------------------------------------------------- splits

def test_held_out_images_are_whole_scenes(iclevr):
    images, scene = torch.arange(60).view(60, 1, 1, 1), torch.arange(20).repeat_interleave(3)
    data = Data("x", "scenes", "", images, torch.zeros(60, 3).long(), scenes.OBJECTS, "", scene=scene)
    (train, _, held, _), again = evaluator.split(data), evaluator.split(data)[2]
    assert len(held) == 6 and torch.equal(held, again)
    assert torch.cat([train, held]).flatten().sort().values.tolist() == list(range(60))
    assert not set((held // 3).flatten().tolist()) & set((train // 3).flatten().tolist())
    with pytest.raises(UserError, match="fewer than 10 scenes"):
        evaluator.train_judge(load_iclevr(settings(data=str(iclevr))), evaluator.VGG, 8, 2, CPU)


def test_no_reported_label_set_chooses_the_best_checkpoint():
    data = load_iclevr(settings(n_scenes=100, image_size=8))
    assert {name: (len(y), (y < 24).sum().item()) for name, y in data.test_label_sets.items()} == {
        "test": (32, 72), "new_test": (32, 84)}

    def chosen() -> set:
        sets, again = evaluator.validation_sets(data), evaluator.validation_sets(data)
        assert torch.equal(sets, again) and len({*map(tuple, sets.tolist())}) == len(sets)
        return {*map(tuple, sets.tolist())}
    reported = {tuple(row) for sets in data.test_label_sets.values() for row in sets.tolist()}
    known = {*map(tuple, data.labels.tolist())}
    assert known & reported and chosen() <= known - reported and len(chosen()) >= 64
    data.test_label_sets = {}
    assert chosen() & reported
    data.test_label_sets = {"test": data.labels.unique(dim=0)}  # all that there are
    assert chosen() and chosen() <= known


# ---------------------------------------------------------------------- measures

def test_objects_are_counted_by_hand():
    labels = torch.tensor([[3, 24, 24], [1, 2, 24], [5, 6, 7], [0, 8, 9]])
    read = torch.zeros(4, 24)
    read[0, [3, 4]] = torch.tensor([0.2, 0.1])  # 1 of 1, however unsure
    read[1, [1, 9, 2]] = torch.tensor([0.9, 0.8, 0.7])  # top 2 are 1 and 9: 1 of 2
    read[2, [7, 6, 5]] = torch.tensor([0.9, 0.8, 0.7])  # 3 of 3
    read[3, [1, 2, 9]] = 1.0  # 1 of 3
    assert evaluator.count_objects(read, labels) == pytest.approx(
        {"accuracy": 6 / 9, "exact": 2 / 4, "accuracy_1": 1, "accuracy_2": 1 / 2, "accuracy_3": 4 / 6})
    few = evaluator.count_objects(torch.tensor([[0.1, 0.9]] * 2), torch.tensor([[0, 2, 2], [0, 1, 2]]))
    assert few == pytest.approx({"accuracy": 2 / 3, "exact": 0.5, "accuracy_1": 0, "accuracy_2": 1})


def test_attributes_are_counted_by_hand():
    groups = ((0, 1, 2), (3, 4))
    read = torch.tensor([[.2, .1, .3, .4, .6],  # third, second
                         [.9, .8, .7, .1, .0],  # first, first: more than one above a half
                         [.1, .2, .1, .3, .2]])
    labels = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 0, 1, 0], [0, 1, 0, 1, 0]])
    found = evaluator.count_attributes(read, labels, groups)
    assert decide(read, groups).tolist() == [[0, 0, 1, 0, 1], [1, 0, 0, 1, 0], [0, 1, 0, 1, 0]]
    assert (found["accuracy"], found["exact"]) == pytest.approx((5 / 6, 2 / 3))
    assert found["by attribute"].tolist() == pytest.approx([2 / 3, 1])
    found = evaluator.count_attributes(read, labels, ())
    assert decide(read, ()).tolist() == [[0, 0, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert found["by attribute"].tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3, 1])
    assert (found["accuracy"], found["exact"]) == pytest.approx((9 / 15, 0))
    assert evaluator.count_attributes(read, None, groups) == {}


# ---------------------------------------------------------------------- scores

def test_digits_are_scored_by_hand():
    """The judge reads the class from the first pixel, and two features from the next ones."""
    net = Reader(lambda x: one_hot((x[:, 0, 0, 0] * 9).round().long().clamp(0), 10).float(),
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
    result = evaluator.score(sample, judge, 1200, 2, 3, real=judge.stats(real))
    assert torch.equal(torch.get_rng_state(), state) and [len(x) for x in made] == [500, 500, 200] * 2
    rows = []
    for x in (torch.cat(made[:3]), torch.cat(made[3:])):
        counts = (x[:, 0, 0, 0] * 9).round().long().bincount(minlength=10).double()
        a, b = (real[:, 0, 0, 1:3].double() / 127.5 - 1).numpy(), x[:, 0, 0, 1:3].double().numpy()
        cross = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        fd = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * cross)
        tv = 0.5 * abs(counts / 1200 - 0.1).sum().item()
        rows.append((fd, scipy.stats.chisquare(counts).statistic, tv))
    for name, column in zip(("FD (judge)", "chi2", "TV"), np.array(rows).T, strict=True):
        assert result[name] == pytest.approx((column.mean(), column.std(ddof=1)), rel=1e-5), name
    assert sum(result["histogram"][0]) == pytest.approx(1)
    one = evaluator.score(sample, judge, 1200, 1, 3, real=judge.stats(real))
    assert one["FD (judge)"] == (pytest.approx(rows[0][0], rel=1e-5), 0.0)  # the first draw again


def test_faces_are_scored_with_their_requested_labels():
    """The judge reads three attributes from the first pixel's channels, two features from the next one's."""
    net = Reader(lambda x: x[:, :, 0, 0] / 2 + 0.5, lambda x: x[:, :2, 0, 1])
    net.size, right, judge = 8, [], judge_of("faces", net)

    def sample(n, g):
        x, y = torch.rand(n, 3, 8, 8, generator=g) * 2 - 1, torch.randint(2, (n, 3), generator=g)
        right.append(torch.rand(n, 3, generator=g) < 0.8)
        x[:, :, 0, 0] = (y == right[-1]) * 2.0 - 1
        return x, y
    result = evaluator.score(sample, judge, 600, 2, 3)
    assert [len(x) for x in right] == [250, 250, 100] * 2 and "FD (judge)" not in result
    a, b = (torch.cat(part).double() for part in (right[:3], right[3:]))
    for name, x in (("accuracy", [a.mean(), b.mean()]), ("exact", [a.prod(1).mean(), b.prod(1).mean()])):
        assert result[name] == pytest.approx((np.mean(x), np.std(x, ddof=1)), rel=1e-4), name
    assert result["by attribute"][0] == pytest.approx((a.mean(0) / 2 + b.mean(0) / 2).tolist())
    real = judge.stats(torch.randint(0, 256, (300, 3, 8, 8)).byte())
    alone = evaluator.score(lambda n, g: (sample(n, g)[0], None), judge, 600, 2, 3, real=real)
    assert list(alone) == ["FD (judge)"]


def test_what_is_reported_chooses_no_checkpoint(digits):
    """Neither the held-out images nor the test lists, nor the z that they are scored with."""
    cfg, seen = settings(eval_draws=2, eval_images=300, seed=4), []
    net = Reader(lambda x: torch.full((len(x), 10), 0.1), lambda x: x[:, 0, :2, :2].flatten(1))
    net.size, data = 28, settings(**vars(digits))
    data.images = torch.randint(0, 100, (1000, 1, 28, 28), dtype=torch.uint8)
    data.test_images = data.images[:400] + 100
    judge = judge_of("digits", net)
    scorer = evaluator.Scorer(cfg, data, judge, judge, None)

    def training_images(n, g):
        seen.append(torch.randint(1000, (n,), generator=g))
        return to_float(data.images[seen[-1]]), None
    found, reported = scorer.validate(training_images), scorer.test(training_images)
    assert found["best"] == -found["fd_judge"] and set(found) == {"best", "fd_judge", "tv_digits"}
    assert 0 < found["fd_judge"] < 0.1 < 2 < reported["FD (judge)"][0] and reported["FD (judge)"][1] > 0
    assert not torch.equal(seen[0], seen[1])

    data, seen = load_iclevr(settings(image_size=8)), []
    judge = judge_of("scenes", Reader(lambda x: x[:, 0, 0, :24]))
    scorer = evaluator.Scorer(cfg, data, judge, judge, None)
    validation = {*map(tuple, scorer.validation["val"].tolist())}

    def sample(n, g, y):  # shows what is requested, but for single objects of the test lists
        seen.append(torch.rand((), generator=g).item())
        x, shown = torch.zeros(n, 3, 64, 64), (y[:, 1] < 24) | ({*map(tuple, y.tolist())} <= validation)
        x[:, 0, 0, :25].scatter_(1, y, (shown * 2.0 - 1)[:, None].expand(-1, 3))
        return x, y
    found, reported = scorer.validate(sample), scorer.test(sample)
    assert found["best"] == found["accuracy_val"] == 1 > found["accuracy_test"]
    assert set(found) == {"best", "accuracy_val", "accuracy_test", "accuracy_new_test"}
    assert [reported[f"accuracy_{k} test"] for k in (1, 2, 3)] == [(0, 0), (1, 0), (1, 0)]
    assert "accuracy val" not in reported and len(seen) == 6 + 4 and not set(seen[:6]) & set(seen[6:])


@pytest.fixture
def readers(monkeypatch):
    """What was read of generated images: (validate or test, the network that read it)."""
    found, stage, read = [], [], evaluator.Judge.read
    monkeypatch.setattr(evaluator.Judge, "read", lambda judge, images: (
        found.extend((name, type(judge.net)) for name in stage), read(judge, images))[1])
    def staged(name, original):
        def call(*args, **options):
            stage.append(name)
            scores = original(*args, **options)
            stage.clear()
            return scores
        return call
    for name in ("validate", "test"):
        monkeypatch.setattr(evaluator.Scorer, name, staged(name, vars(evaluator.Scorer)[name]))
    return found


def scores_of(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def test_a_judge_that_chose_a_checkpoint_does_not_report_it(here, readers):
    """Nor one of the same architecture, whichever --judge names."""
    resnet, vgg = evaluator.ResNet18, evaluator.VGG
    for name, judge, chose, reports in (("sngan_iclevr", "auto", resnet, vgg),
                                        ("sngan_iclevr", "scenes-*-resnet18-w8-4.pt", vgg, resnet),
                                        ("acgan_celeba", "auto", resnet, vgg)):
        judge = judge if judge == "auto" else next(Path("data", "judges").glob(judge))
        readers.clear()
        folder = run_here(name, iters=2, eval_every=2, judge=str(judge))
        assert {*readers} == {("validate", chose), ("test", reports)}
        titles = [scores_of(folder)[key].split(" of ")[0] for key in ("judge", "chosen_by")]
        assert titles == [reports.title, chose.title]


@pytest.mark.parametrize("name", ["acgan_celeba", "dcgan_mnist"])
def test_what_chooses_nothing_has_no_judge_for_it(here, name, capsys):
    """Neither a run without eval_every nor --eval."""
    folder = run_here(name, iters=2, eval_every=0)
    for again in (False, True):
        if again:
            run_here(name, "eval", folder, eval_draws=1)
        assert "ResNet" not in capsys.readouterr().out and not (folder / "best.pt").exists()
        scores = scores_of(folder)
        assert "chosen_by" not in scores and scores["draws"] == 2 - again


def test_scores_of_real_images_tell_what_others_are_worth(digits):
    faces = load_faces(settings(n_synthetic=300, attributes="blonde hair,with glasses"))
    cfg = settings(eval_draws=2, eval_images=50, seed=4)
    for kind, data, n in (("digits", digits, 10), ("faces", faces, 2)):
        net = Reader(lambda x, n=n: x.flatten(1)[:, :n].sigmoid(), lambda x: x.mean((2, 3)))
        scorer = evaluator.Scorer(cfg, data, judge_of(kind, net), None, None)
        rows, g = scorer.scale(), torch.Generator().manual_seed(5)
        stats = [scorer.judge.stats(data.images[torch.randint(len(data.images), (50,), generator=g)])
                 for _ in range(2)]
        values = [frechet_distance(*scorer.test_stats, *found) for found in stats]
        expected = np.mean(values), np.std(values, ddof=1)
        assert rows["training images"]["FD (judge)"] == pytest.approx(expected)
        if kind == "digits":
            assert list(rows) == ["training images"]
            continue
        found = evaluator.count_attributes(scorer.judge(to_float(data.test_images)), data.test_labels, ())
        assert list(rows) == ["training images", "held-out images"] and list(rows["training images"]) == [
            "FD (judge)"]  # whose labels the judge knows
        assert {key: rows["held-out images"][key] for key in ("accuracy", "exact")} == {
            key: (pytest.approx(found[key]), 0) for key in ("accuracy", "exact")}
    data = load_iclevr(settings(image_size=8))
    assert evaluator.Scorer(cfg, data, judge_of("scenes", net), None, None).scale() == {}


def test_fid_is_the_distance_of_inception_s_features(digits):
    def net(x):  # the network itself is held against pytorch-fid's in test_fid.py
        assert 0 <= x.min() and x.max() <= 1
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)
    net.fc, fakes, g = nn.Linear(1, 1), to_float(digits.images[:300]), torch.Generator().manual_seed(0)

    def sample(n, g):
        return fakes[torch.randint(300, (n,), generator=g)], None
    real = feature_stats([net(digits.test_images / 255)])
    fake = [feature_stats([net(sample(n, g)[0] / 2 + 0.5) for n in (100, 100, 50)]) for _ in range(2)]
    values = [frechet_distance(*real, *stats) for stats in fake]
    found = evaluator.score_fid(sample, net, digits.test_images, 250, 2, 0)
    assert found == {"FID": pytest.approx((np.mean(values), np.std(values, ddof=1)), rel=1e-4)}


@pytest.mark.parametrize("weights, device, said", [
    ("none", "cpu", ""), ("auto", "cpu", ""), ("auto", "cuda", "FID: not measured: no")])
def test_fid_is_not_measured_where_its_weights_cannot_be_had(monkeypatch, capsys, weights, device, said):
    def no_network(weights, device):
        raise UserError("no network")
    monkeypatch.setattr(evaluator, "load_inception", no_network)
    assert evaluator.get_inception(weights, torch.device(device)) is None
    out = capsys.readouterr().out
    assert said in out and bool(said) == bool(out)
    with pytest.raises(UserError):  # named, so it must be there
        evaluator.get_inception("weights.pth", torch.device(device))
