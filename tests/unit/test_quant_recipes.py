"""Does a recipe select the right scheme, survive a TOML round trip, and refuse invalid rules?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgelm.errors import RecipeError
from edgelm.models import decoder as decoder_of
from edgelm.quant import PRESETS, Fp8Scheme, Recipe, Rule, Scheme
from edgelm.quant.recipe import of_role
from edgelm.synth import PUBLISHED

EXPERT = "model.layers.3.mlp.experts.17.down_proj.weight"
ROUTER = "model.layers.3.mlp.gate.weight"


@pytest.mark.parametrize(
    ("preset", "tensor", "shape", "scheme"),
    [
        ("int4", EXPERT, (2048, 1024), "int4-g32-sym"),
        ("int4", "model.layers.0.mlp.gate_proj.weight", (4096, 2048), "int4-g32-sym"),  # Fox: not a router
        ("int4", ROUTER, (64, 2048), None),
        ("int4", "model.embed_tokens.weight", (50304, 2048), "int8-g128-sym"),
        ("int4", "lm_head.weight", (50304, 2048), "int8-g128-sym"),
        ("int4", "model.norm.weight", (2048,), None),
        ("int4", EXPERT, (64, 48), "int4-g16-sym"),
        ("int8", EXPERT, (2048, 1024), "int8-g32-sym"),
        ("int8", ROUTER, (64, 2048), None),
        ("int8", "model.embed_tokens.weight", (50304, 2048), "int8-g128-sym"),
        ("fp8", EXPERT, (2048, 1024), "fp8-row"),
        ("fp8", "model.layers.0.self_attn.q_proj.weight", (2048, 2048), "fp8-row"),
        ("fp8", ROUTER, (64, 2048), None),
        ("fp8", "model.embed_tokens.weight", (50304, 2048), None),
        ("fp8", "lm_head.weight", (50304, 2048), None),
        ("none", EXPERT, (2048, 1024), None),
    ],
)
def test_presets_select_the_scheme_of_each_kind_of_tensor(preset, tensor, shape, scheme):
    models = [decoder_of(config) for config in PUBLISHED.values()]
    model = next((model for model in models if tensor in model.matrices), models[0])
    found = PRESETS[preset].for_model(model).scheme_for(tensor, shape)
    assert (found and found.name) == scheme


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_written_with_patterns_equals_the_preset(preset):
    """Older bundles and checkpoints have recipes with patterns instead of roles."""
    patterns = {"router": "*.mlp.gate.weight", "embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
    former = PRESETS[preset].to_toml()
    for role, pattern in patterns.items():
        former = former.replace(f'role = "{role}"', f'match = "{pattern}"')
    assert "role" not in former
    assert Recipe.from_toml(former) == PRESETS[preset]
    assert Recipe.from_toml(former).is_preset


@pytest.mark.parametrize(
    ("rule", "said"),
    [('role = "experts"', r"role = .experts. is not one of embedding, q, k"), ('role = "q"\nmatch = "*"', "not both")],
)
def test_a_rule_has_a_known_role_or_a_pattern(rule, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.from_toml(f'name = "r"\ndefault = "float"\n[[rule]]\n{rule}\nscheme = "float"\n')


def test_a_rule_for_a_role_that_a_model_lacks_is_allowed():
    """A recipe with a rule for routers or for an untied head can be used for dense and tied models."""
    fox = decoder_of(PUBLISHED["fox-1-1.6b"])
    recipe = Recipe("r", Scheme(4, 32), (of_role("router", None), of_role("head", Scheme(8, 128)))).for_model(fox)
    recipe.check(fox.tensor_shapes)
    with pytest.raises(RecipeError, match=r"mlp\.gate\.weight"):
        replace(recipe, rules=(Rule("*.mlp.gate.weight", None),)).check(fox.tensor_shapes)


def test_the_first_rule_that_matches_decides():
    recipe = Recipe(
        "r",
        None,
        (Rule("*.experts.17.*", Scheme(8, 64)), Rule("*.experts.*", Scheme(4, 32)), Rule("*", Scheme(8, None))),
    )
    assert recipe.scheme_for(EXPERT, (64, 128)) == Scheme(8, 64)
    assert recipe.scheme_for(EXPERT.replace("17", "18"), (64, 128)) == Scheme(4, 32)
    assert recipe.scheme_for(ROUTER, (64, 128)) == Scheme(8, None)
    assert recipe.scheme_for("model.norm.weight", (64,)) is None


@pytest.mark.parametrize(
    "recipe",
    [
        *PRESETS.values(),
        Recipe(
            "all", Scheme(4, 64, symmetric=False), (Rule("*.[qk]_proj.*", None), Rule("lm_head.*", Scheme(8, None)))
        ),
        Recipe("floats", Fp8Scheme(128), (Rule("lm_head.*", Fp8Scheme(None)), Rule("*.experts.*", Scheme(3, 32)))),
        Recipe(
            "choices",
            Fp8Scheme(None, "e5m2"),
            (Rule("*.o_proj.*", Scheme(5, 32), "float", "rtn"), Rule("lm_head.*", Scheme(6, 64), method="gptq")),
            activations="int8-static",
            method="search",
            kv="int8",
        ),
        Recipe('odd "name" \\ \x07 Ω', None, (Rule('a"b\\c', Scheme(4, 128)),)),
    ],
    ids=lambda recipe: repr(recipe.name),
)
def test_toml_round_trips(recipe, tmp_path):
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    (tmp_path / "r.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "r.toml") == recipe


def test_a_recipe_without_a_name_is_named_after_its_file(tmp_path):
    (tmp_path / "mine.toml").write_text('default = "int8-row-sym"\n')
    assert Recipe.load(str(tmp_path / "mine.toml")) == Recipe("mine", Scheme(8, None))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('default = "int4-g32-sym"\ngroup = 32', "unknown key group; the keys are name, default, rule"),
        ('default = "float"\n[[rule]]\nmatch = "*"\nscheme = "float"\nbits = 4', "rule 1: unknown key bits"),
        ('default = "float"\n[[rule]]\nscheme = "float"', 'rule 1: "match" is missing'),
        ('default = "float"\n[[rule]]\nmatch = ""\nscheme = "float"', 'rule 1: "match" is missing'),
        ('default = "float"\n[rule]\nmatch = "*"', r"\[\[rule\]\]"),
        ('name = "x"', '"default" is missing'),
        ("default = 4", '"default" is missing or is not a string'),
        ('default = "int7-g32-sym"', r"int7-g32-sym.*int3\|int4\|int5\|int6\|int8.*fp8-row, fp8-b.*or float"),
        ('default = "float"\nkv = "int4"', "kv = .int4. is not one of auto, float32, float16, int8, fp8"),
        (
            'default = "float"\n[[rule]]\nmatch = "*"\nscheme = "float"\nmethod = "best"',
            "rule 1: method = .best. is not one of auto",
        ),
        ('default = "fp8-b100"', "power of two"),
        ('default = "int4-g24-sym"', "power of two"),
        ("default = ", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
    ],
)
def test_invalid_recipes_are_refused_with_the_place(tmp_path, text, said):
    path = tmp_path / "r.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=said) as error:
        Recipe.load(path)
    assert str(path) in str(error.value)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"no recipe int3: give int4, int8, fp8, none, or the path of a \.toml file"):
        Recipe.load("int3")


def test_a_pattern_that_matches_nothing_is_refused_except_in_presets():
    names = ["model.layers.0.mlp.gate_proj.weight", "model.norm.weight"]
    recipe = Recipe("mine", None, (Rule("*.gate_proj.weight", Scheme(4, 32)), Rule("*.gate_porj.weight", None)))
    with pytest.raises(RecipeError, match=r"\*\.gate_porj\.weight.*none of the 2 tensors.*model\.layers\.0"):
        recipe.check(names)
    recipe.check([*names, "x.gate_porj.weight"])
    for preset in PRESETS.values():
        preset.check(names)
    same_name = Recipe("int4", None, (*PRESETS["int4"].rules, Rule("*.gate_porj.weight", None)))
    with pytest.raises(RecipeError, match="matches none"):
        same_name.check(names)


def test_a_rule_may_name_several_roles() -> None:
    text = 'name = "mine"\ndefault = "int4-g32-sym"\n[[rule]]\nrole = ["q", "o"]\nscheme = "int8-g32-sym"\n'
    recipe = Recipe.from_toml(text)
    assert recipe.rules == (of_role("q", Scheme(8, 32)), of_role("o", Scheme(8, 32)))
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    for roles, message in (("[]", "empty list"), ('["q", "x"]', 'role = "x" is not one of'), ("[1]", 'role = "1"')):
        with pytest.raises(RecipeError, match=message):
            Recipe.from_toml(text.replace('["q", "o"]', roles))
