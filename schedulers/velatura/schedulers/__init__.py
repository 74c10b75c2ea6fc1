"""Built-in step kernels and timestep samplers."""

from collections.abc import Sequence

from velatura.core.hookspecs import hookimpl


@hookimpl
def velatura_kernel() -> Sequence[str]:
    """One step of the sampler."""
    return [
        "cps = velatura.schedulers.stochastic:Cps",
        "dance-sde = velatura.schedulers.stochastic:DanceSde",
        "dpm2 = velatura.schedulers.kernels:Dpm2",
        "flow-sde = velatura.schedulers.stochastic:FlowSde",
        "heun = velatura.schedulers.kernels:Heun",
        "ode = velatura.schedulers.kernels:Ode",
    ]


@hookimpl
def velatura_timesteps() -> Sequence[str]:
    """Which steps are trained, which draw noise."""
    return [
        "all = velatura.schedulers.timesteps:All",
        "beta = velatura.schedulers.densities:Beta",
        "high-noise = velatura.schedulers.timesteps:HighNoise",
        "logit-normal = velatura.schedulers.densities:LogitNormal",
        "stratified = velatura.schedulers.timesteps:Stratified",
        "uniform = velatura.schedulers.timesteps:Uniform",
        "window = velatura.schedulers.window:Window",
    ]
