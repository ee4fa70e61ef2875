"""Whatever a recipe or an override holds, the answer is a config or a message, never a trace."""

import contextlib

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtnlg.config import ConfigError, MtnlgError, RunConfig
from mtnlg.config.check import setting_names
from mtnlg.config.load import load_run_config, save_run_config

NAMES = setting_names(RunConfig)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["adamw", "rotary", "1e3", "null", "98,1,1", "a.txt", "tiny-1m", "[", "{a: 1}", "2024-01-01"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*NAMES, *{name.split(".")[0] for name in NAMES}, "model.x", "", ".", "a.b.c"])
QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def nested(pairs):
    values = {}
    for key, value in pairs.items():
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                break
        else:
            inner[last] = value
    return values


@QUICK
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_settings_give_a_config_that_survives_saving_or_a_message(tmp_path, pairs):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(nested(pairs), allow_unicode=True), encoding="utf-8")
    try:
        config = load_run_config(recipe)
    except MtnlgError as error:
        assert str(error)
        return
    save_run_config(config, tmp_path / "saved.yaml")
    assert load_run_config(tmp_path / "saved.yaml") == config


@QUICK
@given(st.text(max_size=60))
def test_any_text_as_a_recipe(tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(ConfigError):
        load_run_config(recipe)


@QUICK
@given(st.lists(st.tuples(KEYS, st.text(max_size=10)), max_size=3))
def test_any_overrides(pairs):
    with contextlib.suppress(MtnlgError):
        load_run_config(None, [f"--{key}={value}" for key, value in pairs])


@QUICK
@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_words(words):
    with contextlib.suppress(MtnlgError):
        load_run_config(None, words)
