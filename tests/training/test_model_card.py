"""The model card: valid for any words, and true to the run."""

import ast
import json
import re
import struct

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_options import full_precision_methods

from pipelines.built_in import BUILT_IN_MODEL
from training.options import parse_options
from training.runs.card_text import as_text
from training.runs.run import RunDirectory
from training.runs.run_files import Certificate
from training.subject.model_card import model_card, scorer_name

PROMPTS = [
    "a photo of sks dog",
    'a "quoted" dog, it\'s: #1',
    "two\nlines\n---\nof: yaml",
    "{braces} [list] - *stars* `ticks` \\ back & <script>alert(1)</script>",
    "# heading\n```\nfence",
    "été 狗 🐕",
    "yes",
    "null: ~",
]

CERTIFICATE = Certificate(True, {}, {}, 1.0, 1.0, [], [], [], {}, "float32", "cpu").to_json()


def run_with(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    run.update_status(num_trainable_parameters=1234, seconds=5.0)
    run.log(0, heldout_loss=0.5)
    run.log(4, heldout_loss=0.25)
    for file in ("diffusers/pytorch_lora_weights.safetensors", "kohya/run.safetensors"):
        (run.path / file).parent.mkdir()
        # A file without tensors: the length of the header, and the header.
        (run.path / file).write_bytes(struct.pack("<Q", 2) + b"{}")
    return run


def options_for(prompt, tmp_path, *more):
    return parse_options(["--instance_data_dir", str(tmp_path), "--instance_prompt", prompt, *more])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_header_is_yaml_and_the_code_is_python_for_any_prompt(tmp_path, prompt):
    card = model_card(run_with(tmp_path), options_for(prompt, tmp_path), images=3)
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])
    assert header["instance_prompt"] == prompt
    assert "lora" in header["tags"]
    assert ModelCard(card).data.instance_prompt == prompt
    code = re.search(r"```python\n(.*?)\n```\n", card, re.S)[1]
    literals = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert f"{prompt} in the snow" in literals


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_title_is_one_line_without_html(tmp_path, prompt):
    card = model_card(run_with(tmp_path), options_for(prompt, tmp_path), images=3)
    body = card.split("\n---\n", 1)[1] if prompt != PROMPTS[2] else card.rsplit("\n---\n", 1)[1]
    assert body.startswith("# ")
    assert body.splitlines()[1] == ""
    assert "<script>" not in body.split("```python")[0]


def test_words_stay_readable_where_nothing_needs_escaping():
    assert as_text("a photo of sks dog") == "a photo of sks dog"
    assert as_text(" two\n lines") == "two lines"
    assert as_text("*a* <b>") == r"\*a\* &lt;b&gt;"


def test_the_card_has_the_results_of_the_run(tmp_path):
    run = run_with(tmp_path)
    said = {"step": 2, "last": 4, "why": "Because.", "warnings": ["Overfitting: yes."], "curve": [{"step": 0, "heldout": 0.5}]}
    said["scores"] = {}
    (run.path / "suggestion.json").write_text(json.dumps(said))
    (run.path / "certificate.json").write_text(json.dumps({**CERTIFICATE, "largest_difference": {"kohya": 0.25}, "effect": 40.2}))
    card = model_card(run, options_for("dog", tmp_path), images=3)
    for expected in (
        "0.5000 before training, 0.2500 after",
        "**Recommended: step 2 of 4.** Because.",
        "> **Warning.** Overfitting: yes.",
        "at most 0.25 of 255 levels",
        "(before_after.png)",
        "1,234 trainable parameters",
        r"| diffusers/pytorch\_lora\_weights.safetensors | 10 |",
    ):
        assert expected in card


@pytest.mark.parametrize("method", full_precision_methods())
def test_only_the_card_of_a_dora_names_the_programs_that_ignore_its_row_norms(tmp_path, method):
    run = run_with(tmp_path)
    said = {
        **CERTIFICATE,
        "largest_difference": {"kohya": 0.25},
        "effect": 40.2,
        "converted": ["kohya"] if method == "dora" else [],
    }
    (run.path / "certificate.json").write_text(json.dumps(said))
    card = model_card(run, options_for("dog", tmp_path, "--method", method), images=3)
    for words in ("stock diffusers and sd-scripts ignore it, A1111 takes", "kohya file was converted to diffusers' format first"):
        assert (words in card) == (method == "dora")


