"""Made-up games and roots, for comparing one form of the search with another."""

from __future__ import annotations

import numpy as np

from priorzero.plugins import load
from priorzero.search.root_prior import RootPrior
from priorzero.search.roots import Root
from priorzero.settings.policy import GumbelSettings, PolicySettings

POLICIES = ["puct", "gumbel"]  # root policies with a fused form


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


class Game:
    """Outputs by the path of actions alone. With `coarse` numbers many scores are equal."""

    def __init__(self, seed: int, actions: int, coarse: bool) -> None:
        self.seed, self.actions, self.coarse = seed, actions, coarse

    def look(self, row: int, path: tuple[int, ...]):
        """reward, value, logits `[K]` float32."""
        rng = np.random.default_rng([self.seed, row, *(a + 1 for a in path)])
        reward, value, logits = rng.normal(), rng.normal(), 2.0 * rng.normal(size=self.actions)
        if self.coarse:
            reward, value, logits = np.round(reward), np.round(value), np.round(logits / 2)
        return reward, value, logits.astype(np.float32)


def begin(policy: str, game: Game, simulations: int, noisy: bool):
    """The same search, as often as it is called."""
    rng = np.random.default_rng(game.seed)
    sizes = [1, game.actions, *rng.integers(1, game.actions + 1, size=3)]
    ids = [np.sort(rng.choice(game.actions, size=n, replace=False)) for n in sizes]
    roots = [Root(np.zeros((1, 2), np.float32), np.zeros(0, np.int64), i) for i in ids]
    looks = [game.look(row, ()) for row in range(len(roots))]
    logs = [log_softmax(look[2][i].astype(float)) for look, i in zip(looks, ids, strict=True)]
    settings = PolicySettings(
        num_simulations=simulations,
        discount_factor=0.9,
        gumbel=GumbelSettings(max_considered_actions=4),
    )
    return load("priorzero.search.root_policies", policy).begin(
        roots,
        [RootPrior(p, p, None, 0.0) for p in logs],
        np.array([look[1] for look in looks]),
        game.actions,
        settings,
        np.random.default_rng(7) if noisy else None,
    )


def grow(tree, game: Game, simulations: int) -> list[list[tuple[int, ...]]]:
    """Per root the paths of its nodes, in the order in which they were expanded."""
    paths: list[list[tuple[int, ...]]] = []
    for _ in range(simulations):
        parents, actions = tree.select()
        paths = paths or [[()] for _ in parents]
        for nodes, parent, action in zip(paths, parents, actions, strict=True):
            nodes.append((*nodes[parent], int(action)))
        looks = [game.look(row, nodes[-1]) for row, nodes in enumerate(paths)]
        rewards, values, logits = (np.array(x) for x in zip(*looks, strict=True))
        tree.expand(rewards, values, logits)
    return paths


def random_roots(count: int, context: int, actions: int, seed: int) -> list[Root]:
    rng = np.random.default_rng(seed)
    roots = []
    for row in range(count):
        length = 1 + row % context
        roots.append(
            Root(
                rng.normal(size=(length, 6)).astype(np.float32),
                rng.integers(actions, size=length - 1),
                np.sort(rng.choice(actions, size=int(rng.integers(2, actions)), replace=False)),
            )
        )
    return roots
