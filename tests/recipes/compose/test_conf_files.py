"""YAML that a user edited, in `hydra_conf/` and in a run's folder."""

import shutil

import hydra
import pytest

from recipes.compose import recipe
from recipes.compose.recipe import compose_recipe, from_yaml, to_yaml
from recipes.errors import ConfigError
from recipes.paths import CONF

BROKEN = {
    "cut off": ("lr: [1", "', line 1: expected ',' or ']', but got '<stream end>'; fix it there"),
    "a tab": ("a: 1\n\tlr: 1", "', line 2: found character '\\t' that cannot start any token"),
    "two colons": ("a: 1\nlr: 1: 2", "', line 2: mapping values are not allowed here"),
    "a key twice": ("lr: 1\nlr: 2\n", "', line 2: found duplicate key lr"),
    "a list": ("- lr\n", "' holds no `name: value` lines, which belong there"),
    "a number": ("5", "' holds no `name: value` lines, which belong there"),
    "Latin-1": ("lr: 1\n# ü", "', line 2 is not UTF-8, and YAML belongs there"),
    "a control character": ("lr: 1\nb: \x01", "', line 2 holds a control character"),
    "code": ("lr: !!python/object/apply:os.getcwd []", "', line 1: could not determine a constructor"),
}


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """The folder of choices as a user may edit it."""
    shutil.copytree(CONF, tmp_path / "hydra_conf")
    monkeypatch.setattr(recipe, "CONF", tmp_path / "hydra_conf")
    monkeypatch.setattr(recipe, "compose", hydra.compose)  # tests share one composition of the same words otherwise
    return tmp_path / "hydra_conf"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_choice_is_named_with_its_line(conf, name):
    path = conf / "optim" / "tiny.yaml"
    text, says = BROKEN[name]
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        compose_recipe([])
    assert str(error.value).startswith(f"'{path}{says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: {a: 1}", "optim.lr: Value '{'a': 1}' of type 'DictConfig' could not be converted to Float (hydra_conf/optim/tiny.yaml)"),
        ("lr: null", "optim.lr: Incompatible value 'None' for field of type 'float' (hydra_conf/optim/tiny.yaml)"),
        ("lrr: 1", "optim.lrr: Key 'lrr' not in 'Optim' (hydra_conf/optim/tiny.yaml)"),
        ("", "optim.lr is not set; write optim.lr=VALUE"),
        ("defaults: 5", "Invalid defaults list in 'optim/tiny', defaults must be a list (got int)"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_a_choice_is_named_with_its_file(conf, text, says):
    (conf / "optim" / "tiny.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        compose_recipe([])
    assert str(error.value) == says


def test_a_choice_that_nobody_took_may_be_broken(conf):
    (conf / "optim" / "limi.yaml").write_text("[")
    compose_recipe([])


@pytest.mark.parametrize("name", BROKEN)
def test_a_runs_recipe_that_was_edited_is_named_with_its_line(tmp_path, name):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(compose_recipe([])))
    assert from_yaml(path) == compose_recipe([])
    text, says = BROKEN[name]
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        from_yaml(path)
    assert str(error.value).startswith(f"'{path}{says}")
