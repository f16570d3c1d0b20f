"""Wrong options of experts get one sentence that names option, value, rule and a value that
works."""

import dataclasses
import json
import re

import pytest

from picotron_lab.config import ConfigError, ModelConfig, model_from_file

NAN, INF = float("nan"), float("inf")

WRONG = {
    "--router tanh is not one of softmax, sigmoid.": dict(router="tanh"),
    "--router Softmax is not one of softmax, sigmoid.": dict(router="Softmax", experts=0),
    "--experts -1 must lie between 0 and 16384; try --experts 0.": dict(experts=-1),
    "--top-k 0 must lie between 1 and 16384; try --top-k 2.": dict(top_k=0),
    "--top-k -2 must lie between 1 and 16384; try --top-k 2.": dict(top_k=-2),
    "--top-k 9 must be between 1 and --experts 8; try --top-k 1.": dict(top_k=9),
    "--shared-experts -1 must lie between 0 and 1024; try --shared-experts 0.": dict(
        shared_experts=-1
    ),
    "--expert-groups 0 must lie between 1 and 16384; try --expert-groups 1.": dict(expert_groups=0),
    "--expert-groups 3 must divide --experts 8; try --expert-groups 2.": dict(
        expert_groups=3, top_groups=2
    ),
    "--expert-groups 7 must divide --experts 8; try --expert-groups 4.": dict(expert_groups=7),
    "--expert-groups 16 must divide --experts 8; try --expert-groups 8.": dict(
        expert_groups=16, top_groups=2
    ),
    "--expert-groups 6 must divide --experts 7; try --expert-groups 1.": dict(
        experts=7, expert_groups=6
    ),
    "--top-groups 0 must lie between 1 and 16384; try --top-groups 1.": dict(top_groups=0),
    "--top-groups 5 cannot be more than --expert-groups 4; try --top-groups 4.": dict(
        expert_groups=4, top_groups=5
    ),
    "--top-groups 2 cannot be more than --expert-groups 1; try --top-groups 1.": dict(top_groups=2),
    "--top-k 5 asks for more experts than --top-groups 2 of 2 each have; try --top-groups 3.": dict(
        top_k=5, expert_groups=4, top_groups=2
    ),
    "--top-k 2 asks for more experts than --top-groups 1 of 1 each have; try --top-groups 2.": dict(
        expert_groups=8
    ),
    "--capacity-factor -1 must lie between 0 and 1e+06; try --capacity-factor 1.25.": dict(
        capacity_factor=-1.0
    ),
    "--capacity-factor inf must lie between 0 and 1e+06; try --capacity-factor 1.25.": dict(
        capacity_factor=INF
    ),
    "--capacity-factor nan must lie between": dict(capacity_factor=NAN),
    "--balance-loss nan must lie between 0 and 1e+06; try --balance-loss 0.001.": dict(
        balance_loss=NAN
    ),
    "--balance-loss -0.1 must lie between": dict(balance_loss=-0.1),
    "--balance-speed nan must lie between": dict(balance_speed=NAN),
    "--balance-speed -0.001 must lie between 0 and 1000; try --balance-speed 0.001.": dict(
        balance_speed=-0.001
    ),
    "--z-loss nan must lie between": dict(z_loss=NAN),
    "--z-loss -1 must lie between 0 and 1e+06; try --z-loss 0.001.": dict(z_loss=-1.0),
    "--balance-loss 0.5 is about experts, and the model has none; add --experts 8, or leave it "
    "out.": dict(experts=0, balance_loss=0.5),
    "--router sigmoid is about experts, and the model has none": dict(experts=0, router="sigmoid"),
    "--shared-experts 1 is about experts, and": dict(experts=0, shared_experts=1),
    "--expert-groups 2 is about experts, and": dict(experts=0, expert_groups=2),
    "--top-groups 2 is about experts, and": dict(experts=0, top_groups=2),
    "--capacity-factor 1.25 is about experts, and": dict(experts=0, capacity_factor=1.25),
    "--balance-speed 0.001 is about experts, and": dict(experts=0, balance_speed=0.001),
    "--z-loss 0.001 is about experts, and": dict(experts=0, z_loss=0.001),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_options_get_a_sentence(sentence):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{"experts": 8, **WRONG[sentence]})
    message = str(caught.value)
    assert message.startswith(sentence)
    assert message.endswith(".") and "\n" not in message and ". " not in message


@pytest.mark.parametrize("sentence", WRONG)
def test_the_value_that_a_sentence_suggests_works(sentence):
    options = {"experts": 8, **WRONG[sentence]}
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**options)
    suggestion = re.search(r"(?:try|add) --([a-z-]+) ([\d.]*\d)", str(caught.value))
    if suggestion is None:  # a word out of a list
        assert " is not one of " in str(caught.value)
        options.update(router="softmax", experts=8)
    else:
        field, value = suggestion[1].replace("-", "_"), suggestion[2]
        options[field] = float(value) if "." in value else int(value)
        if options["experts"] == 8:
            options.setdefault("expert_groups", 2)  # --top-groups 2 needs as many
    ModelConfig(**options)


RIGHT = [
    dict(),
    dict(experts=1, top_k=1),
    dict(experts=8, top_k=8),
    dict(experts=8, top_k=4, expert_groups=4, top_groups=2),
    dict(experts=8, top_k=4, expert_groups=8, top_groups=8),
    dict(experts=7, top_k=1, expert_groups=7, top_groups=1),
    dict(experts=8, router="sigmoid", shared_experts=1, capacity_factor=0.5, balance_loss=0,
         balance_speed=0.001, z_loss=1e-3),
    # DeepSeek-V3 (2412.19437), section 4.2
    dict(experts=256, top_k=8, router="sigmoid", shared_experts=1, expert_groups=8, top_groups=4,
         balance_loss=0.0001, balance_speed=0.001),
]  # fmt: skip


@pytest.mark.parametrize("options", RIGHT)
def test_what_is_right_is_taken(options):
    made = ModelConfig(**options)
    assert {field: getattr(made, field) for field in options} == options
    assert dataclasses.replace(made, layers=3).experts == options.get("experts", 0)


def test_experts_from_a_file(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"experts": 4, "router": "sigmoid", "z_loss": 1}))
    assert model_from_file(str(path)).z_loss == 1
    for text, sentence in [
        ('{"experts": 4, "router": 1}', "router 1 must be of type str"),
        ('{"experts": 4, "expert_groups": 2.0}', "expert_groups 2.0 must be of type int"),
        ('{"experts": 4, "z_loss": NaN}', "--z-loss nan must lie between"),
        ('{"experts": 4, "balance_loss": "1"}', "balance_loss '1' must be of type float"),
        ('{"top_groups": 2}', "--top-groups 2 is about experts"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            model_from_file(str(path))
