"""Every baseline through `fit`: its predictions, its hyperparameters, and its file."""

import json
import math
from dataclasses import replace

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F
from toy_task import CLASSES, WIDTH, directions, held_out, toy_clip, toy_task

from nora_vision.files import AdapterFileError, write_tensors
from pipelines.errors import InputError
from pipelines.fewshot import baselines
from pipelines.fewshot.baselines import clap, clip_adapter, coop, gda, logistic, lp_plus_plus, prolip, taskres, tip_adapter
from pipelines.fewshot.baselines.choosing import choose, inputs_of
from pipelines.fewshot.baselines.predictors import KeyValueCache, LinearHead, Predictor, adapted, load_predictor, save_predictor
from pipelines.fewshot.baselines.task import Examples, FewShotTask
from pipelines.fewshot.data import LabelledImageDataset
from pipelines.fewshot.features import image_features, prompt_features, raw_pixels
from pipelines.fewshot.prompts import Prompts
from pipelines.fewshot.samples import sample_set
from pipelines.fewshot.shots import sample_split

every = pytest.mark.parametrize("name", baselines.BASELINES)
TRAINED = {
    "zeroshot": 0,
    "linear_probe": len(CLASSES) * (WIDTH + 1),
    "lp_plus_plus": len(CLASSES) * (WIDTH + 1),
    "clap": len(CLASSES) * WIDTH,
    "tip_adapter": 0,
    "tip_adapter_f": 6 * len(CLASSES) * WIDTH,
    # Four of the twelve positions are the start, the longest name and the end: eight are free.
    "coop": 8 * 16,
    "clip_adapter": 2 * WIDTH * WIDTH // 4,
    "taskres": len(CLASSES) * WIDTH,
    "prolip": WIDTH * WIDTH,
    "gda": 0,
    "pixels": len(CLASSES) * (2 * WIDTH + 1),
}


