# SPDX-License-Identifier: MIT
"""Recipes: those that ship, every bad one, and the page that describes them."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from fastmqa_export.errors import ConfigError
from fastmqa_export.recipe import DTYPES, Recipe, Span, find_recipe

ENGINES = Path(__file__).parent.parent / "engines"
SHIPPED = {"t4": 75, "a10": 86, "l4": 89, "a100": 80, "h100": 90, "rtx4090": 89}


def test_the_shipped_recipes_are_these():
    assert {path.stem for path in (ENGINES / "recipes").iterdir()} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_holds_what_it_says(name):
    recipe = Recipe.read(find_recipe(name))
    assert recipe.sm == SHIPPED[name]
    assert recipe.memory_gb and recipe.memory_gb * 1000 > recipe.workspace_mib
    assert recipe.prefill_sequence.max <= recipe.capacity
    assert ("bfloat16" in recipe.dtypes) == (recipe.sm >= 80)
    # A key with the value that it has anyway would say nothing.
    given = tomllib.loads(find_recipe(name).read_text(encoding="utf-8"))
    default = Recipe()
    repeated = [k for k in given if k != "dtypes" and getattr(recipe, k) == getattr(default, k)]
    assert set(repeated) <= {"capacity", "workspace_mib", "prefill_sequence"}


def test_a_key_that_is_not_given_has_its_default():
    assert Recipe.parse({}) == Recipe()
    assert Recipe.parse({"decode_batch": [1, 2, 4]}) == Recipe(decode_batch=Span(1, 2, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bacth = 1", "unknown key bacth; a recipe may have gpu, sm, "),
        ("sm = 70", "sm is 70; it must be a compute capability"),
        ("sm = true", "sm is True; it must be"),
        ('sm = "7.5"', "sm is '7.5'; it must be a compute capability without its point"),
        ("gpu = 4", "gpu is 4; it must be the name of a GPU"),
        ("memory_gb = 0", "memory_gb is 0; it must be a number above 0"),
        ("memory_gb = nan", "memory_gb is nan; it must be a number above 0"),
        ('dtypes = ["int8"]', "dtypes is ['int8']; it must be a list of float16, bfloat16"),
        ("dtypes = []", "dtypes is []; it must be a list of"),
        ("capacity = 0", "capacity is 0; it must be an integer from 1 on"),
        ("capacity = 2.5", "capacity is 2.5; it must be an integer"),
        ("prefill_batch = 4", "prefill_batch is 4; it must be [min, opt, max]"),
        ("prefill_batch = [1, 2]", "prefill_batch is [1, 2]; it must be [min, opt, max]"),
        ("prefill_batch = [0, 1, 1]", "prefill_batch is [0, 1, 1]; it must be [min, opt, max]"),
        ("decode_batch = [4, 1, 8]", "decode_batch = [4, 1, 8] is [min, opt, max]"),
        ("decode_batch = [1, 9, 8]", "it must hold that 1 ≤ min ≤ opt ≤ max"),
        ("workspace_mib = -1", "workspace_mib is -1; it must be an integer from 1 to 2^20"),
        ("optimization_level = 6", "optimization_level is 6; it must be an integer from 0 to 5"),
        ("capacity = ", "is no TOML file"),
        ("[builder]\nworkspace_mib = 1", "unknown key builder"),
    ],
    ids=lambda text: text.partition(" is ")[0][:30],
)
def test_a_bad_recipe_is_refused_with_its_file_and_key(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Recipe.read(path)
    assert str(path) in str(caught.value)


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file"):
        Recipe.read(find_recipe(str(tmp_path / "none.toml")))
    (tmp_path / "latin.toml").write_bytes(b'gpu = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml is no TOML file"):
        Recipe.read(tmp_path / "latin.toml")


def test_an_unknown_name_is_refused_with_those_that_there_are():
    known = ", ".join(sorted(SHIPPED))
    with pytest.raises(ConfigError, match=f"no recipe named v100; there are {known}"):
        find_recipe("v100")


def test_limits_change_what_they_name():
    recipe = Recipe(decode_batch=Span(1, 8, 32)).limited(max_batch=4)
    assert recipe.prefill_batch == Span(1, 1, 4)
    assert recipe.decode_batch == Span(1, 4, 4)
    assert Recipe().limited(capacity=256).prefill_sequence == Span(1, 256, 256)
    assert Recipe().limited(capacity=4096).prefill_sequence == Span(1, 512, 2048)
    assert Recipe().limited(capacity=4096, max_sequence=4096).prefill_sequence.max == 4096
    assert Recipe().limited() == Recipe()


def test_a_limit_below_the_smallest_size_is_refused():
    with pytest.raises(ConfigError, match=r"decode_batch = \[8, 4, 4\] is \[min, opt, max\]"):
        Recipe(decode_batch=Span(8, 8, 8)).limited(max_batch=4)


def test_the_page_describes_every_key_with_its_default():
    rows = re.findall(
        r"^\| `(\w+)` \| (.+?) \|", (ENGINES / "README.md").read_text(encoding="utf-8"), re.M
    )
    fields = {field.name: getattr(Recipe(), field.name) for field in dataclasses.fields(Recipe)}
    shown = {
        None: ("any", "not checked"),
        DTYPES: ("all",),
        "any": ('`"any"`',),
        **{
            value: (f"`{list(dataclasses.astuple(value))}`",)
            for value in fields.values()
            if isinstance(value, Span)
        },
    }
    assert [name for name, _ in rows] == list(fields)
    for name, default in rows:
        assert default in shown.get(fields[name], (str(fields[name]),)), name
