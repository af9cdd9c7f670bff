"""What every group of settings can do, seen from a small tree of groups and from the real ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from priorzero.settings.llm import LLMTrainSettings
from priorzero.settings.policy import PolicySettings, RootPriorSettings
from priorzero.settings.record import (
    Rule,
    Settings,
    merge,
    overlay,
    parse_assignment,
    positive,
    require,
)
from priorzero.types import PriorZeroError


@dataclass(kw_only=True)
class Leaf(Settings):
    width: int = 4
    rate: float = 0.5
    on: bool = False
    limit: int | None = None
    names: list[str] = field(default_factory=lambda: ["a"])

    def rules(self) -> Iterator[Rule]:
        yield from positive(self, "width", "rate")


@dataclass(kw_only=True)
class Tree(Settings):
    leaf: Leaf = field(default_factory=Leaf)
    height: int = 2

    def rules(self) -> Iterator[Rule]:
        yield from positive(self, "height")
        yield Rule("leaf.width", self.leaf.width < 9, "a tree wants narrow leaves")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(width=None), r"'width' is None \(NoneType\); it must be like 4 \(int\)"),
        (dict(width=True), r"'width' is True \(bool\)"),
        (dict(width=2.0), r"2\.0 \(float\); it must be like 4 \(int\)"),
        (dict(rate="1"), r"'1' \(str\); it must be like 0\.5 \(float\)"),
        (dict(on=1), r"1 \(int\); it must be like False \(bool\)"),
        (dict(limit="no"), "'limit' is 'no'.*int or None"),
        (dict(names=["a", 1]), "'names'"),
        (dict(names=("a",)), "tuple"),
        (dict(width=0, rate=-1.0), r"width is 0, but it must be positive\n.*rate is -1\.0"),
    ],
)
def test_a_group_refuses_wrong_values_wherever_they_come_from(values, message):
    with pytest.raises(PriorZeroError, match=message):
        Leaf(**values)
    with pytest.raises(PriorZeroError, match=message):
        leaf = Leaf()
        for name, value in values.items():
            setattr(leaf, name, value)
        leaf.validate()


def test_integers_pass_as_floats_everywhere():
    leaf = overlay(Leaf(rate=1), dict(rate=3))
    for given in (Leaf(rate=2).rate, leaf.rate):
        assert isinstance(given, float)
    leaf.rate = 4
    assert leaf.rate == 4.0 and isinstance(leaf.rate, float)


def test_all_faults_of_all_groups_are_told_with_their_paths():
    tree = Tree()
    tree.height, tree.leaf.width = -1, 12
    with pytest.raises(PriorZeroError, match="settings are impossible") as caught:
        tree.validate()
    assert "height is -1" in str(caught.value) and "leaf.width is 12, but a tree" in str(
        caught.value
    )
    tree.leaf.rate, tree.height = None, "tall"
    with pytest.raises(PriorZeroError) as caught:
        tree.validate()
    assert "'leaf.rate'" in str(caught.value) and "'height'" in str(caught.value)
    tree.leaf = dict(width=3)
    with pytest.raises(PriorZeroError, match="'leaf' is a group of settings"):
        tree.validate()


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(PriorZeroError, match="'Leaf.widht' does not exist; did you mean width"):
        Leaf().widht = 3
    with pytest.raises(PriorZeroError, match=r"'leaf\.widht' does not exist; did you mean width"):
        overlay(Tree(), dict(leaf=dict(widht=3)))
    with pytest.raises(PriorZeroError, match="known here: leaf, height"):
        overlay(Tree(), dict(xyz=1))


def test_overlay_lays_later_layers_over_earlier_ones_and_changes_no_input():
    tree, layer = Tree(), dict(leaf=dict(names=["b"]))
    result = overlay(tree, layer, dict(leaf=dict(width=3)), dict(leaf=dict(width=2)))
    result.leaf.names.append("c")
    assert (result.leaf.width, result.leaf.names) == (2, ["b", "c"])
    assert tree == Tree() and layer == dict(leaf=dict(names=["b"]))
    # Rules wait for `validate`: values that fit together may come one after the other.
    assert overlay(tree, dict(leaf=dict(width=20))).leaf.width == 20


def test_groups_are_written_down_copied_and_sent():
    tree = Tree(leaf=Leaf(width=3))
    written = tree.as_dict()
    assert written["leaf"] == dict(width=3, rate=0.5, on=False, limit=None, names=["a"])
    written["leaf"]["names"].append("b")
    assert tree.leaf.names == ["a"]
    for twin in (copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        assert twin == tree and twin.leaf is not tree.leaf


def test_the_real_groups_stand_on_their_own():
    assert LLMTrainSettings(learning_rate=1e-3, batch_size=0).learning_rate == 1e-3
    with pytest.raises(PriorZeroError, match="weight is 1.5, but it must lie in"):
        RootPriorSettings(weight=1.5)
    with pytest.raises(PriorZeroError, match=r"weight_min is 0\.9"):
        RootPriorSettings(weight_min=0.9)
    with pytest.raises(PriorZeroError, match="num_heads 3"):
        PolicySettings(num_heads=3)


def test_command_line_assignments():
    assert parse_assignment("policy.num_simulations=30") == {"policy": {"num_simulations": 30}}
    assert parse_assignment("llm.model=Qwen/Qwen2.5-0.5B-Instruct") == {
        "llm": {"model": "Qwen/Qwen2.5-0.5B-Instruct"}
    }
    assert parse_assignment('eval.modes=["random"]') == {"eval": {"modes": ["random"]}}
    assert parse_assignment("env.games_dir=a=b") == {"env": {"games_dir": "a=b"}}
    for broken in ("policy.num_simulations", "=3"):
        with pytest.raises(PriorZeroError, match="group.setting=value"):
            parse_assignment(broken)


def test_merge_and_require():
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {
        "a": {"b": 3, "c": 2},
        "d": 4,
    }
    require({"a": (1, True, "it must be")})
    with pytest.raises(PriorZeroError, match="a is 1, but it must be two"):
        require({"a": (1, False, "it must be two")})
