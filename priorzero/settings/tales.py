"""The generated games of TALES (arXiv:2504.14128) by our ids.

Its benchmark plays each game once, for 100 steps, in the first variation of the package's test set
(`twx_data.py`, `scienceworld_env.py` and `benchmark.py` of github.com/microsoft/tale-suite, March
2026). Without `seed=...` and `variation=...` the same ids train on the packages' training sets.

Its Jericho games are story files, which users bring: `jericho-suite`. Its games of TextWorld proper
and of ALFWorld are downloads.
"""

from __future__ import annotations

_TWX_SEED = 20_000
_SIMON = "simonsays:gameLength={},numDistractors=4,memorization={}"

_TWX = (
    "cookingworld:numLocations=1,numIngredients=2,numDistractorItems=5,includeDoors=0,"
    "limitInventorySize=0",
    "twc:numLocations=1,numItemsToPutAway=1,includeDoors=0,limitInventorySize=0",
    "coin:numLocations=1,numDistractorItems=5,limitInventorySize=0",
    "arithmetic:",
    "mapreader:numLocations=2,maxDistanceApart=1,maxDistractorItemsPerLocation=2,includeDoors=0,"
    "limitInventorySize=0",
    "sorting:",
    *(_SIMON.format(length, 0) for length in (10, 50, 100)),
    *(_SIMON.format(length, 1) + ",verbose=0" for length in (10, 50, 100)),
    *(_SIMON.format(length, 1) + ",verbose=1" for length in (10, 50, 100)),
    "peckingorder:",
)

TEXTWORLD_EXPRESS = tuple(
    f"twx-{game}{'' if game.endswith(':') else ','}seed={_TWX_SEED}" for game in _TWX
)
"""Its sixteen games of TextWorld-Express."""

_SW = {
    "boil": 21,
    "melt": 21,
    "freeze": 21,
    "change-the-state-of-matter-of": 21,
    "use-thermometer": 405,
    "measure-melting-point-known-substance": 327,
    "measure-melting-point-unknown-substance": 225,
    "power-component": 15,
    "power-component-renewable-vs-nonrenewable-energy": 15,
    "test-conductivity": 675,
    "test-conductivity-of-unknown-substances": 450,
    "find-living-thing": 225,
    "find-non-living-thing": 225,
    "find-plant": 225,
    "find-animal": 225,
    "grow-plant": 93,
    "grow-fruit": 93,
    "chemistry-mix": 24,
    "chemistry-mix-paint-secondary-color": 27,
    "chemistry-mix-paint-tertiary-color": 27,
    "lifespan-longest-lived": 93,
    "lifespan-shortest-lived": 93,
    "lifespan-longest-lived-then-shortest-lived": 93,
    "identify-life-stages-1": 9,
    "identify-life-stages-2": 6,
    "inclined-plane-determine-angle": 126,
    "inclined-plane-friction-named-surfaces": 1038,
    "inclined-plane-friction-unnamed-surfaces": 120,
    "mendelian-genetics-known-plant": 90,
    "mendelian-genetics-unknown-plant": 360,
}

SCIENCEWORLD = tuple(f"sw-{task}:variation={first}" for task, first in _SW.items())
"""Its thirty tasks of ScienceWorld, without simplifications."""