def fit_briefly(name, task, seed):
    """Fit with at most a twentieth of the epochs."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (clap, clip_adapter, prolip):
            patch.setattr(module, "EPOCHS", 10)
        patch.setattr(taskres, "MANY_EPOCHS", 10)
        patch.setattr(coop, "epochs_for", lambda shots: 5)
        return baselines.fit(name, task, seed)


@pytest.fixture(scope="module")
def fitted():
    """Every baseline, fitted once."""
    kept = {}

    def fit(name):
        if name not in kept:
            kept[name] = fit_briefly(name, toy_task(clip=toy_clip()), seed=3)
        return kept[name]

    return fit


def same(one, other):
    states = one.head.state_dict(), other.head.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@every
def test_nothing_is_fitted_or_chosen_on_test_images_and_the_same_seed_gives_the_same_bytes(fitted, name):
    task = toy_task(clip=toy_clip(), poisoned=True)
    # Creating a model seeds the global generator.
    torch.manual_seed(99)
    blind = fit_briefly(name, task, seed=3)
    assert same(fitted(name), blind)
    assert fitted(name).setting == blind.setting


@every
def test_every_baseline_counts_what_it_trains_and_gives_finite_logits(fitted, name):
    predictor, task = fitted(name), toy_task()
    logits = predictor.logits(inputs_of(predictor, task.validation))
    assert logits.shape == (len(task.validation), len(CLASSES))
    assert torch.isfinite(logits).all()
    assert predictor.num_trainable_parameters == TRAINED[name]


@pytest.mark.parametrize("name", sorted(set(baselines.BASELINES) - {"zeroshot", "coop", "pixels"}))
def test_images_help_if_prompts_are_wrong(name, monkeypatch):
    monkeypatch.setattr(clip_adapter, "RATIOS", (0.8,))
    turned = directions(len(CLASSES), WIDTH, seed=0).roll(1, dims=0) + 0.5 * directions(len(CLASSES), WIDTH, seed=0)
    task = toy_task(class_features=F.normalize(turned, dim=-1))
    features, labels = held_out(task)
    accuracies = [
        float((baselines.fit(one, task, seed=0).logits(features).argmax(dim=-1) == labels).float().mean())
        for one in ("zeroshot", name)
    ]
    assert accuracies[0] < 0.1
    assert accuracies[1] > 0.8


@every
def test_a_saved_predictor_is_loaded_unchanged(fitted, name, tmp_path):
    predictor = fitted(name)
    save_predictor(predictor, tmp_path / "baseline.safetensors")
    back = load_predictor(tmp_path / "baseline.safetensors")
    assert same(predictor, back)
    assert replace(back, head=predictor.head) == predictor
    inputs = inputs_of(predictor, toy_task().validation)
    assert torch.equal(back.logits(inputs), predictor.logits(inputs))


@every
def test_a_damaged_file_of_a_predictor_is_refused(fitted, name, tmp_path):
    path = tmp_path / "baseline.safetensors"
    save_predictor(fitted(name), path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AdapterFileError, match=r"baseline\.safetensors was changed or damaged"):
        load_predictor(path)


@torch.no_grad()
def test_zero_shot_is_clip():
    clip = toy_clip()
    pixels, prompts = torch.randn(4, 3, 16, 16), Prompts(CLASSES, ("{}.",))
    features, labels = image_features(clip, [(one, place % 3) for place, one in enumerate(pixels)])
    shown = Examples(features, labels)
    task = FewShotTask(CLASSES, prompt_features(clip, prompts), float(clip.logit_scale), shown, shown)
    expected, _ = clip.model.get_logits(pixels, clip.tokenizer(prompts.texts()))
    torch.testing.assert_close(baselines.fit("zeroshot", task, seed=0).logits(features), expected)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_linear_probe_is_scikit_learns(classes):
    task = toy_task()
    kept = task.train.labels < classes
    features, labels = task.train.features[kept], task.train.labels[kept]
    spread = float((features - features.mean(dim=0)).square().sum(dim=1).mean())
    (_, head), *_ = logistic.regularisation_path(features, labels, inverse_penalties=(3.0,))
    direct = LogisticRegression(C=3.0 / spread, tol=1e-8, max_iter=5000).fit(features.double().numpy(), labels.numpy())
    expected = torch.from_numpy(direct.predict_proba(task.validation.features.double().numpy())).float()
    torch.testing.assert_close(head(task.validation.features).softmax(dim=-1), expected, atol=2e-3, rtol=0)


def test_the_linear_probe_uses_the_best_penalty_on_validation(fitted):
    task = toy_task()
    chosen = fitted("linear_probe")
    losses = {
        C: (
            -int((head(task.validation.features).argmax(dim=-1) == task.validation.labels).sum()),
            float(F.cross_entropy(head(task.validation.features), task.validation.labels)),
        )
        for C, head in logistic.regularisation_path(task.train.features, task.train.labels)
    }
    assert chosen.setting["C"] == min(losses, key=losses.get)


def test_pixels_are_probed_like_features():
    task = toy_task()
    probe = FewShotTask(
        CLASSES,
        directions(len(CLASSES), 2 * WIDTH, seed=0),
        1.0,
        *(Examples(F.normalize(part.pixels, dim=-1), part.labels) for part in (task.train, task.validation)),
    )
    raw = FewShotTask(
        CLASSES,
        task.class_features,
        1.0,
        *(Examples(part.features, part.labels, F.normalize(part.pixels, dim=-1)) for part in (task.train, task.validation)),
    )
    control = baselines.fit("pixels", raw, seed=0)
    assert same(control, baselines.fit("linear_probe", probe, seed=0))
    assert control.reads == "pixels"


def test_raw_pixels_classify_most_images_of_the_sample_dataset():
    digits = sample_set()
    split = sample_split(digits, shots=16, seed=0)

    def examples(part):
        shown = LabelledImageDataset(split.images(digits, part)[::2], raw_pixels)
        pixels = torch.stack([pixels for pixels, _ in shown])
        return Examples(F.normalize(pixels, dim=-1), shown.labels, pixels)

    test = examples("test")
    task = FewShotTask(digits.classes, F.normalize(torch.rand(10, 3072), dim=-1), 1.0, examples("train"), examples("val"))
    logits = baselines.fit("pixels", task, seed=0).logits(test.pixels)
    assert float((logits.argmax(dim=-1) == test.labels).float().mean()) > 0.7


def test_tip_adapter_tends_to_the_nearest_neighbour():
    keys, labels = directions(30, WIDTH, seed=5), torch.arange(30) % 3
    queries = F.normalize(keys + 0.15 * directions(30, WIDTH, seed=6), dim=-1).roll(7, dims=0)
    head = KeyValueCache(
        weight=torch.zeros(3, WIDTH),
        keys=keys,
        values=F.one_hot(labels, 3),
        alpha=torch.tensor(1.0),
        beta=torch.tensor(500.0),
    )
    nearest = KNeighborsClassifier(1).fit(keys.numpy(), labels.numpy()).predict(queries.numpy())
    assert head(queries).argmax(dim=-1).tolist() == nearest.tolist()


def test_tip_adapter_with_beta_zero_counts_images(monkeypatch):
    monkeypatch.setattr(tip_adapter, "BETAS", (0.0,))
    monkeypatch.setattr(tip_adapter, "ALPHAS", (2.0,))
    task = toy_task(shots=5)
    found = tip_adapter.fit(task, 0).logits(task.validation.features)
    torch.testing.assert_close(found, baselines.fit("zeroshot", task, 0).logits(task.validation.features) + 2.0 * 5)


def test_tip_adapter_keys_are_the_mean_directions_of_the_views():
    task = toy_task(views=2)
    keys, values = tip_adapter.cache_of(task)
    shown = task.train.all_views()
    torch.testing.assert_close(keys[4], F.normalize(shown[0, 4] + shown[1, 4] + shown[2, 4], dim=0))
    assert values.argmax(dim=-1).tolist() == task.train.labels.tolist()


def test_tip_adapter_f_without_steps_is_tip_adapter_and_with_them_fits_the_images_better(monkeypatch):
    task = toy_task(noise=2.0)
    plain = tip_adapter.fit(task, 0)
    trained = tip_adapter.fit_keys(task, 0)
    monkeypatch.setattr(tip_adapter, "LEARNING_RATES", (0.0,))
    assert same(tip_adapter.fit_keys(task, 0), plain)
    found = {**plain.head.state_dict(), "keys": trained.head.keys}
    at_the_same_setting = Predictor(KeyValueCache(**found), 0)
    losses = [F.cross_entropy(one.logits(task.train.features), task.train.labels) for one in (plain, at_the_same_setting)]
    assert losses[1] < losses[0]


def test_taskres_with_alpha_zero_is_zero_shot():
    task = toy_task()
    features = task.validation.features
    found = taskres.residual(task, seed=0, learning_rate=2e-3, alpha=0.0).logits(features)
    torch.testing.assert_close(found, baselines.fit("zeroshot", task, 0).logits(features))


def test_clip_adapter_with_ratio_zero_is_zero_shot():
    task = toy_task()
    features = task.validation.features
    found = clip_adapter.bottleneck(task, seed=0, learning_rate=1e-2, ratio=0.0).logits(features)
    torch.testing.assert_close(found, baselines.fit("zeroshot", task, 0).logits(features))


def test_clip_adapters_bottleneck_is_independent_of_a_features_length():
    features, down, up = directions(5, WIDTH, seed=0), torch.randn(6, WIDTH), torch.randn(WIDTH, 6)
    torch.testing.assert_close(adapted(7 * features, down, up, 0.4), adapted(features, down, up, 0.4))


def test_claps_multipliers_are_the_zero_shot_probabilities_of_the_true_class():
    task = toy_task()
    shown = task.train.all_views()
    found = clap.multipliers(task)
    for label in range(len(CLASSES)):
        own = shown[:, task.train.labels == label]
        probabilities = (task.logit_scale * own @ task.class_features.T).softmax(dim=-1)[..., label]
        torch.testing.assert_close(found[label], probabilities.mean())


def test_claps_penalty_keeps_the_prototypes_near_the_prompts(monkeypatch):
    monkeypatch.setattr(clap, "EPOCHS", 100)
    task = toy_task(noise=2.0)
    fits = [clap.constrained_probe(task, 0, weight, learning_rate=1e-3) for weight in (0.0, 10.0, 100.0)]
    distances = [float((one.head.weight / task.logit_scale - task.class_features).norm()) for one in fits]
    assert distances[0] > distances[1] > distances[2] > 0


def lp_plus_plus_loss(task, weight, alpha):
    views = task.train.all_views()
    labels = task.train.labels.repeat(len(views))
    return F.cross_entropy(views.flatten(0, 1) @ (weight + alpha[:, None] * task.class_features).T, labels)


def test_lp_plus_plus_descends_along_the_gradient_of_each_block():
    task = toy_task()
    iterates = list(lp_plus_plus.descent(task))
    views = task.train.all_views()
    features = views.flatten(0, 1)
    steps = lp_plus_plus.step_sizes(features, features @ task.class_features.T)
    weight, alpha = (value.clone().requires_grad_() for value in iterates[0])
    (gradient,) = torch.autograd.grad(lp_plus_plus_loss(task, weight, alpha), weight)
    # The velocity before: from the start, the sum of the images of each class.
    start = torch.stack([views[:, task.train.labels == label].mean(dim=0).sum(dim=0) for label in range(len(CLASSES))])
    expected = iterates[0][0] + lp_plus_plus.MOMENTUM * (iterates[0][0] - start) - steps[0] * gradient
    torch.testing.assert_close(iterates[1][0], expected.detach())
    weight, alpha = (value.clone().requires_grad_() for value in (iterates[9][0], iterates[8][1]))
    (gradient,) = torch.autograd.grad(lp_plus_plus_loss(task, weight, alpha), alpha)
    torch.testing.assert_close(iterates[9][1], (alpha - steps[1] * gradient).detach())
    similarity = (views * task.class_features[task.train.labels]).sum(dim=-1).mean()
    torch.testing.assert_close(alpha.detach(), lp_plus_plus.ALPHA_FACTOR * similarity.expand(len(CLASSES)))


def test_no_step_of_alpha_in_lp_plus_plus_raises_the_loss_and_its_minimum_is_the_linear_probes(monkeypatch):
    monkeypatch.setattr(lp_plus_plus, "STEPS", 1000)
    # Noise that no linear classifier separates, so that the minimum exists.
    task = toy_task(shots=40, noise=20.0)
    iterates = list(lp_plus_plus.descent(task))
    for step in range(lp_plus_plus.ALPHA_EVERY - 1, 300, lp_plus_plus.ALPHA_EVERY):
        (_, before), (weight, after) = iterates[step - 1 : step + 1]
        assert lp_plus_plus_loss(task, weight, after) <= lp_plus_plus_loss(task, weight, before) + 1e-6
    views = task.train.all_views()
    direct = LogisticRegression(C=math.inf, fit_intercept=False, tol=1e-8, max_iter=5000)
    direct.fit(views.flatten(0, 1).double().numpy(), task.train.labels.repeat(len(views)).numpy())
    best = lp_plus_plus_loss(task, torch.from_numpy(direct.coef_).float(), torch.zeros(len(CLASSES)))
    assert lp_plus_plus_loss(task, *iterates[-1]) == pytest.approx(float(best), rel=0.02)


def test_prolip_with_a_large_penalty_is_zero_shot_and_without_one_moves_away():
    task = toy_task(noise=2.0)
    fits = [prolip.projected(task, 0, 1e-3, penalty) for penalty in (0.0, 1.0, 1e6)]
    distances = [float((one.head.projection - torch.eye(WIDTH)).norm()) for one in fits]
    assert distances[0] > distances[1] > distances[2]
    features = task.validation.features
    torch.testing.assert_close(fits[2].head(5 * features), baselines.fit("zeroshot", task, 0).logits(features), atol=0.1, rtol=0)


def test_prolips_first_step_has_the_gradient_of_the_equation(monkeypatch):
    monkeypatch.setattr(prolip, "EPOCHS", 1)
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, eps: torch.optim.SGD(parameters, lr=lr))
    task = toy_task(views=0)
    weight = torch.eye(WIDTH, requires_grad=True)
    logits = task.logit_scale * F.normalize(task.train.embeddings[0] @ weight.T, dim=-1) @ task.class_features.T
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, task.train.labels), weight)
    found = prolip.projected(task, 0, 0.5, penalty=3.0).head.projection
    torch.testing.assert_close(found, (weight - 0.5 * gradient).detach())


@pytest.mark.parametrize("shots", [2, 9])
def test_gda_is_linear_discriminant_analysis_with_that_shrinkage(shots):
    task = toy_task(shots=shots)
    features, labels = task.train.features.double(), task.train.labels
    count = len(labels)
    weight, bias = gda.gaussian_classifier(features, labels, len(CLASSES))
    # The estimate is a multiple of (1 - s) S + s tr(S) / d I, so that the logits are a multiple of scikit-learn's.
    shrinkage = WIDTH / (count - 1 + WIDTH)
    multiple = count * (count - 1 + WIDTH) / (WIDTH * (count - 1))
    analysis = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[1 / len(CLASSES)] * len(CLASSES))
    queries = task.validation.features.double()
    # Compare logits, since most posteriors are 0 or 1; a constant over all classes does not change the posterior.
    expected = torch.from_numpy(analysis.fit(features.numpy(), labels.numpy()).decision_function(queries.numpy()))
    found = multiple * (queries @ weight.T + bias)
    torch.testing.assert_close(found.log_softmax(dim=-1), expected.log_softmax(dim=-1), rtol=1e-6, atol=1e-6)


def test_gda_with_one_image_per_class_is_nearest_neighbour():
    task = toy_task(shots=1, views=0)
    weight, bias = gda.gaussian_classifier(task.train.features, task.train.labels, len(CLASSES))
    queries, _ = held_out(task)
    nearest = torch.cdist(queries, task.train.features).argmin(dim=-1)
    assert (queries.double() @ weight.T + bias).argmax(dim=-1).tolist() == task.train.labels[nearest].tolist()


def test_gda_uses_the_prompts_if_images_are_wrong():
    task = toy_task()
    wrong = Examples(task.train.features, task.train.labels.roll(1), task.train.pixels, task.train.views)
    misled = gda.fit(FewShotTask(CLASSES, task.class_features, task.logit_scale, wrong, task.validation), 0)
    assert misled.setting["alpha"] == gda.ALPHAS[0]


def test_the_choice_is_by_accuracy_then_cross_entropy_then_order_among_finite_candidates():
    labels = torch.tensor([0, 1])
    logits = {
        "wrong but sure": torch.tensor([[9.0, 0], [9, 0]]),
        "not finite": torch.tensor([[9.0, 0], [0, math.nan]]),
        "right": torch.tensor([[1.0, 0], [0, 1]]),
        "right and sure": torch.tensor([[2.0, 0], [0, 2]]),
        "the same": torch.tensor([[2.0, 0], [0, 2]]),
    }
    assert choose(logits.items(), labels) == "right and sure"
    with pytest.raises(InputError, match="None of 1 settings gives finite logits"):
        choose([("not finite", logits["not finite"])], labels)


def test_a_predictor_of_an_earlier_version_is_read(tmp_path):
    metadata = {"head": "Linear", "reads": "features", "trained_numbers": 5, "setting": {}, "open_vocabulary": False}
    tensors = {"weight": torch.zeros(3, WIDTH), "bias": torch.zeros(3)}
    write_tensors(tmp_path / "old.safetensors", tensors, {"predictor": json.dumps(metadata)})
    predictor = load_predictor(tmp_path / "old.safetensors")
    assert (type(predictor.head), predictor.num_trainable_parameters) == (LinearHead, 5)


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"predictor": "no JSON"},
        {"predictor": "[]"},
        {"predictor": '{"head": "Quadratic", "reads": "features", "trained_numbers": 0, "setting": {}, "open_vocabulary": true}'},
        {"predictor": '{"head": "Linear", "reads": "sounds", "trained_numbers": 0, "setting": {}, "open_vocabulary": true}'},
        {"predictor": '{"head": "Linear", "reads": "features", "trained_numbers": [], "setting": {}, "open_vocabulary": true}'},
        {"predictor": '{"head": "Linear", "reads": "features", "trained_numbers": 0, "setting": "C", "open_vocabulary": true}'},
    ],
)
def test_a_file_without_the_metadata_of_a_predictor_is_refused(tmp_path, told):
    write_tensors(tmp_path / "other.safetensors", {"weight": torch.zeros(3, WIDTH), "bias": torch.zeros(3)}, told)
    with pytest.raises(InputError, match=r"The metadata of '.*other.safetensors' do not describe a predictor"):
        load_predictor(tmp_path / "other.safetensors")


def test_tensors_that_do_not_fit_each_other_are_refused():
    with pytest.raises(InputError, match="needs 'bias' of shape"):
        LinearHead(weight=torch.zeros(3, WIDTH), bias=torch.zeros(2))
    with pytest.raises(InputError, match="needs the tensors"):
        LinearHead(weight=torch.zeros(3, WIDTH))


def test_many_inputs_give_the_logits_of_single_inputs(fitted):
    many = directions(2500, WIDTH, seed=8)
    head = fitted("tip_adapter").head
    torch.testing.assert_close(fitted("tip_adapter").logits(many), head(many))


def test_a_task_that_a_method_cannot_fit_is_refused():
    task = toy_task()
    with pytest.raises(InputError, match=r"method must be one of zeroshot, .*, got 'zero_shot'"):
        baselines.fit("zero_shot", task, seed=0)
    with pytest.raises(InputError, match="Set clip of FewShotTask"):
        baselines.fit("coop", task, seed=0)
    bare = Examples(task.train.features, task.train.labels)
    with pytest.raises(InputError, match="Set pixels of Examples"):
        baselines.fit("pixels", FewShotTask(CLASSES, task.class_features, 1.0, bare, bare), seed=0)


def test_an_inconsistent_task_is_refused():
    features, labels = directions(3, WIDTH, seed=0), torch.arange(3)
    good = Examples(features, labels)
    with pytest.raises(InputError, match="must be finite and of length 1"):
        Examples(2 * features, labels)
    with pytest.raises(InputError, match="must be finite and of length 1"):
        Examples(features * math.nan, labels)
    with pytest.raises(InputError, match=r"of the same images, got features \(3,\), labels \(2,\)"):
        Examples(features, labels[:2])
    with pytest.raises(InputError, match="there are none of 'teapot'"):
        FewShotTask(CLASSES, features, 1.0, Examples(features[:2], labels[:2]), good)
    with pytest.raises(InputError, match=r"validation labels must be in \[0, 2\], got \[0, 3\]"):
        FewShotTask(CLASSES, features, 1.0, good, Examples(features[:2], torch.tensor([0, 3])))
    with pytest.raises(InputError, match="validation must hold at least one image"):
        FewShotTask(CLASSES, features, 1.0, good, Examples(features[:0], labels[:0]))
    with pytest.raises(InputError, match="classes must be at least two, with one feature each"):
        FewShotTask(CLASSES[:2], features, 1.0, good, good)
