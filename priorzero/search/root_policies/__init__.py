"""Root policies: how a search starts at its roots, whom it tries, and what it teaches.

Each file here is one, found by its name, which is what the setting `policy.root_policy` names. It
offers one function:

    def begin(
        roots: Sequence[Root],
        priors: Sequence[RootPrior],
        values: np.ndarray,
        inner_actions: int,
        settings: PolicySettings,
        noise: np.random.Generator | None,
    ) -> SearchTree

with `priors[b]` the mixture of `roots[b]` (without noise), `values` `[B]` the network's values of
the roots, `inner_actions` K: nodes below a root branch over the ids 0..K-1, and `noise` the source
of exploration noise, None outside collection. What it returns is asked `select` and `expand` by
turns, once per simulation, and `results` at the end (`priorzero/search/planner.py`); `nodes` is
asked then of the roots whose tree somebody wants to see.

A root policy whose training target is an operator on the prior may offer it as one,

    def targets(search: SearchTree, priors: Sequence[np.ndarray]) -> list[np.ndarray]

with `search` what its `begin` returned, after the last simulation: the targets `[A]` of the roots
with `priors[b]`, positive probabilities `[A]`, in the mixture's place. All that the search found
stays as it is. Without it the settings `policy.target_prior` and `llm.sft.target_prior` must be
mixture.
"""
