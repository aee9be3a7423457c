"""What a mistake on the command line or in a YAML file gets: one sentence, the key to change."""

from __future__ import annotations

import dataclasses

import pytest
from omegaconf import OmegaConf

from training import config as config_module
from training.config import CONFIGS, compose, experiments, options
from training.errors import UserError
from training.options import SCHEMAS
from training.schema import TrainConfig, identity

QUICKSTART = "experiment=quickstart/stdlib"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "Did you mean optim.lr"),
        ("+optim.lrr=1", "Did you mean optim.lr"),
        ("++optim.lrr=1", "Did you mean optim.lr"),
        ("+sed=1", "Did you mean seed"),
        ("+model.num_layer=2", "Did you mean model.num_layers"),
        ("+data.seq_length=2", "Did you mean data.seq_len"),
        ("optim.lr=fast", "optim.lr: Value 'fast'"),
        ("loop.steps=1.5", "loop.steps: Value '1.5'"),
        ("scale.precision=fp17", "expected one of [fp32, bf16]"),
        ("optim.lr=0", "optim.lr=0.0 must be > 0"),
        ("optim.beta1=1.5", "optim.beta1=1.5 must be between 0.0 and 0.999999"),
        ("optim.lr=nan", "optim.lr=nan must be > 0"),
        ("optim.lr=inf", "optim.lr=inf must be > 0, and finite"),
        ("optim.clip_norm=0", "optim.clip_norm=0.0 must be > 0"),
        ("scale.threads=1000000", "scale.threads=1000000 must be between 1 and 1024"),
        ("model.rope_theta=inf", "model.rope_theta=inf must be a finite number"),
        ("optim=null", "choose optim=<one of adamw, muon>"),
        ("model=", "choose model=<one of"),
        ("model.name=foo", "model.name=foo is no name to be set: choose model=<one of"),
        ("data.name=markov", "data.name=markov is no name to be set: choose data=<one of"),
        ("optim.weight_decay=nan", "optim.weight_decay=nan must be at least 0"),
        ("loop.profile_steps=[5,3]", "must be [first, last]"),
        ("loop.steps=0", "loop.steps=0 must be at least 1"),
        ("model.num_heads=6", "set model.num_heads to 2, 4, 8"),
        ("model.num_kv_heads=3", "model.num_kv_heads=3 does not divide model.num_heads=4"),
        ("data.seq_len=0", "data.seq_len=0"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("run=../../etc", "must be a plain name"),
        ("run=.", "must be a plain name"),
        ("scale=h100", "Did you mean h200? Use: cpu, h200, paper"),
        ("model=transformr", "Did you mean transformer"),
        ("modle=transformer", "Did you mean model"),
        ("experiment=quickstart/stdlb", "Did you mean quickstart/stdlib"),
    ],
)
def test_mistake_is_named_with_what_was_meant(override: str, expected: str) -> None:
    overrides = [override] if override.startswith("experiment=") else [QUICKSTART, override]
    with pytest.raises(UserError) as caught:
        compose(overrides)
    assert expected in str(caught.value)
    assert "$VALUE" not in str(caught.value)
    assert caught.value.code == 2


def test_another_group_than_an_experiment_has_sizes_for_is_refused() -> None:
    with pytest.raises(UserError, match=r"`data\.views`.* for its own recipe, model and data"):
        compose(["experiment=ijepa/images", "data=moving"])


def test_numbers_in_lists_are_finite_too() -> None:
    with pytest.raises(UserError, match=r"data\.views\.jitter=inf must be a finite number"):
        compose(["experiment=lejepa/images", "data.views.jitter=[0.1,inf,0,0]"])


def test_without_the_strict_check_an_added_key_is_accepted(monkeypatch) -> None:
    """Negative control: the hole that `unknown_keys` closes is really there."""
    monkeypatch.setattr(config_module, "unknown_keys", lambda cfg: iter(()))
    assert compose([QUICKSTART, "+optim.lrr=1"]).optim.lr > 0


def test_a_typo_inside_an_experiment_file_names_the_file(tmp_path, monkeypatch) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    text = "# @package _global_\noptim:\n  lrr: 1\n"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_text(text)
    (tmp_path / "train.yaml").write_text("defaults: [schema, experiment: bad, _self_]\n")
    from training.config import config_message
    from training.options import register

    register()
    with (
        initialize_config_dir(str(tmp_path), version_base="1.3"),
        pytest.raises(Exception) as caught,
    ):
        hydra_compose("train")
    message = config_message(caught.value)
    assert "experiment/bad" in message and "Did you mean optim.lr" in message


def test_every_experiment_composes_at_every_scale() -> None:
    for name in experiments():
        for scale in options("scale"):
            sizes = CONFIGS / "experiment_scale" / name / f"{scale}.yaml"
            assert sizes.exists(), f"{name} has no sizes for scale={scale}: {sizes}"
            config = compose([f"experiment={name}", f"scale={scale}"])
            assert config.experiment == name and config.scale.name == scale


def test_every_experiment_says_its_command_and_what_it_is() -> None:
    for name, about in experiments().items():
        first = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()
        assert f"# afferent train experiment={name}" in first[:3], name
        assert about, name


def test_no_yaml_instantiates_anything() -> None:
    for file in CONFIGS.rglob("*.yaml"):
        assert "_target_" not in file.read_text(), file


def every_schema() -> list[type]:
    groups = [item.default_factory for item in dataclasses.fields(TrainConfig)]
    found = [TrainConfig, *(node for options in SCHEMAS.values() for node in options.values())]
    found += [type(make()) for make in groups if make is not dataclasses.MISSING]
    return found


def test_every_schema_accepts_its_own_defaults() -> None:
    """A run's page lists what differs from them."""
    for schema in every_schema():
        schema()


def test_every_field_has_a_line_of_meaning() -> None:
    import ast
    import inspect
    import sys

    for schema in every_schema():
        for owner in schema.__mro__[:-1]:
            (body,) = [
                node.body
                for node in ast.walk(ast.parse(inspect.getsource(sys.modules[owner.__module__])))
                if isinstance(node, ast.ClassDef) and node.name == owner.__name__
            ]
            for here, below in zip(body, [*body[1:], None], strict=True):
                if isinstance(here, ast.AnnAssign):
                    documented = isinstance(below, ast.Expr) and isinstance(
                        below.value, ast.Constant
                    )
                    assert documented, f"{owner.__name__}.{ast.unparse(here.target)}"


def test_identity_leaves_out_what_computes_nothing() -> None:
    base = compose([QUICKSTART])
    for override in ("logger=wandb", "loop.checkpoint_every=7", "run=x", "loop.time_limit_s=9"):
        assert identity(compose([QUICKSTART, override])) == identity(base), override
    for override in ("seed=1", "optim.lr=0.5", "loop.steps=9", "model.d_model=64"):
        assert identity(compose([QUICKSTART, override])) != identity(base), override


def test_resolved_config_is_plain_yaml() -> None:
    from training.run_directory import plain

    text = OmegaConf.to_yaml(plain(compose([QUICKSTART])))
    assert OmegaConf.create(text).optim.name in ("adamw", "muon")
