"""The registry: strict about names and options, and open to a user's own class in one line."""

import subprocess
import sys

import pytest
import torch

from linattn.errors import FeatureMapError
from linattn.feature_maps import ELU, FeatureMap, available, get, make, register, registry

FIXED_AND_LEARNED = {
    "elu", "relu", "relu2", "taylor2", "cosformer", "dpfp", "hedgehog", "weighted-hedgehog", "t2r", "rebased",
    "polysketch", "exp",
}  # fmt: skip


@pytest.fixture(autouse=True)
def restore_registry(monkeypatch):
    monkeypatch.setattr(registry, "_MAPS", dict(registry._MAPS))


def test_built_in_maps_are_there_without_an_import_of_their_module():
    code = "import linattn.feature_maps.registry as r; print(*(m.name for m in r.available()))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(names) >= FIXED_AND_LEARNED


def test_available_tells_the_declared_properties():
    table = available()
    assert [info.name for info in table] == list(registry._MAPS)
    for info in table:
        cls = get(info.name)
        assert all(getattr(cls, field) == value for field, value in info._asdict().items())
        assert info.paper
    lines = repr(table).splitlines()
    assert lines[0].split()[:2] == ["name", "positive"]
    assert len(lines) == len(table) + 1
    (row,) = (line for line in lines if line.startswith("cosformer "))
    assert row.split()[:4] == ["cosformer", "yes", "yes", "yes"]  # positive, positional, causal


def test_a_class_of_ones_own_registers_in_one_line():
    @register
    class Mine(ELU):
        name = "mine"

    assert get("mine") is Mine
    assert isinstance(make("mine", 8, num_heads=2), Mine)
    assert register(Mine) is Mine  # again, harmless

    with pytest.raises(FeatureMapError, match=r"'mine'.*Mine.*replace=True"):
        register(type("Other", (ELU,), {"name": "mine"}))
    other = register(type("Other", (ELU,), {"name": "mine"}), replace=True)
    assert get("mine") is other


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_register_refuses_an_empty_name(name):
    with pytest.raises(FeatureMapError, match="no name of its own"):
        register(type("Nameless", (FeatureMap,), {"name": name}))


def test_register_refuses_an_inherited_name_and_what_is_no_map():
    with pytest.raises(FeatureMapError, match="no name of its own"):
        register(type("Heir", (ELU,), {}))
    with pytest.raises(FeatureMapError, match="expected a subclass"):
        register(torch.nn.Linear)
    with pytest.raises(FeatureMapError, match="expected a subclass"):
        register(ELU(4))


def test_an_unknown_name_is_answered_with_close_matches():
    with pytest.raises(FeatureMapError, match=r"'hedgehogs'.*Did you mean 'hedgehog'.*Available: .*elu"):
        get("hedgehogs")
    with pytest.raises(FeatureMapError, match=r"'cos-former'.*'cosformer'"):
        make("cos-former", 8)
    with pytest.raises(FeatureMapError, match="expected a name"):
        make(None, 8)


def test_an_unknown_option_is_answered_with_those_the_map_takes():
    with pytest.raises(FeatureMapError, match=r"dpfp: no option 'mu'.*Did you mean 'nu'.*Available: nu"):
        make("dpfp", 8, mu=2)
    with pytest.raises(FeatureMapError, match=r"elu: no option 'features'.*takes no options"):
        make("elu", 8, features=2)


def test_option_names_follow_keyword_arguments_handed_to_a_base_class():
    class Base(ELU):
        def __init__(self, head_dim, *, power=1, **heads):
            super().__init__(head_dim, **heads)

    class Derived(Base):
        def __init__(self, head_dim, *, depth=1, **rest):
            super().__init__(head_dim, **rest)

    assert registry.option_names(Derived) == ("depth", "power")
    assert registry.option_names(ELU) == ()
    make(Derived, 8, depth=2, power=3)


@pytest.mark.parametrize("name", sorted(FIXED_AND_LEARNED))
def test_options_rebuild_the_map(name):
    changed = {
        "dpfp": {"nu": 2},
        "cosformer": {"max_length": 7},
        "t2r": {"num_features": 5},
        "exp": {"num_features": 5},
    }
    changed["polysketch"] = {"sketch": 3, "degree": 8}
    options = changed.get(name, {})
    phi = make(name, 6, num_heads=4, num_kv_heads=2, scale=0.5, dtype=torch.float64, **options)
    assert phi.options() == options
    again = make(name, 6, num_heads=4, num_kv_heads=2, scale=0.5, dtype=torch.float64, **phi.options())
    again.load_state_dict(phi.state_dict())
    q = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    positions = torch.arange(3)[None]
    assert torch.equal(again.forward_queries(q, positions).values, phi.forward_queries(q, positions).values)
    assert phi.scale == 0.5
    assert name not in changed or next(iter(options)) in repr(phi)


def test_an_instance_is_checked_against_the_heads_and_moved():
    phi = make("hedgehog", 8, num_heads=4, num_kv_heads=2)
    assert make(phi, 8, num_heads=4, num_kv_heads=2) is phi
    assert make(phi, 8, num_heads=4, num_kv_heads=2, scale=8**-0.5, dtype=torch.float64) is phi
    assert phi.key["weight"].dtype == torch.float64
    with pytest.raises(FeatureMapError, match=r"\(8, 4, 2\).*\(8, 4, 4\)"):
        make(phi, 8, num_heads=4)
    with pytest.raises(FeatureMapError, match=r"scale=0\.35.*scale=1"):
        make(phi, 8, num_heads=4, num_kv_heads=2, scale=1.0)
    with pytest.raises(FeatureMapError, match=r"\['nu'\].*Hedgehog instance"):
        make(phi, 8, num_heads=4, num_kv_heads=2, nu=1)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(FeatureMapError, match="num_kv_heads=2"):
        make("elu", 8, num_heads=3, num_kv_heads=2)