def test_the_card_of_an_approximation_has_its_mean_difference_and_the_methods_note(tmp_path):
    run = run_with(tmp_path)
    said = {
        **CERTIFICATE,
        "exact": False,
        "mean_difference": {"kohya": 3.21},
        "largest_difference": {"kohya": 90.0},
        "mean_effect": 9.87,
    }
    (run.path / "certificate.json").write_text(json.dumps(said))
    card = model_card(run, options_for("dog", tmp_path, "--method", "t_lora"), images=3)
    assert "images differ by 3.2 of 255 levels (kohya) from those of the native file, and by 9.9 from those" in card
    assert "Certified" not in card
    assert "the average over all noise levels" in card


def scored(tmp_path, curve):
    """A run whose samples were scored, and which suggests step 2."""
    run = run_with(tmp_path)
    values = {"subject": 0.25, "prompt": 0.125, "copy": 0.5, "nearest": 0.75, "nearest_limit": 0.9}
    said = {"step": 2, "last": 4, "why": "Because.", "warnings": ["Alas."], "curve": curve}
    said["scores"] = {"0": values, "10": {**values, "subject": 0.5}, "2": {**values, "subject": 0.375}}
    (run.path / "suggestion.json").write_text(json.dumps(said))
    return run


def test_the_card_has_the_scores_and_loss_of_every_step_and_the_image_scorer(tmp_path):
    run = scored(tmp_path, [{"step": 0, "heldout": 0.5}, {"step": 2, "heldout": 0.375}])
    card = model_card(run, options_for("dog", tmp_path, "--image_scorer", "base"), images=3)
    table = [line for line in card.splitlines() if line.startswith("| ") and "0.125" in line]
    assert table == [
        "| base model | 0.250 | 0.125 | 0.750 | 0.50 | 0.5000 |",
        "| **2, recommended** | 0.375 | 0.125 | 0.750 | 0.50 | 0.3750 |",
        "| 10 | 0.500 | 0.125 | 0.750 | 0.50 |  |",
    ]
    assert "by the base model itself" in card
    assert "(a copy from 0.900 on)" in card


def test_a_recommendation_by_samples_alone_is_in_the_card(tmp_path):
    card = model_card(scored(tmp_path, []), options_for("dog", tmp_path), images=3)
    assert "**Recommended: step 2 of 4.** Because." in card
    assert "> **Warning.** Alas." in card


@pytest.mark.parametrize(
    ("given", "private", "said"),
    [
        ("base", True, "the base model itself"),
        ("mini", False, "the built-in CLIP"),
        ("owner/clip", False, "owner/clip"),
        ("owner/clip", True, "a CLIP or DINOv2 model"),
        ("{folder}/secret", False, "secret"),
        ("open_clip:ViT-B-16/{folder}/weights.safetensors", False, r"open\_clip:ViT\-B\-16/weights.safetensors"),
    ],
)
def test_an_image_scorer_is_named_without_its_path(tmp_path, given, private, said):
    (tmp_path / "secret").mkdir()
    (tmp_path / "weights.safetensors").touch()
    assert scorer_name(given.format(folder=tmp_path), private) == said


def test_a_hub_model_is_named_in_the_header_and_a_local_one_by_its_own_name_only(tmp_path):
    run, local = run_with(tmp_path), tmp_path / "secret" / "my-model"
    local.mkdir(parents=True)
    hub = model_card(run, options_for("dog", tmp_path, "--pretrained_model_name_or_path", "owner/model"), 3)
    assert ModelCard(hub).data.base_model == "owner/model"
    card = model_card(run, options_for("dog", tmp_path, "--pretrained_model_name_or_path", str(local)), 3)
    assert ModelCard(card).data.base_model is None
    assert "my-model" in card
    assert "secret" not in card


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (str(BUILT_IN_MODEL), 'from_pretrained(model_path("mini-sdxl"), torch_dtype=torch.float32)'),
        ("owner/model", 'from_pretrained("owner/model")'),
        ("my.safetensors", 'from_single_file("my.safetensors")'),
    ],
)
def test_the_code_loads_the_base_model_as_it_is_kept(tmp_path, model, call):
    card = model_card(run_with(tmp_path), options_for("dog", tmp_path, "--pretrained_model_name_or_path", model), 3)
    assert f"StableDiffusionXLPipeline.{call}" in card


def test_the_card_states_the_learning_rate_without_trailing_zeros(tmp_path):
    options = options_for("dog", tmp_path, "--learning_rate", "3e-3")
    assert "learning rate 0.003," in model_card(run_with(tmp_path), options, 3)


def test_a_private_card_has_neither_prompts_nor_the_name_of_a_local_model(tmp_path):
    local = tmp_path / "my-model"
    local.mkdir()
    given = options_for("a photo of zwx dog", tmp_path, "--pretrained_model_name_or_path", str(local))
    card = model_card(run_with(tmp_path), given, 3, private=True)
    assert not re.search("zwx|dog|my-model", card)
    assert "0.2500 after" in card
