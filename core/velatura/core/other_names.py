"""Names by which papers call what a recipe calls otherwise: said where such a name is asked for. Data only."""

from __future__ import annotations

WINDOW = "'flow-grpo' with timesteps 'window'"
TEMPFLOW = "TempFlow-GRPO is 'flow-grpo' with step_weight: sigma-sqrt-dt, or timesteps 'window' of width 1"
OTHER_NAMES: dict[str, dict[str, str]] = {
    "objective": {
        "mix-grpo": f"MixGRPO is {WINDOW}",
        "flow-grpo-fast": f"Flow-GRPO-Fast is {WINDOW}, place: random",
        "tempflow-grpo": TEMPFLOW,
        "tempflow": TEMPFLOW,
        "dance-grpo": "DanceGRPO is 'flow-grpo' with kernel 'dance-sde'",
        "diffusion-nft": "DiffusionNFT is 'nft'",
        "flow-matching": "flow matching is 'sft'",
    },
    "distiller": {
        "diffusion-opd": "DiffusionOPD is 'velocity-match' with weight: dt2, or with noise 'opd-kl'",
        "dance-opd": "DanceOPD is 'velocity-match' with timesteps 'beta', over: steps, count: 1",
        "flow-opd": "Flow-OPD is 'opd-pg'",
    },
    "kernel": {
        "euler": "Euler's step of the ODE is 'ode'",
        "sde": "'flow-sde' is Flow-GRPO's, 'dance-sde' DanceGRPO's",
        "dpm-solver": "DPM-Solver-2 is 'dpm2'",
    },
    "timesteps": {
        "sliding": "a window that slides is 'window', place: sliding",
        "random": "steps at random are 'uniform'; a window at random is 'window', place: random",
        "fixed": "a window that stays is 'window', place: fixed",
    },
    "guidance": {"hybrid": "guided rollouts with a conditional loss are 'rollout-only'"},
    "advantage": {"rank": "ranks in a group are 'rank-normal'", "grpo": "GRPO's z-score in a group is 'group-z'"},
}
"""Kind -> name without `-` and `_` apart -> what is said of it."""


def called_otherwise(kind: str, name: str) -> str:
    """What to say of a name that a paper has for something else, or nothing.

    >>> called_otherwise("kernel", "Euler")
    " Euler's step of the ODE is 'ode' here."
    """
    found = {_plain(other): said for other, said in OTHER_NAMES.get(kind, {}).items()}.get(_plain(name), "")
    return f" {found[0].upper()}{found[1:]} here." if found else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
