import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dctlib._io import ROOT
from dctlib.discovery.options import DiscoverOptions
from dctlib.paper.params import load_profile, load_run, read_defaults

PROFILES = ["smoke", "laptop", "paper"]


@pytest.mark.parametrize("name", PROFILES)
def test_the_committed_profiles_are_valid_and_papermill_takes_what_they_say(name):
    assert load_profile(name) == yaml.safe_load((ROOT / "params" / f"{name}.yaml").read_text())


def test_the_default_is_laptop_on_this_machine_alone():
    assert load_run().profile == "laptop"
    assert load_run().ray == ""


def test_the_run_names_a_cluster_and_nothing_unknown(root):
    (root / "params" / "run.yaml").write_text("profile: smoke\nray: auto\n")
    assert load_run(root).ray == "auto"
    (root / "params" / "run.yaml").write_text("profile: smoke\nrays: auto\n")
    with pytest.raises(ValueError, match="unknown key rays"):
        load_run(root)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    return tmp_path


def content():
    return yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())


def written(root, value):
    (root / "params" / "mine.yaml").write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return load_profile("mine", root)


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(ValueError, match="no profile 'lapto': expected one of laptop, paper, smoke, study"):
        load_profile("lapto")


@pytest.mark.parametrize("name", ["../params/smoke", "run", ""])
def test_a_profile_is_a_name_not_a_path(name):
    with pytest.raises(ValueError, match="no profile"):
        load_profile(name)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("training_curves", "width", 3, "params/mine.yaml: unknown key training_curves.width"),
        ("training_curves", "widths", [8, 0], r"training_curves.widths.1 = 0"),
        ("training_curves", "widths", [], r"training_curves.widths"),
        ("training_curves", "nonlinearity", -1, "training_curves.nonlinearity = -1"),
        ("training_curves", "source", 20, "source=20 must lie below target=20"),
        ("training_curves", "dtype", "int8", "training_curves.dtype = 'int8'"),
        ("training_curves", "test", 1, "training_curves.test = 1"),
        ("deeper_models", "test", 1, "deeper_models.test = 1"),
        ("password_locked", "prompt", "Solve it.", "must hold {question}"),
        ("auditing", "num_factors", 5, "auditing.num_factors = 5"),
        ("auditing", "seeds", [], "auditing.seeds"),
        ("auditing", "seeds", [3], "auditing.seeds"),
        ("secrets", "seeds", [3], "give 2 or more, all different"),
        ("anomaly", "seeds", [3, 3], "give 2 or more, all different"),
        ("organisms", "harmful_batch", 0, "organisms.harmful_batch = 0"),
        ("organisms", "kinds", ["refusl"], "organisms.kinds.0 = 'refusl'"),
        ("organisms", "steps", True, "organisms.steps = True"),
        ("organisms", "steps", 1.5, "organisms.steps = 1.5"),
        ("organisms", "steps", None, "organisms.steps = None"),
        ("organisms", "model", 3, "organisms.model = 3"),
        ("organisms", "learning_rate", "5e-4", "organisms.learning_rate = '5e-4'"),
        ("organisms", "learning_rate", float("nan"), "organisms.learning_rate = nan"),
        ("locked", "least", 80, "locked.least = 80"),
        ("rerouted", "bounds", {"min_pmi": 0.3}, "rerouted.bounds.max_perplexity is missing"),
        ("choices", "others", {"prompt": []}, "unknown key choices.others.prompt"),
        ("baselines", "tries", 5, "tries=5 are part of num_factors=4"),
        ("discover", "source", None, "give both source and target, or neither"),
        ("discover", "rank_by", "fluent", "discover.rank_by"),
    ],
)
def test_messages_name_file_and_key(root, section, key, value, message):
    changed = content()
    changed[section][key] = value
    with pytest.raises(ValueError, match=message):
        written(root, changed)


def test_a_name_of_no_notebook_is_unknown(root):
    with pytest.raises(ValueError, match=r"params/mine\.yaml: unknown key organism; is it misspelt"):
        written(root, {"organism": content()["organisms"]})


def test_a_profile_may_hold_some_sections_only(root):
    some = {"organisms": content()["organisms"]}
    assert written(root, some) == some


def test_null_is_taken_where_the_notebook_says_so(root):
    some = {"locked": content()["locked"] | {"base": None}}
    assert written(root, some) == some


def test_every_wrong_key_has_a_line_of_its_own(root):
    changed = content()
    changed["organisms"] |= {"steps": 0, "seed": -1}
    with pytest.raises(ValueError) as error:
        written(root, changed)
    assert [line.split(" = ")[0] for line in str(error.value).splitlines()] == [
        "params/mine.yaml: organisms.steps",
        "params/mine.yaml: organisms.seed",
    ]


def test_a_missing_key_is_named(root):
    changed = content()
    del changed["organisms"]["steps"]
    with pytest.raises(ValueError, match=r"params/mine\.yaml: organisms\.steps is missing"):
        written(root, changed)


@pytest.mark.parametrize("text", ["", "- a\n- b", "a: [", "!!python/object/apply:os.system ['true']"])
def test_what_is_not_a_mapping_is_refused(root, text):
    with pytest.raises(ValueError, match=r"params/mine\.yaml"):
        written(root, text)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=6)
)
def test_any_other_yaml_is_a_value_error(tmp_path_factory, value):
    root = tmp_path_factory.mktemp("fuzz")
    (root / "params").mkdir()
    (root / "notebooks").symlink_to(ROOT / "notebooks")
    with pytest.raises(ValueError, match=r"params/mine\.yaml"):
        written(root, yaml.safe_dump(value))


@pytest.mark.parametrize(
    ("section", "key", "value", "most"),
    [
        ("replicates", "fit_prompts", 33, 32),
        ("training_curves", "validation", 33, 32),
        ("circuit_breaker", "fit_prompts", 33, 32),
        ("password_locked", "test", 101, 100),
    ],
)
def test_more_prompts_than_a_split_holds_are_refused(root, section, key, value, most):
    sections = content()
    sections[section][key] = value
    with pytest.raises(ValueError, match=rf"(?s){section}.{key}.*less than or equal to {most}"):
        written(root, sections)


def test_the_options_of_discover_are_the_parameters_of_its_notebook():
    parameters = read_defaults(ROOT / "notebooks" / "discover.ipynb")
    assert set(parameters) - {"profile"} == set(DiscoverOptions.model_fields)
