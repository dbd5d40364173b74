"""Classifier files: a loaded classifier predicts like the saved one, and every file is checked."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from image_sets import stored_image
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import base_sha256
from tiny_options import TINY, full_precision_methods

from nora_vision import AdapterFileError
from pipelines import mini_clip
from pipelines.adapter_method import trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.clip import load_clip
from pipelines.corpus import to_pixels
from pipelines.errors import InputError
from pipelines.fewshot import adapters
from pipelines.fewshot.adapters import TargetLayers
from pipelines.fewshot.baselines.predictors import KeyValueCache, LinearHead, Predictor, Prompted
from pipelines.fewshot.classifier import ClassifierFile, FewShotClassifier, save_classifier
from pipelines.fewshot.features import raw_pixels

CLASSES, MORE = ("red_star", "cat", "grey dog"), ("teapot", "boat")
SIDE, WIDTH = 64, mini_clip.EMBED_DIM
PIXELS = torch.randint(0, 256, (5, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
# Pure noise would look the same in every image.
PIXELS[1], PIXELS[2, :32], PIXELS[3, :, :, 0] = 0, 255, 0
IMAGES = [Image.fromarray(own.numpy()) for own in PIXELS]


def told(random_clip, method="zeroshot", **changes):
    return ClassifierFile(
        **{
            "method": method,
            "model": str(random_clip),
            "pretrained": None,
            "base_sha256": base_sha256(random_clip),
            "classes": CLASSES,
            "keys": ("a", "b", "c"),
            "templates": ("a photo of a {}.",),
        }
        | changes
    )


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def zero_shot(random_clip, tmp_path):
    """The folder of a zero-shot classifier."""
    save_classifier(tmp_path / "zeroshot", told(random_clip))
    return tmp_path / "zeroshot"


def loss_on(clip, pixels, tokens, count):
    """The distance of images to a prompt, `count` times."""
    for _ in range(count):
        yield -(clip.encode_images(pixels) @ clip.encode_texts(tokens).T).mean()


def fitted(random_clip, folder, method, names=("q", "v")):
    """A CLIP with an adapter whose parameters were all changed, and the adapted encoders."""
    clip, options = load_clip(str(random_clip)), AdapterOptions(method=method, rank=4, inner_r=2, **TINY)
    components = adapters.attach(clip, options, TargetLayers(projections=list(names), layers="last-1"))
    tokens = clip.tokenizer(["a photo of a cat."])
    pixels = to_pixels(PIXELS[:2].numpy())
    losses = partial(loss_on, clip, pixels, tokens)
    adapters.start(clip, options, components, [pixels], tokens, folder / "cache", 0, losses)
    with torch.no_grad():
        for place, parameter in enumerate(trained_parameters(components)):
            parameter.add_(0.5 * random(*parameter.shape, seed=place))
    return clip, components


@torch.no_grad()
def stock_logits(model, clip, texts):
    """The logits of the images and texts by open_clip."""
    logits, _ = model.get_logits(to_pixels(PIXELS.numpy()), clip.tokenizer(texts))
    return logits


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_probabilities_are_the_softmax_of_open_clips_logits_over_the_temperature(random_clip, tmp_path, temperature):
    save_classifier(tmp_path / "own", told(random_clip, temperature=temperature))
    found = FewShotClassifier.from_run(tmp_path / "own").predict(IMAGES)
    texts = ["a photo of a red star.", "a photo of a cat.", "a photo of a grey dog."]
    expected = stock_logits(mini_clip.load_model(random_clip), load_clip(str(random_clip)), texts)
    assert expected.std(dim=0).min() > 0.05
    torch.testing.assert_close(found.probabilities, (expected / temperature).softmax(dim=1), atol=1e-5, rtol=0)
    assert found.labels == tuple(CLASSES[place] for place in expected.argmax(dim=1))


@torch.no_grad()
def test_an_ensemble_of_templates_is_a_mean_direction(random_clip, tmp_path):
    save_classifier(tmp_path / "own", told(random_clip, templates=("{}", "a {}.")))
    model, clip = mini_clip.load_model(random_clip), load_clip(str(random_clip))
    texts = [template.format(name) for name in ("red star", "cat", "grey dog") for template in ("{}", "a {}.")]
    means = model.encode_text(clip.tokenizer(texts), normalize=True).unflatten(0, (3, 2)).mean(dim=1)
    images = model.encode_image(to_pixels(PIXELS.numpy()), normalize=True)
    expected = model.logit_scale.exp() * images @ (means / means.norm(dim=1, keepdim=True)).T
    found = FewShotClassifier.from_run(tmp_path / "own").predict(IMAGES).probabilities
    torch.testing.assert_close(found, expected.softmax(dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", full_precision_methods())
def test_an_adapter_is_loaded_at_its_scale_and_at_0_is_zero_shot(random_clip, zero_shot, tmp_path, method):
    clip, components = fitted(random_clip, tmp_path, method)
    base = FewShotClassifier.from_run(zero_shot).predict(IMAGES).probabilities
    for scale in (0.0, 0.5 if adapters.allows_any_scale(components) else 1.0):
        adapters.set_scale(components, scale)
        # The files contain the adapter as trained, independent of its current scale.
        save_classifier(tmp_path / str(scale), told(random_clip, method, scale=scale), components)
        found = FewShotClassifier.from_run(tmp_path / str(scale)).predict(IMAGES).probabilities
        expected = stock_logits(clip.model, clip, [f"a photo of a {name}." for name in ("red star", "cat", "grey dog")])
        torch.testing.assert_close(found, expected.softmax(dim=1), atol=1e-5, rtol=0)
        assert ((found - base).abs().max() < 1e-6) == (scale == 0)


def test_the_text_encoder_runs_once_and_no_weight_is_left_to_train(random_clip, tmp_path):
    _, components = fitted(random_clip, tmp_path, "nora")
    save_classifier(tmp_path / "own", told(random_clip, "nora"), components)
    classifier = FewShotClassifier.from_run(tmp_path / "own")
    runs = []
    classifier.clip.model.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    classifier.predict(IMAGES)
    assert not runs
    assert not any(parameter.requires_grad for parameter in classifier.clip.model.parameters())
    assert not classifier.clip.model.training


def heads():
    """A head of each kind, for features of the encoder."""
    weight = random(3, WIDTH)
    keys = torch.nn.functional.normalize(random(6, WIDTH, seed=2), dim=1)
    return {
        "linear_probe": LinearHead(weight=weight, bias=random(3)),
        "tip_adapter": KeyValueCache(
            weight=weight, keys=keys, values=torch.eye(3).repeat(2, 1), alpha=torch.tensor(2.0), beta=torch.tensor(3.0)
        ),
        "zeroshot": LinearHead.unbiased(weight),
        "coop": Prompted(weight=weight, bias=torch.zeros(3), context=random(4, mini_clip.TEXT_WIDTH)),
    }


@torch.no_grad()
@pytest.mark.parametrize("method", sorted(heads()))
def test_a_predictor_reads_the_features_of_the_frozen_encoder(random_clip, tmp_path, method):
    head = heads()[method]
    save_classifier(tmp_path / "own", told(random_clip, method, temperature=3.0), predictor=Predictor(head, 7))
    found = FewShotClassifier.from_run(tmp_path / "own").predict(IMAGES, batch_size=2).probabilities
    features = mini_clip.load_model(random_clip).encode_image(to_pixels(PIXELS.numpy()), normalize=True)
    torch.testing.assert_close(found, (head(features) / 3).softmax(dim=1), atol=1e-5, rtol=0)


def test_the_control_reads_raw_pixels(random_clip, tmp_path):
    head = LinearHead(weight=random(3, 3 * 32 * 32) / 50, bias=random(3))
    save_classifier(tmp_path / "own", told(random_clip, "pixels"), predictor=Predictor(head, 7, reads="pixels"))
    found = FewShotClassifier.from_run(tmp_path / "own").predict(IMAGES).probabilities
    torch.testing.assert_close(found, head(torch.stack(list(map(raw_pixels, IMAGES)))).softmax(dim=1))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_files_images_and_tensors_are_classified_alike(zero_shot, tmp_path, batch_size):
    paths = [tmp_path / f"{place}.png" for place in range(len(IMAGES))]
    for image, path in zip(IMAGES, paths, strict=True):
        image.save(path)
    tensors = PIXELS.permute(0, 3, 1, 2)
    classifier = FewShotClassifier.from_run(zero_shot)
    expected = classifier.predict(IMAGES, batch_size).probabilities
    for given in (paths, list(map(str, paths)), list(tensors), tensors, tensors / 255, (tensors / 255).half()):
        assert torch.equal(classifier.predict(given, batch_size).probabilities, expected)
    for single in (IMAGES[2], paths[2], str(paths[2]), tensors[2], tensors[2] / 255):
        torch.testing.assert_close(classifier.predict(single).probabilities, expected[2:3], atol=1e-6, rtol=0)


def test_an_image_that_cannot_be_read_is_named(zero_shot, tmp_path):
    (tmp_path / "cut.png").write_bytes(stored_image(0, side=64)[:-500])
    with pytest.raises(InputError, match=r"cut\.png' cannot be read as an image"):
        FewShotClassifier.from_run(zero_shot).predict([IMAGES[0], tmp_path / "cut.png"])


def test_predictions_have_labels_and_sorted_top_classes(zero_shot, tmp_path):
    IMAGES[0].save(tmp_path / "0.png")
    found = FewShotClassifier.from_run(zero_shot).predict([tmp_path / "0.png", IMAGES[1]])
    assert found.probabilities.dtype == torch.float32
    torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(2))
    by_class = [dict(zip(CLASSES, own.tolist(), strict=True)) for own in found.probabilities]
    for own, expected in zip(found.top(2), by_class, strict=True):
        assert own == sorted(expected.items(), key=lambda pair: -pair[1])[:2]
    assert [len(own) for own in found.top(99)] == [3, 3]
    header, *rows = found.table()
    assert header == ["image", "class", "probability", *CLASSES]
    assert [row[0] for row in rows] == [str(tmp_path / "0.png"), "images[1]"]
    for row, expected in zip(rows, by_class, strict=True):
        assert row[1] == max(expected, key=expected.get)
        assert float(row[2]) == pytest.approx(expected[row[1]], rel=1e-4)
        assert list(map(float, row[3:])) == pytest.approx(list(expected.values()), rel=1e-4)


@pytest.mark.parametrize("method", ["zeroshot", "nora"])
def test_added_classes_have_the_logits_of_their_prompts_and_the_others_keep_theirs(random_clip, tmp_path, method):
    adapter = fitted(random_clip, tmp_path, method)[1] if method == "nora" else None
    few = told(random_clip, method, temperature=2.0, templates=("{}", "one {} on grass"))
    save_classifier(tmp_path / "few", few, adapter)
    save_classifier(tmp_path / "all", replace(few, classes=CLASSES + MORE, keys=CLASSES + MORE), adapter)
    known = FewShotClassifier.from_run(tmp_path / "few")
    wider = known.with_classes(*MORE)
    assert (known.classes, wider.classes) == (CLASSES, CLASSES + MORE)
    expected = FewShotClassifier.from_run(tmp_path / "all").predict(IMAGES).probabilities
    found = wider.predict(IMAGES).probabilities
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found[:, :3] / found[:, :3].sum(dim=1, keepdim=True), known.predict(IMAGES).probabilities, atol=1e-5, rtol=0
    )


def test_classes_that_cannot_be_added_are_named(random_clip, zero_shot, tmp_path):
    classifier = FewShotClassifier.from_run(zero_shot)
    with pytest.raises(InputError, match="The name of a new class must not be empty or in use, got 'red star'"):
        classifier.with_classes("red star")
    assert classifier.with_classes() is classifier
    save_classifier(tmp_path / "probe", told(random_clip, "linear_probe"), predictor=Predictor(heads()["linear_probe"], 7))
    with pytest.raises(InputError, match="'boat' cannot be added: the method of this predictor needs images of every class"):
        FewShotClassifier.from_run(tmp_path / "probe").with_classes("boat")


@pytest.fixture
def run(random_clip, tmp_path):
    """The directory of a run with two trials, whose report names the second."""
    for name, classes in (("zeroshot", CLASSES), ("nora", ("one", "two", "three"))):
        save_classifier(tmp_path / "run" / "trials" / name, told(random_clip, classes=classes))
    report_of(tmp_path / "run", "trials/nora")
    return tmp_path / "run"


def report_of(run, named):
    (run / "report.json").write_text(json.dumps({"format": 1, "classifier": named}))


def test_a_run_loads_the_trial_in_its_report_and_a_trials_folder_itself(run):
    assert FewShotClassifier.from_run(run).classes == ("one", "two", "three")
    assert FewShotClassifier.from_run(str(run / "trials" / "zeroshot")).classes == CLASSES


@pytest.mark.parametrize("named", ["../outside", "trials/../../outside", "{outside}", "link", 3, None, ["trials/nora"]])
def test_a_report_that_names_a_folder_outside_its_run_is_refused(run, random_clip, named):
    outside = run.parent / "outside"
    save_classifier(outside, told(random_clip))
    (run / "link").symlink_to(outside)
    report_of(run, str(outside) if named == "{outside}" else named)
    with pytest.raises(InputError, match=r"classifier in '.*report\.json' must name a folder within the run, got"):
        FewShotClassifier.from_run(run)


def test_missing_files_are_named(run, random_clip, tmp_path):
    with pytest.raises(InputError, match=r"no classifier at '.*trials', neither classifier\.json nor report\.json"):
        FewShotClassifier.from_run(run / "trials")
    report_of(run, "trials/lora")
    with pytest.raises(InputError, match=r"names 'trials/lora', which has no classifier\.json"):
        FewShotClassifier.from_run(run)
    told(random_clip, "gda").write(tmp_path / "gda" / "classifier.json")
    with pytest.raises(InputError, match=r"method 'gda' needs '.*predictor\.safetensors', which is missing"):
        FewShotClassifier.from_run(tmp_path / "gda")


@pytest.mark.parametrize("method", ["nora", "lora"])
@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_lacks_a_file_is_refused(random_clip, tmp_path, method, lost):
    _, components = fitted(random_clip, tmp_path, method)
    save_classifier(tmp_path / "own", told(random_clip, method), components)
    (tmp_path / "own" / "adapter" / "full" / "text" / lost).unlink()
    with pytest.raises((InputError, AdapterFileError), match=f"full/text.* {lost}|full/text.*/{lost}"):
        FewShotClassifier.from_run(tmp_path / "own")


def test_a_pickle_is_never_opened(random_clip, tmp_path):
    told(random_clip, "gda").write(tmp_path / "classifier.json")
    torch.save({"weight": torch.zeros(3, WIDTH)}, tmp_path / "predictor.safetensors")
    with pytest.raises(AdapterFileError, match="is a pickle or zip archive"):
        FewShotClassifier.from_run(tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, WIDTH), "must have 3 classes, as classifier.json has, got 4"),
        ((3, 24), "features of width 24, but those of .* have width 192"),
    ],
)
def test_a_predictor_of_something_else_is_refused(random_clip, tmp_path, shape, message):
    predictor = Predictor(LinearHead.unbiased(torch.ones(shape)), 7)
    save_classifier(tmp_path, told(random_clip, "gda"), predictor=predictor)
    with pytest.raises(InputError, match=message):
        FewShotClassifier.from_run(tmp_path)


def test_a_moved_base_model_can_be_given(random_clip, tmp_path):
    save_classifier(tmp_path / "own", told(random_clip, model=str(tmp_path / "gone")))
    with pytest.raises(InputError, match=r"was fitted on the model '.*gone', which no longer exists\. Give --model"):
        FewShotClassifier.from_run(tmp_path / "own")
    expected = FewShotClassifier.from_run(tmp_path / "own", model=str(random_clip)).predict(IMAGES)
    save_classifier(tmp_path / "own", told(random_clip, pretrained=str(tmp_path / "gone.safetensors")))
    with pytest.raises(InputError, match=r"fitted on the weights '.*gone\.safetensors', .*Give --pretrained"):
        FewShotClassifier.from_run(tmp_path / "own")
    found = FewShotClassifier.from_run(tmp_path / "own", model=str(random_clip)).predict(IMAGES)
    assert torch.equal(found.probabilities, expected.probabilities)
    shutil.copy(random_clip / mini_clip.WEIGHTS_FILE, tmp_path / "moved.safetensors")
    found = FewShotClassifier.from_run(tmp_path / "own", pretrained=str(tmp_path / "moved.safetensors")).predict(IMAGES)
    assert torch.equal(found.probabilities, expected.probabilities)


def test_other_weights_of_the_same_shape_are_refused(random_clip, zero_shot, tmp_path):
    state = mini_clip.load_model(random_clip).state_dict()
    save_file(
        {name: value + 0.01 if name == "text_projection" else value for name, value in state.items()}, tmp_path / "o.safetensors"
    )
    with pytest.raises(InputError, match=f"weights of .* must be {base_sha256(random_clip)}, got .*same model and weights"):
        FewShotClassifier.from_run(zero_shot, pretrained=str(tmp_path / "o.safetensors"))


def test_an_unavailable_device_is_named(zero_shot):
    with pytest.raises(InputError, match="device must be available to PyTorch on this machine, such as cpu, got 'gpu'"):
        FewShotClassifier.from_run(zero_shot, device="gpu")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_of_zero_is_refused(zero_shot, batch_size):
    with pytest.raises(InputError, match=f"batch_size must be at least 1, got {batch_size}"):
        FewShotClassifier.from_run(zero_shot).predict(IMAGES, batch_size)


def test_a_classifier_file_is_read_as_written(random_clip, tmp_path):
    written = told(random_clip, "nora", pretrained="x.safetensors", scale=0.25, temperature=1.5)
    written.write(tmp_path / "classifier.json")
    assert ClassifierFile.read(tmp_path / "classifier.json") == written


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 3}, "format must be 2, the format that this version reads, got 3"),
        ({"method": "os.system"}, "method must be one of .*nora.*zeroshot.*, got 'os.system'"),
        ({"model": ""}, "model must be the name or folder of a CLIP model, got ''"),
        ({"base_sha256": "0" * 63}, "base_sha256 must be 64 hexadecimal digits, got '000"),
        ({"pretrained": 3}, "pretrained must be a tag, a file or null, got 3"),
        ({"classes": ["cat"]}, r"classes must be a list of two names or more, got \['cat'\]"),
        ({"classes": "cat"}, "classes must be a list of two names or more, got 'cat'"),
        ({"keys": ["a", " ", "c"]}, "keys must be a list of names"),
        ({"keys": ["a"]}, "keys must have one entry for each of the 3 classes, got 1"),
        ({"templates": ["a photo"]}, "A prompt template must contain {} once"),
        ({"templates": []}, "templates must contain at least one prompt template, got none"),
        ({"scale": 1.5}, r"scale must be a number in \[0, 1\], got 1.5"),
        ({"scale": True}, r"scale must be a number in \[0, 1\], got True"),
        ({"method": "gda", "scale": 0.5}, "scale must be 1 for the method 'gda', which has no adapter, got 0.5"),
        ({"temperature": 0}, "temperature must be a number above 0, got 0"),
        ({"temperature": float("nan")}, "temperature must be a number above 0, got nan"),
        ({"extra": 1}, "missing: none, unknown: extra"),
    ],
)
def test_a_file_with_an_invalid_field_is_refused_by_field(random_clip, tmp_path, changed, message):
    path = tmp_path / "classifier.json"
    told(random_clip, "nora").write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(InputError, match=rf"'.*classifier\.json' .*{message}"):
        ClassifierFile.read(path)


def test_a_file_without_a_field_is_refused(random_clip, tmp_path):
    path = tmp_path / "classifier.json"
    told(random_clip).write(path)
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "keys"}))
    with pytest.raises(InputError, match="missing: keys, unknown: none"):
        ClassifierFile.read(path)


def test_a_method_is_saved_with_its_adapter_or_predictor_only(random_clip, tmp_path):
    predictor = Predictor(heads()["linear_probe"], 7)
    adapter = {"image": torch.nn.Identity()}
    for method, given, message in (
        ("nora", {}, "'nora' must be saved with an adapter only, got neither"),
        ("nora", {"predictor": predictor}, "'nora' must be saved with an adapter only, got predictor"),
        ("gda", {}, "'gda' must be saved with a predictor only, got neither"),
        ("gda", {"adapter": adapter, "predictor": predictor}, "got adapter and predictor"),
        ("zeroshot", {"adapter": adapter}, "'zeroshot' must be saved with a predictor only, got adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            save_classifier(tmp_path / "own", told(random_clip, method), **given)
    assert not (tmp_path / "own").exists()


def test_a_classifier_file_of_format_1_is_read(random_clip, tmp_path):
    written = told(random_clip, "nora", scale=0.25)
    written.write(tmp_path / "classifier.json")
    content = json.loads((tmp_path / "classifier.json").read_text()) | {"format": 1}
    content["strength"] = content.pop("scale")
    (tmp_path / "classifier.json").write_text(json.dumps(content))
    assert ClassifierFile.read(tmp_path / "classifier.json") == written
