import json

import pytest
from peft import PeftConfig, get_peft_config

from nora_vision import NoraConfig, NoraPeftType

FIELDS = {
    "r": 32, "inner_r": 8, "alpha": 4.0, "target_modules": ["to_v", "to_q"], "exclude_modules": ["mid"],
    "modules_to_save": ["head"], "dropout": 0.1, "inner_init": "gaussian", "inner_std": 0.1, "preserve_output": True,
    "outer_init": "awsvd",
    "init_weights": False, "rank_pattern": {"to_q": 16}, "inner_rank_pattern": {"to_v": 2},
}  # fmt: skip


def test_the_type_is_a_string_that_peft_looks_up():
    assert NoraConfig().peft_type is NoraPeftType.NORA
    assert NoraPeftType.NORA == "NORA"
    assert NoraPeftType.NORA.value == "NORA"
    assert isinstance(get_peft_config({"peft_type": "NORA", "r": 32}), NoraConfig)


def test_a_dictionary_of_the_configuration_makes_an_equal_one():
    config = NoraConfig(**FIELDS)
    assert NoraConfig(**config.to_dict()) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_a_saved_configuration_is_loaded_as_an_equal_nora_config(tmp_path):
    config = NoraConfig(**FIELDS)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert NoraConfig.from_pretrained(tmp_path) == config


def test_equal_configurations_are_saved_as_equal_bytes(tmp_path):
    NoraConfig(target_modules=["a", "b", "c"]).save_pretrained(tmp_path / "1")
    NoraConfig(target_modules=["c", "b", "a"]).save_pretrained(tmp_path / "2")
    assert (tmp_path / "1" / "adapter_config.json").read_bytes() == (tmp_path / "2" / "adapter_config.json").read_bytes()


def test_patterns_set_the_ranks_of_layers():
    config = NoraConfig(r=32, inner_r=8, rank_pattern={"to_q": 16}, inner_rank_pattern={r"mid\..*": 4})
    assert config.ranks_for("down.to_k") == (32, 8)
    assert config.ranks_for("down.to_q") == (16, 8)
    assert config.ranks_for("mid.to_q") == (16, 4)


def test_a_full_name_wins_over_other_patterns_and_needs_no_search(monkeypatch):
    searched = []
    monkeypatch.setattr("nora_vision.config.get_pattern_key", lambda keys, name: searched.append(list(keys)) or name)
    names = [f"blocks.{i}.to_q" for i in range(4)]
    ranks = {f"^{name}": i + 1 for i, name in enumerate(names[:3])}
    config = NoraConfig(r=32, inner_r=1, rank_pattern={"to_q": 16} | ranks, inner_rank_pattern=dict.fromkeys(ranks, 1))
    assert [config.ranks_for(name) for name in names] == [(1, 1), (2, 1), (3, 1), (32, 1)]
    assert searched == [["to_q"], []]
    del config.rank_pattern["to_q"]
    config.check_patterns(names, "Model")
    assert len(searched) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"r": 2.5}, "r must be an integer of at least 1, got 2.5"),
        ({"inner_r": 0}, "inner_r must be an integer of at least 1, got 0"),
        ({"r": 8, "inner_r": 9}, r"inner_r must be in \[1, r=8\], got 9"),
        ({"rank_pattern": {"to_q": -1}}, r"rank_pattern\['to_q'\] must be an integer of at least 1, got -1"),
        ({"inner_rank_pattern": {"to_q": "8"}}, r"inner_rank_pattern\['to_q'\] must be an integer of at least 1, got '8'"),
        ({"rank_pattern": {"to_q(": 8}}, r"'to_q\(' must be a layer name ending or a regular expression"),
        ({"alpha": 0.0}, "alpha must be above 0 and finite in float32, got 0.0"),
        ({"alpha": 1e39}, r"alpha must be above 0 and finite in float32, got 1e\+39"),
        ({"alpha": 10**400}, "alpha must be above 0 and finite in float32, got 1000"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"inner_std": -1.0}, "inner_std must be above 0, got -1.0"),
        ({"inner_init": "ones"}, r"inner_init must be one of \('zero', 'gaussian', .*\), got 'ones'"),
        ({"outer_init": "pca"}, r"outer_init must be one of \('svd', 'awsvd'\), got 'pca'"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NoraConfig(**fields)


def test_an_inner_rank_above_a_layers_own_outer_rank_is_refused_by_name():
    with pytest.raises(ValueError, match=r"inner_r must be in \[1, r=4\] for 'mid.to_q', got 8"):
        NoraConfig(r=32, inner_r=8, rank_pattern={"to_q": 4}).ranks_for("mid.to_q")
